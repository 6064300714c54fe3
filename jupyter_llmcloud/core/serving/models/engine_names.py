"""How an endpoint's engine is named: one of ours, a server of others that is started, or a server elsewhere."""

from __future__ import annotations

from urllib.parse import urlsplit

from jupyter_llmcloud.errors import UsageError

AUTO = "auto"
OWN = ("slots", "continuous-batching", "generate")
VLLM, LLAMA_CPP = "vllm", "llama.cpp"
STARTED = (VLLM, LLAMA_CPP)
NAMES = (AUTO, *OWN, *STARTED)


def parse_engine(text: str) -> str:
    """The engine that `text` names, a URL without a slash at its end. Raises UsageError."""
    if text in NAMES:
        return text
    if not is_url(text):
        raise UsageError(f"{text!r} is no engine. Choose one of {', '.join(NAMES)}, or the URL of an OpenAI server")
    parts = urlsplit(text)
    if not parts.hostname or parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            f"--engine {parts.scheme}://{parts.hostname}...: write the base URL of an OpenAI server alone, such as "
            "https://api.example.org/v1; its key goes into an environment variable (--api-key-env NAME)"
        )
    return text.rstrip("/")


def is_url(engine: str) -> bool:
    """Whether it is a server elsewhere."""
    return engine.startswith(("http://", "https://"))


def is_external(engine: str) -> bool:
    """Whether another server generates, and ours passes requests on to it."""
    return engine in STARTED or is_url(engine)


def parse_variable(text: str) -> str:
    """The name of an environment variable. Raises UsageError, without what could be a key itself."""
    if not text.isidentifier() or not text.isascii() or len(text) > 64:
        raise UsageError("--api-key-env (api_key_env) takes the NAME of an environment variable that holds the key")
    return text
