"""What a leader and a follower say to each other outlives connections, not leases: by values."""

from __future__ import annotations

import random
from collections.abc import Sequence

from jupyter_llmcloud.core.scheduling.lease_link import MAX_KEPT, PATIENCE, LeaseLink, LinkHeader

LEASE_S = 10.0


def test_messages_are_sent_again_until_they_are_heard_and_heard_once() -> None:
    here, there = LeaseLink(LEASE_S, 0.0), LeaseLink(LEASE_S, 0.0)
    sent = [(here.send(message, 1.0), message) for message in (b"a", b"b", b"c")]
    assert there.hear(sent[0][0], 1.0)
    again = here.again(there.received, 2.0)
    assert [message for _, message in again] == [b"b", b"c"]
    assert [there.hear(header, 2.0) for header, _ in again] == [True, True]
    assert not there.hear(sent[1][0], 2.0)
    here.hear(there.header(3.0), 3.0)
    assert here.again(there.received, 4.0) == []


def test_a_follower_counts_on_what_was_proven_not_on_what_has_come() -> None:
    leader, follower = LeaseLink(LEASE_S, 0.0), LeaseLink(LEASE_S, 100.0)
    leader.hear(follower.header(104.0), 4.0)
    follower.hear(leader.header(5.0), 105.0)
    assert follower.expires_at == 114.0
    for now in range(6, 13):  # only this direction works: the leader has heard nothing since
        follower.hear(leader.header(float(now)), 100.0 + now)
    assert follower.expires_at == 114.0
    assert follower.check(113.9)
    assert not follower.check(114.0)
    assert not follower.check(100.0), "once over, for ever"


def test_a_leader_gives_up_only_after_a_silence() -> None:
    leader = LeaseLink(LEASE_S, 0.0)
    assert not leader.is_given_up(PATIENCE * LEASE_S)
    assert leader.is_given_up(PATIENCE * LEASE_S + 0.1)
    assert not leader.hear(LinkHeader(1, 0, 1.0, 0.0), 13.0), "messages that come later are not heard"


def test_one_that_was_itself_asleep_does_not_go_on_with_what_had_queued() -> None:
    follower = LeaseLink(LEASE_S, 0.0)
    late = [LinkHeader(0, 0, float(now), 0.0) for now in range(1, 20)]
    heard = [follower.hear(header, 50.0) for header in late]
    assert not any(heard)
    assert not follower.check(50.0)


def test_too_many_messages_for_one_that_cannot_be_reached_end_the_link() -> None:
    leader = LeaseLink(LEASE_S, 0.0)
    for _ in range(MAX_KEPT // (16 << 20) + 1):
        leader.send(bytes(16 << 20), 1.0)
    assert leader.is_given_up(1.0)


class Network:
    """Two ends with clocks of their own; what they say is delayed, lost and reordered."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self._offset, self._drift = self.draw.uniform(-1e6, 1e6), self.draw.uniform(0.9, 1.1)
        self.leader, self.other = LeaseLink(LEASE_S, 0.0), LeaseLink(LEASE_S, self._offset)
        self._under_way: list[tuple[float, LeaseLink, LinkHeader]] = []

    def theirs(self, now: float) -> float:
        """The time of the other end."""
        return self._offset + self._drift * now

    def carry(self, now: float, loss: Sequence[float]) -> None:
        """Each end says something, which is lost with a probability: the leader's, the other's; what is due is heard."""
        for end, to, chance in ((self.leader, self.other, loss[0]), (self.other, self.leader, loss[1])):
            if not end.over and self.draw.random() > chance:
                header = end.header(now if end is self.leader else self.theirs(now))
                self._under_way.append((now + self.draw.expovariate(0.3), to, header))
        for item in [item for item in self._under_way if item[0] <= now]:
            self._under_way.remove(item)
            item[1].hear(item[2], now if item[1] is self.leader else self.theirs(now))


def test_whatever_the_network_does_the_follower_has_ended_when_the_leader_gives_up() -> None:
    num_given_up = 0
    for seed in range(400):
        network = Network(seed)
        draw = network.draw
        loss = [draw.uniform(0, 1), draw.uniform(0, 1)]
        gave_up = ended = None
        for now in range(50):
            if now > draw.randrange(5, 40):
                loss = [draw.choice([0.0, 0.5, 1.0]), draw.choice([0.0, 0.5, 1.0])]
            if gave_up is None and network.leader.is_given_up(now):
                gave_up = now
            if ended is None and not network.other.check(network.theirs(now)):
                ended = now
            network.carry(now, loss)
        if gave_up is not None:
            num_given_up += 1
            assert ended is not None and ended <= gave_up + 1, seed
    assert num_given_up > 100


def test_whatever_the_network_does_no_other_end_leads_while_the_leader_counts_on_it() -> None:
    """Whoever stands by takes over after a silence, by which the leader has stopped or has claimed anew."""
    num_taken = 0
    for seed in range(400):
        network = Network(seed)
        silent_from = [network.draw.randrange(5, 30), network.draw.randrange(5, 60)]
        for now in range(90):
            if network.theirs(now) >= network.other.takes_over_at:
                num_taken += 1
                assert now > network.leader.leads_until, seed
                assert network.leader.is_given_up(now) or network.leader.is_unheard(now), seed
                break
            network.carry(now, [0.2 if now < silent else 1.0 for silent in silent_from])
    assert num_taken > 300
