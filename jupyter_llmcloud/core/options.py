"""Options as data: parsed, refused in one line, completed and explained, all from one list."""

from __future__ import annotations

import difflib
import json
import operator
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jupyter_llmcloud.errors import UsageError

DASHES = tuple("\u2010\u2011\u2012\u2013\u2014\u2212")  # into which word processors and web pages turn hyphens


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        flags: how it is written, the long form last ("-n", "--nproc").
        help: one sentence.
        values: the allowed values, when they are a closed set.
        metavar: what stands for its value in the help; "" for a switch.
        parse: text -> value; raises UsageError or ValueError.
        repeat: may be given several times; its value is a list.
        default: its value when it is left out; None: there is none.
        resumes: whether a run that goes on from another one has it from there.
        names: of what kind of thing its value is a name, or several with commas ("variables"); for completion.
        is_command_line: whether its value is arguments for a program, which begin with dashes; as a list, its words.
    """

    flags: tuple[str, ...]
    help: str
    values: tuple[str, ...] = ()
    metavar: str = ""
    parse: Callable[[str], Any] = str
    repeat: bool = False
    default: Any = None
    resumes: bool = False
    names: str = ""
    is_command_line: bool = False

    @cached_property
    def name(self) -> str:
        """As a field: `--max-restarts` is max_restarts."""
        return self.flags[-1].lstrip("-").replace("-", "_")

    @cached_property
    def takes_value(self) -> bool:
        """Whether a value follows the flag."""
        return bool(self.metavar or self.values)

    def check(self, value: Any) -> Any:
        """`value` as Python or JSON gives it, checked as its text would be. Raises UsageError."""
        value = _plain(value)
        if not self.takes_value:
            if isinstance(value, bool):
                return value
            raise UsageError(f"{self.name} is true or false, not {value!r:.80}.")
        several = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        if not several and (isinstance(value, bool) or not isinstance(value, str | int | float)):
            raise UsageError(f"{self.name} {value!r:.80} is not possible: {_describe(self)}.")
        join = shlex.join if self.is_command_line else ",".join
        return self.read(join(value) if several else str(value), self.name)

    def read(self, text: str, flag: str) -> Any:
        """The value that `text` stands for. Raises UsageError, which names the option by `flag`."""
        if self.values and text not in self.values:
            raise UsageError(f"{flag} {text!r} is not possible. Choose one of {', '.join(self.values)}.")
        try:
            return self.parse(text)
        except (UsageError, ValueError) as error:
            words, seen = _ended(str(error)), repr(text)
            if flag in words:
                raise UsageError(words) from None
            raise UsageError(f"{flag} {words}" if words.startswith(seen) else f"{flag} {seen}: {words}") from None


def _plain(value: Any) -> Any:
    """A path as text, a whole number of NumPy or torch as one of Python."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, int | float | str) or not hasattr(value, "__index__"):
        return value
    try:
        return operator.index(value)
    except TypeError:  # an array of several, or of fractions
        return value


@dataclass(frozen=True)
class Syntax:
    """What may follow a magic (or one verb of it). `names` is of the arguments, as in Option."""

    magic: str
    options: tuple[Option, ...] = ()
    arguments: str = ""  # for example "NAME" or "A B"; "[NAME]" may be left out, "NAME..." repeats, "a|b" are words
    help: str = ""
    names: str = ""

    def option(self, flag: str) -> Option | None:
        """The option with this flag, None when there is none."""
        return next((option for option in self.options if flag in option.flags), None)


@dataclass
class Parsed:
    """The result: `values` by option name (absent ones are None, False or []), and the positional arguments."""

    values: dict[str, Any]
    arguments: list[str] = field(default_factory=list)

    @property
    def given(self) -> dict[str, Any]:
        """The options that were written."""
        return {
            name: value for name, value in self.values.items() if not (value is None or value is False or value == [])
        }

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None


