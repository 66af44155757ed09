""" The benchmark as a program: what it counts and reports, not how fast anything is """
import json
import statistics
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from helpers import reference
from helpers.common import NAMES, TINY, images, tiny
from timm_sepool.cli import bench as bench_module
from timm_sepool.cli._output import CommandError
from timm_sepool.cli.bench import (
    PASSES,
    bench,
    create_network,
    interleave,
    plot,
    reference_gate,
    saved_bytes,
    summary,
    table,
)
from timm_sepool.cli.main import main
from timm_sepool.squeeze import SEPoolModule

SMALL = dict(batch_size=2, size=(32, 32), rounds=3, model_kwargs=dict(TINY, num_classes=1000))


def run(models=('rgse_resnet50', 'resnet50+eca'), peer='seresnet50', **kwargs):
    return bench(list(models), peer, **{**SMALL, **kwargs})


@pytest.mark.parametrize('name', NAMES[::5])
def test_reference_is_the_network(name: str) -> None:
    """The block as the paper writes it: the same output and gradients, from the same parameters."""
    ours = tiny(name).double()
    theirs = create_network(f'{name}+reference', **TINY, num_classes=10).double().eval()
    theirs.load_state_dict({k.replace('.se.', '.se.module.'): v for k, v in ours.state_dict().items()})
    assert not any(isinstance(m.se, SEPoolModule) for m in theirs.modules() if hasattr(m, 'conv3'))
    x = images(2, 97, 131, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (ours, theirs)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    se = ours.layer1[0].se
    torch.testing.assert_close(
        reference_gate(se, images(2, 64, 9, 9, dtype=torch.float64)),
        reference.squeeze_gate(se, images(2, 64, 9, 9, dtype=torch.float64)))


def test_networks() -> None:
    assert type(create_network('resnet50+cbam', **TINY).layer1[0].se).__name__ == 'CbamModule'
    assert type(create_network('resnet50+eca', **TINY).layer1[0].se).__name__ == 'EcaModule'
    assert create_network('resnet50', **TINY).layer1[0].se is None


def test_interleave() -> None:
    """Every round takes all once, the one that warms up does not count and the order changes."""
    calls, now = [], iter(range(1000))
    times = interleave(
        {k: lambda k=k: calls.append(k) for k in 'abcd'}, lambda step, n: (step(), float(next(now)))[1], 8, 1)
    rounds = [''.join(calls[i:i + 4]) for i in range(0, len(calls), 4)]
    assert len(rounds) == 9 and {''.join(sorted(r)) for r in rounds} == {'abcd'} and len(set(rounds)) > 3
    assert times == {k: [4. * i + rounds[i].index(k) for i in range(1, 9)] for k in 'abcd'}


def test_summary() -> None:
    times = {'peer': [10., 30., 20., 20., 22.], 'it': [5., 10., 11., 40., 10.]}
    rows = summary(times, 'peer')
    assert rows['it']['ms'] == statistics.median(times['it']) == 10.
    assert rows['it']['ratio'] == 20. / 10. and rows['peer']['ratio'] == 1.
    # rounds' ratios 2, 3, 1.82, 0.5, 2.2
    assert rows['it']['ratio_low'] == pytest.approx(20 / 11) and rows['it']['ratio_high'] == pytest.approx(2.2)
    assert rows['it']['spread'] == pytest.approx((11. - 10.) / 10.)
    assert summary({'peer': [4.], 'it': [2.]}, 'peer')['it']['ratio'] == 2.


def test_saved_bytes() -> None:
    """By hand: a ReLU keeps its result, the product its two factors; x and parameters are there anyway."""
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 4, 8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.weight).relu() * self.weight

    assert saved_bytes(Net(), torch.randn(2, 4, 8, 8)) == 2 * 4 * 8 * 8 * 4
    # the squeeze keeps no more of x's size than timm's SE
    x = images(2, 224, 224)
    specs = ('seresnet50', 'rgse_resnet50', 'spse_resnet50')
    kept = {spec: saved_bytes(create_network(spec, **TINY).train(), x) for spec in specs}
    assert max(kept['rgse_resnet50'], kept['spse_resnet50']) < 1.02 * kept['seresnet50'], kept
    assert saved_bytes(create_network('rgse_resnet50+reference', **TINY).train(), x) > 0


