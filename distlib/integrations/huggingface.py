"""Models of Hugging Face Transformers in plans: made of a config, made ready, weighed by tokens, exported.

    model = causal_lm({"model_type": "llama", "hidden_size": 512, ...})     random weights, nothing is downloaded
    engine = distlib.parallelize(model, Plan(pipeline=2), optimizer=..., example_inputs=batch, weigh=causal_tokens)
    engine.train_step(batch, batch["labels"])                               batch: {"input_ids", "labels", ...}
    export_pretrained(engine, "out")                                        AutoModelForCausalLM.from_pretrained("out")

The model goes through `parallelize` as it is. What this file adds is what its users would have to know otherwise.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from distlib.checkpoint.model_state import is_divided
from distlib.engine.engine import Engine
from distlib.integrations.require import require
from distlib.pipeline.ghost import places
from distlib.pipeline.wrapper import PipelineParallel

IGNORED = -100  # the label of a token that does not count, in all of Transformers

# What can be recorded: masks and shapes that do not depend on the values of tensors.
_ATTENTION = ("sdpa", "eager")
_EXPERTS = "batched_mm"


# ---------------------------------------------------------------- making models


def causal_lm(config: Any, device: str | torch.device = "cpu", **settings: Any) -> nn.Module:
    """A model that predicts the next token, with random weights from torch's seed, ready for `parallelize`.

    Args:
        config: of Transformers; or a mapping as in a config.json, with its "model_type".
        device: "meta" takes no memory; then pass `parallelize` initialize=initializer(model).
        settings: for from_config, such as attn_implementation="eager" or dtype=torch.bfloat16.

    Raises:
        ImportError: Transformers is not installed, with the command that installs it.
        ValueError: as of `prepare`; or a mapping without model_type.
    """
    return _made("AutoModelForCausalLM", config, device, settings)


def masked_lm(config: Any, device: str | torch.device = "cpu", **settings: Any) -> nn.Module:
    """A model that fills in masked tokens, such as BERT. Arguments and errors as of `causal_lm`."""
    return _made("AutoModelForMaskedLM", config, device, settings)


def _made(kind: str, config: Any, device: str | torch.device, settings: dict[str, Any]) -> nn.Module:
    transformers = require("transformers", "transformers")
    if isinstance(config, Mapping):
        values = dict(config)
        if "model_type" not in values:
            raise ValueError('config has no "model_type": name the architecture, such as "llama", "gpt2" or "bert"')
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device(device):
        model = getattr(transformers, kind).from_config(config, **settings)
    if any(_is_experts(part) for part in model.modules()) and "experts_implementation" not in settings:
        model.set_experts_implementation(_EXPERTS)
    return prepare(model.train())


def prepare(model: nn.Module) -> nn.Module:
    """Makes a model of Transformers ready for a pipeline, in place, and returns it. `causal_lm` and `masked_lm` do it.

    Switches the cache of keys and values off: training has no use for it, and stages send tensors only.

    Raises ValueError, with the line that helps, for what depends on the values of tensors, which stages cannot be cut
    from: an attention other than "sdpa" and "eager", a loop over experts; and for Transformers' own activation
    checkpointing.
    """
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values()
    problems = []
    for config in configs:
        attention = getattr(config, "_attn_implementation", None)
        if attention is not None and attention not in _ATTENTION:
            problems.append(
                f"attention {attention!r} makes shapes or masks of values: model.set_attn_implementation('sdpa')"
            )
            break
    experts = [(name, part) for name, part in model.named_modules() if _is_experts(part)]
    for name, part in experts:
        found = getattr(part.config, "_experts_implementation", None)
        if found != _EXPERTS:
            problems.append(
                f"{name} runs its experts by {found!r}, which asks which tokens go where: "
                f"model.set_experts_implementation({_EXPERTS!r})"
            )
            break
    if any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        problems.append(
            "Transformers' activation checkpointing is on: model.gradient_checkpointing_disable(), and "
            'Plan(activations="full")'
        )
    if problems:
        raise ValueError(f"{type(model).__name__} cannot be divided into stages: " + "; ".join(problems))
    for config in configs:
        if getattr(config, "use_cache", False):
            config.use_cache = False
    return model


def _is_experts(module: nn.Module) -> bool:
    """Whether a module has the weights of all experts, and a choice of how to run them."""
    return hasattr(module, "config") and hasattr(module, "num_experts") and type(module).__name__.endswith("Experts")


def initializer(model: Any) -> Callable[[nn.Module], None]:
    """For a model on the meta device: what `parallelize` takes as `initialize`. Distributions are Transformers' own.

    As there, a module is initialised by the innermost model that it lies in; then the modules above it, inside of that
    model, have their say: GPT-2 and Mamba, for two, treat a weight by what its module is to its block.
    """
    owners: dict[int, Any] = {}  # the innermost model of a module
    above: dict[int, list[nn.Module]] = {}  # the modules between the two, from inside out

    def walk(module: nn.Module, owner: Any, path: list[nn.Module]) -> None:
        if hasattr(module, "_init_weights"):
            owner, path = module, []
        owners[id(module)], above[id(module)] = owner, path
        for child in module.children():
            walk(child, owner, path if module is owner else [module, *path])

    walk(model, model, [])

    @torch.no_grad()
    def initialize(module: nn.Module) -> None:
        owner = owners.get(id(module), model)
        owner._init_weights(module)
        for part in above.get(id(module), ()):
            with _others_on_meta(part, module):
                owner._init_weights(part)

    return initialize


@contextlib.contextmanager
def _others_on_meta(part: nn.Module, module: nn.Module) -> Iterator[None]:
    """What is done inside to `part` reaches the tensors of `module` only."""
    others = [place for place in places(part) if place.owner is not module]
    try:
        for place in others:
            empty = torch.empty_like(place.tensor, device="meta")
            place.store[place.key] = nn.Parameter(empty) if isinstance(place.tensor, nn.Parameter) else empty
        yield
    finally:
        for place in others:
            place.store[place.key] = place.tensor


# ---------------------------------------------------------------- the loss


def causal_tokens(labels: Tensor) -> float:
    """For `weigh`: how many tokens of a micro-batch count, next-token labels of shape (rows, length).

    With it the loss of a step is Transformers' loss of the whole batch, however tokens are spread over its rows. Pass
    the labels as the target: engine.train_step(batch, batch["labels"]). Decoders whose causal loss is not shifted (of
    BART and its like, Marian, Pegasus, Whisper, XLM, XLNet) count their labels in their place: `masked_tokens`.
    """
    return float((labels[..., 1:] != IGNORED).sum())


def masked_tokens(labels: Tensor) -> float:
    """For `weigh`: how many tokens of a micro-batch count, labels of the tokens in their place."""
    return float((labels != IGNORED).sum())


def causal_loss(output: Any, labels: Tensor) -> Tensor:
    """For `loss_fn`, where the model is not given labels: mean cross entropy of the next token, over those that count.

    output: with logits of shape (rows, length, vocabulary). 0 for a micro-batch where no token counts.
    """
    return _mean_loss(output.logits[..., :-1, :], labels[..., 1:])


def masked_loss(output: Any, labels: Tensor) -> Tensor:
    """For `loss_fn`: mean cross entropy of the tokens that count, in their place. As `causal_loss` otherwise."""
    return _mean_loss(output.logits, labels)


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    flat = labels.reshape(-1)
    total = functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), flat, ignore_index=IGNORED, reduction="sum"
    )
    return total / (flat != IGNORED).sum().clamp(min=1)


# ---------------------------------------------------------------- exporting


def export_pretrained(engine: Engine | nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes what from_pretrained(folder) reads: the whole model's weights in safetensors, and its config.

    engine: or its model. Every rank must call it; each needs memory for the whole model on the CPU, rank 0 writes. When
    it returns on any rank, the folder is complete. With engine="deepspeed" weights are those that the model computes
    with: rounded, where the precision is not fp32.

    Raises ValueError for a model that is not of Transformers, and for a module that DeepSpeed divided, without Engine.
    """
    model: Any = engine.model if isinstance(engine, Engine) else engine
    whole = model.division.ghost if isinstance(model, PipelineParallel) else model
    save = getattr(whole, "save_pretrained", None)
    if save is None:
        raise ValueError("export_pretrained: the model is not of Transformers: it has no save_pretrained()")
    gather = getattr(model, "full_state_dict", None)
    if gather is None and any(is_divided(p) for p in model.parameters()):
        raise ValueError("export_pretrained: DeepSpeed has divided the model over ranks: give the Engine, or its model")
    state = gather() if gather is not None else model.state_dict()
    for name, source in whole.all_tied_weights_keys.items():
        if source in state:
            state[name] = state[source]  # one tensor, so that it is written once
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if is_first:
        save(os.fspath(folder), state_dict=state)
    if dist.is_initialized():
        dist.barrier()
