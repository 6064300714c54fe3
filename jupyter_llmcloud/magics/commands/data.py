"""%prepare, %shards."""

from __future__ import annotations

from typing import Any

from IPython.core.magic import Magics, line_magic, magics_class

from jupyter_llmcloud.core.data.spec import PREPARE, SHARDS
from jupyter_llmcloud.core.options import parse, split
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics import data


@magics_class
class DataMagics(Magics):
    """Registered by `%load_ext jupyter_llmcloud`."""

    shell: Any

    @line_magic
    def prepare(self, line: str) -> Any:
        """%prepare SOURCE... --out URL: prepare data on the cluster. `%prepare?` lists the options."""
        parsed = parse(PREPARE, split(line, "%prepare"))
        given = dict(parsed.given)
        namespace = self.shell.user_ns
        name = given.get("tokenizer")
        if name is not None and name.isidentifier() and name in namespace:
            given["tokenizer"] = namespace[name]  # a variable of the notebook
        return data.prepare(parsed.arguments, **given)

    @line_magic
    def shards(self, line: str) -> Any:
        """%shards URL: the shards of prepared data, how large and how uneven they are."""
        parsed = parse(SHARDS, split(line, "%shards"))
        if len(parsed.arguments) != 1:
            raise UsageError("%shards: expected the folder or URL of prepared data.")
        return data.shards(parsed.arguments[0], parsed.nproc, parsed.limit)
