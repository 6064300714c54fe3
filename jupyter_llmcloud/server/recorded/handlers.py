"""Runs as scripts, and beside each other."""

from __future__ import annotations

import asyncio
import math

from jupyter_llmcloud.core.names import parse_script_file
from jupyter_llmcloud.protocol.http.runs import (
    ComparedMetric,
    ComparisonQuery,
    DifferentFact,
    ExportQuery,
    RunComparison,
    RunScript,
)
from jupyter_llmcloud.server.api.operation import operation
from jupyter_llmcloud.server.api.runs import StoredRunsHandler
from jupyter_llmcloud.storage.recorded.comparison import compared
from jupyter_llmcloud.storage.recorded.export import exported


class RunExportHandler(StoredRunsHandler):
    """A run as a plain script."""

    @operation("read", RunScript, query=ExportQuery)
    async def get(self, name: str, query: ExportQuery) -> RunScript:
        """A run as a plain script, with the cells that its ranks ran before; what cannot go along is named."""
        file = parse_script_file(query.file)
        script = await asyncio.to_thread(exported, self.runs, name, file)
        run_id = self.runs.find(name).run_id
        return RunScript(run_id=run_id, text=script.text, launches=script.launches, notes=script.notes)


class RunComparisonHandler(StoredRunsHandler):
    """Runs beside each other."""

    @operation("read", RunComparison, query=ComparisonQuery)
    async def get(self, query: ComparisonQuery) -> RunComparison:
        """What differs between runs: options, topology, versions, metrics, code."""
        names = [name for name in query.runs.split(",") if name]
        found = await asyncio.to_thread(compared, self.runs, names, query.tolerance)
        metrics = [
            ComparedMetric(name=name, last=[_finite(value) for value in last], apart_from=step)
            for name, last, step in found.metrics
        ]
        facts = [DifferentFact(name=name, values=values) for name, values in found.facts]
        return RunComparison(runs=found.runs, facts=facts, metrics=metrics, code=found.code)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
