"""How long a warm cell that does nothing takes, from the magic, against ipyparallel's `%%px`."""

from __future__ import annotations

from pathlib import Path

from tests.bench.measured import Row
from tests.bench.shell import Shell, product

ROUNDS = 5
CELLS = 40

_PEER_START = """\
import ipyparallel
cluster = ipyparallel.Cluster(n=2)
client = cluster.start_and_connect_sync()
"""
_OURS = "%%distribute\npass"
_THEIRS = "%%px\npass"


def measure(folder: Path) -> list[Row]:
    """`pass` on two ranks: rounds of both contenders in turn."""
    ours: list[float] = []
    theirs: list[float] = []
    (folder / "ipyparallel").mkdir(parents=True)
    with product(folder / "ours") as product_shell, Shell({"IPYTHONDIR": str(folder / "ipyparallel")}) as peer_shell:
        product_shell.run("%load_ext jupyter_llmcloud")
        product_shell.run("%%distribute -n 2\npass")
        peer_shell.run(_PEER_START)
        try:
            for shell, cell in ((product_shell, _OURS), (peer_shell, _THEIRS)):
                shell.run(cell, 10)
            for _ in range(ROUNDS):
                ours += product_shell.run(_OURS, CELLS)
                theirs += peer_shell.run(_THEIRS, CELLS)
        finally:
            peer_shell.run("cluster.stop_cluster_sync()")
    return [
        Row("dispatch", "a warm cell, pass, 2 ranks", "ms", "ipyparallel %%px", _ms(ours), _ms(theirs), goal=0.25),
    ]


def _ms(seconds: list[float]) -> list[float]:
    return [1000 * value for value in seconds]
