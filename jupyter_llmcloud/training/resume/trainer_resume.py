"""transformers' Trainer followed: where its training is, and how `train()` gets back there when it is called again.

`Trainer` drives its own loop, outside the cell, and can begin it in any epoch and after any batch: so on the way back
it is told where, its loader is led there like any other, and everything saved is restored just before the next batch. A
`train()` that had ended is passed over; what it returned, and what `evaluate()` returned, is remembered.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
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
from jupyter_llmcloud.training.resume.loaders.passes import PassHistory
from jupyter_llmcloud.training.resume.loaders.registry import LoaderRegistry
from jupyter_llmcloud.training.resume.loaders.source import InnerIterators
from jupyter_llmcloud.training.resume.loops.tracking import Loops, TrackedLoop

_TRAIN, _EVALUATE = "Trainer.train", "Trainer.evaluate"  # counted beside the passes over loaders
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
        plan: "run", "lead" it to the saved position, or "pass over" since it had ended by then.
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
        """On its way to the saved position, or past it."""
        return self.plan != "run"


class TrainingCursor(Protocol):
    """What a Trainer's training asks and tells the cursor that follows the cell."""

    follows: bool

    @property
    def replaying(self) -> bool:
        """Whether the cell is on its way to the saved position."""

    def lead_to_pass(self) -> None:
        """The next pass over a loader is the saved one."""


class Trainings:
    """The Trainers of the present cell."""

    def __init__(
        self,
        cursor: TrainingCursor,
        loops: Loops,
        passes: PassHistory,
        loaders: LoaderRegistry,
        inner: InnerIterators,
    ) -> None:
        self._cursor = cursor
        self._inner = inner
        self._loops = loops
        self._passes = passes
        self._loaders = loaders
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

    def point(self, training: Training, iterator: TrackedIterator) -> ReplayPosition:
        """The present position of a training that is about to fetch a batch."""
        trainer = training.trainer()
        assert trainer is not None
        return {
            "ordinal": training.ordinal,
            "epoch": training.epoch,
            "batches": training.skipped + iterator.handed_out,
            "skipped": training.skipped,
            "accumulation": trainer.args.gradient_accumulation_steps,
            "num_loaders": training.num_loaders,
            "epoch_loaders": training.epoch_loaders,
            "has_evaluated": bool(_evaluation_loaders(trainer)),
        }

    def _kept(self) -> list[Training]:
        """Those that the cell would run again on the way to the present position."""
        nest = self._loops.nest()
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
        ordinal = self._passes.count(_TRAIN)
        loops = [(weakref.ref(loop), loop.delivered) for loop in self._loops.nest()]
        training = Training(weakref.ref(trainer), ordinal, self._plan(ordinal), loops, self._loaders.num_made)
        if training.plan == "lead":
            assert self._saved_training is not None
            training.num_loaders = self._loaders.num_made = self._saved_training["num_loaders"]
            if (now := trainer.args.gradient_accumulation_steps) != (was := self._saved_training["accumulation"]):
                raise ResumeMissed(
                    f"the saved place counts {was} batches for a step, this Trainer takes {now}: keep "
                    "gradient_accumulation_steps and change per_device_train_batch_size so that the whole batch is "
                    "as before."
                )
        self._active.append(training)
        return training

    def _plan(self, ordinal: int) -> str:
        if not self._cursor.replaying:
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
        if training.plan == "lead" and self._cursor.replaying:
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
        if training.plan == "lead" and self._cursor.replaying:
            assert self._saved_training is not None
            self._loaders.num_made = self._saved_training["epoch_loaders"]
            self._cursor.lead_to_pass()
        training.epoch, training.loader, training.skipped = epoch, loader, 0
        training.epoch_loaders = self._loaders.num_made

    def skip(self, training: Training, loader: Any, number: int) -> Any:
        """The Trainer wants the first batches of an epoch skipped."""
        if training.plan == "lead" and self._cursor.replaying:
            assert self._saved_training is not None
            number = self._saved_training["skipped"]
        training.skipped = number
        training.loader = patches.TRAINER.original(_SKIP)(loader, number) if number else loader
        return training.loader

    # --- evaluations ---

    def evaluate(self, run: Callable[[], Any]) -> Any:
        """`evaluate()` beside a training: what it returned when the cell ran before, else what `run` returns."""
        ordinal = self._passes.count(_EVALUATE)
        known = self._saved.get("evaluations", {}).get(ordinal) if self._cursor.replaying else None
        metrics = run() if known is None else self._pass_over(known)
        try:
            self._evaluations[ordinal] = self._passed(metrics)
        except NotPlain:
            self._evaluations.pop(ordinal, None)
        return metrics

    def evaluate_within(self, training: Training, run: Callable[[], Any]) -> Any:
        """An evaluation that belongs to a training: returns what `run` does."""
        trainer = training.trainer()
        if not (training.plan == "lead" and self._saved_training and self._saved_training.get("has_evaluated")):
            return run()
        with self._inner.with_workers(lambda: _evaluation_loaders(trainer)):
            return run()

    def _passed(self, returned: Any) -> ReplayPosition:
        """What a call returned, and what it has left behind."""
        rng = randomness.snapshot()
        return {"returned": encode(returned, _as_it_is), "num_loaders": self._loaders.num_made, "rng": rng}

    def _pass_over(self, passed: ReplayPosition) -> Any:
        """The call is not repeated: what comes after it finds things as if it had been."""
        self._loaders.num_made = passed["num_loaders"]
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


