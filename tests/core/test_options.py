"""The options of magics: parsed, refused in one line that helps, completed, explained."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.names import parse_duration, parse_variables
from jupyter_llmcloud.core.options import (
    Option,
    Parsed,
    Syntax,
    complete,
    integer,
    kind_and_options,
    parse,
    read_argument,
    split,
    take_verb,
    usage,
)
from jupyter_llmcloud.core.spec import DISTRIBUTE
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics.commands.clusters import VERBS as CLUSTER
from jupyter_llmcloud.magics.commands.distribute import PULL

SYNTAX = Syntax(
    "%thing",
    (
        Option(("-n", "--nproc"), "How many.", metavar="N", parse=integer(1)),
        Option(("--precision",), "How precise.", values=("no", "bf16")),
        Option(("-b", "--background"), "Return at once."),
        Option(("--push",), "Which.", metavar="a,b", parse=lambda text: parse_variables(text, "--push")),
        Option(("--timeout",), "How long.", metavar="TIME", parse=parse_duration),
        Option(("--tag",), "Any number of them.", metavar="TAG", repeat=True),
    ),
    "[NAME]",
    "Does a thing.",
)


def given(line: str, syntax: Syntax = SYNTAX) -> Parsed:
    return parse(syntax, split(line, syntax.magic))


def refusal(line: str, syntax: Syntax = SYNTAX) -> str:
    with pytest.raises(UsageError) as caught:
        given(line, syntax)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_left_out_is_none_false_or_empty() -> None:
    parsed = given("")
    assert parsed.values == {
        "nproc": None, "precision": None, "background": False, "push": None, "timeout": None, "tag": [],
    }  # fmt: skip
    assert parsed.arguments == []


@pytest.mark.parametrize("line", ["-n 3", "--nproc 3", "--nproc=3", "-n=3", "  -n   3 "])
def test_a_value_follows_its_option_or_an_equals_sign(line: str) -> None:
    assert given(line).nproc == 3


def test_options_and_arguments_come_in_any_order() -> None:
    parsed = given("-b name --timeout 2m --tag x --tag y -n 2 --push a,b --precision bf16")
    assert (parsed.background, parsed.timeout, parsed.tag, parsed.push) == (True, 120, ["x", "y"], ["a", "b"])
    assert parsed.arguments == ["name"]


def test_quotes_hold_words_together() -> None:
    assert given("--push 'a, b'").push == ["a", "b"]
    assert "No closing quotation" in refusal("--push 'a")


def test_an_option_that_is_none_is_refused_with_the_nearest() -> None:
    words = refusal("--bakground")
    assert "there is no option --bakground. Did you mean --background?" in words
    assert "--precision" in words


def test_an_option_that_is_like_none_is_refused_with_all() -> None:
    words = refusal("--zzz 3")
    assert "Did you mean" not in words
    assert all(option.flags[-1] in words for option in SYNTAX.options)


def test_a_value_that_is_none_is_refused_with_those_allowed() -> None:
    assert refusal("--precision fp17") == "%thing: --precision 'fp17' is not possible. Choose one of no, bf16."


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("-n two", "-n 'two': expected a whole number, not 'two'"),
        ("-n 0", "expected at least 1, not 0"),
        ("-n -1", "expected at least 1, not -1"),
        ("-n 2.5", "expected a whole number"),
        ("-n", "-n needs a value: N"),
        ("-n --background", "-n needs a value"),
        ("--precision", "needs a value: one of no, bf16"),
        ("--background=yes", "--background takes no value, not 'yes'"),
        ("--push 1x", "--push '1x'"),
        ("--timeout soon", "--timeout"),
        ("one two", "what does 'two' mean?"),
        ("-n2", "there is no option -n2. Did you mean -n 2?"),
        ("one nproc=4", "what does 'nproc=4' mean? Expected [NAME] only. Did you mean --nproc 4?"),
        ("one 4", "what does '4' mean? Expected [NAME] only. Did you mean -n 4?"),
        ("--", "there is no option --"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(line: str, words: str) -> None:
    text = refusal(line)
    assert text.startswith("%thing: ")
    assert words in text


def test_a_missing_argument_is_named() -> None:
    assert refusal("", PULL) == "%pull: expected NAMES..."


@pytest.mark.parametrize("line", ["\u2014n 2", "\u2013\u2013nproc 2"])
def test_a_dash_that_is_no_hyphen_is_told(line: str) -> None:
    assert refusal(f"one {line}").endswith(f"Options begin with the keyboard's hyphen, -, not with {line[0]}.")


def test_a_value_is_told_once() -> None:
    assert refusal("--timeout soon") == (
        "%thing: --timeout 'soon' is not a duration: write for example 90s, 30m or 2h."
    )
    assert refusal("-n two") == "%thing: -n 'two': expected a whole number, not 'two'."


def test_code_behind_a_cell_magic_is_told_where_it_belongs() -> None:
    text = refusal("print(1)", DISTRIBUTE)
    assert text == "%%distribute: what does 'print(1)' mean? It takes no arguments. Code stands in the lines below it."


def test_a_number_that_is_none_is_refused_with_its_magic() -> None:
    with pytest.raises(UsageError) as caught:
        read_argument(CLUSTER["scale"], "x", integer(0))
    assert str(caught.value) == "%cluster scale x: expected a whole number, not 'x'."


def test_arguments_may_repeat() -> None:
    assert given("a b c", PULL).arguments == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["--nproc", "--precision", "--background", "--push", "--timeout", "--tag"]),
        ("--p", ["--precision", "--push"]),
        ("-n 2 --b", ["--background"]),
        ("--precision ", ["no", "bf16"]),
        ("--precision b", ["bf16"]),
        ("--precision=b", ["--precision=bf16"]),
        ("--nproc ", []),
        ("na", []),
        ("--zzz", []),
    ],
)
def test_options_and_their_values_are_completed(text: str, expected: list[str]) -> None:
    assert complete(SYNTAX, text) == expected


def test_the_help_names_every_option_and_value() -> None:
    text = usage(SYNTAX)
    for option in SYNTAX.options:
        assert ", ".join(option.flags) in text
        assert option.help in text
    assert "no|bf16" in text
    assert text.startswith("%thing [NAME] [options]\n\nDoes a thing.")


@pytest.mark.parametrize("option", DISTRIBUTE.options, ids=lambda option: option.name)
def test_every_option_of_distribute_is_explained_in_a_sentence(option: Option) -> None:
    assert option.help[0].isupper()
    assert option.help.endswith(".")
    assert option.help in usage(DISTRIBUTE)


def test_an_attribute_that_is_no_option_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError):
        _ = given("").no_such


NAMED = Syntax(
    "%keys",
    (Option(("--of",), "Whose.", metavar="a,b", names="people"), Option(("--all",), "All.")),
    "[list|revoke] [ID]",
    names="ids",
)
NAMES = {"people": ["ann", "anna", "bob"], "ids": ["k1", "k2"]}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", ["list", "revoke", "--of", "--all"]),
        ("re", ["revoke"]),
        ("revoke ", ["k1", "k2", "--of", "--all"]),
        ("revoke k2", ["k2"]),
        ("--all revoke k", ["k1", "k2"]),
        ("--of a", ["ann", "anna"]),
        ("--of ann,", ["ann,anna", "ann,bob"]),
        ("--of=bob,an", ["--of=bob,ann", "--of=bob,anna"]),
        ("--of ann re", ["revoke"]),
        ("revoke k1 ", ["--of", "--all"]),
        ("--o", ["--of"]),
    ],
)
def test_names_of_what_there_is_complete_options_and_arguments(text: str, found: list[str]) -> None:
    assert complete(NAMED, text, lambda kind: NAMES.get(kind, ())) == found


def test_a_verb_that_is_none_is_refused_with_the_one_that_was_perhaps_meant() -> None:
    verbs = {"list": 1, "attach": 2, "stop": 3}
    words = ["attach", "name"]
    assert (take_verb("%runs", verbs, words, "list"), words) == ("attach", ["name"])
    assert take_verb("%runs", verbs, [], "list") == "list"
    with pytest.raises(UsageError, match=r"%runs atach: expected one of list, attach, stop\. Did you mean attach\?"):
        take_verb("%runs", verbs, ["atach"], "list")
    with pytest.raises(UsageError, match=r"stop\.$"):
        take_verb("%runs", verbs, ["zzz"], "list")


def test_an_argument_that_is_given_as_an_option_is_told_where_it_belongs() -> None:
    with pytest.raises(UsageError, match=r"there is no option --name. It is written without one: %%serve NAME."):
        parse(Syntax("%%serve", arguments="NAME"), ["--name", "double"])


def test_a_text_that_begins_with_a_dash_is_a_text_where_it_was_quoted_for_its_spaces() -> None:
    assert given('"-5 degrees, and falling"').arguments == ["-5 degrees, and falling"]
    assert given('"- an item"').arguments == ["- an item"]
    assert given('--tag "-- of two words"').tag == ["-- of two words"]
    assert "there is no option -5x" in refusal("-5x")
    assert "expected a whole number, not '-1e3'" in refusal("-n -1e3")


@pytest.mark.parametrize("words", [['hosts=["a","b"]'], ['hosts=["a",', '"b"]'], ["options={a:", "1}"]])
def test_json_whose_quotes_the_line_has_taken_is_refused_with_how_to_keep_them(words: list[str]) -> None:
    with pytest.raises(UsageError, match="is no JSON"):
        kind_and_options(split(" ".join(["ssh", *words]), "%cluster"), "%cluster start")
    whole = kind_and_options(split('ssh hosts=\'["a", "b"]\' queue=gpu', "%cluster"), "%cluster start")
    assert whole == ("ssh", {"hosts": ["a", "b"], "queue": "gpu"})


def test_the_number_of_workers_is_no_option_of_their_class() -> None:
    with pytest.raises(UsageError, match=r"%cluster start: how many workers there are is said by --workers 2\."):
        kind_and_options(["local", "workers=2"], "%cluster start")


def test_a_cell_magic_whose_line_goes_on_says_that_it_has_one() -> None:
    with pytest.raises(UsageError, match="what follows it stands in one line"):
        split("-n 2 \\", "%%distribute")


@pytest.mark.parametrize("ranks", ["", "one", "0,", "2-1", "-1"])
def test_ranks_that_are_none_are_refused_before_there_is_a_world(ranks: str) -> None:
    with pytest.raises(UsageError, match="--ranks"):
        parse(DISTRIBUTE, ["--ranks", ranks])
    assert parse(DISTRIBUTE, ["--ranks", "0, 2-3"]).ranks == "0, 2-3"
