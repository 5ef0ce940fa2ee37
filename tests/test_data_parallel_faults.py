"""DataParallel when something is wrong: unused, frozen, sparse, different on ranks, a backward that raises.

Every rank hears of it, by name, in the very backward, and where the ranks still agree the group stays usable.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from ranks import process_group, run_ranks, run_ranks_raw
from test_data_parallel import SMALL, assert_same, average_alone, gradients, loss_of, tiny, wrapped
from torch import nn
from torch.utils.checkpoint import checkpoint

from distlib.data_parallel import DataParallel


class Branches(nn.Module):
    """`trunk`, then the branches that the caller names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(5, 5)
        self.a, self.b, self.c = (nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: torch.Tensor, names: str) -> torch.Tensor:
        x = self.trunk(x)
        for name in names:
            x = getattr(self, name)(x).tanh()
        return x


def run(model: nn.Module, rank: int, names: str) -> None:
    model(torch.full((2, 5), rank + 1.0), names).square().sum().backward()


def one_bucket_each(rank: int, n: int, **options: Any) -> Any:
    return wrapped(rank, n, Branches(), bucket_mb=0.0001, **options)


# ------------------------------------------------------------ unused parameters


def _unused_is_an_error(rank: int, n: int, names: list[str], set_to_none: bool) -> str:
    with one_bucket_each(rank, n) as model:
        run(model, rank, "abc")
        for _ in range(2):
            model.zero_grad(set_to_none=set_to_none)
            with pytest.raises(RuntimeError) as caught:
                run(model, rank, names[rank])
        model.zero_grad(set_to_none=set_to_none)
        run(model, rank, "abc")  # the group is as good as before
        assert_same(gradients(model), average_alone(Branches(), n, lambda m, r: run(m, r, "abc")), rtol=1e-5)
    return str(caught.value)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["ab"], "c.weight, c.bias (on rank 0)"),
        (["ab", "ab"], "c.weight, c.bias (on all ranks)"),
        (["ab", "abc"], "c.weight, c.bias (on rank 0)"),
        (["abc", "c", "c"], "a.weight, a.bias, b.weight, b.bias (on ranks 1-2)"),
    ],
)
def test_an_unused_parameter_raises_on_all_ranks_by_name(names: list[str], said: str, set_to_none: bool) -> None:
    messages = run_ranks(len(names), _unused_is_an_error, names, set_to_none)
    assert all(said in message and "find_unused_parameters=True" in message for message in messages), messages


def _unused_counts_as_zeros(rank: int, n: int, plan: list[list[str]], options: dict[str, Any]) -> None:
    with one_bucket_each(rank, n, find_unused_parameters=True, **options) as model:
        for names in plan:
            want = average_alone(Branches(), n, lambda m, r, names=names: run(m, r, names[r]))
            model.zero_grad()
            run(model, rank, names[rank])
            assert_same(gradients(model), want, rtol=1e-2 if options else 1e-5, atol=1e-3 if options else 1e-8)


@pytest.mark.parametrize("options", [{}, {"gradient_dtype": torch.bfloat16}])
@pytest.mark.parametrize(
    "plan",
    [
        [["a"], ["b"], ["abc"]],
        [["ab", "bc"], ["a", "a"], ["abc", "c"], ["c", "ab"]],
        [["a", "b", "c"], ["b", "b", ""], ["", "", ""], ["abc", "abc", "abc"]],
    ],
)
def test_unused_parameters_count_as_zeros_and_stay_none_where_nobody_used_them(
    plan: list[list[str]], options: dict[str, Any]
) -> None:
    run_ranks(len(plan[0]), _unused_counts_as_zeros, plan, options)


def _unused_in_last_micro_step(rank: int, n: int) -> None:
    """A parameter used in a micro-step under no_sync, not in the averaged one, is averaged all the same."""

    def both(model: nn.Module, r: int) -> None:
        run(model, r, "abc" if r == 0 else "ab")
        run(model, r, "ab")

    want = average_alone(Branches(), n, both)
    with one_bucket_each(rank, n, find_unused_parameters=True) as model:
        for _ in range(2):
            model.zero_grad()
            with model.no_sync():
                run(model, rank, "abc" if rank == 0 else "ab")
            run(model, rank, "ab")
            assert_same(gradients(model), want, rtol=1e-5)


