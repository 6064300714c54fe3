"""Variables travel to the ranks and back; what cannot travel is named and changes nothing."""

from __future__ import annotations

import cloudpickle
import pytest
import torch

from jupyter_llmcloud.errors import LLMCloudError, UsageError
from jupyter_llmcloud.protocol.agent_messages import Push
from tests.support.worlds import Ranks


def test_pushed_variables_are_on_every_rank(world: Ranks) -> None:
    world.push(table={"a": [1, 2]}, double=lambda x: 2 * x)
    assert world.ok("(table['a'], double(rank))").results() == ["([1, 2], 0)", "([1, 2], 2)"]


def test_a_push_to_some_ranks_leaves_the_others_alone(world: Ranks) -> None:
    world.push(spread="all")
    world.push(ranks=[1], spread="only one")
    assert world.ok("spread").results() == ["'all'", "'only one'"]


def test_variables_pushed_with_a_cell_are_there_before_it(world: Ranks) -> None:
    assert world.ok("brought + rank", payload=cloudpickle.dumps({"brought": 40})).results() == ["40", "41"]


def test_the_record_of_a_run_tells_what_was_pushed_since_the_last_one_that_finished(world: Ranks) -> None:
    """The agent remembers it: a kernel that was restarted in between has forgotten, and an export took an older value."""
    pushed = Push(world_id=world.world_id, texts={"rate": "0.1"}, payload=cloudpickle.dumps({"rate": 0.1}))
    world.channel.request(pushed)
    world.channel.close()
    world.channel = world.agent.channel()
    assert world.run("1 / 0").folder.read().pushed == {"rate": "0.1"}
    assert world.ok("rate", pushed={"more": "2"}).folder.read().pushed == {"rate": "0.1", "more": "2"}
    assert world.ok("rate").folder.read().pushed == {}


def test_each_rank_gives_its_own_value(world: Ranks) -> None:
    world.ok("mine = f'of {rank}'")
    assert [world.pull("mine", 0), world.pull("mine", 1)] == ["of 0", "of 1"]


def test_pulled_tensors_models_and_lambdas_work_in_the_notebook(world: Ranks) -> None:
    world.ok(
        """
        import torch
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(2, 1)
            def forward(self, x):
                return self.layer(x)
        net, tensor, add = Net(), torch.arange(3), lambda x: x + 1
        """
    )
    assert world.pull("tensor").tolist() == [0, 1, 2]
    assert world.pull("add")(1) == 2
    assert world.pull("net")(torch.ones(1, 2)).shape == (1, 1)


def test_a_wrapped_model_comes_back_without_its_wrapper(world: Ranks) -> None:
    world.ok("import torch\nddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))")
    assert type(world.pull("ddp")) is torch.nn.Linear


def test_a_run_brings_variables_of_its_first_rank(world: Ranks) -> None:
    outcome = world.ok("best = {'rank': rank}", pull=["best"], ranks=[1])
    assert cloudpickle.loads(outcome.ended.payload) == {"best": {"rank": 1}}


def test_a_large_variable_makes_the_round_trip(world: Ranks) -> None:
    big = torch.arange(5_000_000, dtype=torch.float32)
    world.push(big=big)
    world.ok("big = big * 2")
    assert torch.equal(world.pull("big", 1), big * 2)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_pulled_model_is_the_plain_one_at_any_depth(world: Ranks, precision: str) -> None:
    world.ok(
        """
        import types
        import torch
        from accelerate import Accelerator
        from torch.nn.parallel import DistributedDataParallel

        def net():
            torch.manual_seed(0)
            return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

        class Own(torch.nn.Module):
            def __init__(self, inside):
                super().__init__()
                self.inside = inside
            def forward(self, x):
                return 2 * self.inside(x)

        accelerator = Accelerator()
        x = torch.linspace(-1, 1, 64).reshape(4, 16)
        wanted = net()(x).tolist()
        prepared = accelerator.prepare(net())
        twice = Accelerator().prepare(net())
        compiled = torch.compile(accelerator.prepare(net()), backend="eager")
        compiled_first = accelerator.prepare(torch.compile(net(), backend="eager"))
        of_the_cell = accelerator.prepare(Own(net()))
        part = Own(accelerator.prepare(net()))
        held = {"models": [(prepared, twice)], "part": types.SimpleNamespace(of=part)}
        changed = net()
        changed.forward = types.MethodType(lambda self, x: torch.nn.Sequential.forward(self, x) + 1, changed)
        changed = accelerator.prepare(changed)
        prepared(x).sum().backward()
        """,
        precision=precision,
    )
    x, wanted = world.pull("x"), world.pull("wanted")
    held = world.pull("held")
    alike = [world.pull(name) for name in ("prepared", "twice", "compiled", "compiled_first")]
    for model in [*alike, *held["models"][0]]:
        assert type(model) is torch.nn.Sequential
        assert "forward" not in vars(model)
        assert model(x).tolist() == wanted
    for model in (world.pull("of_the_cell"), world.pull("part"), held["part"].of):
        assert type(model).__name__ == "Own"
        assert type(model.inside) is torch.nn.Sequential
        assert model(x).tolist() == [[2 * value for value in row] for row in wanted]
    assert torch.allclose(world.pull("changed")(x), torch.tensor(wanted) + 1, atol=1e-6)
    # On the ranks nothing has changed.
    assert (
        world.ok("(prepared(x) == net()(x)).all().item()", precision=precision).results()
        == [str(precision == "no")] * 2
    )


