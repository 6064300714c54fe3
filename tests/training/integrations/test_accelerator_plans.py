"""What Accelerate's own calls give under a plan, by values."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader

from jupyter_llmcloud.core.parallel.plan import parse_plan
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.integrations import accelerator_plans, cut_tensors
from jupyter_llmcloud.training.parallel.strategies.active import ACTIVE
from jupyter_llmcloud.training.parallel.strategies.microbatches import PipelinedModel, Stage

MANY = 100_000_001  # more than a float32 holds exactly


class Workers:
    """An asynchronous plan whose two workers have the same value."""

    is_asynchronous = True
    plan = parse_plan("async-ps:4")
    world_size, data_rank = 2, (0, 2)

    def shared_pass(self, loader: Any, own: Any) -> Any:
        return own

    def gathered(self, value: torch.Tensor) -> list[torch.Tensor]:
        return [value, value]

    def wait_for_everyone(self) -> None:
        pass


@pytest.fixture
def active() -> Iterator[Any]:
    yield ACTIVE
    ACTIVE.strategy = None


@pytest.mark.parametrize(
    ("strategy", "total"),
    [
        (Workers(), 2 * MANY),
        (SimpleNamespace(world_size=2, data_rank=(0, 1), is_asynchronous=False), MANY),
    ],
    ids=["async-ps", "tp"],
)
def test_a_count_that_is_summed_up_stays_a_count(active: Any, strategy: Any, total: int) -> None:
    active.strategy = strategy
    reduce = accelerator_plans._make_reduce(lambda self, tensor, reduction, scale: tensor * 2)
    found = reduce(None, torch.tensor([MANY]))
    assert found.dtype == torch.int64
    assert found.tolist() == [total]


def test_a_norm_that_is_not_finite_is_refused_where_the_cell_asks_for_that(active: Any) -> None:
    active.strategy = SimpleNamespace(total_norm=lambda norm, norm_type: norm)
    clip = cut_tensors._make_clip_grad_norm(torch.nn.utils.clip_grad_norm_)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, float("inf")])
    with pytest.raises(RuntimeError, match="non-finite"):
        clip([weight], 1.0, error_if_nonfinite=True)
    assert weight.grad.tolist() == [1.0, float("inf")], "as it was"


# --- what an Accelerator counts --------------------------------------------------------------------------------------

SHARING = SimpleNamespace(
    world_size=4, data_rank=(1, 2), is_asynchronous=False, cuts_models=True, plan=parse_plan("tp+fsdp:2")
)
APART = SimpleNamespace(world_size=4, data_rank=(1, 4), is_asynchronous=False, plan=parse_plan("fsdp"))


class Processes:
    """The state of a process, as Accelerate has it."""

    num_processes, process_index = 4, 2


@pytest.mark.parametrize(("strategy", "number"), [(None, 4), (SHARING, 2), (APART, 4)], ids=["ddp", "tp", "fsdp"])
def test_processes_are_those_with_data_of_their_own(active: Any, strategy: Any, number: int) -> None:
    # Loops multiply losses and schedules by it, and divide what they have gathered, which has each batch once.
    active.strategy = strategy
    counted = accelerator_plans._make_num_processes(property(lambda self: 4))
    assert counted.fget(None) == number


def test_a_trigger_that_one_rank_has_set_is_seen_by_all(active: Any) -> None:
    active.strategy = SHARING
    reduce = accelerator_plans._make_reduce(lambda self, tensor, reduction, scale: tensor)
    assert reduce(None, torch.tensor(1)).item() == 1, "the sum over two ranks that share a batch, one of which set it"
    assert reduce(None, torch.tensor(0)).item() == 0


@pytest.mark.parametrize(("strategy", "own"), [(None, [4, 5]), (SHARING, [4, 5, 6, 7])], ids=["ddp", "tp"])
def test_ranks_that_compute_one_batch_split_inputs_as_one(active: Any, strategy: Any, own: list[int]) -> None:
    from accelerate.state import PartialState

    active.strategy = strategy
    split = accelerator_plans._make_split_between_processes(PartialState.split_between_processes.__wrapped__)
    assert next(split(Processes(), list(range(8)))) == own


def test_accelerates_local_sgd_is_refused_under_a_plan_unless_it_is_off(active: Any) -> None:
    made: list[Any] = []
    init = accelerator_plans._make_local_sgd(lambda *args: made.append(args))
    active.strategy = APART
    with pytest.raises(UsageError, match="--plan local-sgd:8"):
        init(None, None, None, 8)
    init(None, None, None, 8, False)
    active.strategy = None
    init(None, None, None, 8)
    assert len(made) == 2


def test_a_part_of_a_model_is_not_saved_as_if_it_were_the_model(active: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    save = accelerator_plans._make_save(lambda self, obj, f, safe: written.append(obj))
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    whole = layers.state_dict()
    stage = PipelinedModel(layers, Stage(), {name: tuple(value.shape) for name, value in whole.items()}, 1)
    layers[1] = torch.nn.Identity()
    monkeypatch.setattr(accelerator_plans, "PREPARED", SimpleNamespace(models=[stage]))
    active.strategy = SHARING
    for part in (stage.state_dict(), {"model": layers.state_dict(), "step": 3}):
        with pytest.raises(UsageError, match="get_state_dict"):
            save(None, part, "model.pt")
    for kept in (whole, {"weight": torch.ones(1)}, [1, 2]):
        save(None, kept, "model.pt")
    active.strategy = None
    save(None, stage.state_dict(), "model.pt")
    assert len(written) == 4


@pytest.mark.parametrize("kind", [DistributedType.MULTI_CPU, DistributedType.FSDP])
def test_a_plugin_without_effect_is_said_and_one_beside_a_plan_refused(
    active: Any, kind: DistributedType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    init = accelerator_plans._make_init(lambda self: None)
    made = SimpleNamespace(state=Processes, distributed_type=kind, is_main_process=True)
    init(made)
    assert ("Say --plan fsdp" in capsys.readouterr().err) == (kind == DistributedType.MULTI_CPU)
    active.strategy = APART
    if kind == DistributedType.FSDP:
        with pytest.raises(UsageError, match="a second time"):
            init(made)
    else:
        init(made)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("rows", "options", "is_refused"),
    [(12, {}, True), (16, {}, False), (12, {"even_batches": True}, False), (12, {"split_batches": True}, False)],
)
def test_passes_of_unequal_length_over_a_model_that_is_cut_are_refused(
    active: Any, rows: int, options: dict[str, bool], is_refused: bool
) -> None:
    active.strategy = SimpleNamespace(**vars(APART), cuts_tensors=True)
    given = {"even_batches": False, "num_processes": 4, "process_index": 1, "put_on_device": False, **options}
    prepare = accelerator_plans._make_prepare_data_loader(prepare_data_loader)
    loader = DataLoader(torch.arange(rows), batch_size=4)
    if is_refused:
        with pytest.raises(UsageError, match=r"3 batches with even_batches=False is one batch longer for 3 of 4 ranks"):
            prepare(loader, **given)
    else:
        prepare(loader, **given)
