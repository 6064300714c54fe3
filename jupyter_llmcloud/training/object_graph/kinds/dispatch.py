"""Which kind an object is of."""

from __future__ import annotations

import array
import asyncio
import collections
import contextvars
import enum
import functools
import io
import logging
import random
import sqlite3
import subprocess
import threading
import types
import weakref
import zoneinfo
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.std import tqdm
from transformers import Trainer

from jupyter_llmcloud.training.object_graph.kinds import (
    arrow,
    base,
    beside_python,
    code,
    containers,
    instances,
    iterators,
    reduced,
    tensors,
    typing_constructs,
    values,
)
from jupyter_llmcloud.training.object_graph.kinds.base import Kind
from jupyter_llmcloud.training.object_graph.memory import Region
from jupyter_llmcloud.training.resume.user_code import is_own_module

_FIXED = base.Fixed()
_NAMED = code.Named()
_UNSAVED = base.Unsaved()
_OBJECT = instances.Object()
_REDUCED, _RESTATED = reduced.Reduced(), reduced.Restated()
_STATEFUL, STATEFUL_FOLLOWED, WRAPPER = reduced.Stateful(), reduced.SavedElsewhere(), reduced.Wrapper()
_DICT = containers.Dict()
_FUNCTION, _CLASS, _CACHE, _COMPILED = code.Function(), code.Class(), code.Cache(), code.Compiled()
DATA_SET = arrow.DataSet()
_SCALAR, _MODULE, _COUNTING = values.Scalar(), instances.Module(), instances.Counting()
_SHARED_NUMBERS, _BAR, _DATABASE = beside_python.SharedNumbers(), beside_python.MovedBar(), beside_python.Database()
_MISSING, _PROXY = values.Missing(), values.MappingView()
_LEFT_OUT, _LABELLED = beside_python.LeftOutOfGradients(), beside_python.Labelled()
_MANAGED = beside_python.ManagedValue()
TRAINED_TENSOR, _HOOKS, _EVENT = tensors.TrainedTensor(), beside_python.OwnHooks(), beside_python.ThreadEvent()
_TENSOR, _SHARDED = tensors.TorchTensor(), tensors.ShardedTensor()
_ARRAY, _OBJECTS, _ARRAY_OF_CLASS = tensors.Array(), tensors.Objects(), tensors.ArrayOfClass()

# The packages whose objects tell others of a training, stand for data outside, or belong to our own and torch's
# machinery: no state of a training is in them that the cell, a state_dict or we do not bring back.
_PACKAGES = (
    "accelerate", "torch._C", "torch._dynamo", "torch._inductor", "torch._ops", "torch.autograd",
    "torch.cuda", "torch.distributed", "torch.fx", "torch.jit", "torch.profiler", "torch.multiprocessing",
    "torch.utils.tensorboard", "torch.utils.hooks", "torch.utils.data.dataloader", "torch.utils.data._utils",
    "transformers.tokenization", "transformers.trainer", "tokenizers", "datasets", "pyarrow", "sentencepiece",
    "tiktoken",
    "tqdm", "rich", "logging", "IPython", "ipywidgets", "matplotlib", "tensorboard", "tensorboardX", "wandb", "mlflow",
    "comet_ml", "trackio", "aim", "clearml", "neptune", "psutil", "h5py", "lmdb", "sqlite3", "zipfile", "tarfile",
    "fsspec",
    "lightning", "lightning_fabric", "pytorch_lightning",
    "concurrent", "asyncio", "multiprocessing", "socket", "ssl", "ctypes", "traitlets", "importlib", "abc",
)  # fmt: skip
# Of these, those that count steps: when they exchange next depends on it.
_COUNTS = ("accelerate.local_sgd", "torch.distributed.algorithms.model_averaging")
_FIXED_TYPES: tuple[type, ...] = (
    threading.Condition, threading.Semaphore, subprocess.Popen,
    Trainer, types.TracebackType, types.FrameType,
    types.GetSetDescriptorType, types.MemberDescriptorType,
    type(threading.Lock()), type(threading.RLock()), weakref.ProxyType,
)  # fmt: skip
_WRAPPERS = ("AcceleratedOptimizer", "AcceleratedScheduler")
_MAPPED = 1 << 20  # bytes
_STATEFUL_TYPES: tuple[type, ...] = (torch.optim.Optimizer, LRScheduler, torch.amp.GradScaler)
_LIBRARY_CODE: tuple[type, ...] = (
    types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType,
    types.ClassMethodDescriptorType, np.ufunc,
)  # fmt: skip

