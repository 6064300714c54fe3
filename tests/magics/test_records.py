"""What the server tells as rows: a table in the notebook, a DataFrame for whoever goes on with it, a list as before."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.magics.serving.records import Records

ROWS = [{"name": "prompt_tokens", "psi": 0.123456, "hidden": 1}, {"name": "<b>", "psi": None, "hidden": 2}]


def test_records_are_a_list_and_a_table() -> None:
    records = Records(ROWS, ("name", "psi"), "Nothing.")
    assert records == ROWS and records[0]["psi"] == 0.123456 and [*records] == ROWS
    assert repr(records).splitlines() == ["name              psi", "prompt_tokens  0.1235", "<b>"]
    shown = records._repr_html_()
    assert "&lt;b&gt;" in shown and "<b>" not in shown and "hidden" not in shown
    assert repr(Records([], ("name",), "Nothing.")) == "Nothing."


def test_a_frame_has_every_key() -> None:
    pytest.importorskip("pandas")
    frame = Records(ROWS, ("name", "psi"), "Nothing.").to_frame()
    assert list(frame.columns) == ["name", "psi", "hidden"] and len(frame) == 2
    assert list(Records([], ("name", "psi"), "Nothing.").to_frame().columns) == ["name", "psi"]
