"""ignite on the ranks of a world: `Parallel(backend, nproc_per_node=2)` starts nothing, and runs a function on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jupyter_llmcloud.system.import_hooks import when_imported
from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.integrations.launchers import compare_number
from jupyter_llmcloud.training.run import Run

_SPAWN = "ignite.distributed.comp_models.native:_NativeDistModel.spawn"


def adopt(run: Run) -> None:
    """Look after it as soon as a cell imports it. Called once, in a rank."""

    def make(_: Any) -> Callable[..., None]:
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

    when_imported(patches.IGNITE.module, lambda: patches.IGNITE.apply({_SPAWN: make}))