_EXACT: dict[type, Kind] = {
    dict: _DICT,
    list: containers.Container(list),
    tuple: containers.Container(tuple, "[", "]", filled=False),
    set: containers.Container(set, "{", "}"),
    frozenset: containers.Container(frozenset, "{", "}", filled=False),
    collections.deque: containers.Container(collections.deque),
    Region: tensors.Memory(),
    beside_python.HookNames: _HOOKS,
    threading.Event: _EVENT,
    torch.Tensor: _TENSOR,
    torch.nn.Parameter: _TENSOR,
    torch.Generator: values.TorchNumbers(),
    np.random.Generator: values.OverBits(),
    np.random.RandomState: values.NumpyNumbers(),
    bytearray: values.Bytes(),
    memoryview: values.View(),
    array.array: values.Numbered(),
    **dict.fromkeys(values.DictView.types, values.DictView()),
    types.CellType: code.ClosureCell(),
    types.CodeType: code.Code(),
    types.MethodType: code.Method(),
    contextvars.ContextVar: code.Context(),
    weakref.ref: containers.Weak(),
    weakref.WeakSet: containers.WeakContainer(),
    weakref.WeakKeyDictionary: containers.WeakContainer(),
    weakref.WeakValueDictionary: containers.WeakContainer(),
    functools._lru_cache_wrapper: _CACHE,
    torch.dtype: values.Torch(),
    torch.device: values.Torch(),
    torch.Size: values.Torch(),
    torch.memory_format: values.Torch(),
    torch.qscheme: values.Torch(),
    torch.finfo: values.Torch(),
    torch.iinfo: values.Torch(),
    torch.layout: _FIXED,
    types.EllipsisType: values.Singleton(),
    types.NotImplementedType: values.Singleton(),
    zoneinfo.ZoneInfo: values.Zone(),
}
_BASES: list[tuple[Any, Kind]] = [
    (dict, _DICT),
    *((kind.base, kind) for kind in _EXACT.values() if isinstance(kind, containers.Container)),
    (random.Random, values.Numbers()),
    (np.random.BitGenerator, _EXACT[np.random.RandomState]),
    (io.StringIO, values.Buffer()),
    (io.BytesIO, values.Buffer()),
    (io.IOBase, values.OpenFile()),
    (weakref.ref, _EXACT[weakref.ref]),
    (threading.local, instances.Local()),
    (BaseException, instances.Raised()),
    (DataLoader, instances.Loader()),
]
BY_NAME: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        *_EXACT.values(), *(kind for _, kind in _BASES), _FIXED, _NAMED, _UNSAVED, _OBJECT, _REDUCED, _STATEFUL,
        STATEFUL_FOLLOWED, WRAPPER, _LEFT_OUT, _SHARED_NUMBERS, _BAR, _DATABASE, TRAINED_TENSOR, _HOOKS, _EVENT,
        _COUNTING, _LABELLED, _MANAGED,
        _FUNCTION, _CLASS, _CACHE, _COMPILED, _SHARDED, _ARRAY, _ARRAY_OF_CLASS, _OBJECTS, _SCALAR, _MODULE,
        _RESTATED, arrow.ARRAY, arrow.TABLE, arrow.TYPE, arrow.SCALAR, _MISSING, _PROXY, DATA_SET, instances.Member(),
        *typing_constructs.KINDS,
        iterators.FOLLOWED, iterators.ROWS, iterators.WAITING, iterators.IN_LOOP, iterators.DELIVERING,
    )
}  # fmt: skip


def kind_of(value: Any) -> Kind:
    """The kind of an object."""
    return _EXACT.get(type(value)) or _kind_by_base(value)