def test_a_model_that_fsdp_has_cut_is_refused_when_pulled(world: Ranks) -> None:
    world.ok(
        """
        import torch
        from torch.distributed.fsdp import FullyShardedDataParallel
        cut = FullyShardedDataParallel(torch.nn.Linear(4, 2), device_id=torch.device("cpu"))
        """
    )
    with pytest.raises(UsageError, match=r"'cut'.*FullyShardedDataParallel.*--save"):
        world.pull("cut")


def test_what_is_too_large_to_be_pulled_is_named_with_a_way_out_and_harms_nobody(world: Ranks) -> None:
    world.ok(
        """
        import torch
        from jupyter_llmcloud.protocol import payload_size
        payload_size.MAX_VARIABLES = 100_000
        weights, halves, small = torch.ones(30_000), [bytes(60_000)] * 1, 3
        """
    )
    with pytest.raises(
        UsageError, match=r"rank 1: %pull: weights \(117.2 KiB\), but at most 97.7 KiB.*Save weights to a"
    ):
        world.pull("weights", 1)
    outcome = world.run("kept = 7", pull=["weights", "small"])
    assert outcome.state == "failed" and "--pull: weights (117.2 KiB)" in outcome.error["evalue"]
    assert world.ok("kept").results() == ["7", "7"]
    assert (world.pull("small"), len(world.pull("halves")[0])) == (3, 60_000)


def test_a_variable_that_is_not_there_is_named(world: Ranks) -> None:
    with pytest.raises(UsageError, match="'no_such'"):
        world.pull("no_such")


def test_a_value_that_cannot_be_pickled_is_named(world: Ranks) -> None:
    world.ok("import threading\nlock = threading.Lock()")
    with pytest.raises(UsageError, match=r"'lock'.*pickle"):
        world.pull("lock")
    assert world.ok("lock is not None").results() == ["True", "True"]


def test_a_rank_that_is_not_there_is_named(world: Ranks) -> None:
    with pytest.raises(UsageError, match="no rank 7"):
        world.pull("rank", 7)
    with pytest.raises(UsageError, match="no rank 7"):
        world.push(ranks=[7], a=1)


def test_a_push_that_cannot_be_opened_fails_the_cell_and_nothing_else(world: Ranks) -> None:
    outcome = world.run("never = 1", payload=b"no pickle")
    assert outcome.state == "failed"
    assert outcome.error["ename"] == "UnpicklingError"
    assert world.ok("'never' in globals()").results() == ["False", "False"]


def test_a_pull_that_fails_at_the_end_fails_the_run_and_keeps_the_variables(world: Ranks) -> None:
    outcome = world.run("import threading\nkept_after_pull, lock = 5, threading.Lock()", pull=["lock"])
    assert outcome.state == "failed"
    assert "'lock'" in outcome.error["evalue"]
    assert world.ok("kept_after_pull").results() == ["5", "5"]


def test_a_world_that_has_ended_says_so(world: Ranks) -> None:
    stranger = Ranks(world.agent, 1)
    stranger.end()
    with pytest.raises(LLMCloudError, match="has ended"):
        lost = world.beside()
        lost.world_id = stranger.world_id
        lost.run("1")
    lost.channel.close()


def test_the_newest_result_is_there_as_in_a_notebook_and_older_ones_are_let_go_of(world: Ranks) -> None:
    world.ok("globals().pop('_', None)\nimport weakref\nclass Big: pass\nbig = Big()\nwatched = weakref.ref(big)\nbig")
    assert world.ok("_ is big").results() == ["True"] * 2
    world.ok("del big, _")
    assert world.ok("watched() is None, rank").results() == ["(True, 0)", "(True, 1)"]
    world.ok("rank + 40")
    assert world.ok("_ + 1").results() == ["41", "42"]
    assert world.ok("for _ in range(3): pass\nrank").results() == ["0", "1"]
    assert world.ok("_").results() == ["2", "2"]  # the user's own
    world.ok("del _")
