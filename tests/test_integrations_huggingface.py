"""Models of Transformers, by any plan, train as in a plain loop; what is exported is read by from_pretrained."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

import distlib
from distlib.integrations import huggingface as hf
from distlib.integrations.require import require
from distlib.pipeline.build import materialise
from distlib.pipeline.split_backward import WeightQueue, extra_flops, prepare

pytestmark = pytest.mark.slow  # among the first files to be tested

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
    ids = torch.randint(1, 9, (ROWS, LENGTH))  # few of the tokens, so that there is something to learn
    mask = torch.ones_like(ids)
    mask[0, 3:], mask[1, 7:] = 0, 0
    labels = ids.masked_fill(mask == 0, hf.IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain(kind: str, ranks: int) -> tuple[list[float], dict[str, Tensor]]:
    """The usual loop: the mean of the losses of all data ranks, each that of Transformers for its whole batch."""
    model = model_of(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)  # unlike Adam, it feels the gradients' scale
    losses = []
    for step in range(STEPS):
        loss = sum(model(**batch_of(step, rank)).loss for rank in range(ranks)) / ranks
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


def inputs_of(batch: dict[str, Tensor], way: str) -> dict[str, Tensor]:
    """way: "labels", and the model computes its loss; or "loss_fn"."""
    return {name: tensor for name, tensor in batch.items() if way == "labels" or name != "labels"}


def train(rank: int, n: int, kind: str, way: str, settings: dict[str, Any], folder: str) -> tuple[list[float], int]:
    """Losses of all steps, and how many ranks had data of their own. Exports the model to `folder`."""
    is_masked = kind == "bert"
    engine = distlib.parallelize(
        model_of(kind),
        distlib.Plan(**settings),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
        loss_fn=None if way == "labels" else hf.masked_loss if is_masked else hf.causal_loss,
        example_inputs=inputs_of(batch_of(0), way),
        weigh=hf.masked_tokens if is_masked else hf.causal_tokens,
    )
    losses = []
    for step in range(STEPS):
        batch = batch_of(step, engine.data_rank)
        losses.append(float(engine.train_step(inputs_of(batch, way), batch["labels"])))
    assert engine(**inputs_of(batch, "loss_fn")).logits.shape == (ROWS, LENGTH, VOCABULARY)
    with pytest.raises(ValueError, match="weigh= reads the target"):
        engine.train_step(batch)
    hf.export_pretrained(engine, folder)
    return losses, engine.data_size


CASES: list[tuple[int, str, str, dict[str, Any]]] = [
    (2, "llama", "labels", {"pipeline": 2, "microbatches": 4}),
    (2, "bert", "loss_fn", {"pipeline": 2, "microbatches": 4, "schedule": "interleaved", "costs": "estimated"}),
    (4, "gpt2", "labels", {"pipeline": 2, "microbatches": 2, "stage": 3, "partition_size": 2, "activations": "full"}),
    (4, "gpt2", "loss_fn", {"pipeline": 2, "microbatches": 4, "schedule": "zb-v", "stage": 3, "partition_size": 2}),
    (2, "llama", "loss_fn", {"stage": 2, "microbatches": 2}),
]


def train_all(rank: int, n: int, folder: str) -> dict[int, tuple[list[float], int]]:
    """The cases of so many ranks, by number."""
    assert not {"transformers", "lightning", "deepspeed"} & sys.modules.keys()  # nobody asked for them yet
    distlib.init()
    return {k: train(rank, n, *case, f"{folder}/{k}") for k, (ranks, *case) in enumerate(CASES) if ranks == n}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[Any]]]:
    """(folder with exported models by case; what the ranks of each case found)."""
    folder = tmp_path_factory.mktemp("transformers")
    found: dict[int, list[Any]] = {}
    for n in sorted({ranks for ranks, *_ in CASES}):
        for of_rank in run_ranks(n, train_all, str(folder), timeout=100):
            for k, result in of_rank.items():
                found.setdefault(k, []).append(result)
    return folder, found


@pytest.mark.parametrize("autocast", [False, True])
def test_all_products_of_gpt2_wait_for_the_weight_pass(autocast: bool) -> None:
    plain, divided, batch = model_of("gpt2"), model_of("gpt2"), batch_of(0)
    report = prepare(divided)
    assert not report.names("graph")
    assert {d.kind for d in report.decisions if d.way == "deferral"} == {"Conv1D", "Embedding", "Linear"}
    for model in (plain, divided):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = [model(**batch_of(step)).loss for step in (0, 1)]
        if model is plain:
            for loss in losses:
                loss.backward()
            continue
        queues = [WeightQueue(report) for _ in losses]
        for queue, loss in zip(queues, losses, strict=True):
            queue.backward(loss)
        assert divided.transformer.h[0].attn.c_attn.weight.grad is None
        for queue in queues:
            queue.run()
    for (name, a), b in zip(plain.named_parameters(), divided.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        # Under autocast a weight that is used twice, the embedding's, sums its gradients in its own dtype.
        close = 1e-2 if autocast and name == "transformer.wte.weight" else 0.0
        torch.testing.assert_close(b.grad, a.grad, rtol=close, atol=close, msg=name)
    divided_flops, plain_flops = extra_flops(model_of("gpt2"), **batch)
    assert divided_flops == plain_flops > 0


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda k: f"{CASES[k][1]}-{CASES[k][2]}-{CASES[k][0]} ranks")
def test_any_plan_trains_as_a_plain_loop_and_exports(case: int, runs: tuple[Path, dict[int, list[Any]]]) -> None:
    """Tied embeddings (gpt2, bert), padding masks, rows of unequal numbers of tokens."""
    import transformers

    kind, results = CASES[case][1], runs[1][case]
    expected, state = plain(kind, results[0][1])
    assert expected[-1] < 0.98 * expected[0]
    for losses, _ in results:
        assert losses == pytest.approx(expected, rel=1e-5)
    made = getattr(transformers, "AutoModelForMaskedLM" if kind == "bert" else "AutoModelForCausalLM")
    loaded, told = made.from_pretrained(runs[0] / str(case), output_loading_info=True)
    assert not any(told.values()), told
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-3, atol=1e-5)


def generated(rank: int, n: int) -> list[int]:
    distlib.init()
    engine = distlib.parallelize(
        model_of("gpt2"), distlib.Plan(stage=3), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), weigh=hf.causal_tokens
    )
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(RuntimeError, match="summon_full_params"):
        engine.eval().model.generate(ids, max_new_tokens=4, do_sample=False)
    with engine.model.summon_full_params(writeback=False), torch.no_grad():
        return engine.model.generate(ids, max_new_tokens=4, do_sample=False).tolist()[0]


def test_a_sharded_model_generates_where_it_is_summoned() -> None:
    ids = torch.tensor([[3, 4, 5]])
    expected = model_of("gpt2").eval().generate(ids, max_new_tokens=4, do_sample=False).tolist()[0]
    assert len(expected) > 3 and run_ranks(2, generated) == [expected, expected]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_on_meta_is_initialised_as_transformers_does(kind: str) -> None:
    real = model_of(kind)
    model = model_of(kind, device="meta")
    materialise(model, hf.initializer(model))
    values = dict([*real.named_parameters(), *real.named_buffers()])
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() > 1 and tensor.is_floating_point():  # random, alike in distribution
            assert tensor.std().item() == pytest.approx(values[name].std().item(), rel=0.3), name
        else:
            assert torch.equal(tensor, values[name]), name


def test_a_weight_is_what_its_block_makes_of_it() -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    config = {"model_type": "mamba", **sizes}
    model = hf.causal_lm(config, device="meta")
    materialise(model, hf.initializer(model))
    torch.manual_seed(0)
    real = dict(hf.causal_lm(config).named_parameters())
    for name, tensor in model.named_parameters():
        if name.endswith("dt_proj.bias"):  # 0, if the block above had no say
            assert real[name].mean() < -3 and tensor.mean() < -3, name
        assert tensor.std().item() == pytest.approx(real[name].std().item(), rel=0.3, abs=1e-6), name


def test_micro_batches_weigh_what_their_tokens_count() -> None:
    labels = batch_of(0)["labels"]
    assert hf.causal_tokens(labels) == 2 + 6 + 9 + 9  # the first token of a row is never predicted
    assert hf.masked_tokens(labels) == 3 + 7 + 10 + 10
    nothing = torch.full_like(labels, hf.IGNORED)
    assert (hf.causal_tokens(nothing), hf.masked_tokens(nothing)) == (0, 0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_losses_are_those_of_transformers(kind: str) -> None:
    model, batch = model_of(kind), batch_of(0)
    output = model(**batch)
    loss_fn = hf.masked_loss if kind == "bert" else hf.causal_loss
    torch.testing.assert_close(loss_fn(output, batch["labels"]), output.loss, rtol=1e-6, atol=0)
    assert loss_fn(output, torch.full_like(batch["labels"], hf.IGNORED)) == 0


def test_what_stages_cannot_be_cut_from_is_refused_with_the_line_that_helps() -> None:
    model = model_of("gpt2")
    assert model.config.use_cache is False
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient_checkpointing_disable\(\).*activations=.full"):
        hf.prepare(model)
    model.gradient_checkpointing_disable()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2.*set_attn_implementation\('sdpa'\)"):
        hf.prepare(model)
    experts = hf.causal_lm({"model_type": "mixtral", **CONFIGS["llama"], "num_local_experts": 2})
    experts.set_experts_implementation("grouped_mm")
    with pytest.raises(ValueError, match=r"grouped_mm.*set_experts_implementation\('batched_mm'\)"):
        hf.prepare(experts)
    with pytest.raises(ValueError, match="model_type"):
        hf.causal_lm(CONFIGS["llama"])
    with pytest.raises(ValueError, match="save_pretrained"):
        hf.export_pretrained(nn.Linear(1, 1), "out")


@pytest.mark.parametrize("name", ["transformers", "deepspeed", "lightning"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"{name} is not installed: pip install 'distlib-train\[{name}\]'"):
        require(name, name)
