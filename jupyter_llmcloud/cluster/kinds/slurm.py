"""What Slurm says to a batch script, and when it kills what the script has started, made fit for node agents.

An early signal (`--signal=B:USR1@60`) becomes a notice that agents look for. A shell carries out a trap when the
command that it waits for has ended: the worker's, minutes after the signal. So the script runs once more, beside a
shell that does nothing but wait for signals.

At the end of a walltime, and by `scancel`, SIGTERM comes, to all that the job has started or to the script alone; and
SIGKILL half a minute later, or as soon as the script has ended, to all of it. A Dask worker ends within a few
milliseconds. Agents save before they end, so that shell tells them and waits for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dask

from jupyter_llmcloud.config import ENV_PREEMPTION_NOTICE

_SIGNAL = "--signal=B:"
_OPTION = "job_script_prologue"
_NOTICE = '"$LLMCLOUD_BATCH_FOLDER/notice"'
_OURS_UNLESS_SET = f'"${{{ENV_PREEMPTION_NOTICE}:-$LLMCLOUD_BATCH_FOLDER/notice}}"'
_ENDS = "LLMCLOUD_ENDS=1"


def prologue(signal: str = "") -> list[str]:
    """Of a job that is given `signal` early; what its environment says of a notice stays where it is given none."""
    return [
        'if [ -z "$LLMCLOUD_BATCH_FOLDER" ]; then',
        'export LLMCLOUD_BATCH_FOLDER="$(mktemp -d)"',
        f"export {ENV_PREEMPTION_NOTICE}={_NOTICE if signal else _OURS_UNLESS_SET}",
        # Without a trap they would end the script, and the job with it.
        f"trap ': > {_NOTICE}' USR1 USR2 HUP INT",
        f"trap '[ -e {_NOTICE} ] && {_ENDS}; : > {_NOTICE}' TERM" if signal == "TERM" else f"trap {_ENDS} TERM",
        'bash "$0" "$@" &',
        "LLMCLOUD_WORK=$!",
        'while [ -z "$LLMCLOUD_ENDS" ] && kill -0 $LLMCLOUD_WORK 2>/dev/null; do wait $LLMCLOUD_WORK; done',
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
        "pkill -TERM -P $LLMCLOUD_WORK || kill -TERM $LLMCLOUD_WORK 2>/dev/null",
        "wait $LLMCLOUD_WORK; LLMCLOUD_STATUS=$?",
        'rm -rf "$LLMCLOUD_BATCH_FOLDER"',
        "exit $LLMCLOUD_STATUS",
        "fi",
    ]


def with_prologue(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a SLURMCluster whose jobs hand signals on to the node agents, and wait for those at the end."""
    directives = options.get("job_extra_directives")
    if directives is None:
        directives = dask.config.get("jobqueue.slurm.job-extra-directives", [])
    before = options.get(_OPTION)
    if before is None:
        before = dask.config.get("jobqueue.slurm.job-script-prologue", [])
    early = [str(directive).partition(_SIGNAL)[2].partition("@")[0] for directive in directives or []]
    signal = next((name.removeprefix("SIG") for name in early if name), "")
    return {**options, _OPTION: [*prologue(signal), *(before or [])]}
