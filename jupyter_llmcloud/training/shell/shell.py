"""The IPython shell of a rank: a notebook cell behaves in it as in the notebook, its output goes to the sender."""

from __future__ import annotations

import ast
import builtins
import linecache
import os
import sys
from types import CodeType
from typing import Any

from IPython.core.compilerop import CachingCompiler
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.inputtransformer2 import TransformerManager
from IPython.core.interactiveshell import ExecutionResult, InteractiveShell
from IPython.utils.process import system
from traitlets import Any as AnyTrait
from traitlets import Type, default
from traitlets.config import Config

from jupyter_llmcloud.core.plain_cells import read_plain
from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.system.transparent_frames import MARK
from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.output.sender import OutputSender, RankStream
from jupyter_llmcloud.training.resume.loops.instrumentation import InstrumentedCode, NumberLoops
from jupyter_llmcloud.training.shell import class_sources
from jupyter_llmcloud.training.shell.namespace import numbers, rebound
from jupyter_llmcloud.training.shell.no_stdin import no_debugger
from jupyter_llmcloud.training.shell.program_end import PROGRAM_END
from jupyter_llmcloud.training.shell.script import ExitCommand, ended_well, prepare_script, was_stopped
from jupyter_llmcloud.training.shell.tracebacks import (
    cut_refusal,
    draw_plainly,
    holds_group,
    is_deep,
    point_at_the_failing_line,
)

INTERACTIVE_FIGURES = ("notebook", "nbagg", "widget", "ipympl")


class CellCompiler(CachingCompiler):
    """Compiles under the notebook cell's own name, with the whole cell as source, so that line numbers agree.

    `offset` is the number of lines of the notebook cell above the code that is being compiled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cell: Execute | None = None
        self.offset = 0
        self.code = InstrumentedCode()
        self._scripts: set[str] = set()  # known by the names of their files
        self._cells: dict[str, None] = {}  # of both, in the order in which they came last

    def begin(self, cell: Execute) -> None:
        """The code of this cell comes next."""
        self.cell, self.offset = cell, cell.line_offset
        source = [line + "\n" for line in cell.source.removesuffix("\n").split("\n")]
        linecache.cache["<timed exec>"] = (sum(map(len, source)), None, source, "<timed exec>")  # of %%time

    def end(self) -> None:
        self.cell, self.offset = None, 0

    def cells(self) -> list[str]:
        """The names of all cells and scripts, the newest last."""
        return list(self._cells)

    def cell_number(self, filename: str) -> int | None:
        """The execution count of the notebook cell that was compiled under this name; 0 of the script that is run."""
        if filename == "<timed exec>" and self.cell is not None:
            return self.cell.execution_count
        return 0 if filename in self._scripts else self._filename_map.get(filename)

    def __call__(self, source: Any, filename: str, symbol: str, **kwargs: Any) -> CodeType:
        """Compile; the loops of a cell are tracked where the run needs it."""
        flags = self.flags  # to which a `from __future__ import` adds
        code: CodeType = super().__call__(source, filename, symbol, **kwargs)
        if not isinstance(source, ast.AST):
            return code
        return self.code.of_cell(code, source, lambda tree: compile(tree, filename, symbol, flags, True))  # type: ignore[call-overload]

    def cache(self, transformed_code: str, number: int = 0, raw_code: str | None = None) -> str:
        cell, raw = self.cell, (raw_code or "").rstrip()
        if cell is None or not raw or not cell.code.rstrip().endswith(raw):
            self.offset = 0
            return super().cache(transformed_code, number, raw_code)
        # The whole body, or the part of it below a cell magic.
        self.offset = cell.line_offset + cell.code.rstrip()[: -len(raw)].count("\n")
        self._cells.pop(cell.filename, None)
        self._cells[cell.filename] = None
        if cell.script:
            self._scripts.add(cell.filename)
        else:
            self._filename_map[cell.filename] = cell.execution_count
        above = ["# " + line for line in cell.source.split("\n")[: self.offset]]
        lines = [line + "\n" for line in [*above, *transformed_code.removesuffix("\n").split("\n")]]
        linecache.cache[cell.filename] = (sum(map(len, lines)), None, lines, cell.filename)
        return cell.filename


class CellTransformer(TransformerManager):
    """As IPython's, also where a cell has added its own; plain Python is not taken to pieces to find no magic in it."""

    def __init__(self) -> None:
        super().__init__()
        self._own = self._all()

    def _all(self) -> list[object]:
        return [*self.cleanup_transforms, *self.line_transforms, *self.token_transformers]

    def transform_cell(self, cell: str) -> str:
        if self._all() != self._own or read_plain(cell) is None:
            return str(super().transform_cell(cell))
        return cell if cell.endswith("\n") else cell + "\n"


class ShiftLines(ast.NodeTransformer):
    """Moves a cell's nodes down by the lines of the notebook cell above its body."""

    def __init__(self, compiler: CellCompiler) -> None:
        self.compiler = compiler

    def visit(self, node: ast.AST) -> ast.AST:
        return ast.increment_lineno(node, self.compiler.offset) if self.compiler.offset else node


