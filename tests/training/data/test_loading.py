"""`lc.data.load`: each rank its part, every row once an epoch; resumed at any step, on any number of ranks."""

from __future__ import annotations

import itertools
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

import jupyter_llmcloud as lc
from jupyter_llmcloud.errors import LLMCloudError, NotFound, UsageError
from jupyter_llmcloud.storage.checkpoints import CheckpointFolder
from jupyter_llmcloud.storage.datasets import manifest
from jupyter_llmcloud.storage.datasets.manifest import Manifest, Shard, Tokenizer
from jupyter_llmcloud.storage.datasets.shards import ShardWriter
from jupyter_llmcloud.training.data.loading import collated, load
from jupyter_llmcloud.training.data.shard_dataset import _decoded
from tests.support.worlds import Outcome, Ranks

NUM_ROWS = 103
SEQ_LEN = 4


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards of tokens: row 7 is [7, 7, 7, 7]; the last one has two tokens only."""
    folder = tmp_path_factory.mktemp("prepared")
    schema = pa.schema([("input_ids", pa.list_(pa.uint16(), SEQ_LEN)), ("length", pa.int32())])
    made = []
    for name, rows in (("a", range(40)), ("b", range(40, 41)), ("c", range(41, NUM_ROWS))):
        with ShardWriter(str(folder / "shards" / f"{name}.parquet"), schema) as writer:
            for start in range(rows.start, rows.stop, 9):
                part = np.arange(start, min(start + 9, rows.stop), dtype=np.uint16)
                ids = pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(part, SEQ_LEN)), SEQ_LEN)
                lengths = np.where(part == NUM_ROWS - 1, 2, SEQ_LEN).astype(np.int32)
                writer.write({"input_ids": ids, "length": pa.array(lengths)})
            size, digest = writer.finish()
        made.append(Shard(name=f"{name}.parquet", key=name, rows=writer.rows, bytes=size, sha256=digest))
    told = Tokenizer(name="letters", fingerprint="f", vocab_size=200)
    columns = {"input_ids": "list", "length": "int32"}
    kept = Manifest(kind="tokens", columns=columns, seq_len=SEQ_LEN, recipe={}, tokenizer=told, sources=[], shards=made)
    manifest.write(str(folder), kept)
    return str(folder)


def rows_of(batch: dict[str, torch.Tensor]) -> list[int]:
    return [int(row) for row in batch["input_ids"][:, 0]]


def epoch_of(source: Any, world_size: int, **options: Any) -> list[list[list[int]]]:
    """What each rank is given in each step."""
    loaders = [lc.data.load(source, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    return [[rows_of(batch) for batch in loader] for loader in loaders]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_row_comes_once_in_an_epoch_in_as_many_steps_on_every_rank(
    prepared: str, world_size: int, streaming: bool
) -> None:
    ranks = epoch_of(prepared, world_size, batch_size=4, streaming=streaming, window=2)
    assert sorted(row for steps in ranks for batch in steps for row in batch) == list(range(NUM_ROWS))
    assert len({len(steps) for steps in ranks}) == 1


def test_the_same_global_batch_has_the_same_rows_on_any_number_of_ranks(prepared: str) -> None:
    by_size = [epoch_of(prepared, size, global_batch_size=12) for size in (1, 3, 4)]
    steps = [[sorted(itertools.chain(*batches)) for batches in zip(*ranks, strict=True)] for ranks in by_size]
    assert steps[0] == steps[1] == steps[2]


def test_epochs_differ_and_a_seed_repeats_them(prepared: str) -> None:
    loader, same = (lc.data.load(prepared, batch_size=8, seed=3) for _ in range(2))
    first, second = ([rows_of(batch) for batch in loader] for _ in range(2))
    assert first != second
    assert [[rows_of(batch) for batch in same] for _ in range(2)] == [first, second]
    assert [rows_of(batch) for batch in lc.data.load(prepared, batch_size=103, shuffle=False)] == [list(range(103))]


class Where(os.PathLike[str]):
    """What `lc.data.prepare` gives says by itself where the data is."""

    def __init__(self, at: str) -> None:
        self._at = at

    def __fspath__(self) -> str:
        return self._at


def test_prepared_data_is_loaded_as_it_was_given(prepared: str) -> None:
    assert len(lc.data.load(Where(prepared)).dataset) == NUM_ROWS


def test_filling_is_no_label(prepared: str) -> None:
    (batch,) = lc.data.load(prepared, batch_size=NUM_ROWS, shuffle=False)
    assert batch["labels"][-1].tolist() == [102, 102, -100, -100]
    assert batch["attention_mask"][-1].tolist() == [1, 1, 0, 0]
    assert torch.equal(batch["labels"][:-1], batch["input_ids"][:-1])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("before", [1, 3])
def test_another_number_of_ranks_goes_on_at_the_row_where_the_first_one_was(
    prepared: str, before: int, streaming: bool
) -> None:
    options = {"batch_size": 4, "streaming": streaming, "window": 2}
    loaders = [lc.data.load(prepared, rank=rank, world_size=before, **options) for rank in range(before)]
    for loader in loaders:
        list(loader)  # an epoch before
    used: list[int] = []
    states = []
    for loader in loaders:
        passing = iter(loader)
        used += [row for _ in range(5) for row in rows_of(next(passing))]
        states.append(loader.state_dict())
    assert all(state == states[0] for state in states)
    others = [lc.data.load(prepared, rank=rank, world_size=2, **options) for rank in range(2)]
    for loader in others:
        loader.load_state_dict(states[0])
    rest = [row for loader in others for batch in loader for row in rows_of(batch)]
    assert sorted(used + rest) == list(range(NUM_ROWS))
    assert others[0].state_dict()["epoch"] == 2


def test_a_place_behind_the_last_row_is_the_beginning_of_the_next_epoch(prepared: str) -> None:
    loader = lc.data.load(prepared, batch_size=50)
    states = [loader.state_dict() for _ in loader]
    assert [(state["epoch"], state["rows"]) for state in states] == [(0, 50), (0, 100), (1, 0)]


@pytest.mark.parametrize("source", [lambda at: at, lambda at: Counting()], ids=["prepared", "a stream"])
@pytest.mark.parametrize("last", ["share", "pad", "drop"])
def test_behind_the_last_step_the_next_epoch_comes_whatever_was_left(prepared: str, last: str, source: Any) -> None:
    """Rows that fill no step are dropped, or nobody knows how many a stream has."""

    def made() -> Any:
        return lc.data.load(source(prepared), 5, last=last)

    loader = made()
    *_, state = [loader.state_dict() for _ in loader]
    wanted = [[rows.tolist() for rows in map(first_column, loader)] for _ in range(2)]
    again = made()
    again.load_state_dict(state)
    assert [[rows.tolist() for rows in map(first_column, again)] for _ in range(2)] == wanted


def first_column(batch: Any) -> torch.Tensor:
    return batch["input_ids"][:, 0] if isinstance(batch, dict) else batch


@pytest.mark.parametrize(("last", "counted"), [("share", 103), ("pad", 103), ("drop", 100)])
def test_metrics_are_gathered_of_every_row_that_came(prepared: str, last: str, counted: int) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(lc.data.load(prepared, 10, last=last))
    gathered = [accelerator.gather_for_metrics(batch["input_ids"][:, 0]) for batch in loader]
    rows = torch.cat(gathered).tolist()
    assert len(rows) == len(set(rows)) == counted
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_a_place_in_other_data_or_another_order_is_refused(prepared: str) -> None:
    state = lc.data.load(prepared, seed=1).state_dict()
    with pytest.raises(UsageError, match="in other data, or in another order"):
        lc.data.load(prepared, seed=2).load_state_dict(state)


def test_accelerate_takes_it_as_it_is(prepared: str) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    loader = lc.data.load(prepared, batch_size=10)
    model = torch.nn.Linear(1, 1)
    assert accelerator.prepare(loader) is loader
    synced = []
    for _ in loader:
        with accelerator.accumulate(model):
            synced.append(accelerator.sync_gradients)
    assert synced == [False, False, False, True] * 2 + [False, False, True], "the last one is known to be it"
    assert loader.total_batch_size == 10
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Squares(Dataset[dict[str, Any]]):
    """A map-style data set of the user's own."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, at: int) -> dict[str, Any]:
        return {"x": float(at), "name": f"row {at}"}


