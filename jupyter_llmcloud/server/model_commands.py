"""`jupyter llmcloud explain`, `compress` and `export`: work on models, in a terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from jupyter_llmcloud.client import discovery
from jupyter_llmcloud.client.follow_run import TerminalRun
from jupyter_llmcloud.client.model_work.compressing import (
    DISTILLED,
    CompressedModels,
    CompressTexts,
    export_model,
    make_models,
    texts_at,
)
from jupyter_llmcloud.client.model_work.explained import HEADINGS, ExplainedAnswer, tried_in_words
from jupyter_llmcloud.client.model_work.explaining import ExplainTarget, ask_robustness, ask_scores, find_target
from jupyter_llmcloud.core.compression.spec import COMPRESS, CompressSpec, ExportSpec
from jupyter_llmcloud.core.explain import robustness
from jupyter_llmcloud.core.explain.spec import ExplainSpec
from jupyter_llmcloud.core.output.columns import format_table
from jupyter_llmcloud.core.spec import Interface
from jupyter_llmcloud.errors import UsageError, WorldError
from jupyter_llmcloud.server.run_command import add_options, read_options


def add_explain(nouns: Any) -> None:
    """The command and its options."""
    command = nouns.add_parser(
        "explain", help="which parts of an input led a model to its answer, or how it stands changed inputs"
    )
    command.add_argument("model", metavar="MODEL", help="an endpoint of the running server, a run or a folder")
    command.add_argument("words", nargs="*", metavar="INPUT", help="a text, or a file with an image or an array (.npy)")
    add_options(command, ExplainSpec.options(Interface.SHELL))
    command.add_argument("--json", action="store_true", help="the scores or the tables as JSON, with all there is")
    command.set_defaults(run=_explain, noun="explain", more="words")


def add_compress(nouns: Any) -> None:
    """The command and its options."""
    command = nouns.add_parser("compress", help="make smaller models of one, and measure them beside it")
    command.add_argument("target", metavar="TARGET", help="a run or a folder in the Hugging Face layout")
    add_options(command, COMPRESS.options)
    command.add_argument("--json", action="store_true", help="what was made, refused and measured as JSON")
    command.set_defaults(run=_compress, noun="compress")


def add_export(nouns: Any) -> None:
    """The command and its options."""
    command = nouns.add_parser("export", help="write a model for another runtime, and compare what that computes")
    command.add_argument("target", metavar="TARGET", help="a run or a folder in the Hugging Face layout")
    add_options(command, ExportSpec.options(Interface.SHELL))
    command.add_argument("--json", action="store_true", help="the file and how it compares as JSON")
    command.set_defaults(run=_export, noun="export")


def _explain(arguments: argparse.Namespace) -> None:
    given = " ".join(arguments.words)
    spec = ExplainSpec.make(read_options(arguments, ExplainSpec.options(Interface.SHELL)), Interface.SHELL)
    if not given and spec.adversarial is None:
        raise UsageError("what is the model asked? jupyter llmcloud explain MODEL INPUT, or MODEL --adversarial DATA.")
    spec = spec.checked(bool(given))
    target = find_target(arguments.model, spec.base_model, discovery.running_server())
    print(_scores(target, given, spec, arguments.json) if given else _robustness(target, spec, arguments.json))


def _tell(text: str) -> None:
    if text:
        print(text, file=sys.stderr, flush=True)


def _scores(target: ExplainTarget, given: str, spec: ExplainSpec, as_json: bool) -> str:
    model, answers = ask_scores(target, given, spec, _tell)
    if as_json:
        return _as_json({"model": model, "answers": answers})
    found = ExplainedAnswer(model, answers)
    return "\n".join([*found.lines, format_table(HEADINGS, found.rows)])


def _robustness(target: ExplainTarget, spec: ExplainSpec, as_json: bool) -> str:
    model, changes, outside = ask_robustness(target, spec.adversarial, spec.outside, spec, _tell)
    if as_json:
        return _as_json({"model": model, "changes": changes, "outside": outside})
    lines = [
        tried_in_words(model),
        format_table(robustness.headings(changes), robustness.table(changes)),
        "",
        format_table(robustness.outside_headings(outside), robustness.outside_table(outside)),
    ]
    return "\n".join(lines)


def _as_json(found: dict[str, Any]) -> str:
    return json.dumps(msgspec.to_builtins(found), indent=2)


def _compress(arguments: argparse.Namespace) -> None:
    spec = CompressSpec.make(read_options(arguments, COMPRESS.options), Interface.SHELL).checked()
    told = "" if spec.eval is None else Path(spec.eval).name
    texts = CompressTexts(texts_at(spec.eval), told, texts_at(spec.text))
    made = CompressedModels(spec.bound)
    try:
        make_models(made, arguments.target, spec, texts, "", _tell, lambda code, name: _train(code, name, spec.nproc))
    except KeyboardInterrupt:
        print(f"stopped. {'What is made stays: ' + ', '.join(made.names) if made.names else 'Nothing was made'}.")
        raise
    if arguments.json:
        about = {"names": made.names, "refused": made.refused, "notes": made.notes, "caption": made.caption}
        print(_as_json({**about, "measured": made.measured, "not_measured": made.not_measured}))
    else:
        print("\n".join([format_table(made.headings, made.rows), *made.lines]))


def _train(code: str, name: str, nproc: int | None) -> None:
    """A run on ranks of the running server, shown until it ends. Raises LLMCloudError when it does not finish."""
    server = discovery.find_running()
    told = server.start_run(code, {"name": name, "save": DISTILLED, **({"nproc": nproc} if nproc else {})})
    with contextlib.redirect_stdout(sys.stderr):  # what is made is told on stdout alone
        status = TerminalRun(server, server.run_folder(told["run_id"])).follow()
    if status:
        state = server.run(told["run_id"])["state"]
        raise WorldError(f"the run {told['run_id']} has {state}: jupyter llmcloud runs show {told['run_id']}.")


def _export(arguments: argparse.Namespace) -> None:
    spec = ExportSpec.make(read_options(arguments, ExportSpec.options(Interface.SHELL)), Interface.SHELL).checked()
    found = export_model(arguments.target, spec, _tell)
    if arguments.json:
        print(_as_json({"path": found.path, "notes": found.notes}))
    else:
        print("\n".join([found.path, *(f"  {note}" for note in found.notes)]))
