""" The benchmark: what it runs, counts and reports, not how fast anything is """
import argparse
import json
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from helpers.common import NAMES, TINY, images, tiny
from timm_sepool.cli import _timing, bench
from timm_sepool.cli._timing import Clock, ReferenceBlock, create_network, interleave, saved_bytes, summarize
from timm_sepool.cli.main import main

SMALL = '-b 2 --img-size 32 48 --rounds 3 --model-kwargs layers=(1,1,1,1) channels=(16,32,64,128)'.split()


def measure(*argv: str) -> dict:
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    return _timing.measure(parser.parse_args(['bench', *argv, *SMALL]))


@pytest.mark.parametrize('name', NAMES[::5])
def test_reference_is_the_network(name: str) -> None:
    """The block as the paper writes it, from the same parameters, and in a network of ours."""
    ours = tiny(name).double()
    theirs = create_network(f'{name}+reference', **TINY, num_classes=10).double().eval()
    theirs.load_state_dict({k.replace('.se.', '.se.module.'): v for k, v in ours.state_dict().items()})
    assert all(isinstance(m.se, ReferenceBlock) for m in theirs.modules() if hasattr(m, 'conv3'))
    x = images(2, 97, 131, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_network_step(monkeypatch) -> None:
    """Inference leaves no gradient; a training step has gradients and the optimizer's state, the weights stay."""
    model, x, steps, sgd_step = create_network('resnet50+eca', **TINY), images(4, 32, 32), [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, 'step', lambda self: (steps.append(self), sgd_step(self)))
    weight = model.conv1.weight
    before = weight.detach().clone()
    _timing.network_step(model.eval(), x, 'infer', nullcontext)()
    assert weight.grad is None and not steps and type(model.layer1[0].se).__name__ == 'EcaModule'
    _timing.network_step(model.train(), x, 'train', nullcontext)()
    assert weight.grad.abs().sum() > 0 and steps[0].state[weight]['momentum_buffer'].abs().sum() > 0
    assert len(steps) == 1 and torch.equal(weight, before)


@pytest.mark.parametrize('spec', ['seresnet50', 'rgse_resnet50', 'spse_resnet50+reference', 'resnet50+cbam'])
def test_block_step(spec: str, monkeypatch) -> None:
    """relu(attention(x) + shortcut) and its gradient, the block itself is left as it is."""
    tensors, randn = [], torch.randn
    monkeypatch.setattr(torch, 'randn', lambda *a, **k: (tensors.append(randn(*a, **k)), tensors[-1])[1])
    block = create_network(spec, **TINY).layer2[-1]
    before, memory_format = repr(block), torch.channels_last if spec[0] == 'r' else torch.contiguous_format
    for mode in ('infer', 'train'):
        like = images(1, 8, 8).to(memory_format=memory_format)
        tensors.clear()
        got = _timing.block_step(block, (3, 128, 14, 14), mode, like, nullcontext)()
        assert repr(block) == before and got.is_contiguous(memory_format=memory_format)
        x, shortcut, gradient = (t.detach().requires_grad_() for t in tensors)
        block.train(mode == 'train')
        out = (block.se(x) + shortcut).relu()
        torch.testing.assert_close(got, torch.autograd.grad(out, x, gradient)[0] if mode == 'train' else out.detach())


def test_networks_are_compiled(monkeypatch) -> None:
    """Also where they share a class and torch's limit would allow one compiled variant."""
    compiled, torch_compile = [], torch.compile
    monkeypatch.setattr(torch, 'compile', lambda model, **kwargs: torch_compile(
        model, backend=lambda graph, inputs: (compiled.append(graph), graph)[1], **kwargs))
    with torch._dynamo.config.patch(cache_size_limit=1):
        measure('resnet18', '--peer', 'seresnet18', '--compile', '--mode', 'infer')
    assert len(compiled) == 2


def test_interleave() -> None:
    """Each round measures every function once, in changing order; the warm-up does not count; a clock's mean in ms."""
    calls, now = [], iter(range(1000))
    times = interleave(
        {k: lambda k=k: calls.append(k) for k in 'abcd'}, lambda step, n: (step(), float(next(now)))[1], 8, 1)
    rounds = [''.join(calls[i:i + 4]) for i in range(0, len(calls), 4)]
    assert len(rounds) == 9 and {''.join(sorted(r)) for r in rounds} == {'abcd'} and len(set(rounds)) > 3
    assert times == {k: [4. * i + rounds[i].index(k) for i in range(1, 9)] for k in 'abcd'}
    calls.clear()
    assert Clock(torch.device('cpu'))(lambda: (calls.append(1), time.sleep(0.02)), 3) >= 19 and len(calls) == 3


@pytest.mark.parametrize('rounds', [1, 2, 5, 8])
def test_summary(rounds: int) -> None:
    """NumPy's percentiles of the times and of the rounds' ratios."""
    rng = np.random.default_rng(rounds)
    times = {name: np.exp(rng.standard_normal(rounds)) for name in ('peer', 'model')}
    for name, row in summarize({k: v.tolist() for k, v in times.items()}, 'peer').items():
        low, ms, high = np.percentile(times[name], [25, 50, 75])
        ratios = np.percentile(times['peer'] / times[name], [25, 50, 75])
        keys = ('ms', 'spread', 'ratio_low', 'ratio', 'ratio_high')
        assert row == pytest.approx(dict(zip(keys, (ms, (high - low) / ms, *ratios))))
    # the peer takes twice the time in 4 of 5 rounds; the ratio of the medians, 1.5, is outside of the quartiles
    row = summarize({'peer': [10., 20., 30., 40., 50.], 'model': [5., 40., 15., 20., 25.]}, 'peer')['model']
    assert row['ratio_low'] == row['ratio'] == row['ratio_high'] == 2


def test_saved_bytes() -> None:
    """By hand: a ReLU keeps its result, the product its two factors; x and parameters are there anyway."""
    class Net(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.weight).relu() * self.weight

    assert saved_bytes(Net(8, 8), torch.randn(2, 4, 8, 8)) == 2 * 4 * 8 * 8 * 4
    # the claim of docs/speed.md: the squeeze keeps hardly more than timm's SE
    specs = ('seresnet50', 'rgse_resnet50', 'spse_resnet50')
    kept = {spec: saved_bytes(create_network(spec, **TINY).train(), images(2, 224, 224)) for spec in specs}
    assert max(kept['rgse_resnet50'], kept['spse_resnet50']) < 1.02 * kept['seresnet50'], kept


def fake_clock(step, repeats: int) -> float:
    """A copy takes 3 ms, a training step of a network 24 ms and every other step 12 ms."""
    step()
    return {'copy_': 3., 'train': 24.}.get(getattr(step, 'func', step).__name__, 12.)


def test_report(monkeypatch) -> None:
    monkeypatch.setattr(_timing, 'Clock', lambda device: fake_clock)
    report = measure('rgse_resnet50', 'resnet50+eca', '--blocks', '--channels-last', '--amp')
    models = ('seresnet50', 'rgse_resnet50', 'resnet50+eca')
    assert [(r['model'], r['mode'], r['ms'], r['images_per_s']) for r in report['results']] == [
        (m, mode, ms, 2e3 / ms) for mode, ms in (('infer', 12.), ('train', 24.)) for m in models]
    assert ['saved_mb' in r for r in report['results']] == [False] * 3 + [True] * 3
    # the roofline by hand: 4 passes forward, 10 with backward, at the bandwidth of a copy, which takes 2
    for row in report['blocks']:
        assert row['roofline'] == pytest.approx({'infer': 4, 'train': 10}[row['mode']] * (3. / 2) / row['ms'])
    assert {(b['stage'], b['mode']) for b in report['blocks']} == {(s, m) for s in (1, 2, 3, 4) for m in bench.MODES}
    assert report['blocks'][0]['mb'] == 2 * 64 * 8 * 12 * 2 / 1e6  # stage 1 of TINY in bfloat16
    assert json.loads(json.dumps(report))['blocks'] == report['blocks']

    head, explained, _, blocks_explained = bench.table(report).split('\n\n')
    assert all(word in head for word in (*models, 'channels_last', 'amp', '32 x 48', '3 rounds'))
    columns = head.splitlines()[1].split()
    assert [line.split()[0] for line in explained.splitlines() if line[0] != ' '] == columns[1:]
    assert all(column in blocks_explained for column in ('x (MB)', 'roofline', 'stage', 'mode, ms and ratio'))


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
    assert [t.get_text() for t in axes.figure.legends[0].get_texts()] == ['inference', 'training step']
    assert 'relative to peer' in axes.get_xlabel() and axes.get_title() == 'CPU, batch 2, 32 x 48, compile, amp'


def test_command(tmp_path, capsys, monkeypatch) -> None:
    argv = ['bench', 'rgse_resnet50', *SMALL, '--rounds', '1', '--mode', 'infer', '--threads', '1']
    assert main([*argv, '--json', '--plot', str(tmp_path / 'b.png')]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)['settings']['size'] == [32, 48] and (tmp_path / 'b.png').read_bytes().startswith(b'\x89PNG')
    assert err == 'timm-sepool bench: timing 2 networks, 4 measurements; the table comes at the end\n'
    assert main(argv) == 0
    assert 'throughput relative to seresnet50' in capsys.readouterr().out

    monkeypatch.setattr(_timing, 'measure', None)  # told before the work
    assert main([*argv, '--plot', str(tmp_path / 'b.png')]) == 2
    assert 'exists' in capsys.readouterr().err


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
    (['vit_tiny_patch16_224', '--img-size', '48', '--mode', 'infer', '--peer', 'resnet18'], 'cannot infer'),
])
def test_bad_input(args, message: str, capsys) -> None:
    assert main(['bench', *args]) == 2
    *progress, error = capsys.readouterr().err.splitlines()
    assert error.startswith('timm-sepool bench: error: ') and message in error
    assert len(progress) == ('cannot' in message)  # the line that says that work has begun
