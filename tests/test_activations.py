"""Activation policies: the same numbers as without, less memory, and errors that say what to do."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from activation_models import MODELS, WIDTH, Attention, AttentionModel, Residual, make, same, step
from ranks import process_group, run_ranks
from torch import Tensor, nn

import distlib
from distlib.activations.live import LiveBytes
from distlib.activations.report import ActivationReport

aten = torch.ops.aten
POLICIES: dict[str, Any] = {
    "full": "full",
    "selective": "selective",
    "operations": {aten.gelu.default, aten.native_layer_norm.default, aten.relu_.default},
    "everything": lambda operation, *args, **kwargs: True,
    "offload": "offload",
}


def apply(model: nn.Module, policy: str, folder: Path, **options: Any) -> ActivationReport:
    if policy == "offload":
        options = {"folder": folder, "resident": 0, **options}
    return distlib.checkpoint_activations(model, POLICIES.get(policy, policy), **options)


@pytest.fixture(autouse=True)
def everything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors move too: the models here are small."""
    monkeypatch.setattr("distlib.activations.offload.SMALLEST", 1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:the activation setting")  # keeping everything and more is allowed
def test_losses_gradients_buffers_and_random_state_are_bit_equal(name: str, policy: str, tmp_path: Path) -> None:
    inputs = MODELS[name][1]
    plain, treated = make(name), make(name)
    apply(treated, policy, tmp_path)
    for seed in range(3):  # the first records and learns, the others use it
        assert same(step(plain, inputs, seed), step(treated, inputs, seed))
    assert same(step(plain, inputs, 7, forwards=3), step(treated, inputs, 7, forwards=3))
    plain.eval()
    treated.eval()
    assert same(step(plain, inputs), step(treated, inputs))
    with torch.no_grad():
        assert torch.equal(plain(inputs), treated(inputs))


@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_curve_of_50_steps_is_bit_equal(policy: str, tmp_path: Path) -> None:
    curves = []
    for treat in (False, True):
        model = make("dropout")
        if treat:
            apply(model, policy, tmp_path)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(50):
            x = torch.randn(4, 10, WIDTH, generator=generator)
            optimizer.zero_grad()
            loss = (model(x) - x.roll(1, 1)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == curves[1]
    assert curves[0][-1] < curves[0][0]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.filterwarnings("ignore:the activation setting")
def test_autocast(policy: str, tmp_path: Path) -> None:
    inputs = MODELS["dropout"][1]
    values = []
    for treat in (False, True):
        model = make("dropout")
        if treat:
            apply(model, policy, tmp_path)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(inputs).square().mean()
        loss.backward()
        values.append([loss.detach(), *[p.grad for p in model.parameters()]])
    assert same(*values)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.filterwarnings("ignore:the activation setting")
def test_a_retained_graph_gives_the_same_gradients_again(policy: str, tmp_path: Path) -> None:
    model, inputs = make("attention"), MODELS["attention"][1]
    apply(model, policy, tmp_path)
    loss = model(inputs).square().mean()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert same(list(first), list(second))


@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_bytes_that_stay_alive_are_those_reported(policy: str, tmp_path: Path) -> None:
    """An independent count: all tensors that live between forward and backward."""
    model = nn.Sequential(*[Residual() for _ in range(4)])
    x = torch.randn(16, 64, WIDTH)
    alive = {}
    for treat in (False, True):
        if treat:
            report = apply(model, policy, tmp_path)
        for _ in range(2):
            live = LiveBytes()
            with live:
                loss = model(x).sum()
                if treat and policy == "offload":
                    model[0].forward.setting.offloader.settle()
                alive[treat] = live.live
                loss.backward()
    assert report.saved_bytes > 0
    # Where x is an input that the caller holds anyway, moving it saves nothing of what is alive here.
    assert alive[False] - alive[True] == pytest.approx(report.saved_bytes, rel=0.05, abs=2 * x.nbytes)
    assert report.baseline_bytes - report.kept_bytes == report.saved_bytes
    if policy == "full":
        assert report.kept_bytes == 4 * x.nbytes
    if policy == "offload":
        assert report.kept_bytes == 0 and report.moved_bytes == report.baseline_bytes
    assert policy in str(report) and "saved" in str(report)


def test_selective_keeps_what_is_asked_for_and_learns_what_is_not() -> None:
    counted: Counter[Any] = Counter()

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counted[func] += 1
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(*[Residual() for _ in range(4)])
    model.eval()  # no dropout behind the last layer
    x = torch.randn(2, 8, WIDTH)
    runs = {}
    for policy in (None, "full", "selective"):
        report = distlib.checkpoint_activations(model, policy) if policy else None
        with Count():
            model(x).sum().backward()  # in this step it is learned what is kept in vain
            counted.clear()
            model(x).sum().backward()
        runs[policy] = Counter(counted)
        if report is not None:
            report.remove()
    matmuls = {policy: of[aten.addmm.default] for policy, of in runs.items()}
    assert matmuls == {None: 8, "full": 8 + 4, "selective": 8}  # the last is behind what backward needs
    assert runs["selective"][aten.gelu.default] == 2 * runs[None][aten.gelu.default]
    report = distlib.checkpoint_activations(model, "selective")
    model(x).sum().backward()
    wasted = {operation for operation, _ in model[0].forward._wasted}
    assert wasted == {aten.addmm.default} and len(model[0].forward._wasted) == 1
    model(x).sum().backward()
    assert report.kept_bytes == 4 * (x.nbytes + 4 * x.nbytes)  # the input and the result of `up`


def test_names_classes_state_and_copies_stay() -> None:
    model, plain = make("dropout"), make("dropout")
    classes = [type(part) for part in model.modules()]
    report = distlib.checkpoint_activations(model, "selective")
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(part) for part in model.modules()] == classes
    plain.load_state_dict(model.state_dict())
    inputs = MODELS["dropout"][1]
    expected = step(plain, inputs)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(step(other, inputs), expected)
        assert other[0].forward.kind == "selective" and other[0].forward.block is other[0]
    report.remove()
    assert all("forward" not in block.__dict__ for block in model) and not model._forward_hooks
    assert same(step(model, inputs), expected)


def test_a_copy_of_one_block_takes_no_other_along() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(*[Residual() for _ in range(8)])
    model = copy.deepcopy(plain)
    distlib.checkpoint_activations(model, "full")
    x = torch.randn(4, WIDTH)
    assert len(pickle.dumps(model[0])) < len(pickle.dumps(plain[0])) + 4096
    for other in (copy.deepcopy(model[0]), pickle.loads(pickle.dumps(model[0]))):
        assert len(other.forward.setting.watcher.choices) == 1
        assert same(step(other, x), step(plain[0], x))
    whole = copy.deepcopy(model)
    assert list(whole[0].forward.setting.watcher.choices) == [str(i) for i in range(8)]
    step(whole, x)
    assert whole[0].forward.setting.watcher.baseline_bytes > 0


@pytest.mark.parametrize("policy", ["full", "selective", "offload"])
def test_a_forward_without_backward_is_not_counted(policy: str, tmp_path: Path) -> None:
    x = torch.randn(4, WIDTH)
    counts = []
    for looks in (False, True):
        model = make("dropout")
        report = apply(model, policy, tmp_path)
        if looks:
            model(x)
            hook = model[2].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(x)
            hook.remove()
        step(model, x)
        counts.append((report.baseline_bytes, report.kept_bytes))
    assert counts[0] == counts[1]


@pytest.mark.filterwarnings("ignore:budget=")
def test_budgets_of_numpy_and_inputs_with_gradients() -> None:
    x = torch.randn(4, WIDTH, requires_grad=True)
    for budget in (np.float32(0.0), np.float64(0.0), np.int64(1 << 30)):
        report = distlib.checkpoint_activations(make("dropout"), budget=budget, example_inputs=x)
        assert type(report.budget) is int and x.grad is None
    with pytest.raises(ValueError, match=r"part from 0.0 to 1.0"):
        distlib.checkpoint_activations(make("dropout"), budget=np.float32(1.5), example_inputs=x)


def test_user_hooks_run_once_and_see_what_they_change() -> None:
    calls = []
    values = []
    for treat in (False, True):
        model = make("dropout")
        calls.clear()
        model[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        model[1].register_forward_hook(lambda module, args, output: calls.append(1) or output + 1)
        if treat:
            distlib.checkpoint_activations(model, "full").refresh()
        values.append(step(model, MODELS["dropout"][1]))
        assert len(calls) == 1
    assert same(*values)


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_a_compiled_block_computes_the_same(policy: str) -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2)]
    x = torch.randn(4, WIDTH)
    plain = step(nn.Sequential(*blocks), x)
    compiled = nn.ModuleList(torch.compile(block, backend="aot_eager") for block in blocks)
    report = distlib.checkpoint_activations(compiled, policy)
    for _ in range(2):
        compiled.zero_grad()
        loss = compiled[1](compiled[0](x)).square().mean()
        loss.backward()
        for p, expected in zip(compiled.parameters(), plain[1:], strict=False):
            torch.testing.assert_close(p.grad, expected)
    assert report.baseline_bytes > 0
    report.remove()
    blocks[0].compile(backend="aot_eager")
    with pytest.raises(ValueError, match=r"compiled in place.*torch.compile\(block\)"):
        distlib.checkpoint_activations(nn.Sequential(*blocks), policy)


