"""All-reduce of sparse tensors: every rank gets all ranks' entries, and adds them up in rank order."""

from __future__ import annotations

import torch

from distlib.comm.group import Group
from distlib.comm.work import Work, finished


def all_reduce_sparse(group: Group, tensor: torch.Tensor, op: str) -> Work:
    """Sums sparse COO tensors of equal shape into `tensor` of every rank. Complete when it returns.

    Raises ValueError for another layout or operation, RuntimeError naming the rank whose shape differs.
    """
    if tensor.layout is not torch.sparse_coo:
        raise ValueError(f"all_reduce: layout {tensor.layout} is not supported, only strided and sparse_coo")
    if op != "sum":
        raise ValueError(f"all_reduce: op '{op}' is not defined on sparse tensors, only 'sum'")
    mine = tensor.coalesce()
    shape = torch.tensor([mine.sparse_dim(), mine.dense_dim(), *mine.shape])
    dims = torch.zeros(group.size, 1, dtype=torch.int64)
    group.all_gather(dims, torch.tensor([shape.numel()]))
    shapes = torch.zeros(group.size, int(dims.max()), dtype=torch.int64)
    padded = torch.zeros(int(dims.max()), dtype=torch.int64)
    padded[: shape.numel()] = shape
    group.all_gather(shapes, padded)
    for r in range(group.size):
        if not torch.equal(shapes[r], padded):
            raise RuntimeError(f"all_reduce of sparse tensors: shape of rank {group.ranks[r]} differs from this rank's")
    counts = torch.zeros(group.size, dtype=torch.int64)
    group.all_gather(counts, torch.tensor([mine._nnz()]))
    widest = int(counts.max())
    indices = torch.zeros(group.size, mine.sparse_dim(), widest, dtype=torch.int64)
    values = torch.zeros(group.size, widest, *mine.values().shape[1:], dtype=mine.dtype)
    own_indices, own_values = torch.zeros_like(indices[0]), torch.zeros_like(values[0])
    own_indices[:, : mine._nnz()] = mine.indices()
    own_values[: mine._nnz()] = mine.values()
    group.all_gather(indices, own_indices)
    group.all_gather(values, own_values)
    total: torch.Tensor | None = None
    for r, n in enumerate(counts.tolist()):
        part = torch.sparse_coo_tensor(indices[r, :, :n], values[r, :n], mine.shape)
        total = part if total is None else total + part
    assert total is not None
    tensor.copy_(total.coalesce())
    return finished([tensor])
