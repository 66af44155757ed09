""" Triton kernels for SPSE and RGSE on a GPU: few passes over the feature maps x (B, C, H, W), sums in float32

Maps are dense, all in one layout: NCHW, or NHWC (channels_last) if LAST. `fused` says when the kernels are used.
"""
from typing import Any, List, Sequence, Tuple

import torch
import triton
import triton.language as tl

BLOCK = 1024  # numbers per program


@triton.jit
def _add_weights(total, w, p, c, inside, height, width, GRID: tl.constexpr):
    """Add weight / area of the cells of one grid that cover the positions p."""
    y, x = p // width, p % width
    for row in range(GRID):
        top, bottom = row * height // GRID, ((row + 1) * height + GRID - 1) // GRID
        for col in range(GRID):
            left, right = col * width // GRID, ((col + 1) * width + GRID - 1) // GRID
            covers = inside & (y >= top) & (y < bottom) & (x >= left) & (x < right)
            weight = tl.load(w + (c * GRID + row) * GRID + col, mask=covers, other=0.).to(tl.float32)
            total += weight / ((bottom - top) * (right - left)).to(tl.float32)
    return total


@triton.jit
def _position_weights(
        w0, w1, w2, k, height, width, channels, GRID0: tl.constexpr, GRID1: tl.constexpr, GRID2: tl.constexpr,
        LAST: tl.constexpr, BLOCK: tl.constexpr):
    """k[c, p] = weight / area, summed over the cells that cover position p. A grid of 0 is none."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < height * width * channels
    c = i % channels if LAST else i // (height * width)
    p = i // channels if LAST else i % (height * width)
    total = _add_weights(tl.zeros((BLOCK,), tl.float32), w0, p, c, inside, height, width, GRID0)
    total = _add_weights(total, w1, p, c, inside, height, width, GRID1)
    total = _add_weights(total, w2, p, c, inside, height, width, GRID2)
    tl.store(k + i, total, mask=inside)


@triton.jit
def _sum(x, k, out, positions, channels, LAST: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    """out[n, c] = sum over p of x[n, c, p] * k[c, p]."""
    n = tl.program_id(1).to(tl.int64)
    c = (tl.program_id(0) * C + tl.arange(0, C))[None, :]
    total = tl.zeros((P, C), tl.float32)
    for start in range(0, positions, P):
        p = (start + tl.arange(0, P))[:, None]
        inside = (p < positions) & (c < channels)
        i = p * channels + c if LAST else c * positions + p
        a = tl.load(x + n * positions * channels + i, mask=inside, other=0.).to(tl.float32)
        total += a * tl.load(k + i, mask=inside, other=0.)
    c = tl.program_id(0) * C + tl.arange(0, C)
    tl.store(out + n * channels + c, tl.sum(total, 0), mask=c < channels)


@triton.jit
def _sum_backward(
        x, k, grad, grad_x, parts, batch, positions, channels, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """grad_x[n, c, p] = grad[n, c] * k[c, p], and parts[i, c, p] = sum of grad[n, c] * x[n, c, p] over a share of n."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < positions * channels
    c = i % channels if LAST else i // positions
    weight = tl.load(k + i, mask=inside, other=0.)
    total = tl.zeros((BLOCK,), tl.float32)
    image = tl.program_id(1).to(tl.int64) * positions * channels
    for n in range(tl.program_id(1), batch, tl.num_programs(1)):
        g = tl.load(grad + n * channels + c, mask=inside, other=0.).to(tl.float32)
        total += g * tl.load(x + image + i, mask=inside, other=0.).to(tl.float32)
        tl.store(grad_x + image + i, g * weight, mask=inside)
        image += tl.num_programs(1).to(tl.int64) * positions * channels
    tl.store(parts + tl.program_id(1).to(tl.int64) * positions * channels + i, total, mask=inside)


