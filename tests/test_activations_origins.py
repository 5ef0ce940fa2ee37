"""Selective recomputation gives back the result of the same call only: a forward may do more than its recomputation,
and then the n-th call of an operation is another."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from activation_models import WIDTH, Values, same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import distlib

aten = torch.ops.aten
X = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
pytestmark = [
    pytest.mark.filterwarnings("ignore:the activation setting"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support"),
]


class Fills(nn.Module):
    """Computes `extra` in the forward, and not again in the recomputation: it is found in a dict then."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "extra" not in self.cache:
            with torch.no_grad():
                self.cache["extra"] = self.extra(x)
        h = self.product(x)
        return (x + h * h.tanh() + 0 * self.cache["extra"]).float()

    def extra(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        return self.linear(x)


class OtherNumber(Fills):
    """hash(-1) == hash(-2)."""

    def extra(self, x: Tensor) -> Tensor:
        return x.softmax(-1) @ self.linear.weight

    def product(self, x: Tensor) -> Tensor:
        return x.softmax(-2) @ self.linear.weight


class OtherConstant(Fills):
    """Tensors that hang as plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH, WIDTH)

    def extra(self, x: Tensor) -> Tensor:
        return self.first @ self.first

    def product(self, x: Tensor) -> Tensor:
        return self.second @ self.second + self.linear(x)


class OtherCast(Fills):
    """Of two parameters in half precision; by hand, or by autocast."""

    def extra(self, x: Tensor) -> Tensor:
        return x.bfloat16() @ self.other.weight.bfloat16()

    def product(self, x: Tensor) -> Tensor:
        return x.bfloat16() @ self.linear.weight.bfloat16()


class OtherAutocast(Fills):
    def __init__(self) -> None:
        super().__init__()
        self.other.requires_grad_(False)  # autocast casts it each time

    def extra(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.other(x)

    def product(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.linear(x)


class OtherSparse(Fills):
    """Sparse matrices of one shape."""

    def __init__(self) -> None:
        super().__init__()
        eye = torch.eye(WIDTH)
        self.first, self.second = (2 * eye).to_sparse(), (3 * eye).to_sparse()

    def extra(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.first, x) @ self.linear.weight

    def product(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.second, x) @ self.linear.weight


class OtherRows(OtherSparse):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.first.to_sparse_csr(), self.second.to_sparse_csr()


class OtherNested(OtherSparse):
    """Jagged tensors of one shape."""

    def __init__(self) -> None:
        super().__init__()
        rows = torch.randn(2, WIDTH, WIDTH)
        offsets = torch.tensor([0, WIDTH // 2, WIDTH])
        self.first, self.second = (torch.nested.nested_tensor_from_jagged(r, offsets) for r in rows)

    def extra(self, x: Tensor) -> Tensor:
        return self.first.sin().values() @ self.linear.weight

    def product(self, x: Tensor) -> Tensor:
        return self.second.sin().values() @ self.linear.weight


def steps(model: nn.Module, n: int = 2) -> Values:
    found = []
    for _ in range(n):
        model.zero_grad()
        for block in model:
            block.cache.clear()
        loss = model(X).square().mean()
        loss.backward()
        found += [loss.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]
    return found


def both(make: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(make(), make()))
    distlib.checkpoint_activations(models[1], "selective")
    return models[0], models[1]


@pytest.mark.parametrize(
    "block",
    [OtherNumber, OtherConstant, OtherCast, OtherAutocast, OtherSparse, OtherRows, OtherNested],
)
def test_a_product_of_something_else_is_not_given_back(block: type[nn.Module]) -> None:
    plain, treated = both(block)
    assert same(steps(plain), steps(treated))


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def products(model: nn.Module, made_of: Tensor) -> int:
    with Products() as count:
        model(made_of).square().mean().backward()
    return count.calls[aten.mm.default] + count.calls[aten.addmm.default]


class Scaled(nn.Module):
    """Makes its constants each time anew."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.tensor([0.5, 2.0]).sum()
        return x + self.down((self.up(x * scale) * torch.tensor(0.1)).tanh())


class Adjacent(nn.Module):
    """Multiplies with a sparse matrix that hangs as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.edges = torch.eye(WIDTH).to_sparse()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(torch.sparse.mm(self.edges, x)).tanh())


@pytest.mark.parametrize("block", [Scaled, Adjacent])
def test_products_of_constants_are_given_back(block: type[nn.Module]) -> None:
    plain, treated = both(block)
    for _ in range(2):
        assert products(plain, X) == products(treated, X)


# ---------------------------------------------------------------- derivatives within a block


class Energy(nn.Module):
    """Its output is the derivative of what it computes."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.linear, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            place = x.detach().requires_grad_()
            energy = self.linear(place).tanh().sum()
            late = self.down(x)
            (force,) = torch.autograd.grad(energy, place, create_graph=True)
        return x + late.tanh() * self.down(force)


@pytest.mark.parametrize("width", [16, WIDTH])
@pytest.mark.parametrize("policy", ["selective", "full"])
def test_a_derivative_within_a_block(policy: str, width: int) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(*[Energy(width) for _ in range(2)])
    treated = copy.deepcopy(plain)
    distlib.checkpoint_activations(treated, policy)
    x = torch.randn(8, width)
    for _ in range(3):
        values = []
        for model in (plain, treated):
            model.zero_grad()
            model(x).square().mean().backward()
            values.append([p.grad for p in model.parameters()])
        assert same(*values)


def test_the_recomputation_for_a_derivative_within_a_block_teaches_nothing() -> None:
    """It does not come as far as `late`, of which backward needs the result."""
    _, treated = both(Energy)
    loss = treated(X).square().mean()
    assert [block.forward._wasted for block in treated] == [set(), set()]
    loss.backward()
