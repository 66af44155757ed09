""" When a GPU computes the squeeze and the residual sum by the Triton kernels of `kernels`, and their gradients

Only in plain eager mode. `torch.compile` fuses the operations of torch itself. Exporters, traces, transforms of
`torch.func`, other devices and GPUs for which Triton cannot build kernels get the operations of torch.
"""
import functools
import logging
from typing import Any, Callable, List, Optional, Sequence

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.parameter import Parameter

from . import _private

_logger = logging.getLogger(__name__)

# Smaller maps (numbers, 8 MB in half precision) take less time than the launches of kernels and their checks
SMALL = 2 ** 22


@functools.lru_cache(None)
def _kernels(device: torch.device) -> Any:
    """The module `kernels` if it works on this device, else None."""
    if not torch.version.cuda or torch.cuda.get_device_capability(device) < (8, 0):
        return None  # AMD and older GPUs were never tried
    try:
        from . import kernels
        with torch.cuda.device(device):
            x = torch.ones(1, 1, 2, 2, device=device)
            total = kernels.weighted_sum(x, [x], x.dtype)
            grad_x, (grad_weight,) = kernels.weighted_sum_backward(x, [x], total)
            out = kernels.residual_relu(grad_x, total, grad_weight)
            results = [total, out, *kernels.residual_relu_backward(x, out, grad_x, total)]
            if [t.sum().item() for t in results] != [4., 80., 16., 16., 4.]:
                raise RuntimeError('wrong results')
        return kernels
    except Exception as e:  # no Triton, no C compiler, no writable cache, an unknown GPU: of any type
        reason = f'{type(e).__name__}: {e}'.splitlines()[0]
        _logger.warning(
            f'Triton cannot build the GPU kernels of timm_sepool ({reason}). The networks use the slower operations of '
            'torch. Install triton and a C compiler, or compile the network with torch.compile.')
        return None


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _is_ordinary(t: torch.Tensor, device: torch.device) -> bool:
    """Whether kernels can read t: no fake tensor, no dual tensor, and of a dtype and device they know."""
    return (
        type(t) in (torch.Tensor, Parameter) and t.device == device
        and t.dtype in (torch.float32, torch.float16, torch.bfloat16) and forward_ad.unpack_dual(t).tangent is None)


def _is_on_gpu(x: torch.Tensor) -> bool:
    return not torch.compiler.is_compiling() and type(x) is torch.Tensor and x.is_cuda  # of a proxy, anything is true


def _serves(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the kernels serve for maps x (B, C, H, W) on a GPU, and other tensors."""
    if torch.jit.is_tracing() or _private.functorch_is_active() or _private.count_dispatch_modes():
        return False
    if not all(_is_ordinary(t, x.device) for t in (x, *others)) or x.dim() != 4 or x.numel() == 0:
        return False
    if not x.is_contiguous(memory_format=_memory_format(x)) or len(x) >= 2 ** 16 or x[0].numel() >= 2 ** 31:
        return False
    if torch.cuda.is_current_stream_capturing() and not _kernels.cache_info().currsize:
        return False  # the first call cannot be captured
    return _kernels(x.device) is not None


class _WeightedSum(torch.autograd.Function):
    """Sum over the positions of x (B, C, H, W), weighted by kernels (C, 1, g, g)."""

    @staticmethod
    def forward(ctx: Any, plain: Callable, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.plain = plain
        ctx.save_for_backward(x, *weights)
        return _WeightedSum.compute(x, weights)

    @staticmethod
    def compute(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        return _kernels(x.device).weighted_sum(x, weights, torch.promote_types(x.dtype, weights[-1].dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # the gradients get a graph, so torch computes them
            inputs = [t for t, is_needed in zip((x, *weights), needed) if is_needed]
            grads = iter(torch.autograd.grad(ctx.plain(x, weights), inputs, grad, create_graph=True))
            return None, *(next(grads) if is_needed else None for is_needed in needed)
        with torch.cuda.device(x.device):
            grad_x, grad_weights = _kernels(x.device).weighted_sum_backward(x, weights, grad)
        return None, grad_x, *grad_weights


class _ResidualReLU(torch.autograd.Function):
    """relu(x * gate + shortcut)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gate: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        out = _kernels(x.device).residual_relu(x, gate, shortcut)
        ctx.save_for_backward(x, gate, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, gate, out = ctx.saved_tensors
        if torch.is_grad_enabled():
            grad = grad.masked_fill(out <= 0, 0.)
            return grad * gate, (grad * x).sum((2, 3), keepdim=True), grad
        with torch.cuda.device(x.device):
            grad = grad.contiguous(memory_format=_memory_format(x))
            return _kernels(x.device).residual_relu_backward(grad, out, x, gate)


def weighted_sum(x: torch.Tensor, weights: List[torch.Tensor], plain: Callable) -> Optional[torch.Tensor]:
    """`plain(x, weights)`, which is `squeeze.spatial_weighted_sum`, by kernels, or None where they do not serve."""
    if not _is_on_gpu(x) or len(weights) > 3:
        return None
    grid = weights[-1].shape[-1]
    if x.numel() < SMALL and x.shape[2] % grid == 0 and x.shape[3] % grid == 0:  # torch has to launch little
        return None
    if not _serves(x, *weights):
        return None
    with torch.cuda.device(x.device):
        if not torch.is_grad_enabled():  # half the time of small maps
            return _WeightedSum.compute(x, weights)
        return _WeightedSum.apply(plain, x, *weights)


def serves_residual_relu(act: nn.Module, x: torch.Tensor, shortcut: torch.Tensor) -> bool:
    """Whether `residual_relu` may compute act(x * gate + shortcut) without a call of act."""
    if not _is_on_gpu(x) or x.numel() < SMALL or type(act) is not nn.ReLU or _private.has_hooks(act):
        return False
    return (
        _serves(x, shortcut) and x.dtype == shortcut.dtype and x.shape == shortcut.shape
        and shortcut.is_contiguous(memory_format=_memory_format(x)))


def residual_relu(x: torch.Tensor, gate: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
    """relu(x * gate + shortcut), for x and shortcut (B, C, H, W) that `serves_residual_relu`, and gate (B, C, 1, 1)."""
    if gate.dtype != x.dtype or gate.shape != (*x.shape[:2], 1, 1) or not _is_ordinary(gate, x.device):
        return (x * gate + shortcut).relu()
    with torch.cuda.device(x.device):
        return _ResidualReLU.apply(x, gate, shortcut)
