"""A DeepSpeed configuration as a plan: every key of the installed DeepSpeed has a word said on it, none is dropped."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distlib.integrations.deepspeed_config import Reading, read_deepspeed, write_deepspeed
from distlib.integrations.deepspeed_keys import KEYS
from distlib.integrations.deepspeed_rules import Section
from distlib.plan import Plan

# Run in a process of its own: which keys DeepSpeed's reader looks for, and whether it takes what we write.
PROBE = """
import json, sys
seen = set()
class Config(dict):
    def get(self, key, default=None):
        seen.add(key)
        return dict.get(self, key, default)
    def __getitem__(self, key):
        seen.add(key)
        return dict.__getitem__(self, key)
    def __contains__(self, key):
        seen.add(key)
        return dict.__contains__(self, key)
    def keys(self):
        return self
import deepspeed.runtime.config as config
from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
def fields(model):
    return [name for key, field in model.model_fields.items() for name in (key, field.alias) if name]
config.DeepSpeedConfig(Config(train_batch_size=1))
for written in json.loads(sys.argv[1]):
    config.DeepSpeedConfig(written)
removed = [*getattr(config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", ())]
import inspect
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
def defaults(*kinds):
    found = [inspect.signature(kind.__init__).parameters for kind in kinds]
    return [{name: one.default for name, one in each.items() if name in ("lr", "betas", "eps", "weight_decay")}
            for each in found]
print("DEFAULTS" + json.dumps({
    "gradient_clipping": config.get_gradient_clipping({}),
    "fp16": DeepSpeedFP16Config().model_dump(),
    "AdamW": defaults(FusedAdam, DeepSpeedCPUAdam),
    "Lion": defaults(FusedLion, DeepSpeedCPULion),
}))
print("KEYS" + json.dumps({
    "": sorted({*seen, *removed}),
    "zero_optimization": fields(DeepSpeedZeroConfig) + [*getattr(config, "_REMOVED_ZERO_CONFIG_KEYS", ())],
    "zero_optimization.offload_optimizer": fields(DeepSpeedZeroOffloadOptimizerConfig),
    "zero_optimization.offload_param": fields(DeepSpeedZeroOffloadParamConfig),
    "fp16": fields(DeepSpeedFP16Config),
    "bf16": fields(DeepSpeedBF16Config),
    "activation_checkpointing": list(ACT_CHKPT_DEFAULT),
    "pipeline": list(config.get_pipeline_config({})),
}))
"""

ON = {"fp16": {"enabled": True}, "bf16": {"enabled": True}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
OFFLOAD = {"device": "nvme", "nvme_path": "/disk"}


def verdicts(reading: Reading) -> dict[str, str]:
    return {note.key: note.verdict for note in reading.notes}


WRITTEN = [
    Plan(engine="deepspeed"),
    Plan(engine="deepspeed", stage=3, microbatches=4, precision="bf16", clip=1.0),
    Plan(engine="deepspeed", stage=2, precision={"dtype": "fp16", "init_scale": 1024.0, "growth_interval": 50}),
    Plan(engine="deepspeed", stage=1, offload="/disk", precision={"reduce": "bf16"}),
    Plan(engine="deepspeed", precision="bf16"),
]


@pytest.fixture(scope="module")
def probed() -> dict[str, Any]:
    """By the installed DeepSpeed's own word "KEYS" by section, and "DEFAULTS"; it has read all that we write, too."""
    if not any((Path(entry) / "deepspeed").is_dir() for entry in sys.path):
        pytest.skip("deepspeed is not installed: make test installs it")
    written = json.dumps([write_deepspeed(plan, 1) for plan in WRITTEN])
    command = [sys.executable, "-c", PROBE, written]
    made = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert made.returncode == 0, made.stderr
    lines = made.stdout.splitlines()
    return {
        word: json.loads(next(line for line in lines if line.startswith(word)).removeprefix(word))
        for word in ("KEYS", "DEFAULTS")
    }


@pytest.fixture(scope="module")
def known(probed: dict[str, Any]) -> dict[str, list[str]]:
    return probed["KEYS"]


def test_every_key_of_deepspeed_has_its_word(known: dict[str, list[str]]) -> None:
    assert len(known[""]) > 40 and len(known["zero_optimization"]) > 40
    for section, names in known.items():
        for name in names:
            inner: dict[str, Any] = {**ON.get(section, {}), **(OFFLOAD if ".offload_" in section else {})}
            inner.setdefault(name, {"enabled": True})
            config: dict[str, Any] = inner
            if section:
                *above, last = section.split(".")
                config = {last: inner}
                for outer in reversed(above):
                    config = {outer: {"stage": 3, **config}}
            reading = read_deepspeed(config, **GIVEN.get(section or name, {}))
            key = f"{section}.{name}" if section else name
            notes = [note for note in reading.notes if note.key == key or note.key.startswith(key + ".")]
            assert notes and all(note.text for note in notes), key
            assert "no such key is known" not in notes[0].text or notes[0].key.endswith(".enabled"), key


# Values of every key above are {"enabled": True}: these would make a plan that is refused for another reason.
GIVEN: dict[str, dict[str, Any]] = {
    "": {},
    "gradient_accumulation_steps": {"microbatches": 1},
    "train_batch_size": {"microbatches": 1},
    "gradient_clipping": {"clip": None},
    "communication_data_type": {"precision": "fp32"},
    "zero_optimization": {
        "stage": 3,
        "partition_size": None,
        "hierarchical": "auto",
        "reshard_after_forward": True,
        "offload": None,
    },
    "fp16": {"precision": "fp32"},
    "pipeline": {"pipeline": 1, "activations": None},
}


def test_a_configuration_becomes_its_plan(tmp_path: Path) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "train_batch_size": 64,
        "zero_optimization": {
            "stage": 3,
            "mics_shard_size": 4,
            "mics_hierarchical_params_gather": True,
            "zero_quantized_weights": True,
            "zero_hpz_partition_size": 1,
            "overlap_comm": True,
            "reduce_bucket_size": 5e8,
            "stage3_max_live_parameters": 1e9,
            "offload_optimizer": {**OFFLOAD, "pin_memory": True},
            "offload_param": {"device": "none"},
        },
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "hysteresis": 2},
        "communication_data_type": "fp32",
        "gradient_clipping": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": "auto"}},
        "pipeline": {"stages": 2, "partition": "best", "activation_checkpoint_interval": 1},
        "tensorboard": {"enabled": True},
        "wandb": {"enabled": False},
        "steps_per_print": 10,
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    reading = read_deepspeed(tmp_path / "ds.json", world_size=4)
    assert reading.plan == Plan(
        pipeline=2,
        microbatches=4,
        stage=3,
        partition_size=4,
        hierarchical=True,
        gather_dtype="int8",
        offload="/disk",
        activations="full",
        precision={"dtype": "bf16", "reduce": "fp32"},
        clip=1.0,
    )
    assert not reading.of("cannot")
    assert {note.key for note in reading.of("yours")} == {
        "train_micro_batch_size_per_gpu",
        "optimizer",
        "scheduler",
        "tensorboard",
    }
    assert verdicts(reading)["fp16"] == verdicts(reading)["wandb"] == "unneeded"
    assert reading.optimizer == ("AdamW", {"lr": 3e-4, "betas": (0.9, 0.95)})
    assert reading.scheduler == ("WarmupLR", {"warmup_num_steps": 10})
    assert "optimizer=lambda p: distlib.optim.AdamW(p, lr=0.0003, betas=(0.9, 0.95))" in str(reading)
    with pytest.warns(UserWarning, match="tensorboard=.*yours to do: log what train_step returns") as warned:
        assert Plan.from_deepspeed(config, strict=True, world_size=4) == reading.plan, "nothing that cannot be"
    assert len(warned) == 1


def test_what_cannot_be_honoured_is_said_and_strict_raises() -> None:
    config = {
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu"},
            "zero_quantized_gradients": True,
            "stage3_max_live_paramters": 1,
        },
        "fp16": {"enabled": True, "loss_scale": 128, "hysteresis": 2},
        "optimizer": {"type": "Lamb", "params": {}},
        "gradient_clippping": 1.0,
        "tensor_parallel": {"autotp_size": 2},
        "train_batch_size": 30,
        "train_micro_batch_size_per_gpu": 4,
    }
    with pytest.warns(UserWarning) as warned:
        plan = Plan.from_deepspeed(config, world_size=2)
    fp16 = {"dtype": "fp16", "init_scale": 128.0}
    assert plan == Plan(stage=2, precision=fp16, clip=1.0, offload="cpu") and len(warned) == 1
    for key in (
        "zero_optimization.zero_quantized_gradients",
        "zero_optimization.stage3_max_live_paramters",
        "fp16.loss_scale",
        "fp16.hysteresis",
        "optimizer",
        "gradient_clippping",
        "tensor_parallel",
        "train_batch_size",
    ):
        assert f"\n  {key}=" in str(warned[0].message)
    assert "did you mean 'gradient_clipping'?" in str(warned[0].message)
    with pytest.raises(
        ValueError, match="zero_quantized_gradients=True: cannot be honoured: gradients are not quantized"
    ):
        Plan.from_deepspeed(config, strict=True)
    notes = {note.key: note for note in read_deepspeed(config, world_size=2).notes}
    device = notes["zero_optimization.offload_optimizer.device"]
    assert device.verdict == "honoured" and "offload='cpu', which needs GPUs" in device.text
    with pytest.raises(ValueError, match="bf16 and fp16 are both enabled"):
        read_deepspeed({"bf16": {"enabled": True}, "fp16": {"enabled": True}})
    secondary = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}, "pipeline": {"stages": 2}}
    assert read_deepspeed(secondary, pipeline=1).plan == Plan(stage=3, reshard_after_forward=2, clip=1.0)
    with pytest.raises(ValueError, match="as a plan: Plan: reshard_after_forward=2 with pipeline=2 or more"):
        read_deepspeed(secondary)
    with pytest.raises(ValueError, match="a mapping, not list"):
        read_deepspeed([])  # type: ignore[arg-type]


