""" `timm-sepool compare` with a stand-in for train.py; integration/test_scripts.py has the real one """
import csv
import errno
import itertools
import json
import os
import pty
import re
import shlex
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
import torch

from timm_sepool.cli import _comparison, compare
from timm_sepool.cli._comparison_runs import Run, locked, read_progress
from timm_sepool.cli.main import main

ROOT = Path(__file__).parents[2]
STAND_IN = str(ROOT / 'tests' / 'helpers' / 'train_stand_in.py')
MODELS = ['resnet18', 'seresnet18', 'resnet18+cbam', 'v=resnet18+spse', 'w=resnet18,layers=(1,1,1,1)']
TRAIN = ['--data-dir', 'data', '--device', 'cpu', '--img-size', '32']


def argv(out: str, *options: Any, models: List[str] = MODELS, train: List[str] = TRAIN) -> List[str]:
    start = ['compare', '--out', out, '--models', *models, '--train-script', STAND_IN, '--seeds', 2]
    return [*map(str, [*start, *options]), '--', *train]


def fork(args: List[str]) -> int:
    pid = os.fork()
    if pid == 0:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
        os._exit(main(args))
    return pid


def results(out: str) -> List[Dict[str, str]]:
    """Rows of results.csv without their times."""
    with open(Path(out, 'results.csv')) as f:
        return [{k: v for k, v in row.items() if k != 'seconds'} for row in csv.DictReader(f)]


