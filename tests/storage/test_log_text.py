"""The text of a run as one file: made again when there is more."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from jupyter_llmcloud.storage import log_text
from jupyter_llmcloud.storage.journal import JournalWriter
from jupyter_llmcloud.storage.runs import RunFolder


def test_what_comes_right_after_it_was_made_is_in_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system counts time in ticks of some milliseconds: what it writes now seems older than now."""
    folder = RunFolder(tmp_path)
    writer = JournalWriter(folder.logs(0))
    writer.append([{"kind": "stdout", "text": "one\n"}])
    now = time.time()
    monkeypatch.setattr(log_text.time, "time", lambda: now + 0.02)
    assert log_text.write(folder).read_text() == "[0] one\n"
    writer.append([{"kind": "stdout", "text": "two\n"}])
    writer.close()
    assert log_text.write(folder).read_text() == "[0] one\n[0] two\n"