def test_gradients_of_earlier_micro_steps_are_not_lost() -> None:
    run_ranks(2, _unused_in_last_micro_step)


def _static(rank: int, n: int, names: list[str]) -> str:
    want = average_alone(Branches(), n, lambda m, r: run(m, r, names[r]))
    with one_bucket_each(rank, n, static_graph=True) as model:
        for _ in range(3):
            model.zero_grad()
            run(model, rank, names[rank])
            assert_same(gradients(model), want, rtol=1e-5)
        with model.no_sync():
            run(model, rank, names[rank])
        run(model, rank, names[rank])
        if n > 1:  # who is never used is not communicated
            laid = {model._reducer._report._names[i][0] for i in model._reducer._memory.layout.order}
            assert laid == set("".join(names)) | {"t"}
        model.zero_grad()
        with pytest.raises(RuntimeError, match="static_graph") as caught:
            run(model, rank, "c")
        model.zero_grad()
        run(model, rank, names[rank])
        assert_same(gradients(model), want, rtol=1e-5)
    return str(caught.value)


@pytest.mark.parametrize("names", [["ab"], ["ab", "ab"], ["a", "b"], ["ab", "a", "ab"]])
def test_a_static_graph_is_learnt_and_then_insisted_on(names: list[str]) -> None:
    for message in run_ranks(len(names), _static, names):
        assert "c.weight" in message and "static_graph=False" in message


