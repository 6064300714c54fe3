"""langchain-openai against the gateway: invoke, stream, tools, structured output in each of its methods, embeddings."""

import asyncio
import os

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

URL, KEY = os.environ["LLMC_URL"], os.environ["LLMC_KEY"]
GREETING = "Good day, I am a tiny model."
HERE = {"base_url": URL, "api_key": KEY, "model": "talker", "max_retries": 0, "temperature": 0}
chat = ChatOpenAI(**HERE)


@tool
def get_weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"sunny in {city}"


class Weather(BaseModel):
    """What the weather is."""

    sunny: bool


reply = chat.invoke("Hello")
assert reply.content == GREETING and reply.usage_metadata["output_tokens"] > 3, reply
chunks = list(chat.stream("Hello", stream_usage=True))
assert "".join(chunk.content for chunk in chunks) == GREETING
assert any(chunk.usage_metadata for chunk in chunks), chunks[-1]
assert [one.content for one in chat.batch(["Hello", "Hi"])] == [GREETING] * 2
asked = chat.bind_tools([get_weather])
first = asked.invoke("weather?")
[call] = first.tool_calls
assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
streamed = None
for chunk in asked.stream("weather?"):
    streamed = chunk if streamed is None else streamed + chunk
assert streamed.tool_calls[0]["args"] == {"city": "Paris"}
history = [HumanMessage("weather?"), first, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
assert asked.invoke(history).content == "It is sunny in Paris."
forced = chat.bind_tools([get_weather], tool_choice="get_weather", strict=True).invoke("weather?", max_tokens=200)
assert forced.tool_calls[0]["name"] == "get_weather"
for method in ("json_schema", "function_calling", "json_mode"):
    structured = ChatOpenAI(**HERE, max_tokens=200).with_structured_output(Weather, method=method, include_raw=True)
    told = structured.invoke("weather as JSON?")
    if method == "json_mode":  # any object: whether it is one of the schema is up to the model
        assert told["raw"].content.startswith("{"), told
    else:
        assert isinstance(told["parsed"], Weather), told


async def beside() -> None:
    assert (await chat.ainvoke("Hello")).content == GREETING
    assert "".join([chunk.content async for chunk in chat.astream("Hello")]) == GREETING


asyncio.run(beside())
assert OpenAI(**{**HERE, "max_tokens": 40}).invoke("H") == GREETING
responses = ChatOpenAI(**HERE, use_responses_api=True)
assert responses.invoke("Hello").text == GREETING, responses.invoke("Hello")
assert "".join(chunk.text for chunk in responses.stream("Hello")) == GREETING
assert responses.bind_tools([get_weather]).invoke("weather?").tool_calls[0]["args"] == {"city": "Paris"}
# Without a tokenizer of OpenAI's for this model it sends token ids of another: texts are asked for.
embeddings = OpenAIEmbeddings(base_url=URL, api_key=KEY, model="talker", check_embedding_ctx_length=False)
vectors = embeddings.embed_documents(["The for", "A function"])
assert len(vectors) == 2 and abs(sum(number**2 for number in embeddings.embed_query("The for")) - 1) < 1e-3
print("ok")