def test_report() -> None:
    report = run(blocks=True, channels_last=True, amp=True)
    assert [(r['model'], r['mode']) for r in report['results']] == [
        (m, mode) for mode in ('infer', 'train') for m in ('seresnet50', 'rgse_resnet50', 'resnet50+eca')]
    for row in report['results']:
        assert row['ms'] > 0 and row['images_per_s'] == pytest.approx(2e3 / row['ms'])
        assert ('saved_mb' in row) == (row['mode'] == 'train')
    assert {(b['stage'], b['mode']) for b in report['blocks']} == {(s, m) for s in (1, 2, 3, 4) for m in PASSES}
    assert report['blocks'][0]['mb'] == 2 * 64 * 8 * 8 * 2 / 1e6  # stage 1 of TINY at 32 px in bfloat16
    assert all(b['roofline'] > 0 for b in report['blocks'])
    assert json.loads(json.dumps(report))['blocks'] == report['blocks']
    text = table(report)
    assert all(m in text for m in ('seresnet50', 'rgse_resnet50', 'resnet50+eca', 'channels_last', 'amp', '32 x 32'))


def test_steps() -> None:
    """Inference leaves no gradient, a training step has gradients and the optimizer's state, weights stay."""
    model = create_network('rgse_resnet50', **TINY, num_classes=3)
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert (create_network('seresnet50', **TINY).layer1[0].bn3.weight == 1).all()
    before = model.conv1.weight.detach().clone()
    x = images(4, 32, 32)
    bench_module._step(model.eval(), x, 'infer', nullcontext)()
    assert model.conv1.weight.grad is None
    steps = []
    original = torch.optim.SGD.step
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.optim.SGD, 'step', lambda self: (steps.append(self), original(self)))
        bench_module._step(model.train(), x, 'train', nullcontext)()
    assert model.conv1.weight.grad.abs().sum() > 0 and model.layer4[0].se.fc2.weight.grad is not None
    assert len(steps) == 1 and steps[0].state[model.conv1.weight]['momentum_buffer'].abs().sum() > 0
    assert torch.equal(model.conv1.weight, before)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('spec', ['seresnet50', 'rgse_resnet50', 'spse_resnet50+reference', 'resnet50+cbam'])
def test_block_is_all_after_bn3(spec: str, memory_format, monkeypatch) -> None:
    tensors = []
    original = torch.randn
    monkeypatch.setattr(torch, 'randn', lambda *a, **k: (tensors.append(original(*a, **k)), tensors[-1])[1])
    block = create_network(spec, **TINY).layer2[-1]
    like = images(1, 8, 8).to(memory_format=memory_format)
    tensors.clear()
    out = bench_module._block_step(block, (3, 128, 14, 14), 'infer', like, nullcontext)()
    x, shortcut, _ = tensors
    block.eval()
    with torch.no_grad():
        torch.testing.assert_close(out, (block.se(x) + shortcut).relu())
    assert out.is_contiguous(memory_format=memory_format)
    tensors.clear()
    grad = bench_module._block_step(block, (3, 128, 14, 14), 'train', like, nullcontext)()
    x, shortcut, cotangent = (t.detach().requires_grad_() for t in tensors)
    block.train()
    expected, = torch.autograd.grad((block.se(x) + shortcut).relu(), x, cotangent)
    torch.testing.assert_close(grad, expected)


def test_roofline(monkeypatch) -> None:
    """By hand: 4 passes forward at the bandwidth of a copy, which are 2, and 10 forward and backward."""
    class Clock:
        def __init__(self, device) -> None:
            pass

        def __call__(self, step, repeats: int) -> float:
            step()
            return 3. if getattr(getattr(step, 'func', None), '__name__', '') == 'copy_' else 12.

    monkeypatch.setattr(bench_module, '_Clock', Clock)
    for row in run(blocks=True, rounds=1)['blocks']:
        assert row['roofline'] == pytest.approx({'infer': 4, 'train': 10}[row['mode']] * (3. / 2) / 12.)