@triton.jit
def _average_cells(
        parts, out, num_parts, height, width, channels, GRID0: tl.constexpr, GRID1: tl.constexpr, GRID2: tl.constexpr,
        LAST: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    """Averages of the sum of parts (num_parts, C, H, W) over cells: (C, g, g) of each grid g, one after the other."""
    cell = tl.program_id(1)
    is_0, is_2 = cell < GRID0 * GRID0, cell >= GRID0 * GRID0 + GRID1 * GRID1
    grid = tl.where(is_0, GRID0, tl.where(is_2, GRID2, GRID1))
    before = tl.where(is_0, 0, GRID0 * GRID0 + tl.where(is_2, GRID1 * GRID1, 0))
    cell -= before
    row, col = cell // grid, cell % grid
    top, bottom = row * height // grid, ((row + 1) * height + grid - 1) // grid
    left, right = col * width // grid, ((col + 1) * width + grid - 1) // grid
    area = (bottom - top) * (right - left)
    c = (tl.program_id(0) * C + tl.arange(0, C))[None, :]
    total = tl.zeros((P, C), tl.float32)
    for part in range(num_parts):
        for start in range(0, area, P):
            q = (start + tl.arange(0, P))[:, None]
            p = (top + q // (right - left)) * width + left + q % (right - left)
            i = p * channels + c if LAST else c * (height * width) + p
            total += tl.load(
                parts + part * channels * height * width + i, mask=(q < area) & (c < channels), other=0.)
    c = tl.program_id(0) * C + tl.arange(0, C)
    out += before * channels + c * grid * grid + cell
    tl.store(out, tl.sum(total, 0) / area.to(tl.float32), mask=c < channels)


@triton.jit
def _residual_relu(x, gate, shortcut, out, positions, channels, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """out = relu(x * gate + shortcut)."""
    n = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < positions * channels
    c = i % channels if LAST else i // positions
    image = n * positions * channels
    a = tl.load(x + image + i, mask=inside, other=0.).to(tl.float32)
    a *= tl.load(gate + n * channels + c, mask=inside, other=0.).to(tl.float32)
    a += tl.load(shortcut + image + i, mask=inside, other=0.).to(tl.float32)
    tl.store(out + image + i, tl.maximum(a, 0., propagate_nan=tl.PropagateNan.ALL), mask=inside)


@triton.jit
def _residual_relu_backward(
        grad, out, x, gate, grad_x, grad_gate, grad_shortcut, positions, channels, LAST: tl.constexpr, P: tl.constexpr,
        C: tl.constexpr):
    """Gradients of `_residual_relu`."""
    n = tl.program_id(1).to(tl.int64)
    c = (tl.program_id(0) * C + tl.arange(0, C))[None, :]
    a = tl.load(gate + n * channels + c, mask=c < channels, other=0.).to(tl.float32)
    total = tl.zeros((P, C), tl.float32)
    for start in range(0, positions, P):
        p = (start + tl.arange(0, P))[:, None]
        inside = (p < positions) & (c < channels)
        i = n * positions * channels + (p * channels + c if LAST else c * positions + p)
        g = tl.load(grad + i, mask=inside, other=0.).to(tl.float32)
        g = tl.where(tl.load(out + i, mask=inside, other=0.) <= 0., 0., g)
        tl.store(grad_shortcut + i, g, mask=inside)
        tl.store(grad_x + i, g * a, mask=inside)
        total += g * tl.load(x + i, mask=inside, other=0.).to(tl.float32)
    c = tl.program_id(0) * C + tl.arange(0, C)
    tl.store(grad_gate + n * channels + c, tl.sum(total, 0), mask=c < channels)


def _layout(x: torch.Tensor) -> Tuple[bool, int, int]:
    """Whether x is NHWC, and the positions and channels of a tile of the sums over positions."""
    if not x.is_contiguous():
        return True, 32, 64
    size = min(256, triton.next_power_of_2(x.shape[2] * x.shape[3]))
    return False, size, 2 * BLOCK // size


def _position_weights_of(x: torch.Tensor, weights: Sequence[torch.Tensor], last: bool) -> torch.Tensor:
    """`squeeze.spatial_kernel` for maps x, (1, C, H, W) in float32."""
    k = torch.empty_like(x[:1], dtype=torch.float32)
    ws = [w.contiguous() for w in weights] + [weights[0]] * (3 - len(weights))
    _position_weights[(triton.cdiv(k.numel(), BLOCK),)](
        *ws, k, x.shape[2], x.shape[3], x.shape[1], *_grids(weights), LAST=last, BLOCK=BLOCK)
    return k


def _grids(weights: Sequence[torch.Tensor]) -> List[int]:
    return [w.shape[-1] for w in weights] + [0] * (3 - len(weights))


def weighted_sum(x: torch.Tensor, weights: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """`squeeze.spatial_weighted_sum` of maps x (B, C, H, W) and up to three weights (C, 1, g, g), (B, C, 1, 1)."""
    batch, channels, height, width = x.shape
    last, p, c = _layout(x)
    out = torch.empty(batch, channels, 1, 1, dtype=dtype, device=x.device)
    _sum[(triton.cdiv(channels, c), batch)](
        x, _position_weights_of(x, weights, last), out, height * width, channels, LAST=last, P=p, C=c)
    return out


def weighted_sum_backward(
        x: torch.Tensor, weights: Sequence[torch.Tensor], grad: torch.Tensor,
) -> Tuple[torch.Tensor, List[torch.Tensor]]:
    """Gradients of x and of the weights."""
    batch, channels, height, width = x.shape
    last, *_ = _layout(x)
    blocks = triton.cdiv(x[0].numel(), BLOCK)
    num_parts = min(batch, triton.cdiv(2048, blocks))  # enough programs to fill a large GPU
    parts = torch.empty(num_parts * x[0].numel(), dtype=torch.float32, device=x.device)
    grad_x = torch.empty_like(x)
    _sum_backward[(blocks, num_parts)](
        x, _position_weights_of(x, weights, last), grad.contiguous(), grad_x, parts, batch, height * width, channels,
        LAST=last, BLOCK=BLOCK)
    averages = torch.empty(sum(w.numel() for w in weights), dtype=torch.float32, device=x.device)
    _average_cells[(triton.cdiv(channels, 32), averages.numel() // channels)](
        parts, averages, num_parts, height, width, channels, *_grids(weights), LAST=last, P=64, C=32)
    grads = averages.split([w.numel() for w in weights])
    return grad_x, [g.view_as(w).to(w.dtype) for g, w in zip(grads, weights)]


def residual_relu(x: torch.Tensor, gate: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
    """relu(x * gate + shortcut) of maps (B, C, H, W) and a gate (B, C, 1, 1)."""
    batch, channels, height, width = x.shape
    out = torch.empty_like(x)
    _residual_relu[(triton.cdiv(channels * height * width, BLOCK), batch)](
        x, gate.contiguous(), shortcut, out, height * width, channels, LAST=not x.is_contiguous(), BLOCK=BLOCK)
    return out


def residual_relu_backward(grad: torch.Tensor, out: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> Any:
    """Gradients of x, gate and shortcut."""
    batch, channels, height, width = x.shape
    last, p, c = _layout(x)
    gate = gate.contiguous()
    grads = torch.empty_like(x), torch.empty_like(gate), torch.empty_like(x)
    _residual_relu_backward[(triton.cdiv(channels, c), batch)](
        grad, out, x, gate, *grads, height * width, channels, LAST=last, P=p, C=c)
    return grads