def integer(minimum: int) -> Callable[[str], int]:
    """A parser for whole numbers of at least `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise UsageError(f"expected a whole number, not {text!r}") from None
        if value < minimum:
            raise UsageError(f"expected at least {minimum}, not {value}")
        return value

    return parse


def read_argument(syntax: Syntax, text: str, read: Callable[[str], Any]) -> Any:
    """An argument that is more than a text. Raises UsageError, which names the magic."""
    try:
        return read(text)
    except UsageError as error:
        raise UsageError(_ended(f"{syntax.magic} {text}: {error}")) from None


def kind_and_options(words: Sequence[str], command: str) -> tuple[str, dict[str, Any]]:
    """The kind of a cluster and what is given to it, of `[KIND] [key=value...]`. Raises UsageError."""
    given = dict(_key_and_value(word, command) for word in words if "=" in word)
    if "workers" in given:
        raise UsageError(f"{command}: how many workers there are is said by --workers {given['workers']}.")
    kinds = [word for word in words if "=" not in word]
    if len(kinds) > 1:
        raise UsageError(f"{command}: one KIND only, not {' and '.join(kinds)}.")
    return (kinds[0] if kinds else "local"), given


def _key_and_value(word: str, command: str) -> tuple[str, Any]:
    name, _, text = word.partition("=")
    if not name.isidentifier():
        raise UsageError(f"{command}: {word!r} is not key=value.")
    try:
        return name, json.loads(text)
    except ValueError:
        if text.startswith(("[", "{")):  # its quotes were taken as those of the line
            raise UsageError(
                f'{command}: {word!r} is no JSON. Quotes around all of it keep its own: {name}=\'["a", "b"]\'.'
            ) from None
        return name, text


def split(line: str, magic: str) -> list[str]:
    """Words of a line; quotes hold words together."""
    if magic.startswith("%%") and line.endswith("\\"):
        raise UsageError(f"{magic}: what follows it stands in one line: {line!r} goes on in the next one.")
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{magic}: {error} in {line!r}.") from None


def number(minimum: float) -> Callable[[str], float]:
    """A parser for finite numbers of at least `minimum`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise UsageError(f"expected a number, not {text!r}") from None
        if not minimum <= value < float("inf"):
            raise UsageError(f"expected at least {minimum:g}, not {text}")
        return value

    return parse


