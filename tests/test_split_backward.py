"""A backward in two passes equals a backward in one: gradients to the bit, operations to the last, hooks and all."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm.model import GPT, Block, next_token_loss, rotary_table
from ranks import process_group, run_ranks
from split_models import CASES, Bare, Dense, OwnLinear, Twice, tokens, values
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import distlib
from distlib import native
from distlib.pipeline.split_backward import WeightQueue, extra_flops, prepare, restore
from distlib.shards import shard_of


def gradients(module: nn.Module) -> dict[str, Any]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def assert_equal(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 0.0) -> None:
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        got = found[name]
        assert (got is None) == (want is None), name
        if want is None:
            continue
        assert got.dtype == want.dtype and got.shape == want.shape, name
        if tolerance:
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=name)
        else:
            assert torch.equal(got, want), (name, (got - want).abs().max())


def made(case: str) -> tuple[nn.Module, Callable[[int], torch.Tensor]]:
    torch.manual_seed(1)
    make, inputs = CASES[case]
    return make(), inputs


def losses(module: nn.Module, inputs: list[torch.Tensor], autocast: bool = False) -> list[torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = [module(x) for x in inputs]
    return [(out.float() * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum() for out in outputs]


def leaves(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.detach().requires_grad_() if x.requires_grad else x for x in inputs]


SOME = ["gpt, tied", "bare weights", "own forward", "parametrized"]


@pytest.mark.parametrize(
    "case, how", [(c, h) for c in CASES for h in ("auto", "graph", "deferral") if h != "deferral" or c in SOME]
)
def test_two_passes_equal_one_in_any_order_of_micro_batches(case: str, how: str) -> None:
    plain, inputs = made(case)
    module = copy.deepcopy(plain)
    report = prepare(module, how)
    expected, given = leaves([inputs(0), inputs(1)]), leaves([inputs(0), inputs(1)])
    for loss in losses(plain, expected):
        loss.backward()
    queues = [WeightQueue(report), WeightQueue(report)]
    for queue, loss in zip(queues, losses(module, given), strict=True):  # B0 B1 W0 W1
        queue.backward(loss)
    for a, b in zip(given, expected, strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))
    ways = {d.way for d in report.decisions}
    assert ways <= {"deferral", "graph", "input pass"}
    for queue in queues:
        waiting = len(queue)
        assert queue.run() == waiting and queue.nbytes == 0 and queue.run() == 0
    if how != "deferral":
        assert "deferral" in ways or "graph" in ways
    found, wanted = gradients(module), gradients(plain)
    if case == "sparse embedding":
        found, wanted = ({k: v.to_dense() for k, v in g.items()} for g in (found, wanted))
    # Weights used several times along one path come in another order of additions when the graph is walked.
    assert_equal(found, wanted, 1e-6 if how == "graph" else 0.0)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_without_a_queue_nothing_changes(case: str, autocast: bool) -> None:
    plain, inputs = made(case)
    module = copy.deepcopy(plain)
    prepare(module, "deferral")
    expected, given = leaves([inputs(0)]), leaves([inputs(0)])
    (a,), (b,) = losses(plain, expected, autocast), losses(module, given, autocast)
    assert torch.equal(a, b)
    a.backward()
    b.backward()
    found, wanted = gradients(module), gradients(plain)
    if case == "sparse embedding":
        found, wanted = ({k: v.to_dense() for k, v in g.items()} for g in (found, wanted))
    # Under autocast a weight used several times sums its gradients in bf16 in torch, in fp32 here.
    assert_equal(found, wanted, 2e-2 if autocast and isinstance(module, Twice) else 0.0)
    with torch.no_grad():
        assert torch.equal(plain(expected[0]), module(given[0]))


def test_autocast_splits_to_the_same_bits() -> None:
    plain, inputs = made("gpt")
    module = copy.deepcopy(plain)
    report = prepare(module)
    losses(plain, [inputs(0)], autocast=True)[0].backward()
    queue = WeightQueue(report)
    queue.backward(losses(module, [inputs(0)], autocast=True)[0])
    with torch.autocast("cpu", torch.bfloat16):  # what is fp32 in the weight pass stays so
        queue.run()
    assert_equal(gradients(module), gradients(plain))


# ---------------------------------------------------------------- operations


def block_losses(block: nn.Module, checkpointed: bool, x: torch.Tensor) -> torch.Tensor:
    cos, sin = rotary_table(x.shape[1], 8, x.device)
    y = checkpoint(block, x, cos, sin, use_reentrant=False) if checkpointed else block(x, cos, sin)
    y = checkpoint(block, y, cos, sin, use_reentrant=False) if checkpointed else block(y, cos, sin)
    return y.square().sum()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("how", ["auto", "graph"])
def test_no_operation_more_on_plain_and_checkpointed_blocks(checkpointed: bool, how: str) -> None:
    torch.manual_seed(0)
    plain = Block(16, 2)
    module = copy.deepcopy(plain)
    report = prepare(module, how)

    def flops(run: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    loss = block_losses(plain, checkpointed, values(2, 4, 16))
    one = flops(loss.backward)
    loss = block_losses(module, checkpointed, values(2, 4, 16))
    queue = WeightQueue(report)
    first = flops(lambda: queue.backward(loss))
    second = flops(queue.run)
    assert first + second == one > 0
    assert_equal(gradients(module), gradients(plain))
    if how == "auto":
        # Each of the four products has its weight gradient, of both calls, in the second pass.
        assert second == 2 * (2 * 2 * 4) * (16 * 48 + 16 * 16 + 2 * 16 * 64)
    else:  # every weight is used by both calls, or saved inside of a checkpoint: all of them are named
        assert second == 0 and len(queue.kept) == len(list(plain.parameters()))


def test_the_graph_walk_splits_without_an_operation_more() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Bare(8), nn.Linear(16, 8), Bare(8))
    for how in ("auto", "deferral", "graph"):
        split, plain = extra_flops(model, values(5, 8), how=how)
        assert split == plain > 0
    report = prepare(model)
    assert report.names("graph") == ["0", "2"] and report.names("deferral") == ["1"]
    queue = WeightQueue(report)
    loss = model(values(5, 8)).sum()
    with FlopCounterMode(display=False) as counter:
        queue.backward(loss)
    assert counter.get_total_flops() == 2 * 5 * (2 * 8 * 16 + 2 * 8 * 8 + 16 * 8)  # input gradients only
    assert [p.grad is not None for p in model[0].parameters()] == [False, False, True]  # the gain came at once
    assert not queue.kept
    queue.run()
    assert all(p.grad is not None for p in model.parameters())


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.t(), x.t() @ g


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whole, self.hooked, self.fine = (nn.Parameter(torch.eye(4) * k) for k in (1, 2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Doubling.apply(x, self.whole) @ self.hooked @ self.fine


def test_the_graph_walk_names_what_it_does_not_defer() -> None:
    plain, module = Odd(), Odd()
    for m in (plain, module):
        m.hooked.register_hook(lambda g: g * 3)
        m.fine.data += 0.5
    report = prepare(module)
    plain(values(3, 4)).square().sum().backward()
    x = values(3, 4)
    y = module(x)
    y.register_hook(lambda g: g * 2)  # seen once, though its node runs twice
    queue = WeightQueue(report)
    queue.backward(y.square().sum() / 2)
    assert queue.kept.keys() == {"whole", "hooked"}
    assert "all of its gradients at once" in queue.kept["whole"] and "hook" in queue.kept["hooked"]
    assert module.fine.grad is None
    queue.run()
    assert_equal(gradients(module), gradients(plain), 1e-6)


# ---------------------------------------------------------------- what is reported, kept and refused


def test_the_report_says_what_each_module_does_and_why() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.own, self.frozen, self.sub = (
                nn.Linear(8, 8),
                OwnLinear(8, 8),
                nn.Linear(8, 8).requires_grad_(False),
                Dense(8, 8),
            )
            self.norm, self.bare = nn.LayerNorm(8), Bare()
            self.tied = nn.Linear(8, 8, bias=False)
            self.tied.weight = self.bare.a
            self.again = nn.Linear(8, 8, bias=False)
            self.again.weight = self.tied.weight
            self.even = nn.Conv1d(8, 8, 4, padding="same")
            self.attention = nn.MultiheadAttention(8, 2)
            self.lazy = nn.LazyLinear(8)

    model = Model()
    state = list(model.state_dict())
    report = prepare(model)
    by = {d.name: d for d in report.decisions}
    assert set(report.names("deferral")) == {"linear", "sub"}
    for name, why in {
        "own": "a forward of its own",
        "frozen": "frozen",
        "norm": "no Linear",
        "tied": "tied with 'bare'",
        "again": "tied with 'bare'",
        "even": "even kernel",
        "attention.out_proj": "without calling",
        "lazy": "lazy",
    }.items():
        assert why in by[name].reason, by[name]
        assert name in str(report)
    assert {by[n].way for n in ("own", "bare", "tied", "even")} == {"graph"}
    assert {by[n].way for n in ("norm", "frozen", "lazy")} == {"input pass"}
    assert list(model.state_dict()) == state and type(model.linear) is nn.Linear
    with pytest.raises(ValueError, match="how='later'.*auto"):
        prepare(model, "later")
    restore(model)
    assert not [m for m in model.modules() if "forward" in m.__dict__ or m._forward_pre_hooks and m is not model.lazy]


def test_copies_defer_and_pickles_come_back_plain() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prepare(module)
    x = values(2, 4)
    twin = copy.deepcopy(module)
    queue = WeightQueue()
    queue.backward(twin(x).sum())
    assert queue.names == ["1", "0"] and queue.run() == 2
    assert twin[0].weight.grad is not None and module[0].weight.grad is None
    loaded = pickle.loads(pickle.dumps(module))
    assert torch.equal(loaded(x), module(x))
    assert prepare(loaded).names("deferral") == ["0", "1"]
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)


def test_the_queue_keeps_input_and_gradient_and_lets_go() -> None:
    module = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Tanh(), nn.Linear(32, 16))
    prepare(module)
    x = values(10, 64)
    y = module(x)
    grad = torch.ones_like(y)
    queue = WeightQueue()
    queue.backward(y, grad)
    inner = [t for entry in queue._entries for t in entry.tensors]
    assert len(queue) == 2 and queue.nbytes == 4 * 10 * (64 + 32 + 32 + 16)
    assert all(t.grad_fn is None for t in inner)  # not the graph
    alive = [weakref.ref(t) for t in inner if t is not grad]
    del inner, y
    queue.run()
    gc.collect()
    assert queue.nbytes == 0 and not [r for r in alive if r() is not None and r().shape != x.shape]


def test_misuse_is_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prepare(module)
    x = values(2, 4)
    with pytest.raises(RuntimeError, match="'1'.*create_graph=True is refused.*restore"):
        torch.autograd.grad(module(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="call queue.backward"), WeightQueue() as queue:
        module(x).sum().backward()
    with WeightQueue() as queue:
        queue.backward(module(x).sum())
    queue.run()
    x = values(2, 4)
    queue.backward(module(x).sum())
    x.data.add_(1)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match=r"module '0': its input, float32 \[2, 4\], was changed in place"):
        queue.run()
    assert len(queue) == 0
    with pytest.raises(ValueError, match="1 tensors and 2 gradients"):
        queue.backward([module(x)], [None, None])
    with pytest.raises(RuntimeError, match="no scalar"):
        queue.backward(module(x))
    queue.backward(module(x).sum())
    with pytest.warns(ResourceWarning, match="2 weight gradients that were never added.*'1'"):
        del queue
        gc.collect()


def test_hooks_fire_once_per_weight_and_pass() -> None:
    model = GPT(1, 16, 2, tied=True)
    report = prepare(model)
    landed: list[str] = []
    seen: list[str] = []
    ready: list[int] = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, n=name: landed.append(n))
        p.register_hook(lambda g, n=name: seen.append(n))
    norms = [n for n, _ in model.named_parameters() if "norm" in n]
    queue = WeightQueue(report, lambda p: ready.append(id(p)))
    queue.backward(next_token_loss(model(tokens()), tokens(seed=1)))
    assert sorted(landed) == sorted(seen) == sorted(norms) and not ready
    landed.clear()
    seen.clear()
    queue.run()
    weights = [(n, p) for n, p in model.named_parameters() if n not in norms]
    assert sorted(landed) == sorted(seen) == sorted(n for n, _ in weights)
    assert sorted(ready) == sorted(id(p) for _, p in weights)
    queue.backward(next_token_loss(model(tokens()), tokens(seed=1)))
    queue.run()
    assert len(ready) == 2 * len(weights)


class Shared(nn.Module):
    """Uses a Linear's weight past the Linear too: prepare() cannot know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(functional.linear(x, self.linear.weight))


