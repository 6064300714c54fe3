"""What Slurm says to a batch script, and when it kills what the script has started, made fit for node agents.

An early signal (`--signal=B:USR1@60`) becomes a notice that agents look for. A shell carries out a trap when the
command that it waits for has ended: the worker's, minutes after the signal. So the script runs once more, beside a
shell that does nothing but wait for signals.

At the end of a walltime, and by `scancel`, SIGTERM comes, and SIGKILL half a minute later, or as soon as the script has
ended: the processes of a job are a control group. A Dask worker ends within a few milliseconds. Agents save before they
end, so that shell outlives SIGTERM and waits for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dask

from jupyter_llmcloud.config import ENV_PREEMPTION_NOTICE

_SIGNAL = "--signal=B:"
_OPTION = "job_script_prologue"
_OURS = '"$LLMCLOUD_BATCH_FOLDER/notice"'


def _prologue(where: str) -> list[str]:
    return [
        'if [ -z "$LLMCLOUD_BATCH_FOLDER" ]; then',
        'export LLMCLOUD_BATCH_FOLDER="$(mktemp -d)"',
        f"export {ENV_PREEMPTION_NOTICE}={where}",
        # Whichever was asked for. Without a trap it would end the script, and the job with it.
        f"trap ': > {_OURS}' USR1 USR2 HUP INT TERM",
        'bash "$0" "$@" &',
        "while kill -0 $! 2>/dev/null; do wait $!; done",
        "wait $!; LLMCLOUD_STATUS=$?",
        # The agents that this job has started: they have a session, and often no living parent, of their own.
        "llmcloud_agents() {",
        'grep -lsz "^LLMCLOUD_BATCH_FOLDER=$LLMCLOUD_BATCH_FOLDER\\$" /proc/[0-9]*/environ | while read -r FOUND; do',
        'grep -qsz "^jupyter_llmcloud.agent\\$" "${FOUND%environ}cmdline" && basename "${FOUND%/environ}"',
        "done; }",
        "for LLMCLOUD_TRY in $(seq 600); do",
        "LLMCLOUD_AGENTS=$(llmcloud_agents)",
        '[ -n "$LLMCLOUD_AGENTS" ] || break',
        "kill -TERM $LLMCLOUD_AGENTS 2>/dev/null",
        "sleep 0.2",
        "done",
        'rm -rf "$LLMCLOUD_BATCH_FOLDER"',
        "exit $LLMCLOUD_STATUS",
        "fi",
    ]


PROLOGUE = _prologue(_OURS)
# Where nobody has asked for an early signal, what the workers' environment says of a notice stays.
PROLOGUE_WITHOUT_SIGNAL = _prologue(f'"${{{ENV_PREEMPTION_NOTICE}:-$LLMCLOUD_BATCH_FOLDER/notice}}"')


def with_prologue(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a SLURMCluster whose jobs hand signals on to the node agents, and wait for those at the end."""
    directives = options.get("job_extra_directives")
    if directives is None:
        directives = dask.config.get("jobqueue.slurm.job-extra-directives", [])
    before = options.get(_OPTION)
    if before is None:
        before = dask.config.get("jobqueue.slurm.job-script-prologue", [])
    is_signalled = any(_SIGNAL in str(directive) for directive in directives or [])
    return {**options, _OPTION: [*(PROLOGUE if is_signalled else PROLOGUE_WITHOUT_SIGNAL), *(before or [])]}
