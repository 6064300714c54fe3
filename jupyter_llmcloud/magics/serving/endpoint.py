"""An endpoint as a notebook has it: its URL, a key, and how to ask it. What is shown never holds the key."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.names import NAME_PATTERN, parse_replicas
from jupyter_llmcloud.core.serving.endpoint.rollout import parse_shares
from jupyter_llmcloud.core.serving.keys import may_infer
from jupyter_llmcloud.core.serving.models.model_kind import GENERATOR, sample_inputs
from jupyter_llmcloud.errors import CapacityError, ConnectionLost, LLMCloudError, NotFound, ServerError, UsageError
from jupyter_llmcloud.magics.serving import predictions
from jupyter_llmcloud.widgets.panel_mime import panel

if TYPE_CHECKING:
    import httpx

    from jupyter_llmcloud.client.batches import BatchClient
    from jupyter_llmcloud.client.rest import ServerClient
    from jupyter_llmcloud.magics.serving.records import Records

READ_TIMEOUT_S = 600.0
_SHOW_TIMEOUT_S = 2.0  # showing an object must not hold a cell up
_ERRORS: dict[int, type[LLMCloudError]] = {
    400: UsageError, 404: NotFound, 413: UsageError, 422: UsageError, 429: CapacityError,
}  # fmt: skip
_ROWS = {"chat": "messages", "text": "prompt"}  # kinds of rows of a data set, by what they have
_PRE = "margin:2px 0 6px;white-space:pre-wrap"
_STYLE = (
    "box-sizing:border-box;max-width:1040px;margin:4px 2px;padding:12px;border:1px solid #8884;border-radius:10px;"
    "font:13px/1.45 system-ui,sans-serif"
)


class Endpoint:
    """A named URL that answers for a model.

    Attributes:
        name: the endpoint, and the `model` in requests.
        base_url: for any OpenAI client here.
        public_url: the same as others reach it: behind a JupyterHub that tells its public URL, another one.
        kind: what the model is for: "generator", "classifier", "python", ...
        inputs: JSON that it can be asked with, where it has told some.
    """

    def __init__(self, name: str, client: ServerClient, kind: str = GENERATOR, inputs: str = "") -> None:
        self.name = name
        self.kind = kind or GENERATOR
        self.inputs = inputs
        self.base_url = client.openai_url
        self.public_url = _as_others_reach(self.base_url)
        self._client = client
        self._key: str | None = None
        self._http: httpx.Client | None = None
        self._shown_at: int | None = None

    def __repr__(self) -> str:
        public = f", public_url={self.public_url!r}" if self.public_url != self.base_url else ""
        return f"Endpoint({self.name!r}, base_url={self.base_url!r}{public})"

    @property
    def api_key(self) -> str:
        """A scoped key that may ask this endpoint and list models, and nothing else. Minted at the first use."""
        if self._key is None:
            scopes = [f"infer:{self.name}", "models:read"]
            self._key = str(self._client.create_key(scopes, label=f"notebook: {self.name}")["key"])
        return self._key

    def working_key(self) -> str:
        """`api_key`; a new one when that has been revoked, or has expired."""
        if self._key is not None:
            key_id = self._key.removeprefix("sk-llmc-").partition("-")[0]
            known = self._client.keys()
            if not any(row["id"] == key_id and row["state"] == "valid" for row in known):
                self._key = None
        return self.api_key

    @property
    def state(self) -> str:
        """starting, ready, failed or stopped."""
        return str(self._client.endpoint(self.name)["state"])

    def complete(self, prompt: str | Sequence[Any], **params: Any) -> Any:
        """The model's continuation of `prompt`; `params` are those of OpenAI's completions (max_tokens, ...).

        A text (or its token ids) gives a text, a list of prompts a list of texts in their order; with `n` there is a
        list of so many texts in place of each text.
        """
        if hasattr(prompt, "tolist"):  # token ids as a tokenizer gives them
            prompt = prompt.tolist()
        answer = self._ask("completions", {"prompt": prompt, **params})
        choices = sorted(answer["choices"], key=lambda choice: choice.get("index", 0))
        texts = [str(choice["text"]) for choice in choices]
        n = params.get("n")
        if isinstance(prompt, str) or (len(prompt) and all(isinstance(part, int) for part in prompt)):
            return texts if n is not None else texts[0]
        return texts if n is None else [texts[at : at + n] for at in range(0, len(texts), n)]

    def chat(self, messages: str | Sequence[dict[str, Any]], stream: bool = False, **params: Any) -> Any:
        """The model's reply to a text or a list of messages; with `stream` an iterator over its pieces.

        With `n` it is a list of so many replies. A reply that is nothing but calls of tools has no text: None.
        """
        rows = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        body = {"messages": rows, **params}
        if stream:
            if (params.get("n") or 1) != 1:
                raise UsageError("n: a stream of pieces is of one reply. Leave out n, or stream=True.")
            return self._stream("chat/completions", body)
        answer = self._ask("chat/completions", body)
        choices = sorted(answer["choices"], key=lambda choice: choice.get("index", 0))
        texts = [choice["message"]["content"] for choice in choices]
        return texts if params.get("n") is not None else texts[0]

    # --- changing it while it answers: as %endpoints does ---

    def scale(self, replicas: int | str) -> Endpoint:
        """Have so many replicas, or as many as the load needs between bounds: `ep.scale(3)`, `ep.scale("1:4")`."""
        self._client.scale_endpoint(self.name, parse_replicas(str(replicas)))
        return self

    def update(self, target: str, canary: int | None = None) -> Endpoint:
        """Serve another run or folder under this name, and wait until that answers (to `canary` percent)."""
        from jupyter_llmcloud.client.revision_wait import wait_for_revision

        wait_for_revision(self._client, self._client.update_endpoint(self.name, as_target(target), canary))
        return self

    def split(self, shares: str | dict[str, int]) -> Endpoint:
        """Share the requests out over revisions, in percent: `ep.split("stable:95,canary:5")`."""
        self._client.split_endpoint(self.name, parse_shares(shares) if isinstance(shares, str) else shares)
        return self

    def rollback(self) -> Endpoint:
        """Without the canary; where there is none, back to the revision before this one."""
        self._client.roll_back_endpoint(self.name)
        return self

    def shadow(self, revision: str | None = None) -> Endpoint:
        """Copy the requests to a revision, a run or a folder, and wait until that takes them; None ends that.

        `ep.revisions` tells the outcome: the share of equal greedy answers, the ratio of times, the share of errors.
        """
        from jupyter_llmcloud.client.revision_wait import wait_for_shadow

        target = None if revision is None else as_target(revision)
        wait_for_shadow(self._client, self._client.shadow_endpoint(self.name, target))
        return self

    def add_adapter(self, path: str, name: str | None = None) -> Endpoint:
        """Load an adapter of PEFT beside the model: asked for with `model="NAME:ADAPTER"`."""
        self._client.add_adapter(self.name, as_target(path), name)
        return self

    def remove_adapter(self, name: str) -> Endpoint:
        """Take an adapter away."""
        self._client.remove_adapter(self.name, name)
        return self

    @property
    def revisions(self) -> list[dict[str, Any]]:
        """What it serves and has served, the newest last."""
        return list(self._client.endpoint(self.name)["revisions"])

    def predict(self, inputs: Any, *, stream: bool = False, parameters: Mapping[str, Any] | None = None) -> Any:
        """What a model that is no text generator says of `inputs`, by the Open Inference Protocol.

        Args:
            inputs: any JSON value (for a classifier of texts: a text, or a list of texts), an array of NumPy, or a dict
                of arrays by name.
            stream: answer piece by piece, as an iterator, by the `stream(inputs)` of a %%serve cell.
            parameters: of the request, such as `{"truncation": True}`.

        Returns:
            A JSON value for a JSON value; for arrays an array, or a dict of arrays by name when there are several.
        """
        if stream:
            return self._pieces(inputs, parameters)
        body, headers = predictions.request(inputs, parameters)
        response = self._send(self._prediction("infer", body, headers), stream=False)
        return predictions.answer(response.content, response.headers.get(predictions.HEADER_LENGTH))

    def _prediction(self, verb: str, body: bytes, headers: Mapping[str, str]) -> httpx.Request:
        url = f"{self.base_url.removesuffix('/v1')}/v2/models/{self.name}/{verb}"
        return self._pool().build_request(
            "POST", url, content=body, headers={**headers, "Authorization": f"Bearer {self.api_key}"}
        )

    def _pieces(self, inputs: Any, parameters: Mapping[str, Any] | None) -> Iterator[Any]:
        body, headers = predictions.request(inputs, parameters)
        if predictions.HEADER_LENGTH in headers:
            raise UsageError("predict(stream=True) takes JSON values: lists in place of arrays.")
        request = self._prediction("infer_stream", body, headers)
        return (predictions.piece(event) for event in self._events(request))

    def map(
        self,
        inputs: Iterable[Any],
        column: str | None = None,
        *,
        on_error: str = "raise",
        window: str = "24h",
        fresh: bool = False,
        **params: Any,
    ) -> list[Any]:
        """Ask for every input, on all replicas at once, and return the answers in the order of the inputs.

        The server works through them beside those who wait for an answer, also when this kernel has gone: `batches()`
        lists what it works on, `batch_results(ID)` gives it. Interrupted, what is not answered yet is given up. The
        same call again, of the same model, goes on with what an interrupted one or one of a lost kernel has left.

        Args:
            inputs: texts, lists of messages, or mappings (as a data set of Hugging Face or a DataFrame gives them).
            column: of mappings, the field that holds the input; otherwise `prompt`, `messages` or `input` (embeddings).
            on_error: raise an error when an input could not be answered, or "none" to have None in its place.
            window: what is not answered by then is given up: 24h, 30m.
            fresh: ask for all inputs, also for those that an unfinished call has had answered.
            params: of OpenAI's completions or chat completions (max_tokens, ...).
        """
        from jupyter_llmcloud.client.batches import row_groups
        from jupyter_llmcloud.magics.output.progress_line import ProgressLine

        if on_error not in ("raise", "none"):
            raise UsageError(f"on_error={on_error!r}: it is raise or none.")
        client = self._batch_client()
        groups = list(row_groups(self.name, inputs, column, params))
        begun = [client.begin(route, lines, window, self._served(), fresh) for route, lines in groups]
        total, known = sum(part.num_rows for part in begun), sum(len(part.answered) for part in begun)
        if known:
            print(f"{known} of {total} inputs were answered by an earlier, unfinished call (fresh=True: ask anew).")
        running = [part.batch_id for part in begun if part.batch_id is not None]
        try:
            line = ProgressLine()
            client.wait(running, lambda done, _: line.tell(f"{known + done} of {total} answered"))
        except KeyboardInterrupt:
            for batch_id in running:
                client.cancel(batch_id)
            raise
        return [answer for part in begun for answer in self._answers(part.batch_id, on_error, part.answered)]

    def _served(self) -> str:
        """By what a request is answered at present."""
        shares = [(row["fingerprint"], row["weight"]) for row in self.revisions if row["weight"]]
        return json.dumps([self.name, *sorted(shares)])

    def batches(self) -> list[dict[str, Any]]:
        """What `map` has begun, the newest first: also in kernels that have gone."""
        return self._batch_client().list()

    def batch_results(self, batch_id: str, on_error: str = "raise") -> list[Any]:
        """The answers of a batch that is over, in the order of its inputs; see `map`."""
        return self._answers(batch_id, on_error, {})

    def _answers(self, batch_id: str | None, on_error: str, known: Mapping[int, Any]) -> list[Any]:
        """Those of a batch that is over, if there is one, and of lines that are `known`; in the inputs' order."""
        from jupyter_llmcloud.client.batches import answer_of

        lines = {**known, **(self._lines(batch_id) if batch_id is not None else {})}
        answers: list[Any] = []
        failed: list[str] = []
        for number, line in sorted(lines.items()):
            try:
                answers.append(answer_of(line))
            except LLMCloudError as error:
                answers.append(None)
                failed.append(f"input {number}: {error}")
        if failed and on_error == "raise":
            raise ServerError(
                f"{len(failed)} of {len(answers)} inputs were not answered, the first one: {failed[0]} "
                f'The others: ep.batch_results("{batch_id}", on_error="none").'
            )
        return answers

    def _lines(self, batch_id: str) -> dict[int, dict[str, Any]]:
        from jupyter_llmcloud.client.batches import ENDED

        client = self._batch_client()
        batch = client.get(batch_id)
        if batch["status"] not in ENDED:
            counts = batch["request_counts"]
            raise UsageError(f"batch {batch_id} is {batch['status']}: {counts['completed']} of {counts['total']} rows.")
        if batch["errors"]:
            first = batch["errors"]["data"][0]
            at = "" if first["line"] is None else f"input {first['line'] - 1}: "
            raise UsageError(f"batch {batch_id} failed: {at}{first['message']}")
        return client.answers(batch)

    def _batch_client(self) -> BatchClient:
        from jupyter_llmcloud.client.batches import BatchClient

        http = self._client.http()
        return BatchClient(http, self.base_url, lambda request: self._send(request, stream=False, pool=http))

    def feedback(
        self,
        request_id: str,
        rating: str | float | None = None,
        correction: str | None = None,
        *,
        comment: str | None = None,
        prompt: str | Sequence[dict[str, Any]] | None = None,
        answer: str | None = None,
        **metadata: str,
    ) -> None:
        """Say what you think of an answer.

        Args:
            request_id: from the header x-request-id of the answer (`_request_id` with OpenAI's client).
            rating: "up", "down", or a number from -1 to 1.
            correction: what should have been answered.
            prompt, answer: what was asked and answered, for an endpoint that was started without --keep-requests.
            metadata: anything else to keep with it.
        """
        said = {"rating": rating, "correction": correction, "comment": comment, "prompt": prompt, "answer": answer}
        body = {"request_id": request_id, "metadata": metadata, **said}
        http = self._client.http()
        self._send(http.build_request("POST", f"{self.base_url}/feedback", json=body), stream=False, pool=http)

    def feedback_dataset(self, path: str, kind: str | None = None) -> int:
        """Write corrections and good answers as a data set for fine-tuning (JSON lines); returns how many rows.

        Those of which nobody has kept what was asked are left out, and counted aloud.

        Args:
            path: of the file.
            kind: "chat" for rows of `messages` only, "text" for rows of `prompt` and `completion` only; None: both.
        """
        if kind not in (None, *_ROWS):
            raise UsageError(f"kind={kind!r}: it is chat or text, or None for both.")
        text = self._client.feedback_dataset(self.name)
        lines = [line for line in text.split("\n") if line]
        by_kind = {name: [line for line in lines if field in json.loads(line)] for name, field in _ROWS.items()}
        chosen = lines if kind is None else by_kind[kind]
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in chosen)
        wanted = [row for row in self._client.feedback(self.name, 100_000) if is_wanted(row)]
        if (num_lost := len(wanted) - len(lines)) > 0:
            print(
                f"{num_lost} of {len(wanted)} corrections and good answers are left out: what was asked was not kept, "
                "or was several prompts at once. Serve with --keep-requests, or say prompt= (and answer=) with the "
                "feedback."
            )
        if kind is None and all(by_kind.values()):
            counts = ", ".join(f"{len(rows)} of kind {name!r}" for name, rows in by_kind.items())
            print(f"{path} has {counts}: trainers such as TRL's take one kind in a file. kind= chooses one.")
        return len(chosen)

    def drift(self, recent: int = 200) -> Records:
        """How far the newest `recent` requests differ from those before: lengths, first token, ratings.

        Shown as a table; `.to_frame()` gives a DataFrame.
        """
        from jupyter_llmcloud.magics.serving.records import Records

        columns = ("name", "verdict", "psi", "mean_earlier", "mean_recent", "num_earlier", "num_recent")
        return Records(self._client.endpoint_drift(self.name, recent), columns, "Nothing was asked yet.")

    def usage(self, days: int | None = None) -> Records:
        """What was asked with each key that opens this endpoint, by day (of the last 30); here or elsewhere, where it
        opens others too, which its `scopes` tell.

        Shown as a table; `.to_frame()` gives a DataFrame.
        """
        from jupyter_llmcloud.magics.serving.records import Records

        known = self._client.keys()
        scopes = {key["id"]: key["scopes"] for key in known}
        rows = [{**row, "scopes": scopes.get(row["id"], [])} for row in self._client.key_usage(days)]
        mine = [row for row in rows if may_infer(row["scopes"], self.name)]
        columns = ("day", "id", "label", "scopes", "requests", "refused", "prompt_tokens", "generated_tokens")
        return Records(mine, columns, "No key that opens this endpoint was used in this time.")

    def stop(self) -> None:
        """End it."""
        self._client.stop_endpoint(self.name)

    def logs(self, limit: int | None = None) -> str:
        """What its replicas printed."""
        return "\n".join(row["text"] for row in self._client.endpoint_logs(self.name, limit))

    # --- asking ---

    def _pool(self) -> httpx.Client:
        if self._http is None:
            import httpx

            from jupyter_llmcloud.client.rest import is_loopback

            local = is_loopback(self.base_url)
            timeout = httpx.Timeout(READ_TIMEOUT_S, connect=10)
            self._http = httpx.Client(timeout=timeout, trust_env=not local, verify=not local)
        return self._http

    def _request(self, route: str, body: dict[str, Any]) -> httpx.Request:
        headers = {"Authorization": f"Bearer {self.api_key}"}
        return self._pool().build_request(
            "POST", f"{self.base_url}/{route}", json={"model": self.name, **body}, headers=headers
        )

    def _ask(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("stream"):
            raise UsageError("stream=True: only chat() streams; leave it out here.")
        response = self._send(self._request(route, body), stream=False)
        answer: dict[str, Any] = response.json()
        return answer

    def _send(self, request: httpx.Request, stream: bool, pool: httpx.Client | None = None) -> httpx.Response:
        import httpx

        try:
            response = (pool or self._pool()).send(request, stream=stream)
        except httpx.TransportError as error:
            raise ConnectionLost(f"{self.base_url} does not answer: {error or type(error).__name__}.") from None
        if not response.is_success:
            response.read()
            raise _refusal(response)
        return response

    def _stream(self, route: str, body: dict[str, Any]) -> Iterator[str]:
        for event in self._events(self._request(route, {**body, "stream": True})):
            yield from _pieces(event)

    def _events(self, request: httpx.Request) -> Iterator[dict[str, Any]]:
        import httpx

        response = self._send(request, stream=True)
        try:
            for line in _lines(response):
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                yield json.loads(data)
        except httpx.TransportError as error:
            raise ConnectionLost(f"the answer broke off: {error or type(error).__name__}.") from None
        finally:
            response.close()

    # --- showing ---

    def snippets(self) -> dict[str, str]:
        """How to ask it from elsewhere; the key stands there by name only."""
        if self.kind != GENERATOR:
            return self._prediction_snippets()
        request = json.dumps({"model": self.name, "prompt": "Hello", "max_tokens": 32})
        curl = (
            f'curl {self.public_url}/completions -H "Authorization: Bearer $LLMCLOUD_API_KEY" '
            f"-H 'Content-Type: application/json' -d '{request}'"
        )
        python = (
            f'OpenAI(base_url="{self.public_url}", api_key=ep.api_key)'
            f'.completions.create(model="{self.name}", prompt="Hello")'
        )
        return {"curl": curl, "openai": python}

    def _prediction_snippets(self) -> dict[str, str]:
        url = f"{self.public_url.removesuffix('/v1')}/v2/models/{self.name}/infer"
        inputs = sample_inputs(self.kind, self.inputs)
        data = json.dumps({"inputs": "INPUTS"}).replace('"INPUTS"', inputs)
        curl = f"""curl {url} -H "Authorization: Bearer $LLMCLOUD_API_KEY" -d '{data}'"""
        return {"curl": curl, "Python": f"ep.predict({inputs})"}

    def replicas(self) -> list[str]:
        """Each replica in a line: what serves it, in how much memory, on how many threads."""
        return self._replicas()

    def _replicas(self, timeout_s: float = 60.0) -> list[str]:
        known = self._client.endpoint(self.name, timeout_s=timeout_s)
        return [_described(row) for row in known["replicas"] if row.get("memory")]

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<div><small>{title}</small><pre style='{_PRE}'>{html.escape(text)}</pre></div>"
            for title, text in self.snippets().items()
        )
        name, url = html.escape(self.name), html.escape(self.public_url)
        kind = "" if self.kind == GENERATOR else f" &middot; {html.escape(self.kind)}"
        try:
            lines = self._replicas(_SHOW_TIMEOUT_S)
        except LLMCloudError:  # a card is shown also when the server has gone meanwhile, or is slow
            lines = []
        small = "".join(f"<div><small>{html.escape(line)}</small></div>" for line in lines)
        return f"<div style='{_STYLE}'><b>{name}</b>{kind} &middot; <code>{url}</code>{rows}{small}</div>"

    def show(self, handle: Any = None) -> None:
        """Display the card, in place of what `handle` shows; as the value of the same cell it is not shown again."""
        from IPython.core.getipython import get_ipython
        from IPython.display import publish_display_data

        shell = get_ipython()
        if shell is None:  # plain Python: asking for a display would start a shell
            print(repr(self))
            return
        if handle is not None:
            handle.update(self._bundle(), raw=True)
        else:
            publish_display_data(self._bundle())
        self._shown_at = shell.execution_count

    def _ipython_display_(self) -> None:
        from IPython.core.getipython import get_ipython

        shell = get_ipython()
        if shell is not None and self._shown_at == shell.execution_count:
            return
        self.show()

    def _bundle(self) -> dict[str, Any]:
        from IPython.core.getipython import get_ipython

        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": self._repr_html_()}
        if getattr(get_ipython(), "kernel", None) is None:
            return bundle
        from jupyter_llmcloud.magics.serving.endpoint_card import make_card

        live: Any = make_card(self.name, self.public_url, self.snippets(), self.working_key)._repr_mimebundle_()
        shown = live[0] if isinstance(live, tuple) else live
        return {**shown, **bundle, **panel("endpoint", self.name, self.name)}


