""" The squeezes against the formula with adaptive_avg_pool2d and depthwise conv2d (helpers/reference.py) """
import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import reference
from helpers.common import FULL, gradients
from timm.utils import freeze
from timm_sepool.squeeze import RGSEModule, SPSEModule, spatial_kernel, spatial_weighted_sum

CHANNELS = 24
MODULES = {
    'spse': SPSEModule,
    'rgse_8': partial(RGSEModule, grid=8),
    'rgse_4': partial(RGSEModule, grid=4),
    'rgse_2': partial(RGSEModule, grid=2),
    'rgse_1': partial(RGSEModule, grid=1),
    'rgse_3': partial(RGSEModule, grid=3),
}
# smaller than the grid, not divisible, non-square, stages at 224
SIZES = [(1, 1), (2, 3), (7, 7), (8, 12), (13, 29), (14, 14), (56, 56)]
SIZES += [(1, 9), (3, 3), (5, 4), (8, 8), (16, 24), (28, 28), (25, 33), (100, 167)] if FULL else []
FORMATS = {'channels_first': torch.contiguous_format, 'channels_last': torch.channels_last}


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A module with nothing at its trivial value."""
    module = MODULES[name](CHANNELS, dtype=dtype)
    with torch.no_grad():
        for n, p in module.named_parameters():
            if n.endswith('bias') or n.startswith('bias'):
                p.normal_(std=0.3)
        if isinstance(module.bn, nn.BatchNorm2d):
            module.bn.weight.uniform_(0.5, 1.5)
            module.bn.running_mean.normal_(std=0.1)
            module.bn.running_var.uniform_(0.05, 0.2)
    return module


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('size', SIZES, ids=lambda s: f'{s[0]}x{s[1]}')
@pytest.mark.parametrize('name', MODULES)
def test_equals_formula(name: str, size, memory_format: str) -> None:
    """Forward, gradients of x and of every parameter and the running statistics, float64, train and eval; then the gate
    in float32 and under bfloat16 autocast."""
    module = build(name)
    x = torch.randn(3, CHANNELS, *size, dtype=torch.float64).contiguous(memory_format=FORMATS[memory_format])
    for training in (True, False):
        ours, theirs = copy.deepcopy(module).train(training), copy.deepcopy(module).train(training)
        x_ours, x_theirs = x.clone().requires_grad_(), x.contiguous().clone().requires_grad_()
        got = gradients(lambda: ours(x_ours), [x_ours, *ours.parameters()])
        expected = gradients(
            lambda: x_theirs * reference.squeeze_gate(theirs, x_theirs), [x_theirs, *theirs.parameters()])
        buffers = [[b for n, b in m.named_buffers() if 'num_batches' not in n] for m in (ours, theirs)]
        for a, b in zip(got + buffers[0], expected + buffers[1]):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    module, x = module.float().eval(), x.float()
    with torch.no_grad():
        expected = reference.squeeze_gate(copy.deepcopy(module).double(), x.double())
        torch.testing.assert_close(module.forward_gate(x).double(), expected, rtol=1e-5, atol=1e-5)
        for x_amp in (x, x.bfloat16()):  # float32 reaches the block if the norm before it is kept in float32
            with torch.autocast('cpu', torch.bfloat16):
                gate = module.forward_gate(x_amp)
            assert gate.dtype == torch.bfloat16
            torch.testing.assert_close(gate.double(), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize('size', [(56, 56), (7, 7)] + [(14, 14), (100, 167)] * FULL, ids=lambda s: f'{s[0]}x{s[1]}')
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', ['spse', 'rgse_4', 'rgse_8'])
def test_half_precision(name: str, dtype: torch.dtype, memory_format: str, size) -> None:
    """As under autocast, x in half precision and weights in float32: errors are random. No area is rounded (1 / 49 is
    off by 0.2 % in bfloat16), and no sum over a window exceeds float16's range."""
    weights = [p.detach().abs() for n, p in build(name, torch.float32).named_parameters() if n.startswith('weight')]
    x = 96. + 20. * torch.randn(8, CHANNELS, *size)
    x = x.to(dtype).contiguous(memory_format=FORMATS[memory_format])
    expected = reference.weighted_sum(x.double(), [w.double() for w in weights])
    got = spatial_weighted_sum(x, weights)
    assert got.dtype == torch.float32 and got.isfinite().all()
    ratio = (got.double() * expected).sum() / expected.square().sum()
    assert ratio.item() == pytest.approx(1., abs=3e-4)
    assert spatial_weighted_sum(x, [w.to(dtype) for w in weights]).dtype == dtype


@pytest.mark.parametrize('name', ['spse', 'rgse_8'])
def test_fp16_autocast(name: str) -> None:
    """On a large map that the grid does not divide, small weights over the area are below float16's normal range."""
    weights = [1e-3 * p.detach() for n, p in build(name, torch.float32).named_parameters() if n.startswith('weight')]
    x = (1. + torch.randn(4, CHANNELS, 199, 335)).half()
    expected = reference.weighted_sum(x.double(), [w.double() for w in weights])
    with torch.autocast('cpu', torch.float16):
        got = spatial_weighted_sum(x, weights)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().mean().item())


