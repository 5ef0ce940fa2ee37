"""Models of Transformers, by any plan, train as in a plain loop; what is exported is read by from_pretrained."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

import distlib
from distlib.integrations import huggingface as hf

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed: make test installs it", allow_module_level=True)

ROWS, LENGTH, STEPS, VOCABULARY = 4, 10, 5, 53
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, **IDS, "num_hidden_layers": 3, "num_key_value_heads": 1, "max_position_embeddings": 32},
    "gpt2": {**IDS, "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32},
    "bert": {**SIZES, **IDS, "num_hidden_layers": 3, "max_position_embeddings": 32},
}
CONFIGS["gpt2"] |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
CONFIGS["bert"] |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)


def model_of(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    made = hf.masked_lm if kind == "bert" else hf.causal_lm
    return made({"model_type": kind, **CONFIGS[kind]}, **settings)


def batch_of(step: int, rank: int = 0) -> dict[str, Tensor]:
    """Rows of different lengths: micro-batches have different numbers of tokens that count."""
    torch.manual_seed(100 + 10 * step + rank)
    ids = torch.randint(1, VOCABULARY, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, 3:], mask[1, 7:] = 0, 0
    labels = ids.masked_fill(mask == 0, hf.IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain(kind: str, ranks: int = 1, **settings: Any) -> tuple[list[float], dict[str, Tensor]]:
    """The usual loop: the mean of the losses of all data ranks, each that of Transformers for its whole batch."""
    model = model_of(kind, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(STEPS):
        loss = sum(model(**batch_of(step, rank)).loss for rank in range(ranks)) / ranks
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


def train(rank: int, n: int, kind: str, settings: dict[str, Any], way: str, folder: str) -> Any:
    """way: how loss and inputs are given. Returns losses and the state dict of the whole model."""
    distlib.init()
    is_masked = kind == "bert"
    loss_fn = None if way == "labels" else hf.masked_loss if is_masked else hf.causal_loss
    model = model_of(kind)
    example = batch_of(0) if way == "labels" else inputs_of(batch_of(0))
    engine = distlib.parallelize(
        model,
        distlib.Plan(costs="estimated", **settings) if settings.get("pipeline", 1) > 1 else distlib.Plan(**settings),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01),
        loss_fn=loss_fn,
        example_inputs=example,
        weigh=hf.masked_tokens if is_masked else hf.causal_tokens,
    )
    losses = []
    for step in range(STEPS):
        batch = batch_of(step, engine.data_rank)
        inputs = batch if way == "labels" else inputs_of(batch)
        losses.append(float(engine.train_step(inputs, batch["labels"])))
    hf.export_pretrained(engine, folder)
    return losses, engine.data_size


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


PLANS: list[tuple[int, str, str, dict[str, Any]]] = [
    (2, "llama", "labels", {"pipeline": 2, "microbatches": 4}),
    (2, "bert", "loss_fn", {"pipeline": 2, "microbatches": 4, "schedule": "interleaved"}),
    (4, "gpt2", "labels", {"pipeline": 2, "microbatches": 2, "stage": 3, "partition_size": 2, "activations": "full"}),
    (2, "llama", "loss_fn", {"stage": 2, "microbatches": 2}),
]


@pytest.mark.parametrize(("ranks", "kind", "way", "settings"), PLANS)
def test_x(ranks, kind, way, settings, tmp_path):
    import transformers
    r = run_ranks(ranks, train, kind, settings, way, str(tmp_path), timeout=110)
    losses, size = r[0]
    expected, state = plain(kind, size)
    print(losses, expected)
    made = getattr(transformers, "AutoModelForMaskedLM" if kind == "bert" else "AutoModelForCausalLM")
    loaded, info = made.from_pretrained(tmp_path, output_loading_info=True)
    print(info, max(float((loaded.state_dict()[k]-v).abs().max()) for k,v in state.items()))
