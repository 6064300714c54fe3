"""Absolute paths are shown as a reader on any machine would write them."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.output.paths import shorten

PLACES = [("/home/me", "~"), ("/home/me/project", ""), ("/tmp", "$TMPDIR/…"), ("/", "root"), ("/srv/c++", "$X")]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/data/x.csv", "~/data/x.csv"),
        ("in '/home/me'.", "in '~'."),
        ("/home/me/project/model lacks 9", "model lacks 9"),
        ("/home/me/project: gone", ".: gone"),
        ("/home/mean/x", "/home/mean/x"),
        ("/home/me-too/x /home/me2", "/home/me-too/x /home/me2"),
        ("/mnt/home/me/x and ~/home/me", "/mnt/home/me/x and ~/home/me"),
        ("\x1b[32m/tmp/a/b.py:3\x1b[39m", "\x1b[32m$TMPDIR/…/b.py:3\x1b[39m"),
        ("File /a/b c/venv/lib/python3.11/site-packages/torch/nn/x.py:1", None),
        ("File /opt/venv/lib/python3.11/site-packages/torch/x.py:1", "File site-packages/torch/x.py:1"),
        ('File "/usr/lib/python3/dist-packages/y.py"', 'File "dist-packages/y.py"'),
        ("/usr/lib/python3.11/json/decoder.py", "python3.11/json/decoder.py"),
        ("/tmp/ipykernel_12/3895052822.py:3: UserWarning: x", "<cell>:3: UserWarning: x"),
        ("/srv/c++/x", "$X/x"),
        ("/tmp/one and '/tmp/one/two/three'", "$TMPDIR/one and '$TMPDIR/…/three'"),
        ("http://127.0.0.1:8888/tmp/x", "http://127.0.0.1:8888/tmp/x"),
        ("POST /llmcloud/v1/models", "POST /llmcloud/v1/models"),
        ("1 / 2 and a/b", "1 / 2 and a/b"),
        ("", ""),
    ],
)
def test_a_path_is_shown_without_what_is_private(text: str, shown: str | None) -> None:
    found = shorten(text, PLACES)
    assert found == shown if shown is not None else "site-packages/torch/nn/x.py:1" in found


def test_what_is_shown_is_shown_so_again() -> None:
    once = shorten("/home/me/x /tmp/y /opt/v/lib/python3.11/site-packages/z.py", PLACES)
    assert shorten(once, PLACES) == once