class Shared(nn.Module):
    """One layer within two re-entrant checkpoints: its gradient lands twice."""

    def __init__(self, shared_is_last: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared_is_last = shared_is_last
        self.plain, self.shared = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.plain(x) if self.shared_is_last else x
        for _ in range(2):
            x = checkpoint(self.shared, x, use_reentrant=True)
        return x if self.shared_is_last else self.plain(x)


def _lands_twice(rank: int, n: int, shared_is_last: bool) -> str:
    def twice(model: nn.Module, r: int) -> None:
        x = torch.full((2, 4), r + 1.0, requires_grad=True)
        model(x).square().sum().backward()

    want = average_alone(Shared(shared_is_last), n, twice)
    with process_group(rank, n):
        model = DataParallel(Shared(shared_is_last), bucket_mb=0.0001)
        with pytest.raises(RuntimeError, match="more often than once") as caught:
            twice(model, rank)
        del model
        model = DataParallel(Shared(shared_is_last), bucket_mb=0.0001, static_graph=True)
        for _ in range(3):
            model.zero_grad()
            twice(model, rank)
            assert_same(gradients(model), want, rtol=1e-5)
    return str(caught.value)


@pytest.mark.parametrize("shared_is_last", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_a_gradient_that_lands_twice_is_refused_or_learnt(n: int, shared_is_last: bool) -> None:
    for message in run_ranks(n, _lands_twice, shared_is_last):
        assert "shared.weight" in message and "use_reentrant=False" in message and "static_graph=True" in message


# ------------------------------------------------------------ changes after wrapping


def _changes(rank: int, n: int) -> None:
    with wrapped(rank, n) as model:
        loss_of(model, rank).backward()
        model.up.weight.requires_grad_(False)
        with pytest.raises(RuntimeError, match=r"'up.weight' was frozen .* after wrapping"):
            loss_of(model, rank)
        with torch.no_grad():
            loss_of(model, rank)
        model.up.weight.requires_grad_(True)

        model.fixed.weight.requires_grad_(True)
        with pytest.raises(RuntimeError, match=r"'fixed.weight' was frozen when it was wrapped"):
            loss_of(model, rank)
        model.fixed.weight.requires_grad_(False)

        old = model.down.bias
        model.module.down.bias = nn.Parameter(torch.zeros_like(old))
        with pytest.raises(RuntimeError, match=r"'down.bias' was replaced"):
            loss_of(model, rank)
        model.module.down.bias = old

        model.to("cpu").float()  # changes nothing
        model.zero_grad()
        loss_of(model, rank).backward()
        assert_same(gradients(model), average_alone(tiny(), n, lambda m, r: loss_of(m, r).backward()))
        with pytest.raises(RuntimeError, match=r"changed from torch.float32 .* before wrapping"):
            model.half()


def _wrapped_twice(rank: int, n: int) -> None:
    with wrapped(rank, n) as model:
        with pytest.raises(ValueError, match=r"'0' is wrapped in DataParallel already"):
            DataParallel(nn.Sequential(model))


def test_a_module_is_wrapped_once() -> None:
    run_ranks(1, _wrapped_twice)


def test_what_changes_after_wrapping_is_refused_by_name() -> None:
    run_ranks(2, _changes)


def _frozen_while_unused_is_allowed(rank: int, n: int) -> None:
    with one_bucket_each(rank, n, find_unused_parameters=True) as model:
        run(model, rank, "abc")
        model.a.requires_grad_(False)
        model.zero_grad()
        run(model, rank, "abc")
        assert model.a.weight.grad is None and model.b.weight.grad is not None
        model.a.requires_grad_(True)
        model.zero_grad()
        run(model, rank, "abc")
        assert_same(gradients(model), average_alone(Branches(), n, lambda m, r: run(m, r, "abc")), rtol=1e-5)


def test_parameters_may_be_frozen_for_a_while_with_find_unused() -> None:
    run_ranks(2, _frozen_while_unused_is_allowed)


def _taken(rank: int, n: int) -> None:
    module = tiny()
    module.up.bias.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with wrapped(rank, n, module) as model:
        with pytest.raises(RuntimeError, match=r"another hook.*: up.bias"):
            loss_of(model, rank).backward()


def test_a_gradient_taken_away_by_another_hook_is_named() -> None:
    run_ranks(2, _taken)


# ------------------------------------------------------------ what cannot be wrapped


def test_options_that_make_no_sense_are_refused() -> None:
    for options, message in [
        ({"bucket_mb": 0}, "bucket_mb"),
        ({"bucket_mb": float("nan")}, "bucket_mb"),
        ({"bucket_mb": "25"}, "bucket_mb must be a positive number of MiB, got '25'"),
        ({"gradient_dtype": torch.float64}, "gradient_dtype"),
        ({"gradient_dtype": "bf16"}, r"gradient_dtype must be torch\.float16 or torch\.bfloat16, got 'bf16'"),
        ({"gradient_dtype": torch.float16, "comm_hook": print}, "choose one"),
        ({"find_unused_parameters": True, "static_graph": True}, "choose one"),
        ({"comm_hook": 3}, "callable"),
    ]:
        with pytest.raises(ValueError, match=message):
            DataParallel(tiny(), **options)


def test_modules_that_cannot_be_wrapped_are_refused_by_name() -> None:
    sparse = nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 2, sparse=True))
    two_devices = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    complex_ = nn.Linear(2, 2, dtype=torch.complex64)
    for module, options, message in [
        (sparse, {}, r"'1.weight'.*sparse=False"),
        (nn.Linear, {}, r"module=<class .*Linear'> must be a torch\.nn\.Module; make one: Linear\(\.\.\.\)"),
        ([nn.Linear(2, 2)], {}, r"must be a torch\.nn\.Module; of several, make one: torch\.nn\.Sequential\(\.\.\.\)"),
        (nn.LazyLinear(3), {}, r"'weight'.*lazy"),
        (two_devices, {}, r"'1.weight'.*meta"),
        (complex_, {"gradient_dtype": torch.float16}, r"'weight' is complex"),
    ]:
        with pytest.raises(ValueError, match=message):
            DataParallel(module, **options)


class SparseOnTheWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Parameter(torch.ones(5, 3)), nn.Linear(3, 1)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.out(nn.functional.embedding(index, self.table, sparse=True))


def _sparse(rank: int, n: int) -> None:
    with wrapped(rank, n, SparseOnTheWay()) as model:
        with pytest.raises(RuntimeError, match=r"sparse gradients.*: table"):
            model(torch.tensor([1, 2])).sum().backward()


@pytest.mark.parametrize("n", [1, 2])
def test_sparse_gradients_are_refused_by_name(n: int) -> None:
    run_ranks(n, _sparse)


