"""Paths as a kernel shows them."""

from __future__ import annotations

import sysconfig

import pytest

from jupyter_llmcloud.magics.output import shown_paths


def test_a_python_in_a_folder_with_a_space_in_its_name_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"purelib": "/x/a b/lib/python3.11/site-packages", "stdlib": "/y/c d/lib/python3.11"}
    text = f"File {places['purelib']}/torch/nn/m.py:3 and {places['stdlib']}/json/x.py"
    with monkeypatch.context() as patched:
        patched.setattr(sysconfig, "get_path", places.__getitem__)
        shown_paths.places.cache_clear()
        shown = shown_paths.shown(text)
    shown_paths.places.cache_clear()
    assert shown == "File site-packages/torch/nn/m.py:3 and python3.11/json/x.py"
