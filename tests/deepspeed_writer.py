"""A script for 2 ranks: the real DeepSpeed trains, saves checkpoints of all ZeRO stages, and says what is in them.

    torchrun --nproc-per-node 2 deepspeed_writer.py FOLDER

For each case FOLDER/<case> is DeepSpeed's checkpoint after 3 steps, and FOLDER/<case>.pt holds DeepSpeed's own word on
it: {"weights", "exp_avg", "exp_avg_sq"} by name, gathered by its public functions, "tool", what zero_to_fp32 makes of
the files, and "next", the weights after one more step.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch
from torch import nn

CASES = [(1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
SETTINGS = {"lr": 0.01, "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0.1}
STEPS = 3


class Model(nn.Module):
    """Odd sizes, a tied pair, a frozen parameter, buffers, a single element."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 5)
        self.fc = nn.Linear(5, 3)
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.Linear(3, 3, bias=False)
        self.frozen.weight.requires_grad_(False)
        self.up = nn.Linear(3, 5)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("factor", torch.tensor([0.5, 1.0, 2.0]))
        self.register_buffer("count", torch.tensor(7))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: (batch,) int64 -> (batch, 7)."""
        hidden = self.norm(self.fc(self.emb(tokens))) * self.factor.to(self.fc.weight.dtype)
        return self.head(self.up(self.frozen(hidden)) * self.scale)


def build() -> Model:
    torch.manual_seed(0)
    return Model()


def groups_of(model: nn.Module) -> list[dict[str, object]]:
    """Two groups: no weight decay for what is not a matrix."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    return [{"params": matrices}, {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randint(7, (4,), generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).float().square().mean()


def main(folder: Path) -> None:
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # Else it compiles a collective for a minute; gloo will do. (deepspeed.comm has an attribute `torch`: the real one.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    for stage, precision in CASES:
        model = build()
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage, "sub_group_size": 40},
            "gradient_clipping": 0.0,  # its default is not none
            "optimizer": {"type": "AdamW", "params": {**SETTINGS, "torch_adam": True}},
        }
        if precision != "fp32":
            config[precision] = {"enabled": True}
        engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=groups_of(model))

        def step(number: int, engine: object = engine) -> None:
            engine.backward(loss_of(engine, batch(number, rank)))  # type: ignore[attr-defined]
            engine.step()  # type: ignore[attr-defined]

        def weights(engine: object = engine) -> dict[str, torch.Tensor]:
            trained = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]  # type: ignore[attr-defined]
            return {name: safe_get_full_fp32_param(p).clone() for name, p in trained}

        for number in range(STEPS):
            step(number)
        case = f"{stage}-{precision}"
        engine.save_checkpoint(str(folder / case), tag="three", client_state={"epoch": 12})
        found: dict[str, object] = {"weights": weights()}
        if stage < 3:  # with torch's AdamW it links the moments before there are any
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        for key in ("exp_avg", "exp_avg_sq"):
            trained = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
            found[key] = {name: safe_get_full_optimizer_state(p, key).clone() for name, p in trained}
        step(STEPS)
        found["next"] = weights()
        dist.barrier()
        if rank == 0:
            found["tool"] = dict(get_fp32_state_dict_from_zero_checkpoint(str(folder / case)))
            torch.save(found, folder / f"{case}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    main(Path(sys.argv[1]))
    # All is written. At the interpreter's end, threads of DeepSpeed that still wait for the lock may abort the process.
    sys.stdout.flush()
    os._exit(0)