def _as_others_reach(url: str) -> str:
    """A URL of this user's server with the address of the hub before it, where a JupyterHub has told that."""
    public, prefix = (os.environ.get(f"JUPYTERHUB_{name}", "") for name in ("PUBLIC_URL", "SERVICE_PREFIX"))
    _, found, rest = url.partition(prefix) if public and prefix else (url, "", "")
    return f"{public.rstrip('/')}/{rest}" if found else url


def as_target(target: str) -> str:
    """A folder that is here by its whole path: the server has another folder to begin from."""
    folder = Path(os.path.expanduser(target))
    return str(folder.absolute()) if folder.is_dir() or not NAME_PATTERN.fullmatch(target) else target


def _described(replica: dict[str, Any]) -> str:
    memory = replica["memory"]
    if not replica.get("num_parallel"):
        return f"replica {replica['id']}: {_size(memory['process_bytes'])}"
    cache = ""
    if limit := memory.get("max_cache_bytes"):
        cache = f", of them {_size(memory['cache_bytes'])} for keys and values (up to {_size(limit)} when needed"
        cache += f"; {_size(kept)} kept for prompts that begin alike)" if (kept := memory.get("prefix_bytes")) else ")"
    threads = replica.get("num_threads") or 0
    sequences = replica.get("num_parallel") or 0
    return (
        f"replica {replica['id']}: {_size(memory['process_bytes'])}{cache}, {threads} thread{'s' * (threads != 1)}, "
        f"{sequences} sequence{'s' * (sequences != 1)} at once, {replica.get('context_length')} tokens each"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _refusal(response: httpx.Response) -> LLMCloudError:
    try:
        error = response.json()["error"]
        message = error if isinstance(error, str) else error["message"]
    except (ValueError, KeyError, TypeError):
        message = f"the endpoint answered with status {response.status_code}."
    return _ERRORS.get(response.status_code, ServerError)(str(message))


def _lines(response: httpx.Response) -> Iterator[str]:
    """Ended by line feeds alone: httpx ends them also at what JSON leaves as it is, such as U+2028 in a text."""
    rest = b""
    for data in response.iter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in lines)
    yield rest.decode("utf-8", "replace")


def _pieces(event: dict[str, Any]) -> Iterator[str]:
    if "error" in event:
        raise ServerError(f"the answer broke off: {event['error'].get('message')}")
    for choice in event.get("choices", ()):
        if text := (choice.get("delta") or {}).get("content"):
            yield text


def is_wanted(feedback: Mapping[str, Any]) -> bool:
    """Whether it says what a model should answer: a correction, or that the answer was good."""
    return feedback["correction"] is not None or (feedback["rating"] or 0) > 0
