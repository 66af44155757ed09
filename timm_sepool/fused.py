""" Where the Triton kernels of `kernels` compute the squeeze and the residual sum on a GPU, and their gradients

Only in plain eager mode. `torch.compile` fuses the operations of torch itself. Exporters, traces, transforms of
`torch.func`, other devices and GPUs for which Triton cannot build kernels get the operations of torch.
"""
import functools
import logging
from typing import Any, Callable, List, Optional, Sequence, Set

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.parameter import Parameter

from ._private import count_dispatch_modes, functorch_is_active, has_hooks

_logger = logging.getLogger(__name__)

SMALL = 2 ** 22  # for maps of fewer numbers torch's operations are faster, because kernels take longer to launch
_tried: Set[torch.device] = set()


@functools.lru_cache(None)
def _kernels(device: torch.device) -> Any:
    """The module `kernels` if it works on this device, else None."""
    _tried.add(device)
    if not torch.version.cuda or torch.cuda.get_device_capability(device) < (8, 0):
        return None  # AMD and older GPUs were never tried
    try:
        from . import kernels
        with torch.cuda.device(device):
            x = torch.ones(1, 1, 2, 2, dtype=torch.float32, device=device)
            total = kernels.weighted_sum(x, [x], x.dtype)
            grad_x, (grad_weight,) = kernels.weighted_sum_backward(x, [x], total)
            out = kernels.residual_relu(grad_x, total, grad_weight)
            results = [total, out, *kernels.residual_relu_backward(x, out, grad_x, total)]
            if [t.sum().item() for t in results] != [4., 80., 16., 16., 4.]:
                raise RuntimeError('wrong results')
        return kernels
    except torch.cuda.OutOfMemoryError:
        raise  # and try again in the next call
    except Exception as e:  # no Triton, no C compiler, no writable cache, an unknown GPU: of any type
        reason = f'{type(e).__name__}: {e}'.splitlines()[0]
        _logger.warning(
            f'Triton cannot build the GPU kernels of timm_sepool ({reason}). The networks use the slower operations of '
            'torch. Install triton and a C compiler, or compile the network with torch.compile.')
        return None


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _is_on_gpu(x: torch.Tensor) -> bool:
    """Whether x is a tensor on a GPU in eager mode. Every attribute of an fx proxy is true, so its type comes first."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return type(x) is torch.Tensor and x.is_cuda


def _is_ordinary(t: torch.Tensor, device: torch.device) -> bool:
    """Whether a kernel can read t, and saves it for a backward if there will be one."""
    if type(t) not in (torch.Tensor, Parameter) or t.device != device or t.is_inference() and torch.is_grad_enabled():
        return False
    if t.dtype not in (torch.float32, torch.float16, torch.bfloat16) or forward_ad.unpack_dual(t).tangent is not None:
        return False
    try:
        t.data_ptr()
        return True
    except RuntimeError:  # a batched tensor, of is_grads_batched for example
        return False


def _serves(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the kernels serve for maps x (B, C, H, W), which are on a GPU, and other tensors."""
    if functorch_is_active() or count_dispatch_modes():
        return False
    if not all(_is_ordinary(t, x.device) for t in (x, *others)) or x.dim() != 4 or x.numel() == 0:
        return False
    if not x.is_contiguous(memory_format=_memory_format(x)) or len(x) >= 2 ** 16 or x[0].numel() >= 2 ** 31:
        return False
    with torch.cuda.device(x.device):
        if x.device not in _tried and torch.cuda.is_current_stream_capturing():
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
        if not torch.is_grad_enabled() and _serves(x, grad, *weights):
            with torch.cuda.device(x.device):
                grad_x, grad_weights = _kernels(x.device).weighted_sum_backward(x, weights, grad)
            return None, grad_x, *grad_weights
        needed = ctx.needs_input_grad[1:]
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            tensors = [t.view_as(t) for t in (x, *weights)]  # or the hooks of x and the weights would run twice
            out = ctx.plain(tensors[0], tensors[1:])
            inputs = [t for t, is_needed in zip(tensors, needed) if is_needed]
            grads = iter(torch.autograd.grad(out, inputs, grad, create_graph=create_graph))
        return None, *(next(grads) if is_needed else None for is_needed in needed)


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
        if torch.is_grad_enabled() or not _serves(x, gate, out, grad):
            grad = torch.where(out <= 0, torch.zeros_like(grad), grad)
            return grad * gate, (grad * x).sum((2, 3), keepdim=True), grad
        with torch.cuda.device(x.device):
            grad, out = (t.contiguous(memory_format=_memory_format(x)) for t in (grad, out))
            return _kernels(x.device).residual_relu_backward(grad, out, x, gate)


def weighted_sum(x: torch.Tensor, weights: List[torch.Tensor], plain: Callable) -> Optional[torch.Tensor]:
    """`plain(x, weights)`, which is `squeeze.spatial_weighted_sum`, by kernels, or None where they do not serve."""
    grid = weights[-1].shape[-1]
    if not _is_on_gpu(x) or len(weights) > 3 or any(w.shape != (x.shape[1], 1, *w.shape[-1:] * 2) for w in weights):
        return None
    if x.numel() < SMALL and x.shape[2] % grid == 0 and x.shape[3] % grid == 0:  # if cells overlap, torch launches more
        return None
    if not _serves(x, *weights):
        return None
    with torch.cuda.device(x.device):
        if not torch.is_grad_enabled():  # saves half the time of small maps, which autograd.Function takes
            return _WeightedSum.compute(x, weights)
        return _WeightedSum.apply(plain, x, *weights)


def _serve_as_residual(x: torch.Tensor, shortcut: torch.Tensor) -> bool:
    return (
        _serves(x, shortcut) and x.dtype == shortcut.dtype and x.shape == shortcut.shape
        and shortcut.is_contiguous(memory_format=_memory_format(x)))


def serves_residual_relu(act: nn.Module, x: torch.Tensor, shortcut: torch.Tensor) -> bool:
    """Whether `residual_relu` may compute act(x * gate + shortcut) without a call of act."""
    if not _is_on_gpu(x) or x.numel() < SMALL or getattr(act.forward, '__func__', None) is not nn.ReLU.forward:
        return False
    return not has_hooks(act) and _serve_as_residual(x, shortcut)


def residual_relu(x: torch.Tensor, gate: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
    """relu(x * gate + shortcut) of maps (B, C, H, W) and a gate (B, C, 1, 1), by a kernel if it serves for them."""
    if gate.dtype != x.dtype or gate.shape != (*x.shape[:2], 1, 1) or not (
            _is_ordinary(gate, x.device) and _serve_as_residual(x, shortcut)):
        return (x * gate + shortcut).relu()
    with torch.cuda.device(x.device):
        return _ResidualReLU.apply(x, gate, shortcut)
