"""Peers that live in a notebook as we do: how their ranks are started there, and what a cell for all of them looks like."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench import launch, peers
from tests.bench.shell import Shell, peer_shell


@dataclass(frozen=True)
class NotebookPeer:
    """What a user of the peer types.

    Attributes:
        name: in the table.
        package: that must be installed aside; "" for what stands in the `bench` extra.
        prepare: a cell that belongs to the harness, not to the peer.
        start: the cell that starts two ranks.
        heading: the first line of a cell for all ranks.
        stop: the cell that ends them.
    """

    name: str
    start: str
    stop: str
    heading: str = ""
    prepare: str = ""
    package: str = ""

    def cell(self, body: str) -> str:
        """`body` as a cell for all ranks."""
        return self.heading + body

    @contextlib.contextmanager
    def shell(self, folder: Path) -> Iterator[Shell]:
        """A fresh notebook, prepared; ends its ranks. Raises PeerMissing."""
        python = peers.python_with(self.package) if self.package else None
        path = {"PATH": f"{python.parent}:{os.environ['PATH']}"} if python else {}  # nbdistributed starts `python`
        with peer_shell(folder, python, {**launch.CPU, **path}) as shell:
            if self.prepare:
                shell.run(self.prepare)
            try:
                yield shell
            finally:
                with contextlib.suppress(Exception):  # the shell may have gone
                    shell.run(self.stop)

    def begin(self, shell: Shell) -> float:
        """Start two ranks; seconds since the epoch when that began."""
        shell.begin(self.start.replace("PORT", str(launch.free_port())))
        return shell.finish()[0]


IPYPARALLEL = NotebookPeer(
    "ipyparallel %%px",
    # Engines know nothing of torch.distributed; this is what its users write.
    start="""\
import ipyparallel
cluster = ipyparallel.Cluster(n=2)
client = cluster.start_and_connect_sync()
client[:].scatter("rank", range(2), flatten=True, block=True)
client[:].execute(
    "import os\\n"
    "os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', "
    "MASTER_ADDR='127.0.0.1', MASTER_PORT='PORT')",
    block=True,
)
""",
    heading="%%px\n",
    stop="cluster.stop_cluster_sync()",
)

NBDISTRIBUTED = NotebookPeer(
    "nbdistributed",
    package="nbdistributed",
    # A cell that is sent before the workers have connected is lost, and %dist_init does not wait for that: without
    # this, the first cell would take nbdistributed 30 s.
    prepare="""\
def nbdistributed_magics():
    return get_ipython().magics_manager.registry["DistributedMagic"]
def wait_for_workers():
    while True:
        try:
            return nbdistributed_magics()._comm_manager.send_to_all("get_status", {}, timeout=0.1)
        except TimeoutError:
            continue
""",
    start="%load_ext nbdistributed\n%dist_init -n 2\nwait_for_workers()\n",
    # Its own %dist_shutdown ends every process on the machine that looks like a worker. The first line keeps this cell
    # in the notebook: all that do not begin with % go to the ranks.
    stop="%pwd\nnbdistributed_magics()._process_manager.shutdown()\n",
)
