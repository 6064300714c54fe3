"""What the ranks have written of a model, put together as one safetensors file: bytes alone, without torch.

Each rank's file says in its metadata how its tensors were cut: along which dimension, and the shape of the whole. Of a
model that nothing has cut, every rank has written all of it: it is one model where they hold the same.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.storage.checkpoints import Checkpoint, files_of_ranks

SHARDS, SAME = "llmcloud_shards", "llmcloud_same"  # metadata: {name: {"dim", "shape"}}, {name: name of the same tensor}
TRAINED = "llmcloud_trained"  # metadata: the parameters; what else there is may follow each rank's own rows
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}


@dataclass(frozen=True)
class _RankFile:
    """What one rank has written of a model. `entries`: as in the header; `same`: tensors that are another one."""

    data: memoryview
    begin: int
    entries: dict[str, Any]
    cuts: dict[str, Any]
    same: dict[str, str]
    trained: list[str]

    def tensor(self, name: str) -> tuple[dict[str, Any], memoryview]:
        """Its entry in the header, and its bytes."""
        entry = self.entries[self.same.get(name, name)]
        first, last = entry["data_offsets"]
        return entry, self.data[self.begin + first : self.begin + last]


@dataclass(frozen=True)
class _Whole:
    """A tensor that is put together: `parts` of the ranks in their order, cut along `dim`."""

    dtype: str
    shape: list[int]
    dim: int
    parts: Sequence[tuple[dict[str, Any], memoryview]]

    @property
    def num_bytes(self) -> int:
        """Of the whole."""
        return math.prod(self.shape) * _BITS.get(self.dtype, 8) // 8

    def pieces(self) -> Iterator[memoryview]:
        """The bytes, in their order."""
        if self.dim == 0:
            yield from (data for _, data in self.parts)
            return
        num_rows = math.prod(self.shape[: self.dim])
        for row in range(num_rows):
            for _, data in self.parts:
                size = len(data) // num_rows
                yield data[row * size : (row + 1) * size]


def alike(checkpoint: Checkpoint) -> list[Path]:
    """A file for each model of which every rank has written all, and all of them the same."""
    groups = [files for suffix, files in files_of_ranks(checkpoint).items() if suffix.startswith("model-")]
    num_ranks = checkpoint.manifest.get("world_size")
    of_all = [list(files.values()) for files in groups if len(files) == num_ranks]
    return [paths[0] for paths in of_all if len(set(paths)) == 1 and not _is_cut(paths[0])]


def _is_cut(path: Path) -> bool:
    with path.open("rb") as file:
        return bool(_opened(file).cuts)


def write_whole(checkpoint: Checkpoint, wanted: Mapping[str, Sequence[int]], plain: Any, target: Path) -> bool:
    """Write the model of which these tensors are wanted; False when no model in the checkpoint's files is that.

    Args:
        checkpoint: it.
        wanted: shapes by name.
        plain: the name of a tensor in the plain model, by its name in the file.
        target: the file to write.

    Raises ModelError when they were cut in a way that bytes alone cannot undo.
    """
    for suffix, files in files_of_ranks(checkpoint).items():
        if not suffix.startswith("model-"):
            continue
        with ExitStack() as stack:
            ranks = [_opened(stack.enter_context(path.open("rb"))) for path in files.values()]
            names = {plain(name): name for name in [*ranks[0].entries, *ranks[0].same]}
            is_it = all(name in names and _shape(ranks[0], names[name]) == list(wanted[name]) for name in wanted)
            if is_it and (any(rank.cuts for rank in ranks) or _hold_the_same(ranks, checkpoint)):
                _write({name: _whole(ranks, names[name]) for name in wanted}, target)
                return True
    return False


def _hold_the_same(ranks: Sequence[_RankFile], checkpoint: Checkpoint) -> bool:
    """Whether every rank holds the same parameters: running statistics, say, follow each rank's own rows."""
    if len(ranks) != checkpoint.manifest.get("world_size"):
        return False
    first = ranks[0]
    wanted = [name for name in first.trained if name in first.entries or name in first.same]
    return all(
        rank.trained == first.trained
        and all(name in rank.entries or name in rank.same for name in wanted)
        and all(rank.tensor(name)[1] == first.tensor(name)[1] for name in wanted)
        for rank in ranks[1:]
    )


def _opened(file: IO[bytes]) -> _RankFile:
    data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(bytes(data[8 : 8 + length]))
    about = entries.pop("__metadata__", {})
    cuts, same, trained = (json.loads(about.get(*key)) for key in ((SHARDS, "{}"), (SAME, "{}"), (TRAINED, "[]")))
    return _RankFile(data, 8 + length, entries, cuts, same, trained)


def _shape(file: _RankFile, name: str) -> list[int]:
    cut = file.cuts.get(name)
    return list(cut["shape"]) if cut is not None else list(file.tensor(name)[0]["shape"])


def _whole(ranks: Sequence[_RankFile], name: str) -> _Whole:
    first = ranks[0].tensor(name)[0]
    cut = ranks[0].cuts.get(name)
    if cut is None or cut["dim"] == "whole":  # every rank has all of it
        return _Whole(first["dtype"], list(first["shape"]), 0, [ranks[0].tensor(name)])
    if cut["dim"] is None:
        raise ModelError(
            f"its tensor {name} was spread over the ranks in several dimensions at once: it can be served when the run "
            "has ended."
        )
    parts = [rank.tensor(name) for rank in ranks]
    whole = _Whole(first["dtype"], list(cut["shape"]), int(cut["dim"]), parts)
    if sum(len(data) for _, data in parts) != whole.num_bytes:
        raise ModelError(f"the shards of {name} that {len(parts)} ranks have written are not those of {whole.shape}.")
    return whole


def _write(tensors: Mapping[str, _Whole], target: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + tensor.num_bytes]}
        at += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.writelines(tensor.pieces())