def test_a_column_of_lists_is_a_tensor_of_rows_and_of_several_lengths_or_no_numbers_stays_lists() -> None:
    rows = [{"x": [1.0, 2.0, 3.0], "ids": [1], "who": ["a"]}, {"x": [4.0, 5.0, 6.0], "ids": [1, 2], "who": ["b"]}]
    batch = collated(rows)
    assert batch["x"].tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert (batch["ids"], batch["who"]) == ([[1], [1, 2]], [["a"], ["b"]])


def test_a_column_of_objects_is_a_batch_of_each_of_their_fields() -> None:
    rows = [{"meta": {"n": 1, "tags": ["a"], "at": [1, 2]}}, {"meta": {"n": 2, "tags": [], "at": [3, 4]}}]
    batch = collated(rows)["meta"]
    assert (batch["n"].tolist(), batch["tags"], batch["at"].tolist()) == ([1, 2], [["a"], []], [[1, 2], [3, 4]])
    assert collated([rows[0], {"meta": None}])["meta"] == [rows[0]["meta"], None]


@pytest.mark.parametrize("values", [[1, None], [None, 1], [1.5, None], ["a", None], [True, None]], ids=str)
def test_a_column_with_something_missing_stays_a_list(values: list[Any]) -> None:
    assert collated([{"x": value} for value in values])["x"] == values


