"""Which variables of a frame may be read before they are written again, told from its code."""

from __future__ import annotations

import dis
import inspect
from types import CodeType, FrameType

_ENDS = ("RETURN", "RAISE", "RERAISE")
_JUMPS = ("JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_ABSOLUTE", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP")
_TO_HEADER = 8  # instructions from the iterable of a loop to its header
Effects = tuple[frozenset[str], frozenset[str]]  # names read first, names written


def may_be_read_by_body(frame: FrameType) -> set[str]:
    """Names that the body of the loop that is about to begin may read before it writes them."""
    instructions = [found for found in dis.get_instructions(frame.f_code) if found.offset >= frame.f_lasti]
    header = next((found for found in instructions[:_TO_HEADER] if found.opname == "FOR_ITER"), None)
    return may_be_read(frame) if header is None else _alive_after(frame.f_code, header.offset, into_body=True)


def may_be_read(frame: FrameType) -> set[str]:
    """Names that the code may read before it writes them, from where it is now."""
    return _alive_after(frame.f_code, frame.f_lasti)


def _alive_after(code: CodeType, offset: int, into_body: bool = False) -> set[str]:
    """From behind the instruction at `offset`; `into_body`: of a loop, of which it is the header."""
    instructions = list(dis.get_instructions(code))
    at = {instruction.offset: number for number, instruction in enumerate(instructions)}
    after = [_successors(instructions, number, at) for number in range(len(instructions))]
    effects = [_effects(instruction) for instruction in instructions]
    handlers = [at[entry.target] for entry in dis.Bytecode(code).exception_entries if entry.target in at]  # type: ignore[attr-defined]
    alive = _solve(after, effects)
    here = at.get(offset)
    if here is None:
        return {*code.co_names, *code.co_varnames}
    successors = [here + 1] if into_body else after[here]
    found = {name for successor in successors for name in alive[successor]}
    found |= {name for handler in handlers for name in alive[handler]}
    return found | {*code.co_cellvars, *code.co_freevars}


def _solve(after: list[list[int]], effects: list[Effects]) -> list[set[str]]:
    alive: list[set[str]] = [set() for _ in after]
    changed = True
    while changed:
        changed = False
        for number in range(len(after) - 1, -1, -1):
            reads, writes = effects[number]
            found = set[str]().union(*(alive[successor] for successor in after[number])) - writes | reads
            if found != alive[number]:
                alive[number], changed = found, True
    return alive


def _successors(instructions: list[dis.Instruction], number: int, at: dict[int, int]) -> list[int]:
    instruction = instructions[number]
    found = []
    if instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs:
        target = getattr(instruction, "jump_target", None) or instruction.argval
        if target in at:
            found.append(at[target])
    ends = instruction.opname.startswith(_ENDS) or instruction.opname in _JUMPS
    if not ends and number + 1 < len(instructions):
        found.append(number + 1)
    return found


def _effects(instruction: dis.Instruction) -> Effects:
    name, value = instruction.opname, instruction.argval
    if "DEREF" in name or "CLOSURE" in name:
        return frozenset((value,)) if isinstance(value, str) else frozenset(), frozenset()
    if not any(word in name for word in ("_NAME", "_FAST", "_GLOBAL")) or name in ("IMPORT_NAME",):
        return frozenset(), frozenset()
    values = value if isinstance(value, tuple) else (value,)
    steps = [word for word in name.split("_") if word in ("LOAD", "STORE", "DELETE")]
    reads: set[str] = set()
    writes: set[str] = set()
    for step, item in zip(steps if len(steps) >= len(values) else steps[:1] * len(values), values, strict=False):
        if step != "STORE" and str(item) not in writes:
            reads.add(str(item))
        elif step == "STORE":
            writes.add(str(item))
    return frozenset(reads), frozenset(writes)


def names_in(code: CodeType) -> set[str]:
    """The global names, and those of attributes, that some code and the functions in it use."""
    found = {*code.co_names}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= names_in(constant)
    return found


def names_written(code: CodeType) -> set[str]:
    """The variables that some code gives values: a function's own ones, or the global ones of a cell."""
    if code.co_flags & inspect.CO_OPTIMIZED:
        return {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
    stores = ("STORE_NAME", "STORE_GLOBAL")
    found = {str(step.argval) for step in dis.get_instructions(code) if step.opname in stores}
    return found | _globals_written(code)


def _globals_written(code: CodeType) -> set[str]:
    """By `global` in the functions of a cell."""
    found: set[str] = set()
    for inner in (constant for constant in code.co_consts if isinstance(constant, CodeType)):
        found |= {str(step.argval) for step in dis.get_instructions(inner) if step.opname == "STORE_GLOBAL"}
        found |= _globals_written(inner)
    return found
