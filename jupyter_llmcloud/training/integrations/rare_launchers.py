"""Launchers that few cells use, on the ranks of a world: ignite's `Parallel`, and torchrun's own `elastic_launch`.

They start nothing, and run a function of the cell on the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jupyter_llmcloud.system.import_hooks import when_imported
from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.integrations.launchers import compare_number, is_of_cell
from jupyter_llmcloud.training.run import Run


def adopt(run: Run) -> None:
    """Look after them as soon as a cell imports them. Called once, in a rank."""
    makers = {patches.IGNITE: _ignite, patches.ELASTIC_LAUNCH: _elastic_launch}

    def watch(patch: patches.Patch, make: Callable[[Any, Run], Any]) -> None:
        def apply() -> None:
            patch.apply({target: lambda original: make(original, run) for target in patch.targets})

        when_imported(patch.module, apply)

    for patch, make in makers.items():
        watch(patch, make)


def _ignite(_: Any, run: Run) -> Callable[..., None]:
    def spawn(
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs_dict: Mapping[str, Any] | None = None,
        nproc_per_node: int = 1,
        nnodes: int = 1,
        *rest: Any,
        **options: Any,
    ) -> None:
        import ignite.distributed as idist

        compare_number("Parallel: nproc_per_node", nproc_per_node * nnodes, run)
        idist.utils.sync()
        try:
            fn(idist.get_local_rank(), *args, **(kwargs_dict or {}))
        finally:
            idist.finalize()

    return spawn


def _elastic_launch(original: Any, run: Run) -> Callable[..., dict[int, Any]]:
    def __call__(self: Any, *args: Any) -> dict[int, Any]:
        if not is_of_cell(self._entrypoint):
            results: dict[int, Any] = original(self, *args)
            return results
        wanted = self._config.nproc_per_node * self._config.max_nodes
        compare_number("elastic_launch: nproc_per_node", wanted, run)
        return {run.rank: self._entrypoint(*args)}

    return __call__
