"""Which cells and variables a cell needs, so that it can be run elsewhere as a script.

What ranks hold was made by the cells that they ran before, and by `%push`. Of these cells all go along but those that
cannot matter: definitions of names that nobody needs, and what only shows. A cell that trains a model need not bind a
name to change what comes after it, nor one that seeds or sets an option of torch.
"""

from __future__ import annotations

import ast
import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jupyter_llmcloud.core.export.names_used import EVERYTHING, NamesUsed, always_bound, is_definition, names_used
from jupyter_llmcloud.errors import UsageError

# What a rank's namespace begins with: the script makes them itself.
GIVEN = frozenset({"rank", "local_rank", "world_size", "device", "run", "display", "get_ipython", "exit", "quit"})
_OF_PYTHON = {"%%time", "%%capture", "%%prun"}  # cell magics whose body is the cell's own code
_TIMED = re.compile(r"%time\s+(?=\S)")
_SEEDS = re.compile(r"\b(manual_seed|set_seed|seed_everything)\s*\(")


@dataclass(frozen=True)
class SourceCell:
    """A cell that ranks have run.

    Attributes:
        code: its body.
        spec: the options that it had.
        pushed: what was pushed to the ranks before it and after the cell before: {name: its literal, "" where it has
            none}.
        on_all_ranks: False when it ran on some of them only.
        num_ranks: of its world when it ran; 0 when it has not run yet: earlier cells may have had any number then.
        trial: lines that make the `trial` which it found; "" when it found none.
    """

    run_id: str
    code: str
    state: str = "finished"
    spec: Mapping[str, Any] = field(default_factory=dict)
    pushed: Mapping[str, str] = field(default_factory=dict)
    on_all_ranks: bool = True
    num_ranks: int = 0
    trial: str = ""

    @property
    def tree(self) -> ast.Module:
        """Its syntax. Raises UsageError that names the line which is no Python, such as a magic."""
        try:
            return ast.parse(self.code)
        except SyntaxError as error:
            line = self.code.split("\n")[min(error.lineno or 1, self.code.count("\n") + 1) - 1].strip()
            what = (
                f"no Python that version {sys.version_info[0]}.{sys.version_info[1]}, which looks at it here, can read"
            )
            if line[:1] in ("%", "!", "?") or "= !" in line:
                what = "a magic or a command of the shell"
            raise UsageError(
                f"run {self.run_id} cannot be exported: line {error.lineno}, {line!r}, is {what}. "
                "Put it into another cell, or write it in Python."
            ) from None


@dataclass(frozen=True)
class ScriptPart:
    """A piece of the script: a cell, and the pushed variables that it needs to be set first."""

    cell: SourceCell
    assigned: tuple[tuple[str, str], ...] = ()


def needed_cells(
    last: SourceCell, earlier: Sequence[SourceCell], is_exact: bool = True
) -> tuple[list[ScriptPart], list[str]]:
    """The pieces in order, `last` the last, and notes on what was left out.

    Args:
        last: the cell to be exported.
        earlier: what the same ranks ran before, the oldest first.
        is_exact: whether the numbers are to be the same. If not, or when the last cell seeds by itself, a cell stays
            out that neither makes nor reads what is needed, such as one with a training of its own.

    Raises:
        UsageError: it needs what cannot go along, which is named.
    """
    last, commands = last_without_commands(last)
    search = _Search(last, [] if last.spec.get("fresh") else earlier, is_exact)
    search.settle()
    search.refuse_missing()
    return search.parts[::-1], [*_left_out(last, commands), *search.notes]


