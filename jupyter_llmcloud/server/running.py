"""A server that runs already, asked from a terminal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jupyter_llmcloud import config
from jupyter_llmcloud.errors import ConnectionLost, LLMCloudError, NotFound, ServerError
from jupyter_llmcloud.protocol.rpc import restored_body

TIMEOUT_S = 330.0


class RunningServer:
    """One server: its URL, and the token that opens it."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url.rstrip("/") + "/"
        self._token = token

    @classmethod
    def find(cls) -> RunningServer:
        """The one that LLMCLOUD_SERVER_URL names, else the newest that answers; raises NotFound."""
        if url := os.environ.get(config.ENV_SERVER_URL):
            return cls(url, os.environ.get(config.ENV_SERVER_TOKEN, ""))
        for path in announcements():
            server = _read(path)
            if server is not None and server.answers():
                return server
        raise NotFound(
            "no Jupyter server with jupyter-llmcloud runs here: start one (jupyter lab, jupyter llmcloud serve PATH), "
            f"or name it in {config.ENV_SERVER_URL} and {config.ENV_SERVER_TOKEN}."
        )

    def answers(self) -> bool:
        """Is it there, and is it ours?"""
        try:
            self.ask("GET", "status", timeout_s=5)
        except LLMCloudError:
            return False
        return True

    def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = TIMEOUT_S
    ) -> dict[str, Any]:
        """One request below `/llmcloud/api/`; raises what it is refused with."""
        import httpx

        headers = {"Authorization": f"token {self._token}"} if self._token else {}
        fields = None if body is None else {key: value for key, value in body.items() if value is not None}
        url = f"{self.url}llmcloud/api/{path}"
        try:
            response = httpx.request(method, url, json=fields, headers=headers, timeout=timeout_s)
            answer = response.json()
        except httpx.TransportError as error:
            raise ConnectionLost(f"{self.url} does not answer: {error}.") from None
        except ValueError:
            raise ServerError(f"{self.url} answered with status {response.status_code} and no JSON.") from None
        if response.is_success:
            return dict(answer)
        raise restored_body(answer, f"{self.url} answered with status {response.status_code}.")


def announcements() -> list[Path]:
    """Where servers of this user tell their URL, the newest first."""
    paths = [*config.jupyter_runtime_dir().glob("jpserver-*.json"), *config.runtime_dir().glob("headless-*.json")]
    return sorted(paths, key=_age, reverse=True)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read(path: Path) -> RunningServer | None:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return RunningServer(told["url"], told.get("token") or os.environ.get("JUPYTERHUB_API_TOKEN", ""))
    except (OSError, ValueError, KeyError, TypeError):
        return None
