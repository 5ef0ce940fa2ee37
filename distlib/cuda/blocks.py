"""Block int8 quantization of gathers, and the re-order of a gather in levels: kernels, each beside its plain version.

Packed values are those of distlib/sharded/quantize.py, bit for bit: int8 of all blocks of 256 elements, then their
scales in fp32.
"""

from __future__ import annotations

import torch

from distlib.cuda import library
from distlib.cuda.tables import CODES, extent, require_dense, stream_of

BLOCK = 256  # elements that share a scale
_QUANTIZED = (torch.float32, torch.float16, torch.bfloat16)


def packed_bytes(numel: int) -> int:
    """Bytes of `numel` elements, packed."""
    return -(-numel // BLOCK) * (BLOCK + 4)


def quantize(values: torch.Tensor) -> torch.Tensor:
    """fp32, fp16 or bf16 values, contiguous, packed: uint8, 1-D, `packed_bytes` of them. On the current stream."""
    _require(values, "values")
    packed = torch.empty(packed_bytes(values.numel()), dtype=torch.uint8, device=values.device)
    if library.observed():
        library.tell("distlib_cuda_quantize", [extent(values)], [extent(packed)])
    library.call(
        "distlib_cuda_quantize",
        values.data_ptr(),
        values.numel(),
        CODES[values.dtype],
        packed.data_ptr(),
        stream_of(values.device),
    )
    return packed


def dequantize(packed: torch.Tensor, out: torch.Tensor) -> None:
    """out = the values of `packed`, in the dtype of `out` (fp32, fp16, bf16). On the current stream.

    packed: uint8, 1-D, with any `out` of that many elements; or (rows, bytes) with an `out` of as many rows, each
    packed by itself, all in one launch. The rows of `packed` may be longer than needed.
    """
    _require(out, "out")
    require_dense("packed", [packed])
    rows = len(packed) if packed.dim() == 2 else 1
    count = out.numel() // max(rows, 1)
    need = packed_bytes(count)
    if packed.dtype is not torch.uint8 or packed.dim() not in (1, 2) or packed.shape[-1] < need:
        raise ValueError(
            f"packed is {packed.dtype} of shape {tuple(packed.shape)}; for {count} elements a row it is uint8, with "
            f"{need} bytes a row"
        )
    if packed.dim() == 2 and (out.dim() < 1 or len(out) != rows):
        raise ValueError(f"packed has {rows} rows, out has shape {tuple(out.shape)}: as many rows are needed")
    if packed.device != out.device:
        raise ValueError(f"packed is on {packed.device}, out on {out.device}")
    if library.observed():
        library.tell("distlib_cuda_dequantize", [extent(packed)], [extent(out)])
    library.call(
        "distlib_cuda_dequantize",
        packed.data_ptr(),
        rows,
        packed.shape[-1],
        count,
        CODES[out.dtype],
        out.data_ptr(),
        stream_of(out.device),
    )


def reorder(out: torch.Tensor, rows: torch.Tensor, nodes: int, rails: int) -> None:
    """out = rows, put from [rail][node] into [node][rail] order: what rails brought in, by rank. On the current stream.

    Both contiguous, of equal dtype and size, which nodes * rails divides; they must not overlap.
    """
    _check_rows(out, rows, nodes, rails)
    if library.observed():
        library.tell("distlib_cuda_reorder", [extent(rows)], [extent(out)])
    library.call(
        "distlib_cuda_reorder",
        rows.data_ptr(),
        out.data_ptr(),
        out.nbytes // (nodes * rails),
        nodes,
        rails,
        stream_of(out.device),
    )


def quantize_plainly(values: torch.Tensor) -> torch.Tensor:
    """`quantize` with torch's operators."""
    blocks = -(-values.numel() // BLOCK)
    padded = torch.zeros(blocks * BLOCK, dtype=torch.float32, device=values.device)
    padded[: values.numel()] = values.reshape(-1)
    table = padded.view(blocks, BLOCK)
    # Divided by a tensor: by a number, torch multiplies with its reciprocal on some devices.
    scales = table.abs().amax(dim=1) / torch.full((blocks,), 127.0, device=values.device)
    steps = torch.where(scales > 0, scales, torch.ones_like(scales))
    rounded = (table / steps[:, None]).round_().clamp_(-127, 127).nan_to_num_(0.0).to(torch.int8)
    return torch.cat([rounded.view(-1).view(torch.uint8), scales.view(torch.uint8)])


def dequantize_plainly(packed: torch.Tensor, out: torch.Tensor) -> None:
    """`dequantize` with torch's operators."""
    for source, target in zip(packed, out, strict=True) if packed.dim() == 2 else [(packed, out)]:
        blocks = -(-target.numel() // BLOCK)
        values = source[: blocks * BLOCK].view(torch.int8).view(blocks, BLOCK)
        scales = source[blocks * BLOCK : blocks * (BLOCK + 4)].clone().view(torch.float32)
        target.copy_((values.float() * scales[:, None]).view(-1)[: target.numel()].view(target.shape))


def reorder_plainly(out: torch.Tensor, rows: torch.Tensor, nodes: int, rails: int) -> None:
    """`reorder` with torch's operators."""
    _check_rows(out, rows, nodes, rails)
    out.view(nodes, rails, -1).copy_(rows.view(rails, nodes, -1).transpose(0, 1))


def _require(tensor: torch.Tensor, name: str) -> None:
    if tensor.dtype not in _QUANTIZED:
        raise ValueError(f"{name} is {tensor.dtype}: fp32, fp16 and bf16 can be quantized")
    require_dense(name, [tensor])


def _check_rows(out: torch.Tensor, rows: torch.Tensor, nodes: int, rails: int) -> None:
    require_dense("rows, out:", [rows, out])
    if nodes < 1 or rails < 1 or out.numel() % (nodes * rails):
        raise ValueError(f"{out.numel()} elements are not {nodes} nodes times {rails} rails rows of equal size")
    if out.dtype is not rows.dtype or out.numel() != rows.numel() or out.device != rows.device:
        raise ValueError(
            f"out has {out.numel()} elements of {out.dtype} on {out.device}, rows {rows.numel()} of {rows.dtype} on "
            f"{rows.device}: both must be alike"
        )
