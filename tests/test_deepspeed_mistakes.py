"""What DeepSpeed would not take, or what is misspelt, in a configuration: errors and notes that name the key."""

from __future__ import annotations

import re
from typing import Any

import pytest

from distlib.integrations.deepspeed_config import read_deepspeed

ZERO_QUANTIZED = "zero_optimization.zero_quantized_weights"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"fp16": {"enabled": "false"}}, "fp16.enabled='false': must be true, false or \"auto\""),
        ({"bf16": {"enabled": "False"}}, "bf16.enabled='False': must be"),
        ({"bfloat16": {"enabled": 1}}, "bfloat16.enabled=1: must be"),
        ({"torch_autocast": {"enabled": "no"}}, "torch_autocast.enabled='no': must be"),
        (
            {"gradient_accumulation_steps": True},
            "must be a number of micro-batches, 1 or more (gradient_accumulation_st",
        ),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: must be a whole number"),
        ({"gradient_clipping": -1}, "must be a number above 0, or None (gradient_clipping)"),
        ({"gradient_clipping": True}, "(gradient_clipping)"),
        ({"communication_data_type": "bfp16"}, "(communication_data_type)"),
        ({"fp16": {"enabled": True, "loss_scale": True}}, "fp16.loss_scale=True: must be a number"),
        ({"fp16": {"enabled": True, "loss_scale_window": True}}, "fp16.loss_scale_window=True: must be a number"),
        ({"fp16": {"enabled": True, "loss_scale_window": 0}}, "(fp16.loss_scale_window)"),
        ({"fp16": {"enabled": True, "initial_scale_power": 2000}}, "(fp16.initial_scale_power)"),
        ({"zero_optimization": {"stage": None}}, "zero_optimization.stage=None: must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "two", "mics_shard_size": 2}}, "zero_optimization.stage='two': must be"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage=True: must be"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage=4: must be"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 0}}, "(zero_optimization.mics_shard_size)"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvmee"}}}, "did you mean 'nvme'?"),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "gpu"}}},
            "zero_optimization.offload_optimizer.device='gpu': must be one of none, cpu, nvme",
        ),
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu=0: must be"),
        ({"train_batch_size": -8}, "train_batch_size=-8: must be a whole number, 1 or more"),
    ],
    ids=str,
)
def test_a_value_that_deepspeed_would_not_take_is_an_error_with_its_key(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        read_deepspeed(config, world_size=4)
    assert str(error.value).startswith("DeepSpeed configuration")


def test_ranks_are_counted_from_one() -> None:
    config = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2}
    for size in (0, -1, True):
        with pytest.raises(ValueError, match=f"world_size={size}: must be a number of ranks, 1 or more"):
            read_deepspeed(config, world_size=size)
    with pytest.raises(ValueError, match="microbatches=0: must be"):
        read_deepspeed(config, world_size=4, microbatches=0)


@pytest.mark.parametrize(
    ("config", "key", "says"),
    [
        ({"fp16": {"enable": True}}, "fp16.enable", "did you mean 'enabled'?"),
        (
            {"bf16": {"enabled": False, "imediate_grad_update": 1}},
            "bf16.imediate_grad_update",
            "'immediate_grad_update'?",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise",
            "did you mean 'device'?",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "none", "bufer_size": 1}}},
            "zero_optimization.offload_param.bufer_size",
            "did you mean 'buffer_size'?",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param.device",
            "parameters stay in memory",
        ),
        ({"tensorboard": {"enable": True}}, "tensorboard", "'enable'; did you mean 'enabled'?"),
        ({"optimizer": {"type": "SGD", "parms": {"lr": 1}}}, "optimizer", "'parms'; did you mean 'params'?"),
        ({"optimizer": {"type": "SGD", "lr": 1}}, "optimizer", "no such key is known: 'lr'"),
        ({"scheduler": {"type": "WarmupLR", "parms": {}}}, "scheduler", "'parms'; did you mean 'params'?"),
        ({"sequence_parallel_size": True}, "sequence_parallel_size", "no sequence parallelism"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": "false"}}, ZERO_QUANTIZED, "true or false"),
    ],
    ids=str,
)
def test_what_is_misspelt_is_named_in_sections_that_are_off_too(config: dict[str, Any], key: str, says: str) -> None:
    (note,) = (note for note in read_deepspeed(config).of("cannot") if note.key == key)
    assert says in note.text
