"""What asks a person on a rank gets an answer at once: there is nobody to ask, and what to do instead."""

from __future__ import annotations

from typing import Any, NoReturn

from jupyter_llmcloud.training import patches

_ASK = (
    "{} has no keyboard on a rank. Ask in the notebook and bring the answer with --push, "
    "for example: answer = {} in one cell, then %%distribute --push answer. "
    "A script takes it as an argument (sys.argv)."
)
_DEBUG = (
    "{} has no keyboard on a rank. Print what you would look at, or bring it with %pull; after an error %world locals "
    "shows the local variables of the line that failed, and %world stacks shows where every rank is."
)


def install() -> None:
    """For this process."""
    patches.NO_STDIN.apply(
        {
            "builtins:input": _refuse_to_ask("input()"),
            "getpass:getpass": _refuse_to_ask("getpass.getpass()"),
            "sys:breakpointhook": _refuse_to_debug("breakpoint()"),
            "bdb:Bdb.set_trace": _refuse_to_debug("set_trace()"),
            "pdb:Pdb.interaction": _refuse_to_debug("the debugger"),
        }
    )


def no_debugger(what: str) -> NoReturn:
    """Raise what says that there is no debugger here."""
    raise RuntimeError(_DEBUG.format(what))


def _refuse_to_ask(what: str) -> Any:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise RuntimeError(_ASK.format(what, what))

    return lambda _: refuse


def _refuse_to_debug(what: str) -> Any:
    def refuse(*_: object, **__: object) -> NoReturn:
        no_debugger(what)

    return lambda _: refuse
