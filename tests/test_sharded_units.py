"""The arithmetic of sharding, without processes: layouts, units, quantized blocks, bytes, partition sizes that fit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import distlib
from distlib.activations.blocks import find_blocks
from distlib.sharded import quantize
from distlib.sharded.groups import partition_of
from distlib.sharded.layout import LINE, Entry, lay_out
from distlib.sharded.options import MixedPrecision, Options, check, offloaded
from distlib.sharded.suggest import parse_bytes
from distlib.sharded.units import divide, places
from distlib.topology import Topology

SHAPES = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=12)


def entries_of(shapes: list[tuple[int, ...]]) -> list[Entry]:
    return [Entry(f"p{i}", torch.Size(shape)) for i, shape in enumerate(shapes)]


@given(SHAPES, st.integers(1, 9), st.integers(1, 4), st.sampled_from([1, 2, 4, 8]), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_element_is_in_exactly_one_piece(
    shapes: list[tuple[int, ...]], parts: int, subparts: int, itemsize: int, whole: bool
) -> None:
    subparts = 1 if whole else subparts
    layout = lay_out(entries_of(shapes), itemsize, parts, subparts, whole)
    owner = [0] * layout.numel
    seen = [[0] * math.prod(shape) for shape in shapes]
    for part in range(parts):
        assert layout.bounds(part)[0] == part * layout.part
        for subpart in range(subparts):
            begin, end = layout.bounds(part, subpart)
            assert begin * itemsize % LINE == 0 and end - begin == layout.subpart
            pieces = layout.pieces(begin, end)
            assert [piece.entry for piece in pieces] == list(range(len(shapes)))
            for piece in pieces:
                assert begin <= piece.where <= piece.where + piece.numel <= end or piece.numel == 0
                for k in range(piece.numel):
                    seen[piece.entry][piece.at + k] += 1
                    owner[piece.where + k] += 1
                    assert piece.where + k == layout.offsets[piece.entry] + piece.at + k
                if whole:
                    assert piece.numel in (0, math.prod(shapes[piece.entry]))
    assert all(count == 1 for counts in seen for count in counts)
    for begin, end in layout.gaps():
        assert owner[begin:end] == [0] * (end - begin)
        owner[begin:end] = [1] * (end - begin)
    assert owner == [1] * layout.numel


@given(SHAPES, st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_padding_is_less_than_a_line_per_parameter_and_part(shapes: list[tuple[int, ...]], parts: int) -> None:
    layout = lay_out(entries_of(shapes), 4, parts)
    step = LINE // 4
    assert layout.numel - sum(map(math.prod, shapes)) <= step * (len(shapes) + parts)
    assert all(offset % step == 0 for offset in layout.offsets)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_whole_parameters_are_dealt_evenly(sizes: list[int], parts: int) -> None:
    layout = lay_out(entries_of([(size,) for size in sizes]), 4, parts, whole=True)
    padded = [-(-size // 16) * 16 for size in sizes]
    best = max(max(padded), -(-sum(padded) // parts))
    assert layout.part <= best * 4 / 3 + 16 + max(padded) / 3  # longest first: at most 4/3 of the best


# ------------------------------------------------------------ units


class Leaf(nn.Module):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def names(module: nn.Module, how: object = "auto") -> list[str]:
    return [unit.name for unit in divide(module, how)]  # type: ignore[arg-type]


def model(*blocks: nn.Module) -> nn.Module:
    return nn.ModuleDict({"embed": Leaf(), "blocks": nn.ModuleList(blocks), "head": Leaf()})


def test_repeated_blocks_are_units_and_small_ones_are_joined() -> None:
    large = (1 << 20) // 4
    assert names(model(*(Leaf(large) for _ in range(3)))) == ["", "blocks.0", "blocks.1", "blocks.2"]
    assert names(model(*(Leaf(large // 2) for _ in range(5)))) == ["", "blocks.0", "blocks.2", "blocks.4"]
    assert names(model(Leaf(), Leaf())) == ["", "blocks.0"]
    assert names(model(Leaf())) == [""]  # nothing is repeated
    assert names(Leaf()) == [""]
    assert names(nn.Sequential(nn.ReLU(), nn.Tanh(), Leaf())) == [""]


def test_parametrized_blocks_are_repeated_ones() -> None:
    def normed(count: int = 1) -> nn.Module:
        return nn.utils.parametrizations.weight_norm(nn.Linear(count, count))

    assert names(model(*(normed() for _ in range(3)))) == ["", "blocks.0"]
    assert names(model(*(normed(600) for _ in range(2)))) == ["", "blocks.0", "blocks.1"]
    assert names(model(normed(), nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 1)))) == [""]


def test_containers_that_are_never_called_are_looked_into() -> None:
    large = (1 << 20) // 4
    lists = [nn.ModuleList(Leaf(large) for _ in range(2)) for _ in range(2)]
    assert names(model(*lists)) == ["", "blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1"]
    dicts = [nn.ModuleDict({"attend": Leaf(large), "mix": Leaf(large)}) for _ in range(2)]
    assert names(model(*dicts)) == ["", "blocks.0.attend", "blocks.0.mix", "blocks.1.attend", "blocks.1.mix"]
    small = [nn.ModuleList([Leaf()]), nn.ModuleList([Leaf(), Leaf()])]
    assert [len(unit.modules) for unit in divide(model(*small), "auto")] == [1, 3]  # joined across lists
    bare = [nn.ParameterList([torch.zeros(3)]) for _ in range(2)]
    assert names(model(*bare)) == [""]


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([Leaf(), Leaf()], "'blocks' is a ModuleList, which has no forward: .* such as Leaf"),
        ([nn.ParameterList([torch.zeros(3)])], "'blocks' is a ModuleList, which has no forward: .* around it"),
    ],
)
def test_units_that_cannot_be_called_are_refused(blocks: list[nn.Module], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        divide(model(*blocks), [nn.ModuleList])


def test_classes_are_units_and_do_not_nest() -> None:
    inner = nn.Sequential(Leaf(), Leaf())
    tree = nn.Sequential(inner, nn.Sequential(Leaf()), Leaf())
    assert names(tree, [Leaf]) == ["", "0.0", "0.1", "1.0", "2"]
    assert names(tree, [nn.Sequential]) == ["", "0", "1"]
    shared = Leaf()
    assert names(nn.ModuleList([shared, shared, Leaf()]), [Leaf]) == ["", "0", "2"]


def test_tied_parameters_of_several_units_belong_to_the_root() -> None:
    blocks = [Leaf(), Leaf(), Leaf()]
    blocks[2].weight = blocks[0].weight
    units = divide(model(*blocks), [Leaf])
    assert {unit.name: len(unit.parameters) for unit in units} == {"": 1, "embed": 1, "blocks.1": 1, "head": 1}


@given(st.recursive(st.integers(0, 40), lambda kids: st.lists(kids, min_size=1, max_size=4), max_leaves=12))
@settings(max_examples=60, deadline=None)
def test_every_parameter_is_in_exactly_one_unit(tree: object) -> None:
    def build(node: object) -> nn.Module:
        return nn.ModuleList(map(build, node)) if isinstance(node, list) else Leaf(node)  # type: ignore[arg-type]

    module = build(tree)
    for how in ("auto", [Leaf]):
        found = [p for unit in divide(module, how) for p in unit.parameters]
        assert len(found) == len(set(found)) == len(places(module))


@pytest.mark.parametrize(
    ("how", "said"),
    [("blocks", "must be"), ([int], "not a class of modules"), ([nn.LSTM], "the module has no LSTM")],
)
def test_unknown_units_are_refused(how: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        divide(model(Leaf(), Leaf()), how)  # type: ignore[arg-type]


# ------------------------------------------------------------ partition groups


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_partition_groups_are_neighbours_and_cover_all_ranks(sizes: list[int]) -> None:
    ranks = iter(range(sum(sizes)))
    topology = Topology(tuple(tuple(next(ranks) for _ in range(size)) for size in sizes))
    n = sum(sizes)
    for p in range(1, n + 1):
        if n % p:
            with pytest.raises(ValueError, match="does not divide"):
                partition_of(topology, p)
            continue
        groups = partition_of(topology, p)
        assert sorted(r for group in groups for r in group) == list(range(n))
        assert {len(group) for group in groups} == {p}
    if len(set(sizes)) == 1:
        assert partition_of(topology, "node") == list(topology.nodes)
    else:
        with pytest.raises(ValueError, match="partition groups must be equal"):
            partition_of(topology, "node")


@pytest.mark.parametrize("size", [0, -1, 3, 8, "host", 2.0, True])
def test_bad_partition_sizes_are_refused(size: object) -> None:
    with pytest.raises(ValueError, match="partition_size"):
        partition_of(Topology(((0, 1, 2, 3),)), size)  # type: ignore[arg-type]


# ------------------------------------------------------------ quantized blocks


@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), min_size=1, max_size=600),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(max_examples=100, deadline=None)
def test_an_element_is_off_by_at_most_a_254th_of_its_blocks_largest(raw: list[float], dtype: torch.dtype) -> None:
    values = torch.tensor(raw, dtype=dtype)
    packed = quantize.pack(values)
    assert packed.dtype is torch.uint8 and packed.numel() == quantize.packed_bytes(values.numel())
    out = torch.empty(len(raw), dtype=torch.float32)
    quantize.unpack(packed, out)
    for begin in range(0, len(raw), quantize.BLOCK):
        block = values[begin : begin + quantize.BLOCK].double()
        largest = float(block.abs().max())
        error = float((out[begin : begin + quantize.BLOCK].double() - block).abs().max())
        assert error <= largest / 254 * (1 + 1e-5) + 1e-37


def test_quantized_nonsense_stays_nonsense() -> None:
    for bad in (math.nan, math.inf):
        values = torch.ones(300)
        values[3] = bad
        out = torch.empty(300)
        quantize.unpack(quantize.pack(values), out)
        assert not out[:256].isfinite().any() or not out[3].isfinite()
        assert out[256:].eq(1).all()


# ------------------------------------------------------------ options


def options(**chosen: object) -> Options:
    base = {
        "stage": 3,
        "mixed_precision": MixedPrecision(),
        "reshard_after_forward": True,
        "hierarchical": "auto",
        "prefetch": 2,
        "offload": None,
        "shard_optimizer": "partition",
        "gather_dtype": None,
        "ownership": "flat",
    }
    return Options(**{**base, **chosen})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"stage": 0}, "stage=0"),
        ({"stage": "3"}, "stage='3'"),
        ({"hierarchical": "yes"}, "hierarchical='yes'"),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"prefetch": True}, "prefetch=True"),
        ({"shard_optimizer": "all"}, "shard_optimizer='all'"),
        ({"ownership": "mine"}, "ownership='mine'"),
        ({"gather_dtype": torch.bfloat16}, "gather_dtype=torch.bfloat16"),
        ({"ownership": "whole"}, "needs stage=1"),
        ({"ownership": "whole", "stage": 1, "shard_optimizer": "world"}, "cannot be combined"),
        ({"stage": 2, "reshard_after_forward": False}, "reshard_after_forward"),
        ({"stage": 1, "gather_dtype": torch.int8}, "gather_dtype"),
    ],
)
def test_choices_that_cannot_take_effect_are_refused(chosen: dict[str, object], said: str) -> None:
    check(options())
    with pytest.raises(ValueError, match=said):
        check(options(**chosen))


def test_offload_to_the_cpu_is_refused_on_the_cpu() -> None:
    with pytest.raises(ValueError, match="on the CPU"):
        offloaded("cpu", torch.device("cpu"))
    assert offloaded(None, torch.device("cpu")) == (None, False)
    assert offloaded("cpu", torch.device("cuda")) == (None, True)
    assert offloaded("/nvme", torch.device("cuda")) == (Path("/nvme"), True)
    assert offloaded("/nvme", torch.device("cpu")) == (Path("/nvme"), False)


def test_mixed_precision_takes_floating_point_only() -> None:
    with pytest.raises(ValueError, match=r"reduce=torch\.int32"):
        MixedPrecision(torch.bfloat16, torch.int32)


# ------------------------------------------------------------ partition sizes that fit


def plain_model() -> nn.Module:
    """1 M parameters in four equal blocks, and 1,000 frozen ones."""
    blocks = nn.ModuleList(Leaf(250_000) for _ in range(4))
    return nn.ModuleDict({"blocks": blocks, "fixed": Leaf(1000).requires_grad_(False)})


def test_the_smallest_partition_that_fits() -> None:
    buffers = 4000 + 2 * 2_000_000 + 2 * 2_000_000  # the root, two units of two blocks, gradients of two units
    for p in (2, 4, 8):
        need = (16_000_000 + 4000) // p + buffers
        found = distlib.suggest_partition(plain_model(), 8, need + 8, verbose=False)
        assert int(found) == found.partition_size == p
        assert [c.partition_size for c in found.candidates] == [1, 2, 4, 8]
        mine = next(c for c in found.candidates if c.partition_size == p)
        assert abs(mine.total - need) <= 8 and mine.fits
        assert f"smallest that fits: partition_size={p}" in str(found)
        more = distlib.suggest_partition(plain_model(), 8, 10**9, activations=10**9 - need - 8, verbose=False)
        assert more.partition_size == p


def test_a_model_that_fits_nowhere_says_the_arithmetic() -> None:
    with pytest.raises(ValueError, match="fits on no partition of 4 ranks") as caught:
        distlib.suggest_partition(plain_model(), 4, "1 MB")
    assert "1,000,000 trained parameters" in str(caught.value) and str(caught.value).count(" no") >= 3


def test_the_arithmetic_is_printed_on_rank_0(capsys: pytest.CaptureFixture[str]) -> None:
    distlib.suggest_partition(plain_model(), 2, "1GiB")
    assert "partition_size=1" in capsys.readouterr().out


def test_meta_models_and_half_precision() -> None:
    with torch.device("meta"):
        module = plain_model()
    mixed = MixedPrecision(param=torch.bfloat16)
    found = distlib.suggest_partition(module, 4, 10**9, mixed_precision=mixed, stage=1, verbose=False)
    third = found.candidates[2]
    assert third.bytes["parameters"] == 2 * 1_001_000 and third.bytes["gradients"] == 4_000_000
    assert third.bytes["optimizer"] == 12 * 1_000_000 // 4


@pytest.mark.parametrize(
    ("text", "count"),
    [("80GiB", 80 << 30), ("512 MB", 512 * 10**6), ("1.5k", 1500), (7, 7), ("16", 16), ("2 tib", 2 << 40)],
)
def test_memory_in_words(text: object, count: int) -> None:
    assert parse_bytes(text) == count  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "GiB", "1..5k", "12 apples", "-3", 0, -5, "1e9", True, math.nan, math.inf, "."])
def test_nonsense_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="memory"):
        parse_bytes(text)  # type: ignore[arg-type]


def test_blocks_that_keep_less_are_called_too() -> None:
    lists = nn.ModuleList(nn.ModuleList([Leaf()]) for _ in range(3))
    assert list(find_blocks(nn.ModuleDict({"lists": lists}), "auto")) == ["lists.0.0", "lists.1.0", "lists.2.0"]


def test_a_sequential_of_layers_is_one_block_and_a_stage_of_blocks_is_not() -> None:
    def layers() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))

    models = {
        "layers": (nn.ModuleList(layers() for _ in range(2)), ["layers.0", "layers.1"]),
        "stages": (nn.ModuleList(nn.Sequential(layers(), layers()) for _ in range(2)), ["0.0", "0.1", "1.0", "1.1"]),
        "flat": (nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), ["0", "2"]),
    }
    for name, (model, expected) in models.items():
        names = [f"{name}.{inner.removeprefix('layers.')}" for inner in expected]
        assert list(find_blocks(nn.ModuleDict({name: model}), "auto")) == names