def test_batches_are_divided_as_deepspeed_does() -> None:
    batch, micro, steps = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
    for config, world, microbatches, verdict in (
        ({batch: 64, micro: 4}, 4, 4, "honoured"),
        ({batch: 64, micro: 4}, None, 1, "cannot"),
        ({batch: 65, micro: 4}, 4, 1, "cannot"),
        ({batch: 64, micro: 4, steps: 4}, 4, 4, "yours"),
        ({batch: 64, micro: 4, steps: 2}, 4, 2, "cannot"),
        ({batch: 64, micro: 4, steps: 2}, None, 2, "yours"),
        ({batch: 64}, 4, 1, "yours"),
        ({batch: "many", steps: 2}, 4, 2, "cannot"),
        ({batch: 32, steps: 3}, 4, 3, "cannot"),
        ({batch: 32, steps: 4}, 4, 4, "yours"),
        ({batch: 64, micro: 4, steps: "auto"}, 4, 4, "honoured"),
    ):
        reading = read_deepspeed(config, world_size=world)
        assert "cannot" not in (verdicts(reading).get(steps), verdicts(reading).get(micro)), config
        assert reading.plan == Plan(microbatches=microbatches, clip=1.0) and verdicts(reading)[batch] == verdict, config


def test_a_wordless_configuration_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = Plan.from_deepspeed(
            {
                "zero_optimization": {
                    "stage": 1,
                    "offload_param": None,
                    "zero_hpz_partition_size": 8,
                    "leaf_module": {},
                },
                "gradient_accumulation_steps": 2,
                "gradient_clipping": 0,
                "prescale_gradients": False,
                "tensor_parallel": {"autotp_size": 1},
                "compile": {"deepcompile": False},
                "bf16": {},
                "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": "auto"},
            },
            strict=True,
        )
    assert plan == Plan(stage=1, microbatches=2)


