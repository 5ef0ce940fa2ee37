"""What the pages show runs as it stands: Python snippets, on ranks, with the names that a page takes for granted."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent
GIVEN = """
import functools, json, os
from pathlib import Path
import torch, torch.distributed as dist
from torch import nn
from torch.nn import functional as F
import distlib
from distlib.comm.group import Group

torch.manual_seed(0)

class Block(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.GELU())

def Net():
    return nn.Sequential(*(Block() for _ in range(4)))

module, net, loss_fn = Net(), Net(), F.mse_loss
inputs, targets = torch.randn(16, 8), torch.randn(16, 8)
tokens, data = inputs, [(inputs, targets)] * 2
loader = micro_batches = [(torch.randn(4, 8), torch.randn(4, 8)) for _ in range(2)]
"""
JOINS = "world = distlib.init()\n"
DEEPSPEED = """
json.dump({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3, "mics_shard_size": 2},
           "bf16": {"enabled": True}, "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}},
          open("ds_config.json", "w"))
open("plan.yaml", "w").write("stage: 3\\n")
"""
# Page, ranks, what else it takes for granted, which of its snippets run one after the other.
PAGES: list[tuple[str, int, str, list[int]]] = [
    ("README.md", 2, "", [0]),
    ("README.md", 2, JOINS, [1]),
    ("README.md", 4, JOINS, [2]),
    ("docs/data_parallel.md", 2, "", [0, 1, 2, 3]),
    ("docs/sharding.md", 2, JOINS + "loss = lambda out: out.square().mean()\nloader = [[inputs, inputs]] * 2\n", [0]),
    ("docs/sharding.md", 2, JOINS, [1]),
    (
        "docs/optim.md",
        2,
        JOINS + "model = distlib.ShardedDataParallel(module)\nloss = loss_fn(model(inputs), targets)\n",
        [0],
    ),
    ("docs/pipeline.md", 2, "", [0, 2]),
    ("docs/plan.md", 1, DEEPSPEED, [0, 3]),
    (
        "docs/plan.md",
        2,
        JOINS + "plan, path = distlib.Plan(pipeline=2, microbatches=4, activations='selective'), 'saved'\n"
        "batches = lambda *_: data\n",
        [1, 2],
    ),
    (
        "docs/communication.md",
        2,
        JOINS + "whole, shard, compute = torch.zeros(8), torch.ones(4), lambda: None\n",
        [0],
    ),
    ("docs/communication.md", 1, "whole, shard = torch.zeros(64), torch.ones(8)\n", [1]),
]


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def runs(rank: int, n: int, page: str, given: str, which: list[int], folder: str) -> None:
    os.chdir(folder)
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(GIVEN + given, names)
    for index in which:
        exec(compile(snippets(page)[index], f"{page}, snippet {index}", "exec"), names)


@pytest.mark.filterwarnings("ignore")  # a page shows what warns, too
@pytest.mark.parametrize(("page", "n", "given", "which"), PAGES, ids=[f"{p} {w}" for p, _, _, w in PAGES])
def test_snippets_run(page: str, n: int, given: str, which: list[int], tmp_path: Path) -> None:
    run_ranks(n, runs, page, given, which, str(tmp_path), timeout=100)


def trained(rank: int, n: int) -> float:
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(snippets("README.md")[0], names)
    return names["model"].module.weight.norm().item()


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_first_script_gives_the_number_that_the_readme_tells(n: int) -> None:
    told = re.search(r"the norm is ([0-9.]+) on one rank, on two and on four", (ROOT / "README.md").read_text())
    assert told is not None and run_ranks(n, trained) == [pytest.approx(float(told[1]), abs=2e-6)] * n


def test_a_snippet_that_is_wrong_fails(tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match="README.md, snippet 1"
    ):  # without distlib.init(), which the page has above
        run_ranks(1, runs, "README.md", "del distlib\n", [1], str(tmp_path))


@pytest.mark.parametrize(
    "page",
    ["README.md", "benchmarks/RESULTS.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))],
)
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())
    for link in links:
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = folder / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, link