@dataclass
class _Wanted:
    """What cells before must have made, as it is known while cells are looked at from the last one backwards.

    Attributes:
        needed, perhaps: as in NamesUsed.
        shadowed: read of what ranks and Python give, which a cell may have bound to something else: `rank = 8`.
        late: read by functions of cells that go along, wherever these stand.
        bound: by cells that go along and come later; certain: by one of them in any case.
        of_last: bound by the last cell in any case, perhaps behind a call of a function that reads it.
    """

    needed: set[str]
    perhaps: set[str]
    shadowed: set[str]
    late: set[str]
    bound: set[str]
    of_last: set[str]
    certain: set[str] = field(default_factory=set)

    def names(self, is_cheap: bool) -> set[str]:
        """What a cell may have made. One that `is_cheap` may go along in vain."""
        return self.needed | self.perhaps | (self.late - self.certain - (set() if is_cheap else self.of_last))

    def take(self, tree: ast.Module, used: NamesUsed) -> None:
        """A cell goes along."""
        if EVERYTHING in used.bound:
            self.needed, self.perhaps = set(), self.perhaps | self.needed
        later = used.late & self.bound
        self.needed = (self.needed - used.bound) | (used.needed - GIVEN - later)
        self.perhaps = (self.perhaps | used.perhaps | later - self.certain - self.of_last) - GIVEN
        self.shadowed = (self.shadowed - used.bound) | _given_names(used)
        self.bound |= used.bound
        self.certain |= always_bound(tree)

    def assign(self, cell: SourceCell) -> tuple[tuple[str, str], ...]:
        """Pushed variables as assignments; they are not needed any more then."""
        found = []
        for name, text in cell.pushed.items():
            is_given = name in self.shadowed and bool(text)  # an object in its place is taken for the same
            if not is_given and name not in self.names(is_cheap=False):
                continue
            if not text:
                raise UsageError(
                    f"{name!r} was pushed from the notebook, and is no plain value that a script can hold: numbers, "
                    "text, lists and dicts of them. Make it in a %%distribute cell, or save it to a file that the cell "
                    "reads."
                )
            found.append((name, text))
            for names in (self.needed, self.perhaps, self.shadowed):
                names.discard(name)
            self.bound.add(name)
            self.certain.add(name)
        return tuple(found)


class _Search:
    """Looks at cells from the last one backwards.

    Args:
        last, earlier, is_exact: as of `needed_cells`.
        only_makers: leave out what binds nothing that is needed, whatever else it does.
    """

    def __init__(
        self, last: SourceCell, earlier: Sequence[SourceCell], is_exact: bool, only_makers: bool = False
    ) -> None:
        self._last = last
        self._earlier = earlier
        self._is_exact = is_exact
        self._only_makers = only_makers
        self._is_given_a_seed = last.spec.get("seed") is not None
        self._is_alone = not is_exact or _seeds(last)
        self._imported = _imported(earlier) if self._is_alone else set()
        self._used_before = _names_used(earlier) if self._is_alone else []
        self.parts: list[ScriptPart] = []  # the last one first
        self.notes: list[str] = []
        self._wanted = self._of_last(set())

    def _of_last(self, late: set[str]) -> _Wanted:
        last = self._last
        used, given = names_used(last.tree), GIVEN | ({"trial"} if last.trial else set())
        certain = always_bound(last.tree)
        perhaps = used.perhaps - given - (certain if self._is_alone else set())
        shadowed = _given_names(used) | late & GIVEN
        return _Wanted(used.needed - given, perhaps, shadowed, late - given, used.bound, certain)

    def settle(self) -> None:
        """Find the pieces; a cell after that of a function may have bound what the function reads."""
        late = set[str]()
        while not (found := self._look(late)) <= late:
            late |= found

    def _look(self, late: set[str]) -> set[str]:
        """Find the pieces for these names that functions read late; returns those that they do read so."""
        wanted = self._wanted = self._of_last(late)
        self.parts, self.notes = [ScriptPart(self._last, wanted.assign(self._last))], []
        found, is_drawn_anew = set[str](), False
        for ran in self._earlier[::-1]:
            if ran.spec.get("fresh"):
                continue
            cell, commands = without_commands(ran)
            self.notes += _left_out(cell, commands)
            if cell.state != "finished":
                self.notes += [] if self._only_makers else _unfinished(cell, wanted.needed, wanted.perhaps)
            elif self._matters(cell):
                used = names_used(cell.tree)
                wanted.take(cell.tree, used)
                found |= used.late
                self.parts.append(ScriptPart(cell, wanted.assign(cell)))
                continue
            elif self._is_alone and not is_definition(cell.tree):
                self.notes.append(f"Left out: run {cell.run_id}, which makes and reads nothing that is needed here.")
                is_drawn_anew = not self._is_given_a_seed
            if assigned := wanted.assign(cell):  # pushed before it, whatever became of it
                self.parts.append(ScriptPart(replace(cell, code="", spec={}), assigned))
        if self._is_exact and is_drawn_anew:
            self.notes.append("What the cell draws at random before it seeds itself is another draw without these.")
        return found

    def _matters(self, cell: SourceCell) -> bool:
        used = names_used(cell.tree)
        wanted = self._wanted.names(is_cheap=is_definition(cell.tree) and not self._only_makers)
        if self._only_makers:
            return bool(used.bound & (wanted | self._wanted.shadowed))
        if self._is_alone and not used.bound & self._wanted.shadowed:
            touching = _touching(self._used_before, wanted - self._imported)
            if not _concerns(cell, wanted, self._imported, touching):
                return False
        return _goes_along(cell, wanted | self._wanted.shadowed, self._last.num_ranks)

    def refuse_missing(self) -> None:
        """Raise UsageError that names what no cell has made."""
        _refuse_missing(self._last, self._wanted.needed)


