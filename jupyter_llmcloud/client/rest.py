"""The REST API from a kernel or a terminal: one method per route, errors raised as the classes they name."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import msgspec

from jupyter_llmcloud.errors import Busy, ConnectionLost
from jupyter_llmcloud.protocol.http.clusters import ScaleCluster, StartCluster
from jupyter_llmcloud.protocol.http.endpoints import (
    AddAdapter,
    ScaleEndpoint,
    ShadowEndpoint,
    SplitEndpoint,
    UpdateEndpoint,
)
from jupyter_llmcloud.protocol.http.keys import DEFAULT_EXPIRY_S, DEFAULT_OVERLAP_S, CreateKey, RotateKey
from jupyter_llmcloud.protocol.http.worlds import AskPlacement
from jupyter_llmcloud.protocol.rpc import restored_body
from jupyter_llmcloud.storage.runs import RunFolder

if TYPE_CHECKING:
    import httpx

    from jupyter_llmcloud.protocol.http.base import Body

TIMEOUT_S = 60.0
START_TIMEOUT_S = 330.0
MAX_WAIT_S = 20


class ServerClient:
    """A Jupyter server with our extension, asked over HTTP.

    Attributes:
        url: of the server, ending with a slash.
    """

    def __init__(self, url: str, token: str = "") -> None:
        self.url = url.rstrip("/") + "/"
        self._token = token
        self._http: httpx.Client | None = None

    def __repr__(self) -> str:
        return f"ServerClient({self.url!r})"

    @property
    def openai_url(self) -> str:
        """Where OpenAI clients ask."""
        return f"{self.url}llmcloud/v1"

    def http(self) -> httpx.Client:
        """The connection pool; a server on this machine is never asked through a proxy."""
        if self._http is None:
            import httpx

            local = is_loopback(self.url)
            headers = {"Authorization": f"token {self._token}"} if self._token else {}
            self._http = httpx.Client(headers=headers, timeout=TIMEOUT_S, trust_env=not local, verify=not local)
        return self._http

    def close(self) -> None:
        """Close its connections."""
        if self._http is not None:
            self._http.close()
            self._http = None

    def ask(
        self,
        method: str,
        path: str,
        body: Body | dict[str, Any] | None = None,
        timeout_s: float = TIMEOUT_S,
        **query: Any,
    ) -> dict[str, Any]:
        """One request below `/llmcloud/api/`; raises what the server refuses it with."""
        return read(self._send(method, path, body, timeout_s, query))

    def ask_text(self, path: str) -> str:
        """A GET below `/llmcloud/api/` that is answered with text; raises what the server refuses it with."""
        response = self._send("GET", path, None, START_TIMEOUT_S, {})
        if not response.is_success:
            read(response)
        return response.text

    def _send(
        self, method: str, path: str, body: Body | dict[str, Any] | None, timeout_s: float, query: dict[str, Any]
    ) -> httpx.Response:
        import httpx

        params = {key: str(value) for key, value in query.items() if value is not None}
        given: dict[str, Any] = {} if body is None else msgspec.to_builtins(body)
        fields = None if body is None else {key: value for key, value in given.items() if value is not None}
        url = f"{self.url}llmcloud/api/{path}"
        try:
            return self.http().request(method, url, json=fields, params=params, timeout=timeout_s)
        except httpx.TransportError as error:
            raise ConnectionLost(
                f"the Jupyter server at {self.url} does not answer: {error or type(error).__name__}."
            ) from None

    # --- routes ---

    def status(self) -> dict[str, Any]:
        """{"version", "pid", "headless", "root"}."""
        return self.ask("GET", "status", timeout_s=10)

    def clusters(self) -> list[dict[str, Any]]:
        """Every cluster of the server."""
        return list(self.ask("GET", "clusters", timeout_s=START_TIMEOUT_S)["clusters"])

    def start_cluster(
        self,
        kind: str = "local",
        name: str | None = None,
        workers: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Start a cluster and wait until it runs."""
        body = StartCluster(kind=kind, name=name, workers=workers, options=options or {})
        return self.ask("POST", "clusters", body, START_TIMEOUT_S)

    def connect_cluster(self, address: str, name: str | None = None) -> dict[str, Any]:
        """Use a cluster that runs elsewhere."""
        return self.ask("POST", "clusters", StartCluster(address=address, name=name), START_TIMEOUT_S)

    def scale_cluster(self, name: str, workers: int) -> dict[str, Any]:
        """Change its number of workers."""
        return self.ask("POST", f"clusters/{_name(name)}/scale", ScaleCluster(workers=workers), START_TIMEOUT_S)

    def adapt_cluster(self, name: str, minimum: int, maximum: int) -> dict[str, Any]:
        """Have between `minimum` and `maximum` workers, as the load asks."""
        return self.ask("POST", f"clusters/{_name(name)}/scale", ScaleCluster(minimum=minimum, maximum=maximum))

    def stop_cluster(self, name: str) -> None:
        """End a cluster."""
        self.ask("DELETE", f"clusters/{_name(name)}", timeout_s=START_TIMEOUT_S)

    def place(
        self,
        cluster: str | None = None,
        num_ranks: int | None = None,
        ticket: str = "",
        replaces: str = "",
        priority: int = 0,
    ) -> dict[str, Any]:
        """Where ranks go: {"cluster", "agents", "num_ranks", "world_id", "started"}. Raises Busy.

        Who soon asks again with the same `ticket` comes before those of its priority who came later. The slots of
        the world `replaces` count as free.
        """
        body = AskPlacement(cluster=cluster, num_ranks=num_ranks, ticket=ticket, replaces=replaces, priority=priority)
        placed = self.ask("POST", "placement", body, START_TIMEOUT_S)
        if placed.get("state") == "waiting":
            raise Busy(str(placed["reason"]))
        return placed

    def worlds(self, cluster: str | None = None) -> list[dict[str, Any]]:
        """Every world with its holder, ranks, state and age, the newest first."""
        return list(self.ask("GET", "worlds", cluster=cluster)["worlds"])

    def stop_world(self, name: str) -> dict[str, Any]:
        """End a world by its id or its notebook, whoever has it; returns what it was."""
        return self.ask("DELETE", f"worlds/{_name(name)}")

    def world_stacks(self, name: str) -> dict[str, Any]:
        """What the ranks of a world are doing now, by its id or its notebook: {"world_id", "lines"}."""
        return self.ask("GET", f"worlds/{_name(name)}/stacks")

    def run_folder(self, run_id: str) -> RunFolder:
        """Where the server records a run, as far as this machine has that folder."""
        return RunFolder(Path(self.status()["root"]) / "runs" / run_id)

    def start_run(self, source: str, spec: dict[str, Any], script: dict[str, Any] | None = None) -> dict[str, Any]:
        """Start a run without a kernel: {"run_id", "name", "state", "notes"}. It may wait for ranks when this returns.

        Args:
            source: a Python program.
            spec: options of RunSpec, by name.
            script: {"file", "arguments", "folder"} of a program that comes from a file.
        """
        return self.ask("POST", "runs", {"source": source, "spec": spec, "script": script}, START_TIMEOUT_S)

    def runs(self, state: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """Runs, the newest first."""
        return list(self.ask("GET", "runs", state=state, limit=limit)["runs"])

    def runs_and_sweeps(self, limit: int) -> list[dict[str, Any]]:
        """Runs that are no trials, and sweeps as if each were one run; the newest first."""
        runs = self.ask("GET", "runs", limit=limit, trials="none")["runs"]
        rows = [*runs, *map(_sweep_as_run, self.sweeps())]
        return sorted(rows, key=lambda row: float(row["created"]), reverse=True)[:limit]

    def run(self, name: str) -> dict[str, Any]:
        """One run by its id or name."""
        return self.ask("GET", f"runs/{_name(name)}")

    def run_script(self, name: str, file: str) -> dict[str, Any]:
        """A run as a plain script to be kept as `file`: {"run_id", "text", "launches", "notes"}."""
        return self.ask("GET", f"runs/{_name(name)}/export", file=file)

    def compare_runs(self, names: Sequence[str], tolerance: float = 0.0) -> dict[str, Any]:
        """What differs between runs: {"runs", "facts", "metrics", "code"}."""
        return self.ask("GET", "run-comparison", runs=",".join(names), tolerance=tolerance)

    def run_logs(self, name: str, rank: int | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """Its newest log records."""
        return list(self.ask("GET", f"runs/{_name(name)}/logs", rank=rank, limit=limit)["records"])

    def run_log(self, name: str) -> Iterator[str]:
        """All that its ranks have written, in pieces of some lines, each with its rank."""
        import httpx

        url = f"{self.url}llmcloud/api/runs/{_name(name)}/log"
        try:
            with self.http().stream("GET", url, timeout=START_TIMEOUT_S) as response:
                if not response.is_success:
                    response.read()
                    read(response)
                yield from response.iter_text()
        except httpx.TransportError as error:
            raise ConnectionLost(
                f"the Jupyter server at {self.url} does not answer: {error or type(error).__name__}."
            ) from None

    def run_metrics(self, name: str, rank: int | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """Its newest metric records."""
        return list(self.ask("GET", f"runs/{_name(name)}/metrics", rank=rank, limit=limit)["records"])

    def stop_run(self, name: str, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Stop a run: {"state"}."""
        return self.ask("POST", f"runs/{_name(name)}/stop", {}, timeout_s)

    def checkpoint_run(self, name: str) -> dict[str, Any]:
        """Have a run save a checkpoint, and wait until it is complete: {"run_id", "step"}."""
        return self.ask("POST", f"runs/{_name(name)}/checkpoint", {}, START_TIMEOUT_S)

    def run_series(
        self, name: str, metric: str, first: float | None = None, last: float | None = None, **query: Any
    ) -> dict[str, Any]:
        """A metric between two steps; `points` columns at most, `by` mean or rank: {"metric", "by", "columns"}."""
        asked = {"metric": metric, "from": first, "to": last, **query}
        return self.ask("GET", f"runs/{_name(name)}/series", timeout_s=START_TIMEOUT_S, **asked)

    def delete_run(self, name: str) -> None:
        """Remove a run that has ended."""
        self.ask("DELETE", f"runs/{_name(name)}")

    def endpoints(self) -> list[dict[str, Any]]:
        """Every endpoint, the newest first."""
        return list(self.ask("GET", "endpoints")["endpoints"])

    def create_endpoint(self, target: str, **options: Any) -> dict[str, Any]:
        """Begin to serve, with the options of an EndpointSpec; the endpoint is starting when this returns."""
        return self.ask("POST", "endpoints", {"target": target, **options})

    def endpoint(self, name: str, wait_s: int = 0, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """One endpoint; waits up to `wait_s` (at most 20 are useful) while it is starting."""
        return self.ask("GET", f"endpoints/{_name(name)}", timeout_s=timeout_s + wait_s, wait_s=wait_s)

    def stop_endpoint(self, name: str) -> dict[str, Any]:
        """End an endpoint; one that has ended is forgotten."""
        return self.ask("DELETE", f"endpoints/{_name(name)}")

    def scale_endpoint(self, name: str, replicas: int | str) -> dict[str, Any]:
        """Have so many replicas, or bounds such as `1:4`."""
        return self.ask("POST", f"endpoints/{_name(name)}/scale", ScaleEndpoint(replicas=replicas))

    def update_endpoint(self, name: str, target: str, canary: int | None = None) -> dict[str, Any]:
        """Serve another model under the same name; with `canary` to so many percent of the requests."""
        body = UpdateEndpoint(target=target, canary=canary)
        return self.ask("POST", f"endpoints/{_name(name)}/update", body)

    def split_endpoint(self, name: str, shares: dict[str, int]) -> dict[str, Any]:
        """Share the requests out over revisions, in percent."""
        return self.ask("POST", f"endpoints/{_name(name)}/split", SplitEndpoint(shares=shares))

    def roll_back_endpoint(self, name: str) -> dict[str, Any]:
        """Without the canary, or back to the revision before this one."""
        return self.ask("POST", f"endpoints/{_name(name)}/rollback", {})

    def shadow_endpoint(self, name: str, revision: str | None) -> dict[str, Any]:
        """Copy the requests to a revision, a run or a folder; None ends that."""
        return self.ask("POST", f"endpoints/{_name(name)}/shadow", ShadowEndpoint(revision=revision))

    def add_adapter(self, name: str, target: str, adapter: str | None = None) -> dict[str, Any]:
        """Load an adapter beside the model of an endpoint."""
        body = AddAdapter(target=target, name=adapter)
        return self.ask("POST", f"endpoints/{_name(name)}/adapters", body, START_TIMEOUT_S)

    def remove_adapter(self, name: str, adapter: str) -> dict[str, Any]:
        """Take an adapter away."""
        return self.ask("DELETE", f"endpoints/{_name(name)}/adapters/{_name(adapter)}", timeout_s=START_TIMEOUT_S)

    def endpoint_logs(self, name: str, limit: int | None = None) -> list[dict[str, Any]]:
        """[{"path", "text"}] of its replicas."""
        return list(self.ask("GET", f"endpoints/{_name(name)}/logs", limit=limit)["logs"])

    def feedback(self, name: str, limit: int | None = None) -> list[dict[str, Any]]:
        """What was said of the answers of an endpoint, the newest first."""
        return list(self.ask("GET", f"endpoints/{_name(name)}/feedback", limit=limit)["feedback"])

    def feedback_dataset(self, name: str) -> str:
        """Corrections and good answers of an endpoint, as JSON lines."""
        return self.ask_text(f"endpoints/{_name(name)}/feedback/dataset")

    def endpoint_drift(self, name: str, recent: int | None = None) -> list[dict[str, Any]]:
        """How far the newest requests to an endpoint differ from those before."""
        return list(self.ask("GET", f"endpoints/{_name(name)}/drift", recent=recent)["drift"])

    def prepare_data(self, source: list[str], **options: Any) -> dict[str, Any]:
        """Begin to prepare data, with the options of a PrepareSpec; it has been planned when this returns."""
        return self.ask("POST", "preparations", {"source": source, **options}, START_TIMEOUT_S)

    def preparation(self, ident: str, seen: int = -1, wait_s: float = 0) -> dict[str, Any]:
        """How far a preparation is; waits for a change."""
        return self.ask("GET", f"preparations/{_name(ident)}", timeout_s=TIMEOUT_S + wait_s, seen=seen, wait_s=wait_s)

    def stop_preparation(self, ident: str) -> dict[str, Any]:
        """Stop a preparation; what is finished is kept."""
        return self.ask("POST", f"preparations/{_name(ident)}/stop", {})

    def sweeps(self) -> list[dict[str, Any]]:
        """Every sweep, the newest first, without its trials."""
        return list(self.ask("GET", "sweeps")["sweeps"])

    def start_sweep(self, **body: Any) -> dict[str, Any]:
        """Begin a sweep with the options of a SweepSpec, or go on with one; `source`, `cell`, `pushed` are the cell."""
        return self.ask("POST", "sweeps", body, START_TIMEOUT_S)

    def sweep(self, name: str, seen: int | None = None, wait_s: float = 0) -> dict[str, Any]:
        """A sweep with its trials; waits for a change."""
        return self.ask("GET", f"sweeps/{_name(name)}", timeout_s=TIMEOUT_S + wait_s, seen=seen, wait_s=wait_s)

    def stop_sweep(self, name: str) -> dict[str, Any]:
        """Stop a sweep; what is done is kept."""
        return self.ask("POST", f"sweeps/{_name(name)}/stop", {})

    def delete_sweep(self, name: str) -> None:
        """Remove a sweep that has ended; its runs stay."""
        self.ask("DELETE", f"sweeps/{_name(name)}")

    def keys(self) -> list[dict[str, Any]]:
        """Every scoped key, without its secret."""
        return list(self.ask("GET", "keys")["keys"])

    def create_key(
        self, scopes: list[str], expires_s: float | None = None, label: str | None = None, **limits: int | None
    ) -> dict[str, Any]:
        """Mint a key; `["key"]` of the answer is told here and never again.

        Args:
            limits: options of a KeySpec: requests_per_minute, tokens_per_minute, parallel_requests.
        """
        body = CreateKey(
            scopes=scopes, expires_s=DEFAULT_EXPIRY_S if expires_s is None else expires_s, label=label or "", **limits
        )
        return self.ask("POST", "keys", body)

    def rotate_key(self, key_id: str, overlap_s: float | None = None) -> dict[str, Any]:
        """Mint a key in place of one that stays valid for `overlap_s` (an hour); `["key"]` is told here only."""
        body = RotateKey(overlap_s=DEFAULT_OVERLAP_S if overlap_s is None else overlap_s)
        return self.ask("POST", f"keys/{_name(key_id)}/rotate", body)

    def key_usage(self, days: int | None = None) -> list[dict[str, Any]]:
        """Requests and tokens of each key by day, the newest day first."""
        return list(self.ask("GET", "keys/usage", days=days)["usage"])

    def key_alerts(self, limit: int | None = None) -> list[dict[str, Any]]:
        """What was unusual in the use of keys, the newest first: [{"id", "t", "rule", "what"}]."""
        return list(self.ask("GET", "keys/alerts", limit=limit)["alerts"])

    def revoke_key(self, key_id: str) -> None:
        """End a key."""
        self.ask("DELETE", f"keys/{_name(key_id)}")


def read(response: httpx.Response) -> dict[str, Any]:
    """The JSON of an answer; raises the error that it names."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.is_success and isinstance(body, dict):
        return body
    raise restored_body(body, f"the Jupyter server answered {response.url} with status {response.status_code}.")


def is_loopback(url: str) -> bool:
    """Does this URL stay on this machine?"""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _sweep_as_run(sweep: dict[str, Any]) -> dict[str, Any]:
    """A row as those of runs: a list of both names a sweep once, and not each of its trials."""
    best, num_trials = sweep["best"], sweep["num_trials"]
    return {
        "run_id": sweep["name"],
        "name": f"sweep of {num_trials} trial{'s' if num_trials != 1 else ''}",
        "state": sweep["state"],
        "created": sweep["created"],
        "ended": sweep["ended"],
        "world_size": "",
        "metrics": {f"best {sweep['spec'].get('metric', 'value')}": best["value"]} if best else {},
        "artifacts": {},
    }


def _name(text: str) -> str:
    return quote(text, safe="") or "-"
