"""Libraries that many notebooks use: each trains, charts, checkpoints, resumes after a killed rank, and saves."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
from safetensors.torch import load_file

from tests.compat.cells import CELLS, LIGHTNING, QUIET
from tests.support.resuming import cell, results, resumed, same
from tests.support.worlds import Ranks

PACKAGE = {"fabric": "lightning"}


def _parameter(name: str) -> object:
    package = PACKAGE.get(name, name)
    missing = find_spec(package) is None
    reason = f"{package} is not installed (pip install jupyter-llmcloud[compat])"
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=reason))


# Ways to call the Trainer of Lightning: (what replaces the quiet options, steps between checkpoints, where a rank dies).
TRAINERS = {
    "as it comes": ("log_every_n_steps=2, default_root_dir=str(run.folder),", 4, 29),
    "accumulating gradients": (f"{QUIET} accumulate_grad_batches=3,", 2, 29),
    "evaluating within an epoch": (f"{QUIET} val_check_interval=0.5,", 4, 29),
    "saved between two epochs": (QUIET, 12, 29),
    "in bfloat16": (f"{QUIET} precision='bf16-mixed',", 4, 29),
}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lightning") is None, reason="lightning is not installed (extra: compat)")
@pytest.mark.parametrize(("options", "every", "die"), TRAINERS.values(), ids=TRAINERS)
def test_a_lightning_trainer_resumes_to_the_last_bit(
    new_world: Callable[..., Ranks], options: str, every: int, die: int
) -> None:
    wanted, world = new_world(), new_world()
    code = LIGHTNING.replace(QUIET, options)
    wanted.ok(cell(code))
    [note] = resumed(world.ok(cell(code, die), checkpoint_every=every, max_restarts=2))
    assert "resumed from step" in note
    for one, other in zip(results(wanted), results(world), strict=True):
        assert same(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", [_parameter(name) for name in CELLS])
def test_it_trains_charts_checkpoints_resumes_after_a_kill_and_saves(
    new_world: Callable[..., Ranks], name: str
) -> None:
    wanted, world = new_world(), new_world()
    undisturbed = wanted.ok(cell(CELLS[name]))
    loss = "loss_step" if name == "lightning" else "loss"
    assert undisturbed.values(loss) and undisturbed.values(loss, 1)

    outcome = world.ok(cell(CELLS[name], 29), checkpoint_every=4, max_restarts=2, save=["model"])
    [note] = resumed(outcome)
    assert "resumed from step" in note
    assert (outcome.folder.path / "died").exists()
    for one, other in zip(results(wanted), results(world), strict=True):
        assert one["samples"] == other["samples"]
        assert one["more"] == other["more"]
        assert same(one, other)
    first, second = results(world)
    assert all(
        (first["weights"][key] == value).all() for key, value in second["weights"].items() if "running" not in key
    )
    assert load_file(next((outcome.folder.path / "model").glob("*.safetensors")))
    assert outcome.values(loss)[-1] == undisturbed.values(loss)[-1]
