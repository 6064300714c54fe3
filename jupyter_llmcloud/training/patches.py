"""The catalogue: every function of another package, and of the standard library, that a rank replaces, and why.

Nothing in a rank is replaced in any other way (a test compares this list with a living rank). Each record is checked
against the installed version before anything is replaced: what differs is off, with words for the user, and training
works without it. `WHILE_TRACKED` holds only in cells that ask for checkpoints, restarts or resume, and is undone at
their end; `ON_IMPORT` only where a cell imports the library.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jupyter_llmcloud.system.patching import Patch

_TORCH = "torch 2.6 to 2.15"
_ACCELERATE = "accelerate 1.10 to 1.15"
_TRANSFORMERS = "transformers 5.23 to 5.24"
_PYTHON = "Python 3.11 to 3.13"
_LIGHTNING = "Lightning 2.5 to 2.6"
_IPYTHON = "IPython 9.4 to 9.18"
_C10D = "torch.distributed.distributed_c10d"

# --- replay of a cell ------------------------------------------------------------------------------------------------

LOADERS = Patch(
    feature="Resume of a cell",
    why="A data loader is found again in the next attempt by the order in which loaders were made; torch tells nobody.",
    without="Training works; checkpoints, and restarts in the middle of a cell, do not: a restarted cell begins anew.",
    checked=_TORCH,
    targets={"torch.utils.data:DataLoader.__init__": ("dataset", "batch_size", "shuffle")},
)
PASSES = Patch(
    feature="Resume of a cell",
    why=(
        "torchdata's StatefulDataLoader resumes only loops written for it, and not the random numbers of transforms; "
        "the loader that a script made must deliver what it would have delivered."
    ),
    without="Training works; checkpoints, and restarts in the middle of a cell, do not: a restarted cell begins anew.",
    checked=f"{_TORCH}, {_ACCELERATE}",
    targets={
        "torch.autograd:backward": ("tensors",),
        "torch.utils.data:DataLoader.__iter__": (),
        "accelerate.data_loader:DataLoaderShard.__iter__": (),
        "accelerate.data_loader:DataLoaderDispatcher.__iter__": (),
    },
)
TRAINER = Patch(
    feature="Resume inside Trainer.train()",
    why=(
        "resume_from_checkpoint restores neither the place in an epoch of a loader with random transforms, nor what "
        "callbacks, subclasses and the cell keep; so the Trainer is told where to begin, and we restore."
    ),
    without="Training works; a Trainer in a cell that is restarted begins anew.",
    checked=_TRANSFORMERS,
    targets={
        "transformers.trainer:Trainer._inner_training_loop": (
            *("batch_size", "args", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
        ),
        "transformers.trainer:Trainer._init_training_state": (
            *("max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"),
        ),
        "transformers.trainer:Trainer._prepare_for_training": (
            *("max_steps", "train_dataloader", "resume_from_checkpoint"),
        ),
        "transformers.trainer:Trainer._run_epoch": ("model", "epoch", "train_dataloader"),
        "transformers.trainer:Trainer._load_rng_state": ("checkpoint",),
        "transformers.trainer:Trainer._finalize_training": ("trial",),
        "transformers.trainer:Trainer._evaluate": (),
        "transformers.trainer:Trainer.evaluate": ("eval_dataset",),
        "transformers.trainer:skip_first_batches": ("dataloader", "num_batches"),
    },
)
CODE_BY_VALUE = Patch(
    feature="Sending functions of a cell by cloudpickle while it saves checkpoints",
    why="The code that runs then counts loops; another process gets the code as it was written. There is no hook.",
    without="Training works; send functions from a cell without checkpoints or restarts.",
    checked="cloudpickle 3.1",
    targets={"cloudpickle:CloudPickler.dispatch_table": None},
)
WHILE_TRACKED = (PASSES, TRAINER, CODE_BY_VALUE)

# --- metrics and progress --------------------------------------------------------------------------------------------

ACCELERATOR = Patch(
    feature="Metrics of accelerator.log()",
    why="log_with= names trackers of the script; ours is attached whatever the script names, and on every rank.",
    without="Training works; log by run.log(loss=...) instead.",
    checked=_ACCELERATE,
    targets={"accelerate:Accelerator.__init__": (), "accelerate:Accelerator.log": ()},
)
UNEVEN_INPUTS = Patch(
    feature="join_uneven_inputs() on ranks without a GPU",
    why="Accelerate leaves it out there with a warning, and ranks with more batches wait for the others for ever.",
    without="Say `with torch.distributed.algorithms.Join([model]):` instead.",
    checked=_ACCELERATE,
    targets={"accelerate:Accelerator.join_uneven_inputs": ("joinables", "even_batches")},
)
PARTIAL_STATE = Patch(
    feature="PartialState() on ranks without a GPU",
    why="Only Accelerator() reads ACCELERATE_USE_CPU: PartialState() alone takes each rank for a world of its own.",
    without="Make the Accelerator() before anything that asks for the state of the world.",
    checked=_ACCELERATE,
    targets={"accelerate.state:PartialState.__init__": ("cpu",)},
)
TRAINER_METRICS = Patch(
    feature="Metrics and progress of Trainer",
    why="Callbacks are given to each Trainer; there is no public list of those that every Trainer has.",
    without="Training works; add a callback that calls run.log().",
    checked=_TRANSFORMERS,
    targets={"transformers.trainer:DEFAULT_CALLBACKS": None},
)
PROGRESS = Patch(
    feature="The progress line that follows tqdm",
    why="tqdm tells nobody where its bars are.",
    without="Training works; say run.progress(step, total).",
    checked="tqdm 4.67",
    targets={"tqdm.std:tqdm.display": ()},
)
NOTEBOOK_BARS = Patch(
    feature="Bars of tqdm.notebook as text",
    why="Its widgets would have nobody to talk to: a rank is no kernel.",
    without="Use tqdm.tqdm.",
    checked="tqdm 4.67",
    targets={"tqdm.notebook": None},
)

# --- state of libraries that ends with its cell ----------------------------------------------------------------------

ENVIRONMENT = Patch(
    feature="Taking back environment variables that a library has set in a cell",
    why="Only who writes a variable tells whether it is the library's or the cell's; os.environ keeps no account.",
    without="Training works; after a cell with a DeepSpeed or FSDP plugin restart the world.",
    checked=_PYTHON,
    targets={"os:_Environ.__setitem__": ("key", "value"), "os:_Environ.__delitem__": ("key",)},
)
ACCUMULATION = Patch(
    feature="Ending a window of gradient accumulation with its cell",
    why="All Accelerators of a process share one state of accumulation, for which Accelerate has no hook.",
    without="Training works; a cell that ends inside such a window should be the last of its world.",
    checked=_ACCELERATE,
    targets={
        "accelerate:Accelerator.__init__": (),
        "accelerate:Accelerator.accumulate": (),
        "accelerate:Accelerator.backward": (),
    },
)

# --- preemption -----------------------------------------------------------------------------------------------------

LOADER_WORKERS = Patch(
    feature="Workers of data loaders that outlive a SIGTERM of all processes",
    why="They die of it before the rank has saved a checkpoint; torch has no hook that runs before a worker fetches.",
    without="Training works; where a batch system takes a place away, a run goes on from its last periodic checkpoint.",
    checked=_TORCH,
    targets={
        "torch.utils.data._utils.worker:_worker_loop": (
            *("dataset_kind", "dataset|dataset_holder", "index_queue", "data_queue", "done_event"),
        ),
        "torch.utils.data._utils.signal_handling:_set_worker_signal_handlers": None,  # of C++
    },
)

# --- launchers -------------------------------------------------------------------------------------------------------

LAUNCHERS = Patch(
    feature="notebook_launcher() and spawn() in a cell",
    why="The ranks of the world are the processes that they would start.",
    without="Call the training function itself, without a launcher.",
    checked=f"{_ACCELERATE}, {_TORCH}",
    targets={
        "accelerate:notebook_launcher": ("function", "args", "num_processes", "mixed_precision"),
        "accelerate:debug_launcher": ("function", "args", "num_processes"),
        "accelerate.launchers:notebook_launcher": ("function", "args", "num_processes", "mixed_precision"),
        "accelerate.launchers:debug_launcher": ("function", "args", "num_processes"),
        "torch.multiprocessing:spawn": ("fn", "args", "nprocs", "join", "daemon", "start_method"),
        "torch.multiprocessing.spawn:spawn": ("fn", "args", "nprocs", "join", "daemon", "start_method"),
        "torch.multiprocessing:start_processes": ("fn", "args", "nprocs", "join", "daemon", "start_method"),
    },
)
IGNITE = Patch(
    feature="Parallel(nproc_per_node=...) of ignite in a cell",
    why="The ranks of the world are the processes that it would start.",
    without="Say Parallel(backend=...) without nproc_per_node.",
    checked="ignite 0.5",
    targets={
        "ignite.distributed.comp_models.native:_NativeDistModel.spawn": (
            *("fn", "args", "kwargs_dict", "nproc_per_node", "nnodes"),
        ),
    },
)
ELASTIC_LAUNCH = Patch(
    feature="elastic_launch() of a function of a cell",
    why="The ranks of the world are the processes that it would start.",
    without="Call the function itself.",
    checked=_TORCH,
    targets={"torch.distributed.launcher.api:elastic_launch.__call__": ("args",)},
)

# --- Lightning and Fabric, which are in two pairs of packages --------------------------------------------------------

_RANKS: dict[str, Any] = {
    "why": "Only their user can tell them how many devices and hosts there are; a CPU counts as one device.",
    "without": "Say Trainer(strategy='ddp', devices=world_size), or Fabric alike, on a world of one host.",
    "checked": _LIGHTNING,
}
_LOGGERS: dict[str, Any] = {
    "why": "Loggers are given to each Trainer and Fabric; there is no public list of those that all have.",
    "without": "Training works; log by run.log(loss=...) instead.",
    "checked": _LIGHTNING,
}
_OF_LIGHTNING = (
    Patch(
        feature="Trainer() of Lightning over the ranks of a world",
        targets={
            "{connectors}.accelerator_connector:_AcceleratorConnector.__init__": (
                *("devices", "num_nodes", "accelerator", "strategy"),
            )
        },
        **_RANKS,
    ),
    Patch(
        feature="Fabric() over the ranks of a world",
        targets={
            "{fabric}.connector:_Connector.__init__": ("accelerator", "strategy", "devices", "num_nodes"),
        },
        **_RANKS,
    ),
    Patch(
        feature="Metrics and progress of Lightning",
        targets={
            "{connectors}.logger_connector.logger_connector:_LoggerConnector.log_metrics": ("metrics", "step"),
            "{connectors}.logger_connector.logger_connector:_LoggerConnector.update_train_step_metrics": (),
        },
        **_LOGGERS,
    ),
    Patch(
        feature="Resume inside fit() of Lightning",
        why="Its checkpoints know neither the order of samples within an epoch nor the random numbers.",
        without="Training works; a Trainer of Lightning in a cell that is restarted begins anew.",
        checked=_LIGHTNING,
        targets={"{pytorch}.loops.fit_loop:_FitLoop.run": ()},
    ),
    Patch(
        feature="Resume after an evaluation of Lightning",
        why="It counts its batches and leaves its passes over loaders as if they were under way.",
        without="Training works; the first evaluation after a resume within fit() may see no batches.",
        checked=_LIGHTNING,
        targets={"{pytorch}.loops.evaluation_loop:_EvaluationLoop.run": ()},
    ),
    Patch(
        feature="Means over an epoch that is resumed in Lightning",
        why="The means of an epoch that is under way are in no checkpoint of its own.",
        without="Training works; means over the epoch in which a cell was resumed begin there.",
        checked=_LIGHTNING,
        targets={
            "{connectors}.logger_connector.result:_ResultCollection.update_metrics": (*("key", "value", "batch_size"),),
        },
    ),
    Patch(
        feature="Resume of loaders that Fabric has set up",
        why="They count their passes in an attribute, from which the order of samples follows.",
        without="Training works; a loop of Fabric that is resumed may take samples in another order.",
        checked=_LIGHTNING,
        targets={"{fabric}.fabric:Fabric.setup_dataloaders": ("dataloaders", "use_distributed_sampler")},
    ),
    Patch(
        feature="Metrics of Fabric",
        targets={"{fabric}.fabric:Fabric.log_dict": ("metrics", "step")},
        **_LOGGERS,
    ),
)


def _in_packages(pytorch: str, fabric: str) -> tuple[Patch, ...]:
    """What is replaced of Lightning and Fabric, in one of the pairs of packages that have them."""

    modules = {"pytorch": pytorch, "connectors": f"{pytorch}.trainer.connectors", "fabric": fabric}
    return tuple(
        replace(patch, targets={at.format(**modules): names for at, names in patch.targets.items()}, _originals={})
        for patch in _OF_LIGHTNING
    )


LIGHTNING = (
    *_in_packages("lightning.pytorch", "lightning.fabric"),
    *_in_packages("pytorch_lightning", "lightning_fabric"),
)

# --- process groups --------------------------------------------------------------------------------------------------

GROUPS = Patch(
    feature="init_process_group() and destroy_process_group() in a cell",
    why="The world has a group already, and the next cell needs it; a Stop must find the sockets of every group.",
    without="Leave both calls out: the world has its group.",
    checked=_TORCH,
    targets={
        f"{module}:{name}": parameters
        for module in (_C10D, "torch.distributed")
        for name, parameters in {
            "init_process_group": ("backend",),
            "destroy_process_group": ("group",),
            "new_group": ("ranks",),
        }.items()
    },
)
OWN_STORES = Patch(
    feature="Process groups of processes that a cell starts, and torch.distributed.rpc",
    why="The port of the world is taken, and the one that a tutorial names is there once, but asked for by each rank.",
    without="Start processes on one rank (--ranks 0); give RPC an init_method with a free port.",
    checked=_TORCH,
    targets={"torch.distributed.rendezvous:_create_c10d_store": ("hostname", "port", "rank", "world_size", "timeout")},
)
GROUP_NUMBERS = Patch(
    feature="The count of collectives in hang reports",
    why="torch's flight recorder knows groups by the order in which they were made, which nothing public tells.",
    without="Training works; a hang report names lines and ranks only.",
    checked=_TORCH,
    targets={f"{_C10D}:_new_process_group_helper": ()},
)
DDP_WRAPPERS = Patch(
    feature="Keeping DistributedDataParallel models over a Stop",
    why="A wrapper holds its group in C++, and keeps none of the arguments with which it was made.",
    without="Training works; after a Stop or a failed rank wrap the model again.",
    checked=_TORCH,
    targets={"torch.nn.parallel:DistributedDataParallel.__init__": ("module",)},
)

PLANS = Patch(
    feature="--plan for calls of an Accelerator",
    why="Accelerate knows data parallel training on a CPU only, and has no hook for another way to spread a model.",
    without="Only --plan ddp works; spread the model in the cell, by fully_shard or parallelize_module.",
    checked=_ACCELERATE,
    targets={
        "accelerate:Accelerator.__init__": (),
        "accelerate:Accelerator.num_processes": None,  # a property
        "accelerate:Accelerator.prepare": ("args", "device_placement"),
        "accelerate:Accelerator.prepare_model": ("model", "device_placement", "evaluation_mode"),
        "accelerate:Accelerator.get_state_dict": ("model", "unwrap"),
        "accelerate:Accelerator.save": ("obj", "f", "safe_serialization"),
        "accelerate:Accelerator.save_state": ("output_dir",),
        "accelerate:Accelerator.load_state": ("input_dir",),
        "accelerate:Accelerator.gather": ("tensor",),
        "accelerate:Accelerator.reduce": ("tensor", "reduction", "scale"),
        "accelerate.state:PartialState.wait_for_everyone": (),
        "accelerate.state:PartialState.split_between_processes": ("inputs", "apply_padding"),
        "accelerate.local_sgd:LocalSGD.__init__": ("accelerator", "model", "local_sgd_steps", "enabled"),
        "accelerate.accelerator:gather_object": ("object",),
        "accelerate.utils:gather": ("tensor",),
        "accelerate.utils:reduce": ("tensor", "reduction", "scale"),
        "accelerate.utils:gather_object": ("object",),
        "accelerate.accelerator:prepare_data_loader": ("dataloader", "device", "num_processes", "process_index"),
        "accelerate.scheduler:AcceleratedScheduler.step": (),
        "accelerate.data_loader:DataLoaderShard.__iter__": (),
    },
)

CUT_TENSORS = Patch(
    feature="Clipping, numbers and second gradients of models that a plan has cut",
    why="torch clips tensors alike only, gives this rank's part of a sum over ranks as a number, and leaves out of "
    "gradients of gradients what the other ranks add. It has no hook for any of these.",
    without="Clip by accelerator.clip_grad_norm_(); call full_tensor() before item(); take second gradients under "
    "--plan ddp.",
    checked=_TORCH,
    targets={
        "torch.nn.utils:clip_grad_norm_": ("parameters", "max_norm", "norm_type"),
        "torch.nn.utils.clip_grad:clip_grad_norm_": ("parameters", "max_norm", "norm_type"),
        "torch.nn.utils:clip_grad_value_": ("parameters", "clip_value", "foreach"),
        "torch.nn.utils.clip_grad:clip_grad_value_": ("parameters", "clip_value", "foreach"),
        "torch.autograd:_engine_run_backward": ("t_outputs",),
        "torch.distributed.tensor:DTensor.item": None,
        "torch.distributed.tensor:DTensor.tolist": None,
        "torch.distributed.tensor:DTensor.__float__": None,
        "torch.distributed.tensor:DTensor.__int__": None,
        "torch.distributed.tensor:DTensor.__bool__": None,
    },
)

TRAINER_PLANS = Patch(
    feature="--plan, --balance and --elastic for a Trainer",
    why="It counts every process as one with data of its own, multiplies losses by the processes that there are, and "
    "saves on one rank what others have a part of.",
    without="Under a plan that shares batches, and on other numbers of ranks, Trainer's losses are multiplied; save "
    "with --save only.",
    checked=_TRANSFORMERS,
    targets={
        "transformers:Trainer._get_num_items_in_batch": ("batch_samples", "device"),
        "transformers:Trainer.compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
        "transformers:Trainer.evaluation_loop": ("dataloader", "description"),
        "transformers:Trainer.train": ("resume_from_checkpoint",),
        "transformers:PreTrainedModel.save_pretrained": ("save_directory",),
    },
)
ADAPTER_PLANS = Patch(
    feature="A word where an adapter that a plan has cut would be saved in parts",
    why="Its model saves what this rank has of each tensor; peft asks nobody before it writes.",
    without="Under a plan save adapters with --save only.",
    checked="peft 0.21",
    targets={"peft.peft_model:PeftModel.save_pretrained": ("save_directory",)},
)
SPAWNED_WORKERS = Patch(
    feature="Loader workers and pools started by spawn or forkserver with classes and functions of a cell",
    why="multiprocessing sends them by name and imports the main module again; a cell is in no module.",
    without='Say DataLoader(..., multiprocessing_context="fork"), or keep them in a module beside the notebook.',
    checked=_PYTHON,
    targets={
        "multiprocessing.reduction:dump": ("obj", "file", "protocol"),
        "multiprocessing.reduction:ForkingPickler.__init__": (),
        "multiprocessing.spawn:get_preparation_data": ("name",),
    },
)
SEEDS = Patch(
    feature="Random numbers of --seed that are apart on each rank while it trains",
    why="Workers of a loader are seeded from a generator that ranks share; fully_shard tells nobody that it wraps.",
    without="Training works; with --seed dropout and augmentation are alike on every rank.",
    checked=_TORCH,
    targets={
        "torch.utils.data.dataloader:_BaseDataLoaderIter.__init__": ("loader",),
        "torch.distributed.fsdp:fully_shard": ("module",),
        "torch.distributed.fsdp:FullyShardedDataParallel.__init__": ("module",),
    },
)

# --- what a cell shows and asks --------------------------------------------------------------------------------------

NO_STDIN = Patch(
    feature="The answer to input() on a rank",
    why="There is nobody to ask on a rank; it would wait for ever.",
    without="Do not ask for input in a distributed cell.",
    checked=_PYTHON,
    targets={
        "builtins:input": None,
        "getpass:getpass": None,
        "sys:breakpointhook": None,
        "bdb:Bdb.set_trace": None,
        "pdb:Pdb.interaction": None,
    },
)
WARNINGS = Patch(
    feature="Showing a warning of several ranks once",
    why="warnings.showwarning is meant to be replaced; log handlers that libraries made before write to the terminal.",
    without="Warnings are shown as each rank prints them.",
    checked=_PYTHON,
    targets={
        "warnings:showwarning": ("message", "category", "filename", "lineno", "file", "line"),
        "logging:StreamHandler.emit": ("record",),
    },
)
GRAD_MODES = Patch(
    feature="Telling evaluation from training in hang reports",
    why="Whether gradients are on is a property of the thread; only that thread can ask torch.",
    without="Training works; a report may call an evaluation a step that takes long.",
    checked=_TORCH,
    targets={
        "torch:no_grad.__enter__": (),
        "torch:no_grad.__exit__": (),
        "torch:inference_mode.__enter__": (),
        "torch:inference_mode.__exit__": (),
    },
)
BLOCKED_TIME = Patch(
    feature="The time that a rank spends in collectives",
    why="Profilers that torch has for it slow a step down; waiting is begun and ended nowhere else.",
    without="Training works; the time is counted as computing.",
    checked=_TORCH,
    targets={
        "torch._C._distributed_c10d:Work.wait": None,  # of C++
        "torch.distributed._functional_collectives:wait_tensor": ("tensor",),
        "torch.nn.parallel:DistributedDataParallel._pre_forward": (),
        "torch.autograd:_engine_run_backward": ("t_outputs",),
    },
)
LOSSES = Patch(
    feature="--balance and --elastic: a Trainer's means weighed by rows, and a word where a loss is no mean of rows",
    why="Whether a loss is a mean over its rows is told by its graph, which nobody has but who computes gradients; "
    "that ranks wait for others is known where they do.",
    without="Training works; gradients of sums are weighed by rows, and a step of several backward passes is not "
    "shared out by speed.",
    checked=_TORCH,
    targets={
        "torch.autograd:_engine_run_backward": ("t_outputs",),
        "torch.nn.parallel:DistributedDataParallel._pre_forward": (),
    },
)
DATA_TIME = Patch(
    feature="The time that a rank spends in data loaders",
    why="Loaders have no hook, and iterators are made by the loops of libraries.",
    without="Training works; the time is counted as computing.",
    checked=_TORCH,
    targets={"torch.utils.data.dataloader:_BaseDataLoaderIter.__next__": ()},
)
CHECKPOINT_TIME = Patch(
    feature="The time that a rank spends in checkpoints",
    why="Saving has no hook.",
    without="Training works; the time is counted as computing.",
    checked=f"{_TORCH}, {_ACCELERATE}, {_TRANSFORMERS}",
    targets={
        "torch:save": ("obj", "f"),
        "accelerate:Accelerator.save_state": ("output_dir",),
        "transformers:PreTrainedModel.save_pretrained": ("save_directory",),
    },
)
EXIT_ADVICE = Patch(
    feature="Leaving out IPython's advice on exit",
    why="SystemExit in a cell makes IPython advise keys that a rank has not.",
    without="After sys.exit() in a cell IPython's advice is shown.",
    checked=_IPYTHON,
    targets={"IPython.core.interactiveshell:warn": None},  # a built-in function
)
FAILING_LINES = Patch(
    feature="The failing line in tracebacks of cells",
    why="IPython asks the disk for the lines of a file; cells are in linecache only.",
    without="Tracebacks point at the head of the statement that failed.",
    checked=_IPYTHON,
    targets={"IPython.core.ultratb:get_line_number_of_frame": ("frame",)},
)
CLASS_SOURCES = Patch(
    feature="The source of classes of cells",
    why="Python looks for the source of a class in the file of its module; a notebook has many cells.",
    without="inspect.getsource() finds no class, or that of another cell.",
    checked=_PYTHON,
    targets={"inspect:getfile": ("object",)},
)

AT_EXIT = Patch(
    feature="atexit in scripts",
    why="A rank outlives the script that it executes, and nobody tells what others have registered.",
    without="Functions that a script registers with atexit are not called at its end.",
    checked=_PYTHON,
    targets={"atexit:register": None, "atexit:unregister": None},  # built-in functions
)

# Of libraries that most cells never load: replaced as soon as a cell imports the module.
ON_IMPORT = (IGNITE, ELASTIC_LAUNCH, *LIGHTNING, ADAPTER_PLANS)

CATALOGUE = (
    *(LOADERS, PASSES, TRAINER, CODE_BY_VALUE),
    *(ENVIRONMENT, ACCUMULATION),
    *(ACCELERATOR, UNEVEN_INPUTS, PARTIAL_STATE, TRAINER_METRICS, PROGRESS, NOTEBOOK_BARS),
    LOADER_WORKERS,
    *(LAUNCHERS, GROUPS, OWN_STORES, GROUP_NUMBERS, DDP_WRAPPERS),
    *(PLANS, CUT_TENSORS, TRAINER_PLANS, SEEDS, SPAWNED_WORKERS, *ON_IMPORT),
    *(BLOCKED_TIME, LOSSES, DATA_TIME, CHECKPOINT_TIME),
    *(NO_STDIN, WARNINGS, GRAD_MODES, EXIT_ADVICE, FAILING_LINES, CLASS_SOURCES, AT_EXIT),
)