def test_auto_is_asked_for_or_given() -> None:
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 12, "loss_scale_window": 1000},
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto", "overlap_comm": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1}},
    }
    reading = read_deepspeed(config)
    assert reading.plan == Plan() and reading.optimizer == ("AdamW", {"weight_decay": 0.1})
    assert {note.key for note in reading.of("cannot")} == {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16.enabled",
        "fp16.enabled",
        "zero_optimization.stage",
    }
    given_ = {"stage": 3, "microbatches": 2, "clip": 1.0, "precision": "bf16"}
    reading = read_deepspeed(config, **given_)
    assert reading.plan == Plan(**given_) and not reading.of("cannot")


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted(KEYS)), st.none() | st.booleans() | st.just("auto") | st.just({}), max_size=6
    )
)
def test_each_key_has_exactly_one_note_or_one_for_each_key_inside(config: dict[str, Any]) -> None:
    settings_ = {"microbatches": 1, "clip": None, "precision": "fp32", "stage": 0, "pipeline": 1}
    keys = [note.key for note in read_deepspeed(config, **settings_).notes]
    assert keys == list(config)


def test_sections_are_read_key_by_key() -> None:
    for name, section in KEYS.items():
        if isinstance(section, Section):
            reading = read_deepspeed({name: {"unheard_of": 1, **ON.get(name.replace("bfloat16", "bf16"), {})}})
            assert verdicts(reading)[f"{name}.unheard_of"] == "cannot"


