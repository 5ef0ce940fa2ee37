"""What becomes of a key of a DeepSpeed configuration: rules, and the draft of a plan that they write into.

A rule is a function (value, draft) -> (verdict, words). It may write a setting of the plan into the draft. Verdicts:

    honoured    the plan has it                           "honoured as stage=3"
    unneeded    nothing would change                      "not needed because ..."
    yours       a line of the training script does it     "yours to do: ..."
    cannot      training differs, and this says how       "cannot be honoured: ..."
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from distlib.plan.checked import nearest
from distlib.plan.plan import Plan, Precision

Said = tuple[str, str]
_WORDS = {
    "honoured": "honoured as",
    "unneeded": "not needed because",
    "yours": "yours to do:",
    "cannot": "cannot be honoured:",
}


@dataclass(frozen=True)
class Note:
    """What becomes of one key. key: dotted in sections."""

    key: str
    value: Any
    verdict: str
    text: str

    def __str__(self) -> str:
        return f"{self.key}={self.value!r}: {_WORDS[self.verdict]} {self.text}"


@dataclass
class Draft:
    """A plan in the making. config: the whole configuration. given: settings that go over it."""

    config: Mapping[str, Any]
    given: Mapping[str, Any]
    world_size: int | None
    settings: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    optimizer: tuple[str, dict[str, Any]] | None = None
    scheduler: tuple[str, dict[str, Any]] | None = None

    def plan(self) -> Plan:
        """The plan. A precision that is given goes over that of the configuration as a whole."""
        drawn = {**self.settings, **({"precision": self.precision} if self.precision else {})}
        return Plan(**{**drawn, **self.given})

    @property
    def stage(self) -> int:
        """Of ZeRO: it decides what other keys mean."""
        zero = self.config.get("zero_optimization")
        found = zero if isinstance(zero, bool) else self.section("zero_optimization").get("stage", 0)
        return self.given.get("stage", int(found) if found != "auto" else 0)

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of the configuration; empty where there is none."""
        found = self.config.get(name)
        return found if isinstance(found, Mapping) else {}

    def set(self, name: str, value: Any) -> Said:
        """Writes a setting, dotted for the precision, unless it was given."""
        first, _, inner = name.partition(".")
        if first in self.given:
            return "unneeded", f"{first}={self.given[first]!r} was given"
        if inner:
            self.precision[inner] = value
        else:
            self.settings[name] = value
        return "honoured", f"{name}={value!r}"


@dataclass(frozen=True)
class Rule:
    """says: value, draft -> verdict and words. setting: what of the plan an "auto" leaves open. native: "auto" is the
    key's own word, not one of Transformers."""

    says: Callable[[Any, Draft], Said]
    setting: str | None = None
    native: bool = False


@dataclass(frozen=True)
class Section:
    """Keys inside of a key. off: words for a section that has no effect, or None, from (section, draft)."""

    keys: Mapping[str, Any]
    off: Callable[[Mapping[str, Any], Draft], str | None] = lambda section, draft: None


def walk(config: Mapping[str, Any], keys: Mapping[str, Rule | Section], draft: Draft, prefix: str = "") -> list[Note]:
    """A note for every key of `config`, those in sections too."""
    notes = []
    for key, value in config.items():
        name, rule = prefix + str(key), keys.get(key)
        if rule is None:
            notes.append(Note(name, value, "cannot", f"no such key is known{nearest(str(key), keys)}"))
        elif isinstance(rule, Rule):
            notes.append(Note(name, value, *_of(rule, value, draft)))
        elif isinstance(value, bool) and key == "zero_optimization":  # DeepSpeed's first format
            notes.append(Note(name, value, *draft.set("stage", int(value))))
        elif value is None or (isinstance(value, Mapping) and not value):
            notes.append(Note(name, value, "unneeded", "it is empty"))
        elif not isinstance(value, Mapping):
            notes.append(Note(name, value, "cannot", "it must be a mapping"))
        else:
            off = rule.off(value, draft)
            inner = walk(value, rule.keys, draft, name + ".") if off is None else []
            notes += inner or [Note(name, value, "unneeded", str(off))]
    return notes


