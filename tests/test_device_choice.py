"""Which way tensors of a device travel: every combination of hosts, GPUs and libraries; by size and number of ranks."""

from __future__ import annotations

import ctypes
import itertools
import os
import warnings
from types import SimpleNamespace

import pytest
import torch

from distlib import world
from distlib.comm import device as device_module
from distlib.comm.device import Facts, Plan, Way, ipc_to, plan, settle
from distlib.comm.ipc import sums_slices
from distlib.cuda import library

NO = "it is not there"


def facts(gpus: str, hosts: str, ipc: bool = True, nccl: bool = True, kind: str = "cuda") -> list[Facts]:
    """One letter a rank."""
    return [
        Facts(kind, f"GPU-{g}", f"host-{h}", "" if ipc else NO, "" if nccl else NO)
        for g, h in zip(gpus, hosts, strict=True)
    ]


def test_every_combination_of_what_is_there() -> None:
    for shares, one_host, ipc, nccl, mapped in itertools.product([False, True], repeat=5):
        ranks = facts("aabc" if shares else "abcd", "xxxx" if one_host else "xxyy", ipc, nccl)
        can_ipc, can_nccl = one_host and ipc, nccl and not shares
        if not can_ipc and not can_nccl:
            with pytest.raises(ValueError, match="cannot be communicated") as caught:
                plan(ranks, [4, 5, 6, 7])
            text = str(caught.value)
            assert ("ranks 4, 5 share GPU GPU-a, which NCCL refuses" in text) == shares
            assert ("the ranks are on several hosts" in text) == (not one_host)
            assert "Fix: " in text
            continue
        chosen = plan(ranks, [4, 5, 6, 7])
        assert chosen.try_ipc == can_ipc and (not chosen.why_not_nccl) == can_nccl
        error = "" if mapped else "no peer access"
        if not can_nccl and not mapped:
            with pytest.raises(ValueError, match="no peer access"):
                settle(chosen, "cuda", error)
            continue
        way = settle(chosen, "cuda", error)
        assert way == Way(can_ipc and mapped, can_nccl)


def test_the_same_name_of_a_gpu_on_two_hosts_is_two_gpus() -> None:
    assert plan(facts("abab", "xxyy"), [0, 1, 2, 3]) == Plan(False, "the ranks are on several hosts", "")


def test_one_rank_without_the_library_rules_it_out_for_all() -> None:
    ranks = facts("aa", "xx")
    ranks[1] = Facts("cuda", "GPU-a", "host-x", NO, "")
    with pytest.raises(ValueError, match="rank 1: it is not there"):
        plan(ranks, [0, 1])
    ranks = facts("ab", "xx")
    ranks[1] = Facts("cuda", "GPU-b", "host-x", NO, "")
    assert not plan(ranks, [0, 1]).try_ipc


def test_devices_of_several_types_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 0: cuda, rank 1: xpu"):
        plan([*facts("a", "x"), *facts("b", "x", kind="xpu")], [0, 1])


def test_more_ranks_than_mapped_memory_serves_go_by_nccl() -> None:
    many = facts("abcdefghijklmnopq", "x" * 17)
    assert not plan(many, list(range(17))).try_ipc and plan(many[:16], list(range(16))).try_ipc


def test_size_and_number_of_ranks_choose_between_the_two() -> None:
    for n in range(1, 17):
        limit = ipc_to(n)
        assert Way(True, True).by_ipc(limit, n) and not Way(True, True).by_ipc(limit + 1, n)
        assert Way(True, False).by_ipc(limit + 1, n) and not Way(False, True).by_ipc(0, n)
        assert n == 1 or limit <= ipc_to(n - 1)
    assert ipc_to(17) == 0 and not Way(False, True).by_ipc(0, 17)


@pytest.mark.parametrize("present", [False, True])
def test_ranks_that_share_a_gpu_are_refused_at_the_start_only_where_nccl_is_all_there_is(
    present: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "present", lambda: present)
    assert world._needs_own_gpu("nccl")
    assert world._needs_own_gpu("cpu:gloo,cuda:nccl")
    assert world._needs_own_gpu("cpu:distlib,cuda:nccl") is not present
    assert not world._needs_own_gpu("distlib")


def test_two_ranks_never_sum_slices_and_more_ranks_do_so_sooner() -> None:
    assert not sums_slices(1 << 40, 2) and not sums_slices(1 << 40, 1)
    for n in range(3, 17):
        first = next(size for size in range(0, 1 << 20, 1024) if sums_slices(size, n))
        assert not sums_slices(first - 1024, n)
        assert n == 3 or first <= next(size for size in range(0, 1 << 20, 1024) if sums_slices(size, n - 1))


@pytest.mark.parametrize("present", [True, False])
def test_kernels_are_loaded_at_the_start_where_some_of_them_wait(
    present: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything asks for a GPU: later, CUDA does not read it any more. What is set stays."""

    def asked() -> None:
        raise InterruptedError(os.environ.get("CUDA_MODULE_LOADING"), os.environ["CUDA_DEVICE_MAX_CONNECTIONS"])

    monkeypatch.setattr(library, "present", lambda: present)
    monkeypatch.setattr(world, "detect", asked)
    for given in (None, "LAZY"):
        monkeypatch.setenv("CUDA_MODULE_LOADING", "to be restored")
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "to be restored")
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
        if given is None:
            monkeypatch.delenv("CUDA_MODULE_LOADING")
        else:
            monkeypatch.setenv("CUDA_MODULE_LOADING", given)
        with pytest.raises(InterruptedError) as caught:
            world._start("auto", world.DEFAULT_TIMEOUT, None)
        assert caught.value.args == (given or ("EAGER" if present else None), "32")


@pytest.mark.parametrize("mode", [1, 2])
def test_a_driver_that_loads_kernels_late_is_warned_of(mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(where: ctypes._CArgObject) -> int:  # type: ignore[name-defined]
        where._obj.value = mode
        return 0

    driver = SimpleNamespace(cuModuleGetLoadingMode=tell)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": driver}[name])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        device_module._warn_if_lazy(torch.device("cpu"))
        assert not said
        device_module._warn_if_lazy(torch.device("cuda", 0))
    assert [str(w.message) for w in said if "CUDA_MODULE_LOADING=EAGER" in str(w.message)] or mode == 1
    assert len(said) == mode - 1