def _differs(rank: int, n: int, how: str) -> str:
    module, options = tiny(), {"bucket_mb": SMALL}
    if rank == 1:
        if how == "shape":
            module.up = nn.Linear(24, 50)
        elif how == "dtype":
            module.norm.double()
        elif how == "name":
            module.extra = nn.Linear(2, 2)
        elif how == "frozen":
            module.down.bias.requires_grad_(False)
        elif how == "buffer":
            module.scale = torch.ones(3)
        else:
            options["bucket_mb"] = 7.0
    with process_group(rank, n):
        with pytest.raises(RuntimeError) as caught:
            DataParallel(module, **options)
        DataParallel(tiny())  # the group is as good as before
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("shape", r"up.weight: shape (48, 24), strides (24, 1), float32 on ranks 0, 2; shape (50, 24)"),
        ("dtype", "norm.weight: shape (24,), strides (1,), float32 on ranks 0, 2;"),
        ("name", "extra.bias: absent on ranks 0, 2; shape (2,), strides (1,), float32 on rank 1"),
        ("frozen", "down.bias: shape (24,), strides (1,), float32 on ranks 0, 2;"),
        ("buffer", "buffer scale: shape (24,), float32 on ranks 0, 2; shape (3,), float32 on rank 1"),
        ("option", "option bucket_mb: 0.002 on ranks 0, 2; 7.0 on rank 1"),
    ],
)
def test_ranks_that_differ_are_named_on_all_ranks(how: str, said: str) -> None:
    messages = run_ranks(3, _differs, how)
    assert all(said in message for message in messages), messages[0]


# ------------------------------------------------------------ a backward that raises


class Fuse(torch.autograd.Function):
    """Identity; its backward raises where `blow` says so."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, blow: bool) -> torch.Tensor:
        ctx.blow = blow
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.blow:
            raise ArithmeticError("the fuse has blown")
        return g, None


class Fused(nn.Module):
    """Two layers with a fuse before (`where=0`) or after the last of them in backward order, (`where=1`)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.low, self.high = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor, blow: bool, early: bool) -> torch.Tensor:
        x = self.low(x)
        if not early:
            x = Fuse.apply(x, blow)
        bias = self.high.bias if not early else Fuse.apply(self.high.bias, blow)
        return nn.functional.linear(x, self.high.weight, bias)


def fused(model: nn.Module, rank: int, blow: bool = False, early: bool = False) -> None:
    model(torch.full((2, 5), rank + 1.0), blow, early).square().sum().backward()


def _raises_after_a_bucket(rank: int, n: int) -> str:
    with wrapped(rank, n, Fused(), bucket_mb=0.0001) as model:
        fused(model, rank)
        begin = time.monotonic()
        if rank == 1:
            with pytest.raises(ArithmeticError):
                fused(model, rank, blow=True)
        with pytest.raises(RuntimeError) as caught:
            fused(model, rank)
        assert time.monotonic() - begin < 10
        raise caught.value


def test_a_backward_that_raises_on_one_rank_ends_the_others_at_once() -> None:
    outcomes = run_ranks_raw(3, _raises_after_a_bucket, timeout=25)
    for outcome in outcomes:
        assert outcome.kind == "exception"
        assert "rank 1: backward stopped with an exception after" in outcome.text, outcome.text


def _raises_before_a_bucket(rank: int, n: int, everywhere: bool) -> str:
    want = average_alone(Fused(), n, lambda m, r: fused(m, r))
    message = ""
    with wrapped(rank, n, Fused()) as model:  # one bucket
        fused(model, rank)
        if everywhere or rank == 1:
            with pytest.raises(ArithmeticError):
                fused(model, rank, blow=True)
        model.zero_grad()
        if not everywhere:
            with pytest.raises(RuntimeError, match="raised on rank 1 alone") as caught:
                fused(model, rank)
            message = str(caught.value)
        model.zero_grad()
        fused(model, rank)
        assert_same(gradients(model), want, rtol=1e-5)
    return message


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_backward_that_raises_before_the_first_bucket_can_be_skipped_by_all_but_not_by_one(
    everywhere: bool,
) -> None:
    run_ranks(2, _raises_before_a_bucket, everywhere)