def test_a_list_of_numbers_one_of_which_is_missing_is_no_number() -> None:
    assert _decoded(pa.chunked_array([pa.array([[1, None]], pa.list_(pa.int64(), 2))])) == [[1, None]]


def test_a_collator_of_other_people_is_given_a_list_of_rows(prepared: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(200)} | {"<mask>": 200, "<pad>": 201}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words)), mask_token="<mask>", pad_token="<pad>"
    )
    batch = next(iter(lc.data.load(prepared, 4, collate_fn=DataCollatorForLanguageModeling(made))))
    assert batch["input_ids"].shape == batch["labels"].shape == (4, SEQ_LEN)


class Counting(IterableDataset[int]):
    """A stream of the user's own."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(23))


def test_a_data_set_of_ones_own_is_shared_and_shuffled() -> None:
    loaders = [lc.data.load(Squares(), 3, rank=rank, world_size=3) for rank in range(3)]
    rows = [int(x) for loader in loaders for batch in loader for x in batch["x"]]
    assert sorted(rows) == list(range(23)) and rows != sorted(rows)
    assert next(iter(loaders[0]))["name"][0].startswith("row ")


@pytest.mark.parametrize("last", ["share", "pad", "drop"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_stream_is_shared_over_ranks(world_size: int, last: str) -> None:
    loaders = [lc.data.load(Counting(), 4, rank=rank, world_size=world_size, last=last) for rank in range(world_size)]
    ranks = [[batch.tolist() for batch in loader] for loader in loaders]
    assert len({len(steps) for steps in ranks}) == 1
    taken = Counter(row for steps in ranks for batch in steps for row in batch)
    if last == "drop":
        assert sorted(taken) == list(range(23 // (4 * world_size) * 4 * world_size))
    else:
        assert sorted(taken) == list(range(23))
    assert last == "pad" or max(taken.values()) == 1


class Mixed(Counting):
    """Its shuffle is not that of Hugging Face, but takes the size of a buffer."""

    def shuffle(self, size: int) -> Mixed:
        raise AssertionError(size)


def test_a_stream_whose_shuffle_means_something_else_keeps_its_order() -> None:
    assert next(iter(lc.data.load(Mixed(), 4))).tolist() == [0, 1, 2, 3]


def test_a_stream_that_is_split_already_is_refused() -> None:
    stream: Any = Counting()
    stream._distributed = (0, 2)  # as split_dataset_by_node of Hugging Face's datasets leaves it
    with pytest.raises(UsageError, match=r"split_dataset_by_node.*Give the whole stream"):
        load(stream, 4, rank=0, world_size=2)


def test_a_stream_goes_on_at_its_row_with_another_number_of_ranks() -> None:
    loader = lc.data.load(Counting(), 4)
    used = [batch.tolist() for batch in itertools.islice(loader, 2)]
    again = lc.data.load(Counting(), 4)
    state = {**again.state_dict(), "rows": 8}
    others = [lc.data.load(Counting(), 5, rank=rank, world_size=2) for rank in range(2)]
    for other in others:
        other.load_state_dict(state)
    rest = [row for other in others for batch in other for row in batch.tolist()]
    assert sorted([*itertools.chain(*used), *rest]) == list(range(23))


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda at: lc.data.load(f"{at}/none"), NotFound, "holds no prepared data"),
        (lambda at: lc.data.load(at, 8, global_batch_size=8), UsageError, "give one"),
        (lambda at: lc.data.load(at, 0), UsageError, "batch_size=0"),
        (lambda at: lc.data.load(at, columns=["x"]), UsageError, "has input_ids, length"),
        (lambda at: lc.data.load(at, tokenizer=lambda text: [1]), UsageError, "made by another tokenizer"),
        (lambda at: lc.data.load(at, rank=2, world_size=2), UsageError, "the rank below the size"),
        (lambda at: lc.data.load(at, rank=0, world_size=200), UsageError, "103 rows for 200 ranks"),
        (lambda at: lc.data.load(7), UsageError, "int is no data set"),
        (lambda at: lc.data.load({"train": [1], "test": [2]}), UsageError, r"by name \('train', 'test'\): give one"),
        (lambda at: lc.data.load(pa.table({"x": [1]})), UsageError, "Table is a table: give its rows"),
        (lambda at: lc.data.load(at, seed=None), UsageError, "seed=None: expected a whole number"),
        (lambda at: lc.data.load(Counting(), shuffle=True), UsageError, "cannot be shuffled"),
        (lambda at: lc.data.load(Squares(), columns=["x"]), UsageError, "columns= is for prepared data"),
    ],
)
def test_what_is_not_possible_is_said_before_training(
    prepared: str, make: Any, error: type[LLMCloudError], told: str
) -> None:
    with pytest.raises(error, match=told):
        make(prepared)


def test_a_worker_process_that_is_forked_behind_the_first_read_reads_by_itself(prepared: str) -> None:
    loader = load(prepared, 4, streaming=True, window=1, rank=0, world_size=1)
    dataset = loader.base_dataloader.dataset
    assert dataset[0]["input_ids"].numel()  # by a thread, which is not there in the worker
    if not (child := os.fork()):  # as loaders of torch start their workers
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        try:
            os._exit(0 if dataset[len(dataset) - 1]["input_ids"].numel() else 1)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    dataset.close()


def test_a_loader_lets_go_of_its_threads(prepared: str) -> None:
    loader = lc.data.load(prepared, 8)
    list(loader)
    loader.dataset.close()
    assert len(loader.dataset) == NUM_ROWS and loader.dataset[-1]["input_ids"][0] == 102
    loader.dataset.close()


ROWS = """
import torch
import jupyter_llmcloud as lc