# ---------------------------------------------------------------- data parallelism


def steps_of_wrapped(rank: int, n: int, kind: str, policy: str, folder: str) -> None:
    import distlib.activations.offload as offload

    offload.SMALLEST = 1
    with process_group(rank, n):
        results = []
        for treat in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(*[Residual() for _ in range(3)])
            if treat:
                apply(model, policy, Path(folder))
            wrapped = distlib.DataParallel(model) if kind == "replicated" else distlib.ShardedDataParallel(model)
            optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
            losses = []
            for i in range(4):
                torch.manual_seed(10 * rank + i)
                optimizer.zero_grad()
                loss = wrapped(torch.randn(4, 8, WIDTH)).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            results.append([*losses, *[p.detach().clone() for p in wrapped.parameters()]])
        assert same(*results)


@pytest.mark.parametrize(("kind", "policy"), [("replicated", "full"), ("sharded", "selective"), ("sharded", "offload")])
def test_under_data_parallelism(kind: str, policy: str, tmp_path: Path) -> None:
    run_ranks(2, steps_of_wrapped, kind, policy, str(tmp_path), timeout=60)


def test_under_sharding_with_gathers(tmp_path: Path) -> None:
    """Parameters are freed after forward and gathered for backward: hosts that share no memory."""
    run_ranks(2, steps_of_wrapped, "sharded", "full", str(tmp_path), env={"DISTLIB_NODES": "2"}, timeout=60)


