""" The squeezes: precisions, memory, transforms, arguments and errors. test_properties.py has the formulas """
import copy
from functools import partial

import pytest
import torch
from functorch.compile import aot_module, nop
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from helpers import reference
from helpers.common import FULL
from timm_sepool import inference
from timm_sepool.squeeze import RGSEModule, SPSEModule, spatial_kernel, spatial_weighted_sum

CHANNELS = 24
MODULES = {'spse': SPSEModule, **{f'rgse_{grid}': partial(RGSEModule, grid=grid) for grid in (1, 4, 8)}}
formats = pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return reference.randomize(MODULES[name](CHANNELS, dtype=dtype))


@formats
@pytest.mark.parametrize('size', [(1, 1), (8, 12), (13, 29), (56, 56)] + [(100, 167)] * FULL, ids=str)
@pytest.mark.parametrize('name', MODULES)
def test_gate_in_float32_and_autocast(name: str, size, memory_format: torch.memory_format) -> None:
    module = build(name).eval()
    x = torch.randn(3, CHANNELS, *size).contiguous(memory_format=memory_format)
    with torch.no_grad():
        expected = reference.squeeze_gate(copy.deepcopy(module).double(), x.double())
        torch.testing.assert_close(module.forward_gate(x).double(), expected, rtol=1e-5, atol=1e-5)
        for x_amp in (x, x.bfloat16()):  # float32 reaches the block if the norm before it is kept in float32
            with torch.autocast('cpu', torch.bfloat16):
                gate = module.forward_gate(x_amp)
            assert gate.dtype == torch.bfloat16
            torch.testing.assert_close(gate.double(), expected, rtol=0, atol=2e-2)


@formats
@pytest.mark.parametrize('size', [(56, 56), (7, 7), (199, 335)] + [(14, 14), (100, 167)] * FULL, ids=str)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('grids', [(1, 2, 4), (4,), (8,)], ids=str)
def test_half_precision(grids, dtype: torch.dtype, size, memory_format: torch.memory_format) -> None:
    """x in half precision and weights in float32, as under autocast: errors are random. No area is rounded (1 / 49 is
    off by 0.2 % in bfloat16), no sum over a window exceeds float16's range, and no small weight over the area of a
    large map falls below it."""
    large = size == (199, 335)
    weights = [(1e-3 if large else 1.) * torch.rand(CHANNELS, 1, g, g) / g for g in grids]
    x = 96. + 20. * torch.randn(1 if large else 8, CHANNELS, *size)
    x = x.to(dtype).contiguous(memory_format=memory_format)
    doubles = [w.double() for w in weights]
    expected, exact = reference.weighted_sum(x.double(), doubles), spatial_kernel(*size, doubles)
    for autocast in (False, True):
        with torch.autocast('cpu', dtype, enabled=autocast):
            got, kernel = spatial_weighted_sum(x, weights), spatial_kernel(*size, weights)
        assert got.dtype == torch.float32 and got.isfinite().all()
        assert kernel.dtype == (dtype if autocast else torch.float32)
        for ours, theirs in ((got, expected), *[(kernel, exact)] * (not large)):
            ratio = (ours.double() * theirs).sum() / theirs.square().sum()
            assert ratio.item() == pytest.approx(1., abs=3e-4)