@pytest.fixture(scope='module', autouse=True)
def undisturbed(tmp_path_factory) -> List[Dict[str, str]]:
    """A comparison in the working directory of all tests here."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp('compare'))
    os.mkdir('data')
    assert main(argv('undisturbed')) == 0
    yield results('undisturbed')
    os.chdir(before)


def test_runs(undisturbed, capsys) -> None:
    """The header to the letter; a row and its command by hand; finished runs stay, without their checkpoints too."""
    header, *rows = Path('undisturbed', 'results.csv').read_text().splitlines()
    assert header == 'model,seed,params,gmacs,epochs,last_top1,last_top5,last_loss,best_top1,seconds,resumed'
    assert [r['model'] + r['seed'] for r in undisturbed[::3]] == ['resnet180', 'seresnet181', 'v0', 'w1']
    run = Path('undisturbed', 'runs', 'w', '1')
    last = (run / 'summary.csv').read_text().splitlines()[3].split(',')
    assert [undisturbed[-1][k] for k in ('last_top1', 'last_loss')] == [last[3], last[2]]
    start, = json.loads((run / 'starts.json').read_text())
    assert shlex.split(start['command']) == [
        sys.executable, STAND_IN, '--checkpoint-hist', '1', *TRAIN, '--model', 'resnet18', '--model-kwargs',
        'layers=(1, 1, 1, 1)', '--seed', '1', '--output', str(run.parent), '--experiment', '1']
    for checkpoint in Path('undisturbed').rglob('*.pth.tar'):
        checkpoint.unlink()
    assert main(argv('undisturbed', '--seeds', 3, models=['w=resnet18,layers=(1,1,1,1)', 'x=resnet18+eca'])) == 0
    out, err = capsys.readouterr()
    assert re.findall(r'\[\d/6\] (.), seed (\d)', err) == [('x', '0'), ('x', '1'), ('w', '2'), ('x', '2')]
    assert not list(run.glob('*.tar')) and '| x  ' in out and main(argv('undisturbed', '--dry-run', '--seeds', 4)) == 0
    assert re.search(r'runs: 11 finished, 9 to train; .* 128 x 1 .*\nabout 1 min left with', capsys.readouterr().out)


@pytest.mark.parametrize('how', [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_interruption(how: int, undisturbed, monkeypatch) -> None:
    """--restart gives what an undisturbed run gives; without it all runs end, and the resumed one is marked."""
    out, again = f'broken{how}', f'resumed{how}'
    monkeypatch.setenv('STAND_IN', 'wait 1 1')
    pid, summary = fork(argv(out)), Path(out, 'runs', 'resnet18', '1', 'summary.csv')
    while not summary.exists() or summary.read_text().count('\n') < 3:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        time.sleep(0.02)
    (os.killpg if how == signal.SIGKILL else os.kill)(pid, how)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (-how if how == signal.SIGKILL else 130)
    monkeypatch.delenv('STAND_IN')
    shutil.copytree(out, again)
    assert main(argv(out, '--restart', '--jobs', 2)) == 0 and results(out) == undisturbed
    assert main(argv(again, '--jobs', 5)) == 0 and len(results(again)) == 10
    assert [r['model'] + r['seed'] for r in results(again) if r['resumed'] != '0'] == ['resnet181']
    assert Path(again, 'runs', 'resnet18', '1', 'summary.csv').read_text().count('epoch,') == 2  # train.py's habit
    assert '1 of 10 runs were resumed. train.py does not' in Path(again, 'report.md').read_text()


def test_shards_and_locks(undisturbed, capsys) -> None:
    """Two shards at once give the same rows; a run that another process trains is not started."""
    with locked(Path('sharded', '.locks', 'w-1'), 0):
        assert main(argv('sharded')) == 2 and 'Another process trains sharded/runs/w/1.' in capsys.readouterr().err
    assert not Path('sharded', 'runs').exists()
    other = fork(argv('sharded', '--shard', '1/2'))
    assert main(argv('sharded', '--shard', '2/2')) == os.waitpid(other, 0)[1] == 0
    assert not Path('sharded', 'results.csv').exists() and main(['compare', '--out', 'sharded', '--report']) == 0
    assert results('sharded') == undisturbed


@pytest.mark.parametrize('fault,message', [('fail 1', 'failed with exit code 1'), ('2 1 1', 'ended before its last')])
def test_failures(fault: str, message: str, capsys, monkeypatch) -> None:
    """The others go on, and a repeated command trains what failed. SIGINT to train.py alone ends it with code 0."""
    monkeypatch.setenv('STAND_IN', fault)
    args = argv(fault, models=MODELS[:2], train=[*TRAIN, '--cooldown-epochs', '1'])
    assert main(args) == 1 and [(r['seed'], r['epochs']) for r in results(fault)] == [('0', '4')] * 2
    err = capsys.readouterr().err
    assert err.count(f'train.py {message}') == 2 and '    training with ' in err
    monkeypatch.delenv('STAND_IN')
    assert main(args) == 0 and len(results(fault)) == 4


def test_damaged_run(undisturbed, monkeypatch, capsys) -> None:
    """Nothing is deleted unasked, and a run whose process failed after its last row is not called a success."""
    monkeypatch.setenv('STAND_IN', '9 1 2')
    args = argv('damaged', models=MODELS[:1])
    assert main(args) == 1 and 'failed with exit code -9' in capsys.readouterr().err and len(results('damaged')) == 2
    monkeypatch.delenv('STAND_IN')
    run = Path('damaged', 'runs', 'resnet18', '1')
    (run / 'summary.csv').write_text((run / 'summary.csv').read_text()[:-5])
    (run / 'last.pth.tar').unlink()
    assert main(args) == 2 and 'no checkpoint. Restore summary.csv' in capsys.readouterr().err and run.exists()
    assert main([*args[:1], '--restart', *args[1:]]) == 0 and results('damaged') == [
        row for row in undisturbed if row['model'] == 'resnet18']


def test_full_disk(undisturbed, monkeypatch, capsys) -> None:
    """One error; what is finished stays, and the repeated command gives the rest."""
    write, starts = Path.write_text, itertools.count()

    def write_text(path: Path, text: str, **kwargs) -> int:
        if '"began"' in text and next(starts) == 8:  # the fifth run starts
            raise OSError(errno.ENOSPC, 'No space left on device')
        return write(path, text, **kwargs)

    monkeypatch.setattr(Path, 'write_text', write_text)
    assert main(argv('full')) == 2
    *_, told, error = capsys.readouterr().err.splitlines()
    assert '4 of 10 runs finished' in told and 'full/runs/w/0/starts.json: [Errno 28] No space' in error
    assert main(argv('full')) == 0 and results('full') == undisturbed


def test_terminal() -> None:
    """A bar over all runs instead of a line a run."""
    pid, fd = pty.fork()
    if pid == 0:
        sys.stdout, sys.stderr = os.fdopen(1, 'w'), os.fdopen(2, 'w')  # not pytest's
        os.system('stty rows 24 cols 80')
        os._exit(main(argv('terminal', models=MODELS[:1])))
    shown = b''
    with suppress(OSError):  # how a terminal ends
        while chunk := os.read(fd, 4096):
            shown += chunk
    assert os.waitpid(pid, 0)[1] == 0 and b'| 2.0/2 runs [' in shown and b', seed' not in shown


@pytest.mark.parametrize('text,top1,damaged', [
    ('epoch,eval_top1\r\n0,1\r\n1,2\r\n2,3\r\n', [1, 2, 3], None), ('epoch,eval_top1\n0,1\n1,2\n2,3', [1, 2], 4),
    ('epoch,eval_top1\n0,1\n1,9\nepoch,eval_top1\n1,2\n2,3\n', [1, 2, 3], None), ('epo', [], 1),
    ('epoch,eval_top1\n0,1\n1epoch,eval_top1\n1,2\n', [1, 2], 3)])
def test_summary(text: str, top1: List[int], damaged: int, tmp_path) -> None:
    """Repeated headers and epochs, and lines that are cut."""
    (run := Run(tmp_path, 'm', 0)).folder.mkdir(parents=True)
    (run.folder / 'args.yaml').write_text('{sched: cosine, epochs: 2, cooldown_epochs: 1}')
    (run.folder / 'summary.csv').write_bytes(text.encode())
    progress = read_progress(run)
    assert [r['eval_top1'] for r in progress.rows.values()] == top1 and progress.damaged == damaged
    assert progress.finished == (len(top1) == 3) and progress.epochs == 3


def test_statistics() -> None:
    """Welch's interval and both p-values by formula on random tables; then, without a difference, by simulation."""
    from scipy.stats import t
    n, tables, splits = 8, 2000, np.array(list(itertools.combinations(range(16), 8)))
    draws = np.random.default_rng(0).normal(70, 0.2, (tables, 5, n))
    draws[:20, 1:] += np.linspace(-0.5, 0.5, 20)[:, None, None]  # tables with differences
    mean = draws[:, 1:].mean(-1) - draws[:, :1].mean(-1)
    variances = [x.var(-1, ddof=1) / n for x in (draws[:, 1:], draws[:, :1])]
    df = sum(variances) ** 2 / sum(v ** 2 / (n - 1) for v in variances)
    half = t.ppf(0.975, df) * sum(variances) ** 0.5
    signs = -np.ones((len(splits), 16))
    np.put_along_axis(signs, splits, 1., 1)
    pooled = np.concatenate([draws[:, 1:], np.broadcast_to(draws[:, :1], draws[:, 1:].shape)], -1)
    p = np.stack([(np.abs(x @ signs.T / n) >= np.abs(m)[:, None] - 1e-9).mean(1) for x, m in zip(pooled, mean)])
    for i, j in ((0, 0), (6, 1), (12, 2), (19, 3), (30, 0)):
        found = _comparison.difference(draws[i, j + 1].tolist(), draws[i, 0].tolist())
        expected = [mean[i, j], mean[i, j] - half[i, j], mean[i, j] + half[i, j], p[i, j]]
        np.testing.assert_allclose(found[:4], expected, rtol=1e-9, atol=1e-12)
    ties = [16, 21, 19, 21, 19, 21, 20, 23, 19, 20, 17, 20]  # of 30 images each: by integers
    sums = [abs(sum(ties) - 2 * sum(c)) for c in itertools.combinations(ties, 6)]
    expected = np.mean([s >= abs(sum(ties) - 2 * sum(ties[:6])) for s in sums])
    accuracies = [n / 30 * 100 for n in ties]
    assert _comparison.difference(accuracies[:6], accuracies[6:]).p == pytest.approx(expected)
    order, corrected = p.argsort(-1), np.array([_comparison.holm(row) for row in p])
    by_hand = np.minimum(np.maximum.accumulate(np.take_along_axis(p, order, -1) * [4, 3, 2, 1], -1), 1)
    np.testing.assert_allclose(np.take_along_axis(corrected, order, -1), by_hand)
    assert (corrected[20:] < 0.05).any(-1).mean() <= 0.05 + 2 * (0.05 * 0.95 / tables) ** 0.5
    assert 0.93 <= (np.abs(mean[20:]) < half[20:]).mean() <= 0.97