@pytest.mark.parametrize('size', [(16, 16), (9, 14)], ids=str)
@pytest.mark.parametrize('name', ['spse', 'rgse_4', 'rgse_1'])
def test_functorch(name: str, size) -> None:
    """vmap over images, and gradients per image."""
    module = build(name).eval()
    x = torch.randn(3, CHANNELS, *size, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(lambda image: module(image[None])[0])(x), module(x))
    grads = torch.vmap(torch.func.grad(lambda image: module(image[None]).square().sum()))(x)
    x.requires_grad_()
    expected, = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize('grids', [(1, 2, 4), (4,)], ids=str)
def test_spatial_kernel_under_autocast(grids) -> None:
    """No area is rounded to bfloat16, which would scale all cells of a grid alike."""
    weights = [torch.rand(512, 1, g, g) for g in grids]
    expected = spatial_kernel(7, 7, weights)
    with torch.autocast('cpu', torch.bfloat16):
        got = spatial_kernel(7, 7, weights)
    assert got.dtype == torch.bfloat16
    assert (got / expected).mean().item() == pytest.approx(1., abs=2e-4)


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('size', [(56, 56), (14, 14), (15, 22)], ids=lambda s: f'{s[0]}x{s[1]}')
@pytest.mark.parametrize('name', ['spse', 'rgse_8'])
def test_layout_and_memory(name: str, size, memory_format: str) -> None:
    """Output and gradient keep x's memory format, nothing copies x, and the backward keeps no other tensor of its size.

    The pooling's backward would copy x if it got a gradient of another format."""
    module = build(name, torch.float32)
    x = torch.randn(3, CHANNELS, *size).contiguous(memory_format=FORMATS[memory_format]).requires_grad_()
    saved = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gate = module.forward_gate(x)
        out = x * gate
    assert out.is_contiguous(memory_format=FORMATS[memory_format])
    saved.pop(x.untyped_storage().data_ptr(), None)
    assert all(nbytes < x.untyped_storage().nbytes() for nbytes in saved.values())

    copied, incoming = [], []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.avg_pool2d_backward.default:
                incoming.append(args[0].is_contiguous(memory_format=FORMATS[memory_format]))
            elif func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
                copied.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    with Record():
        gate = module.forward_gate(x)
        grad, = torch.autograd.grad(gate.sum(), x)
    assert grad.is_contiguous(memory_format=FORMATS[memory_format])
    assert all(incoming)
    assert all(n < x.numel() for n in copied)


@pytest.mark.parametrize('name', ['spse', 'rgse_4'])
def test_batch_of_one(name: str) -> None:
    """Training on one image needs frozen statistics: the error says so, and then it trains."""
    module = build(name)
    x = torch.randn(1, CHANNELS, 14, 14, dtype=torch.float64)
    with pytest.raises(ValueError, match='larger batch, SyncBatchNorm .* or freeze the norms of the squeeze'):
        module(x)
    before = module.bn.running_mean.clone()
    freeze(module, 'bn')  # timm's: affine parameters and statistics
    module.train()
    module(x).sum().backward()
    assert module.fc1.weight.grad.abs().sum() > 0
    assert torch.equal(module.bn.running_mean, before)

    module = build(name)
    module.bn.eval()
    module(x).sum().backward()
    assert module.bn.weight.grad.abs().sum() > 0


def test_other_value_errors_pass() -> None:
    class Norm(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError('something else')

    with pytest.raises(ValueError, match='something else'):
        SPSEModule(CHANNELS, norm_layer=Norm)(torch.randn(2, CHANNELS, 8, 8))


@pytest.mark.parametrize('grid', [0, -1, 2.0, '4', None, True, (2, 2)])
def test_bad_grid(grid) -> None:
    with pytest.raises(ValueError, match='grid must be a positive integer'):
        RGSEModule(CHANNELS, grid=grid)


def test_arguments() -> None:
    """timm's SE arguments, by its names and with its defaults."""
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


@pytest.mark.parametrize('name', ['spse', 'rgse_8', 'rgse_1'])
def test_initialization(name: str) -> None:
    """Official: torch's default weights, zero biases, unit norm; also after to_empty."""
    module = MODULES[name](CHANNELS, device='meta').to_empty(device='cpu')
    for p in module.parameters():
        nn.init.constant_(p, float('nan'))
    module.init_weights()
    for n, p in module.named_parameters():
        if n == 'bn.weight':
            assert (p == 1).all()
        elif 'bias' in n:
            assert (p == 0).all()
        else:
            bound = p[0].numel() ** -0.5
            assert p.abs().max() <= bound
            if p.numel() >= 100:
                assert p.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.2)
            else:
                assert p.unique().numel() == p.numel()
