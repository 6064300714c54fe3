"""What is done about an endpoint's replicas, decided by values: desired beside observed, time as an argument."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jupyter_llmcloud.core.serving.endpoint.endpoint_plan import EndpointPlan, Timing
from jupyter_llmcloud.core.serving.endpoint.plan_messages import (
    AskAgent,
    Desired,
    Drain,
    Event,
    Idle,
    Instruction,
    Lost,
    MarkState,
    NoRoom,
    Probe,
    Probed,
    ProcessAlive,
    Reloaded,
    ReloadReplica,
    Resumed,
    RevisionFailed,
    Route,
    Started,
    StartReplica,
    Stopped,
    StopReplica,
    Suspected,
    Withdraw,
)
from jupyter_llmcloud.core.serving.endpoint.revision import Revision
from jupyter_llmcloud.core.tick import Tick

ONE = Revision(1, "/model")
TWO = Revision(2, "/better")


class Endpoint:
    """A plan, a clock, and what it said so far."""

    def __init__(self, *revisions: Revision, **options: Any) -> None:
        self.plan = EndpointPlan(**options)
        self.now = 100.0
        self.said: list[Instruction] = []
        if revisions:
            self.tell(Desired(revisions))

    def tell(self, *events: Event) -> list[Instruction]:
        """What each event leads to, now."""
        self.said = [instruction for event in events for instruction in self.plan.handle(event, self.now)]
        return self.said

    def wait(self, seconds: float) -> list[Instruction]:
        """Time passes; a Tick comes whenever one is due."""
        until, said = self.now + seconds, []
        while self.plan.wake_at is not None and self.plan.wake_at <= until:
            self.now = max(self.now, self.plan.wake_at)
            said += self.tell(Tick())
            assert self.plan.wake_at is None or self.plan.wake_at > self.now, "a tick that is due at once again"
        self.now = until
        self.said = said
        return said

    def make_ready(self, *replicas: int) -> list[Instruction]:
        """They start and are loaded, at once."""
        said = []
        for replica in replicas:
            said += self.tell(Started(replica))
            said += self.wait(0.1)
            said += self.tell(Probed(replica, "ready"))
        self.said = said
        return said

    def lose(self, replica: int, reason: str = "it was killed", **options: Any) -> list[Instruction]:
        """It is gone, and its agent has cleaned up."""
        self.said = [*self.tell(Lost(replica, reason, **options)), *self.tell(Stopped(replica))]
        return self.said

    def states(self) -> dict[int, str]:
        return self.plan.states()


def only(kind: type, said: list[Instruction]) -> list[Any]:
    return [instruction for instruction in said if isinstance(instruction, kind)]


# --- from nothing to ready, and to nothing ---


def test_an_endpoint_starts_as_many_replicas_as_are_wanted_and_no_more() -> None:
    endpoint = Endpoint(dataclasses.replace(ONE, num_replicas=2))
    assert [(start.replica, start.revision.number) for start in only(StartReplica, endpoint.said)] == [(1, 1), (2, 1)]
    assert endpoint.tell(Tick(), Desired(endpoint.plan.revisions)) == []
    assert (endpoint.plan.state, endpoint.plan.may_recover) == ("starting", True)


def test_a_started_replica_is_probed_until_it_is_ready_and_then_gets_requests() -> None:
    endpoint = Endpoint(ONE)
    assert endpoint.tell(Started(1)) == []
    assert endpoint.wait(0.1) == [Probe(1)]
    assert endpoint.wait(5) == []  # one probe at a time
    assert endpoint.tell(Probed(1, "loading")) == []
    assert endpoint.wait(0.1) == [Probe(1)]
    assert endpoint.tell(Probed(1, "ready")) == [Route({1: 100}), MarkState("ready")]
    assert endpoint.wait(1.9) == []
    assert endpoint.wait(0.1) == [Probe(1)]
    assert endpoint.plan.may_recover


def test_an_endpoint_that_is_stopped_ends_every_replica_and_says_why() -> None:
    endpoint = Endpoint(dataclasses.replace(ONE, num_replicas=3))
    endpoint.make_ready(1, 2)
    said = endpoint.tell(Desired())
    assert only(StopReplica, said) == [StopReplica(n, "the endpoint was stopped") for n in (1, 2, 3)]
    assert Route({}) in said and MarkState("stopped") in said
    assert not endpoint.plan.is_over
    assert endpoint.tell(Lost(3, "never started"), *(Stopped(n) for n in (1, 2, 3))) == []
    assert endpoint.plan.is_over and endpoint.plan.wake_at is None


def test_what_is_said_of_a_replica_that_is_gone_changes_nothing() -> None:
    endpoint = Endpoint(ONE)
    endpoint.make_ready(1)
    before = dataclasses.replace(endpoint.plan)
    for event in (Started(9), Probed(9, "silent"), Lost(9, "x"), Suspected(9), Idle(9), Stopped(9), ProcessAlive(9)):
        assert endpoint.tell(event) == []
    assert endpoint.plan == before


# --- probes ---


@pytest.mark.parametrize("phase", [0.01, 1.0, 2.0])
def test_a_frozen_replica_is_lost_after_three_silent_probes_within_fifteen_seconds_and_not_before_eleven(
    phase: float,
) -> None:
    endpoint = Endpoint(ONE)
    endpoint.make_ready(1)
    timing = endpoint.plan.timing
    endpoint.now += timing.probe_every_s - phase
    frozen_at = endpoint.now
    assert endpoint.wait(phase) == [Probe(1)]
    for _ in range(2):
        endpoint.now += timing.probe_timeout_s
        assert Probe(1) in endpoint.tell(Probed(1, "silent", "no answer to /readyz"))
        assert endpoint.states() == {1: "silent"}
    endpoint.now += timing.probe_timeout_s
    [stop] = only(StopReplica, endpoint.tell(Probed(1, "silent", "no answer to /readyz")))
    assert stop.reason == "no answer to /readyz, 3 times in a row"
    assert 11 <= endpoint.now - frozen_at <= 13.2


def test_a_silent_replica_gets_no_new_requests_and_is_asked_again_when_it_answers() -> None:
    endpoint = Endpoint(ONE)
    endpoint.make_ready(1)
    endpoint.wait(2)
    assert endpoint.tell(Probed(1, "silent")) == [Probe(1), Route({})]
    assert (endpoint.plan.state, endpoint.plan.may_recover) == ("ready", True)
    assert endpoint.tell(Probed(1, "ready")) == [Route({1: 100})]
    endpoint.wait(2)
    endpoint.tell(Probed(1, "silent"), Probed(1, "silent"), Probed(1, "ready"))
    endpoint.wait(2)
    endpoint.tell(Probed(1, "silent"), Probed(1, "silent"))
    assert endpoint.states() == {1: "silent"}  # silences count in a row only


def test_a_replica_that_a_request_could_not_reach_is_probed_at_once_and_left_alone_meanwhile() -> None:
    endpoint = Endpoint(dataclasses.replace(ONE, num_replicas=2))
    endpoint.make_ready(1, 2)
    assert endpoint.tell(Suspected(1)) == [Probe(1), Route({2: 100})]
    assert endpoint.tell(Probed(1, "ready")) == [Route({1: 100, 2: 100})]


@pytest.mark.parametrize("health", ["unreachable", "failed", "loading", "draining"])
def test_a_ready_replica_that_says_anything_else_is_lost_and_replaced_at_once(health: str) -> None:
    endpoint = Endpoint(ONE)
    endpoint.make_ready(1)
    endpoint.wait(2)
    said = endpoint.tell(Probed(1, health, "what it said"))
    assert only(StopReplica, said) == [StopReplica(1, "what it said")]
    assert MarkState("starting", "what it said") in said and not only(StartReplica, said)
    assert only(StartReplica, endpoint.tell(Stopped(1))) == [StartReplica(2, ONE)]
    assert endpoint.make_ready(2)[-2:] == [Route({2: 100}), MarkState("ready")]


def test_a_silence_while_it_loads_is_no_loss_until_loading_takes_too_long() -> None:
    endpoint = Endpoint(ONE, timing=Timing(loading_timeout_s=60))
    endpoint.tell(Started(1))
    for _ in range(12):
        assert only(Probe, endpoint.wait(0.2)) == [Probe(1)]
        endpoint.now += 3.7
        assert endpoint.tell(Probed(1, "silent")) == []
    endpoint.wait(20)
    assert endpoint.states() == {1: "stopping"}
    assert endpoint.plan.reason == "it was not ready within 60 s"


def test_a_starting_replica_that_cannot_be_reached_is_looked_for_at_its_agent() -> None:
    endpoint = Endpoint(ONE)
    endpoint.tell(Started(1))
    endpoint.wait(0.1)
    assert endpoint.tell(Probed(1, "unreachable", "no such file")) == [AskAgent(1)]
    assert endpoint.wait(10) == []
    assert endpoint.tell(ProcessAlive(1)) == []
    assert endpoint.wait(0.1) == [Probe(1)]
    endpoint.tell(Probed(1, "unreachable"))
    assert only(StopReplica, endpoint.tell(Lost(1, "it ended with -9"))) == [StopReplica(1, "it ended with -9")]


# --- failures ---


def test_failed_starts_are_repeated_later_and_later_told_with_their_reason_and_given_up_in_the_end() -> None:
    endpoint = Endpoint(ONE)
    waits = []
    for number in range(1, 8):
        endpoint.lose(number, f"no room ({number})")
        began = endpoint.now
        while number + 1 not in endpoint.plan.replicas:
            assert endpoint.plan.wake_at is not None
            endpoint.wait(endpoint.plan.wake_at - endpoint.now)
        waits.append(endpoint.now - began)
        assert (endpoint.plan.state, endpoint.plan.reason) == ("starting", f"no room ({number})")
    assert waits == [0, 2, 4, 8, 16, 30, 30]
    said = endpoint.lose(8, "no room (8)")
    assert MarkState("failed", "8 starts failed, the last one: no room (8)") in said
    assert endpoint.plan.wake_at is None and endpoint.plan.replicas == {} and not endpoint.plan.may_recover


def test_a_model_that_cannot_be_loaded_fails_at_once_and_its_other_replicas_end() -> None:
    endpoint = Endpoint(dataclasses.replace(ONE, num_replicas=2))
    endpoint.tell(Started(1))
    endpoint.wait(0.1)
    said = endpoint.tell(Probed(1, "failed", "the weights are of another shape"))
    why = "the model could not be loaded: the weights are of another shape."
    assert only(StopReplica, said) == [StopReplica(1, why), StopReplica(2, why)]
    assert only(MarkState, said) == [MarkState("failed", why)]
    endpoint.tell(Stopped(1), Stopped(2))
    assert endpoint.plan.replicas == {} and endpoint.plan.wake_at is None


def test_replicas_that_serve_go_on_when_another_one_cannot_be_loaded_any_more() -> None:
    endpoint = Endpoint(dataclasses.replace(ONE, num_replicas=2))
    endpoint.make_ready(1, 2)
    endpoint.lose(2)
    said = endpoint.lose(3, "the folder is gone", lasting=True)
    assert endpoint.states() == {1: "ready"}
    assert MarkState("ready", "the folder is gone") in said
    assert only(StartReplica, endpoint.wait(60)) == [StartReplica(4, endpoint.plan.revisions[0])]


def test_a_replica_that_stood_for_a_while_is_replaced_at_once_one_that_dies_young_later_and_later() -> None:
    endpoint = Endpoint(ONE)
    endpoint.make_ready(1)
    for number in (1, 2, 3):
        endpoint.now += 60
        assert only(StartReplica, endpoint.lose(number)) == [StartReplica(number + 1, ONE)]
        endpoint.make_ready(number + 1)
    assert only(StartReplica, endpoint.lose(4)) == []  # it answered, and died of it at once
    assert only(StartReplica, endpoint.wait(2)) == [StartReplica(5, ONE)]
    for number in range(5, 30):
        endpoint.make_ready(number)
        endpoint.lose(number)
        assert only(StartReplica, endpoint.wait(30)) == [StartReplica(number + 1, ONE)]
    assert endpoint.plan.state == "starting"  # who becomes ready is never given up


def test_each_place_has_a_back_off_of_its_own() -> None:
    endpoint = Endpoint(dataclasses.replace(ONE, num_replicas=3))
    endpoint.make_ready(1, 2, 3)
    endpoint.now += 60
    said = [*endpoint.lose(1), *endpoint.lose(2), *endpoint.lose(3)]
    assert [start.replica for start in only(StartReplica, said)] == [4, 5, 6]


def test_a_lost_replica_keeps_its_place_until_nothing_is_left_of_it() -> None:
    endpoint = Endpoint(ONE)
    endpoint.make_ready(1)
    endpoint.now += 60
    assert only(StartReplica, endpoint.tell(Lost(1, "it froze"))) == []  # it may hold the only device
    assert endpoint.wait(60) == []
    assert only(StartReplica, endpoint.tell(Stopped(1))) == [StartReplica(2, ONE)]


def test_a_loss_of_one_of_two_is_told_while_the_endpoint_goes_on() -> None:
    endpoint = Endpoint(dataclasses.replace(ONE, num_replicas=2))
    endpoint.make_ready(1, 2)
    assert MarkState("ready", "it was killed") in endpoint.lose(1)
    assert MarkState("ready") in endpoint.make_ready(3)


# --- another server ---


def test_a_server_that_takes_an_endpoint_up_looks_for_its_replicas_before_it_starts_any() -> None:
    wanted = dataclasses.replace(ONE, num_replicas=3)
    endpoint = Endpoint()
    assert endpoint.tell(Resumed((wanted,), {1: 1, 2: 1})) == [StartReplica(3, wanted), Probe(1), Probe(2)]
    assert endpoint.plan.may_recover
    assert endpoint.tell(Probed(1, "ready")) == [Route({1: 100}), MarkState("ready")]
    assert endpoint.tell(Probed(2, "unreachable")) == [AskAgent(2)]
    assert only(StartReplica, endpoint.lose(2, "its agent does not know it")) == [StartReplica(4, wanted)]


# --- several revisions ---


def test_another_revision_takes_over_when_it_is_ready_and_the_old_one_may_finish() -> None:
    endpoint = Endpoint(ONE)
    endpoint.make_ready(1)
    assert endpoint.tell(Desired((TWO,))) == [StartReplica(2, TWO)]
    assert endpoint.plan.state == "ready"
    said = endpoint.make_ready(2)
    assert only(Drain, said) == [Drain(1)] and only(Route, said) == [Route({2: 100})]
    assert only(StopReplica, endpoint.tell(Idle(1))) == [StopReplica(1, "revision 1 was replaced by revision 2")]
    endpoint.tell(Stopped(1))
    assert endpoint.states() == {2: "ready"}


def test_a_replica_that_never_finishes_is_stopped_when_it_had_time_enough() -> None:
    endpoint = Endpoint(ONE)
    endpoint.make_ready(1)
    endpoint.tell(Desired((TWO,)))
    endpoint.make_ready(2)
    said = endpoint.wait(30)
    assert only(StopReplica, said) == [StopReplica(1, "revision 1 was replaced by revision 2")]


def test_a_revision_that_cannot_be_loaded_leaves_the_one_that_serves_in_place_and_says_why() -> None:
    endpoint = Endpoint(ONE)
    endpoint.make_ready(1)
    endpoint.tell(Desired((TWO,)))
    said = endpoint.lose(2, "no such model", lasting=True)
    assert MarkState("ready", "no such model") in said
    assert endpoint.states() == {1: "ready"} and only(StopReplica, said) == [StopReplica(2, "no such model")]


def test_requests_are_shared_by_weight_and_a_weight_of_nothing_gets_none() -> None:
    endpoint = Endpoint(dataclasses.replace(ONE, weight=90), dataclasses.replace(TWO, weight=10))
    endpoint.make_ready(1)
    assert Route({1: 90, 2: 10}) in endpoint.make_ready(2)
    none = dataclasses.replace(TWO, weight=0)
    assert endpoint.tell(Desired((dataclasses.replace(ONE, weight=100), none))) == [Route({1: 100})]


def test_fewer_replicas_let_those_go_that_are_not_ready_and_then_the_newest() -> None:
    endpoint = Endpoint(dataclasses.replace(ONE, num_replicas=4))
    endpoint.make_ready(1, 2, 4)
    said = endpoint.tell(Desired((dataclasses.replace(ONE, num_replicas=2),)))
    assert only(StopReplica, said) == [StopReplica(3, "the endpoint was given fewer replicas")]
    assert only(Drain, said) == [Drain(4)]
    endpoint.tell(Stopped(3), Idle(4), Stopped(4))
    assert endpoint.states() == {1: "ready", 2: "ready"} and endpoint.wait(0.5) == []


def test_the_revision_of_the_highest_priority_starts_first() -> None:
    endpoint = Endpoint(ONE, dataclasses.replace(TWO, priority=5))
    assert [start.revision.number for start in only(StartReplica, endpoint.said)] == [2, 1]


def test_a_place_that_waits_for_its_turn_is_forgotten_with_its_revision() -> None:
    endpoint = Endpoint(ONE)
    endpoint.lose(1)
    endpoint.lose(2)
    assert endpoint.plan.replicas == {} and endpoint.plan.wake_at is not None
    endpoint.tell(Desired())
    assert endpoint.plan.is_over and endpoint.plan.wake_at is None


# --- one revision after the other ---


def revision(number: int, **options: Any) -> Revision:
    return Revision(number, f"/model-{number}", **options)


def test_a_revision_that_takes_the_place_of_another_has_all_its_replicas_before_the_last_one_of_that_goes() -> None:
    endpoint = Endpoint(revision(1, num_replicas=2))
    endpoint.make_ready(1, 2)
    said = endpoint.tell(Desired((revision(2, num_replicas=2),)))
    assert [start.replica for start in only(StartReplica, said)] == [3, 4] and not only(Drain, said)
    said = endpoint.make_ready(3)
    assert only(Drain, said) == [Drain(2)]
    assert only(Route, said)[-1] == Route({1: 100, 3: 100})  # the old one answers beside the new one
    assert (endpoint.plan.group_of(1), endpoint.plan.group_of(3)) == (2, 2)
    said = endpoint.make_ready(4)
    assert only(Drain, said) == [Drain(1)] and only(Route, said)[-1] == Route({3: 100, 4: 100})
    assert endpoint.plan.state == "ready"


def test_weights_of_the_same_shape_are_loaded_by_one_replica_after_the_other_and_nothing_is_started() -> None:
    endpoint = Endpoint(revision(1, num_replicas=2))
    endpoint.make_ready(1, 2)
    two = revision(2, num_replicas=2, in_place_of=1)
    assert endpoint.tell(Desired((two,))) == [ReloadReplica(1, two)]
    assert endpoint.plan.state == "ready"
    assert only(ReloadReplica, endpoint.tell(Reloaded(1, 2))) == [ReloadReplica(2, two)]
    said = endpoint.tell(Reloaded(2, 2))
    assert not only(StartReplica, said) and not only(Drain, said)
    assert {replica.revision for replica in endpoint.plan.replicas.values()} == {2}
    assert not only(ReloadReplica, endpoint.wait(30))


def test_a_replica_that_keeps_its_weights_is_replaced_by_one_that_has_the_new_ones() -> None:
    endpoint = Endpoint(revision(1))
    endpoint.make_ready(1)
    two = revision(2, in_place_of=1)
    endpoint.tell(Desired((two,)))
    said = endpoint.tell(Reloaded(1, 2, refused="another shape"))
    assert only(StartReplica, said) == [StartReplica(2, two)] and not only(Drain, said)
    assert only(Drain, endpoint.make_ready(2)) == [Drain(1)]


def test_a_replica_lost_while_it_loads_other_weights_has_a_successor_with_these() -> None:
    endpoint = Endpoint(revision(1))
    endpoint.make_ready(1)
    two = revision(2, in_place_of=1)
    endpoint.tell(Desired((two,)))
    assert StartReplica(2, two) in endpoint.lose(1) + endpoint.wait(5)
    endpoint.make_ready(2)
    assert endpoint.plan.state == "ready"


def test_an_update_that_cannot_be_loaded_is_withdrawn_while_the_one_before_it_answers() -> None:
    one = revision(1)
    endpoint = Endpoint(one)
    endpoint.make_ready(1)
    endpoint.tell(Desired((revision(2),)))
    endpoint.tell(Started(2))
    endpoint.wait(0.1)
    said = endpoint.tell(Probed(2, "failed", "the weights are of another shape"))
    [withdraw] = only(Withdraw, said)
    assert (withdraw.revision, "another shape" in withdraw.reason) == (2, True)
    assert not only(Withdraw, endpoint.wait(10))
    said = endpoint.tell(Desired((one,)))
    assert endpoint.plan.state == "ready" and not only(Drain, said) and not only(StartReplica, said)
    assert endpoint.states()[1] == "ready"


def test_a_canary_whose_requests_fail_is_withdrawn_and_gets_none_at_once() -> None:
    endpoint = Endpoint(revision(1, weight=95), revision(2, weight=5, role="canary"))
    endpoint.make_ready(1, 2)
    assert endpoint.plan._weights == {1: 95, 2: 5}
    said = endpoint.tell(RevisionFailed(2, "3 of its 3 requests failed"))
    assert only(Withdraw, said) == [Withdraw(2, "3 of its 3 requests failed")]
    assert only(Drain, said) == [Drain(2)] and only(Route, said) == [Route({1: 95})]
    assert endpoint.tell(RevisionFailed(7, "is not here")) == []


def test_a_revision_that_fails_alone_is_not_withdrawn_since_nothing_could_answer_in_its_place() -> None:
    endpoint = Endpoint(revision(1))
    endpoint.tell(Started(1))
    endpoint.wait(0.1)
    said = endpoint.tell(Probed(1, "failed", "no weights"))
    assert not only(Withdraw, said) and endpoint.plan.state == "failed"


def test_a_shadow_never_answers_not_even_when_it_is_the_last_one() -> None:
    endpoint = Endpoint(revision(1), revision(2, role="shadow", weight=0))
    endpoint.make_ready(1, 2)
    assert endpoint.plan._weights == {1: 100}
    assert only(Route, endpoint.lose(1)) == [Route({})]
    assert endpoint.plan.may_recover


def test_a_replica_for_which_there_is_no_room_is_tried_again_and_says_why_and_never_gives_up() -> None:
    endpoint = Endpoint(ONE)
    said = []
    for attempt in range(1, 30):
        said = endpoint.tell(NoRoom(attempt, "waits for room: 2 cores asked for, 1 is free"), Stopped(attempt))
        assert endpoint.plan.state == "starting" and endpoint.plan.reason.startswith("waits for room")
        assert not only(StartReplica, said)
        assert only(StartReplica, endpoint.wait(2.0)) == [StartReplica(attempt + 1, ONE)]
    endpoint.make_ready(30)
    assert (endpoint.plan.state, endpoint.plan.reason) == ("ready", "")


def test_an_endpoint_without_replicas_is_ready_to_start_one() -> None:
    endpoint = Endpoint(revision(1, min_replicas=0, max_replicas=2))
    endpoint.make_ready(1)
    said = endpoint.tell(Desired((revision(1, num_replicas=0, min_replicas=0, max_replicas=2),)))
    assert only(Drain, said) == [Drain(1)]
    endpoint.tell(Idle(1), Stopped(1))
    assert (endpoint.plan.state, endpoint.plan.may_recover) == ("ready", True)
    assert "next request" in endpoint.plan.reason and not endpoint.plan.is_over
    assert only(StartReplica, endpoint.tell(Desired((revision(1, min_replicas=0, max_replicas=2),))))


# --- a revision whose replicas are kept to be gone back to ---


def _with_previous(num_replicas: int = 1) -> tuple[Endpoint, Revision, Revision]:
    """Revision 2 has replaced revision 1, whose replicas wait."""
    one = dataclasses.replace(ONE, num_replicas=num_replicas)
    endpoint = Endpoint(one)
    endpoint.make_ready(*range(1, num_replicas + 1))
    previous = dataclasses.replace(one, role="previous", weight=0)
    endpoint.tell(Desired((previous, TWO)))
    endpoint.make_ready(num_replicas + 1)
    return endpoint, previous, TWO


def test_going_back_to_replicas_that_were_kept_is_a_matter_of_routing() -> None:
    endpoint, previous, _ = _with_previous()
    assert endpoint.states() == {1: "ready", 2: "ready"} and endpoint.plan.state == "ready"
    said = endpoint.tell(Desired((dataclasses.replace(previous, role="stable", weight=100),)))
    assert Route({1: 100}) in said and not only(StartReplica, said)
    assert endpoint.states() == {1: "ready", 2: "draining"}


def test_replicas_that_are_kept_answer_until_the_new_ones_do_and_no_longer() -> None:
    endpoint = Endpoint(ONE)
    endpoint.make_ready(1)
    said = endpoint.tell(Desired((dataclasses.replace(ONE, role="previous", weight=0), TWO)))
    assert not only(Route, said)  # it is as it was
    assert Route({2: 100}) in endpoint.make_ready(2)


def test_a_replica_that_was_kept_and_is_lost_has_no_successor() -> None:
    endpoint, *_ = _with_previous(num_replicas=2)
    said = [*endpoint.lose(1), *endpoint.wait(60)]
    assert not only(StartReplica, said) and endpoint.plan.state == "ready"
    said = endpoint.lose(3)
    assert [start.revision.number for start in only(StartReplica, said)] == [2]  # the one that answers has


def test_replicas_that_are_kept_do_not_answer_for_an_endpoint_that_waits_to_be_woken() -> None:
    endpoint, previous, two = _with_previous()
    assert Route({}) in endpoint.tell(Desired((previous, dataclasses.replace(two, num_replicas=0))))
    said = [*endpoint.tell(Idle(2)), *endpoint.tell(Stopped(2))]
    assert not only(Route, said) and endpoint.states() == {1: "ready"}
