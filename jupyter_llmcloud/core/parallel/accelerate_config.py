"""What `accelerate config` has written, as a plan: every field is mapped, named as having no effect here, or refused.

Field names and values are those of accelerate's ClusterConfig (accelerate/commands/config).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.core.parallel.plan import parse_plan
from jupyter_llmcloud.errors import UsageError

_OF_WORLD: dict[str, tuple[Any, ...]] = {  # by field, the values that ask for nothing
    "machine_rank": (0,),
    "num_machines": (1,),
    "gpu_ids": ("all",),
    "main_process_ip": (),
    "main_process_port": (),
    "rdzv_backend": ("static", "c10d"),
    "same_network": (True, False),
    "main_training_function": ("main",),
    "use_cpu": (False,),
    "mpirun_config": ({},),
    "ipex_config": ({"ipex": False}, {"ipex": False, "use_xpu": False}),  # accelerate before 1.11 writes it
}
_OF_TPU: dict[str, tuple[Any, ...]] = {
    "downcast_bf16": ("no", False),
    "tpu_name": (),
    "tpu_zone": (),
    "tpu_use_cluster": (False,),
    "tpu_use_sudo": (False,),
    "command_file": (),
    "commands": (),
    "tpu_vm": (),
    "tpu_env": ([],),
}
_MAPPED = (
    *("compute_environment", "distributed_type", "mixed_precision", "num_processes", "debug", "enable_cpu_affinity"),
    *("dynamo_config", "dynamo_backend", "fp8_config", "fsdp_config", "deepspeed_config", "parallelism_config"),
    *("megatron_lm_config", "fp16"),
)
_FSDP1_ONLY = ("backward_prefetch", "backward_prefetch_policy", "forward_prefetch", "use_orig_params",
               "sync_module_states", "state_dict_type", "cpu_ram_efficient_loading")  # fmt: skip
_WHOLE_MODEL = 10**12  # parameters of a block: more than any module has, so that nothing but the root is one
_DATA_PARALLEL = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_XPU", "MULTI_MLU", "MULTI_MUSA", "MULTI_SDAA",
                  "MULTI_HPU")  # fmt: skip


@dataclass
class Translated:
    """A file in the words of a run.

    Attributes:
        plan, precision: as options; "" when the file does not say.
        num_ranks: 0 when the file does not say.
        environment: what Accelerate reads in each rank.
        notes: what has no effect here, in words.
    """

    plan: str = ""
    precision: str = ""
    num_ranks: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def parse_content(text: str) -> str:
    """The option's value: the name of a file, or what is in one as JSON, which is checked. Raises UsageError."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--accelerate-config: this is no JSON: {error}.") from None
    translate(content)
    return json.dumps(content, sort_keys=True)


def of_option(value: str | None) -> Translated:
    """What a run was given. Raises UsageError when that is the name of a file, which is on another machine perhaps."""
    if not value:
        return Translated()
    if not value.lstrip().startswith("{"):
        raise UsageError(
            f"--accelerate-config {value}: here it is to be the content of the file, as JSON. A notebook and "
            "`jupyter llmcloud run` read the file themselves."
        )
    return translate(json.loads(value))


def translate(content: Any) -> Translated:
    """Raises UsageError that names the field which cannot be carried out."""
    if not isinstance(content, Mapping) or not content:
        raise UsageError("--accelerate-config: the file has no fields. `accelerate config` writes one.")
    _refuse_other_machines(content)
    known = {*_OF_WORLD, *_OF_TPU, *_MAPPED}
    if unknown := sorted(str(name) for name in content if name not in known):
        raise UsageError(
            f"--accelerate-config: {unknown[0]!r} is no field that is known here. Remove it from the file."
        )
    _refuse(content)
    made = Translated(environment=_environment(content))
    precision = content.get("mixed_precision") or ("fp16" if content.get("fp16") else "")
    if precision not in ("", "no", "fp16", "bf16", "fp8", False):
        raise UsageError(f"--accelerate-config: mixed_precision {precision!r} is not known: no, fp16, bf16 or fp8.")
    made.precision = str(precision or "no")
    made.num_ranks = _number(content, "num_processes", 1 if content.get("distributed_type") == "NO" else 0)
    for name, usual in _OF_WORLD.items():
        if not _is_usual(content.get(name), usual):
            made.notes.append(f"{name} is not used: the world's ranks, hosts and devices are already there")
    made.plan = _plan(content, made)
    parse_plan(made.plan)
    return made