@pytest.mark.parametrize("plan", WRITTEN, ids=repr)
def test_what_is_written_for_deepspeed_is_read_back(plan: Plan, known: dict[str, list[str]]) -> None:
    reading = read_deepspeed(write_deepspeed(plan, 2), engine="deepspeed")
    assert reading.plan == plan and not reading.of("cannot")


def test_only_plans_for_deepspeed_are_written() -> None:
    with pytest.raises(ValueError, match='is for engine="deepspeed"'):
        write_deepspeed(Plan(), 1)
    with pytest.raises(ValueError, match=r"init_scale=3.0: DeepSpeed takes a power of two"):
        write_deepspeed(Plan(engine="deepspeed", stage=1, precision={"dtype": "fp16", "init_scale": 3.0}), 1)


# ---------------------------------------------------------------- defaults


def test_defaults_that_are_filled_in_are_those_of_the_installed_deepspeed(probed: dict[str, Any]) -> None:
    theirs = probed["DEFAULTS"]
    notes = {note.key: note for note in read_deepspeed({"fp16": {"enabled": True}}).notes}
    filled = {key for key, note in notes.items() if note.text.endswith("left out, it is DeepSpeed's default")}
    assert filled == {"gradient_clipping", "fp16.loss_scale_window", "fp16.hysteresis"}
    assert notes["gradient_clipping"].value == theirs["gradient_clipping"]
    assert all(notes[key].value == theirs["fp16"][key.removeprefix("fp16.")] for key in filled if "." in key)
    ours = {"AdamW": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}, "Lion": {"weight_decay": 0.0}}
    for kind, fused_and_cpu in (("AdamW", theirs["AdamW"]), ("Lion", theirs["Lion"])):
        reading = read_deepspeed({"optimizer": {"type": kind}})
        assert reading.optimizer is not None and reading.optimizer[0] == kind
        made = {**ours[kind], **reading.optimizer[1]}  # distlib.optim's own defaults for the rest
        for theirs_ in fused_and_cpu:
            assert {**made, "betas": list(made["betas"])} == {**theirs_, "betas": list(theirs_["betas"])}, kind


