"""What `lc.data` takes as a source."""

from __future__ import annotations

import base64
import importlib
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import pandas as pd
import pyarrow as pa
import pytest

import jupyter_llmcloud as lc
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics.data import _places
from jupyter_llmcloud.magics.session.packed_code import pack


@pytest.mark.parametrize(
    "source",
    [pd.DataFrame({"text": ["a"]}), pa.table({"text": ["a"]}), {"text": ["a"]}, [{"text": "a"}], 7, [Path("a"), None]],
    ids=["pandas", "arrow", "columns", "rows", "number", "none"],
)
def test_what_holds_rows_itself_is_no_source(source: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a source is files, folders, globs or URLs, not .*lc\.data\.load"):
        lc.data.prepare(source, out=tmp_path)


def test_places_are_taken_one_by_one_in_a_list_and_from_a_search(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()
    wanted = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert _places(wanted[0]) == _places(Path(wanted[0])) == wanted[:1]
    assert _places(wanted) == _places(tuple(map(Path, wanted))) == sorted(_places(tmp_path.glob("*.txt"))) == wanted
    assert _places("s3://bucket/in") == ["s3://bucket/in"]


@pytest.mark.parametrize("step", ["tidy", "lambda row: beside.tidy(row)"], ids=["function", "module"])
def test_what_lies_beside_a_notebook_goes_along_with_a_step(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside.py").write_text(
        "import re\nRULE = re.compile('[0-9]')\ndef tidy(text):\n    return RULE.sub('', text)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    beside = importlib.import_module("beside")
    packed = pack([eval(step, {"beside": beside, "tidy": beside.tidy, "__name__": "__main__"})], None, None)
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, "beside")
    (restored,) = pickle.loads(base64.b64decode(packed["content"]))["steps"].values()
    assert restored("a1") == "a"
    assert "beside" not in cloudpickle.list_registry_pickle_by_value()


def test_a_module_that_cannot_be_sent_is_looked_for_where_the_step_is_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locked.py").write_text(
        "import threading\nLOCK = threading.Lock()\ndef tidy(text):\n    with LOCK:\n        return text\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    packed = pack([importlib.import_module("locked").tidy], None, None)
    monkeypatch.delitem(sys.modules, "locked")
    assert pickle.loads(base64.b64decode(packed["content"]))["steps"]["tidy"]("a") == "a"


def test_a_module_that_goes_by_another_name_than_its_own_is_left_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "of_another_name", ModuleType("elsewhere._part"))
    packed = pack([lambda text: text.strip()], None, None)
    (step,) = pickle.loads(base64.b64decode(packed["content"]))["steps"].values()
    assert step(" a ") == "a"
