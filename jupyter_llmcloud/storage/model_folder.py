"""What a folder must hold to be served: the one check, by the server before it starts anything and by each replica.

Only names, sizes and headers are read here. Whether the weights fit the configuration is known when they are loaded.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_llmcloud.core.serving.models.model_kind import ModelKind, kind_of_adapter, kind_of_config
from jupyter_llmcloud.errors import ModelError

ADAPTER = "adapter_config.json"
ARCHITECTURE = "architecture.pkl"  # the module without its weights
ARCHITECTURE_RECORD = "architecture.json"
ARCHITECTURE_SOURCE = "architecture.py"  # for people
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_SHARD = re.compile(r"[^/\\\0]+\.safetensors")  # no pickle, and nothing elsewhere
MAX_HEADER = 100 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Any of them makes a tokenizer. The first is all that a tokenizer written in Python may need (ByT5 has no vocabulary).
_TOKENIZERS = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True)
class ModelLayout:
    """Where the parts of a model are.

    Attributes:
        folder: the whole model; of an adapter, its base model.
        adapter: the folder with the adapter that is put on it; None: there is none.
        tokenizer: the folder whose tokenizer counts.
        architecture: the file with the module that the weights belong to, where no library has it; None: one has.
    """

    folder: Path
    adapter: Path | None
    tokenizer: Path
    architecture: Path | None = None

    @property
    def folders(self) -> list[Path]:
        """All of them: the model changes when one of their files does."""
        return [self.folder] if self.adapter is None else [self.adapter, self.folder]


def check_folder(path: Path, base_model: Path | None = None, *, is_own: bool = False) -> ModelLayout:
    """The parts of the model in `path`; raises ModelError with what is missing or wrong, and the way out.

    Args:
        path: a whole model as `save_pretrained` writes it, or an adapter of PEFT.
        base_model: the folder of the model that an adapter belongs to, in place of the one that it names itself.
        is_own: a run of this user saved it: the architecture that is kept beside the weights may be used.
    """
    if not path.is_dir():
        raise ModelError(f"{path} is not a folder. Give the folder that save_pretrained() wrote.")
    if (path / ADAPTER).is_file():
        return _check_adapter(path, base_model)
    if base_model is not None:
        raise ModelError(f"{path} is a whole model: leave --base-model out, it is for adapters ({ADAPTER}).")
    if (architecture := _architecture(path, is_own)) is not None:
        return architecture
    _check_model(path)
    layout = ModelLayout(path, None, path)
    _check_inputs(path, model_kind(layout))
    return layout


def _architecture(path: Path, is_own: bool) -> ModelLayout | None:
    """A model whose architecture a cell has defined; None when config.json says enough. Raises ModelError."""
    record = path / ARCHITECTURE_RECORD
    if not record.is_file():
        return None
    has_config = (path / "config.json").is_file()
    told = _json(record)
    if is_own and (path / ARCHITECTURE).is_file():
        _check_weights(path)
        if told.get("kind") == "generator":
            _check_tokenizer(path)
        return ModelLayout(path, None, path, path / ARCHITECTURE)
    if has_config:
        return None
    name = told.get("class")
    if not is_own:
        raise ModelError(
            f"{path} holds a {name}, whose architecture was defined in a cell: it is code, and run only for a run of "
            "your own. Serve that by the name of the run."
        )
    problem = told.get("problem") or "it is not there"
    raise ModelError(
        f"the architecture of {name} could not be kept with the run ({problem}), so it "
        "cannot be made again where it is served. Define it in a %%serve cell, whose load() reads the weights."
    )


def model_kind(layout: ModelLayout) -> ModelKind:
    """What the model is for, as far as the names in its config files tell. Raises ModelError."""
    if layout.architecture is not None:
        return "generator" if _json(layout.folder / ARCHITECTURE_RECORD).get("kind") == "generator" else "module"
    kind = kind_of_config(_json(layout.folder / "config.json"))
    if layout.adapter is None:
        return kind
    return kind_of_adapter(_json(layout.adapter / ADAPTER).get("task_type"), kind)


def _check_inputs(path: Path, kind: ModelKind) -> None:
    """What makes inputs of what people send: a tokenizer for texts, an image processor for images (or neither, where
    tensors are sent)."""
    if kind == "image-classifier":
        return
    _check_tokenizer(path)


def _check_adapter(path: Path, base_model: Path | None) -> ModelLayout:
    config = _json(path / ADAPTER)
    base = base_model or _named_base(path, config.get("base_model_name_or_path"))
    if not base.is_dir():
        raise ModelError(f"--base-model {base} is not a folder: give the folder of the model the adapter was made for.")
    if (base / ADAPTER).is_file():
        raise ModelError(f"the base model {base} of {path} is an adapter itself. Merge that one first, and save it.")
    _check_model(base)
    weights = path / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ModelError(
            f"{path} is an adapter without {ADAPTER_WEIGHTS}{_pickles(path)}. Save it again with "
            "model.save_pretrained(folder)."
        )
    _check_header(weights)
    own = has_tokenizer(path)
    if not own:
        _check_tokenizer(base)
    return ModelLayout(base, path, path if own else base)


def _named_base(path: Path, named: Any) -> Path:
    """The folder that an adapter names as its base model: by its whole path, or as seen from the adapter."""
    if isinstance(named, str) and named and "\0" not in named:
        for folder in (Path(os.path.expanduser(named)), path / named):
            if folder.is_absolute() and folder.is_dir():
                return folder.resolve()
    raise ModelError(
        f"{path} holds an adapter (PEFT), and its base model {named!r} is not a folder here. Name that model's folder: "
        "--base-model FOLDER. Or save the merged model: model.merge_and_unload().save_pretrained(folder)."
    )


def _check_model(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json. Save the model with model.save_pretrained(folder).")
    _json(path / "config.json")
    _check_weights(path)


def _check_weights(path: Path) -> None:
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"{path} has no *.safetensors file with weights{_pickles(path)}. Save the model again with "
            "model.save_pretrained(folder)."
        )
    _check_shards(path)
    for file in weights:
        _check_header(file)


def has_tokenizer(path: Path) -> bool:
    """Whether a folder holds what makes a tokenizer."""
    return any((path / name).is_file() for name in _TOKENIZERS)


def _check_tokenizer(path: Path) -> None:
    if not has_tokenizer(path):
        raise ModelError(
            f"{path} has no tokenizer. Save it beside the model: --save model,tokenizer, or "
            "tokenizer.save_pretrained(folder)."
        )


def _json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON ({error}).") from None
    if not isinstance(read, dict):
        raise ModelError(f"{file} is not a JSON object.")
    return read


def _pickles(path: Path) -> str:
    found = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    return f": {found[0]} is not loaded, since a pickle can run code" if found else ""


def _check_shards(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return
    try:
        needed = set(json.loads(index.read_bytes())["weight_map"].values())
        if strange := sorted(str(file) for file in needed if not _SHARD.fullmatch(str(file))):
            raise ModelError(f"{index} names {strange[0]!r:.80}: weights are *.safetensors files beside it.")
        missing = sorted(str(file) for file in needed if not (path / str(file)).exists())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index} is not an index of weights.") from None
    if missing:
        raise ModelError(f"{path} lacks {len(missing)} of its weight files, the first is {missing[0]}.")


def _check_header(file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length) if 2 <= length <= min(MAX_HEADER, size - 8) else b""
    try:
        entries = json.loads(header)
        end = max((row["data_offsets"][1] for name, row in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise ModelError(f"{file} could not be loaded: it is not a safetensors file, or was cut off.") from None
    if 8 + length + end != size:
        raise ModelError(f"{file} could not be loaded: it was cut off, and has {size} of {8 + length + end} bytes.")
