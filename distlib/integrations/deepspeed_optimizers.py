"""The optimizer and scheduler of a DeepSpeed configuration: what the caller makes instead, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distlib.integrations.deepspeed_rules import Draft, Said
from distlib.plan.checked import nearest

_OPTIMIZERS = {
    "adam": ("AdamW", {"lr", "betas", "eps", "weight_decay"}),
    "adamw": ("AdamW", {"lr", "betas", "eps", "weight_decay"}),
    "lion": ("Lion", {"lr", "betas", "weight_decay"}),
    "sgd": ("SGD", {"lr", "momentum", "weight_decay", "dampening", "nesterov"}),
}
# What DeepSpeed's optimizers take for parameters that are left out, where distlib.optim takes something else.
_THEIRS: dict[str, dict[str, Any]] = {"AdamW": {"weight_decay": 0.0}, "Lion": {"lr": 1e-3, "betas": (0.9, 0.999)}}
_NO_MATTER = {"torch_adam", "fused", "foreach", "fp32_optimizer_states"}  # of Adam: how it is computed
_OFF = {"bias_correction": True, "amsgrad": False}


def optimizer(value: Any, draft: Draft) -> Said:
    problem, params = _named(value, "legacy_fusion")
    if params is None:
        return "cannot", problem
    kind = str(value["type"])
    if kind.lower() not in _OPTIMIZERS:
        return "cannot", f"distlib.optim has AdamW, SGD and Lion: pass parallelize() a {kind} of your own"
    name, known = _OPTIMIZERS[kind.lower()]
    fixed = {key: tuple(v) if isinstance(v, list) else v for key, v in params.items() if v != "auto"}
    is_coupled = kind.lower() == "adam" and params.get("adam_w_mode", True) is False
    is_torchs = bool(fixed.get("torch_adam")) and not is_coupled  # torch's AdamW decays as ours
    left_out = {} if is_torchs else {k: v for k, v in _THEIRS.get(name, {}).items() if k not in params}
    ours = {**{key: v for key, v in fixed.items() if key in known}, **left_out}
    draft.optimizer = (name, ours)
    made = f"optimizer=lambda p: distlib.optim.{name}(p{''.join(f', {k}={v!r}' for k, v in ours.items())})"
    if left_out:
        made += f", where {' and '.join(left_out)} {'is' if len(left_out) == 1 else 'are'} DeepSpeed's default"
    wrong = [key for key in fixed if key not in known and not _is_adams(name, key, fixed[key])]
    if is_coupled and ours.get("weight_decay", "auto") != 0:
        wrong.append("adam_w_mode=False")
    open_ = [key for key, v in params.items() if v == "auto"]
    if wrong or problem:
        return "cannot", "; ".join(filter(None, (problem, ", ".join(wrong), f"the rest is {made}")))
    return "yours", made + (f", with {', '.join(open_)}, which Transformers fills in" if open_ else "")


def _is_adams(name: str, key: str, value: Any) -> bool:
    """Whether a parameter of DeepSpeed's or torch's Adam changes nothing; adam_w_mode is looked at apart."""
    return name == "AdamW" and (key in _NO_MATTER or key == "adam_w_mode" or _OFF.get(key) == value)


def scheduler(value: Any, draft: Draft) -> Said:
    problem, params = _named(value)
    if params is None:
        return "cannot", problem
    params = {key: v for key, v in params.items() if v != "auto"}
    draft.scheduler = (str(value["type"]), params)
    made = f"a torch.optim.lr_scheduler on the engine's optimizer, as {value['type']} with {params}"
    return ("cannot", f"{problem}; the rest is {made}") if problem else ("yours", made)


def _named(value: Any, *others: str) -> tuple[str, dict[str, Any] | None]:
    """What is wrong with a section of a type and its params, and these; None: it is none."""
    if not (isinstance(value, Mapping) and "type" in value and isinstance(value.get("params") or {}, Mapping)):
        return "it must be a mapping with a type, and maybe params", None
    known = ("type", "params", *others)
    unknown = [f"no such key is known: {key!r}{nearest(str(key), known)}" for key in value if key not in known]
    return "; ".join(unknown), dict(value.get("params") or {})
