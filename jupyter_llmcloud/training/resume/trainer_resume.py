"""transformers' Trainer followed: where its training is, and how `train()` gets back there when it is called again.

`Trainer` drives its own loop, outside the cell, and can begin it in any epoch and after any batch: so on the way back
it is told where, its loader is led there like any other, and everything saved is restored just before the next batch. A
`train()` that had ended is passed over; what it returned, and what `evaluate()` returned, is remembered.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import trainer as hf_trainer
from transformers.trainer import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.checkpoint import rng as randomness
from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.checkpoint.serialization import NotPlain, decode, encode
from jupyter_llmcloud.training.resume.loaders.iterator import ReplayPosition, TrackedIterator
from jupyter_llmcloud.training.resume.loops.tracking import Loops, TrackedLoop

TRAIN = "Trainer.train"
EVALUATE = "Trainer.evaluate"
_SKIP = "transformers.trainer:skip_first_batches"
_LED = "llmcloud"  # stands for a checkpoint of the Trainer's own: everything it would load is restored by us
_BEGUN_WITH = ("_initial_global_step", "_initial_num_input_tokens_seen")
_GONE_ON_WITH = ("best_global_step", "best_metric", "best_model_checkpoint", "epoch", "global_step", "log_history",
                 "num_input_tokens_seen", "total_flos")  # fmt: skip
_OBJECTS = ("model_wrapped", "optimizer", "lr_scheduler")


@dataclass(eq=False)
class Training:
    """One call of `Trainer.train`.

    Attributes:
        plan: "run", "lead" it to the saved place, or "pass over" since it had ended by then.
        loops: the loops of the cell round it, with the items that each had delivered.
        loader: of the present epoch; `skipped`: batches that the script itself has skipped in it.
        num_loaders, epoch_loaders: loaders made before it, before its present epoch.
        output: what it returned, and how things were then.
    """

    trainer: weakref.ref[Trainer]
    ordinal: int
    plan: str
    loops: list[tuple[weakref.ref[TrackedLoop], int]]
    num_loaders: int
    epoch_loaders: int = 0
    epoch: int = 0
    loader: Any = None
    skipped: int = 0
    output: Any = None
    optimizer: weakref.ref[Any] | None = None

    @property
    def is_led(self) -> bool:
        """On its way to the saved place, or past it."""
        return self.plan != "run"


class TrainingCursor(Protocol):
    """What a Trainer's training asks and tells the cursor that follows the cell."""

    loops: Loops
    follows: bool
    replaying: bool
    begun: dict[str, int]
    num_loaders: int

    def lead_to_pass(self) -> None:
        """The next pass over a loader is the saved one."""


