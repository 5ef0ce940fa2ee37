"""The library of csrc/cuda: what nvcc makes of it, what it exports, sanitizers, words of errors."""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_on_cpu import build

from distlib.cuda import blocks, library, tables
from distlib.cuda.library import CudaError

KERNELS = ("library", "bucket", "optimizer", "scalars", "squares", "blocks")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def declared() -> set[str]:
    """The functions of all headers of the C interface."""
    text = "".join(path.read_text() for path in sorted(build.CUDA.glob("*.h")))
    return set(re.findall(r"^(?:int64_t|const char\*) (distlib_cuda_\w+)\(", text, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.timeout(300)  # compiles
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_nvcc_compiles_what_the_headers_declare() -> None:
    assert NVCC is not None
    made = ctypes.CDLL(str(build.library_of_nvcc(NVCC)))
    assert {name for name in declared() if not hasattr(made, name)} == set()
    assert "distlib_cuda_pack" in declared()
    made.distlib_cuda_version.restype = ctypes.c_int64
    assert made.distlib_cuda_version() == library.VERSION
    made.distlib_cuda_error_text.restype = ctypes.c_char_p
    assert made.distlib_cuda_error_text(ctypes.c_int64(2)) == b"out of memory"


@pytest.mark.slow
@pytest.mark.timeout(300)  # compiles
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_memory_is_moved_in_whole_words(tmp_path: Path) -> None:
    """In what nvcc makes of pack: elements one by one are those at both ends of a run, never those between."""
    assert NVCC is not None
    code = tmp_path / "bucket.ptx"
    source = build.CUDA / "bucket.cu"
    command = [NVCC, *build.NVCC_FLAGS, f"-I{build.ROOT / 'csrc'}", "-ptx", str(source), "-o", str(code)]
    subprocess.run(command, check=True, timeout=200)
    kernels = re.findall(r"\.entry (\S+?)\((.*?)\n\}", code.read_text(), re.DOTALL)
    found = {name: body for name, body in kernels if "Scaled" not in name}
    assert len(found) == 8, sorted(found)  # four sizes moved, four casts
    for name, body in found.items():
        single = len(re.findall(r"\bst\.global\.[ubf]\d+", body))
        words = len(re.findall(r"\bst\.global\.v[24]\.", body))
        assert single == 4 and words >= 4, (name, single, words)  # before and behind, of both alignments


def test_the_emulated_library_exports_the_same() -> None:
    made = ctypes.CDLL(str(build.library()))
    assert {name for name in declared() if not hasattr(made, name)} == set()
    assert "distlib_cuda_pack" in declared()


@pytest.mark.slow
@pytest.mark.timeout(300)  # compiles
def test_sanitizers_find_nothing() -> None:
    """Every kernel of tables and blocks, at sizes and alignments where memory ends right behind it."""
    program = build.program(Path(build.HERE / "sanitized.cpp"), *KERNELS)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([program], capture_output=True, text=True, timeout=100, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("switch", [[], ["-DDISTLIB_UCONTEXT"]], ids=["own switch", "ucontext"])
def test_threads_that_wait_for_each_other_for_ever_are_told(tmp_path: Path, switch: list[str]) -> None:
    source = tmp_path / "deadlock.cu"
    source.write_text(
        '#include "cuda/launch.cuh"\n'
        "__global__ void kernel() {\n"
        "  if (threadIdx.x == 0) __shfl_sync(0xffffffffu, 0, 0);\n"
        "  else __syncthreads();\n"
        "}\n"
        "__global__ void sum(int* out) {\n"
        "  int all = static_cast<int>(threadIdx.x);\n"
        "  for (int lanes = 16; lanes > 0; lanes /= 2) all += __shfl_xor_sync(0xffffffffu, all, lanes);\n"
        "  if (__syncthreads_count(all == 496) == 32) *out += 1;\n"
        "}\n"
        "int main() {\n"
        "  int good = 0;\n"
        "  DL_LAUNCH(sum, 2, 32, distlib::cuda::as_stream(nullptr), &good);\n"
        "  if (good != 64) return 1;\n"
        "  DL_LAUNCH(kernel, 1, 32, distlib::cuda::as_stream(nullptr));\n"
        "  return 2;\n"
        "}\n"
    )
    program = tmp_path / "deadlock"
    command = [*build.compiler(), *build.FLAGS, *switch, "-x", "c++", source, "-o", program]
    subprocess.run(command, check=True, timeout=100)
    done = subprocess.run([program], capture_output=True, text=True, timeout=30)
    assert done.returncode < 0 and "deadlock: threads wait for each other" in done.stderr


def test_an_error_names_the_function_and_has_cudas_words() -> None:
    library.use(build.library())
    try:
        with pytest.raises(CudaError, match=r"_quantize failed: invalid argument \(CUDA error 1\)") as caught:
            library.call("distlib_cuda_quantize", 0, -1, 0, 0, 0)
        again = pickle.loads(pickle.dumps(caught.value))  # ranks send their errors to each other
        assert (str(again), again.function, again.code) == (str(caught.value), "distlib_cuda_quantize", 1)
    finally:
        library.use(None)


def test_without_a_library_it_is_said_why(tmp_path: Path) -> None:
    source = tmp_path / "other.cpp"
    source.write_text('#include <cstdint>\nextern "C" int64_t distlib_cuda_version() { return 77; }\n')
    other = tmp_path / "_cuda.so"
    subprocess.run([*build.compiler(), "-shared", "-fPIC", source, "-o", other], check=True, timeout=100)
    try:
        library.use(other)
        assert not library.present()
        assert f"_cuda.so has interface 77, this distlib needs {library.VERSION}" in library.why_not()
        with pytest.raises(RuntimeError, match="distlib_cuda_pack: the CUDA library cannot be used: .* interface 77"):
            library.call("distlib_cuda_pack")
        broken = tmp_path / "broken.so"
        broken.write_text("no library")
        library.use(broken)
        assert not library.present() and "cannot be loaded" in library.why_not()
    finally:
        library.use(None)


def test_kernels_of_a_gpu_are_not_given_memory_of_the_cpu() -> None:
    with pytest.raises(ValueError, match="cannot reach tensors on the CPU"):
        blocks.quantize(torch.zeros(10))


class _Elsewhere:
    """Looks like a device that is not the current one; there is no second one here."""

    type, index = "fake", 3


def test_a_thread_with_another_current_device_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    with pytest.raises(ValueError, match=r"current device has index 0: call torch.accelerator.set_device_index\(3\)"):
        tables.stream_of(_Elsewhere())  # type: ignore[arg-type]


def test_who_observes_is_told_what_is_read_and_written() -> None:
    told: list[tuple[str, list[library.Extent], list[library.Extent]]] = []
    library.use(build.library())
    library.observe(lambda name, reads, writes: told.append((name, list(reads), list(writes))))
    try:
        values = torch.zeros(300)
        packed = blocks.quantize(values)
        out = torch.ones(300)
        blocks.dequantize(packed, out)
    finally:
        library.observe(None)
        library.use(None)
    at, size = packed.data_ptr(), blocks.packed_bytes(300)
    assert told == [
        ("distlib_cuda_quantize", [(values.data_ptr(), 1200)], [(at, size)]),
        ("distlib_cuda_dequantize", [(at, size)], [(out.data_ptr(), 1200)]),
    ]
