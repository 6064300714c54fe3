"""What an exit status says in words."""

from __future__ import annotations

import signal

import pytest

from jupyter_llmcloud.core.run.exits import LOST_AGENT, describe_exit, oom_evidence


def test_an_exit_code_is_told_as_an_exit() -> None:
    assert describe_exit(3) == ("RankExited", "the process ended by itself with exit code 3.")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGTERM])
def test_a_signal_is_told_by_name_with_what_to_do(number: signal.Signals) -> None:
    name, words = describe_exit(-number)
    assert name == "RankKilled"
    assert words.startswith(f"the process was ended by {number.name} ({int(number)}). ")
    assert len(words) > 60


def test_an_unknown_signal_is_told_by_its_number() -> None:
    assert describe_exit(-99) == ("RankKilled", "the process was ended by signal 99 (99).")


def test_evidence_of_the_out_of_memory_killer_names_it() -> None:
    evidence = oom_evidence(1, 2, "", 3 << 30)
    name, words = describe_exit(-9, evidence)
    assert name == "RankOutOfMemory"
    assert "from 1 to 2" in words
    assert "3.00 GiB" in words
    assert "smaller batch" in words


def test_without_evidence_nothing_is_claimed() -> None:
    assert oom_evidence(2, 2, "", 3 << 30) == ""


def test_other_evidence_is_told_beside_the_signal() -> None:
    name, words = describe_exit(-9, "Its parent has gone.")
    assert name == "RankKilled"
    assert "Its parent has gone." in words


def test_a_rank_whose_agent_has_gone_is_lost_not_killed() -> None:
    name, words = describe_exit(-9, f"{LOST_AGENT} at /a/agent.sock has gone.")
    assert name == "RankLost"
    assert "/a/agent.sock has gone." in words
    assert "memory" not in words
    assert "--max-restarts" in words
