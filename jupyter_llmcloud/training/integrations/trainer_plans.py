"""The Trainer under a plan: losses weighed by the ranks that share a batch; what one rank cannot save is refused."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.system.import_hooks import when_imported
from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.diagnostics.loss_kinds import kind_of_loss
from jupyter_llmcloud.training.integrations.accelerator_plans import say_apart
from jupyter_llmcloud.training.parallel.balance import BALANCE
from jupyter_llmcloud.training.parallel.strategies.active import ACTIVE
from jupyter_llmcloud.training.parallel.strategies.pipeline import PassThrough
from jupyter_llmcloud.training.parallel.strategies.prepared import PREPARED
from jupyter_llmcloud.training.parallel.unwrap import unwrapped

_NO_EVALUATION = (
    "under --plan pipeline:N a Trainer cannot evaluate or predict: it asks the model of this rank, which has one "
    'stage. Say eval_strategy="no" and evaluate in a loop of Accelerate\'s, or train by --plan fsdp.'
)


def install() -> None:
    """From now on in this process. Called once, in a rank."""
    patches.TRAINER_PLANS.apply(
        {
            "transformers:Trainer._get_num_items_in_batch": _make_num_items,
            "transformers:Trainer.compute_loss": _make_compute_loss,
            "transformers:Trainer.train": _make_train,
            "transformers:Trainer.evaluation_loop": _make_evaluation_loop,
            "transformers:PreTrainedModel.save_pretrained": _make_save_pretrained,
        }
    )
    adapters = patches.ADAPTER_PLANS

    def replace() -> None:
        adapters.apply(dict.fromkeys(adapters.targets, _make_save_pretrained))

    when_imported(adapters.module, replace)


def _make_num_items(original: Any) -> Any:
    def num_items_in_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        num_items = original(self, *args, **kwargs)
        if torch.is_tensor(num_items) and self.args.average_tokens_across_devices:
            BALANCE.count_items(num_items)
        return num_items

    return num_items_in_batch


def _make_compute_loss(original: Any) -> Any:
    """A mean is multiplied by the ranks that an elastic run began with, not by those that there are.

    A Trainer multiplies all losses by the latter, since those that are divided by the items of all ranks are averaged
    over ranks.
    """
    takes_means = weakref.WeakKeyDictionary[Any, bool]()

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        is_multiplied = (
            num_items_in_batch is not None
            and self.args.average_tokens_across_devices
            and (self.model_accepts_loss_kwargs or self.compute_loss_func)
        )
        is_wrong = is_multiplied and BALANCE.share_of_ranks != 1.0
        # What a loss is, is read from its graph: in an evaluation right after a resume, the first batch has one.
        with torch.enable_grad() if is_wrong and self not in takes_means else contextlib.nullcontext():
            found = original(self, model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if not is_wrong:
            return found
        loss = found[0] if return_outputs else found
        if loss.requires_grad:
            takes_means[self] = kind_of_loss(loss).is_mean
        if not takes_means.get(self, False):
            return found
        loss = loss * BALANCE.share_of_ranks
        return (loss, *found[1:]) if return_outputs else loss

    return compute_loss


def _make_train(original: Any) -> Any:
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        strategy = ACTIVE.strategy
        if strategy is not None and strategy.plan.kind == "pipeline" and self.args.eval_strategy != IntervalStrategy.NO:
            raise UsageError(_NO_EVALUATION)
        if strategy is not None and strategy.cuts_models and self.args.save_strategy != SaveStrategy.NO:
            raise UsageError(
                f"--plan {strategy.plan.text}: Trainer writes its checkpoints on one rank, which has a part of the "
                'model only. Say TrainingArguments(..., save_strategy="no"), and --checkpoint-every N for checkpoints '
                "that --resume goes on from; --save model keeps the model that comes of it."
            )
        return original(self, *args, **kwargs)

    return train


def _make_evaluation_loop(original: Any) -> Any:
    def evaluation_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _has_stages(self.model):
            raise UsageError(_NO_EVALUATION)
        with BALANCE.apart():  # its mean loss counts every rank's rows as eval_batch_size
            return original(self, *args, **kwargs)

    return evaluation_loop


def _make_save_pretrained(original: Any) -> Any:
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_cut(self) and not _is_whole(self, kwargs.get("state_dict")):
            raise UsageError(
                "the model is cut over the ranks of its plan, and each would save its part alone. Say --save model on "
                "the line of the cell, or on every rank state_dict=accelerator.get_state_dict(model), and give that to "
                "save_pretrained()."
            )
        say_apart(self)
        return original(self, save_directory, *args, **kwargs)

    return save_pretrained


def _is_cut(model: torch.nn.Module) -> bool:
    if _has_stages(model):
        return True
    is_ours = any(unwrapped(known) is model for known in PREPARED.models)
    return is_ours and any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _has_stages(model: torch.nn.Module) -> bool:
    return any(isinstance(module, PassThrough) for module in model.modules())


def _is_whole(model: torch.nn.Module, state: dict[str, Any] | None) -> bool:
    if state is None or any(isinstance(value, DTensor) for value in state.values()):
        return False
    return not _has_stages(model) or not state.keys() <= model.state_dict().keys()
