"""Verdicts on keys of a DeepSpeed configuration that other keys, or what was given, make matter or not."""

from __future__ import annotations

from typing import Any

import pytest

from distlib.integrations.deepspeed_config import Reading, read_deepspeed
from distlib.plan import Plan

SCALING = {
    "loss_scale": 128,
    "loss_scale_window": 500,
    "initial_scale_power": 12,
    "hysteresis": 2,
    "consecutive_hysteresis": True,
    "min_loss_scale": 4,
    "fp16_master_weights_and_grads": True,
}
AUTO = {"fp16": {"enabled": "auto", **SCALING}, "bf16": {"enabled": "auto", "check_grad_overflow": True}}
OF_BF16 = "bf16.check_grad_overflow"


def said(reading: Reading) -> dict[str, tuple[str, str]]:
    return {note.key: (note.verdict, note.text) for note in reading.notes}


@pytest.mark.parametrize("config", [AUTO, {name: {**AUTO[name], "enabled": True} for name in AUTO}], ids=["auto", "on"])
def test_a_given_precision_switches_the_other_section_off(config: dict[str, Any]) -> None:
    reading = read_deepspeed(config, precision="bf16", clip=None)
    assert reading.plan == Plan(precision="bf16") and [note.key for note in reading.of("cannot")] == [OF_BF16]
    for key in SCALING:
        assert said(reading)[f"fp16.{key}"] == ("unneeded", "fp16 is off")
    reading = read_deepspeed(config, precision="fp16", clip=None)
    assert reading.plan.precision.dtype == "fp16" and reading.plan.precision.init_scale == 128.0
    assert said(reading)[OF_BF16] == ("unneeded", "bf16 is off")
    assert {"fp16.loss_scale", "fp16.hysteresis", "fp16.min_loss_scale"} < {note.key for note in reading.of("cannot")}


def test_an_open_precision_is_asked_for_once() -> None:
    reading = read_deepspeed(AUTO)
    assert reading.plan == Plan(clip=1.0)
    cannot = {note.key: note.text for note in reading.of("cannot")}
    assert cannot.keys() == {"fp16.enabled", "bf16.enabled"} and "give precision=" in cannot["fp16.enabled"]
    for key in SCALING:
        assert said(reading)[f"fp16.{key}"] == ("unneeded", "whether fp16 is on is not known")


@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("sparse_attention", {"mode": "fixed", "block": 16}),
        ("compression_training", {"weight_quantization": {"shared_parameters": {"enabled": True}}}),
        ("weight_quantization", {"post_init_quant": {"layer": {"num_bits": 4}}}),
        ("amp", {"opt_level": "O1"}),
        ("progressive_layer_drop", {"theta": 0.5}),
    ],
)
def test_a_section_without_its_switch_is_on_where_deepspeed_takes_it_so(key: str, section: dict[str, Any]) -> None:
    assert said(read_deepspeed({key: section}))[key][0] == "cannot"
    for off in ({**section, "enabled": False}, {}, None, False):
        assert said(read_deepspeed({key: off}))[key][0] == "unneeded", off
    assert said(read_deepspeed({"tensorboard": {"job_name": "x"}}))["tensorboard"] == ("unneeded", "it is off")


def test_rows_may_be_open_where_the_accumulation_is_known() -> None:
    open_ = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
    reading = read_deepspeed({**open_, "gradient_accumulation_steps": 4})
    assert reading.plan == Plan(microbatches=4, clip=1.0) and not reading.of("cannot")
    for key in open_:
        assert said(reading)[key] == ("unneeded", "train_step takes as many rows as it is fed")
    assert {note.key for note in read_deepspeed(open_).of("cannot")} == open_.keys()
    assert not read_deepspeed(open_, microbatches=2).of("cannot")
