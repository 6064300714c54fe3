"""openai-agents against the gateway: an agent that calls a tool and tells what it found, by chat and by responses."""

import asyncio
import os

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=os.environ["LLMC_URL"], api_key=os.environ["LLMC_KEY"], max_retries=0)
asked: list[str] = []


@function_tool
def get_weather(city: str) -> str:
    """Tell the weather of a city."""
    asked.append(city)
    return f"sunny in {city}"


async def main() -> None:
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        asked.clear()
        agent = Agent("weather", instructions="Be brief.", tools=[get_weather], model=kind("talker", client),
                      model_settings=ModelSettings(temperature=0))  # fmt: skip
        done = await Runner.run(agent, "weather?")
        assert (done.final_output, asked) == ("It is sunny in Paris.", ["Paris"]), (kind, done.final_output, asked)
        asked.clear()
        streamed = Runner.run_streamed(agent, "weather?")
        kinds = [event.type async for event in streamed.stream_events()]
        assert (streamed.final_output, asked) == ("It is sunny in Paris.", ["Paris"]), (kind, kinds)


asyncio.run(main())
print("ok")
