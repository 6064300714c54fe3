"""Which agent leads a run, and what another one needs to lead it. For runs with restarts.

<run>/terms/0000.json    who leads it in this term: {"agent", "host", "t"}; a term belongs to whoever makes its file;
                         "heirs": who stands by from then on
      0000.left        who led in it has gone on purpose, since its host is taken away
      restart.bin        the world's StartWorld, the run's Execute and what is had again before it (Replayed), as frames

The folder is the one thing that all agents of a run share, so the file system decides between those that would lead.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from jupyter_llmcloud.errors import ProtocolError
from jupyter_llmcloud.protocol.agent_messages import Execute, Push, Replayed, StartWorld
from jupyter_llmcloud.protocol.frames import Decoder, Unreadable, encode, replace
from jupyter_llmcloud.system.atomic_files import staged, write_json

_MODE = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
_HAS_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class TermClaim:
    """A term and who leads in it: an agent's socket and host; no agent when the run was ended for one that had gone.

    `heirs`: those who stood by in the leader's term before and do so in this one, by the names that it has given them.
    """

    term: int
    agent: str = ""
    host: str = ""
    heirs: tuple[str, ...] = ()


class Leadership:
    """The leaders of one run.

    Args:
        run: its folder.
    """

    def __init__(self, run: Path) -> None:
        self._terms = run / "terms"
        self._spec = run / "restart.bin"

    def claim(self, claim: TermClaim) -> bool:
        """Lead from now on; False when somebody else leads in this term. Raises OSError when nobody can tell."""
        self._terms.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = {"agent": claim.agent, "host": claim.host, "t": round(time.time(), 3), "heirs": claim.heirs}
        whole = self._terms / f".{uuid.uuid4().hex}"
        try:
            write_json(whole, about, durable=False)
            _make_once(whole, self._path(claim.term))
        except FileExistsError:
            return False
        finally:
            whole.unlink(missing_ok=True)
        return True

    def is_claimed(self, term: int) -> bool:
        """Whether somebody leads in this term, or has."""
        return self._path(term).exists()

    def say_left(self, term: int) -> None:
        """Whoever leads in this term goes on purpose, with its host: nothing is wrong with the run."""
        with contextlib.suppress(OSError):
            self._path(term).with_suffix(".left").touch(mode=0o600)

    def was_left(self, term: int) -> bool:
        """Whether who led in this term has gone on purpose."""
        return self._path(term).with_suffix(".left").exists()

    def _path(self, term: int) -> Path:
        return self._terms / f"{term:04d}.json"

    def newest(self) -> TermClaim | None:
        """The newest term; None when the run has none, since it has no restarts."""
        try:
            terms = sorted(self._terms.glob("*.json"))
            if not terms:
                return None
            term = int(terms[-1].stem)
            about = json.loads(terms[-1].read_text())
            return TermClaim(term, about["agent"], about["host"], tuple(about.get("heirs", ())))
        except (OSError, KeyError):
            return None
        except ValueError:  # whoever made it was killed before it had written
            return TermClaim(term)

    @property
    def can_be_taken(self) -> bool:
        """Whether the run has not ended and tells what is needed to lead it."""
        return self._spec.exists()

    def save(self, spec: StartWorld, cell: Execute, definitions: list[Replayed]) -> None:
        """Write what another agent needs; it is complete when it is there. Raises OSError."""
        with staged(self._spec) as file:
            file.write(encode(spec))
            for known in (cell, *definitions):
                file.write(encode(replace(known, number=0)))

    def load(self) -> tuple[StartWorld, Execute, list[Replayed]]:
        """What `save` wrote. Raises OSError, ValueError, ProtocolError when another version wrote it."""
        messages = Decoder().feed(self._spec.read_bytes())
        for message in messages:
            if isinstance(message, Unreadable):
                raise ProtocolError(f"{self._spec}: a {message.kind} that {message.reason}.")
        spec = next((message for message in messages if isinstance(message, StartWorld)), None)
        cells = [message for message in messages if isinstance(message, Execute | Push)]
        if spec is None or not cells or not isinstance(cells[0], Execute):
            raise ValueError(f"{self._spec} does not tell of a run")
        return spec, cells[0], cells[1:]

    def forget(self) -> None:
        """The run has ended: nobody may lead it any more."""
        self._spec.unlink(missing_ok=True)


def _make_once(whole: Path, path: Path) -> None:
    """Have `path` be what `whole` is, unless it is there: raises FileExistsError. It is never seen half written."""
    try:
        os.link(whole, path)
    except OSError as error:
        if error.errno not in _HAS_NO_LINKS:
            raise
        fd = os.open(path, _MODE, 0o600)
        try:
            os.write(fd, whole.read_bytes())
        finally:
            os.close(fd)
