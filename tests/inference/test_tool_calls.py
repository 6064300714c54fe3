"""What models of each family write becomes content, reasoning and calls: the same whole and in pieces, and nothing lost.

The formats are those that the families' own chat templates write for an earlier answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jupyter_llmcloud.inference.openai.chat.answer_parser import AnswerParser, Delta, TaggedParser
from jupyter_llmcloud.inference.openai.chat.harmony import HarmonyParser
from jupyter_llmcloud.inference.openai.chat.template_parser import TemplateParser
from jupyter_llmcloud.inference.openai.chat.tool_formats import HERMES, format_of, think_tags_of

WEATHER = {"city": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"}}
PARAMETERS: dict[str, Any] = {"get_weather": WEATHER, "run": {"code": {"type": "string"}, "limits": {"type": "object"}}}
# What the chat templates of the families hold of tools.
TEMPLATES = {
    "hermes": "{{ tools }} <tool_call>",
    "qwen3": "{{ tools }} <think> </think> <tool_call>",
    "qwen-coder": "{{ tools }} <tool_call> <function=",
    "glm": "{{ tools }} <tool_call> <arg_key> </think>",
    "mistral": "{{ tools }} [TOOL_CALLS]",
    "magistral": "{{ tools }} [TOOL_CALLS] [THINK] [/THINK]",
    "llama3.1": "{{ tools }} <|python_tag|>",
    "llama3.2": "{{ tools }}",
    "llama4": "{{ tools }} [func_name1(params_name1=params_value1)]",
    "deepseek": "{{ tools }} <｜tool▁calls▁begin｜>",
    "kimi": "{{ tools }} <|tool_calls_section_begin|>",
    "phi4": "{{ tools }} <|tool_call|>",
    "no tools": "{{ messages }}",
}
DS_CALL, DS_SEP, DS_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
DS_CALLS, DS_CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
PARIS = '{"city": "Paris"}'


class Answer(NamedTuple):
    """What a client gets of an answer."""

    content: str = ""
    calls: tuple[tuple[str, Any], ...] = ()
    reasoning: str = ""


def parser_of(family: str, *, is_thinking: bool = False) -> AnswerParser:
    template = TEMPLATES[family]
    return TaggedParser(format_of(template), PARAMETERS, think=think_tags_of(template), is_thinking=is_thinking)


def read(parser: AnswerParser, pieces: Iterable[str]) -> Answer:
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.end()
    return joined(deltas, parser)


def joined(deltas: Sequence[Delta], parser: AnswerParser) -> Answer:
    names: list[str] = []
    arguments: list[str] = []
    ids: set[str] = set()
    for delta in deltas:
        if (call := delta.call) is not None:
            if call.name is not None:
                assert call.number == len(names) and call.id
                ids.add(call.id)
                names.append(call.name)
                arguments.append("")
            arguments[call.number] += call.arguments
    assert len(ids) == len(names) == parser.num_calls
    told = tuple((name, value(text)) for name, text in zip(names, arguments, strict=True))
    return Answer("".join(delta.content for delta in deltas), told, "".join(delta.reasoning for delta in deltas))


def value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def call(city: str = "Paris", **more: Any) -> tuple[str, Any]:
    return ("get_weather", {"city": city, **more})


ANSWERS: list[tuple[str, str, Answer]] = [
    ("hermes", "Just text.\n", Answer("Just text.\n")),
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>', Answer("", (call(),))),
    ("hermes", f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n<tool_call>\n{{"name": "run", "arguments": {{}}}}\n</tool_call>', Answer("Let me see.", (call(), ("run", {})))),
    ("hermes", f'<tool_call>{{"arguments": {PARIS}, "name": "get_weather"}}</tool_call> Done.', Answer("Done.", (call(),))),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>', Answer("", (call(),))),
    ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {PARIS}}}', Answer("", (call(),))),  # cut before its end
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "Par', Answer("", (("get_weather", '{"city": "Par'),))),
    ("hermes", '<tool_call>{"name": "run", "arguments": {"code": "x = \'</tool_call>\' # }"}}</tool_call> ok', Answer("ok", (("run", {"code": "x = '</tool_call>' # }"}),))),
    ("hermes", '<tool_call>{"name": "run", "arguments": {"code": "never ends</tool_call> and so on', Answer("and so on", (("run", '{"code": "never ends'),))),
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n{{"name": "run", "arguments": {{"code": "}}{{"}}}}\n</tool_call>', Answer("", (call(), ("run", {"code": "}{"})))),
    ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {PARIS}}}, {{"name": "run", "arguments": {{}}}};{{"arguments": {{}}, "name": "run"}}</tool_call>Ok', Answer("Ok", (call(), ("run", {}), ("run", {})))),
    ("hermes", f'<tool_call>{{"arguments": {PARIS}, "name": "get_weather"}}\n{{"name": "run"}}</tool_call>', Answer("", (call(), ("run", {})))),
    ("hermes", '<tool_call>{"name": "run", "arguments": {"code": "</tool_call>"}}\n{"name": "run", "arguments": {}}</tool_call>', Answer("", (("run", {"code": "</tool_call>"}), ("run", {})))),
    ("hermes", '<tool_call>{"name": "run", "arguments": {}}\n{"name": "run", "arguments": {"code": "x', Answer("", (("run", {}), ("run", '{"code": "x')))),
    ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {PARIS}, "id": 3}}</tool_call>', Answer("", (call(),))),
    ("hermes", "So:\n<tool_call>\nnot JSON at all\n</tool_call>\nWell.", Answer("So:\n<tool_call>\nnot JSON at all\n</tool_call>\nWell.")),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>', Answer('<tool_call>{"name": 3, "arguments": {}}</tool_call>')),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>', Answer('<tool_call>{"name": "", "arguments": {}}</tool_call>')),
    ("hermes", "<tool_call>", Answer("<tool_call>")),
    ("hermes", "a < b and <tool", Answer("a < b and <tool")),
    ("hermes", '<tool_call>{"name": "run", "arguments": {"code": "\\ud83d"}}</tool_call>', Answer("", (("run", {"code": "\ud83d"}),))),
    ("no tools", f'<tool_call>{{"name": "get_weather", "arguments": {PARIS}}}</tool_call>', Answer("", (call(),))),
    ("qwen3", f'<think>\nParis it is.\n</think>\n\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>', Answer("", (call(),), "Paris it is.")),
    ("qwen3", "<think>\n\n</think>\n\nHello", Answer("Hello")),
    ("qwen3", "<think>never ends", Answer("", (), "never ends")),
    ("qwen-coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n</function>\n</tool_call>", Answer("", (call(days=3, exact=True),))),
    ("qwen-coder", "I run it.\n<tool_call>\n<function=run>\n<parameter=code>\nif a < b:\n    print('</p>')\n\n</parameter>\n<parameter=limits>\n{'cpu': 2}\n</parameter>\n</function>\n</tool_call>", Answer("I run it.", (("run", {"code": "if a < b:\n    print('</p>')\n", "limits": {"cpu": 2}}),))),
    ("qwen-coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\n75001\n</parameter>\n<parameter=days>\nmany\n</parameter>\n</function>\n</tool_call>", Answer("", (call("75001", days="many"),))),
    ("qwen-coder", "<tool_call>\n<function=run>\n</function>\n</tool_call>", Answer("", (("run", {}),))),
    ("qwen-coder", "<tool_call>\n<function=\n</tool_call>", Answer("<tool_call>\n<function=\n</tool_call>")),
    ("qwen-coder", "<tool_call>\n<function=run>\n</function>\nand more\n</tool_call>", Answer("<tool_call>\n<function=run>\n</function>\nand more\n</tool_call>")),
    ("glm", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>", Answer("", (call(days=3),))),
    ("glm", "<tool_call>two words\n</tool_call>", Answer("<tool_call>two words\n</tool_call>")),
    ("mistral", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}, {{"name": "run", "arguments": {{}}}}]', Answer("", (call(), ("run", {})))),
    ("mistral", f"Well. [TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]run[ARGS]{{}}", Answer("Well.", (call(), ("run", {})))),
    ("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]123456789[ARGS]{PARIS}", Answer("", (call(),))),
    ("mistral", f"[TOOL_CALLS]get_weather{PARIS}", Answer("", (call(),))),
    ("mistral", '[TOOL_CALLS] [{"name": "get_wea', Answer('[TOOL_CALLS] [{"name": "get_wea')),
    ("mistral", "[TOOL_CALLS]run[ARGS]{} and then?", Answer("[TOOL_CALLS]run[ARGS]{} and then?")),
    ("magistral", f"[THINK]Hm.[/THINK]Let me see.[TOOL_CALLS]get_weather[ARGS]{PARIS}", Answer("Let me see.", (call(),), "Hm.")),
    ("llama3.1", f'<|python_tag|>{{"name": "get_weather", "parameters": {PARIS}}}', Answer("", (call(),))),
    ("llama3.1", f'{{"name": "get_weather", "parameters": {PARIS}}}; {{"name": "run", "parameters": {{}}}}', Answer("", (call(), ("run", {})))),
    ("llama3.1", '{"name": "unknown", "parameters": {}}', Answer('{"name": "unknown", "parameters": {}}')),
    ("llama3.1", "<|python_tag|>print(1)", Answer("<|python_tag|>print(1)")),
    ("llama3.2", f'\n\n{{"name": "get_weather", "parameters": {PARIS}}}', Answer("", (call(),))),
    ("llama3.2", f'[{{"name": "get_weather", "arguments": {PARIS}}}]', Answer("", (call(),))),
    ("llama3.2", '{"a": 1}', Answer('{"a": 1}')),
    ("llama3.2", 'As JSON: {"name": "run"}', Answer('As JSON: {"name": "run"}')),
    ("llama4", "[get_weather(city='Paris', days=3), run()]", Answer("", (call(days=3), ("run", {})))),
    ("llama4", "<|python_start|>[get_weather(city='Paris')]<|python_end|>", Answer("", (call(),))),
    ("llama4", "[1, 2]", Answer("[1, 2]")),
    ("llama4", "[run(code=__import__('os'))]", Answer("[run(code=__import__('os'))]")),
    ("deepseek", f"{DS_CALLS}{DS_CALL}function{DS_SEP}get_weather\n```json\n{PARIS}\n```{DS_END}\n{DS_CALL}function{DS_SEP}run\n```json\n{{}}\n```{DS_END}{DS_CALLS_END}", Answer("", (call(), ("run", {})))),
    ("deepseek", f"Let me see.{DS_CALLS}{DS_CALL}get_weather{DS_SEP}{PARIS}{DS_END}{DS_CALLS_END}", Answer("Let me see.", (call(),))),
    ("deepseek", f"{DS_CALLS}{DS_CALL}get_weather{DS_SEP}{{\"city\": {DS_END}{DS_CALLS_END}", Answer(f"{DS_CALLS}{DS_CALL}get_weather{DS_SEP}{{\"city\": {DS_END}{DS_CALLS_END}")),
    ("kimi", f"<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{PARIS}<|tool_call_end|><|tool_calls_section_end|>", Answer("", (call(),))),
    ("phi4", f'<|tool_call|>[{{"name": "get_weather", "arguments": {PARIS}}}]<|/tool_call|>', Answer("", (call(),))),
    ("phi4", f'<|tool_call|>[{{"name": "get_weather", "arguments": {PARIS}}}]', Answer("", (call(),))),  # Granite
]  # fmt: skip


@pytest.mark.parametrize(("family", "text", "answer"), ANSWERS)
def test_an_answer_is_read_as_its_family_writes_it_whole_and_letter_by_letter(
    family: str, text: str, answer: Answer
) -> None:
    assert read(parser_of(family), [text]) == answer
    assert read(parser_of(family), text) == answer


def test_a_forced_call_leaves_no_content_wherever_it_is_cut() -> None:
    one = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
    text = f"{one}\n{one}"
    for length in range(len(text) + 1):
        answer = read(TaggedParser(HERMES, PARAMETERS, is_forced=True), text[:length])
        assert answer.content == "" and {name for name, _ in answer.calls} <= {"get_weather"}, text[:length]
    assert answer.calls == (call(), call())


@pytest.mark.parametrize(("family", "tags"), [("qwen3", "</think>"), ("magistral", "[/THINK]")])
def test_reasoning_that_the_prompt_has_begun_goes_on(family: str, tags: str) -> None:
    text = f"Hm. So:\n{tags}\n\nHello  there"
    assert read(parser_of(family, is_thinking=True), text) == Answer("Hello  there", (), "Hm. So:")


# --- harmony ---

ASSISTANT = "<|start|>assistant"
PROMPT = f"<|start|>user<|message|>Hello<|end|>{ASSISTANT}"
HARMONY: list[tuple[str, str, Answer]] = [
    (PROMPT, f"<|channel|>analysis<|message|>Easy.<|end|>{ASSISTANT}<|channel|>final<|message|>Hi there", Answer("Hi there", (), "Easy.")),
    (PROMPT, f"<|channel|>analysis<|message|>Hm.<|end|>{ASSISTANT}<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{PARIS}", Answer("", (call(),), "Hm.")),
    (PROMPT, f" to=functions.get_weather<|channel|>commentary json<|message|>{PARIS}<|call|>", Answer("", (call(),))),
    (PROMPT, f"<|channel|>commentary<|message|>I look it up.<|end|>{ASSISTANT} to=get_weather<|channel|>commentary<|message|>{PARIS}<|call|>", Answer("I look it up.", (call(),))),
    (PROMPT, "<|channel|>commentary to=browser.search<|message|>query", Answer("query")),
    (PROMPT, "Hello without any channel", Answer("Hello without any channel")),
    (PROMPT, "<|channel|>analy", Answer()),  # cut within a header
    (PROMPT, "<|channel|>analysis<|message|>cut", Answer("", (), "cut")),
    (f"{PROMPT}<|channel|>final<|message|>I have", " begun", Answer(" begun")),
    ("<|start|>user<|message|>Hello<|end|>", f"{ASSISTANT}<|channel|>final<|message|>Hi", Answer("Hi")),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "text", "answer"), HARMONY)
def test_harmonys_channels_are_reasoning_calls_and_content(prompt: str, text: str, answer: Answer) -> None:
    tools = frozenset(PARAMETERS)
    assert read(HarmonyParser(prompt, tools), [text]) == answer
    assert read(HarmonyParser(prompt, tools), text) == answer


# --- a template of the tokenizer's own ---

RESPONSE_TEMPLATE: Any = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open": "<call>",
            "close": "</call>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {},
    },
}
OF_TEMPLATE = [
    ("<think>Hm.</think>Let me see. <call>{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}</call>", Answer("Let me see. ", (call(),), "Hm.")),
    ("Let me see. <call>{\"name\": \"get_wea</call> Oh.", Answer("Let me see. <call>{\"name\": \"get_wea</call> Oh.")),
    ("<call>{\"name\": \"run\", \"arguments\": {}}</call>So. <call>{\"nonsense\"", Answer("So. <call>{\"nonsense\"", (("run", {}),))),
    ("<call>{\"arguments\": {}}</call>", Answer("<call>{\"arguments\": {}}</call>")),
]  # fmt: skip


def template_parser() -> AnswerParser:
    from transformers.utils.chat_parsing import ResponseParser

    return TemplateParser(ResponseParser(RESPONSE_TEMPLATE, prefix="<|user|>hello<|assistant|>"))


@pytest.mark.parametrize(("text", "answer"), OF_TEMPLATE)
def test_an_answer_is_read_by_a_template_of_the_tokenizers_own_and_what_that_cannot_read_is_shown(
    text: str, answer: Answer
) -> None:
    assert read(template_parser(), [text]) == answer
    assert read(template_parser(), text) == answer


# --- whatever is written ---

FRAGMENTS = st.sampled_from([
    "<tool_call>", "</tool_call>", "<think>", "</think>", '{"name": "run", "arguments": {', '"code": "x', '"}', "}}", "}",
    "<function=run>", "<parameter=code>", "</parameter>", "</function>", "[TOOL_CALLS]", "[ARGS]", "run", "{}", "[", "]",
    "(code='x')", DS_CALLS, DS_CALL, DS_SEP, DS_END, DS_CALLS_END, "<|python_tag|>", " ", "\n", "word", "\\", '"', ";",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<|tool_call|>", "é🙂",
])  # fmt: skip
HARMONY_FRAGMENTS = st.sampled_from([
    "<|channel|>", "<|message|>", "<|end|>", ASSISTANT, "<|call|>", "analysis", "final", " to=functions.run", "{}", "word", "<|",
])  # fmt: skip


@st.composite
def written(draw: st.DrawFn) -> tuple[Callable[[], AnswerParser], list[str]]:
    family = draw(st.sampled_from([*TEMPLATES, "harmony", "template"]))
    made: dict[str, Callable[[], AnswerParser]] = {
        "harmony": lambda: HarmonyParser(PROMPT, frozenset(PARAMETERS)), "template": template_parser,
    }  # fmt: skip
    fragments = HARMONY_FRAGMENTS if family == "harmony" else FRAGMENTS
    text = "".join(draw(st.lists(fragments, max_size=14)))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    thinks = draw(st.booleans())
    return made.get(
        family, lambda: parser_of(family, is_thinking=thinks and think_tags_of(TEMPLATES[family]) is not None)
    ), pieces


@settings(max_examples=400)
@given(case=written())
def test_however_an_answer_is_cut_it_is_read_the_same(case: tuple[Callable[[], AnswerParser], list[str]]) -> None:
    new_parser, pieces = case
    whole = read(new_parser(), ["".join(pieces)])
    assert read(new_parser(), pieces) == whole
    for text in (whole.content, whole.reasoning):
        text.encode()


@settings(max_examples=200)
@given(case=written())
def test_no_word_of_an_answer_is_lost(case: tuple[Callable[[], AnswerParser], list[str]]) -> None:
    new_parser, pieces = case
    answer = read(new_parser(), pieces)
    told = f"{answer.content} {answer.reasoning} {answer.calls}"
    assert told.count("é🙂") == "".join(pieces).count("é🙂") or answer.calls
