"""Slurm's early signal to a batch script (`--signal=B:USR1@60`), made into a notice that node agents look for.

A shell carries out a trap when the command that it waits for has ended: the worker's, minutes after the signal. So the
script runs once more, beside a shell that does nothing but wait for signals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dask

from jupyter_llmcloud.config import ENV_PREEMPTION_NOTICE

_SIGNAL = "--signal=B:"
_OPTION = "job_script_prologue"
PROLOGUE = [
    'if [ -z "$LLMCLOUD_BATCH_SHELL" ]; then',
    "export LLMCLOUD_BATCH_SHELL=$$",
    'LLMCLOUD_NOTICE_FOLDER="$(mktemp -d)"',
    f'export {ENV_PREEMPTION_NOTICE}="$LLMCLOUD_NOTICE_FOLDER/notice"',
    # Whichever was asked for. Without a trap it would end the script, and the job with it.
    f"""trap ': > "${ENV_PREEMPTION_NOTICE}"' USR1 USR2 HUP INT TERM""",
    'bash "$0" "$@" &',
    "while kill -0 $! 2>/dev/null; do wait $!; done",
    "wait $!; LLMCLOUD_STATUS=$?",
    'rm -rf "$LLMCLOUD_NOTICE_FOLDER"',
    "exit $LLMCLOUD_STATUS",
    "fi",
]


def with_notice(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a SLURMCluster; one whose jobs get an early signal hands it on to the node agents."""
    directives = options.get("job_extra_directives")
    if directives is None:
        directives = dask.config.get("jobqueue.slurm.job-extra-directives", [])
    if not any(_SIGNAL in str(directive) for directive in directives or []):
        return dict(options)
    before = options.get(_OPTION)
    if before is None:
        before = dask.config.get("jobqueue.slurm.job-script-prologue", [])
    return {**options, _OPTION: [*PROLOGUE, *(before or [])]}
