"""Files of a source, as they are listed; files of ours, written and removed."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.datasets.filesystem import (
    list_source,
    names_in,
    put,
    read_bytes,
    remove_files,
    replace,
    scratch,
)


def test_a_folder_of_save_to_disk_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"\xff\xff\xff\xff\x00")
    (tmp_path / "dataset_info.json").write_text('{\n  "citation": ""\n}')
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UsageError, match=r"save_to_disk\(\).*to_parquet.*lc\.data\.load"):
        list_source([str(tmp_path)])
    with pytest.raises(UsageError, match="Arrow"):
        list_source([f"{tmp_path}/*.arrow"])


@pytest.mark.parametrize("folder", ["memory://run", "memory://run [v2] *"])
def test_files_are_written_and_removed_also_where_a_folder_looks_like_a_pattern(folder: str) -> None:
    files = [f"{number}.json" for number in range(3)]
    for content in (b"old", b"new"):
        for name in files:
            replace(f"{folder}/{name}", content)
    with scratch() as file:
        file.write(b"copied")
        put(file, f"{folder}/0.json")
    assert [read_bytes(f"{folder}/{name}") for name in files] == [b"copied", b"new", b"new"]
    remove_files(folder, [*files[1:], "that is gone"])
    assert names_in(folder) == {"0.json": 6}
    remove_files(folder, files[:1])
    assert not fsspec.filesystem("memory").exists(folder.removeprefix("memory:/"))
