"""What stands for an Accelerator where Lightning trains; with Lightning itself: tests/compat."""

from __future__ import annotations

import pytest
from accelerate import Accelerator

from jupyter_llmcloud.training.checkpoint.stateful_objects import put_settings, settings_of
from jupyter_llmcloud.training.integrations.lightning_state import FabricState, FitState, StandIn


class Trainer:
    """Only held, weakly."""


@pytest.mark.parametrize("kind", [FitState, FabricState])
def test_checkpoints_find_the_settings_of_what_stands_for_an_accelerator(kind: type[StandIn]) -> None:
    trainer = Trainer()
    state = kind(trainer)
    saved = settings_of(state)
    assert len(saved) == len(settings_of(Accelerator(cpu=True)))
    put_settings(state, saved, is_restart=True)
    assert settings_of(state) == saved