def _refuse_other_machines(content: Mapping[str, Any]) -> None:
    if content.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        raise UsageError(
            f"--accelerate-config: compute_environment {content['compute_environment']} cannot be carried out: a world "
            "is on the machines of its cluster. Only LOCAL_MACHINE can."
        )


def _refuse(content: Mapping[str, Any]) -> None:
    kind = content.get("distributed_type", "NO")
    if kind not in (*_DATA_PARALLEL, "FSDP", "DEEPSPEED") or content.get("megatron_lm_config"):
        name = "megatron_lm_config" if content.get("megatron_lm_config") else f"distributed_type {kind}"
        raise UsageError(
            f"--accelerate-config: {name} cannot be carried out. For layers that are cut say --plan tp:N or tp+fsdp, "
            "for stages --plan pipeline:N."
        )
    for name, usual in _OF_TPU.items():
        if not _is_usual(content.get(name), usual):
            raise UsageError(f"--accelerate-config: {name} is for TPUs, on which no world runs. Remove it.")


def _is_usual(value: Any, usual: tuple[Any, ...]) -> bool:
    return value is None or value in ("", {}, []) or value in usual


def _number(content: Mapping[str, Any], name: str, default: int) -> int:
    value = content.get(name)
    if value in (None, -1):  # -1: accelerate's own "not said"
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < default:
        raise UsageError(f"--accelerate-config: {name} is {value!r}, expected a whole number.")
    return value