class RankDisplayHook(DisplayHook):
    """A last expression becomes a `result` record."""

    shell: RankShell
    _result_id = 0  # of what `_` was bound to

    def quiet(self) -> bool:
        """Whether the cell ends with a semicolon; without a history IPython cannot tell."""
        cell = self.shell.compile.cell
        return cell is not None and self.semicolon_at_end_of_expression(self.shell.transform_cell(cell.code))

    def update_user_ns(self, result: Any) -> None:
        """`_` is the newest result, unless the user has bound that name; older ones are let go of."""
        namespace = self.shell.user_ns
        if "_" not in vars(builtins) and id(namespace.get("_", self._)) in (self._result_id, id(self._)):
            namespace["_"], self._result_id = result, id(result)

    def write_output_prompt(self) -> None:
        pass

    def write_format_data(self, format_dict: dict[str, Any], md_dict: dict[str, Any] | None = None) -> None:
        self.shell.sender.record({"kind": "result", "data": _portable(format_dict), "metadata": md_dict or {}})

    def finish_displayhook(self) -> None:
        pass

    def log_output(self, format_dict: dict[str, Any]) -> None:
        pass


class RankDisplayPublisher(DisplayPublisher):
    """`display()` becomes a `display` record; its update and clear_output() likewise."""

    def publish(
        self,
        data: dict[str, Any],
        metadata: dict[str, Any] | None = None,
        source: Any = None,
        *,
        transient: dict[str, Any] | None = None,
        update: bool = False,
        **kwargs: Any,
    ) -> None:
        record: dict[str, Any] = {"kind": "display", "data": _portable(data), "metadata": metadata or {}}
        if display_id := (transient or {}).get("display_id"):
            record["display_id"] = display_id
        if update:
            record["update"] = True
        self.shell.sender.record(record)

    def clear_output(self, wait: bool = False) -> None:
        self.shell.sender.record({"kind": "clear_output", "wait": wait})


