"""Loader workers that are started by spawn or forkserver know what the cell has defined, or the error says what to do."""

from __future__ import annotations

import re

import pytest

from tests.support.worlds import Ranks

DEFINITIONS = """
import dataclasses, threading
import torch, torch.multiprocessing
from torch.utils.data import DataLoader, Dataset, Sampler

SCALE = 2

@dataclasses.dataclass
class Batch:
    rows: torch.Tensor
    worker: int

class Base(Dataset):
    def __len__(self): return 16

class Squares(Base):
    def __getitem__(self, i): return torch.tensor(i * i)

class Backwards(Sampler):
    def __iter__(self): return iter(range(15, -1, -1))
    def __len__(self): return 16

started = None
def note(worker):
    global started
    started = worker * SCALE

def gather(batch): return torch.stack(batch).sum()
def wrap(batch): return Batch(torch.stack(batch) * SCALE, started)
"""
CONTEXTS = [
    "fork",
    pytest.param("spawn", marks=pytest.mark.story),  # each worker imports torch
    pytest.param("forkserver", marks=pytest.mark.soak),
]


@pytest.fixture(scope="module")
def defined(world: Ranks) -> Ranks:
    world.ok(DEFINITIONS)
    return world


@pytest.mark.parametrize("context", CONTEXTS)
def test_workers_get_classes_functions_and_lambdas_of_the_cell(defined: Ranks, context: str) -> None:
    outcome = defined.send(
        f"""
        def total(**options):
            loader = DataLoader(Squares(), batch_size=4, num_workers=1, multiprocessing_context={context!r}, **options)
            return sum(int(x.sum()) for x in loader)
        shift = 1
        print(total(), total(collate_fn=gather), total(collate_fn=lambda b: torch.stack(b).sum() + shift, shuffle=True))
        loader = DataLoader(Squares(), batch_size=4, num_workers=2, sampler=Backwards(), collate_fn=wrap,
                            worker_init_fn=note, multiprocessing_context={context!r})
        batches = list(loader)
        print([b.rows.tolist() for b in batches][0], [b.worker for b in batches], {{type(b) is Batch for b in batches}})
        """,
        ranks=[0],
    ).end(200)  # five times torch is imported by one that spawns, on a machine that may be busy
    assert outcome.state == "finished", outcome.error
    assert outcome.text(0).splitlines() == ["1240 1240 1244", "[450, 392, 338, 288] [0, 2, 0, 2] {True}"]


@pytest.mark.story
def test_forkserver_may_be_the_default_and_loops_may_be_tracked(defined: Ranks) -> None:
    outcome = defined.ok(
        """
        torch.multiprocessing.set_start_method("forkserver", force=True)
        class Sums(Base):
            def __getitem__(self, i):
                total = 0
                for number in range(i):
                    total += number
                return total
        print(sum(int(x.sum()) for x in DataLoader(Sums(), batch_size=4, num_workers=2, collate_fn=torch.tensor)))
        torch.multiprocessing.set_start_method("fork", force=True)
        """,
        ranks=[0],
        checkpoint_every=5,
    )
    assert outcome.text(0) == "560\n"


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_what_cannot_be_sent_is_named_with_both_ways_out(defined: Ranks, context: str) -> None:
    outcome = defined.run(
        f"""
        class Locked(Squares):
            def __init__(self): self.lock = threading.Lock()
        next(iter(DataLoader(Locked(), num_workers=1, multiprocessing_context={context!r})))
        """,
        ranks=[0],
    )
    assert outcome.error["ename"] == "PicklingError"
    assert re.search(
        r"'Locked' of the cell cannot be sent: cannot pickle '_thread.lock'.*module beside the notebook.*=\"fork\"",
        outcome.error["evalue"],
    )


def test_a_script_with_spawned_workers_is_not_run_again_in_them(defined: Ranks, tmp_path: object) -> None:
    outcome = defined.ok(
        f"""
        __file__ = {str(tmp_path)!r} + "/script.py"
        open(__file__, "w").write("raise SystemExit('this was run again')")
        print(sum(int(x.sum()) for x in DataLoader(Squares(), num_workers=1, multiprocessing_context="spawn")))
        del __file__
        """,
        ranks=[0],
    )
    assert outcome.text(0) == "1240\n"


@pytest.mark.parametrize("context", CONTEXTS)
def test_pools_get_functions_and_classes_of_the_cell(defined: Ranks, context: str) -> None:
    """Also those that were defined after the pool had begun, and defined anew, where the pool was not forked."""
    outcome = defined.ok(
        f"""
        import concurrent.futures, multiprocessing
        ours = multiprocessing.get_context({context!r})
        @dataclasses.dataclass
        class Row:
            number: int
        def double(row): return Row(SCALE * row.number)
        with ours.Pool(2) as pool, torch.multiprocessing.get_context({context!r}).Pool(1) as of_torch:
            rows = pool.map(double, [Row(1), Row(2)])
            print(rows, {{type(row) is Row for row in rows}}, of_torch.map(double, [Row(torch.ones(2))])[0].number.tolist())
            if {context!r} != "fork":
                def double(row): return Row(-row.number)
                print(pool.map(double, [Row(3)]), pool.map(lambda n: n + SCALE, [1]))
        with concurrent.futures.ProcessPoolExecutor(1, ours) as executor:
            print(executor.submit(double, Row(5)).result())
        """,
        ranks=[0],
    )
    first, *more = outcome.text(0).splitlines()
    assert first == "[Row(number=2), Row(number=4)] {True} [2.0, 2.0]"
    if context == "fork":
        assert more == ["Row(number=10)"]
    else:
        assert more == ["[Row(number=-3)] [3]", "Row(number=-5)"]


def test_a_function_that_a_pool_cannot_be_sent_is_named_with_both_ways_out(defined: Ranks) -> None:
    outcome = defined.run(
        """
        import multiprocessing
        lock = threading.Lock()
        def locked(number):
            with lock: return number
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.map(locked, [1])
        """,
        ranks=[0],
    )
    assert outcome.error["ename"] == "PicklingError"
    assert re.search(
        r"'locked' of the cell cannot be sent: cannot pickle '_thread.lock'.*=\"fork\"", outcome.error["evalue"]
    )
