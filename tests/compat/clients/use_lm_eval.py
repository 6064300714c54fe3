"""lm-eval's own API models against the gateway: log likelihoods and generations, by completions and by chat."""

import math
import os

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

URL, KEY = os.environ["LLMC_URL"], os.environ["LLMC_KEY"]
os.environ["OPENAI_API_KEY"] = KEY
GREETING = "Good day, I am a tiny model."
folder = os.environ["LLMC_MODEL"]


def asked(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


for tokenized in (False, True):
    for concurrent in (1, 4):
        model = LocalCompletionsAPI(
            base_url=f"{URL}/completions", model="talker", tokenizer_backend="huggingface", tokenizer=folder,
            tokenized_requests=tokenized, num_concurrent=concurrent, max_length=512, batch_size=2,
        )  # fmt: skip
        pairs = [("H", "Good day"), ("H", "Bad day"), ("R", "It is sunny")]
        scores = model.loglikelihood([asked("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
        assert all(math.isfinite(score) and score < 0 for score, _ in scores), scores
        assert [is_greedy for _, is_greedy in scores] == [True, False, True], scores
        assert scores[0][0] > scores[1][0]
        rolling = model.loglikelihood_rolling([asked("loglikelihood_rolling", "Good day, I am")], disable_tqdm=True)
        assert all(math.isfinite(score) for score in rolling), rolling
        until = {"until": ["tiny"], "max_gen_toks": 40, "temperature": 0.0}
        told = model.generate_until([asked("generate_until", "H", until)] * 3, disable_tqdm=True)
        assert told == ["Good day, I am a "] * 3, told
chat = LocalChatCompletion(base_url=f"{URL}/chat/completions", model="talker", num_concurrent=2)
messages = chat.apply_chat_template([{"role": "user", "content": "Hello"}])
until = {"until": ["\n\n"], "max_gen_toks": 40, "temperature": 0.0}
assert chat.generate_until([asked("generate_until", messages, until)], disable_tqdm=True) == [GREETING]
print("ok")