def _evaluation_loaders(trainer: Trainer | None) -> list[Any]:
    """The (inner) loaders that a Trainer keeps for its evaluations, since their workers stay."""
    kept = getattr(trainer, "_eval_dataloaders", None) or {}
    return [getattr(loader, "base_dataloader", loader) for loader in kept.values()]


def _as_it_is(_: str, tensor: Any) -> Any:
    return tensor.detach().clone()


class _Methods:
    """What takes the place of Trainer's methods, and of a function beside it; each by its name, given the original."""

    def __init__(self, trainings: Trainings, cursor: TrainingCursor) -> None:
        self._trainings = trainings
        self._cursor = cursor

    def _inner_training_loop(self, original: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        if not self._cursor.follows:
            return original(trainer, *args, **kwargs)
        training = self._trainings.begin(trainer)
        output = None
        if training.is_led:
            kwargs["resume_from_checkpoint"] = _LED
        try:
            output = original(trainer, *args, **kwargs)
        finally:
            output = self._trainings.end(training, output)
        return output

    def _init_training_state(
        self, original: Any, trainer: Trainer, max_steps: int, per_epoch: int, num_epochs: int, resume: Any, trial: Any
    ) -> Any:
        training = self._trainings.of(trainer)
        if training is None or resume is not _LED:
            return original(trainer, max_steps, per_epoch, num_epochs, resume, trial)
        original(trainer, max_steps, per_epoch, num_epochs, None, trial)
        return self._trainings.start_of(training, num_epochs)

    def _prepare_for_training(self, original: Any, trainer: Trainer, max_steps: int, loader: Any, resume: Any) -> Any:
        return original(trainer, max_steps, loader, None if resume is _LED else resume)

    def _run_epoch(self, original: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        training = self._trainings.of(trainer)
        if training is not None:
            self._trainings.begin_epoch(training, kwargs["epoch"], kwargs["train_dataloader"])
        return original(trainer, *args, **kwargs)

    def _load_rng_state(self, original: Any, trainer: Trainer, checkpoint: Any) -> None:
        if checkpoint is not _LED:
            original(trainer, checkpoint)

    def _finalize_training(self, original: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        training = self._trainings.of(trainer)
        if training is None or training.plan != "pass over":
            return original(trainer, *args, **kwargs)
        if trainer.neftune_noise_alpha is not None:
            hf_trainer.deactivate_neftune(trainer.model, trainer.neftune_hook_handle, trainer.accelerator)
        trainer.is_in_train = False
        return ()

    def skip_first_batches(self, original: Any, dataloader: Any, num_batches: int = 0) -> Any:
        training = self._trainings.active
        if training is None:
            return original(dataloader, num_batches)
        return self._trainings.skip(training, dataloader, num_batches)

    def _evaluate(self, original: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        """An evaluation within a training belongs to it."""
        training = self._trainings.of(trainer)
        if training is not None and training.is_led and self._cursor.replaying:
            return {}  # eval_on_start
        if training is None:
            return original(trainer, *args, **kwargs)
        return self._trainings.evaluate_within(training, lambda: original(trainer, *args, **kwargs))

    def evaluate(self, original: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        """One beside a training is remembered."""
        if not self._cursor.follows or self._trainings.active is not None:
            return original(trainer, *args, **kwargs)
        return self._trainings.evaluate(lambda: original(trainer, *args, **kwargs))


def install(trainings: Trainings, cursor: TrainingCursor) -> None:
    """Follow every Trainer of this process until `patches.TRAINER` is undone."""
    methods = _Methods(trainings, cursor)
    names = {target: target.replace(":", ".").rpartition(".")[2] for target in patches.TRAINER.targets}
    patches.TRAINER.apply({target: _around(getattr(methods, name)) for target, name in names.items()})


def _around(replacement: Callable[..., Any]) -> Callable[[Any], Any]:
    """Makes a function that calls `replacement` with the original before its arguments."""

    def make(original: Any) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            return replacement(original, *args, **kwargs)

        return function

    return make
