"""How long a warm cell that does nothing takes on two ranks, from the magic.

Against ipyparallel's `%%px` and nbdistributed's cells; and against Dask's `client.run`, which is no notebook tool but
the floor of everything that sends its cells through a scheduler.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from tests.bench.measured import Row
from tests.bench.notebooks import IPYPARALLEL, NBDISTRIBUTED, NotebookPeer
from tests.bench.peers import PeerMissing
from tests.bench.shell import Shell, product

ROUNDS = 5
CELLS = 40
SLOW_CELLS = 10  # of a peer that takes a tenth of a second for each
READY_S = 60.0

CLIENT_RUN = NotebookPeer(
    "Dask client.run",
    start="""\
from distributed import Client, LocalCluster
def nothing():
    pass
cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
client = Client(cluster)
client.wait_for_workers(2)
""",
    stop="client.close()\ncluster.close()",
)
_OURS = "%%distribute\npass"
# nbdistributed does not say when a cell has failed, so whether cells arrive is seen on disk.
_READY = "import pathlib, os\npathlib.Path(FOLDER, f'ready-{os.getpid()}').touch()"


def measure(folder: Path) -> list[Row]:
    """Rounds of all contenders in turn."""
    ours: list[float] = []
    missing = ""
    with contextlib.ExitStack() as stack:
        product_shell = stack.enter_context(product(folder / "ours"))
        product_shell.run("%load_ext jupyter_llmcloud")
        product_shell.run("%%distribute -n 2\npass")
        product_shell.run(_OURS, 10)
        contenders = [
            _Contender(stack, IPYPARALLEL, IPYPARALLEL.cell("pass"), CELLS, folder / "ipyparallel"),
            _Contender(stack, CLIENT_RUN, "client.run(nothing)", CELLS, folder / "dask"),
        ]
        try:
            nbdistributed = _Contender(stack, NBDISTRIBUTED, "pass", SLOW_CELLS, folder / "nbdistributed")
            contenders.insert(1, nbdistributed)
        except PeerMissing as reason:
            missing = str(reason)
        for _ in range(ROUNDS):
            ours += product_shell.run(_OURS, CELLS)
            for contender in contenders:
                contender.round()
    rows = [_row(contender.peer.name, ours, contender.seconds) for contender in contenders]
    if missing:
        rows.append(_row(NBDISTRIBUTED.name, ours, [], missing))
    return rows


class _Contender:
    """A peer with two ranks that answer."""

    def __init__(self, stack: contextlib.ExitStack, peer: NotebookPeer, cell: str, times: int, folder: Path) -> None:
        self.peer = peer
        self.seconds: list[float] = []
        self._cell = cell
        self._times = times
        self._shell: Shell = stack.enter_context(peer.shell(folder))
        peer.begin(self._shell)
        if peer is not CLIENT_RUN:
            _see_ranks(peer, self._shell, folder)
        self._shell.run(cell, 5)

    def round(self) -> None:
        self.seconds += self._shell.run(self._cell, self._times)


def _see_ranks(peer: NotebookPeer, shell: Shell, folder: Path) -> None:
    shell.run(peer.cell(_READY.replace("FOLDER", repr(str(folder)))))
    deadline = time.monotonic() + READY_S
    while len(list(folder.glob("ready-*"))) < 2:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{peer.name}: no cell has arrived at both ranks in {READY_S:g} s")
        time.sleep(0.05)


def _row(peer: str, ours: list[float], theirs: list[float], missing: str = "") -> Row:
    goal = 0.25 if peer == IPYPARALLEL.name else None
    what = "a warm cell, pass, 2 ranks"
    return Row("dispatch", what, "ms", peer, _ms(ours), _ms(theirs), goal=goal, missing=missing)


def _ms(seconds: list[float]) -> list[float]:
    return [1000 * value for value in seconds]
