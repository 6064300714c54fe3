"""pydantic-ai against the gateway: an agent with a tool, whole and streamed, and typed output."""

import asyncio
import os

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=os.environ["LLMC_URL"], api_key=os.environ["LLMC_KEY"])
asked: list[str] = []


class Weather(BaseModel):
    """What the weather is."""

    sunny: bool


async def main() -> None:
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        asked.clear()
        model = kind("talker", provider=provider)
        agent = Agent(model, instructions="Be brief.", retries=0)

        @agent.tool_plain
        def get_weather(city: str) -> str:
            """Tell the weather of a city."""
            asked.append(city)
            return f"sunny in {city}"

        done = await agent.run("weather?", model_settings={"temperature": 0})
        assert (done.output, asked) == ("It is sunny in Paris.", ["Paris"]), (done.output, asked)
        async with agent.run_stream("weather?", model_settings={"temperature": 0}) as stream:
            assert await stream.get_output() == "It is sunny in Paris."
        typed = Agent(model, output_type=NativeOutput(Weather), retries=0)
        assert isinstance((await typed.run("weather?", model_settings={"max_tokens": 100})).output, Weather)
        called = Agent(model, output_type=Weather, retries=0)  # by a tool that must be called
        assert isinstance((await called.run("weather?", model_settings={"max_tokens": 100})).output, Weather)


asyncio.run(main())
print("ok")
