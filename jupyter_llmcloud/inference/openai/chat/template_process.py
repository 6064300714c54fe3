"""`python -m ...template_process`: renders chat templates until its standard input ends.

A chat template is a program of others. Here it has a budget of processor time and of memory, and nobody waits for it
but who asked: a thread that renders could be neither interrupted inside one long operation nor ended.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import IO, Any, Protocol

CPU_S = 2
MAX_MEMORY = 512 << 20  # beside what the process has when it starts
MAX_TEXT = 8 << 20
_LENGTH = 8


class Readable(Protocol):
    """What messages are read from."""

    def read(self, size: int, /) -> bytes:
        """So many bytes, or fewer at the end."""
        ...


def write_message(stream: IO[bytes], message: Any) -> None:
    """Send one message: its length, and it as JSON."""
    data = json.dumps(message, ensure_ascii=False).encode(errors="surrogatepass")
    stream.write(len(data).to_bytes(_LENGTH, "big") + data)
    stream.flush()


def read_message(stream: Readable) -> Any:
    """The next message; raises EOFError when there will be none."""
    length = stream.read(_LENGTH)
    if len(length) < _LENGTH:
        raise EOFError
    return json.loads(stream.read(int.from_bytes(length, "big")))


def main() -> None:
    """Answer every message with a text or an error."""
    from transformers.utils.chat_template_utils import render_jinja_template

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the replica
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints is no reply
    _limit_memory()
    write_message(replies, {"ready": os.getpid()})
    while True:
        try:
            asked = read_message(sys.stdin.buffer)
        except EOFError:
            return
        _limit_time()
        write_message(replies, _render(render_jinja_template, asked))


def _limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MAX_MEMORY, resource.RLIM_INFINITY))


def _limit_time() -> None:
    """From now on, so much processor time: then the kernel ends this process, whatever it does."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + CPU_S + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _render(render: Any, asked: dict[str, Any]) -> dict[str, str]:
    from jinja2 import TemplateError

    try:
        variables = {"add_generation_prompt": True, **asked["variables"]}
        texts, _ = render(conversations=[asked["messages"]], chat_template=asked["template"], **variables)
    except TemplateError as error:
        return {"error": str(error)}
    except Exception as error:  # whatever it likes
        return {"error": f"{type(error).__name__}: {error}".rstrip(": ")}
    if len(texts[0]) > MAX_TEXT:
        return {"error": f"it wrote {len(texts[0])} characters, which is more than {MAX_TEXT}"}
    return {"text": texts[0]}


if __name__ == "__main__":
    main()