def cells_behind(last: SourceCell, earlier: Sequence[SourceCell]) -> tuple[list[SourceCell], dict[str, str]]:
    """Which of the earlier cells have bound what `last` reads, and what these read, in order; and what was pushed.

    To be shown beside those of another run: cells that only change an object are none of them.
    """
    readable = [shown for shown in map(_as_shown, (*earlier, last)) if _not_python(shown.code) is None]
    if not readable or readable[-1].run_id != last.run_id:
        return [], {}
    search = _Search(readable.pop(), [] if last.spec.get("fresh") else readable, is_exact=False, only_makers=True)
    search.settle()
    parts = search.parts[::-1]
    pushed = {name: "" if text == name else text for part in parts for name, text in part.assigned}
    return [part.cell for part in parts[:-1] if part.cell.code], pushed


def _as_shown(cell: SourceCell) -> SourceCell:
    """Without commands; an object that was pushed stands for itself."""
    return replace(without_commands(cell)[0], pushed={name: text or name for name, text in cell.pushed.items()})


def _refuse_missing(last: SourceCell, needed: set[str]) -> None:
    if needed:
        name, others = min(needed), len(needed) - 1
        more = f" (and {others} more: {', '.join(sorted(needed)[1:6])})" if others else ""
        raise UsageError(
            f"{last.run_id} cannot be exported: it needs {name!r}{more}, which no cell of its world that finished has "
            "made. Make it in the cell, or in a %%distribute cell before it, and run that again."
        )


def without_commands(cell: SourceCell) -> tuple[SourceCell, list[str]]:
    """A cell that has run without the lines that only a notebook understands, and these: `!ls`, `%matplotlib inline`.

    What takes their result, as `files = !ls` does, stays. Of what only measures, `%%time` and `%time`, the measured
    code stays; a cell in another language goes as a whole.
    """
    lines, commands = cell.code.split("\n"), list[str]()
    while (at := _not_python("\n".join(lines))) is not None:
        if not commands and lines[0].startswith("%%") and lines[0].split()[0] not in _OF_PYTHON:
            return replace(cell, code=""), [lines[0]]
        line = lines[at].lstrip() if at < len(lines) else ""
        if line[:1] not in ("%", "!"):
            return cell, []
        timed = _TIMED.match(line)
        commands.append("%time" if timed else line)
        lines[at] = lines[at][: -len(line)] + (line[timed.end() :] if timed else "pass")
    return (replace(cell, code="\n".join(lines)), commands) if commands else (cell, [])


def last_without_commands(cell: SourceCell) -> tuple[SourceCell, list[str]]:
    """The same of the cell that all is about; where nothing would be left it stays as it is, to be refused."""
    plain, commands = without_commands(cell)
    is_empty = bool(commands) and all(isinstance(node, ast.Pass) for node in plain.tree.body)
    return (cell, []) if is_empty else (plain, commands)


