"""`%load_ext jupyter_llmcloud`: registers the magics, their help and the completion of their options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jupyter_llmcloud.core.compression.spec import COMPRESS, EXPORT
from jupyter_llmcloud.core.data.spec import PREPARE, SHARDS
from jupyter_llmcloud.core.explain.spec import EXPLAIN
from jupyter_llmcloud.core.options import Syntax, usage
from jupyter_llmcloud.core.search.spec import SWEEP
from jupyter_llmcloud.core.spec import DISTRIBUTE, SERVE, SERVE_CELL
from jupyter_llmcloud.magics.commands import clusters, data, distribute, endpoints, runs, serve_code, worlds
from jupyter_llmcloud.magics.commands.completion import complete_line
from jupyter_llmcloud.magics.compression import compress
from jupyter_llmcloud.magics.output import shown_paths
from jupyter_llmcloud.magics.search import commands as search
from jupyter_llmcloud.magics.search import finders
from jupyter_llmcloud.magics.understand import explain

VERBS: dict[str, dict[str, Syntax]] = {
    "%cluster": clusters.VERBS,
    "%world": worlds.VERBS,
    "%runs": runs.VERBS,
    "%endpoints": endpoints.VERBS,
    "%sweeps": search.VERBS,
}
SINGLE: dict[str, Syntax] = {
    "%%distribute": DISTRIBUTE,
    "%%sweep": SWEEP,
    "%push": distribute.PUSH,
    "%pull": distribute.PULL,
    "%serve": SERVE,
    "%%serve": SERVE_CELL,
    "%compress": COMPRESS,
    "%export": EXPORT,
    "%explain": EXPLAIN,
    "%prepare": PREPARE,
    "%shards": SHARDS,
    "%lr_find": finders.LR_FIND,
    "%batch_find": finders.BATCH_FIND,
}


def load(shell: Any) -> None:
    """Register everything with an IPython shell."""
    shown_paths.install()
    groups = [
        distribute.DistributeMagics,
        clusters.ClusterMagics,
        worlds.WorldMagics,
        runs.RunsMagics,
        endpoints.EndpointMagics,
        serve_code.ServeCellMagics,
        data.DataMagics,
        search.SweepMagics,
        compress.CompressMagics,
        explain.ExplainMagics,
    ]
    for group in groups:
        shell.register_magics(group(shell))
    _describe(shell)
    _complete(shell)


def unload(shell: Any) -> None:
    """Forget the magics; worlds and clusters live on."""
    for name in SINGLE:
        shell.magics_manager.magics["cell" if name.startswith("%%") else "line"].pop(name.lstrip("%"), None)
    for name in VERBS:
        shell.magics_manager.magics["line"].pop(name.lstrip("%"), None)


def _describe(shell: Any) -> None:
    """`%%distribute?` shows the options."""
    for name, syntax in SINGLE.items():
        kind = "cell" if name.startswith("%%") else "line"
        _set_doc(shell.magics_manager.magics[kind][name.lstrip("%")], usage(syntax))
    for name, verbs in VERBS.items():
        text = "\n\n".join(usage(syntax) for syntax in verbs.values())
        _set_doc(shell.magics_manager.magics["line"][name.lstrip("%")], text)


def _set_doc(bound: Any, text: str) -> None:
    function = getattr(bound, "__func__", bound)
    function.__doc__ = f"{(function.__doc__ or '').splitlines()[0]}\n\n{text}"


def _complete(shell: Any) -> None:
    completer = getattr(shell, "Completer", None)
    if completer is None:
        return
    from IPython.core.completer import SimpleCompletion, context_matcher

    @context_matcher()
    def magic_options(context: Any) -> Any:
        """Verbs and options of our magics, their values, and names of what there is."""
        found = completions(context.line_with_cursor[: context.cursor_position], shell.user_ns)
        return {
            "completions": [SimpleCompletion(text, type="param") for text in found],
            "suppress": bool(found),
        }

    completer.custom_matchers = [m for m in completer.custom_matchers if m.__name__ != "magic_options"]
    completer.custom_matchers.append(magic_options)


def completions(line: str, variables: Mapping[str, Any] | None = None) -> list[str]:
    """What can complete the last word of a line that begins with one of our magics; `variables` are the notebook's."""
    return complete_line(line, VERBS, SINGLE, variables or {})