def _of(rule: Rule, value: Any, draft: Draft) -> Said:
    if value != "auto" or rule.native:
        return rule.says(value, draft)
    if rule.setting is None:
        return "unneeded", '"auto" leaves it open'
    first = rule.setting.partition(".")[0]
    if first in draft.given:
        return "unneeded", f"{first}={draft.given[first]!r} was given"
    return "cannot", f'only the Trainer of Transformers fills in "auto": give {first}= beside the configuration'


# ------------------------------------------------------------ kinds of rules


def sets(setting: str, off: Any = None, value: Callable[[Any], Any] = lambda v: v) -> Rule:
    """Writes a setting; `off` is the value that leaves it at its default."""

    def says(given: Any, draft: Draft) -> Said:
        if given is None or given == off:
            return "unneeded", f"that is the default of {setting}"
        return draft.set(setting, value(given))

    return Rule(says, setting)


def unneeded(why: str) -> Rule:
    return Rule(lambda value, draft: ("unneeded", why))


def in_stage_3(rule: Rule) -> Rule:
    """A rule for a key that DeepSpeed reads in stage 3 only."""
    return Rule(
        lambda value, draft: rule.says(value, draft) if draft.stage == 3 else ("unneeded", "it is for stage 3 only"),
        rule.setting,
    )


def yours(what: str, *off: Any) -> Rule:
    return Rule(lambda value, draft: ("unneeded", "it is off") if value is None or value in off else ("yours", what))


def cannot(why: str, *off: Any, native: bool = False) -> Rule:
    """off: the values that ask for nothing."""
    return Rule(lambda value, draft: off_or(value in off or value is None, ("cannot", why)), native=native)


def switched(why: str, verdict: str = "cannot", switch: str = "enabled", off: tuple[Any, ...] = (False, None)) -> Rule:
    """A section that is on where its switch is; `off` are the values of a switch that is not."""

    def says(value: Any, draft: Draft) -> Said:
        on = value.get(switch) if isinstance(value, Mapping) else value
        return off_or(on in off, (verdict, why))

    return Rule(says)


def off_or(off: bool, otherwise: Said) -> Said:
    return ("unneeded", "it is off") if off else otherwise


def is_off(name: str) -> Callable[[Mapping[str, Any], Draft], str | None]:
    return lambda section, draft: None if section.get("enabled") else f"{name} is off"


# ------------------------------------------------------------ batches


