"""Code written for a launcher runs as cells: Accelerate, plain torch.distributed, sub-groups, precision."""

from __future__ import annotations

import pytest

from tests.support.worlds import Ranks


def test_accelerate_finds_the_group_in_every_cell(world: Ranks) -> None:
    for _ in range(3):
        outcome = world.ok(
            """
            from accelerate import Accelerator
            accelerator = Accelerator()
            (accelerator.num_processes, accelerator.process_index, accelerator.device.type)
            """
        )
        assert outcome.results() == ["(2, 0, 'cpu')", "(2, 1, 'cpu')"]


def test_another_precision_in_another_cell(world: Ranks) -> None:
    code = "from accelerate import Accelerator\naccelerator = Accelerator()\naccelerator.mixed_precision"
    assert world.ok(code, precision="bf16").results() == ["'bf16'"] * 2
    assert world.ok(code).results() == ["'no'"] * 2
    asked = "from accelerate import Accelerator\nAccelerator(mixed_precision='bf16').mixed_precision"
    assert world.ok(asked).results() == ["'bf16'"] * 2
    assert world.ok(code, precision="no").results() == ["'no'"] * 2


def test_bf16_really_computes_in_bf16(world: Ranks) -> None:
    outcome = world.ok(
        """
        import torch
        from accelerate import Accelerator
        accelerator = Accelerator()
        net = accelerator.prepare(torch.nn.Linear(2, 2))
        with accelerator.autocast():
            kind = (net.module.weight @ torch.ones(2)).dtype
        str(kind)
        """,
        precision="bf16",
    )
    assert outcome.results() == ["'torch.bfloat16'"] * 2


def test_end_training_leaves_the_world_usable(world: Ranks) -> None:
    world.ok("from accelerate import Accelerator\naccelerator = Accelerator()\naccelerator.end_training()")
    outcome = world.ok("import torch\nfrom accelerate import Accelerator\nint(Accelerator().reduce(torch.tensor(1)))")
    assert outcome.results() == ["2", "2"]


def test_a_model_of_an_earlier_cell_trains_on_with_a_new_accelerator(world: Ranks) -> None:
    world.ok("import torch\nfrom accelerate import Accelerator\nnet = torch.nn.Linear(2, 1)\nfirst = Accelerator()")
    world.ok(
        """
        second = Accelerator(mixed_precision="bf16")
        net, optimizer = second.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
        for _ in range(2):
            second.backward(net(torch.ones(3, 2)).sum())
            optimizer.step()
        """
    )


def test_a_script_may_make_and_destroy_its_group(world: Ranks) -> None:
    script = """
    import os
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    ranks = (dist.get_rank(), dist.get_world_size(), int(os.environ["RANK"]))
    dist.barrier()
    dist.destroy_process_group()
    (float(total), ranks)
    """
    for _ in range(2):
        assert world.ok(script).results() == ["(3.0, (0, 2, 0))", "(3.0, (1, 2, 1))"]


def test_the_group_can_be_made_from_its_environment_by_name(world: Ranks) -> None:
    code = "from torch.distributed import init_process_group as make\nmake(backend='gloo', init_method='env://')"
    world.ok(code)


def test_groups_of_some_ranks_work_and_end(new_world) -> None:
    world = new_world(3)
    outcome = world.ok(
        """
        import torch, torch.distributed as dist
        pair = dist.new_group([0, 2])
        t = torch.ones(1)
        if rank in (0, 2): dist.all_reduce(t, group=pair)
        dist.destroy_process_group(pair) if rank in (0, 2) else None
        u = torch.ones(1)
        dist.all_reduce(u)
        (int(t), int(u))
        """
    )
    assert outcome.results() == ["(2, 3)", "(1, 3)", "(2, 3)"]


@pytest.mark.parametrize("kind", ["all_gather_object", "broadcast_object_list", "send and recv", "monitored"])
def test_collectives_of_gloo_work(world: Ranks, kind: str) -> None:
    code = {
        "all_gather_object": "found = [None] * 2\ndist.all_gather_object(found, {'r': rank})\nassert found[1] == {'r': 1}",
        "broadcast_object_list": "box = [rank]\ndist.broadcast_object_list(box, src=1)\nassert box == [1]",
        "send and recv": "t = torch.zeros(1)\ndist.send(t + 5, 1) if rank == 0 else dist.recv(t, 0)\nassert rank == 0 or t == 5",
        "monitored": "dist.monitored_barrier()",
    }[kind]
    world.ok("import torch, torch.distributed as dist\n" + code)


def test_metrics_of_accelerate_are_logged_on_every_rank_beside_other_trackers(world: Ranks) -> None:
    outcome = world.ok(
        """
        from accelerate import Accelerator
        from accelerate.tracking import GeneralTracker
        class Own(GeneralTracker):
            name, requires_logging_directory, tracker = "own", False, None
            def store_init_configuration(self, values): pass
            def log(self, values, step=None, **options): self.last = values
        accelerator = Accelerator(log_with=Own())
        accelerator.init_trackers("project", config={"lr": 0.1})
        for step in range(3):
            accelerator.log({"loss": 1.0 / (step + 1), "note": "text"}, step=step)
        accelerator.end_training()
        if rank == 0:
            print(accelerator.trackers[0].name, accelerator.trackers[0].last["note"])
        """
    )
    assert outcome.text(0) == "own text\n"
    for rank in (0, 1):
        assert outcome.values("loss", rank) == [1.0, 0.5, pytest.approx(1 / 3)]
    assert [row.get("step") for n, row in outcome.metrics if n == 0 and "values" in row] == [0, 1, 2]


def test_a_tracker_that_fails_is_named_once_and_ends_no_training(world: Ranks) -> None:
    outcome = world.ok(
        """
        from accelerate import Accelerator
        from accelerate.tracking import GeneralTracker
        class Own(GeneralTracker):
            name, requires_logging_directory, tracker = "own", False, None
            def store_init_configuration(self, values): pass
            def log(self, values, step=None, **options): raise OSError("is down")
        accelerator = Accelerator(log_with=Own())
        accelerator.init_trackers("project")
        for step in range(3):
            accelerator.log({"loss": 1.0 + step}, step=step)
        """
    )
    assert outcome.text(0, "stderr").count("the tracker 'own' could not log (OSError: is down)") == 1
    assert outcome.values("loss", 0) == outcome.values("loss", 1) == [1.0, 2.0, 3.0]


def test_gradients_are_averaged_over_the_ranks(world: Ranks) -> None:
    outcome = world.ok(
        """
        import torch
        from accelerate import Accelerator
        accelerator = Accelerator()
        net = torch.nn.Linear(1, 1, bias=False)
        net = accelerator.prepare(net)
        accelerator.backward(net(torch.tensor([[float(rank + 1)]])).sum())
        net.module.weight.grad.item()
        """
    )
    assert outcome.results() == ["1.5", "1.5"]


def test_uneven_inputs_are_joined_on_ranks_without_a_gpu(world: Ranks) -> None:
    outcome = world.ok(
        """
        import torch
        from accelerate import Accelerator, DataLoaderConfiguration
        accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False))
        model = accelerator.prepare(torch.nn.Linear(1, 1))
        loader = accelerator.prepare(torch.utils.data.DataLoader(torch.arange(5.0).unsqueeze(1), batch_size=1))
        seen = 0
        with accelerator.join_uneven_inputs([model]):
            for batch in loader:
                accelerator.backward(model(batch).sum())
                seen += 1
        seen
        """
    )
    assert outcome.results() == ["3", "2"]
    assert outcome.text(kind="stderr") == ""
