"""instructor against the gateway: objects out of tools, of JSON schemas and of JSON, whole and in a stream."""

import os
from typing import Literal

import instructor
import openai
from pydantic import BaseModel

client = openai.OpenAI(base_url=os.environ["LLMC_URL"], api_key=os.environ["LLMC_KEY"], max_retries=0)
ASKED = [{"role": "user", "content": "Hello"}]


class Verdict(BaseModel):
    """A verdict."""

    word: Literal["for", "while"]
    sure: bool


for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT):
    typed = instructor.from_openai(client, mode=mode)
    told = typed.chat.completions.create(
        model="talker", messages=ASKED, response_model=Verdict, max_tokens=200, max_retries=0
    )
    assert isinstance(told, Verdict), (mode, told)
typed = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
partial = list(
    typed.chat.completions.create_partial(
        model="talker", messages=ASKED, response_model=Verdict, max_tokens=200, max_retries=0
    )
)
assert partial and partial[-1].word in ("for", "while")
print("ok")