def _count(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number, which may be written as a text. Raises UsageError that names the field."""
    text = "" if isinstance(value, bool) else str(value).strip()
    number = int(text) if text.isascii() and text.isdigit() else -1
    if number < least or (most is not None and number > most):
        kind = f"from {least} to {most}" if most is not None else f"of {least} or more"
        raise UsageError(f"--accelerate-config: {name} is {value!r}, expected a whole number {kind}.")
    return number


# Accelerate reads some fields by other names than `accelerate config` writes them.
_FP8_READ_AS = {
    "fp8_format": "format",
    "amax_history_length": "amax_history_len",
    "amax_compute_algorithm": "amax_compute_algo",
    "optimization_level": "opt_level",
}


def _environment(content: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    if _is_true(content.get("debug")):
        found["ACCELERATE_DEBUG_MODE"] = "true"
    if _is_true(content.get("enable_cpu_affinity")):
        found["ACCELERATE_CPU_AFFINITY"] = "1"
    if backend := content.get("dynamo_backend"):
        found["ACCELERATE_DYNAMO_BACKEND"] = str(backend)
    found |= {f"ACCELERATE_{name.upper()}": str(value) for name, value in _section(content, "dynamo_config").items()}
    for name, value in _section(content, "fp8_config").items():
        if name == "override_linear_precision":
            if not isinstance(value or (), list | tuple):
                raise UsageError(f"--accelerate-config: {name} is {value!r}, expected three times true or false.")
            overrides = zip(("FPROP", "DGRAD", "WGRAD"), value or (False,) * 3, strict=False)
            found |= {f"ACCELERATE_FP8_OVERRIDE_{which}": str(is_higher) for which, is_higher in overrides}
        else:
            found[f"ACCELERATE_FP8_{_FP8_READ_AS.get(name, name).upper()}"] = str(value)
    steps = _section(content, "deepspeed_config").get("gradient_accumulation_steps")
    if steps not in (None, "none", "auto") and (num := _count("gradient_accumulation_steps", steps)) > 1:
        found["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(num)
    return found


def _section(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name) or {}
    if not isinstance(section, Mapping):
        raise UsageError(f"--accelerate-config: {name} is {section!r:.40}, expected fields.")
    return dict(section)


def _is_true(value: Any) -> bool:
    return value is True or str(value).lower() in ("true", "yes", "1")


# --- the plan --------------------------------------------------------------------------------------------------------


def _plan(content: Mapping[str, Any], made: Translated) -> str:
    kind = content.get("distributed_type", "NO")
    if kind == "DEEPSPEED":
        return _of_deepspeed(_section(content, "deepspeed_config"), made)
    sizes = _section(content, "parallelism_config")
    if kind == "FSDP":
        return _of_fsdp(_section(content, "fsdp_config"), sizes, content, made)
    return _of_sizes(sizes, "") if sizes else "ddp"


def _of_fsdp(section: dict[str, Any], sizes: dict[str, Any], content: Mapping[str, Any], made: Translated) -> str:
    fields = {name.removeprefix("fsdp_"): value for name, value in section.items()}
    if _is_one(fields.pop("version", 1)):
        made.notes.append("fsdp_version 1 is carried out as version 2 (fully_shard), which trains the same")
    strategy = str(fields.pop("sharding_strategy", fields.pop("reshard_after_forward", True))).upper()
    fields.pop("reshard_after_forward", None)
    options = _wrapping(fields)
    if strategy in ("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2", "FALSE", "2", "5"):
        options.append("reshard=no")
    elif strategy not in ("FULL_SHARD", "HYBRID_SHARD", "NO_SHARD", "TRUE", "1", "3", "4"):
        raise UsageError(f"--accelerate-config: fsdp_sharding_strategy {strategy} is not known.")
    if _is_true(fields.pop("offload_params", False)):
        options.append("offload=yes")
    if _is_true(fields.pop("activation_checkpointing", False)):
        options.append("recompute=yes")
    if without := [f"fsdp_{name}" for name in _FSDP1_ONLY if fields.pop(name, None) is not None]:
        verb = "has" if len(without) == 1 else "have"
        made.notes.append(
            f"{', '.join(without)} {verb} no counterpart in fully_shard; what is trained and saved is the same"
        )
    if fields:
        raise UsageError(f"--accelerate-config: fsdp_{next(iter(fields))} cannot be carried out. Remove it.")
    suffix = "".join(f",{option}" for option in options)
    if strategy in ("NO_SHARD", "3"):
        return "ddp"
    if sizes:
        return _of_sizes(sizes, suffix)
    hosts = _number(content, "num_machines", 1)
    if strategy.startswith("HYBRID") or strategy in ("4", "5"):
        if hosts > 1 and not made.num_ranks:
            raise UsageError(
                f"--accelerate-config: {strategy} on {hosts} machines needs num_processes, how many ranks there are on "
                "all of them together. Add it to the file."
            )
        if hosts > 1 and made.num_ranks % hosts == 0:
            return f"hsdp:{hosts}x{made.num_ranks // hosts}{suffix}"
        made.notes.append(f"{strategy} on one host is FULL_SHARD: its only group has all ranks")
    return "fsdp" + suffix


def _is_one(value: Any) -> bool:
    return str(value) == "1"


def _wrapping(fields: dict[str, Any]) -> list[str]:
    policy = str(fields.pop("auto_wrap_policy", "TRANSFORMER_BASED_WRAP")).upper()
    classes, smallest = fields.pop("transformer_layer_cls_to_wrap", None), fields.pop("min_num_params", None)
    if policy == "NO_WRAP":
        return [f"min-params={_WHOLE_MODEL}"]
    if policy == "SIZE_BASED_WRAP":
        return [f"min-params={_parameters(smallest)}"]
    if policy != "TRANSFORMER_BASED_WRAP":
        raise UsageError(f"--accelerate-config: fsdp_auto_wrap_policy {policy} is not known.")
    names = classes.split(",") if isinstance(classes, str) else classes or ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UsageError(
            f"--accelerate-config: fsdp_transformer_layer_cls_to_wrap is {classes!r}, expected names of classes with "
            "commas between them."
        )
    wanted = [name.strip() for name in names if name.strip()]
    return [f"wrap={'+'.join(wanted)}"] if wanted else []


def _parameters(value: Any) -> int:
    """The smallest number of a block; 1e8 and 100000000 are one, and so it is when the file does not say."""
    try:
        number = int(float(value or 1e8))
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1 or isinstance(value, bool):
        raise UsageError(f"--accelerate-config: fsdp_min_num_params is {value!r}, expected a number of parameters.")
    return number


def _of_sizes(section: dict[str, Any], suffix: str) -> str:
    fields = {name.removeprefix("parallelism_config_"): value for name, value in section.items()}

    def size(name: str) -> int:
        value = fields.pop(name, None)
        return 1 if value is None else _count(f"parallelism_config_{name}", value)

    copies, shards, layers = (size(f"{name}_size") for name in ("dp_replicate", "dp_shard", "tp"))
    for name, value in fields.items():
        if name in ("cp_size", "sp_size") and value is not None and _count(f"parallelism_config_{name}", value) > 1:
            raise UsageError(f"--accelerate-config: {name} {value} cannot be carried out: no plan cuts sequences.")
        if name not in ("cp_size", "sp_size") and not name.startswith(("cp_", "sp_")):
            raise UsageError(f"--accelerate-config: parallelism_config_{name} is no field that is known here.")
    if layers > 1 and copies > 1:
        raise UsageError(
            f"--accelerate-config: tp_size {layers} with dp_replicate_size {copies} cannot be carried out. Say "
            f"dp_shard_size in place of dp_replicate_size: --plan tp+fsdp:{layers}."
        )
    if layers > 1:
        return f"tp+fsdp:{layers}{suffix}" if shards > 1 else f"tp:{layers}"
    if copies > 1:
        return f"hsdp:{copies}x{shards}{suffix}" if shards > 1 else "ddp"
    return "fsdp" + suffix if shards > 1 else "ddp"


def _of_deepspeed(section: dict[str, Any], made: Translated) -> str:
    told = section.get("zero_stage")  # 0 is a stage, and not "not said" as elsewhere
    stage = 2 if told in (None, "auto") else _count("zero_stage", told, 0, 3)
    fields = {name: value for name, value in section.items() if value not in (None, "none", "auto", False)}
    if file := fields.get("deepspeed_config_file"):
        raise UsageError(
            f"--accelerate-config: deepspeed_config_file {file} is read by DeepSpeed alone. ZeRO shards as --plan fsdp "
            "does: say that instead."
        )
    fields.pop("zero_stage", None)
    fields.pop("gradient_accumulation_steps", None)
    options: list[str] = []
    for name in ("offload_param_device", "offload_optimizer_device"):
        device = fields.pop(name, None)
        if device == "nvme":
            raise UsageError(f"--accelerate-config: {name} nvme cannot be carried out; --plan fsdp,offload=yes can.")
        options += ["offload=yes"] if device == "cpu" and not options else []
    if "gradient_clipping" in fields:
        raise UsageError(
            f"--accelerate-config: gradient_clipping {fields['gradient_clipping']} is done inside DeepSpeed. Call "
            "accelerator.clip_grad_norm_() in the cell, and remove it from the file."
        )
    saved = [
        name for name in fields if name.startswith(("zero3_", "deepspeed_multinode_launcher", "deepspeed_hostfile"))
    ]
    for name in saved:
        del fields[name]
    if fields:
        raise UsageError(f"--accelerate-config: {next(iter(fields))} is for DeepSpeed alone. Say --plan fsdp instead.")
    plan = "ddp" if stage == 0 else "fsdp" + ("" if stage == 3 else ",reshard=no") + "".join(f",{o}" for o in options)
    made.notes.append(f"DeepSpeed's ZeRO stage {stage} is carried out by torch, as --plan {plan}")
    return plan
