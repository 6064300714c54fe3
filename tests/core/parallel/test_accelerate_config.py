"""Every field that `accelerate config` writes is mapped, named as having no effect, or refused: by values."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import pytest

from jupyter_llmcloud.core.parallel.accelerate_config import of_option, parse_content, translate
from jupyter_llmcloud.errors import UsageError

PLAIN: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE", "debug": False, "distributed_type": "MULTI_GPU", "downcast_bf16": "no",
    "enable_cpu_affinity": False, "gpu_ids": "all", "machine_rank": 0, "main_training_function": "main",
    "mixed_precision": "bf16", "num_machines": 1, "num_processes": 4, "rdzv_backend": "static", "same_network": True,
    "tpu_env": [], "tpu_use_cluster": False, "tpu_use_sudo": False, "use_cpu": False,
}  # fmt: skip


def fsdp(**fields: Any) -> dict[str, Any]:
    named = {f"fsdp_{name}": value for name, value in fields.items()}
    return {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, **named}}


@pytest.mark.parametrize(
    ("changed", "plan"),
    [
        ({}, "ddp"),
        (fsdp(), "fsdp"),
        (fsdp(reshard_after_forward=False), "fsdp,reshard=no"),
        (fsdp(sharding_strategy="SHARD_GRAD_OP", version=1), "fsdp,reshard=no"),
        (fsdp(sharding_strategy="NO_SHARD", version=1), "ddp"),
        ({**fsdp(sharding_strategy="HYBRID_SHARD", version=1), "num_machines": 2}, "hsdp:2x2"),
        (fsdp(transformer_layer_cls_to_wrap="A,B", offload_params=True), "fsdp,wrap=A+B,offload=yes"),
        (fsdp(auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=1000), "fsdp,min-params=1000"),
        (fsdp(auto_wrap_policy="NO_WRAP", activation_checkpointing=True), "fsdp,min-params=1000000000000,recompute=yes"),
        ({**fsdp(), "parallelism_config": {"parallelism_config_dp_replicate_size": 2,
                                           "parallelism_config_dp_shard_size": 2}}, "hsdp:2x2"),
        ({**fsdp(), "parallelism_config": {"parallelism_config_tp_size": 2,
                                           "parallelism_config_dp_shard_size": 2}}, "tp+fsdp:2"),
        ({"parallelism_config": {"parallelism_config_tp_size": 4}}, "tp:4"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, "offload_param_device": "cpu"}},
         "fsdp,offload=yes"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}, "fsdp,reshard=no"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 0}}, "ddp"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": "3"}}, "fsdp"),
    ],
)  # fmt: skip
def test_a_file_is_a_plan(changed: dict[str, Any], plan: str) -> None:
    found = translate({**PLAIN, **changed})
    assert (found.plan, found.precision, found.num_ranks) == (plan, "bf16", 4)


def test_what_accelerate_reads_in_each_rank_is_handed_on() -> None:
    asked = {
        **PLAIN,
        "debug": True,
        "enable_cpu_affinity": True,
        "dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_use_dynamic": False},
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"gradient_accumulation_steps": 4, "zero_stage": 0},
    }
    found = translate(asked)
    assert found.environment == {
        "ACCELERATE_DEBUG_MODE": "true",
        "ACCELERATE_CPU_AFFINITY": "1",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    }
    assert any("ZeRO" in note for note in found.notes)


def test_what_the_world_has_decided_is_named() -> None:
    found = translate({**PLAIN, "num_machines": 2, "main_process_ip": "10.0.0.1", "use_cpu": True})
    assert [note.partition(" ")[0] for note in found.notes] == ["num_machines", "main_process_ip", "use_cpu"]
    assert translate(PLAIN).notes == []
    assert translate({**PLAIN, "ipex_config": {"ipex": False}}).notes == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"compute_environment": "AMAZON_SAGEMAKER", "ec2_instance_type": "ml.p3.2xlarge"}, "LOCAL_MACHINE"),
        ({"distributed_type": "XLA"}, "distributed_type XLA"),
        ({"distributed_type": "MEGATRON_LM", "megatron_lm_config": {"megatron_lm_tp_degree": 2}}, "tp:N"),
        ({"tpu_name": "v4"}, "TPUs"),
        ({"colour": "blue"}, "'colour'"),
        ({"mixed_precision": "int3"}, "int3"),
        ({"num_processes": "four"}, "whole number"),
        ({"fsdp_config": [1], "distributed_type": "FSDP"}, "expected fields"),
        (fsdp(auto_wrap_policy="OTHER"), "OTHER"),
        (fsdp(shiny=1), "fsdp_shiny"),
        (fsdp(transformer_layer_cls_to_wrap=True), "names of classes"),
        ({"parallelism_config": {"parallelism_config_cp_size": 2}}, "cp_size"),
        ({"parallelism_config": {"parallelism_config_tp_size": 2, "parallelism_config_dp_replicate_size": 2}},
         "tp+fsdp:2"),
        ({"parallelism_config": {"parallelism_config_tp_size": "two"}}, "parallelism_config_tp_size is 'two'"),
        ({"parallelism_config": {"parallelism_config_dp_shard_size": -1}}, "parallelism_config_dp_shard_size is -1"),
        ({"parallelism_config": {"parallelism_config_cp_size": True}}, "parallelism_config_cp_size is True"),
        (fsdp(auto_wrap_policy="SIZE_BASED_WRAP", min_num_params="many"), "fsdp_min_num_params is 'many'"),
        (fsdp(transformer_layer_cls_to_wrap=[1]), "names of classes"),
        ({"fp8_config": {"override_linear_precision": True}}, "override_linear_precision is True"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": "x"}}, "zero_stage is 'x'"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 4}}, "zero_stage is 4"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"gradient_accumulation_steps": "x"}},
         "gradient_accumulation_steps is 'x'"),
        ({**fsdp(sharding_strategy="HYBRID_SHARD", version=1), "num_machines": 2, "num_processes": None},
         "num_processes"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds.json"}}, "--plan fsdp"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"gradient_clipping": 1.0}}, "clip_grad_norm_"),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_out_is_refused_by_its_name(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match="--accelerate-config") as refused:
        translate({**PLAIN, **changed})
    assert words in str(refused.value)


def test_the_option_is_a_file_or_its_content() -> None:
    assert parse_content("config.yaml") == "config.yaml"
    content = parse_content('{"num_processes": 2, "distributed_type": "MULTI_CPU"}')
    assert of_option(content).num_ranks == 2
    assert of_option(None).plan == ""
    with pytest.raises(UsageError, match="content of the file"):
        of_option("config.yaml")
    with pytest.raises(UsageError, match="no JSON"):
        parse_content("{1")


def test_no_field_of_the_installed_accelerate_is_unknown() -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    asked = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "mixed_precision": "no"}
    written = ClusterConfig(**asked, use_cpu=False, debug=False)
    names = {field.name for field in dataclasses.fields(ClusterConfig)}
    assert {"num_processes", "fsdp_config", "parallelism_config"} <= names
    for name in names:
        assert translate({**PLAIN, name: getattr(written, name)}).plan == "ddp", name
    found = translate({name: getattr(written, name) for name in names})
    assert (found.plan, found.num_ranks) == ("ddp", 0)


def test_every_question_about_fsdp_and_deepspeed_is_known_or_named() -> None:
    from accelerate.commands.config import cluster

    asked = re.findall(r'(fsdp|deepspeed)_config\["(\w+)"\] = ', inspect.getsource(cluster))
    assert len(set(asked)) > 25
    answers = {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "zero_stage": 3, "fsdp_min_num_params": 100,
               "fsdp_transformer_layer_cls_to_wrap": "Block"}  # fmt: skip
    for section, name in asked:
        config = {f"{section}_config": {name: answers.get(name, True)}, "distributed_type": section.upper()}
        try:
            assert translate({**PLAIN, **config}).plan.startswith("fsdp"), name
        except UsageError as refused:  # what only DeepSpeed can do: its field is named
            assert section == "deepspeed" and name in str(refused), name


def test_fields_of_fp8_have_the_names_by_which_accelerate_reads_them() -> None:
    recipe = {
        "backend": "TE",
        "fp8_format": "E4M3",
        "amax_history_length": 16,
        "amax_compute_algorithm": "max",
        "override_linear_precision": [False, False, True],
    }
    assert translate({"mixed_precision": "fp8", "fp8_config": recipe}).environment == {
        "ACCELERATE_FP8_BACKEND": "TE",
        "ACCELERATE_FP8_FORMAT": "E4M3",
        "ACCELERATE_FP8_AMAX_HISTORY_LEN": "16",
        "ACCELERATE_FP8_AMAX_COMPUTE_ALGO": "max",
        "ACCELERATE_FP8_OVERRIDE_FPROP": "False",
        "ACCELERATE_FP8_OVERRIDE_DGRAD": "False",
        "ACCELERATE_FP8_OVERRIDE_WGRAD": "True",
    }