class RankShell(InteractiveShell):
    """One per rank. `run` executes a cell and returns its error, if any."""

    compiler_class = Type(CellCompiler)
    displayhook_class = Type(RankDisplayHook)
    display_pub_class = Type(RankDisplayPublisher)
    sender = AnyTrait()
    is_echo = AnyTrait(lambda _: False)  # whether an error has come of the end of a peer
    compile: CellCompiler
    last_traceback: list[str]
    given: dict[str, Any]  # what every namespace has
    initial_names: set[str]  # those of the namespace before the first cell
    is_drawing = False  # a Stop that comes while a traceback is drawn has been obeyed already

    def init_io(self) -> None:
        pass

    def init_readline(self) -> None:
        pass

    def init_prompts(self) -> None:
        """No `sys.ps1`, by which libraries know a session that a person types into."""

    def system(self, cmd: str) -> None:
        """`!cmd`: its output is the cell's; it cannot ask, and would wait for an answer for ever."""
        if cmd.rstrip().endswith("&"):
            raise OSError("Background processes are not supported: start it with subprocess.Popen.")
        self.user_ns["_exit_code"] = system("exec </dev/null; " + self.var_expand(cmd, depth=1))

    call_pdb = property(lambda _: False, lambda _, __: None)  # `%pdb on` would hide the error itself

    def debugger(self, force: bool = False) -> None:
        """`%debug`."""
        no_debugger("the debugger")

    def enable_gui(self, gui: str | None = None) -> None:
        pass

    def enable_matplotlib(self, gui: str | None = None) -> Any:
        """`%matplotlib`: a figure that can be moved would have no kernel to talk to here, and is shown as an image."""
        return super().enable_matplotlib("inline" if gui in INTERACTIVE_FIGURES else gui)

    def init_builtins(self) -> None:
        """IPython takes `exit` away from libraries, which leave by it."""
        super().init_builtins()
        self.builtin_trap.auto_builtins |= {"exit": self.exiter, "quit": self.exiter}

    @default("exiter")
    def _exiter_default(self) -> ExitCommand:
        return ExitCommand(self)

    def showtraceback(
        self,
        exc_tuple: tuple[type[BaseException], BaseException, Any] | None = None,
        filename: str | None = None,
        tb_offset: int | None = None,
        exception_only: bool = False,
        running_compiled_code: bool = False,
    ) -> None:
        """Draw the traceback of the exception that was just caught.

        Plainly, hence at once, after a Stop, and where a peer has gone: IPython reads the sources of torch for seconds,
        for which the other ranks, or the next attempt, would wait.
        """
        self.is_drawing = True
        try:
            error = exc_tuple[1] if exc_tuple else sys.exception()
            if error is not None:
                cut_refusal(error)
            if error is not None and self._is_drawn_plainly(error):
                self._showtraceback(type(error), error, draw_plainly(error, self.compile.cell_number))
            else:
                # Of a SystemExit IPython would draw the exception only, and refer to %tb.
                only = exception_only and not isinstance(error, SystemExit)
                super().showtraceback(exc_tuple, filename, tb_offset, only, running_compiled_code)
        finally:
            self.is_drawing = False

    def _is_drawn_plainly(self, error: BaseException) -> bool:
        return was_stopped(error) or bool(self.is_echo(error)) or holds_group(error) or is_deep(error)

    def _showtraceback(self, etype: type, evalue: BaseException, stb: list[str]) -> None:
        self.last_traceback = "\n".join(stb).replace(MARK, "").splitlines()

    def run_cell_magic(self, magic_name: str, line: str, cell: str) -> Any:
        """Its body stands one line below it."""
        self.compile.offset += 1
        return super().run_cell_magic(magic_name, line, cell)

    def safe_execfile(self, fname: str, *where: Any, exit_ignore: bool = False, **options: Any) -> None:
        """`%run FILE`: its error is the cell's, whose peers would otherwise wait for this rank."""
        try:
            super().safe_execfile(fname, *where, exit_ignore=exit_ignore, **{**options, "raise_exceptions": True})
        except SystemExit:
            if not exit_ignore:
                raise

    def safe_execfile_ipy(self, fname: str, shell_futures: bool = False, raise_exceptions: bool = False) -> None:
        """`%run FILE.ipynb`, likewise."""
        super().safe_execfile_ipy(fname, shell_futures, raise_exceptions=True)

    def give(self, **values: Any) -> None:
        """Variables that every cell finds."""
        self.given = {**getattr(self, "given", {}), **values}
        self.user_ns.update(values)

    def run(self, cell: Execute) -> BaseException | None:
        """Execute the body of a notebook cell in the rank's namespace."""
        for name, value in self.given.items():
            self.user_ns.setdefault(name, value)  # %reset or del may have taken it
        if cell.fresh:
            self.user_ns.update(self.given)
        before = numbers(self.user_ns)
        self.compile.begin(cell)
        self.execution_count = cell.execution_count
        self.last_traceback = []
        prepare_script(cell, self.user_ns)
        shown = self.ast_node_interactivity
        if cell.script:
            self.ast_node_interactivity = "none"  # a script shows what it prints, no more
        try:
            result = self._run_whole(cell)
        finally:
            self.compile.end()
            if cell.script:
                self.ast_node_interactivity = shown
        if told := rebound(self.given, before, self.user_ns):
            self.sender.warning("stderr", told)
        error: BaseException | None = result.error_before_exec or result.error_in_exec
        if ended_well(error):
            return None
        if error is None and self.last_traceback:  # drawn by something that went on, such as %%capture
            self.sender.text("stderr", "\n".join(self.last_traceback) + "\n")
        return error

    def _run_whole(self, cell: Execute) -> ExecutionResult:
        """The cell, and for a script what Python does behind its last line."""
        if not (cell.script or cell.fresh):
            return self.run_cell(cell.code, store_history=False)
        PROGRAM_END.begin()
        is_stopped = True
        try:
            result = self.run_cell(cell.code, store_history=False)
            is_stopped = was_stopped(result.error_before_exec or result.error_in_exec)
        finally:
            PROGRAM_END.come(waits=not is_stopped)
        return result


def make_shell() -> RankShell:
    """The shell of this process. A zygote makes it and executes a first cell, so that its ranks share all of that."""
    if RankShell.initialized():
        return RankShell.instance()
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "neutral"
    config.InteractiveShell.cache_size = 0  # results of every cell would keep models alive
    shell = RankShell.instance(config=config)
    shell.input_transformer_manager = CellTransformer()
    shell.ast_transformers += [NumberLoops(), ShiftLines(shell.compile)]
    point_at_the_failing_line()
    class_sources.install(shell.compile.cells)
    _do_not_advise_on_exit()
    shell.run_cell("pass", store_history=False)
    return shell


def start_shell(sender: OutputSender, namespace: dict[str, Any]) -> RankShell:
    """The shell of this rank; `sys.stdout` and `sys.stderr` become the sender's."""
    sys.stdout = RankStream(sender, "stdout", 1)
    sys.stderr = RankStream(sender, "stderr", 2)
    shell = make_shell()
    shell.sender = sender
    shell.user_ns["_dh"][:] = [os.getcwd()]  # where `%cd -` goes back to; the zygote was elsewhere
    shell.give(**namespace)
    shell.initial_names = {*shell.user_ns, "__file__"}
    return shell


def _do_not_advise_on_exit() -> None:
    def make(warn: Any) -> Any:
        def warn_unless_exit(message: Any, *args: Any, **kwargs: Any) -> None:
            if not str(message).startswith("To exit:"):
                warn(message, *args, **kwargs)

        return warn_unless_exit

    patches.EXIT_ADVICE.apply({"IPython.core.interactiveshell:warn": make})


def _portable(data: dict[str, Any]) -> dict[str, Any]:
    """A mime bundle that JSON can carry: bytes (images) as base64 text. Of a widget, whose model is here, the text."""
    import base64

    return {
        mime: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for mime, value in data.items()
        if mime != "application/vnd.jupyter.widget-view+json"
    }
