"""Files of a source, as they are listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.datasets.filesystem import list_source


def test_a_folder_of_save_to_disk_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"\xff\xff\xff\xff\x00")
    (tmp_path / "dataset_info.json").write_text('{\n  "citation": ""\n}')
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UsageError, match=r"save_to_disk\(\).*to_parquet.*lc\.data\.load"):
        list_source([str(tmp_path)])
    with pytest.raises(UsageError, match="Arrow"):
        list_source([f"{tmp_path}/*.arrow"])
