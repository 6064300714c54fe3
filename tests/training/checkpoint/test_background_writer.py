"""A checkpoint is written by a thread: what is copied when, what is told of it, when no more are tried."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest
import torch

from jupyter_llmcloud.protocol.frames import replace
from jupyter_llmcloud.protocol.rank_messages import CheckpointPart
from jupyter_llmcloud.training.checkpoint.background_writer import BackgroundWriter
from jupyter_llmcloud.training.checkpoint.stager import Stager

LARGE = 5000
PART = CheckpointPart(run_id="r", step=4, attempt=0, serial=1, metric=None, mode="min", resumable=True)


class Sender:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.fixture
def sender() -> Sender:
    return Sender()


@pytest.fixture
def writer(sender: Sender) -> BackgroundWriter:
    return BackgroundWriter(cast("Any", sender))


def test_large_tensors_are_copied_when_they_are_handed_over_and_small_ones_at_once() -> None:
    stager, large, small = Stager(), torch.zeros(LARGE), torch.zeros(2)
    copies = stager.copy_later("large", large), stager.copy_later("small", small)
    large += 1
    small += 1
    stager.hand_over()()
    assert [int(copy.sum()) for copy in copies] == [LARGE, 0]


def test_the_memory_of_a_copy_is_used_again_by_the_next_checkpoint() -> None:
    stager, value = Stager(), torch.zeros(8)
    assert stager.copy("a", value).data_ptr() == stager.copy("a", value + 1).data_ptr()
    assert stager.copy("a", torch.zeros(9)).shape == (9,)


def test_no_optimizer_steps_before_the_copies_are_made(writer: BackgroundWriter) -> None:
    weight, may_copy, has_waited = torch.zeros(LARGE), threading.Event(), threading.Event()
    copy = writer.stager.copy_later("weight", weight)
    finish = writer.stager.hand_over()

    def write() -> CheckpointPart:
        may_copy.wait(10)
        finish()
        return PART

    def step() -> None:
        writer.before_step()
        weight.add_(1)
        has_waited.set()

    writer.write(PART, write)
    stepping = threading.Thread(target=step)
    stepping.start()
    assert not has_waited.wait(0.3)
    may_copy.set()
    stepping.join(10)
    writer.wait()
    assert has_waited.is_set()
    assert int(copy.sum()) == 0


def test_a_step_does_not_wait_for_copies_that_nobody_makes(writer: BackgroundWriter) -> None:
    writer.stager.copy_later("weight", torch.zeros(LARGE))
    writer.stager.hand_over()  # an interrupt comes before the thread begins
    writer.before_step()


def test_what_was_written_is_sent_and_so_is_what_went_wrong(writer: BackgroundWriter, sender: Sender) -> None:
    written = replace(PART, files={"rank-0000.pt": (1, "hash")})

    def fail() -> CheckpointPart:
        raise OSError(28, "No space left on device")

    for write in (lambda: written, fail):
        writer.write(PART, write)
        writer.wait()
    assert sender.sent[0].cpu_s > 0  # by which the next one is due
    assert [replace(sent, cpu_s=0.0) for sent in sender.sent] == [
        written,
        replace(PART, error="No space left on device"),
    ]


def test_no_more_are_tried_after_one_that_cannot_be_saved(writer: BackgroundWriter, sender: Sender) -> None:
    writer.refuse(PART, ValueError("no"))
    writer.wait()
    assert writer.has_given_up
    assert [part.error for part in sender.sent] == ["ValueError: no"]
    writer.clear()
    assert not writer.has_given_up


def test_ranks_that_are_out_of_step_are_waited_for_three_times_in_a_row(writer: BackgroundWriter) -> None:
    for late in (1, 2):
        writer.refuse(PART, TimeoutError())
        assert not writer.has_given_up, late
    writer.write(PART, lambda: PART)
    for _ in range(3):
        assert not writer.has_given_up
        writer.refuse(PART, TimeoutError())
    assert writer.has_given_up
    writer.wait()


def test_whoever_has_not_much_time_waits_for_a_moment_and_is_waited_for_later(
    writer: BackgroundWriter, sender: Sender
) -> None:
    may_write = threading.Event()

    def write() -> CheckpointPart:
        may_write.wait()
        return PART

    writer.write(PART, write)
    writer.wait(0.01)
    assert writer.is_busy and not sender.sent
    may_write.set()
    writer.wait()
    assert not writer.is_busy and len(sender.sent) == 1