def train_batch_size(value: Any, draft: Draft) -> Said:
    if not _is_number(value):
        return "cannot", "it must be a number of rows"
    micro, steps = (draft.config.get(key) for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"))
    micro, steps = (v if _is_number(v) else None for v in (micro, steps))
    world = draft.world_size
    if "microbatches" in draft.given:
        steps = draft.given["microbatches"]
    if micro is not None and steps is not None and world is not None and micro * steps * world != value:
        return "cannot", f"{micro} rows x {steps} micro-batches x {world} ranks are {micro * steps * world} rows"
    if micro is not None and steps is None:
        if world is None:
            return "cannot", "the number of micro-batches follows from that of ranks: give world_size= or microbatches="
        if value % (micro * world):
            return "cannot", f"{micro} rows x {world} ranks do not divide it"
        return draft.set("microbatches", int(value // (micro * world)))
    return "yours", "all ranks together feed so many rows to each train_step"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def micro_batch(value: Any, draft: Draft) -> Said:
    return "yours", f"feed each rank {value} rows for every micro-batch of its train_step"


# ------------------------------------------------------------ precision


def precision(dtype: str) -> Rule:
    def says(on: Any, draft: Draft) -> Said:
        if not on:
            return "unneeded", "it is off"
        if draft.precision.get("dtype", dtype) != dtype:
            raise ValueError("DeepSpeed configuration: bf16 and fp16 are both enabled: choose one")
        verdict, text = draft.set("precision.dtype", dtype)
        how = "by torch.autocast in stage 0" if draft.stage == 0 else "beside fp32 masters"
        return verdict, f"{text}, {how}" if verdict == "honoured" else text

    return Rule(says, "precision")


def static_scale(value: Any, draft: Draft) -> Said:
    if not value:
        return "unneeded", "the scale is dynamic"
    if not _is_number(value):
        return "cannot", "it must be a number"
    draft.set("precision.init_scale", float(value))
    return "cannot", f"the scale is dynamic; it begins with {value}"


def if_dynamic(setting: str, convert: Callable[[Any], Any]) -> Rule:
    def says(value: Any, draft: Draft) -> Said:
        fp16 = draft.section("fp16")
        if fp16["enabled"] == "auto":
            return "unneeded", "whether fp16 is on is not known"
        if fp16.get("loss_scale") not in (0, None, "auto"):
            return "unneeded", "DeepSpeed reads it with a dynamic scale only"
        if not _is_number(value):
            return "cannot", "it must be a number"
        default = Precision.model_fields[setting].default
        if convert(value) == default:
            return "unneeded", f"that is the default of precision.{setting}"
        return draft.set(f"precision.{setting}", convert(value))

    return Rule(says)


def torch_autocast(on: Any, draft: Draft) -> Said:
    if not on:
        return "unneeded", "it is off"
    if draft.stage:
        return "cannot", "stages 1 to 3 compute in copies of their parameters, all operations in one dtype"
    names = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "bf16": "bf16", "fp16": "fp16"}
    dtype = str(draft.section("torch_autocast").get("dtype")).removeprefix("torch.")
    if dtype not in names:
        return "cannot", f"its dtype must be one of {', '.join(names)}"
    return draft.set("precision.dtype", names[dtype])


# ------------------------------------------------------------ offload


def offload_is_off(section: Mapping[str, Any], draft: Draft) -> str | None:
    if section.get("device", "none") in ("none", None):
        return "its device is none"
    return None if draft.stage else "DeepSpeed offloads in stages 1 to 3 only"


def offload_device(value: Any, draft: Draft) -> Said:
    if value != "nvme":
        return (
            "cannot",
            "optimizer state of GPUs in the CPU's memory is not in this version; on CPU ranks it is there anyway",
        )
    path = draft.section("zero_optimization")["offload_optimizer"].get("nvme_path")
    if path is None:
        return "cannot", "there is no nvme_path"
    return draft.set("offload", str(path))


# ------------------------------------------------------------ optimizer, scheduler

_OPTIMIZERS = {
    "adam": ("AdamW", {"lr", "betas", "eps", "weight_decay"}),
    "adamw": ("AdamW", {"lr", "betas", "eps", "weight_decay"}),
    "lion": ("Lion", {"lr", "betas", "weight_decay"}),
    "sgd": ("SGD", {"lr", "momentum", "weight_decay", "dampening", "nesterov"}),
}
_OTHERS_OF_ADAM = {"torch_adam": None, "adam_w_mode": False, "bias_correction": False, "amsgrad": True, "fused": None}


def _is_named(value: Any) -> bool:
    """A section of a type and its parameters."""
    return isinstance(value, Mapping) and "type" in value and isinstance(value.get("params") or {}, Mapping)


def optimizer(value: Any, draft: Draft) -> Said:
    if not _is_named(value):
        return "cannot", "it must be a mapping with a type, and maybe params"
    kind, params = str(value["type"]), dict(value.get("params") or {})
    fixed = {name: v for name, v in params.items() if v != "auto"}
    if kind.lower() not in _OPTIMIZERS:
        return "cannot", f"distlib.optim has AdamW, SGD and Lion: pass parallelize() a {kind} of your own"
    name, known = _OPTIMIZERS[kind.lower()]
    ours = {key: tuple(v) if isinstance(v, list) else v for key, v in fixed.items() if key in known}
    draft.optimizer = (name, ours)
    made = f"optimizer=lambda p: distlib.optim.{name}(p{''.join(f', {k}={v!r}' for k, v in ours.items())})"
    wrong = [
        key
        for key, v in fixed.items()
        if key not in known and not (key in _OTHERS_OF_ADAM and v != _OTHERS_OF_ADAM[key])
    ]
    open_ = [key for key, v in params.items() if v == "auto"]
    if wrong:
        return "cannot", f"{', '.join(wrong)}; the rest is {made}"
    return "yours", made + (f", with {', '.join(open_)}, which Transformers fills in" if open_ else "")


def scheduler(value: Any, draft: Draft) -> Said:
    if not _is_named(value):
        return "cannot", "it must be a mapping with a type, and maybe params"
    params = {key: v for key, v in (value.get("params") or {}).items() if v != "auto"}
    draft.scheduler = (str(value["type"]), params)
    return "yours", f"a torch.optim.lr_scheduler on the engine's optimizer, as {value['type']} with {params}"