def _left_out(cell: SourceCell, commands: Sequence[str]) -> list[str]:
    return [f"Left out: {command!r} of run {cell.run_id}." for command in commands]


def _not_python(code: str) -> int | None:
    """The line at which it is no Python, from 0: what looks like a command may stand in a text of several lines."""
    try:
        ast.parse(code)
    except SyntaxError as error:
        return (error.lineno or 1) - 1
    return None


def _seeds(cell: SourceCell) -> bool:
    return cell.spec.get("seed") is not None or bool(_SEEDS.search(cell.code))


def _concerns(cell: SourceCell, wanted: set[str], imported: set[str], touching: set[str]) -> bool:
    """Whether a cell makes or touches what is wanted, or only sets something: `torch.set_default_dtype(...)`."""
    used = names_used(cell.tree)
    if used.bound & wanted or (used.needed | used.perhaps) & (wanted - imported | touching):
        return True
    only_calls = all(isinstance(each, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr) for each in cell.tree.body)
    return only_calls and used.needed <= imported


def _touching(cells: Sequence[NamesUsed], wanted: set[str]) -> set[str]:
    """Names by which cells may change what is wanted: of a function that reads it, of what holds it, and so on."""
    found = set[str]()
    while more := {
        name
        for each in cells
        if (each.needed | each.perhaps) & (wanted | found)
        for name in each.bound - found - wanted
    }:
        found |= more
    return found


def _names_used(cells: Sequence[SourceCell]) -> list[NamesUsed]:
    found = []
    for cell in cells:
        with contextlib.suppress(UsageError):  # one that cannot be read is refused where it matters
            found.append(names_used(without_commands(cell)[0].tree))
    return found


def _imported(cells: Sequence[SourceCell]) -> set[str]:
    """The names that cells import at their top level."""
    found = set[str]()
    for cell in cells:
        with contextlib.suppress(UsageError):
            for node in without_commands(cell)[0].tree.body:
                if isinstance(node, ast.Import | ast.ImportFrom):
                    found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return found


def _goes_along(cell: SourceCell, wanted: set[str], num_ranks: int) -> bool:
    tree = cell.tree
    if is_definition(tree) and not (wanted and names_used(tree).bound & {*wanted, EVERYTHING}):
        return False
    if not cell.on_all_ranks:
        raise UsageError(
            f"run {cell.run_id} ran on some ranks only, and what it did there cannot be told from its text. "
            "Write `if rank == 0:` in a cell of all ranks instead, and run the cells again."
        )
    if num_ranks and cell.num_ranks != num_ranks and not is_definition(tree):
        raise UsageError(
            f"run {cell.run_id} ran on {cell.num_ranks} ranks before the world was resized to {num_ranks}: no script "
            f"does both. Run it again on {num_ranks} ranks, and the cells after it."
        )
    return True


def _given_names(used: NamesUsed) -> set[str]:
    """What a cell reads of that which ranks and Python give, unless a cell before it has bound it: `rank = 8`."""
    return (used.needed | used.perhaps) & GIVEN | used.builtin


def _unfinished(cell: SourceCell, needed: set[str], perhaps: set[str]) -> list[str]:
    """A cell that failed or was stopped may have changed what the last one found."""
    try:
        used = names_used(cell.tree)
    except UsageError:
        return []
    if made := sorted(used.bound & needed):
        raise UsageError(
            f"{made[0]!r} was made last by run {cell.run_id}, which {_ended(cell.state)}: how far it came a script "
            "cannot repeat. Run it to its end, and the cell after it again."
        )
    if is_definition(cell.tree):
        return []
    changed = sorted((used.needed | used.perhaps) & (needed | perhaps))
    about = f" It read {', '.join(changed[:5])}: what it changed of them is missing here." if changed else ""
    return [f"Left out: run {cell.run_id}, which {_ended(cell.state)}.{about}"]


def _ended(state: str) -> str:
    return {"failed": "failed", "stopped": "was stopped", "lost": "was lost"}.get(state, f"is {state}")
