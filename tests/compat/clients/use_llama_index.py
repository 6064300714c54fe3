"""llama-index against the gateway: complete, chat and stream by its OpenAI-like model."""

import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

HERE = {"api_base": os.environ["LLMC_URL"], "api_key": os.environ["LLMC_KEY"], "model": "talker", "max_retries": 0}
GREETING = "Good day, I am a tiny model."
chat = OpenAILike(**HERE, is_chat_model=True, temperature=0, max_tokens=40)
asked = [ChatMessage(role="user", content="Hello")]
assert chat.chat(asked).message.content == GREETING
assert list(chat.stream_chat(asked))[-1].message.content == GREETING
assert chat.complete("Hello").text == GREETING
plain = OpenAILike(**HERE, is_chat_model=False, temperature=0, max_tokens=40)
assert plain.complete("H").text == GREETING
assert list(plain.stream_complete("H"))[-1].text == GREETING
print("ok")