def _kind_by_base(value: Any) -> Kind:
    if isinstance(value, iterators.Generator):
        return iterators.kind_of_generator(value)
    if isinstance(value, np.memmap) and not value.flags.writeable and value.nbytes > _MAPPED:
        return _FIXED  # of a file that is read: a corpus may be larger than memory
    if isinstance(value, np.ndarray):
        exact = type(value) in (np.ndarray, np.memmap, np.recarray)
        return _OBJECTS if value.dtype.hasobject else _ARRAY if exact else _ARRAY_OF_CLASS
    if isinstance(value, types.MappingProxyType):
        return _FIXED if "__module__" in value else _PROXY  # that of a class shows its methods
    if isinstance(value, types.FunctionType):
        if "_torchdynamo_orig_callable" in vars(value):
            return _COMPILED
        return _FUNCTION if is_own(value) else _NAMED
    if isinstance(value, type):
        return _CLASS if is_own(value) else _NAMED
    if typing_constructs.is_construct(value):
        return typing_constructs.kind_of_construct(value)
    if isinstance(value, (types.ModuleType, *_LIBRARY_CODE)):
        return _method_of(value)
    if isinstance(value, torch.Tensor):
        return _UNSAVED if not hasattr(value, "full_tensor") else _SHARDED
    if isinstance(value, torch.nn.Module):
        return _MODULE
    if isinstance(value, enum.Enum):
        return BY_NAME["enum"]
    if isinstance(value, np.generic):
        return _SCALAR if value.dtype.kind != "V" else _REDUCED
    if isinstance(value, DataLoader):
        return BY_NAME["loader"]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _EXACT[tuple]
    if type(value).__name__ in _WRAPPERS and _is_of(type(value), ("accelerate",)):
        return WRAPPER
    if isinstance(value, _STATEFUL_TYPES):
        return _STATEFUL
    if (found := _beside_python(value)) is not None:
        return found
    if _is_of(type(value), ("jupyter_llmcloud",)):
        return iterators.FOLLOWED
    if (found := arrow.kind_of_arrow(type(value))) is not None:
        return found
    if isinstance(value, collections.UserDict | asyncio.Queue):  # also a batch of a tokenizer, which a loop may keep
        return _OBJECT
    if _is_of(type(value), _COUNTS):
        return _COUNTING
    if arrow.is_data_set(value):
        return DATA_SET
    if isinstance(value, _FIXED_TYPES) or _is_of(type(value), _PACKAGES):
        return _FIXED
    return next((kind for base, kind in _BASES if isinstance(value, base)), None) or _kind_of_object(value)


def _beside_python(value: Any) -> Kind | None:
    if isinstance(value, threading.Thread | logging.Logger):
        return _LABELLED
    if beside_python.is_managed(value):
        return _MANAGED
    if beside_python.is_shared_numbers(value):
        return _SHARED_NUMBERS
    if isinstance(value, tqdm):
        return _BAR
    if isinstance(value, beside_python.PowerSGDState):
        return _LEFT_OUT
    return _DATABASE if isinstance(value, sqlite3.Connection) else None


def _method_of(value: Any) -> Kind:
    """A method of a built-in object, such as `losses.append`, leads to the object."""
    owner = getattr(value, "__self__", None)
    if owner is None or isinstance(owner, types.ModuleType | type):
        return _NAMED if isinstance(value, types.ModuleType) or getattr(value, "__module__", None) else _FIXED
    return _EXACT[types.MethodType]


def _kind_of_object(value: Any) -> Kind:
    if _is_of(type(value), ("pandas",)):
        if values.is_missing(value):
            return _MISSING
        return _RESTATED if hasattr(value, "_mgr") else _REDUCED
    if _is_of(type(value), ("pathlib",)):
        return _REDUCED  # a path that was asked for its hash keeps it: another process has other hashes
    if instances.has_plain_layout(type(value)):
        return _OBJECT
    return _REDUCED


def _is_of(cls: type, packages: tuple[str, ...]) -> bool:
    """Whether a class is of one of these packages, or of a module whose name begins like one below a package."""
    module = str(cls.__module__)
    return any(f"{module}.".startswith(f"{name}.") or ("." in name and module.startswith(name)) for name in packages)


def is_own(code: Any) -> bool:
    """Whether a class or function is the user's own."""
    return is_own_module(str(code.__module__))