def test_report(undisturbed, capsys) -> None:
    """The notice on few seeds, another peer, what is concluded, the paper's claims, and how to publish."""
    assert main(['compare', '--out', 'undisturbed', '--report', '--peer', 'resnet18']) == 0
    assert 'need not be equal' in (out := capsys.readouterr().out) and 'at least 5 seeds are needed' in out
    models = {name: dict(params=1, gmacs=1., peer='seresnet50', model_kwargs=[], model=name)
              for name in ('seresnet50', 'rgse_resnet50', 'spse_resnet50')}
    values = {k: [v + 0.01 * i for i in range(6)] for k, v in zip(models, (70., 71., 69.))}
    found = {k: _comparison.difference(values[k], values['seresnet50']) for k in list(models)[1:]}
    p = dict.fromkeys(found, 0.01)
    text = _comparison.conclusion(models, found, p)
    assert 'rgse_resnet50 (+0.98 to +1.02) is better than seresnet50; spse_resnet50 (-1.02 to -0.98) is worse' in text
    assert 'needed' not in text
    table = _comparison.table(dict(imagenet=True, models=models), values, found, p)
    assert [row.split()[-2] for row in table[2:]] == ['76.79', '77.73', '77.60']  # 100 - the claimed errors
    Path('o/runs/rgse_resnet50/0').mkdir(parents=True)
    Path('o/runs/rgse_resnet50/0/last.pth.tar').touch()
    rows = [dict(model=k, seed=i, last_top1=v) for k in values for i, v in enumerate(values[k])]
    assert _comparison.next_step(Path('o'), models, rows).endswith(
        'timm-sepool push rgse_resnet50 --repo-id USER/NAME --checkpoint o/runs/rgse_resnet50/0/last.pth.tar')


