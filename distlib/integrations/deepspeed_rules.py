"""What becomes of a key of a DeepSpeed configuration: rules, and the draft of a plan that they write into.

A rule is a function (value, draft) -> (verdict, words). It may write a setting of the plan into the draft;
ValueError for a value that DeepSpeed would not take. A key that is left out has DeepSpeed's default, where that is not
ours. Verdicts:

    honoured    the plan has it                           "honoured as stage=3"
    unneeded    nothing would change                      "not needed because ..."
    yours       a line of the training script does it     "yours to do: ..."
    cannot      training differs, and this says how       "cannot be honoured: ..."
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from distlib.plan.checked import SettingsError, nearest
from distlib.plan.plan import Plan, Precision

Said = tuple[str, str]
_SCALE = ("init_scale", "growth_interval")  # of fp16
_SECTIONS = {"bf16": ("bf16", "bfloat16"), "fp16": ("fp16",)}  # by precision
_DEVICES = ("none", "cpu", "nvme")
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
    """A plan in the making. config: the whole configuration. given: settings that go over it. key: the one whose rule
    speaks. origins: of settings, the keys that they come from.
    """

    config: Mapping[str, Any]
    given: Mapping[str, Any]
    world_size: int | None
    settings: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    optimizer: tuple[str, dict[str, Any]] | None = None
    scheduler: tuple[str, dict[str, Any]] | None = None
    key: str = ""
    origins: dict[str, str] = field(default_factory=dict)

    def plan(self) -> Plan:
        """The plan. A precision that is given goes over that of the configuration; "fp16" alone leaves its scale open.

        ValueError for what does not go together, with the keys of the configuration.
        """
        precision = {**self.precision, **_mapping(self.given["precision"])} if self._leaves_scale else self.precision
        drawn = {**self.settings, **self.given, **({"precision": precision} if precision else {})}
        try:
            return Plan(**drawn)
        except SettingsError as error:
            keys = (self.origins.get(problem.partition("=")[0]) for problem in error.problems)
            told = [p if key is None else f"{p} ({key})" for p, key in zip(error.problems, keys, strict=True)]
            raise SettingsError(error.what, told) from None

    def wrong(self, value: Any, right: str, key: str | None = None) -> ValueError:
        """The error for a value. key: default: the one whose rule speaks. right: ends the sentence "must be ..."."""
        return ValueError(f"DeepSpeed configuration: {key or self.key}={value!r}: must be {right}")

    @property
    def stage(self) -> int:
        """Of ZeRO: it decides what other keys mean."""
        if "stage" in self.given:
            return self.given["stage"]
        zero = self.config.get("zero_optimization")
        if isinstance(zero, bool):
            return int(zero)
        found = self.section("zero_optimization").get("stage", 0)
        if found == "auto":
            return 0
        if type(found) is not int or not 0 <= found <= 3:
            raise self.wrong(found, "0, 1, 2 or 3", "zero_optimization.stage")
        return found

    def computes_in(self, dtype: str) -> bool | None:
        """Whether the plan's precision is "bf16" or "fp16"; None: the configuration leaves it open."""
        if "precision" in self.given:
            return _mapping(self.given["precision"]).get("dtype") == dtype
        found = [self.section(name).get("enabled", False) for name in _SECTIONS[dtype]]
        return None if "auto" in found else True in found

    @property
    def is_dynamic(self) -> bool:
        """Whether fp16's loss scale is, if there is one."""
        return self.section("fp16").get("loss_scale") in (0, None, "auto")

    @property
    def _leaves_scale(self) -> bool:
        return "precision" in self.given and dict(_mapping(self.given["precision"])) == {"dtype": "fp16"}

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of the configuration; empty where there is none."""
        found = self.config.get(name)
        return found if isinstance(found, Mapping) else {}

    def set(self, name: str, value: Any) -> Said:
        """Writes a setting, dotted for the precision, unless it was given."""
        first, _, inner = name.partition(".")
        if first in self.given and not (inner in _SCALE and self._leaves_scale):
            return "unneeded", f"{first}={self.given[first]!r} was given"
        self.origins[name] = self.key
        if inner:
            self.precision[inner] = value
        else:
            self.settings[name] = value
        return "honoured", f"{name}={value!r}"


def _mapping(precision: Any) -> Mapping[str, Any]:
    """A precision that was given, by setting."""
    if isinstance(precision, Precision):
        return {"dtype": precision.dtype, **precision.changed()}
    return precision if isinstance(precision, Mapping) else {"dtype": precision}


@dataclass(frozen=True)
class Rule:
    """says: value, draft -> verdict and words. setting: what of the plan an "auto" leaves open. native: "auto" is the
    key's own word, not one of Transformers."""

    says: Callable[[Any, Draft], Said]
    setting: str | None = None
    native: bool = False