class Trainings:
    """The Trainers of the present cell."""

    def __init__(self, place: TrainingCursor) -> None:
        self.place = place
        self.clear(None)

    def clear(self, saved: ReplayPosition | None) -> None:
        """A new cell."""
        self._active: list[Training] = []
        self._finished: list[Training] = []
        self._evaluations: dict[int, Any] = {}
        self._saved: ReplayPosition = saved or {}
        self._saved_training: ReplayPosition | None = self._saved.get("training")

    @property
    def active(self) -> Training | None:
        """The innermost that runs."""
        return self._active[-1] if self._active else None

    def of(self, trainer: Trainer) -> Training | None:
        """The innermost training, if it is this trainer's."""
        active = self.active
        return active if active is not None and active.trainer() is trainer else None

    # --- what is saved ---

    def describe(self) -> ReplayPosition:
        """What has ended, in plain values."""
        outputs = {t.ordinal: t.output for t in self._finished if t.output is not None}
        return {"trainings": outputs, "evaluations": dict(self._evaluations)}

    def point(self, training: Training, iteration: TrackedIterator) -> ReplayPosition:
        """The present place of a training that is about to fetch a batch."""
        trainer = training.trainer()
        assert trainer is not None
        return {
            "ordinal": training.ordinal,
            "epoch": training.epoch,
            "batches": training.skipped + iteration.handed_out,
            "skipped": training.skipped,
            "accumulation": trainer.args.gradient_accumulation_steps,
            "num_loaders": training.num_loaders,
            "epoch_loaders": training.epoch_loaders,
        }

    def _kept(self) -> list[Training]:
        """Those that the cell would run again on the way to the present place."""
        nest = self.place.loops.nest()
        return [t for t in [*self._finished, *self._active] if t.trainer() is not None and _is_at(t, nest)]

    def left_behind(self) -> list[Any]:
        """Optimizers of trainings that lie behind for good."""
        kept = {id(t) for t in self._kept()}
        gone = [t.optimizer() for t in self._finished if id(t) not in kept and t.optimizer is not None]
        return [optimizer for optimizer in gone if optimizer is not None]

    def accelerators(self) -> list[Any]:
        """Those that belong to a Trainer."""
        trainers = [t.trainer() for t in [*self._finished, *self._active]]
        return [trainer.accelerator for trainer in trainers if trainer is not None]

    def addresses(self) -> dict[str, Any]:
        """What a training changes, by address."""
        table: dict[str, Any] = {}
        for training in self._kept():
            trainer, at = training.trainer(), f"trainer {training.ordinal}"
            table |= {f"{at} {name}": item for name in _OBJECTS if (item := getattr(trainer, name, None)) is not None}
            if trainer is not None and getattr(trainer.accelerator, "scaler", None) is not None:
                table[f"{at} scaler"] = trainer.accelerator.scaler
        return table

    def attributes(self) -> dict[str, Any]:
        """Objects whose attributes a training changes, by address."""
        table: dict[str, Any] = {}
        for training in self._kept():
            trainer, at = training.trainer(), f"trainer {training.ordinal}"
            if trainer is None:
                continue
            table |= {at: trainer, f"{at} state": trainer.state, f"{at} control": trainer.control}
            for number, callback in enumerate(trainer.callback_handler.callbacks):
                # Those of the library hold bars and connections, and say what else belongs to their state.
                if isinstance(callback, ExportableState) or not type(callback).__module__.startswith("transformers."):
                    table[f"{at} callback {number}"] = callback
        return table

    def always(self) -> list[str]:
        """Attributes to save whether they have changed or not: a script may begin with a checkpoint of its own."""
        at = [f"trainer {training.ordinal}" for training in self._kept()]
        return [f"{one}.{name}" for one in at for name in _BEGUN_WITH] + [
            f"{one} state.{name}" for one in at for name in _GONE_ON_WITH
        ]

    # --- a training ---

    def begin(self, trainer: Trainer) -> Training:
        """`train()` begins."""
        place = self.place
        ordinal = place.begun.get(TRAIN, 0)
        place.begun = {**place.begun, TRAIN: ordinal + 1}
        loops = [(weakref.ref(loop), loop.delivered) for loop in place.loops.nest()]
        training = Training(weakref.ref(trainer), ordinal, self._plan(ordinal), loops, place.num_loaders)
        if training.plan == "lead":
            assert self._saved_training is not None
            training.num_loaders = place.num_loaders = self._saved_training["num_loaders"]
            if (now := trainer.args.gradient_accumulation_steps) != (was := self._saved_training["accumulation"]):
                raise ResumeMissed(
                    f"the saved place counts {was} batches for a step, this Trainer takes {now}: keep "
                    "gradient_accumulation_steps and change per_device_train_batch_size so that the whole batch is "
                    "as before."
                )
        self._active.append(training)
        return training

    def _plan(self, ordinal: int) -> str:
        if not self.place.replaying:
            return "run"
        if self._saved_training is not None and ordinal == self._saved_training["ordinal"]:
            return "lead"
        if ordinal in self._saved.get("trainings", ()):
            return "pass over"
        if self._saved_training is not None and ordinal > self._saved_training["ordinal"]:
            raise ResumeMissed("another train() was called before the one that is to go on.")
        return "run"

    def end(self, training: Training, output: Any) -> Any:
        """`train()` has ended; returns what it returns."""
        self._active.remove(training)
        trainer = training.trainer()
        if output is None:
            return None
        if training.plan == "lead" and self.place.replaying:
            raise ResumeMissed("train() ended before it came to the place where it was to go on.")
        if training.plan == "pass over":
            output = TrainOutput(*self._pass_over(self._saved["trainings"][training.ordinal]))
        training.output = self._passed(list(output))
        training.loader = None
        if trainer is not None and trainer.optimizer is not None:
            training.optimizer = weakref.ref(getattr(trainer.optimizer, "optimizer", trainer.optimizer))
        self._finished.append(training)
        return output

    def start_of(self, training: Training, num_epochs: int) -> tuple[int, int]:
        """The epoch with which a training begins that is led, and the batches used in it."""
        if training.plan == "pass over":
            return num_epochs, 0
        assert self._saved_training is not None
        return self._saved_training["epoch"], self._saved_training["batches"]

    def begin_epoch(self, training: Training, epoch: int, loader: Any) -> None:
        """An epoch begins with this loader."""
        place = self.place
        if training.plan == "lead" and place.replaying:
            assert self._saved_training is not None
            place.num_loaders = self._saved_training["epoch_loaders"]
            place.lead_to_pass()
        training.epoch, training.loader, training.skipped = epoch, loader, 0
        training.epoch_loaders = place.num_loaders

    def skip(self, training: Training, loader: Any, number: int) -> Any:
        """The Trainer wants the first batches of an epoch skipped."""
        if training.plan == "lead" and self.place.replaying:
            assert self._saved_training is not None
            number = self._saved_training["skipped"]
        training.skipped = number
        training.loader = patches.TRAINER.original(_SKIP)(loader, number) if number else loader
        return training.loader

    # --- evaluations ---

    def remembered(self, ordinal: int) -> Any:
        """What `evaluate()` returned when the cell ran before; None when it must be run."""
        known = self._saved.get("evaluations", {}).get(ordinal) if self.place.replaying else None
        if known is None:
            return None
        return self._pass_over(known)

    def evaluated(self, ordinal: int, metrics: Any) -> None:
        """`evaluate()` returned this."""
        try:
            self._evaluations[ordinal] = self._passed(metrics)
        except NotPlain:
            self._evaluations.pop(ordinal, None)

    def _passed(self, returned: Any) -> ReplayPosition:
        """What a call returned, and what it has left behind."""
        rng = randomness.snapshot()
        return {"returned": encode(returned, _as_it_is), "num_loaders": self.place.num_loaders, "rng": rng}

    def _pass_over(self, passed: ReplayPosition) -> Any:
        """The call is not repeated: what comes after it finds things as if it had been."""
        self.place.num_loaders = passed["num_loaders"]
        randomness.restore(passed["rng"])
        return decode(passed["returned"])