# ---------------------------------------------------------------- refusals


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp() * 2


class Changes(nn.Module):
    """Changes in place what backward needs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).exp()
        z = y * 2
        y.add_(1)
        return z


def test_changes_in_place_are_noticed_or_recomputed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Changes(), Changes())
    x = torch.randn(4, WIDTH)
    right = nn.Sequential(*[nn.Sequential(block.layer, Exponential()) for block in model])
    expected = list(torch.autograd.grad(right(x).sum(), list(right.parameters())))
    for policy in ("full", "everything"):
        report = apply(model, policy, tmp_path)
        for _ in range(2):
            gradients = torch.autograd.grad(model(x).sum(), list(model.parameters()))
            assert same(list(gradients), expected)
        report.remove()
    apply(model, "offload", tmp_path)
    loss = model(x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_changes_of_an_input_after_the_forward_are_noticed() -> None:
    model = nn.Sequential(Residual(), Residual())
    distlib.checkpoint_activations(model, "full")
    x = torch.randn(4, WIDTH)
    loss = model(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_before_backward_and_another_mode_are_refused() -> None:
    model = nn.Sequential(Residual(), Residual())
    distlib.checkpoint_activations(model, "full")
    loss = model(torch.randn(4, WIDTH)).sum()
    with torch.no_grad():
        model[1].up.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"parameter 1.up.weight .* before the optimizer's step"):
        loss.backward()
    loss = model(torch.randn(4, WIDTH)).sum()
    model.eval()
    with pytest.raises(RuntimeError, match=r"block '1' ran its forward under train\(\).*eval\(\)"):
        loss.backward()


def test_a_setting_that_saves_nothing_says_so() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.bias

    x = torch.randn(4, WIDTH)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Adds(), Adds())
    with pytest.raises(ValueError, match=r"saves -?\d+ bytes: 2 blocks would keep"):
        distlib.checkpoint_activations(model, "full", blocks=[Adds], example_inputs=x)
    assert "forward" not in model[1].__dict__  # nothing is left of the attempt
    distlib.checkpoint_activations(model, "full", blocks=[nn.Linear])
    with pytest.warns(
        UserWarning, match=rf"'full' saves 0 bytes: 1 blocks would keep {x.nbytes} bytes and keep {x.nbytes}"
    ):
        model(x).sum().backward()


def test_saved_bytes_before_any_forward_and_with_example_inputs() -> None:
    model = nn.Sequential(Residual(), Residual())
    report = distlib.checkpoint_activations(model, "full")
    with pytest.raises(RuntimeError, match="example_inputs="):
        _ = report.saved_bytes
    report.remove()
    state = torch.get_rng_state()
    report = distlib.checkpoint_activations(model, "full", example_inputs=torch.randn(4, WIDTH))
    first = report.saved_bytes
    assert first > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(8, WIDTH)).sum().backward()
        assert report.saved_bytes == first
        report.refresh()
        model(torch.randn(8, WIDTH)).sum().backward()
    assert report.saved_bytes == 2 * first
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "half"}, r"policy='half': must be one of 'full'"),
        ({"policy": set()}, "empty set"),
        ({"policy": {aten.mm}}, "not an overload"),
        ({"policy": {aten.bernoulli.default}}, "draws random numbers"),
        ({"policy": "offload"}, "needs a folder"),
        ({"policy": "offload", "folder": ""}, "names no folder"),
        ({"policy": "offload", "folder": "/nowhere/at/all"}, "cannot be written there"),
        ({"policy": "offload", "folder": ".", "resident": 2}, "resident=2 of 2 blocks.*0 bytes"),
        ({"resident": 1}, "resident=1"),
        ({"window": "1MiB"}, "window='1MiB' has no effect"),
        ({"folder": "."}, "has no effect"),
        ({"loss": F.mse_loss}, "loss= is for measuring"),
        ({"blocks": "some"}, 'must be "auto" or'),
        ({"blocks": [Attention]}, "the module has no Attention"),
        ({"blocks": []}, "blocks is empty"),
        ({"budget": "2GiB"}, "needs example_inputs="),
        ({"budget": "many", "example_inputs": torch.zeros(1, WIDTH)}, "budget='many'"),
        ({"budget": 1.5, "example_inputs": torch.zeros(1, WIDTH)}, "part from 0.0 to 1.0"),
        ({"budget": "2GiB", "policy": "selective", "example_inputs": torch.zeros(1, WIDTH)}, "give only one"),
    ],
)
def test_options_that_cannot_take_effect_are_refused(options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(Residual(), Residual())
    with pytest.raises(ValueError, match=message):
        distlib.checkpoint_activations(model, **options)
    assert all("forward" not in block.__dict__ for block in model)


def test_modules_without_repeated_blocks_and_settings_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="no repeated blocks"):
        distlib.checkpoint_activations(Residual())
    model = AttentionModel()
    distlib.checkpoint_activations(model)
    with pytest.raises(ValueError, match=r"'blocks.0' has an activation setting already.*remove\(\)"):
        distlib.checkpoint_activations(model)
