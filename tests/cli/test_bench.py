""" The benchmark: what it runs, counts and reports, not how fast anything is """
import json
import time
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from helpers.common import NAMES, TINY, images, tiny
from helpers.runs import TINY_ARGS, check_fails
from timm_sepool.cli import _timing, bench
from timm_sepool.cli._timing import Clock, create_network, interleave, saved_bytes, summarize
from timm_sepool.cli.main import main

MODELS = ('seresnet50', 'rgse_resnet50', 'resnet50+eca')
SMALL = [*'-b 2 --img-size 32 48 --rounds 3'.split(), *TINY_ARGS]


@pytest.mark.parametrize('name', NAMES[::5])
def test_reference_is_the_network(name: str) -> None:
    """The block as the paper writes it, from the same parameters, and in a network of ours."""
    ours = tiny(name).double()
    theirs = create_network(f'{name}+reference', **TINY, num_classes=10).double().eval()
    theirs.load_state_dict({k.replace('.se.', '.se.module.'): v for k, v in ours.state_dict().items()})
    x = images(2, 97, 131, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_network_step(monkeypatch) -> None:
    """Inference leaves no gradient; a training step has gradients and the optimizer's state, the weights stay."""
    model, x, steps, step = create_network('resnet50+eca', **TINY), images(4, 32, 32), [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, 'step', lambda self: (steps.append(self), step(self)))
    weight, before = model.conv1.weight, model.conv1.weight.detach().clone()
    _timing.network_step(model.eval(), x, 'infer', nullcontext)()
    assert weight.grad is None and not steps and type(model.layer1[0].se).__name__ == 'EcaModule'
    _timing.network_step(model.train(), x, 'train', nullcontext)()
    assert weight.grad.abs().sum() > 0 and steps[0].state[weight]['momentum_buffer'].abs().sum() > 0
    assert len(steps) == 1 and torch.equal(weight, before)


@pytest.mark.parametrize('spec', ['seresnet50', 'rgse_resnet50', 'spse_resnet50+reference', 'resnet50+cbam'])
def test_block_step(spec: str, monkeypatch) -> None:
    """relu(attention(x) + shortcut) and its gradient."""
    tensors, randn = [], torch.randn
    monkeypatch.setattr(torch, 'randn', lambda *a, **k: (tensors.append(randn(*a, **k)), tensors[-1])[1])
    block = create_network(spec, **TINY).layer2[-1]
    memory_format = torch.channels_last if spec[0] == 'r' else torch.contiguous_format
    for mode in ('infer', 'train'):
        like = images(1, 8, 8).to(memory_format=memory_format)
        got = _timing.block_step(block, (3, 128, 14, 14), mode, like, nullcontext)()
        assert got.is_contiguous(memory_format=memory_format)
        x, shortcut, gradient = (t.detach().requires_grad_() for t in tensors[-3:])
        block.train(mode == 'train')
        out = (block.se(x) + shortcut).relu()
        torch.testing.assert_close(got, torch.autograd.grad(out, x, gradient)[0] if mode == 'train' else out.detach())


def test_networks_are_compiled(monkeypatch) -> None:
    """Also where they share a class and torch's limit would allow one compiled variant."""
    compiled, torch_compile = [], torch.compile
    monkeypatch.setattr(torch, 'compile', lambda model, **kwargs: torch_compile(
        model, backend=lambda graph, inputs: (compiled.append(graph), graph)[1], **kwargs))
    with torch._dynamo.config.patch(cache_size_limit=1):
        assert main(['bench', 'resnet18', '--peer', 'seresnet18', '--compile', '--mode', 'infer', *SMALL]) == 0
    assert len(compiled) == 2


def test_interleave() -> None:
    """Each round measures every function once, in changing order; the warm-up does not count; a clock's mean in ms."""
    calls, now = [], iter(range(1000))
    times = interleave(
        {k: lambda k=k: calls.append(k) for k in 'abcd'}, lambda step, n: (step(), float(next(now)))[1], 8, 1)
    rounds = [''.join(calls[i:i + 4]) for i in range(0, len(calls), 4)]
    assert len(rounds) == 9 and {''.join(sorted(r)) for r in rounds} == {'abcd'} and len(set(rounds)) > 3
    assert times == {k: [4. * i + rounds[i].index(k) for i in range(1, 9)] for k in 'abcd'}
    assert Clock(torch.device('cpu'))(lambda: (calls.append(1), time.sleep(0.02)), 3) >= 19 and calls[36:] == [1, 1, 1]


@pytest.mark.parametrize('rounds', [1, 2, 5, 8])
def test_summary(rounds: int) -> None:
    """NumPy's percentiles of the times and of the rounds' ratios."""
    rng = np.random.default_rng(rounds)
    times = {name: np.exp(rng.standard_normal(rounds)) for name in ('peer', 'model')}
    for name, row in summarize({k: v.tolist() for k, v in times.items()}, 'peer').items():
        low, ms, high = np.percentile(times[name], [25, 50, 75])
        ratios = zip(('ratio_low', 'ratio', 'ratio_high'), np.percentile(times['peer'] / times[name], [25, 50, 75]))
        assert row == pytest.approx(dict(ratios, ms=ms, spread=(high - low) / ms))


def test_saved_bytes() -> None:
    """By hand: a ReLU keeps its result, which the next layer shares; x and parameters exist anyway. All is freed."""
    model, results = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), []
    model[1].register_forward_hook(lambda module, args, output: results.append(weakref.ref(output)))
    assert saved_bytes(model, torch.randn(2, 4, 8, 8)) == 2 * 4 * 8 * 8 * 4
    assert results[0]() is None
    x, names = images(2, 224, 224), ('seresnet50', *NAMES[::5])
    kept = {name: saved_bytes(create_network(name, **TINY).train(), x) for name in names}
    assert max(kept.values()) < 1.02 * kept['seresnet50'], kept  # as docs/speed.md says