@dataclass(frozen=True)
class Section:
    """Keys inside of a key. off: words for a section that has no effect, or None, from (section, draft). absent: what
    DeepSpeed takes for keys that are left out, where it matters."""

    keys: Mapping[str, Any]
    off: Callable[[Mapping[str, Any], Draft], str | None] = lambda section, draft: None
    absent: Callable[[Draft], Mapping[str, Any]] = lambda draft: {}


def walk(config: Mapping[str, Any], within: Section, draft: Draft, prefix: str = "") -> list[Note]:
    """A note for every key of `config`, those in sections too, and for every default that matters."""
    notes, keys = [], within.keys
    for key, value in config.items():
        name, rule = prefix + str(key), keys.get(key)
        draft.key = name
        if rule is None:
            notes.append(_unknown(name, key, value, keys))
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
            if off is None:
                notes += walk(value, rule, draft, name + ".")
            else:
                unknown = [key for key in value if key not in rule.keys]
                notes += [_unknown(f"{name}.{key}", key, value[key], rule.keys) for key in unknown]
                notes.append(Note(name, value, "unneeded", off))
    for key, value in within.absent(draft).items():
        draft.key = prefix + key
        verdict, text = ("unneeded", "") if key in config else _of(keys[key], value, draft)
        if verdict != "unneeded":
            notes.append(Note(draft.key, value, verdict, f"{text}; left out, it is DeepSpeed's default"))
    return notes


def _unknown(name: str, key: Any, value: Any, keys: Mapping[str, Any]) -> Note:
    return Note(name, value, "cannot", f"no such key is known{nearest(str(key), keys)}")


def _of(rule: Rule, value: Any, draft: Draft) -> Said:
    if value != "auto" or rule.native:
        return rule.says(value, draft)
    return ("unneeded", '"auto" leaves it open') if rule.setting is None else _left_open(rule.setting, draft)


def _left_open(setting: str, draft: Draft) -> Said:
    first = setting.partition(".")[0]
    if first in draft.given:
        return "unneeded", f"{first}={draft.given[first]!r} was given"
    return "cannot", f'only the Trainer of Transformers fills in "auto": give {first}= beside the configuration'


# ------------------------------------------------------------ kinds of rules


def sets(setting: str, off: Any = None) -> Rule:
    """Writes a setting; `off` is the value that leaves it at its default."""

    def says(given: Any, draft: Draft) -> Said:
        if given is None or _is_among(given, (off,)):
            return "unneeded", f"that is the default of {setting}"
        return draft.set(setting, given)

    return Rule(says, setting)