def _is_at(training: Training, nest: list[TrackedLoop]) -> bool:
    """Whether no loop round a training has gone on to another item since."""
    return not any(
        loop is now and now.delivered != number
        for ref, number in training.loops
        for now in nest
        if (loop := ref()) is not None
    )


def _as_it_is(_: str, tensor: Any) -> Any:
    return tensor.detach().clone()


def install(trainings: Trainings) -> None:
    """Follow every Trainer of this process until `patches.TRAINER` is undone."""
    place, now = trainings.place, trainings.of

    def loop(original: Any, self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if not place.follows:
            return original(self, *args, **kwargs)
        training = trainings.begin(self)
        output = None
        if training.is_led:
            kwargs["resume_from_checkpoint"] = _LED
        try:
            output = original(self, *args, **kwargs)
        finally:
            output = trainings.end(training, output)
        return output

    def init_state(
        original: Any, self: Trainer, max_steps: int, per_epoch: int, num_epochs: int, resume: Any, trial: Any
    ) -> Any:
        training = now(self)
        if training is None or resume is not _LED:
            return original(self, max_steps, per_epoch, num_epochs, resume, trial)
        original(self, max_steps, per_epoch, num_epochs, None, trial)
        return trainings.start_of(training, num_epochs)

    def prepare(original: Any, self: Trainer, max_steps: int, loader: Any, resume: Any) -> Any:
        return original(self, max_steps, loader, None if resume is _LED else resume)

    def epoch(original: Any, self: Trainer, *args: Any, **kwargs: Any) -> Any:
        training = now(self)
        if training is not None:
            trainings.begin_epoch(training, kwargs["epoch"], kwargs["train_dataloader"])
        return original(self, *args, **kwargs)

    def load_rng(original: Any, self: Trainer, checkpoint: Any) -> None:
        if checkpoint is not _LED:
            original(self, checkpoint)

    def finalize(original: Any, self: Trainer, *args: Any, **kwargs: Any) -> Any:
        training = now(self)
        if training is None or training.plan != "pass over":
            return original(self, *args, **kwargs)
        if self.neftune_noise_alpha is not None:
            hf_trainer.deactivate_neftune(self.model, self.neftune_hook_handle, self.accelerator)
        self.is_in_train = False
        return ()

    def make_skip(original: Any) -> Any:
        def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
            training = trainings.active
            if training is None:
                return original(dataloader, num_batches)
            return trainings.skip(training, dataloader, num_batches)

        return skip_first_batches

    patches.TRAINER.apply(
        {
            _SKIP: make_skip,
            **_around("_inner_training_loop", loop),
            **_around("_init_training_state", init_state),
            **_around("_prepare_for_training", prepare),
            **_around("_run_epoch", epoch),
            **_around("_load_rng_state", load_rng),
            **_around("_finalize_training", finalize),
            **_evaluations(trainings),
        }
    )


def _evaluations(trainings: Trainings) -> dict[str, Any]:
    """Those beside a training are remembered, those within one belong to it."""
    place = trainings.place

    def evaluate_within(original: Any, self: Trainer, *args: Any, **kwargs: Any) -> Any:
        training = trainings.of(self)
        if training is not None and training.is_led and place.replaying:
            return {}  # eval_on_start
        return original(self, *args, **kwargs)

    def evaluate(original: Any, self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if not place.follows or trainings.active is not None:
            return original(self, *args, **kwargs)
        ordinal = place.begun.get(EVALUATE, 0)
        place.begun = {**place.begun, EVALUATE: ordinal + 1}
        metrics = trainings.remembered(ordinal)
        if metrics is None:
            metrics = original(self, *args, **kwargs)
        trainings.evaluated(ordinal, metrics)
        return metrics

    return {**_around("_evaluate", evaluate_within), **_around("evaluate", evaluate)}


def _around(name: str, replacement: Any) -> dict[str, Any]:
    """A method of Trainer's by its target; `replacement` gets the original first."""

    def make(original: Any) -> Any:
        def method(self: Trainer, *args: Any, **kwargs: Any) -> Any:
            return replacement(original, self, *args, **kwargs)

        return method

    return {f"transformers.trainer:Trainer.{name}": make}
