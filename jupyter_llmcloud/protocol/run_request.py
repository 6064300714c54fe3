"""A RunSpec as the message by which an agent is asked to execute it."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Any

from jupyter_llmcloud.core.detect.run_detectors import leaves_out, rolls_back
from jupyter_llmcloud.core.parallel.accelerate_config import of_option
from jupyter_llmcloud.core.spec import RunSpec, Script
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.agent_messages import Execute

RESTARTS_OF_ELASTIC = 3  # for ranks that die where their agent lives, unless the run says how many
CHECKPOINT_TO_GO_BACK_TO = 100  # optimizer steps, of a run that may be rolled back and says nothing of checkpoints


def execute(spec: RunSpec, **about: Any) -> Execute:
    """The request; `about` says what RunSpec does not: which run, which source, on which ranks of which world."""
    about.setdefault("background", spec.background)
    file = of_option(spec.accelerate_config)
    goes_back = rolls_back(spec.watch)
    if goes_back and spec.compress_gradients == "powersgd":
        raise UsageError(
            "--watch with rollback is not possible with --compress-gradients powersgd: what it leaves out of a bad "
            "gradient comes back with the next one. Choose fp16 or bf16."
        )
    if leaves_out(spec.watch) and not spec.elastic:
        raise UsageError(
            "--watch straggler=scale is for a run with --elastic MIN:MAX, which can go on without a host. In any other "
            "run --balance gives each rank as many rows as suit its speed."
        )
    return Execute(
        spec=spec.as_dict(),
        precision=spec.precision or file.precision,
        plan=spec.plan or file.plan,
        environment=file.environment,
        compress_gradients=spec.compress_gradients or "",
        balance=spec.balance,
        save=spec.save or [],
        pull=spec.pull or [],
        timeout_s=spec.timeout or 0.0,
        hang_after_s=spec.hang_after,
        seed=spec.seed,
        checkpoint_every=spec.checkpoint_every or (CHECKPOINT_TO_GO_BACK_TO if goes_back else 0),
        keep_checkpoints=spec.keep_checkpoints,
        max_restarts=spec.max_restarts or (RESTARTS_OF_ELASTIC if spec.elastic or goes_back else 0),
        elastic=spec.elastic or "",
        arguments=shlex.split(spec.args or ""),
        fresh=spec.fresh,
        **about,
    )


def execute_script(source: str, script: Script, spec: RunSpec, **about: Any) -> Execute:
    """The request for a program that comes from no notebook."""
    code = without_leading_blank_lines(source)
    above = source[: len(source) - len(code)].count("\n")
    filename = script.file or f"<{about['name']}>"
    return execute(spec, code=code, source=source, filename=filename, line_offset=above, script=asdict(script), **about)


def without_leading_blank_lines(body: str) -> str:
    """IPython drops them before it compiles; counted here, the lines below keep their numbers."""
    lines = body.splitlines(keepends=True)
    while lines and not lines[0].strip():
        del lines[0]
    return "".join(lines)
