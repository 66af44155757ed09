""" The squeeze in plain inference: on a CPU, in eager mode, without gradients

Each map gets the form that was measured to be the fastest (docs/speed.md). Some of these forms have a slow backward,
others a gradient in another memory format than that of x, and in a graph they would fit one size only.
"""
import array
import functools
from typing import Callable, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch.nn.parameter import Parameter

from ._private import autocast_is_on, count_dispatch_modes, functorch_is_active


@functools.lru_cache(maxsize=64)
def _average_numbers(height: int, width: int, grids: Tuple[Tuple[int, int], ...], typecode: str) -> array.array:
    """The numbers of `cell_averages`, row by row. Fake tensors and make_fx refuse a kept tensor, but take numbers."""
    def averages(size: int, grid: int) -> List[List[float]]:
        windows = [(i * size // grid, ((i + 1) * size + grid - 1) // grid) for i in range(grid)]
        return [[1. / (stop - start) if start <= pos < stop else 0. for pos in range(size)] for start, stop in windows]

    return array.array(typecode, [
        r * c for rows, cols in grids for row in averages(height, rows) for col in averages(width, cols)
        for r in row for c in col])


@torch.jit.unused
def cell_averages(height: int, width: int, grids: List[Tuple[int, int]], dtype: torch.dtype) -> torch.Tensor:
    """Matrix (sum of rows * cols, H * W) that averages over each cell of every grid, float32 or float64, on the CPU."""
    numbers = _average_numbers(int(height), int(width), tuple(grids), 'd' if dtype == torch.float64 else 'f')
    # as in torch.tensor, lift_fresh makes it a tensor of the current mode (fake tensors, make_fx)
    return torch.ops.aten.lift_fresh.default(torch.frombuffer(numbers, dtype=dtype)).view(-1, height * width)


@functools.lru_cache(maxsize=64)
def _kept_averages(height: int, width: int, grids: Tuple[Tuple[int, int], ...], dtype: torch.dtype) -> torch.Tensor:
    return cell_averages(height, width, list(grids), dtype)


def _is_plain(x: torch.Tensor, weights: List[torch.Tensor]) -> bool:
    """Whether this is plain inference. Dispatch modes, transforms and subclasses of Tensor may refuse kept tensors."""
    # between two layers of a network x.device.type takes 21 us, because its code has left the cache, and x.is_cpu 1 us
    if (torch.is_grad_enabled() or not x.is_cpu or torch.jit.is_tracing() or torch.compiler.is_compiling()
            or autocast_is_on() or count_dispatch_modes() or functorch_is_active()):
        return False
    return x.dtype in (torch.float32, torch.float64) and all([
        type(t) in (torch.Tensor, Parameter) and t.dtype == x.dtype for t in (x, *weights)])


def weighted_sum(x: torch.Tensor, weights: List[torch.Tensor], spatial_kernel: Callable) -> Optional[torch.Tensor]:
    """`squeeze.spatial_weighted_sum`, or None where a form of `squeeze` is to compute it, as in training."""
    if not _is_plain(x, weights):
        return None
    batch, channels, height, width = x.shape
    positions = height * width
    nhwc = x.stride(1) == 1 and not x.is_contiguous()
    if _tile(x, weights):
        return _tiled_sum(x, weights, nhwc)
    if (nhwc and (batch == 1 or positions > 100)) or (batch <= 2 and positions > 1024):
        return _pooled_sum(x, weights, nhwc)
    if batch == 1:
        # one product with the windows of all cells
        averages = _kept_averages(height, width, tuple([(w.shape[-1], w.shape[-1]) for w in weights]), x.dtype)
        weight = torch.cat([w.flatten(1).t() for w in weights])
        return (weight * (averages @ x.reshape(channels, -1).t())).sum(0).view(1, -1, 1, 1)
    if nhwc or channels * positions < 2 ** 18 or batch == 0:
        return None
    kernel = spatial_kernel(height, width, weights)  # its product with one image stays in the cache
    return torch.stack([(image * kernel).sum(1) for image in x.flatten(2)]).view(batch, channels, 1, 1)


def _tile(x: torch.Tensor, weights: List[torch.Tensor]) -> bool:
    """Whether the cells of the finest grid tile x and each cell of the other grids is a block of them."""
    grid = weights[-1].shape[-1]
    return all([size % grid == 0 for size in x.shape[2:]]) and all([grid % w.shape[-1] == 0 for w in weights])


def _tiled_sum(x: torch.Tensor, weights: List[torch.Tensor], nhwc: bool) -> torch.Tensor:
    batch, channels, height, width = x.shape
    grid = weights[-1].shape[-1]
    # each coarser cell is a block of cells of the finest grid, so its weight is spread over them
    weight = weights[-1]
    for w in weights[:-1]:
        g = w.shape[-1]
        if g == 1:
            weight = torch.add(weight, w, alpha=1. / (grid * grid))
        else:
            spread = _kept_averages(grid, grid, ((g, g),), x.dtype)
            weight = torch.addmm(weight.flatten(1), w.flatten(1), spread).view(-1, 1, grid, grid)
    if nhwc:
        cells = F.avg_pool2d(x, (height // grid, width // grid))
    elif height // grid * width <= 1024 and (grid <= 4 or width < 28):
        # one product for each row of cells
        averages = _kept_averages(height // grid, width, ((1, grid),), x.dtype)
        cells = (x.reshape(-1, averages.shape[1]) @ averages.t()).view(batch, channels, grid, grid)
    else:
        cells = x.unflatten(2, (grid, height // grid)).mean(3).unflatten(3, (grid, width // grid)).mean(4)
    return (cells * weight.transpose(0, 1)).sum((2, 3), keepdim=True)


def _pooled_sum(x: torch.Tensor, weights: List[torch.Tensor], nhwc: bool) -> torch.Tensor:
    """Pool to the finest grid, then to the coarser ones."""
    *coarser, finest = weights
    s = (F.adaptive_avg_pool2d(x, finest.shape[-1]) * finest.transpose(0, 1)).sum((2, 3), keepdim=True)
    if not coarser:
        return s
    return s + (_tiled_sum if _tile(x, coarser) else _pooled_sum)(x, coarser, nhwc)
