""" The kernels for a GPU, run by Triton's interpreter on a CPU, and when they are used. `.ci/gpu` has more """
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.common import images, tiny, training_step
from timm_sepool import fused
from timm_sepool.squeeze import _weighted_sum, spatial_weighted_sum


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).abs().max() / expected.abs().max()).item()


def use_interpreter() -> None:
    from timm_sepool import kernels
    fused._kernels = lambda device: kernels
    fused._is_on_gpu = lambda x: type(x) is torch.Tensor
    fused.SMALL = 0
    torch.cuda.device = lambda device: nullcontext()
    torch.cuda.is_current_stream_capturing = lambda: False


def check_formulas() -> None:
    """Outputs, gradients and, in float32, second derivatives are those of the formulas in float64."""
    use_interpreter()
    for dtype, fmt, size, grids in (
            (torch.float32, torch.contiguous_format, (2, 40, 7, 7), (1, 2, 4)),
            (torch.float32, torch.channels_last, (2, 5, 5, 9), (8,)),
            (torch.float32, torch.contiguous_format, (1, 3, 1, 1), (2, 3)),
            (torch.bfloat16, torch.channels_last, (2, 40, 7, 7), (1, 2, 4))):
        tensors = [t.to(dtype).requires_grad_() for t in (
            images(*size).to(memory_format=fmt), images(*size[:2], 1, 1).sigmoid(),
            images(*size).flip(0, 1).to(memory_format=fmt), *(images(size[1], 1, g, g) for g in grids))]
        wide = [t.detach().double().requires_grad_() for t in tensors]
        assert fused.serves_residual_relu(nn.ReLU(), tensors[0], tensors[2])
        pooled = [(nn.functional.adaptive_avg_pool2d(wide[0], w.shape[-1]) * w.squeeze(1)).sum((2, 3), True)
                  for w in wide[3:]]
        results = []
        for inputs, total, out in (
                (tensors, spatial_weighted_sum(tensors[0], tensors[3:]), fused.residual_relu(*tensors[:3])),
                (wide, sum(pooled), (wide[0] * wide[1] + wide[2]).relu())):
            loss = total.square().sum() + (out.square() * torch.arange(out.numel()).view_as(out).cos()).sum()
            first = torch.autograd.grad(loss, inputs, retain_graph=True)
            graph = torch.autograd.grad(loss, inputs, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in graph), inputs)
            results.append([total, out, *first, *graph] + [*second] * (dtype == torch.float32))
        for got, expected in zip(*results):
            assert got.shape == expected.shape
            assert error(got, expected) < (1e-5 if dtype == torch.float32 else 4e-2)


def check_autograd() -> None:
    """A graph of the gradients, batches of gradients and hooks: as with torch's operations, which then compute them."""
    use_interpreter()
    x, gate, shortcut, *weights = (
        t.requires_grad_() for t in (
            images(2, 4, 5, 6), images(2, 4, 1, 1), images(2, 4, 5, 6).flip(0), images(4, 1, 1, 1), images(4, 1, 3, 3)))
    for t, factor in ((weights[0], 2), (x, 3)):
        t.register_hook(lambda g, factor=factor: factor * g)
    total, out = spatial_weighted_sum(x, weights), fused.residual_relu(x, gate, shortcut)
    plain = _weighted_sum(x, weights), (x * gate + shortcut).relu()
    assert {type(t.grad_fn).__name__ for t in (total, out)} == {'_WeightedSumBackward', '_ResidualReLUBackward'}
    for ours, theirs, inputs in ((total, plain[0], [x, *weights]), (out, plain[1], [x, gate, shortcut])):
        for batch, options in (((), dict(create_graph=True)), ((3,), dict(is_grads_batched=True, retain_graph=True))):
            cotangent = torch.randn(*batch, *ours.shape)
            got, expected = (torch.autograd.grad(t, inputs, cotangent, **options) for t in (ours, theirs))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for wrong in (images(3, 1, 2, 2), images(1, 1, 2, 2)):  # torch refuses the first and broadcasts the second
        assert fused.weighted_sum(x, [wrong], _weighted_sum) is None
    assert fused.residual_relu(x, gate, shortcut.mT.contiguous().mT).grad_fn.name() == 'ReluBackward0'


def check_network() -> None:
    """A training step is that of torch's operations. Every block is fused but one, whose ReLU has a hook."""
    model, x, calls = tiny('spse_resnet50', channels=(4, 8, 16, 32)).train(), images(4, 40, 24), []
    loss, grads = training_step(model, x)
    use_interpreter()
    function = fused.residual_relu
    fused.residual_relu = lambda *args: (calls.append('fused'), function(*args))[1]
    model.layer1[0].act3.register_forward_hook(lambda *args: calls.append('hook'))
    got, got_grads = training_step(model, x)
    assert error(got, loss) < 1e-6
    assert max(error(got_grads[k], v) for k, v in grads.items() if v.abs().max() > 1e-6) < 1e-4
    assert calls == ['hook', 'fused', 'fused', 'fused']


@pytest.mark.parametrize('check', ['check_formulas', 'check_autograd', 'check_network'])
def test_kernels(check: str) -> None:
    pytest.importorskip('triton', '3.8')  # torch brings it on Linux; older interpreters fail with NumPy 2.4
    subprocess.run(
        [sys.executable, '-c', f'import test_fused; test_fused.{check}()'], cwd=Path(__file__).parent, check=True,
        env={**os.environ, 'TRITON_INTERPRET': '1'})  # read when triton is imported


def test_without_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A GPU for which Triton builds nothing: one warning that says what to do, and torch's operations."""
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, 'timm_sepool.kernels', None)
    assert fused._kernels.__wrapped__(torch.device('cpu')) is None
    assert 'Install triton and a C compiler' in caplog.text