def take_verb(magic: str, verbs: Mapping[str, Any], words: list[str], default: str = "") -> str:
    """The first of `words`, taken from them, or the default. Raises UsageError that says which was perhaps meant."""
    verb = words.pop(0) if words or not default else default
    if verb not in verbs:
        raise UsageError(f"{magic} {verb}: expected one of {', '.join(verbs)}.{did_you_mean(verb, verbs)}")
    return verb


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """` Did you mean list?`, or nothing when none is alike."""
    close = difflib.get_close_matches(word.lower(), list(words), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def parse(syntax: Syntax, words: Sequence[str]) -> Parsed:
    """Parse words by a syntax. Raises UsageError that names the option and what is allowed."""
    values: dict[str, Any] = {
        option.name: [] if option.repeat else (None if option.takes_value else False) for option in syntax.options
    }
    arguments: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not _is_flag(word):
            arguments.append(word)
            continue
        flag, equals, given = word.partition("=")
        option = syntax.option(flag)
        if option is None:
            raise UsageError(_unknown(syntax, flag))
        if not option.takes_value:
            if equals:
                raise UsageError(f"{syntax.magic}: {flag} takes no value, not {given!r}.")
            values[option.name] = True
            continue
        if not equals:
            if not rest or (_is_flag(rest[0]) and not option.is_command_line):
                raise UsageError(f"{syntax.magic}: {flag} needs a value: {_describe(option)}.")
            given = rest.pop(0)
        value = _value(syntax, option, flag, given)
        values[option.name] = [*values[option.name], value] if option.repeat else value
    _check_arguments(syntax, arguments)
    return Parsed(values, arguments)


def _is_flag(word: str) -> bool:
    """Whether it is meant as an option: not a dash alone, a number, or a text that was quoted since it has spaces."""
    flag = word.partition("=")[0]
    if not flag.startswith("-") or word == "-" or any(map(str.isspace, flag)):
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


def _value(syntax: Syntax, option: Option, flag: str, given: str) -> Any:
    try:
        return option.read(given, flag)
    except UsageError as error:
        raise UsageError(f"{syntax.magic}: {error}") from None


def _ended(text: str) -> str:
    return text if text.endswith((".", "?")) else text + "."


def _describe(option: Option) -> str:
    return f"one of {', '.join(option.values)}" if option.values else option.metavar


def _unknown(syntax: Syntax, flag: str) -> str:
    flags = [flag for option in syntax.options for flag in option.flags]
    hint = did_you_mean(flag, flags)
    if flag in ("-h", "--help"):
        hint = f" {syntax.magic.split()[0]}? shows what each does."
    elif not flag.startswith("--") and (short := syntax.option(flag[:2])) and short.takes_value:
        hint = f" Did you mean {flag[:2]} {flag[2:]}?"
    elif flag.removeprefix("--").upper() in syntax.arguments.strip("[]").split():
        hint = f" It is written without one: {syntax.magic} {syntax.arguments}."
    allowed = f" Allowed: {', '.join(option.flags[-1] for option in syntax.options)}." if flags else " It takes none."
    return f"{syntax.magic}: there is no option {flag}.{hint}{allowed}"


def _check_arguments(syntax: Syntax, arguments: list[str]) -> None:
    expected = syntax.arguments.split()
    if any(word.endswith("...") or word.endswith("...]") for word in expected):
        most: float = float("inf")
    else:
        most = len(expected)
    least = sum(not word.startswith("[") for word in expected)
    if len(arguments) < least:
        raise UsageError(_ended(f"{syntax.magic}: expected {syntax.arguments}"))
    if len(arguments) > most:
        word = arguments[int(most)]
        takes = f"Expected {syntax.arguments} only" if expected else "It takes no arguments"
        raise UsageError(f"{syntax.magic}: what does {word!r} mean? {takes}.{_perhaps(syntax, word)}")


def _perhaps(syntax: Syntax, word: str) -> str:
    """What was perhaps meant by a word that stands where none may: an option, or the first line of a cell."""
    if word[:1] in DASHES:
        return f" Options begin with the keyboard's hyphen, -, not with {word[0]}."
    name, equals, value = word.partition("=")
    flag = f"{'-' if len(name) == 1 else '--'}{name.replace('_', '-')}"
    if equals and syntax.option(flag):
        return f" Did you mean {flag} {value}?"
    if word.isdecimal() and syntax.option("-n"):
        return f" Did you mean -n {word}?"
    return " Code stands in the lines below it." if syntax.magic.startswith("%%") else ""


def usage(syntax: Syntax) -> str:
    """The help text."""
    lines = [f"{syntax.magic} {syntax.arguments}".rstrip() + (" [options]" if syntax.options else ""), ""]
    if syntax.help:
        lines += [syntax.help, ""]
    for option in syntax.options:
        value = option.metavar or "|".join(option.values)
        lines.append(f"  {', '.join(option.flags)} {value}".rstrip())
        lines.append(f"      {option.help}")
    return "\n".join(lines)


Known = Callable[[str], Sequence[str]]  # the names there are of a kind of thing


def complete(syntax: Syntax, text: str, known: Known = lambda kind: ()) -> list[str]:
    """Completions of the last word of `text`, which is what follows the magic's name up to the cursor."""
    words = text.split(" ")
    last = words[-1]
    if len(words) > 1 and (option := syntax.option(words[-2])) and option.takes_value:
        return _named(option.values or known(option.names), last)
    if "=" in last and (option := syntax.option(last.partition("=")[0])):
        head, _, start = last.partition("=")
        return [f"{head}={value}" for value in _named(option.values or known(option.names), start)]
    flags = [option.flags[-1] for option in syntax.options if option.flags[-1].startswith(last)]
    if last.startswith("-"):
        return flags
    found = _named(_of_argument(syntax, sum(1 for _ in _arguments(syntax, words[:-1])), known), last)
    return [*found, *flags] if not last else found


def _named(names: Sequence[str], text: str) -> list[str]:
    """Those that begin with what follows the last comma of `text`, with what stands before it."""
    before, comma, start = text.rpartition(",")
    taken = before.split(",") if comma else []
    return [f"{before}{comma}{name}" for name in names if name.startswith(start) and name not in taken]


def _arguments(syntax: Syntax, words: Sequence[str]) -> Iterator[str]:
    """The words that are no options and no values of such."""
    is_value = False
    for word in words:
        if is_value or not word:
            is_value = False
        elif word.startswith("-"):
            option = syntax.option(word)
            is_value = option is not None and option.takes_value
        else:
            yield word


def _of_argument(syntax: Syntax, number: int, known: Known) -> Sequence[str]:
    """What the argument of this number may be."""
    expected = syntax.arguments.split()
    if not expected or (number >= len(expected) and "..." not in expected[-1]):
        return ()
    placeholder = expected[min(number, len(expected) - 1)].strip("[]")
    return placeholder.split("|") if "|" in placeholder else known(syntax.names)
