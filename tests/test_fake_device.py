"""The fake device computes what the CPU computes, and has an accelerator's memory, streams, threads and generators."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_device
import pytest
import torch
from ranks import RankError, run_ranks
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

pytestmark = [
    pytest.mark.timeout(600),  # the first test may have to compile the device
    pytest.mark.usefixtures("built_fake_device"),
]


def inside(rank: int, n: int, test: Callable[..., Any], args: tuple[Any, ...], devices: int) -> Any:
    return test(fake_device.load(devices), *args)


def on_device(test: Callable[..., Any], *args: Any, devices: int = 1) -> Any:
    """test(device, *args) in a fresh process: a device cannot be added once autograd has run."""
    return run_ranks(1, inside, test, args, devices, timeout=100)[0]


# ---- the CPU's bits -------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, w = x.shape
        parts = self.qkv(self.norm1(x)).split(w, 2)
        q, k, v = (part.view(b, t, self.heads, w // self.heads).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, w))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, words: int = 64, width: int = 32, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def trained(device: torch.device, dtype: torch.dtype, foreach: bool, recompute: bool) -> list[torch.Tensor]:
    """Losses, gradients and parameters of three steps."""
    torch.manual_seed(0)
    model = GPT(recompute=recompute).to(dtype)
    tokens = torch.randint(0, 64, (2, 16))
    model, tokens = model.to(device), tokens.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=foreach)
    seen: list[torch.Tensor] = []
    for _ in range(3):
        loss = model(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        seen += [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    assert model.head.weight is model.words.weight
    return [t.cpu() for t in [*seen, *(p.detach() for p in model.parameters())]]


def trains_like_the_cpu(device: torch.device, *setting: Any) -> None:
    mine, plain = trained(device, *setting), trained(torch.device("cpu"), *setting)
    assert len(mine) == len(plain) > 100
    for i, (a, b) in enumerate(zip(mine, plain, strict=True)):
        assert torch.equal(a, b), f"tensor {i}: {a} and {b}"


@pytest.mark.parametrize(
    "dtype, foreach, recompute",
    [(torch.float32, True, False), (torch.float32, False, True), (torch.bfloat16, True, True)],
)
def test_a_gpt_trains_with_the_bits_of_the_cpu(dtype: torch.dtype, foreach: bool, recompute: bool) -> None:
    on_device(trains_like_the_cpu, dtype, foreach, recompute)


def operators_like_the_cpu(device: torch.device) -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))

    def resized_out(t: torch.Tensor) -> torch.Tensor:
        out = torch.empty(0, device=t.device)
        return torch.add(t, 1, out=out)

    def in_place_on_a_view(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t.t()[2:4].mul_(3).add_(t[0, 0])
        return t

    def through_dtype_views(t: torch.Tensor) -> torch.Tensor:
        return t.view(torch.int32).unfold(1, 4, 2).float()

    cases: list[Callable[[torch.Tensor], Any]] = [
        resized_out,
        in_place_on_a_view,
        through_dtype_views,
        lambda t: t.topk(3),
        lambda t: t[t > 0],
        lambda t: t[torch.tensor([2, 0], device=t.device)],
        lambda t: t[torch.tensor([2, 0])],
        lambda t: t.index_put((torch.tensor([1], device=t.device),), torch.tensor(7.0, device=t.device)),
        lambda t: torch.cat([t, t.half()]).chunk(3),
        lambda t: t.double().to(torch.bfloat16).sum(0),
        lambda t: torch.complex(t, t).abs(),
        lambda t: torch._foreach_norm([t, t.t()]),
        lambda t: t * torch.tensor(2.0),
        lambda t: torch.arange(7, device=t.device).float().cumsum(0),
        lambda t: t.new_zeros(3).copy_(t[0, :3]),
        lambda t: torch.zeros(2, 3, device=t.device).set_(t.untyped_storage(), 4, (2, 3), (3, 1)),
        lambda t: t.sort(dim=1, descending=True),
        lambda t: torch.linalg.svd(t).S,
    ]
    for i, case in enumerate(cases):
        mine, plain = case(x.to(device)), case(x)
        both = zip(*((r,) if isinstance(r, torch.Tensor) else tuple(r) for r in (mine, plain)), strict=True)
        for a, b in both:
            assert a.device == device and a.dtype == b.dtype and a.stride() == b.stride(), i
            assert torch.equal(a.cpu(), b), (i, a, b)
    assert torch.equal(x.to(device), x.to(device)) and not torch.equal(x.to(device), x.to(device) + 1)


def test_operators_resize_alias_and_return_as_on_the_cpu() -> None:
    on_device(operators_like_the_cpu)


def refuses_mixed_devices(device: torch.device) -> None:
    ours, cpu = torch.ones(4, device=device), torch.ones(4)
    for call in (lambda: ours + cpu, lambda: torch.mv(ours.view(2, 2), cpu[:2]), lambda: ours.addcmul_(cpu, ours)):
        with pytest.raises(RuntimeError, match="same device|devices"):
            call()
    with pytest.raises(RuntimeError, match="fake:1"):
        ours + torch.ones(4, device="fake:1")


def test_tensors_of_two_devices_do_not_mix() -> None:
    on_device(refuses_mixed_devices, devices=2)


# ---- modules, random numbers ----------------------------------------------------------------------------------


def keeps_modules(device: torch.device) -> None:
    model = GPT().to(device)
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.words.weight
    assert twin.head.weight.data_ptr() != model.head.weight.data_ptr()
    other = GPT()
    other.load_state_dict(model.state_dict())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, map_location=device)
    for name, value in model.state_dict().items():
        assert value.device == loaded[name].device == device
        for same in (twin.state_dict()[name], loaded[name], other.state_dict()[name]):
            assert torch.equal(value.cpu(), same.cpu()), name


def test_modules_are_copied_saved_and_loaded() -> None:
    on_device(keeps_modules)


def has_generators(device: torch.device) -> None:
    torch.manual_seed(5)
    plain = torch.randn(9)
    first = torch.randn(9, device=device)
    assert torch.equal(first.cpu(), plain)  # both were seeded, and neither took the other's numbers
    state = torch.fake.get_rng_state()
    ones = torch.ones(1000, device=device)
    dropped = F.dropout(ones, 0.5)
    following = torch.rand(5)
    torch.fake.set_rng_state(state)
    assert torch.equal(F.dropout(ones, 0.5).cpu(), dropped.cpu())
    assert not torch.equal(torch.rand(5), following)
    with torch.random.fork_rng(devices=[0], device_type="fake"):
        torch.rand(3, device=device)
    generator = torch.Generator(device).manual_seed(5)
    assert torch.equal(torch.randn(9, device=device, generator=generator).cpu(), plain)
    with pytest.raises(RuntimeError, match="generator|Generator"):
        torch.randn(9, generator=generator)

    x = torch.randn(4, 8, device=device, requires_grad=True)
    layer = nn.Linear(8, 8, device=device)

    def part(t: torch.Tensor) -> torch.Tensor:
        return F.dropout(layer(t).relu(), 0.5)

    grads = []
    for recompute in (False, True):
        torch.manual_seed(3)
        y = checkpoint(part, x, use_reentrant=False) if recompute else part(x)
        torch.rand(7, device=device)
        grads.append(torch.autograd.grad((y * y).sum(), [x, *layer.parameters()]))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def test_random_numbers_have_generators_and_states() -> None:
    on_device(has_generators)


# ---- memory ---------------------------------------------------------------------------------------------------


def resizes_storage(device: torch.device) -> None:
    before = torch.accelerator.memory_allocated()
    x = torch.arange(4096.0, device=device)
    view = x[1000:2000]
    assert torch.accelerator.memory_allocated() == before + 4 * 4096
    x.untyped_storage().resize_(0)
    assert torch.accelerator.memory_allocated() == before and x.untyped_storage().nbytes() == 0
    x.untyped_storage().resize_(4 * 4096)
    assert torch.accelerator.memory_allocated() == before + 4 * 4096
    assert bool(x.isnan().all())  # nobody may count on what was there
    x.fill_(3)
    assert view.sum().item() == 3000
    x.untyped_storage().resize_(4 * 2000)
    assert view.sum().item() == 3000


def test_storage_is_resized_and_its_memory_given_back() -> None:
    on_device(resizes_storage)


def counts_memory(device: torch.device) -> None:
    memory = torch.accelerator
    memory.empty_cache()
    memory.reset_peak_memory_stats()
    before = memory.memory_allocated()
    x = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    y = torch.empty(1 << 19, dtype=torch.uint8, device=device)
    del x
    assert memory.memory_allocated() == before + (1 << 19) == before + y.nbytes
    assert memory.max_memory_allocated() == before + (3 << 19)
    reserved = memory.memory_reserved()
    assert reserved >= 3 << 19
    x = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    assert memory.memory_reserved() == reserved
    del x, y
    memory.empty_cache()
    assert memory.memory_reserved() == reserved - (3 << 19)


def test_memory_is_counted_and_cached() -> None:
    on_device(counts_memory)


def lends_by_stream(device: torch.device) -> None:
    side, other = torch.Stream(device), torch.Stream(device)
    x = torch.empty(1000, device=device)
    address = x.data_ptr()
    del x
    with side:
        assert torch.empty(1000, device=device).data_ptr() != address
    assert torch.empty(1000, device=device).data_ptr() == address

    fake_device.lag(2)
    x = torch.empty(1000, device=device)
    address = x.data_ptr()
    other.wait_event(torch.accelerator.current_stream().record_event())
    with other:
        x.add_(1)
    x.record_stream(other)
    del x
    lent = [torch.empty(1000, device=device) for _ in range(3)]  # the event has not passed at the first two
    assert [t.data_ptr() == address for t in lent] == [False, False, True]
    other.synchronize()


def test_memory_goes_back_to_its_stream_and_waits_for_recorded_ones() -> None:
    on_device(lends_by_stream)


def pins(device: torch.device) -> None:
    assert not torch.ones(3).is_pinned()
    x = torch.arange(6.0).pin_memory()
    assert x.is_pinned() and x[2:].is_pinned() and torch.empty(3, pin_memory=True).is_pinned()
    moved = x.to(device, non_blocking=True)
    back = torch.empty(6, pin_memory=True).copy_(moved, non_blocking=True)
    assert not fake_device.host_syncs()
    torch.accelerator.synchronize()
    fake_device.check_host(back)
    assert torch.equal(back, x)


def test_pinned_memory_is_copied_without_waiting() -> None:
    on_device(pins)


# ---- autograd, streams, host ----------------------------------------------------------------------------------


def runs_backward_in_another_thread(device: torch.device) -> None:
    main, threads, order = threading.get_ident(), [], []
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(device)
    side = torch.Stream(device)

    def note(what: str) -> None:
        threads.append(threading.get_ident())
        order.append((what, torch.accelerator.current_stream() == side))

    side.wait_event(torch.accelerator.current_stream().record_event())
    with side:
        for name, p in model.named_parameters():
            p.register_post_accumulate_grad_hook(lambda p, name=name: note(name))
        register_multi_grad_hook(tuple(model.parameters()), lambda grads: note("all"))
        loss = model(torch.ones(2, 4, device=device)).sum()
    loss.backward()
    assert len(set(threads)) == 1 and threads[0] != main
    assert [what for what, _ in order].count("all") == 1 and len(order) == 5
    assert all(on_side for _, on_side in order)
    assert sum(p.grad.sum().item() for p in model.parameters()) != 0  # backward's end orders it before this stream


def test_backward_runs_in_the_devices_thread_on_the_forwards_stream() -> None:
    on_device(runs_backward_in_another_thread)


def has_streams_and_events(device: torch.device) -> None:
    main, side = torch.accelerator.current_stream(device), torch.Stream(device)
    assert main.stream_id == 0 and side != main and side.device == device and torch.Stream(device) != side
    with side:
        assert torch.accelerator.current_stream() == side
        seen: list[bool] = []
        thread = threading.Thread(target=lambda: seen.append(torch.accelerator.current_stream() == main))
        thread.start()
        thread.join()
        assert seen == [True]  # the current stream is the thread's
    assert torch.accelerator.current_stream() == main
    first, last = torch.Event(device, enable_timing=True), torch.Event(device, enable_timing=True)
    assert first.query()
    first.record(side)
    last.record(side)
    assert first.elapsed_time(last) >= 0
    fake_device.lag(2)
    x = torch.ones(3, device=device)
    event = main.record_event()
    assert [event.query() for _ in range(4)] == [False, False, True, True]
    assert float(x[0]) == 1
    assert main.record_event().query()  # the host knows: it has seen the value


def test_streams_and_events_are_torchs() -> None:
    on_device(has_streams_and_events)


def counts_syncs(device: torch.device) -> list[str]:
    x = torch.ones(8, device=device)
    pageable, pinned = torch.ones(8), torch.ones(8).pin_memory()
    fake_device.reset()
    y = (x * 2 + x.sum()).softmax(0)
    x.copy_(pinned, non_blocking=True)
    pinned.copy_(y, non_blocking=True)
    x.copy_(pageable, non_blocking=True)
    event = torch.accelerator.current_stream().record_event()
    assert event.query() and fake_device.host_syncs() == []
    y.sum().item()
    x.to("cpu")
    x.copy_(pageable)
    pageable.copy_(x, non_blocking=True)  # not pinned: the copy waits
    y.nonzero()
    y[y > 0]
    event.synchronize()
    torch.accelerator.current_stream().synchronize()
    torch.accelerator.synchronize()
    syncs = fake_device.host_syncs()
    assert all("counts_syncs" in sync.stack for sync in syncs), [str(sync) for sync in syncs]
    fake_device.reset()
    assert fake_device.host_syncs() == []
    return [sync.what for sync in syncs]


def test_each_wait_of_the_host_is_counted_with_its_place() -> None:
    assert on_device(counts_syncs) == [
        "aten::item",
        "blocking copy, device to host",
        "blocking copy, host to device",
        "blocking copy, device to host",
        "aten::nonzero",
        "aten::nonzero",  # of a mask used as an index
        "event.synchronize",
        "stream.synchronize",
        "device.synchronize",
    ]


def has_two_devices(device: torch.device) -> None:
    assert torch.accelerator.device_count() == 2
    x = torch.arange(5.0, device=device)
    y = x.to("fake:1", non_blocking=True)
    z = (y + 1).to(device, non_blocking=True) + x
    assert y.device.index == 1 and z.tolist() == [1, 3, 5, 7, 9]
    with torch.fake.device(1):
        assert torch.ones(1, device="fake").device.index == 1
    assert torch.ones(1, device="fake").device.index == 0
    with pytest.raises(ValueError, match="2 fake devices"):
        fake_device.load(3)


def test_there_may_be_several_devices() -> None:
    on_device(has_two_devices, devices=2)


def loads_late(rank: int, n: int) -> None:
    torch.ones(1, requires_grad=True).sum().backward()
    fake_device.load()


def test_a_device_that_comes_after_autograds_threads_is_refused() -> None:
    with pytest.raises(RankError, match="before the first backward"):
        run_ranks(1, loads_late, timeout=100)


def test_where_it_cannot_be_built_it_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fake_device.build, "TORCH", tmp_path)
        assert "without its headers" in str(fake_device.why_not())
    with monkeypatch.context() as patch:
        patch.setattr(fake_device.build, "FLAGS", ["-DNDEBUG", "--no-such-option"])
        patch.setattr(fake_device.build, "HERE", tmp_path / "tests" / "fake_device")  # whose build folder is used
        assert "no-such-option" in str(fake_device.why_not())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "install g++" in str(fake_device.why_not())


def test_a_built_library_is_used_again() -> None:
    library = fake_device.build.library()
    assert library.parent.name.startswith("fake_device-") and fake_device.build.library() == library
    assert sorted(path.name for path in library.parent.iterdir()) == ["fake_device.so", "lock"]
