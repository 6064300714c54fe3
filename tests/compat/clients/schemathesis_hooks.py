"""Hooks of Schemathesis: most bodies name the model that is there, ask for short answers, and are such as it can answer.

The document cannot say what depends on something else (a message of a tool has no calls, parts are of text). Bodies that
are refused for that alone never reach what lies behind: most are put right, the others stay as they were made.
"""

import random

import schemathesis

_LIMITS = {
    "/completions": "max_tokens",
    "/chat/completions": "max_completion_tokens",
    "/responses": "max_output_tokens",
}
_WITHOUT_MODEL = ("/files", "/batches", "/feedback")
_NUM_TOKENS = 256
_DEPENDENT = (
    ("stream_options", "stream"), ("top_logprobs", "logprobs"), ("tool_choice", "tools"),
    ("parallel_tool_calls", "tools"), ("continue_final_message", "add_generation_prompt"),
)  # fmt: skip


@schemathesis.hook
def map_body(context, body):
    if not isinstance(body, dict):
        return body
    chance = random.Random(repr(sorted(map(str, body))))
    body = dict(body)
    if "model" not in body and context.operation.path in _WITHOUT_MODEL:
        return body
    if chance.random() < 0.95:
        body["model"] = "talker"
    limit = _LIMITS.get(context.operation.path)
    if limit and body.get(limit) is None and chance.random() < 0.95:
        body[limit] = 4
    if chance.random() < 0.8:
        _put_right(body)
        if context.operation.path == "/embeddings":
            _put_inputs_right(body)
        if context.operation.path == "/responses":
            _put_response_right(body)
        if isinstance(body.get("tokens"), list):
            body["tokens"] = [_token(one) for one in body["tokens"]]
    return body


def _put_right(body):
    for name, needed in _DEPENDENT:
        if not body.get(needed):
            body.pop(name, None)
    for name in ("min_tokens", "stop_token_ids", "logit_bias"):
        body.pop(name, None)
    if "messages" in body and isinstance(body["messages"], list):
        body["messages"] = [_message(one) for one in body["messages"]]
    if isinstance(body.get("input"), list):
        body["input"] = [_message(one) if isinstance(one, dict) and one.get("role") else one for one in body["input"]]


def _put_inputs_right(body):
    """Texts, or tokens, or lists of tokens, and none of them empty: as the first one is."""
    body.pop("dimensions", None)
    given = body.get("input")
    if not isinstance(given, list) or not given:
        body["input"] = given if isinstance(given, str) and given else "a text"
    elif isinstance(given[0], str):
        body["input"] = [one if isinstance(one, str) and one else str(one) for one in given[:16]]
    elif isinstance(given[0], list):
        lists = [one if isinstance(one, list) and one else [one] for one in given[:16]]
        body["input"] = [[_token(token) for token in one[:64]] for one in lists]
    else:
        body["input"] = [_token(one) for one in given[:64]]


def _put_response_right(body):
    """Messages or a text, and nothing that is kept elsewhere or needs more than this request."""
    for name in ("previous_response_id", "conversation", "prompt", "background"):
        body.pop(name, None)
    text = body.get("text")
    if isinstance(text, dict) and isinstance(text.get("format"), dict) and not text["format"].get("schema"):
        body["text"] = {name: value for name, value in text.items() if name != "format"}
    given = body.get("input")
    if isinstance(given, list):
        given = [
            {"role": "user", "content": str(one.get("content") or "a text")} for one in given if isinstance(one, dict)
        ]
    body["input"] = given or "a text"


def _token(value):
    return value % _NUM_TOKENS if isinstance(value, int) else 7


def _message(message):
    if not isinstance(message, dict):
        return message
    message = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = [_part(part) for part in content if isinstance(part, dict)]
    if message.get("role") != "assistant":
        message.pop("tool_calls", None)
        message["content"] = "" if message.get("content") is None else message["content"]
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        message["tool_calls"] = [_call(call) for call in calls if isinstance(call, dict)]
    return message


def _part(part):
    return {"type": "text", "text": str(part.get("text") or part.get("type") or "")}


def _call(call):
    function = call.get("function")
    return {**call, "function": {**function, "arguments": "{}"}} if isinstance(function, dict) else call