def test_report(tmp_path, capsys, monkeypatch) -> None:
    """Numbers by hand. A copy takes 3 ms, a training step of a network 24 ms and every other step 12 ms."""
    times = {'copy_': 3., 'train': 24.}
    monkeypatch.setattr(_timing, 'Clock', lambda device: lambda step, repeats: (
        step(), times.get(getattr(step, 'func', step).__name__, 12.))[1])
    argv, picture = ['bench', *MODELS[1:], '--blocks', '--channels-last', '--amp', *SMALL], tmp_path / 'bench.png'
    assert main([*argv, '--threads', '1', '--json', '--plot', str(picture)]) == 0
    out, err = capsys.readouterr()
    assert err.startswith('timm-sepool bench: timing 3 networks, 24 measurements; the table comes at the end\n')
    report = json.loads(out)
    assert report['settings']['size'] == [32, 48] and picture.read_bytes().startswith(b'\x89PNG')
    assert [(r['model'], r['mode'], r['ms'], r['images_per_s']) for r in report['results']] == [
        (m, mode, ms, 2e3 / ms) for mode, ms in (('infer', 12.), ('train', 24.)) for m in MODELS]
    assert ['saved_mb' in r for r in report['results']] == [False] * 3 + [True] * 3
    # the roofline by hand: 4 passes forward, 10 with backward, at the bandwidth of a copy, which takes 2
    for row in report['blocks']:
        assert row['roofline'] == pytest.approx({'infer': 4, 'train': 10}[row['mode']] * (3. / 2) / row['ms'])
    assert {(b['stage'], b['mode']) for b in report['blocks']} == {(s, m) for s in (1, 2, 3, 4) for m in bench.MODES}
    assert report['blocks'][0]['mb'] == 2 * 64 * 8 * 12 * 2 / 1e6  # stage 1 of TINY in bfloat16
    assert main(argv) == 0
    head, explained, _, blocks_explained = capsys.readouterr().out.split('\n\n')
    assert all(word in head for word in (*MODELS, 'channels_last', 'amp', '32 x 48', '3 rounds'))
    assert [line.split()[0] for line in explained.splitlines() if line[0] != ' '] == head.splitlines()[1].split()[1:]
    assert all(column in blocks_explained for column in ('x (MB)', 'roofline', 'stage', 'mode, ms and ratio'))
    check_fails(capsys, tmp_path, [*argv, '--plot', str(picture)], 'exists')  # told before the work


def test_chart() -> None:
    """Bars are the ratios, whiskers their quartiles, labelled by model and mode."""
    settings = dict(device='CPU', peer='peer', batch_size=2, size=[32, 48], compile=True, channels_last=False, amp=True)
    results = [
        dict(model=m, mode=mode, ratio=ratio, ratio_low=ratio - 0.25, ratio_high=ratio + 0.5)
        for mode, ratios in (('infer', (1., 2.)), ('train', (1., 4.))) for m, ratio in zip(('peer', 'it'), ratios)]
    axes, = bench.chart(dict(settings=settings, results=results)).axes
    assert [p.get_width() for p in axes.patches] == [2, 1, 4, 1]
    whiskers = [segment for c in axes.collections for segment in c.get_segments()]
    assert [(w[0][0], w[1][0]) for w in whiskers] == [(1.75, 2.5), (0.75, 1.5), (3.75, 4.5), (0.75, 1.5)]
    assert [t.get_text() for t in axes.get_yticklabels()] == ['it', 'peer']
    assert 'relative to peer' in axes.get_xlabel() and axes.get_title() == 'CPU, batch 2, 32 x 48, compile, amp'


@pytest.mark.parametrize('args,message', [
    (['nonsense'], "Unknown model 'nonsense'"),
    (['resnet50+reference'], 'resnet50 is not an SPSE or RGSE network'),
    (['resnet50+nonsense'], 'Cannot create resnet50+nonsense'),
    (['rgse_resnet50', '-b', '0'], 'must be at least 1'),
    (['rgse_resnet50', '--img-size', '1', '2', '3'], '--img-size takes'),
    (['resnet18', '--peer', 'resnet18', '--blocks'], '--blocks needs a ResNet of bottlenecks'),
    (['rgse_resnet50', '--blocks', '--compile'], 'Leave out --blocks or --compile'),
    (['rgse_resnet50', '--plot', 'x.txt'], 'must end in .png, .pdf or .svg'),
    (['rgse_resnet50', '--device', 'meta'], 'must be cpu or cuda'),
    (['rgse_resnet50', '--device', 'cuda:99'], "Cannot use the device 'cuda:99'"),
    (['rgse_resnet50', *SMALL, '-b', '1', '--mode', 'train'], 'rgse_resnet50 cannot train on (1, 3, 32, 48)'),
])
def test_bad_input(args, message: str, capsys) -> None:
    assert main(['bench', *args]) == 2
    *progress, error = capsys.readouterr().err.splitlines()
    assert error.startswith('timm-sepool bench: error: ') and message in error
    assert len(progress) == ('cannot' in message)  # the line that says that work has begun
