"""What the end of a script waits for."""

from __future__ import annotations

import threading
import time
import weakref
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from jupyter_llmcloud.training.shell.program_end import ProgramEnd


@pytest.mark.parametrize("kind", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_a_pool_that_nobody_has_shut_down_is_waited_for_until_its_work_is_done(kind: type[Executor]) -> None:
    end = ProgramEnd()
    end.begin()
    pool = kind(2)  # type: ignore[call-arg]
    work = [pool.submit(time.sleep, 0.05) for _ in range(6)]
    ending = threading.Thread(target=end.come, args=(True,), daemon=True)
    ending.start()
    ending.join(30)
    assert not ending.is_alive() and all(one.done() for one in work)
    pool.shutdown()


def test_a_thread_is_waited_for() -> None:
    end = ProgramEnd()
    end.begin()
    told: list[int] = []
    thread = threading.Timer(0.3, told.append, (1,))
    thread.start()
    end.come(True)
    assert told == [1]


def test_a_weak_proxy_whose_object_is_gone_does_not_keep_a_script_from_ending() -> None:
    end = ProgramEnd()
    end.begin()
    left_behind = weakref.proxy(threading.Event())  # as torch.compile leaves some
    end.come(True)
    assert type(left_behind) is weakref.ProxyType