@pytest.mark.parametrize('size', [(16, 20), (9, 15)], ids=str)
@pytest.mark.parametrize('name', ['spse', 'rgse_4', 'rgse_1'])
def test_functorch(name: str, size) -> None:
    """vmap over images and over modules, gradients per image. What one mode keeps serves the next, and training."""
    module = build(name, torch.float64).eval()
    x = torch.randn(3, CHANNELS, *size, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        module(x)
    with torch.no_grad():
        for _ in range(2):  # fake tensors, then real ones
            torch.testing.assert_close(aot_module(module, nop)(x[:1]), module(x[:1]))
    torch.testing.assert_close(torch.vmap(lambda image: module(image[None])[0])(x), module(x))
    grads = torch.vmap(torch.func.grad(lambda image: module(image[None]).square().sum()))(x)
    torch.testing.assert_close(grads, *torch.autograd.grad(module(x).square().sum(), x))
    modules = [module, build(name, torch.float64).eval()]
    call = partial(torch.func.functional_call, module, args=(x.contiguous(memory_format=torch.channels_last),))
    stacked = torch.vmap(lambda *state: call(state))(*torch.func.stack_module_state(modules))
    torch.testing.assert_close(stacked, torch.stack([m(x) for m in modules]))


def test_plain_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only plain inference has the forms that keep tensors and fit one size."""
    class Subclass(torch.Tensor):
        pass

    x, weights = torch.randn(2, CHANNELS, 8, 12), [torch.randn(CHANNELS, 1, g, g) for g in (1, 2, 4)]
    squeeze = partial(spatial_weighted_sum, weights=weights)
    monkeypatch.setattr(inference, '_tiled_sum', lambda *args: pytest.fail('called'))
    with torch.no_grad():
        with pytest.raises(pytest.fail.Exception):
            squeeze(x)
        expected = reference.weighted_sum(x, weights)
        torch.testing.assert_close(torch.vmap(squeeze)(x[None])[0], expected)
        torch.testing.assert_close(torch.func.functionalize(squeeze)(x), expected)
        torch.testing.assert_close(squeeze(x.as_subclass(Subclass)).as_subclass(torch.Tensor), expected)
        with FlopCounterMode(display=False):
            torch.testing.assert_close(squeeze(x), expected)
        with torch.autocast('cpu', torch.bfloat16):
            torch.testing.assert_close(squeeze(x), expected)
        for halves in ((0,), (2,), range(4)):
            half, *halved = [t.bfloat16() if i in halves else t for i, t in enumerate((x, *weights))]
            torch.testing.assert_close(spatial_weighted_sum(half, halved).float(), expected, rtol=0, atol=.1)
    torch.testing.assert_close(squeeze(x), expected)


@formats
@pytest.mark.parametrize('size', [(56, 56), (14, 14), (15, 22)], ids=str)
@pytest.mark.parametrize('name', ['spse', 'rgse_8'])
def test_layout_and_memory(name: str, size, memory_format: torch.memory_format) -> None:
    """Output and gradient keep x's memory format, nothing copies x, and the backward keeps no other tensor of its size.

    The pooling's backward would copy x if it got a gradient of another format."""
    module = build(name)
    x = torch.randn(3, CHANNELS, *size).contiguous(memory_format=memory_format).requires_grad_()
    saved, copied, incoming = [], [], []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.avg_pool2d_backward.default:
                incoming.append(args[0].is_contiguous(memory_format=memory_format))
            elif func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
                copied.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    with Record(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gate = module.forward_gate(x)
        out = x * gate
        grad, = torch.autograd.grad(gate.sum(), x)
    assert all(t.is_contiguous(memory_format=memory_format) for t in (out, grad))
    assert all(incoming) and all(n < x.numel() for n in copied)
    storages, own = [t.untyped_storage() for t in saved], x.untyped_storage()
    assert all(s.nbytes() < own.nbytes() or s.data_ptr() == own.data_ptr() for s in storages)


def test_errors() -> None:
    """A grid is a positive integer. The norm's own errors pass; test_sepool_resnet.py has that of a batch of one."""
    for grid in (0, -1, 2.0, '4', None, True, (2, 2)):
        with pytest.raises(ValueError, match='grid must be a positive integer'):
            RGSEModule(CHANNELS, grid=grid)
    with pytest.raises(ValueError, match='expected 2D or 3D input'):
        SPSEModule(CHANNELS, norm_layer=nn.BatchNorm1d)(torch.randn(2, CHANNELS, 8, 8))


def test_arguments() -> None:
    """timm's SE arguments, by its names and with its defaults. test_sepool_resnet.py has the initialization."""
    assert SPSEModule(256).fc1.out_channels == 16
    assert SPSEModule(256, rd_ratio=1 / 4).fc1.out_channels == 64
    assert SPSEModule(250, rd_ratio=1 / 4, rd_divisor=1).fc1.out_channels == 63
    assert RGSEModule(256, 8, rd_channels=10).fc2.in_channels == 10
    module = RGSEModule(256, 4, act_layer=nn.SiLU, norm_layer=None, gate_layer='hard_sigmoid')
    assert isinstance(module.act, nn.SiLU) and isinstance(module.bn, nn.Identity)
    assert module(torch.full((1, 256, 9, 9), 1e3)).isfinite().all()
    assert module.gate(torch.tensor(10.)) == 1  # hard: reached, not approached
    module = SPSEModule(256, norm_layer=partial(nn.GroupNorm, 8), device='meta', dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {('meta', torch.bfloat16)}
    assert SPSEModule(256, norm_layer=partial(nn.GroupNorm, 8))(torch.randn(1, 256, 7, 7)).shape == (1, 256, 7, 7)
