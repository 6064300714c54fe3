"""`--fresh`: a cell that is a whole script finds what a new process would find, and leaves to others what it found.

While it is executed, variables of other cells, modules of the user's own, the environment, the working folder, random
numbers and the settings of libraries are those that the rank began with. Afterwards they are again what they were; the
variables that the script has bound stay beside the earlier ones, as after IPython's `%run`.
"""

from __future__ import annotations

import contextlib
import decimal
import functools
import gc
import logging
import multiprocessing
import os
import random
import socket
import sys
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState

from jupyter_llmcloud.training.checkpoint import rng
from jupyter_llmcloud.training.resume.user_code import is_own_module

_LEVELS = "levels of loggers"


class Setting(NamedTuple):
    """Something that holds for a whole process: how it is read, and how it is set to what was read."""

    read: Callable[[], Any]
    set: Callable[[Any], Any]


def _attribute(settings: Any, name: str) -> Setting:
    return Setting(lambda: getattr(settings, name), lambda value: setattr(settings, name, value))


def _content(container: Any) -> Setting:
    """Of a list that others hold."""
    return Setting(lambda: list(container), lambda value: container.__setitem__(slice(None), value))


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _settings() -> dict[str, Setting]:
    found = {
        "working folder": Setting(_working_folder, _set_working_folder),
        "sys.path": _content(sys.path),
        "sys.excepthook": _attribute(sys, "excepthook"),
        "recursion limit": Setting(sys.getrecursionlimit, sys.setrecursionlimit),
        "garbage collection": Setting(gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
        "socket timeout": Setting(socket.getdefaulttimeout, socket.setdefaulttimeout),
        "decimal context": Setting(lambda: decimal.getcontext().copy(), decimal.setcontext),
        "warning filters": Setting(lambda: list(warnings.filters), _set_warning_filters),
        "log level": Setting(lambda: logging.root.level, logging.root.setLevel),
        "log handlers": _content(logging.root.handlers),
        _LEVELS: Setting(_levels, _set_levels),
        "disabled logs": Setting(lambda: logging.root.manager.disable, logging.disable),
        "start method": Setting(
            lambda: multiprocessing.get_start_method(allow_none=True),
            lambda method: multiprocessing.set_start_method(method, force=True),
        ),
        "default dtype": Setting(torch.get_default_dtype, torch.set_default_dtype),
        "default device": Setting(torch.get_default_device, _set_default_device),
        "threads": Setting(torch.get_num_threads, torch.set_num_threads),
        "gradients": Setting(torch.is_grad_enabled, torch.set_grad_enabled),
        "anomaly detection": Setting(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        "determinism": Setting(_determinism, lambda was: torch.use_deterministic_algorithms(was[0], warn_only=was[1])),
        "matmul precision": Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        "cudnn.benchmark": _attribute(torch.backends.cudnn, "benchmark"),
        "cudnn.deterministic": _attribute(torch.backends.cudnn, "deterministic"),
        "cudnn.enabled": _attribute(torch.backends.cudnn, "enabled"),
    }
    if (numpy := sys.modules.get("numpy")) is not None:
        found["numpy.printoptions"] = Setting(numpy.get_printoptions, lambda was: numpy.set_printoptions(**was))
        found["numpy.errstate"] = Setting(numpy.geterr, lambda was: numpy.seterr(**was))
    return found


def _levels() -> dict[str, int]:
    """Those of all loggers: libraries change theirs by functions such as set_verbosity_info()."""
    loggers = logging.root.manager.loggerDict.items()
    return {name: item.level for name, item in loggers if isinstance(item, logging.Logger)}


@functools.cache
def first_levels() -> dict[str, int]:
    """Those of a process that has imported and done nothing else.

    Looked at before ranks are forked: each logger is on a page of memory that a rank that looks has for itself.
    """
    return _levels()


def _set_levels(levels: Mapping[str, int]) -> None:
    """Of those that were there; a library that came later has set its own when it was imported."""
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # removed meanwhile
        return None


def _set_working_folder(path: str | None) -> None:
    if path is not None:
        with contextlib.suppress(FileNotFoundError):  # there is no way back into it
            os.chdir(path)


def _set_warning_filters(filters: list[Any]) -> None:
    warnings.resetwarnings()  # which also tells modules that filters have changed
    warnings.filters[:] = filters  # type: ignore[index]


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device == torch.device("cpu") else device)  # where none is set, the CPU is it


def _read(settings: Mapping[str, Setting]) -> dict[str, Any]:
    return {name: setting.read() for name, setting in settings.items()}


def _set(settings: Mapping[str, Setting], values: Mapping[str, Any]) -> None:
    """Only where they differ: some of them cost, or warn."""
    for name, setting in settings.items():
        if name in values and setting.read() != values[name]:
            setting.set(values[name])


def _own_modules() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name != "__main__" and is_own_module(name)}


class Found(NamedTuple):
    """What a fresh cell has found, and what is put back after it."""

    variables: dict[str, Any]
    modules: dict[str, ModuleType]
    environment: dict[str, str]
    settings: dict[str, Any]
    generators: dict[str, Any]


class Isolation:
    """The state that a rank began with, for cells that want it."""

    def __init__(self) -> None:
        self._settings = _settings()
        self._values: dict[str, Any] = {}
        self._environment: dict[str, str] = {}
        self._generators: dict[str, Any] = {}
        self._found: Found | None = None

    def install(self) -> None:
        """Remember what is now as what a new process would find. Called once, in a rank."""
        others = {name: setting for name, setting in self._settings.items() if name != _LEVELS}
        self._values = {**_read(others), _LEVELS: first_levels()}
        self._environment = dict(os.environ)
        self._generators = rng.snapshot()

    def set_environment(self, values: Mapping[str, str]) -> None:
        """Set variables for every cell."""
        os.environ.update(values)
        self._environment.update(values)

    def begin(self, namespace: dict[str, Any], initial_names: set[str]) -> None:
        """A fresh cell is about to be executed in `namespace`; `initial_names` are no cell's."""
        self._settings = _settings()  # a library may have come
        variables = {name: value for name, value in namespace.items() if name not in initial_names}
        self._found = Found(variables, _own_modules(), dict(os.environ), _read(self._settings), rng.snapshot())
        for name in variables:
            del namespace[name]
        for name in self._found.modules:
            del sys.modules[name]
        _set_environment(self._environment)
        _set(self._settings, self._values)
        rng.restore(self._generators)
        random.seed()
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed()
        AcceleratorState._reset_state(reset_partial_state=True)

    def end(self, namespace: dict[str, Any]) -> None:
        """The cell has ended, in whatever way; nothing happens when none had begun."""
        found, self._found = self._found, None
        if found is None:
            return
        for name, value in found.variables.items():
            namespace.setdefault(name, value)
        for name in _own_modules():
            del sys.modules[name]
        sys.modules.update(found.modules)
        _set_environment(found.environment)
        _set(self._settings, found.settings)
        rng.restore(found.generators)


def _set_environment(values: Mapping[str, str]) -> None:
    for name in [name for name in os.environ if name not in values]:
        del os.environ[name]
    os.environ.update({name: value for name, value in values.items() if os.environ.get(name) != value})
