"""litellm against the gateway: sync, async, stream, tools, formats, embeddings' refusal, errors by class."""

import asyncio
import json
import os

import litellm

URL, KEY = os.environ["LLMC_URL"], os.environ["LLMC_KEY"]
HERE = {"api_base": URL, "api_key": KEY, "model": "openai/talker", "num_retries": 0}
ASKED = [{"role": "user", "content": "Hello"}]
GREETING = "Good day, I am a tiny model."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]

reply = litellm.completion(messages=ASKED, temperature=0, **HERE)
assert reply.choices[0].message.content == GREETING, reply
assert reply.choices[0].finish_reason == "stop" and reply.usage.completion_tokens > 3

chunks = list(
    litellm.completion(messages=ASKED, temperature=0, stream=True, stream_options={"include_usage": True}, **HERE)
)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == GREETING
assert chunks[-1].usage.total_tokens > 0
rebuilt = litellm.stream_chunk_builder(chunks, messages=ASKED)
assert rebuilt.choices[0].message.content == GREETING

for stream in (False, True):
    answer = litellm.completion(messages=ASKED, tools=TOOLS, temperature=0, stream=stream, **HERE)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer), messages=ASKED)
    [call] = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"}), call
    assert answer.choices[0].finish_reason == "tool_calls"
history = [
    *ASKED,
    answer.choices[0].message.model_dump(),
    {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "sunny"},
]
assert (
    litellm.completion(messages=history, tools=TOOLS, temperature=0, **HERE).choices[0].message.content
    == "It is sunny in Paris."
)

schema = {
    "type": "json_schema",
    "json_schema": {
        "name": "v",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "required": ["ok"],
            "additionalProperties": False,
        },
    },
}
told = litellm.completion(messages=ASKED, response_format=schema, max_tokens=60, **HERE)
assert isinstance(json.loads(told.choices[0].message.content)["ok"], bool)


async def beside() -> None:
    answers = await asyncio.gather(*(litellm.acompletion(messages=ASKED, temperature=0, **HERE) for _ in range(4)))
    assert [one.choices[0].message.content for one in answers] == [GREETING] * 4
    stream = await litellm.acompletion(messages=ASKED, temperature=0, stream=True, **HERE)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == GREETING


asyncio.run(beside())
text = litellm.text_completion(
    prompt="H", temperature=0, max_tokens=40, **{**HERE, "model": "text-completion-openai/talker"}
)
assert text.choices[0].text == GREETING, text
response = litellm.responses(input="Hello", temperature=0, **HERE)
assert response.output[0].content[0].text == GREETING
vector = litellm.embedding(input=["a", "b"], **HERE).data[1]["embedding"]
assert abs(sum(number**2 for number in vector) - 1) < 1e-3
try:
    litellm.completion(messages=ASKED, temperature=9, **HERE)
    raise SystemExit("temperature 9 was taken")
except litellm.BadRequestError as error:
    assert "temperature must be at most 2" in str(error), error
try:
    litellm.completion(messages=ASKED, **{**HERE, "api_key": "sk-llmc-wrong"})
    raise SystemExit("a wrong key was taken")
except litellm.AuthenticationError:
    pass
try:
    litellm.completion(messages=ASKED, **{**HERE, "model": "openai/nobody"})
    raise SystemExit("an unknown model was taken")
except litellm.NotFoundError:
    pass
try:
    litellm.completion(messages=ASKED, max_tokens=3000, **HERE)
    raise SystemExit("too long a prompt was taken")
except litellm.ContextWindowExceededError as error:
    assert "context length" in str(error), error
print("ok")