def _is_among(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether a value is one of some. True is no number."""
    return any(value == one and (isinstance(one, bool) or not isinstance(value, bool)) for one in values)


def flag(setting: str, value: Any) -> Rule:
    """Writes `value` to a setting where it is true."""

    def says(on: Any, draft: Draft) -> Said:
        if not isinstance(on, bool | None):
            return "cannot", "it must be true or false"
        return draft.set(setting, value) if on else ("unneeded", "it is off")

    return Rule(says)


def unneeded(why: str) -> Rule:
    return Rule(lambda value, draft: ("unneeded", why))


def zero_stage(value: Any, draft: Draft) -> Said:
    return draft.set("stage", value) if draft.stage else ("unneeded", "that is the default of stage")


def in_stage_3(rule: Rule) -> Rule:
    """A rule for a key that DeepSpeed reads in stage 3 only."""
    return Rule(
        lambda value, draft: rule.says(value, draft) if draft.stage == 3 else ("unneeded", "it is for stage 3 only"),
        rule.setting,
    )


def within(dtype: str, rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """Rules for keys that matter with a precision of that dtype only."""

    def of(rule: Rule) -> Rule:
        def says(value: Any, draft: Draft) -> Said:
            on = draft.computes_in(dtype)
            if on:
                return rule.says(value, draft)
            return "unneeded", f"whether {dtype} is on is not known" if on is None else f"{dtype} is off"

        return Rule(says, rule.setting, rule.native)

    return {key: of(rule) for key, rule in rules.items()}


def yours(what: str, *off: Any) -> Rule:
    return Rule(lambda value, draft: off_or(value is None or _is_among(value, off), ("yours", what)))


def cannot(why: str, *off: Any, native: bool = False) -> Rule:
    """off: the values that ask for nothing."""
    return Rule(lambda value, draft: off_or(value is None or _is_among(value, off), ("cannot", why)), native=native)


def switched(
    why: str,
    verdict: str = "cannot",
    switch: str = "enabled",
    off: tuple[Any, ...] = (False, None),
    unsaid: Any = None,
) -> Rule:
    """A section that is on where its switch is. off: values of a switch that is not. unsaid: what it is taken for in a
    section of other keys alone."""

    def says(value: Any, draft: Draft) -> Said:
        if isinstance(value, Mapping) and switch not in value:
            for key in difflib.get_close_matches(switch, map(str, value), n=1):
                return "cannot", f"no such key is known: {key!r}; did you mean {switch!r}?"
        on = value.get(switch, unsaid if value else None) if isinstance(value, Mapping) else value
        return off_or(_is_among(on, off), (verdict, why))

    return Rule(says)


def off_or(off: bool, otherwise: Said) -> Said:
    return ("unneeded", "it is off") if off else otherwise


def is_off(name: str) -> Callable[[Mapping[str, Any], Draft], str | None]:
    def off(section: Mapping[str, Any], draft: Draft) -> str | None:
        on = section.get("enabled", False)
        if on != "auto" and not isinstance(on, bool):
            raise draft.wrong(on, 'true, false or "auto"', f"{draft.key}.enabled")
        return None if on else f"{name} is off"

    return off


# ------------------------------------------------------------ batches


def train_batch_size(value: Any, draft: Draft) -> Said:
    if value == "auto":
        return _rows_left_open(draft)
    if not _is_number(value):
        return "cannot", "it must be a number of rows"
    batch, micro, steps = _batches(draft)
    world = draft.world_size
    if micro is not None and steps is not None and world is not None and micro * steps * world != batch:
        return "cannot", f"{micro} rows x {steps} micro-batches x {world} ranks are {micro * steps * world} rows"
    if steps is not None and world is not None and batch % (steps * world):
        return "cannot", f"{steps} micro-batches x {world} ranks do not divide it"
    if micro is not None and steps is None:
        if world is None:
            return "cannot", "the number of micro-batches follows from that of ranks: give world_size= or microbatches="
        if batch % (micro * world):
            return "cannot", f"{micro} rows x {world} ranks do not divide it"
        return draft.set("microbatches", batch // (micro * world))
    return "yours", "all ranks together feed so many rows to each train_step"


def accumulation(value: Any, draft: Draft) -> Said:
    batch, micro, steps = _batches(draft)
    if value != "auto":
        return sets("microbatches", 1).says(steps if _is_number(value) else value, draft)
    if steps is None and None not in (batch, micro, draft.world_size):
        return "unneeded", "it follows from train_batch_size"
    return _left_open("microbatches", draft)


def micro_batch(value: Any, draft: Draft) -> Said:
    if value == "auto":
        return _rows_left_open(draft)
    if not _is_number(value):
        return "cannot", "it must be a number of rows"
    return "yours", f"feed each rank {_batches(draft)[1]} rows for every micro-batch of its train_step"


def _rows_left_open(draft: Draft) -> Said:
    """Rows are the caller's; how many micro-batches they make must be known."""
    if "microbatches" not in draft.given and _batches(draft)[2] is not None:
        return "unneeded", "train_step takes as many rows as it is fed"
    return _left_open("microbatches", draft)


def _batches(draft: Draft) -> tuple[Any, Any, Any]:
    """Rows of a step, rows of a micro-batch, micro-batches; None: not known."""
    found = []
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        value: Any = draft.config.get(key)
        if _is_number(value) and (value < 1 or value % 1):
            raise draft.wrong(value, "a whole number, 1 or more", key)
        found.append(int(value) if _is_number(value) else None)
    steps = draft.given.get("microbatches", found[2])
    return found[0], found[1], steps if _is_number(steps) and steps >= 1 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ------------------------------------------------------------ precision


def precision(dtype: str) -> Rule:
    def says(on: Any, draft: Draft) -> Said:
        if draft.precision.get("dtype", dtype) != dtype:
            raise ValueError("DeepSpeed configuration: bf16 and fp16 are both enabled: choose one")
        verdict, text = draft.set("precision.dtype", dtype)
        how = "by torch.autocast in stage 0" if draft.stage == 0 else "beside fp32 masters"
        return verdict, f"{text}, {how}" if verdict == "honoured" else text

    return Rule(says, "precision")


def static_scale(value: Any, draft: Draft) -> Said:
    if isinstance(value, bool):
        raise draft.wrong(value, "a number")
    if not value:
        return "unneeded", "the scale is dynamic"
    if not _is_number(value):
        return "cannot", "it must be a number"
    draft.set("precision.init_scale", float(value))
    return "cannot", f"the scale is dynamic; it begins with {value}"


def if_dynamic(setting: str, convert: Callable[[Any], Any]) -> Rule:
    def says(value: Any, draft: Draft) -> Said:
        if isinstance(value, bool):
            raise draft.wrong(value, "a number")
        if not draft.is_dynamic:
            return "unneeded", "DeepSpeed reads it with a dynamic scale only"
        if not _is_number(value):
            return "cannot", "it must be a number"
        default = Precision.model_fields[setting].default
        if convert(value) == default:
            return "unneeded", f"that is the default of precision.{setting}"
        return draft.set(f"precision.{setting}", convert(value))

    return Rule(says)


def least_scale(value: Any, draft: Draft) -> Said:
    if value == 1 and value is not True:
        return "unneeded", "a run that overflows at 1 ends with DeepSpeed; here its scale goes on halving"
    return "cannot", "the scale has no lower bound; a run that overflows at every scale skips every step"


def torch_autocast(on: Any, draft: Draft) -> Said:
    if draft.stage:
        return "cannot", "stages 1 to 3 compute in copies of their parameters, all operations in one dtype"
    names = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "bf16": "bf16", "fp16": "fp16"}
    dtype = str(draft.section("torch_autocast").get("dtype")).removeprefix("torch.")
    if dtype not in names:
        return "cannot", f"its dtype must be one of {', '.join(names)}"
    return draft.set("precision.dtype", names[dtype])


# ------------------------------------------------------------ offload


def offload_is_off(section: Mapping[str, Any], draft: Draft) -> str | None:
    device = section.get("device")
    if device not in (None, *_DEVICES):
        right = f"one of {', '.join(_DEVICES)}{nearest(str(device), _DEVICES)}"
        raise draft.wrong(device, right, f"{draft.key}.device")
    if device in (None, "none"):
        return "its device is none"
    return None if draft.stage else "DeepSpeed offloads in stages 1 to 3 only"


def offload_device(value: Any, draft: Draft) -> Said:
    if value == "cpu":
        return offload_to_cpu(True, draft)
    path = draft.section("zero_optimization")["offload_optimizer"].get("nvme_path")
    if path is None:
        return "cannot", "there is no nvme_path"
    return draft.set("offload", str(path))


def offload_to_cpu(on: Any, draft: Draft) -> Said:
    if not draft.stage:
        return "unneeded", "DeepSpeed offloads in stages 1 to 3 only"
    verdict, text = flag("offload", "cpu").says(on, draft)
    if verdict == "honoured":
        text += ", which needs GPUs: on CPU ranks the state is in the CPU's memory anyway; give offload=None there"
    return verdict, text