def test_left_out_keys_have_deepspeeds_defaults_unless_given() -> None:
    assert read_deepspeed({}).plan == Plan(clip=1.0)
    assert read_deepspeed({}, clip=None).plan == Plan() and not read_deepspeed({}, clip=None).notes
    assert read_deepspeed({"gradient_clipping": 0.0}).plan == Plan()
    fp16 = read_deepspeed({"fp16": {"enabled": True}})
    assert fp16.plan == Plan(clip=1.0, precision={"dtype": "fp16", "growth_interval": 1000})
    assert {note.key for note in fp16.of("cannot")} == {"fp16.hysteresis"}
    static = read_deepspeed({"fp16": {"enabled": True, "loss_scale": 128}})
    assert static.plan.precision.growth_interval == 2000 and {n.key for n in static.of("cannot")} == {"fp16.loss_scale"}
    assert not read_deepspeed({"fp16": {"enabled": False}, "bf16": {"enabled": True}}).of("cannot")


def test_a_given_fp16_has_the_scale_of_the_configuration() -> None:
    config = {"fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 500, "initial_scale_power": 12}}
    scaled = {"dtype": "fp16", "init_scale": 4096.0, "growth_interval": 500}
    for given_ in ("fp16", {"dtype": "fp16"}, Plan(precision="fp16").precision):
        assert read_deepspeed(config, precision=given_).plan.precision == Plan(precision=scaled).precision
    assert read_deepspeed({"fp16": {"enabled": "auto"}}, precision="fp16").plan.precision.growth_interval == 1000
    own = {"dtype": "fp16", "growth_interval": 7}
    assert read_deepspeed(config, precision=own).plan.precision == Plan(precision=own).precision
    for other in ("bf16", "fp32"):
        reading = read_deepspeed(config, precision=other)
        assert reading.plan.precision == Plan(precision=other).precision and not reading.of("cannot")


@pytest.mark.parametrize(
    ("kind", "params", "made", "verdict"),
    [
        ("AdamW", {"lr": 0.01}, {"lr": 0.01, "weight_decay": 0.0}, "yours"),
        ("Adam", {"lr": 0.01, "torch_adam": True}, {"lr": 0.01}, "yours"),  # torch's AdamW, which decays as ours
        ("Adam", {"adam_w_mode": False}, {"weight_decay": 0.0}, "yours"),  # without decay there is no difference
        ("Adam", {"adam_w_mode": False, "torch_adam": True}, {"weight_decay": 0.0}, "yours"),
        ("Adam", {"adam_w_mode": False, "weight_decay": 0.1}, {"weight_decay": 0.1}, "cannot"),
        ("AdamW", {"adam_w_mode": False, "weight_decay": 0.1}, {"weight_decay": 0.1}, "yours"),  # which it ignores
        ("AdamW", {"weight_decay": "auto"}, {}, "yours"),
        ("AdamW", {"bias_correction": False}, {"weight_decay": 0.0}, "cannot"),
        ("Lion", {}, {"lr": 1e-3, "betas": (0.9, 0.999)}, "yours"),
        ("SGD", {"lr": 0.1}, {"lr": 0.1}, "yours"),
    ],
)
def test_optimizers_are_made_with_deepspeeds_defaults(
    kind: str, params: dict[str, Any], made: dict[str, Any], verdict: str
) -> None:
    reading = read_deepspeed({"optimizer": {"type": kind, "params": params}})
    assert reading.optimizer is not None and reading.optimizer[1] == made
    assert verdicts(reading)["optimizer"] == verdict
    (note,) = (note for note in reading.notes if note.key == "optimizer")
    assert all(f", {key}={value!r}" in note.text for key, value in made.items())


def test_what_is_written_says_whether_it_clips() -> None:
    assert write_deepspeed(Plan(engine="deepspeed"), 1)["gradient_clipping"] == 0.0
    assert write_deepspeed(Plan(engine="deepspeed", clip=0.5), 1)["gradient_clipping"] == 0.5
