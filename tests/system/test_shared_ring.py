"""The ring of metrics between a rank and its agent."""

from __future__ import annotations

import os
import random
import signal
import threading

import pytest

from jupyter_llmcloud.system.shared_ring import SIZE, RingReader, RingWriter, create_ring


def test_records_come_out_as_they_went_in_also_around_the_end() -> None:
    """Several times the ring's size of records of random length arrive complete and in order."""
    fd = create_ring()
    writer, reader = RingWriter(fd), RingReader(fd)
    source = random.Random(0)
    total = 0
    while total < 3 * SIZE:
        batch = [source.randbytes(source.randrange(0, 5000)) for _ in range(50)]
        for record in batch:
            writer.write(record)
        assert reader.read() == batch
        total += sum(map(len, batch))


def test_a_full_ring_makes_the_writer_wait_for_the_reader() -> None:
    """Nothing is overwritten: the writer goes on when the reader has caught up."""
    fd = create_ring()
    writer, reader = RingWriter(fd), RingReader(fd)
    records = [bytes([i % 256]) * 1000 for i in range(3 * SIZE // 1000)]
    thread = threading.Thread(target=lambda: [writer.write(record) for record in records])
    thread.start()
    found: list[bytes] = []
    while len(found) < len(records):
        found += reader.read()
    thread.join(10)
    assert found == records


def test_a_record_that_can_never_fit_is_refused() -> None:
    """It would wait for ever."""
    with pytest.raises(ValueError, match="does not fit"):
        RingWriter(create_ring()).write(b"x" * SIZE)


def test_a_killed_writer_has_lost_nothing_it_wrote() -> None:
    """What was written before SIGKILL is read after it."""
    fd = create_ring()
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        writer = RingWriter(fd)
        for number in range(1000):
            writer.write(str(number).encode())
        os.write(tell, b"+")
        signal.pause()
    assert os.read(ready, 1) == b"+"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert RingReader(fd).read() == [str(number).encode() for number in range(1000)]