def test_a_weight_used_past_its_module_lands_in_both_passes() -> None:
    plain = Shared()
    module = copy.deepcopy(plain)
    landed: list[int] = []
    module.linear.weight.register_post_accumulate_grad_hook(lambda _: landed.append(1))
    queue = WeightQueue(prepare(module))
    plain(values(3, 4)).square().sum().backward()
    queue.backward(module(values(3, 4)).square().sum())
    assert len(landed) == 1
    queue.run()
    assert len(landed) == 2
    assert_equal(gradients(module), gradients(plain), 1e-6)


def test_partly_frozen_modules_defer_what_is_trained() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(3, 2, 1))
    plain[0].weight.requires_grad_(False)
    plain[1].bias.requires_grad_(False)
    plain[2].weight.requires_grad_(False)
    module = copy.deepcopy(plain)
    queue = WeightQueue(prepare(module))
    plain(values(3, 4)).square().sum().backward()
    queue.backward(module(values(3, 4)).square().sum())
    assert not any(p.grad is not None for p in module.parameters()) and queue.run() == 3
    assert_equal(gradients(module), gradients(plain))


def test_threads_have_queues_of_their_own() -> None:
    models = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)]
    lengths: dict[int, int] = {}
    barrier = threading.Barrier(3)

    def stage(i: int) -> None:
        if i < 2:
            prepare(models[i])
        loss = models[i](values(2, 4)).sum()

        def meet(_: torch.Tensor) -> None:
            """All three are inside of a backward at once; the third has no queue."""
            barrier.wait(10)

        loss.register_hook(meet)
        queue = WeightQueue()
        if i < 2:
            queue.backward(loss)
        else:
            loss.backward()
        lengths[i] = len(queue)
        queue.run()

    threads = [threading.Thread(target=stage, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == {0: 2, 1: 2, 2: 0}
    assert all(p.grad is not None for m in models for p in m.parameters())


def test_a_reentrant_checkpoint_is_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    prepare(module)
    y = checkpoint(module, values(2, 4), use_reentrant=True)
    queue = WeightQueue()
    with pytest.raises(RuntimeError, match="use_reentrant"):
        queue.backward(y.sum())
    assert len(queue) == 0


def split_data_parallel(rank: int, n: int, stage: int, deferral_after: bool) -> float:
    """Two micro-batches per rank: all passes but the last weight pass are local. Returns the worst difference."""
    torch.manual_seed(0)
    plain = GPT(1, 16, 2)
    for r in range(n):
        for micro in range(2):
            seed = 2 * r + micro
            (next_token_loss(plain(tokens(seed=seed)), tokens(seed=seed + 9)) / n).backward()
    want = gradients(plain)
    plain.zero_grad()
    with process_group(rank, n):
        if not deferral_after:
            report = prepare(plain)
        model: Any
        if stage:
            model = distlib.ShardedDataParallel(plain, stage=stage)
        else:
            model = distlib.DataParallel(plain, bucket_mb=0.01)
        if deferral_after:
            report = prepare(model)
        assert len(report.names("deferral")) == 6
        queues = [WeightQueue(report), WeightQueue(report)]
        for micro, queue in enumerate(queues):
            seed = 2 * rank + micro
            if micro == 0:
                with model.no_sync():
                    loss = next_token_loss(model(tokens(seed=seed)), tokens(seed=seed + 9))
            else:  # the last forward says whether this step synchronises
                loss = next_token_loss(model(tokens(seed=seed)), tokens(seed=seed + 9))
            with model.no_sync():
                queue.backward(loss)
        with model.no_sync():
            queues[0].run()
        queues[1].run()
        worst = 0.0
        if stage:
            for p in model.parameters():
                shard = shard_of(p)
                whole = want[shard.name.removeprefix("module.")].view(-1)[shard.offset : shard.offset + shard.numel]
                worst = max(worst, float((p.grad.view(-1) - whole).abs().max()) if p.numel() else 0.0)
        else:
            for name, p in model.named_parameters():
                worst = max(worst, float((p.grad - want[name.removeprefix("module.")]).abs().max()))
        return worst


CORE = pytest.mark.skipif(native.core() is None, reason=native.why_not())


@pytest.mark.parametrize(
    "stage, after, nodes",
    [(0, False, 1), (2, True, 1), pytest.param(3, False, 2, marks=CORE, id="freed between passes")],
)
def test_data_parallelism_sees_gradients_land_in_the_weight_pass(stage: int, after: bool, nodes: int) -> None:
    """Over two nodes, stage 3 frees whole parameters after B: W does without them."""
    env = {} if nodes == 1 else {"DISTLIB_NODES": str(nodes)}
    assert max(run_ranks(2, split_data_parallel, stage, after, env=env)) < 1e-6