def test_networks_are_compiled(monkeypatch) -> None:
    """All of them, however many share a class: beyond the limit they would run uncompiled."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    original = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda model, **kwargs: original(model, backend=backend, **kwargs))
    with torch._dynamo.config.patch(cache_size_limit=1):
        run(['rgse_resnet50', 'resnet50'], compile=True, rounds=1, size=(32, 48))
    assert len(compiled) == 2 * 3


def test_plot(tmp_path) -> None:
    report = run(rounds=1)
    plot(report, tmp_path / 'bench.png')
    from PIL import Image
    with Image.open(tmp_path / 'bench.png') as image:
        assert image.size[0] == 960 and len(image.convert('RGB').getcolors(2 ** 20)) > 20
    with pytest.raises(CommandError, match='exists'):
        plot(report, tmp_path / 'bench.png')


def test_plot_content(tmp_path, monkeypatch) -> None:
    """Bars are the report's ratios, labelled by model and mode."""
    from matplotlib.figure import Figure
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda self, path, **_: (figures.append(self), path.write_bytes(b''))[1])
    report = run(rounds=2)
    plot(report, tmp_path / 'bench.png')
    axes = figures[0].axes[0]
    bars = [round(p.get_width(), 12) for p in axes.patches]
    assert sorted(bars) == sorted(round(r['ratio'], 12) for r in report['results'])
    assert [t.get_text() for t in axes.get_yticklabels()] == ['resnet50+eca', 'rgse_resnet50', 'seresnet50']
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ['inference', 'training step']
    assert 'seresnet50' in axes.get_xlabel() and '32 x 32' in axes.get_title()


def test_command(tmp_path, capsys) -> None:
    flags = ['--rounds', '1', '-b', '2', '--img-size', '32', '48', '--mode', 'infer']
    flags += ['--model-kwargs', 'layers=(1, 1, 1, 1)']
    assert main(['bench', 'rgse_resnet50', '--json', '--plot', str(tmp_path / 'b.png'), *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report['settings']['size'] == [32, 48] and (tmp_path / 'b.png').is_file()
    assert main(['bench', 'rgse_resnet50', *flags, '--threads', '1']) == 0
    assert 'relative to seresnet50' in capsys.readouterr().out


@pytest.mark.parametrize('args,message', [
    (['nonsense'], "Unknown model 'nonsense'"),
    (['resnet50+reference'], 'no SPSE / RGSE network'),
    (['resnet50+nonsense'], 'can not be created'),
    (['rgse_resnet50', '--peer', 'nonsense'], "Unknown model 'nonsense'"),
    (['rgse_resnet50', '-b', '0'], 'must be at least 1'),
    (['rgse_resnet50', '-b', '1', '--mode', 'train', '--img-size', '64'], 'rgse_resnet50 can not train'),
    (['rgse_resnet50', '--img-size', '1', '2', '3'], '--img-size takes'),
    (['rgse_resnet50', '--threads', '-1'], '--threads must be at least 1'),
    (['resnet18', '--peer', 'resnet18', '--blocks'], 'No network has the bottlenecks'),
    (['rgse_resnet50', '--blocks', '--compile'], 'not compiled'),
    (['rgse_resnet50', '--plot', 'x.pdf'], 'has to be named .png'),
    (['rgse_resnet50', '--device', 'meta'], 'has to be cpu or cuda'),
    (['rgse_resnet50', '--device', 'nonsense'], "has to be cpu or cuda, others run asynchronously, got 'nonsense'"),
    pytest.param(['rgse_resnet50', '--device', 'cuda'], "no device 'cuda'", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason='there is one')),
    (['vit_tiny_patch16_224', '--img-size', '48', '--mode', 'infer', '--peer', 'resnet18'], 'can not infer'),
])
def test_bad_input(args, message: str, capsys) -> None:
    assert main(['bench', *args]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and err.count('\n') == 0


def test_output_exists(tmp_path, capsys, monkeypatch) -> None:
    """Told before the work."""
    (tmp_path / 'b.png').write_text('mine')
    monkeypatch.setattr(bench_module, 'bench', None)
    assert main(['bench', 'rgse_resnet50', '--plot', str(tmp_path / 'b.png')]) == 2
    assert (tmp_path / 'b.png').read_text() == 'mine' and 'exists' in capsys.readouterr().err
