"""Who leads a run: claims in its folder, tested by values and by processes that race for one."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from jupyter_llmcloud.errors import ProtocolError
from jupyter_llmcloud.protocol.agent_messages import Execute, Push, StartWorld
from jupyter_llmcloud.protocol.frames import encode
from jupyter_llmcloud.storage.leadership import Leadership, TermClaim

SPEC = StartWorld(world_id="w", agents=[{"home": "/a.sock", "num_ranks": 2}], num_threads={0: 2})
CELL = Execute(world_id="w", run_id="r", name="train", code="x = 1", max_restarts=2, payload=b"\0pushed")


def test_a_term_belongs_to_whoever_claims_it_first(tmp_path: Path) -> None:
    here, there = Leadership(tmp_path), Leadership(tmp_path)
    assert here.newest() is None
    assert here.claim(TermClaim(0, "/a.sock", "one"))
    assert not there.claim(TermClaim(0, "/b.sock", "two"))
    assert there.claim(TermClaim(1, "/b.sock", "two"))
    assert here.newest() == TermClaim(1, "/b.sock", "two")


def test_terms_are_in_order_also_when_there_are_many(tmp_path: Path) -> None:
    leadership = Leadership(tmp_path)
    assert all(leadership.claim(TermClaim(term)) for term in range(12))
    assert leadership.newest() == TermClaim(11)


def test_a_claim_whose_maker_was_killed_before_it_had_written_counts_and_is_nobodys(tmp_path: Path) -> None:
    leadership = Leadership(tmp_path)
    leadership.claim(TermClaim(0, "/a.sock", "one"))
    (tmp_path / "terms" / "0001.json").touch()
    assert leadership.newest() == TermClaim(1)
    assert not leadership.claim(TermClaim(1, "/a.sock", "one"))


def test_a_term_names_those_who_stand_by_in_it(tmp_path: Path) -> None:
    claim = TermClaim(3, "/a.sock", "one", heirs=("first", "second"))
    assert Leadership(tmp_path).claim(claim)
    assert Leadership(tmp_path).newest() == claim
    assert [file.name for file in (tmp_path / "terms").iterdir()] == ["0003.json"], "nothing else is left"


def test_a_file_system_without_hard_links_has_terms_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    claim = TermClaim(0, "/a.sock", "one", heirs=("first",))
    assert Leadership(tmp_path).claim(claim)
    assert not Leadership(tmp_path).claim(TermClaim(0, "/b.sock", "two"))
    assert Leadership(tmp_path).newest() == claim


def _race(folder: Path, start: object, wins: object, name: str) -> None:
    start.wait()  # type: ignore[attr-defined]
    for term in range(50):
        if Leadership(folder).claim(TermClaim(term, name, "host")):
            wins.put((term, name))  # type: ignore[attr-defined]


def test_of_processes_that_race_for_a_term_one_gets_it(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    start, wins = fork.Event(), fork.Queue()
    racers = [fork.Process(target=_race, args=(tmp_path, start, wins, str(number))) for number in range(4)]
    for racer in racers:
        racer.start()
    start.set()
    found = [wins.get(timeout=20) for _ in range(50)]
    for racer in racers:
        racer.join(20)
    assert sorted(term for term, _ in found) == list(range(50))
    assert wins.empty()
    wins.close()


def test_what_another_agent_needs_is_there_until_the_run_has_ended(tmp_path: Path) -> None:
    leadership = Leadership(tmp_path)
    assert not leadership.can_be_taken
    before = Execute(world_id="w", run_id="d", name="imports", code="import torch", is_definition=True, number=3)
    leadership.save(SPEC, CELL, [before])
    assert leadership.can_be_taken
    spec, cell, definitions = leadership.load()
    assert (spec, cell) == (SPEC, CELL)
    assert [(definition.code, definition.number) for definition in definitions] == [("import torch", 0)]
    assert (tmp_path / "restart.bin").stat().st_mode & 0o077 == 0
    leadership.forget()
    leadership.forget()
    assert not leadership.can_be_taken
    with pytest.raises(FileNotFoundError):
        leadership.load()
    (tmp_path / "restart.bin").write_bytes(encode(SPEC).replace(b"StartWorld", b"StartLater"))
    with pytest.raises(ProtocolError, match=r"restart.bin: a StartLater that is not known here.*different versions"):
        leadership.load()
    (tmp_path / "restart.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="does not tell of a run"):
        leadership.load()


def test_what_is_had_again_before_the_run_is_kept_in_its_order(tmp_path: Path) -> None:
    pushed = Push(world_id="w", texts={"a": "1"}, payload=b"\0one")
    known = Execute(world_id="w", run_id="q", name="define", code="def f(): pass", is_definition=True)
    Leadership(tmp_path).save(SPEC, CELL, [pushed, known])
    assert Leadership(tmp_path).load() == (SPEC, CELL, [pushed, known])
