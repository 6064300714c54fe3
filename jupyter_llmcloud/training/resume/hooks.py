"""What replay hears of a cell that is tracked: loaders that are made, passes over them, backward passes, its loops.

Only the making of loaders is heard of always, since loaders of earlier cells have names too. Everything else is put in
place when a cell begins that asks for checkpoints, restarts or resume, and taken away at its end.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from types import CodeType
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.resume import trainer_resume
from jupyter_llmcloud.training.resume.loaders.iterator import TrackedIterator
from jupyter_llmcloud.training.resume.loaders.source import LoaderSource
from jupyter_llmcloud.training.resume.loops.import_hook import ModuleFinder

if TYPE_CHECKING:
    from jupyter_llmcloud.training.resume.loops.instrumentation import InstrumentedCode
    from jupyter_llmcloud.training.resume.replay import ReplayCursor


def number_loaders(cursor: ReplayCursor) -> None:
    """Number every loader of this process from now on. Called once, in a rank."""

    def make(original: Any) -> Any:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            cursor.loaders.number(self)

        return __init__

    patches.LOADERS.apply({"torch.utils.data:DataLoader.__init__": make})


def why_not() -> str | None:
    """Why no cell can be tracked in this process, in words for the user; None when it can."""
    return patches.LOADERS.problem() or patches.PASSES.problem()


class Hooks:
    """In place while a cell is tracked."""

    def __init__(self, cursor: ReplayCursor) -> None:
        self._cursor = cursor
        self._code: InstrumentedCode | None = None
        self._finder: ModuleFinder | None = None

    def begin(self, code: InstrumentedCode) -> None:
        """A cell begins that is tracked; `code`: of the cells of this rank."""
        self.end()
        self._code = code
        _follow_passes(self._cursor)
        trainer_resume.install(self._cursor.trainings, self._cursor)
        patches.CODE_BY_VALUE.apply({"cloudpickle:CloudPickler.dispatch_table": lambda table: _by_value(table, code)})
        self._finder = ModuleFinder(code)
        self._finder.begin()
        code.begin()

    def end(self) -> None:
        """The cell has ended: everything is as it was."""
        if self._code is None:
            return
        for patch in patches.WHILE_TRACKED:
            patch.undo()
        if self._finder is not None:
            self._finder.end()
        self._code.end()
        self._code = self._finder = None


def _follow_passes(cursor: ReplayCursor) -> None:
    inner = cursor.inner

    def make_backward(original: Any) -> Any:
        def backward(*args: Any, **kwargs: Any) -> None:
            if cursor.follows:
                cursor.note_backward()
            original(*args, **kwargs)

        return backward

    def make_iter(original: Any) -> Any:
        def __iter__(self: Any) -> Iterator[Any]:
            if inner.is_drawing:
                return inner.iterator_of(self, original)
            if not cursor.follows:
                return original(self)
            return TrackedIterator(cursor, LoaderSource(self, original, inner))

        return __iter__

    loaders = [target for target in patches.PASSES.targets if target.endswith(".__iter__")]
    patches.PASSES.apply({"torch.autograd:backward": make_backward, **dict.fromkeys(loaders, make_iter)})


def _by_value(table: ChainMap[type, Any], code: InstrumentedCode) -> ChainMap[type, Any]:
    """cloudpickle's table, with code that leaves the rank as it was written."""
    reduce = table[CodeType]
    return table.new_child({CodeType: lambda found: reduce(code.as_written(found))})
