"""What the server tells of a change has to be what its event schema names: else the change is done and refused."""

from __future__ import annotations

import ast
from pathlib import Path

import yaml

import jupyter_llmcloud.server
from jupyter_llmcloud.server import audit

PACKAGE = Path(jupyter_llmcloud.server.__file__).parent


def told_actions() -> set[str]:
    """Each text like "run.stop" that is told to the audit anywhere in the package of the server."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("carry_out", "tell", "tell_change"):
                texts = [
                    word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)
                ]
                found |= {text for text in texts if text.count(".") == 1}
    return found


def test_every_action_that_is_told_is_in_the_event_schema() -> None:
    schema = yaml.safe_load((Path(audit.__file__).parent / "event_schemas" / "change.yaml").read_text(encoding="utf-8"))
    told = told_actions()
    assert {"run.start", "run.checkpoint", "key.mint"} <= told
    assert told <= set(schema["properties"]["action"]["enum"])
