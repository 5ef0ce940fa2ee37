"""Kernels of csrc/cuda on one GPU: against copies that move as many bytes, and against torch's operators.

    python benchmarks/gpu_kernels.py [--quick] [--record]

Times are of the GPU, between two events: the GPU is kept busy while the host queues, so nobody's host counts. Variants
take turns; where all of the memory that they touch might stay in the L2 cache, other memory is read in between. A copy
reads half of the bytes of what it is compared with and writes the other half. Sizes shrink with the card's memory.
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import report
import torch
from gpu_report import Check, GpuReport
from report import Bar, Row

from distlib.cuda import blocks, library
from distlib.cuda.bucket import PackTable
from distlib.cuda.squares import SquareTable
from distlib.cuda.step import DeviceTable, Recipe, Scalars, join_master, prepare_plainly, step_plainly

OURS, COPY, FOREACH, FUSED, PLAIN = "distlib", "copy", "torch _foreach", "torch fused", "torch"
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
RECIPE = Recipe("ADAMW", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2)

# Bytes that a step must move for each parameter: parameter, two moments, gradient, copy or remainder.
STEP_BYTES = {
    "fp32 gradients": 2 * 4 + 2 * 8 + 4,
    "bf16 gradients in, bf16 parameters out": 2 * 4 + 2 * 8 + 2 + 2,
    "bf16 parameters and remainders": 2 * 2 + 2 * 8 + 2 + 2 * 2,
}


@dataclass(frozen=True)
class Sizes:
    """Elements of a bucket, tensors that it is packed from, parameters of an AdamW step."""

    bucket: int
    tensors: int
    parameters: int


@dataclass
class Case:
    """What is timed in turns, the bytes that each of them is rated by, and the bars."""

    what: str
    bytes: int
    variants: dict[str, Callable[[], object]]
    bars: list[Bar]
    check: Callable[[], bool] = field(default=lambda: True)  # after one call of ours: is the result right?


def sizes_for(free: int, quick: bool) -> Sizes:
    """For so many bytes of free memory on the card. Pure."""
    bucket, parameters = (1 << 25, 100_000_000) if quick else (1 << 28, 1_000_000_000)
    usable = free * 4 // 5
    # Bytes that a case holds at most, for an element. Of a bucket: tensors and buffer of both contenders, a copy's two
    # ends, and what quantization in torch takes meanwhile. Of a step: a copy's two ends (28), parameters and gradients,
    # also cast (12), moments of both contenders (16).
    return Sizes(min(bucket, usable // 40), 400, min(parameters, usable // 60))


def tensor_sizes(total: int, count: int) -> list[int]:
    """`count` sizes that sum to `total`: the tensors of transformer blocks, large ones and biases. Pure."""
    if total < count:
        raise ValueError(f"{total} elements cannot be {count} tensors")
    of_a_block = (3.0, 0.003, 1.0, 0.001, 4.0, 0.004, 4.0, 0.001, 0.001, 0.001, 0.001, 0.001)
    weights = [of_a_block[i % len(of_a_block)] for i in range(count)]
    unit = (total - count) / sum(weights)
    sizes = [1 + int(weight * unit) for weight in weights]
    sizes[0] += total - sum(sizes)
    return sizes


# ---------------------------------------------------------------- cases


def copy_of(bytes: int, device: torch.device) -> Callable[[], object]:
    """A copy that reads and writes `bytes` together."""
    source = torch.ones(max(1, bytes // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def pack_with_norm(device: torch.device, sizes: Sizes) -> Case:
    tensors = [torch.randn(n, device=device) for n in tensor_sizes(sizes.bucket, sizes.tensors)]
    flat, theirs = (torch.empty(sizes.bucket, dtype=BF16, device=device) for _ in range(2))
    squares, found = torch.zeros(1, dtype=F64, device=device), torch.zeros(1, device=device)
    table, one = PackTable(tensors, flat), torch.ones(1, device=device)
    views = list(theirs.split([t.numel() for t in tensors]))

    def by_foreach() -> torch.Tensor:
        # Unscaled in place, with a factor of 1 so that every round has the same numbers.
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, one)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
        torch._foreach_copy_(views, tensors)
        return norm

    def check() -> bool:
        norm = by_foreach()
        return torch.equal(flat, theirs) and abs(float(squares) ** 0.5 / float(norm) - 1) < 1e-2

    bytes = sizes.bucket * 6
    return Case(
        "pack fp32 to bf16: scale, infinities, norm",
        bytes,
        {
            OURS: lambda: table.pack(device_scale=one, squares=squares, found_inf=found),
            FOREACH: by_foreach,
            COPY: copy_of(bytes, device),
        },
        [Bar(COPY, OURS, at_least=0.88), Bar(FOREACH, OURS, at_least=2.0)],
        check,
    )


def move_plainly(way: str, dtype: torch.dtype) -> Callable[[torch.device, Sizes], Case]:
    """pack or unpack of fp32 tensors, with a buffer of `dtype`."""

    def make(device: torch.device, sizes: Sizes) -> Case:
        counts = tensor_sizes(sizes.bucket, sizes.tensors)
        tensors, theirs = ([torch.randn(n, device=device) for n in counts] for _ in range(2))
        flat = torch.randn(sizes.bucket, device=device).to(dtype)
        other = torch.empty_like(flat) if way == "pack" else flat
        table, views = PackTable(tensors, flat), list(other.split(counts))
        bytes = sizes.bucket * (4 + dtype.itemsize)
        variants: dict[str, Callable[[], object]]
        if way == "pack":
            variants = {OURS: table.pack, FOREACH: lambda: torch._foreach_copy_(views, tensors)}
        else:
            variants = {OURS: table.unpack, FOREACH: lambda: torch._foreach_copy_(theirs, views)}

        def check() -> bool:
            variants[FOREACH]()
            if way == "pack":
                return torch.equal(flat, other)
            return all(torch.equal(a, b) for a, b in zip(tensors, theirs, strict=True))

        bars = [Bar(COPY, OURS, at_least=0.9), Bar(FOREACH, OURS, at_least=1.1)]
        name = str(dtype).removeprefix("torch.")
        return Case(f"{way} fp32, buffer {name}", bytes, {**variants, COPY: copy_of(bytes, device)}, bars, check)

    return make


def step(kind: str) -> Callable[[torch.device, Sizes], Case]:
    """One of STEP_BYTES, on flat memory."""

    def make(device: torch.device, sizes: Sizes) -> Case:
        n = sizes.parameters
        bytes = n * STEP_BYTES[kind]
        halves = kind == "bf16 parameters and remainders"
        plain = kind == "fp32 gradients"
        weight = torch.nn.Parameter(torch.randn(n, device=device))
        first, second = (torch.zeros(n, device=device) for _ in range(2))
        gradient = torch.randn(n, device=device).to(F32 if plain else BF16)
        param: torch.Tensor = weight.detach()
        if halves:
            param = param.to(BF16)
            copied: torch.Tensor | None = torch.zeros(n, dtype=torch.int16, device=device)
        else:
            copied = None if plain else torch.empty(n, dtype=BF16, device=device)
        address = 0 if copied is None else copied.data_ptr()
        row = [param.data_ptr(), gradient.data_ptr(), first.data_ptr(), second.data_ptr(), address, n]
        table = DeviceTable([row], device, param.dtype, gradient.dtype, None if copied is None else copied.dtype)
        scalars, steps = Scalars(device), torch.zeros(1, device=device)

        def ours() -> object:
            scalars.prepare(RECIPE, steps=steps)
            table.step("ADAMW", scalars)
            return param, gradient, first, second, copied  # the table keeps none of them alive

        some = [None if t is None else t[:1000].clone() for t in (param, gradient, first, second, copied)]

        def check() -> bool:
            """Whether the first 1,000 parameters are what the plain version makes of them."""
            step_plainly(SimpleNamespace(rule="ADAMW", **prepare_plainly(RECIPE, steps=0.0)), *some)
            made, wanted = param[:1000], some[0]
            if halves:
                made, wanted = join_master(made, copied[:1000]), join_master(wanted, some[4])
            elif copied is not None and not torch.equal(copied[:1000], made.to(BF16)):
                return False
            return torch.allclose(made, wanted, rtol=1e-6, atol=1e-9)

        variants: dict[str, Callable[[], object]] = {OURS: ours, COPY: copy_of(bytes, device)}
        bars = [Bar(COPY, OURS, at_least=None if halves else 0.9)]
        if not halves:
            weight.grad = gradient if plain else torch.empty(n, device=device)
            optimizer = torch.optim.AdamW([weight], fused=True, **ADAMW)

            def fused() -> None:
                if not plain:
                    weight.grad.copy_(gradient)
                optimizer.step()
                if copied is not None:
                    copied.copy_(weight.detach())

            variants[FUSED] = fused
            bars.append(Bar(FUSED, OURS, at_least=1.0 if plain else 1.3))
        return Case(f"AdamW, {n / 1e6:g} M parameters, {kind}", bytes, variants, bars, check)

    return make


def squares(device: torch.device, sizes: Sizes) -> Case:
    tensors = [torch.randn(n, device=device) for n in tensor_sizes(sizes.bucket, sizes.tensors)]
    table, out = SquareTable(tensors, device), torch.zeros(1, dtype=F64, device=device)

    def by_foreach() -> torch.Tensor:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))

    return Case(
        "norm of fp32 tensors, in fp64, with the CPU core's bits",
        sizes.bucket * 4,
        {OURS: lambda: table.sum(out), FOREACH: by_foreach, COPY: copy_of(sizes.bucket * 4, device)},
        [Bar(COPY, OURS), Bar(FOREACH, OURS)],
        lambda: abs(float(out) ** 0.5 / float(by_foreach()) - 1) < 1e-4,
    )


def quantize(device: torch.device, sizes: Sizes) -> Case:
    values = torch.randn(sizes.bucket, device=device).to(BF16)
    bytes = values.nbytes + blocks.packed_bytes(values.numel())
    return Case(
        "quantize bf16 to int8 blocks",
        bytes,
        {
            OURS: lambda: blocks.quantize(values),
            PLAIN: lambda: blocks.quantize_plainly(values),
            COPY: copy_of(bytes, device),
        },
        [Bar(COPY, OURS), Bar(PLAIN, OURS)],
        lambda: torch.equal(blocks.quantize(values), blocks.quantize_plainly(values)),
    )


def dequantize(device: torch.device, sizes: Sizes) -> Case:
    packed = blocks.quantize(torch.randn(sizes.bucket, device=device).to(BF16))
    out, theirs = (torch.empty(sizes.bucket, dtype=BF16, device=device) for _ in range(2))
    bytes = packed.nbytes + out.nbytes

    def check() -> bool:
        blocks.dequantize_plainly(packed, theirs)
        return torch.equal(out, theirs)

    return Case(
        "dequantize int8 blocks to bf16",
        bytes,
        {
            OURS: lambda: blocks.dequantize(packed, out),
            PLAIN: lambda: blocks.dequantize_plainly(packed, theirs),
            COPY: copy_of(bytes, device),
        },
        [Bar(COPY, OURS), Bar(PLAIN, OURS)],
        check,
    )


def reorder(device: torch.device, sizes: Sizes) -> Case:
    nodes, rails = 4, 8
    rows = torch.randn(max(1, sizes.bucket // (nodes * rails)) * nodes * rails, device=device).to(BF16)
    out, theirs = torch.empty_like(rows), torch.empty_like(rows)

    def check() -> bool:
        blocks.reorder_plainly(theirs, rows, nodes, rails)
        return torch.equal(out, theirs)

    return Case(
        f"re-order {rails} x {nodes} rows of bf16",
        rows.nbytes * 2,
        {
            OURS: lambda: blocks.reorder(out, rows, nodes, rails),
            PLAIN: lambda: blocks.reorder_plainly(theirs, rows, nodes, rails),
            COPY: copy_of(rows.nbytes * 2, device),
        },
        [Bar(COPY, OURS), Bar(PLAIN, OURS)],
        check,
    )


CASES: list[Callable[[torch.device, Sizes], Case]] = [
    pack_with_norm,
    move_plainly("pack", F32),
    move_plainly("unpack", F32),
    move_plainly("pack", BF16),
    move_plainly("unpack", BF16),
    *(step(kind) for kind in STEP_BYTES),
    squares,
    quantize,
    dequantize,
    reorder,
]


# ---------------------------------------------------------------- timing


def read_through(memory: torch.Tensor, into: torch.Tensor) -> None:
    """Has the caches hold `memory` instead of what they held; read, so that nothing is left to be written back."""
    torch.sum(memory, dim=0, dtype=torch.int64, out=into)


class Clock:
    """Times calls on a device: by events on a GPU; by the clock of the host where calls return when they are done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"
        self._cache = 0
        if self._on_gpu:
            self._cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._other = torch.ones(max(4 * self._cache, 1 << 20), dtype=torch.uint8, device=device)
            self._into = torch.zeros((), dtype=torch.int64, device=device)

    def rounds(self, case: Case, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
        """Seconds of each variant in each round; they take every place in turn."""
        taken: dict[str, list[float]] = {name: [] for name in case.variants}
        names = list(case.variants)
        for turn in range(-warmup, rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                seconds = self._seconds(case.variants[name], case.bytes)
                if turn >= 0:
                    taken[name].append(seconds)
        return taken

    def _seconds(self, call: Callable[[], object], bytes: int) -> float:
        if not self._on_gpu:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        if bytes < 8 * self._cache:
            read_through(self._other, self._into)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(20_000_000)  # cycles, some 10 ms: longer than any host takes to queue what follows
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def measured(make: Callable[[torch.device, Sizes], Case], clock: Clock, sizes: Sizes, rounds: int) -> tuple[Row, str]:
    """The row of a case, and its rates in words. RuntimeError where its result is wrong."""
    case = make(clock.device, sizes)
    case.variants[OURS]()
    if not case.check():
        raise RuntimeError(f"{case.what}: the result differs from torch's")
    row = Row(case.what, 1, clock.rounds(case, rounds), case.bars)
    rates = ", ".join(f"{name} {case.bytes / row.median(name) / 1e9:.0f}" for name in row.samples)
    return row, f"{case.what}: GB/s of {case.bytes / 2**30:.2f} GiB: {rates}."


def results(device: torch.device, sizes: Sizes, rounds: int, title: str, about: str) -> Iterator[GpuReport]:
    """The report as it grows. A case that fails is told about, and the others go on."""
    clock, rows, notes, checks = Clock(device), [], [about], []
    for number, make in enumerate(CASES, 1):
        try:
            row, rates = measured(make, clock, sizes, rounds)
            rows.append(row)
            notes.append(rates)
        except RuntimeError as error:  # also where memory does not suffice, or a kernel fails
            traceback.print_exc()
            checks.append(Check(f"case {number} of {len(CASES)}", 1, str(error).split("\n")[0], "is right", False))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield GpuReport("gpu_kernels", title, rows, notes, checks)


def missing() -> str:
    """What a run needs and is not here; empty where all is."""
    if not torch.cuda.is_available():
        return "a GPU that torch can use (torch.cuda.is_available() is False)"
    return "" if library.present() else f"the CUDA library of distlib: {library.why_not()}"


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--rounds", type=int, help="default: 15, or 5 with --quick")
    options = parser.parse_args()
    absent = missing()
    if absent:
        print(f"gpu_kernels.py needs {absent}", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    sizes = sizes_for(torch.cuda.mem_get_info(device)[0], options.quick)
    name = torch.cuda.get_device_name(device)
    title = f"Kernels on one {name}: {sizes.tensors} tensors of {sizes.bucket * 4 / 2**30:.2f} GiB in fp32"
    about = (
        f"torch {torch.__version__}, CUDA {torch.version.cuda}. A step with bf16 gradients: torch's fused one needs "
        "them cast to fp32 before, and its parameters cast after."
    )
    around = report.surroundings()
    for found in results(device, sizes, options.rounds or (5 if options.quick else 15), title, about):
        report.save(found, around, options.out)
    report.publish(found, options)
    return 1 if found.checks else 0


if __name__ == "__main__":
    sys.exit(main())
