"""Everything that is kept of a run: facts, charts, the values of each rank, warnings and hang reports."""

from __future__ import annotations

from html import escape

from jupyter_llmcloud.core.names import name_ranks
from jupyter_llmcloud.magics.commands.tables import Table
from jupyter_llmcloud.magics.output.shown_paths import shown
from jupyter_llmcloud.storage.notable import notable
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord
from jupyter_llmcloud.widgets import static_view
from jupyter_llmcloud.widgets.recorded_view import recorded_view

MAX_WARNINGS = 20


class RunReport:
    """Displayed by IPython: as HTML in a notebook, as text in a terminal.

    Args:
        facts: what the record says.
        state: of the run now, which the record of a lost one does not know.
    """

    def __init__(self, facts: Table, folder: RunFolder, record: RunRecord, state: str) -> None:
        self._facts = facts
        self._state = recorded_view(folder, record, state)
        self._warnings: dict[str, list[int]] = {}
        for rank, entry in notable(folder):
            text = shown(entry["text"].strip())
            if entry["kind"] == "report":
                self._state.reports.append((text, bool(entry.get("recovered"))))
            else:
                self._warnings.setdefault(text, []).append(rank)

    def _warning_lines(self) -> list[str]:
        """Each warning once, with the ranks that gave it."""
        lines = [
            f"{name_ranks(sorted(set(ranks)))}: {text}" for text, ranks in list(self._warnings.items())[:MAX_WARNINGS]
        ]
        more = len(self._warnings) - MAX_WARNINGS
        return [*lines, f"… and {more} more warnings: %runs logs {self._state.run_id}"] if more > 0 else lines

    def __repr__(self) -> str:
        warnings = self._warning_lines()
        parts = [repr(self._facts), static_view.text(self._state)]
        return "\n\n".join([*parts, *(["\n".join(["warnings:", *warnings])] if warnings else [])])

    def _repr_html_(self) -> str:
        warnings = "".join(f"<li><pre>{escape(line)}</pre></li>" for line in self._warning_lines())
        listed = f"<p>warnings</p><ul>{warnings}</ul>" if warnings else ""
        return f"{static_view.html(self._state)}{listed}{self._facts._repr_html_()}"
