"""ZeRO checkpoints that the real DeepSpeed writes in this run: converted, compared with DeepSpeed's own word, resumed.

DeepSpeed refuses fp16 on the CPU, so only fp32 and bf16 are tried here; its files for fp16 have bf16's structure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed_writer as written
import pytest
import torch
from ranks import process_group, run_ranks

import distlib
from distlib.checkpoint.deepspeed import convert_deepspeed

if not any((Path(entry) / "deepspeed").is_dir() for entry in sys.path):
    pytest.skip("deepspeed is not installed: make test installs it", allow_module_level=True)

pytestmark = pytest.mark.timeout(360)  # the first test waits for DeepSpeed's script: some 40 s of two quiet cores
CASES = [f"{stage}-{precision}" for stage, precision in written.CASES]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSpeed's checkpoints, and ours made of them under "<case>.ours"."""
    folder = tmp_path_factory.mktemp("deepspeed")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    torchrun.append(f"--log-dir={tmp_path_factory.mktemp('torchrun')}")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, written.__file__, str(folder)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    for case in CASES:
        convert_deepspeed(folder / case, folder / f"{case}.ours")
    return folder


def load(folder: Path, case: str) -> tuple[torch.nn.Module, torch.optim.AdamW, distlib.checkpoint.LoadedState]:
    torch.manual_seed(99)
    model = written.Model()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = torch.optim.AdamW(written.groups_of(model))
    return model, optimizer, distlib.load(folder / f"{case}.ours", model=model, optimizer=optimizer)


@pytest.mark.parametrize("case", CASES)
def test_weights_and_moments_are_deepspeeds_to_the_bit(case: str, source: Path) -> None:
    model, optimizer, state = load(source, case)
    said: dict[str, Any] = torch.load(source / f"{case}.pt", weights_only=True)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        assert torch.equal(p, said["weights"][name]), name
        assert torch.equal(optimizer.state[p]["exp_avg"], said["exp_avg"][name]), name
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], said["exp_avg_sq"][name]), name
        assert float(optimizer.state[p]["step"]) == written.STEPS
    for name, tensor in said["tool"].items():
        assert torch.equal(model.state_dict()[name], tensor.float() if tensor.is_floating_point() else tensor), name
    frozen = written.build().frozen.weight
    assert torch.equal(model.frozen.weight, frozen if case.endswith("fp32") else frozen.bfloat16().float())
    assert torch.equal(model.factor, torch.tensor([0.5, 1.0, 2.0])) and int(model.count) == 7
    assert [(g["lr"], g["eps"], list(g["betas"]), g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.01, 1e-6, [0.8, 0.99], 0.1),
        (0.01, 1e-6, [0.8, 0.99], 0.0),
    ]
    assert (state.step, state.world_size, state.rng) == (written.STEPS, 1, False)
    assert state.extra["deepspeed"]["epoch"] == 12 and state.extra["deepspeed"]["global_samples"] == 24


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("fp32")])
def test_training_goes_on_where_deepspeed_stopped(case: str, source: Path) -> None:
    model, optimizer, _ = load(source, case)
    for rank in range(2):
        (written.loss_of(model, written.batch(written.STEPS, rank)) / 2).backward()
    optimizer.step()
    said = torch.load(source / f"{case}.pt", weights_only=True)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.detach(), said["next"][name], rtol=1e-5, atol=1e-6)
            assert not torch.equal(p.detach(), said["weights"][name]), f"{name} did not move"


def _on_ranks(rank: int, n: int, folder: Path) -> None:
    with process_group(rank, n):
        model = distlib.DataParallel(written.Model())
        optimizer = torch.optim.AdamW(written.groups_of(model))
        distlib.load(folder / "3-bf16.ours", model=model, optimizer=optimizer)
        said = torch.load(folder / "3-bf16.pt", weights_only=True)
        for name, p in model.named_parameters():
            assert not p.requires_grad or torch.equal(p, said["weights"][name]), name


def test_it_loads_on_several_ranks(source: Path) -> None:
    run_ranks(3, _on_ranks, source)


def test_ties_that_are_not_recorded_must_be_given(source: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(source / "3-fp32", tmp_path / "in"))
    file = path / "three" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    model = torch.load(file, weights_only=False)
    model["shared_params"] = {}
    torch.save(model, file)
    with pytest.raises(ValueError, match=r"stores nothing for \['head.weight'\].*aliases="):
        convert_deepspeed(path, tmp_path / "out")
    with pytest.raises(ValueError, match="'head.weight' is to be tied to 'nothing'"):
        convert_deepspeed(path, tmp_path / "out", aliases={"head.weight": "nothing"})
    assert not (tmp_path / "out").exists()
    convert_deepspeed(path, tmp_path / "out", aliases={"head.weight": "emb.weight"})
    distlib.load(tmp_path / "out", model=written.Model())


def test_what_cannot_be_converted_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has the tags \\['three'\\]"):
        convert_deepspeed(source / "2-bf16", tmp_path / "out", tag="four")
    with pytest.raises(ValueError, match="no checkpoint of DeepSpeed: it has no file 'latest'"):
        convert_deepspeed(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="is a checkpoint of DeepSpeed: convert it with"):
        distlib.load(source / "2-bf16", model=written.Model())

    def copied(case: str) -> Path:
        return Path(shutil.copytree(source / case, tmp_path / f"{case}{len(list(tmp_path.iterdir()))}"))

    broken = copied("2-bf16")
    next((broken / "three").glob("*zero_pp_rank_1_*optim*")).unlink()
    with pytest.raises(RuntimeError, match="optimizer file of rank 1 of 2 is missing"):
        convert_deepspeed(broken, tmp_path / "out")
    broken = copied("3-fp32")
    file = broken / "three" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(RuntimeError, match="zero_pp_rank_1_mp_rank_00_optim_states.pt cannot be read"):
        convert_deepspeed(broken, tmp_path / "out")
    broken = copied("1-fp32")
    (broken / "three" / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(RuntimeError, match="mp_rank_00_model_states.pt is missing"):
        convert_deepspeed(broken, tmp_path / "out")
    broken = copied("1-fp32")
    (broken / "three" / "zero_pp_rank_0_mp_rank_01_optim_states.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="only plain ZeRO can be converted"):
        convert_deepspeed(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_deepspeed_is_not_imported(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from distlib.checkpoint.deepspeed import convert_deepspeed\n"
        f"convert_deepspeed({str(source / '2-bf16')!r}, {str(tmp_path / 'out')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert (tmp_path / "out" / "manifest.json").exists()