class Rows(torch.utils.data.Dataset):
    def __len__(self): return 23
    def __getitem__(self, at): return at

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter(range(23))

rows = [[batch.tolist() for batch in lc.data.load(source, 3)] for source in (Rows(), Stream())]
"""


@pytest.mark.parametrize(("plan", "num_shares"), [("tp:2", 1), ("pipeline:2", 1), ("fsdp", 2)])
def test_ranks_that_compute_a_batch_together_are_given_the_same_rows(world: Ranks, plan: str, num_shares: int) -> None:
    world.ok(ROWS, plan=plan)
    for steps in zip(world.pull("rows", 0), world.pull("rows", 1), strict=True):
        assert (steps[0] == steps[1]) == (num_shares == 1)
        assert all(len(batch) == 3 for batch in steps[0][:3])
        taken = [row for own in steps[:num_shares] for batch in own for row in batch]
        assert sorted(taken) == list(range(23))


CELL = """
import os, signal, torch
from accelerate import Accelerator
import jupyter_llmcloud as lc

accelerator = Accelerator()
model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
loader = lc.data.load(DATA, batch_size=BATCH, streaming=STREAMING)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
turn = 0
for epoch in range(2):
    for batch in loader:
        accelerator.backward(model(batch["input_ids"][:, :1].float() / 100).mean())
        optimizer.step()
        optimizer.zero_grad()
        turn += 1
        for row in batch["input_ids"][:, 0].tolist():
            print("took", turn, epoch, row)
        if turn == DIE and rank == 1:
            while not any((run.folder / "checkpoints").glob("step-16")):
                pass
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_that_is_resumed_on_more_ranks_and_other_batches_takes_every_row_once(
    prepared: str, new_world: Callable[..., Ranks]
) -> None:
    """It dies in the second epoch: the first one is whole, and so is what the two worlds take of the second."""

    def cell(**values: Any) -> str:
        return "".join(f"{name} = {value!r}\n" for name, value in values.items()) + CELL

    def took(outcome: Outcome, ranks: int) -> list[list[int]]:
        lines = [line for rank in range(ranks) for line in outcome.text(rank).splitlines() if line.startswith("took")]
        return [[int(word) for word in line.split()[1:]] for line in lines]

    two, three = new_world(2), new_world(3)
    broken = two.run(cell(DATA=prepared, BATCH=4, STREAMING=True, DIE=18), checkpoint_every=4)
    newest, _ = CheckpointFolder(broken.folder.path / "checkpoints").newest()
    assert broken.state == "failed" and newest is not None and newest.step >= 16
    saved = {"folder": str(newest.path), "step": newest.step}
    resumed = three.ok(cell(DATA=prepared, BATCH=5, STREAMING=True, DIE=0), resume=saved)
    rows = [took_one for took_one in took(broken, 2) if took_one[0] <= newest.step] + took(resumed, 3)
    for epoch in range(2):
        assert sorted(row for _, of, row in rows if of == epoch) == list(range(NUM_ROWS)), f"epoch {epoch}"
    other = three.run(cell(DATA=prepared, BATCH=5, STREAMING=False, DIE=0), resume=saved)
    assert "the saved place is in other data" in other.error["evalue"]