def test_commands(monkeypatch, capsys) -> None:
    """timm's attention from scratch, `adopt` with --pretrained, the paper's recipe, torchrun's own arguments."""
    options = compare.parse_train_args([*TRAIN, '--model-kwargs', 'zero_init_last=False'])
    kwargs = [compare.make_model(name, options)['model_kwargs'] for name in ('resnet18+se', 'resnet18+rgse')]
    options.pretrained = True
    assert [*kwargs, compare.make_model('resnet18+se', options)['model_kwargs']] == [
        ['zero_init_last=False', "block_args={'attn_layer': 'se'}"], *(
            ['base=resnet18', f'attention={a}', 'zero_init_last=False'] for a in ('rgse', 'se'))]
    docs = (ROOT / 'docs' / 'training.md').read_text().replace('\\\n', '')
    assert compare.PAPER_RECIPE.split() == shlex.split(re.findall(r'--model rgse_resnet50 (--opt .*)', docs)[0])
    Path('config.yaml').write_text('{data_dir: data, pretrained: true, num_classes: 2}')
    options = compare.parse_train_args(['-c', 'config.yaml', '--num-classes', '3'])
    assert (options.data_dir, options.pretrained, options.num_classes) == ('data', True, 3)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5,6,7')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    train = [*TRAIN, '--device', 'cuda']
    assert main(argv('torchrun', '--nproc', 2, '--jobs', 2, '--seeds', 1, models=MODELS[:2], train=train)) == 0
    runs = [Path('torchrun/runs', name, '0') for name in MODELS[:2]]
    assert [(run / 'train.log').read_text().count('training with') for run in runs] == [1, 1]  # of rank 0
    assert [json.loads((run / 'starts.json').read_text())[0]['env']['CUDA_VISIBLE_DEVICES'] for run in runs] == [
        '4,5', '6,7']


@pytest.mark.parametrize('options,train,message', [
    (['--train-script', 'no.py'], '', "timm's train.py does not exist at no.py. Correct --train-script"),
    ([], '--data-dir none', 'The data folder none does not exist'), (['--jobs', '0'], '', 'at least 1'),
    (['--models', 'resnet1'], '', "Unknown model 'resnet1'"), (['--models', 'resnet18,a'], '', 'is not [LABEL=]NAME'),
    (['--models', 'resnet18+x'], '', "Unknown attention 'x'"), (['--shard', '3/2'], '', '--shard takes I/N'),
    (['--models', 'a=resnet18', 'a=resnet34'], '', 'Two models have the same label, a.'),
    (['--models', 'resnet50t'], '--pretrained', 'resnet50t has no pretrained weights'),
    (['--nproc', '99'], '--device cuda', 'needs 99 GPUs'),
    ([], '-c no.yaml', 'Cannot read no.yaml. Correct --config'), ([], '-c resume.yaml', 'resume.yaml sets resume'),
    ([], '-c kwargs.yaml', "model_kwargs is 'abc'"),
    (['--out', 'list'], '', 'compare.json has no models. Restore it'),
    ([], '--pretrained-path no.pth', 'The file no.pth does not exist'),
    (['--paper'], '', 'has its own models and peers'), ([], '--model-kw a=1', 'write --model-kwargs in full'),
    (['--models', 'resnet18.foo'], '--pretrained', 'Invalid pretrained tag'),
    (['--out', 'undisturbed'], '--epochs 9', "was made with train.py's arguments"),
    (['--out', 'undisturbed', '--models', 'w=resnet34'], '', 'w is w=resnet18,layers=(1,1,1,1) in undisturbed'),
    *(([], f'{o} 1', f'{o}: compare sets') for o in ('--model', '--seed', '--outp', '--experiment', '--resume'))])
def test_bad_input(options: List[str], train: str, message: str, undisturbed, capsys) -> None:
    damaged = {'resume.yaml': 'resume: last.pth.tar', 'kwargs.yaml': 'model_kwargs: abc', 'list/compare.json': '[]'}
    for name, text in damaged.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    before = sorted(Path().rglob('*'))
    assert main(argv('bad', *options, train=[*TRAIN, *train.split()])) == 2
    err = capsys.readouterr().err
    assert err.startswith('timm-sepool compare: error: ') and message in err and err.count('\n') == 1
    assert sorted(Path().rglob('*')) == before
