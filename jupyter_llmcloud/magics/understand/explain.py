"""%explain: why a model answers so, and how it stands inputs that are changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from IPython.core.magic import Magics, line_magic, magics_class

from jupyter_llmcloud.client.model_work.explaining import ask_robustness, ask_scores, find_target
from jupyter_llmcloud.client.stop_signal import said, swallow_more_presses
from jupyter_llmcloud.core.explain.spec import EXPLAIN, ExplainSpec
from jupyter_llmcloud.core.options import parse, split
from jupyter_llmcloud.core.spec import Interface
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics.output.progress_line import ProgressLine
from jupyter_llmcloud.magics.serving.endpoint import Endpoint
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.magics.session.run_handle import RunHandle, named
from jupyter_llmcloud.magics.understand.results import Explanation, Robustness

Tell = Callable[[str], None]


def explain(
    model: str | Path | Endpoint | RunHandle, input: Any = None, *, progress: Tell | None = None, **options: Any
) -> Explanation | Robustness:
    """Say which parts of an input led a model to its answer, as `%explain` does.

    Args:
        model: an endpoint, a run (its name, its id or its handle) or a folder.
        input: a text; of a classifier of images a file or an image, of a module an array.
        adversarial: also a list of texts, of rows with `text` and `label`, or a pair (inputs, labels).
        outside: also a list of texts.
        progress: told in a few words how far it is.
    """
    beside = {name: options.pop(name) for name in ("adversarial", "outside") if _is_value(options.get(name))}
    written = {**options, **{name: name for name in beside}}
    spec = ExplainSpec.make(written, Interface.NOTEBOOK).checked(input is not None)
    name, tell = model.name if isinstance(model, Endpoint) else named(model), progress or (lambda text: None)
    server = session.current().known_server
    target = find_target(name, spec.base_model, server, is_endpoint=isinstance(model, Endpoint))
    try:
        if spec.adversarial is None:
            return Explanation(*ask_scores(target, input, spec, tell))
        data, outside = (beside.get(option, getattr(spec, option)) for option in ("adversarial", "outside"))
        return Robustness(*ask_robustness(target, data, outside, spec, tell))
    except KeyboardInterrupt:
        swallow_more_presses()
        raise said("stopped.", "KeyboardInterrupt: stopped.") from None


def _is_value(given: Any) -> bool:
    return given is not None and not isinstance(given, str | Path)


def _variable(name: str, variables: Mapping[str, Any], option: str) -> Any:
    """The variable of the notebook. Raises UsageError when there is none."""
    if name not in variables:
        what = "a variable of this notebook" if option == "--input" else "a file nor a variable of this notebook"
        raise UsageError(f"{option} {name!r} is {'not' if option == '--input' else 'neither'} {what}.")
    return variables[name]


@magics_class
class ExplainMagics(Magics):
    """Registered by `%load_ext jupyter_llmcloud`."""

    @line_magic
    def explain(self, line: str) -> Explanation | Robustness:
        """%explain MODEL "text": which parts of it led to the answer; %explain MODEL --adversarial DATA: a table."""
        parsed = parse(EXPLAIN, split(line, "%explain"))
        variables: Mapping[str, Any] = self.shell.user_ns if self.shell is not None else {}
        given = parsed.given
        model, *words = parsed.arguments
        if words and "input" in given:
            raise UsageError(
                f"%explain: {words[0]!r} and --input {given['input']} are both what is asked: leave one out."
            )
        asked: Any = " ".join(words) or None
        if "input" in given:
            asked = _variable(given.pop("input"), variables, "--input")
        served = variables.get(model)
        for name in ("adversarial", "outside"):
            if name in given and not os.path.exists(os.path.expanduser(given[name])):
                value = _variable(given[name], variables, f"--{name}")
                given[name] = [value] if isinstance(value, str) else value
        line_of_progress = ProgressLine()
        result = explain(
            served if isinstance(served, Endpoint) else model, asked, progress=line_of_progress.tell, **given
        )
        line_of_progress.tell("")
        return result
