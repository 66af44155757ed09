""" timm's own, unmodified scripts with the models of this package

timm's wheel lacks them: they are those of the checkout that TIMM_SCRIPTS names, of about the installed timm's version.
"""
import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
import torch
from PIL import Image

import timm
from helpers.common import TINY, realistic, serve_donor
from helpers.hub_server import HubServer
from helpers.runs import TINY_ARGS, push_args
from timm_sepool.cli.main import main
from timm_sepool.cli.quickstart import _next_steps

pytestmark = pytest.mark.skipif(
    not os.environ.get('TIMM_SCRIPTS'), reason='set TIMM_SCRIPTS to a checkout of huggingface/pytorch-image-models')
NUM_CLASSES = 3
MODEL = [
    '--model', 'rgse_resnet50', '--device', 'cpu', '--num-classes', NUM_CLASSES, '--img-size', 64, '-b', 8, *TINY_ARGS]
DATA = ['--data-dir', 'data', '-j', 0]
PREPROCESSING = ['--interpolation', 'bilinear', '--crop-pct', 0.875]  # the default is that of the donor
PRINTED = _next_steps('rgse_resnet50', Path('out')).replace('\\\n', '')  # by the quickstart
FINE_TUNE, RECIPE, _ = map(shlex.split, re.findall(r'python \w+\.py (.*)', PRINTED))


def run(folder: Path, *args: Any, check: bool = True) -> subprocess.CompletedProcess:
    """Run python in the folder and expect success."""
    command = ['env', 'OMP_NUM_THREADS=1', sys.executable, *map(str, args)]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800)
    assert process.returncode == 0 or not check, f'{args}\n{process.stdout[-4000:]}\n{process.stderr[-8000:]}'
    return process


def result(process: subprocess.CompletedProcess) -> Any:
    """What train.py and validate.py print last, as JSON."""
    return json.loads(process.stdout.split('--result\n')[1])


def train(folder: Path, name: str, *options: Any, check: bool = True) -> Any:
    """Train for one epoch, by default. Returns the process and the output folder."""
    to = ['--epochs', 1, '--output', 'output', '--experiment', name]
    return run(folder, 'train.py', *DATA, *MODEL, *to, *options, check=check), folder / 'output' / name


def validate(folder: Path, checkpoint: Any, *options: Any) -> Dict[str, Any]:
    return result(run(folder, 'validate.py', *DATA, *MODEL, '--checkpoint', checkpoint, *options))


def epochs(output: Path) -> List[Dict[str, float]]:
    """Rows of the summary. train.py writes its header again when it resumes."""
    rows = csv.DictReader((output / 'summary.csv').read_text().splitlines())
    return [{k: float(v) for k, v in row.items()} for row in rows if row['epoch'] != 'epoch']


def accuracy(output: Path) -> Any:
    return pytest.approx(epochs(output)[-1]['eval_top1'], abs=1e-3)


def last(output: Path, key: str = 'state_dict') -> Dict[str, Any]:
    return torch.load(output / 'last.pth.tar', weights_only=False)[key]


def save_image(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Coloured noise, and copies of the scripts: beside the originals python would import the checkout's timm."""
    folder = tmp_path_factory.mktemp('scripts')
    for script in ('train', 'validate', 'onnx_export', 'avg_checkpoints'):
        shutil.copy(Path(os.environ['TIMM_SCRIPTS'], f'{script}.py'), folder)
    assert run(folder, '-c', 'import timm; print(timm.__file__)').stdout.strip() == timm.__file__
    rng = np.random.default_rng(0)
    for split, num_images in (('train', 24), ('validation', 12)):  # three batches of 8; a full and a partial one
        for i in range(num_images):
            pixels = rng.integers(0, 56, (80, 90, 3), dtype=np.uint8)
            pixels[..., i % NUM_CLASSES] += 200
            save_image(pixels, folder / 'data' / split / f'class{i % NUM_CLASSES}' / f'{i}.png')
    return folder


@pytest.fixture(scope='module')
def recipe(folder: Path) -> Path:
    """Output of the paper's recipe: one epoch, resumed for a second, around the first decay of the learning rate."""
    args = [*RECIPE, *DATA, *MODEL, '--model-ema', '--model-ema-decay', 0.9]
    first, output = train(folder, 'recipe', *args, '--start-epoch', 29, '--epochs', 30)
    second, _ = train(folder, 'recipe', *args, '--resume', output / 'last.pth.tar', '--epochs', 31)
    assert [r['epoch'] for r in result(first) + result(second)] == [29, 30]
    assert 'Restoring optimizer state from checkpoint' in second.stderr
    return output


def test_train_recipe(recipe: Path) -> None:
    """The quickstart prints the command. Decay on biases and norms too, the learning rate falls at epoch 30."""
    first, second = epochs(recipe)
    assert [first['lr'], second['lr']] == pytest.approx([0.1, 0.01])
    assert second['train_loss'] < first['train_loss'] and first['eval_loss'] + second['eval_loss'] < float('inf')
    group, = last(recipe, 'optimizer')['param_groups']
    assert (group['momentum'], group['weight_decay'], group['nesterov']) == (0.9, 1e-4, False)


def test_fine_tune(hub: HubServer, folder: Path) -> None:
    """The command that the quickstart prints, from a donor on the Hub, with a small network for one epoch."""
    serve_donor(hub, 'resnet50.a1_in1k', **TINY)
    command = [{'DIR': 'data', 'N': NUM_CLASSES}.get(arg, arg) for arg in FINE_TUNE]
    _, output = train(folder, 'fine_tune', *command, *DATA, *MODEL, '--epochs', 1)
    assert epochs(output)[0]['eval_loss'] < float('inf')


@pytest.mark.parametrize('model,size', [('rgse_resnet50', 64), ('spse_resnet50', 72)])  # 72: grids divide no map
def test_train_options(model: str, size: int, folder: Path) -> None:
    process, output = train(
        folder, f'options-{model}', '--model', model, '--img-size', size, '--amp', '--amp-dtype', 'bfloat16',
        '--torchcompile', 'aot_eager', '--channels-last', '--grad-checkpointing', '--sync-bn', '--model-ema')
    assert 'Using native Torch AMP' in process.stderr and 'backend=aot_eager' in process.stderr
    weights = last(output)
    assert weights['layer1.0.conv2.weight'].is_contiguous(memory_format=torch.channels_last)
    assert all(v.isfinite().all() for v in weights.values())
    timm.create_model(model, num_classes=NUM_CLASSES, checkpoint_path=str(output / 'last.pth.tar'), **TINY)  # strict


def test_donor_on_disk(folder: Path) -> None:
    """A plain ResNet's file is carried over by --pretrained-path. avg_checkpoints.py and `convert` read the result."""
    donor = realistic(timm.create_model('resnet50', num_classes=NUM_CLASSES, **TINY))
    torch.save(donor.state_dict(), folder / 'plain.pth')
    assert train(folder, 'strict', '--initial-checkpoint', 'plain.pth', check=False)[0].returncode  # not converted
    options = '--pretrained --pretrained-path plain.pth --lr 1e-9 --warmup-epochs 0'
    _, output = train(folder, 'mine', *PREPROCESSING, *options.split())
    torch.testing.assert_close(last(output)['layer1.0.bn3.weight'], 2 * donor.layer1[0].bn3.weight.detach())
    averaged = output / 'averaged.pth'  # beside the run's args.yaml
    run(folder, 'avg_checkpoints.py', '--input', output, '--filter', 'checkpoint-*.pth.tar', '--output', averaged)
    run(folder, '-m', 'timm_sepool', 'convert', averaged, 'mine.safetensors', '--model', 'rgse_resnet50')
    assert validate(folder, 'mine.safetensors', *PREPROCESSING)['top1'] == accuracy(output)


@pytest.mark.parametrize('base, attention, new, count', [
    ('regnety_002', 'squeeze=rgse', '.squeeze.weight', 6), ('resnet10t', 'attention=cbam', '.se.', 36)])
def test_adopted(base: str, attention: str, new: str, count: int, folder: Path) -> None:
    """A base's weights, trained, resumed and validated with other attention, also from weights of the adopted model."""
    torch.save(realistic(timm.create_model(base, num_classes=NUM_CLASSES)).state_dict(), folder / 'base.pth')
    model = [*MODEL, '--model', 'adopted', '--model-kwargs', f'base={base}', attention]
    donor = ['--warmup-epochs', 0, '--pretrained', '--pretrained-path']
    options = '--epochs 2 --lr .01 --model-ema --amp --amp-dtype bfloat16 --channels-last'.split()
    _, output = train(folder, 'adopted', *model, *options, *donor, 'base.pth')
    weights = last(output)
    learned = {k: v for k, v in weights.items() if new in k and v.is_floating_point()}
    assert len(learned) == count and all(map(torch.any, learned.values()))
    _, resumed = train(folder, 'resumed', *model, *options, '--epochs', 3, '--resume', output / 'last.pth.tar')
    tracked = next(k for k in weights if k.endswith('num_batches_tracked'))
    # 1000 of `realistic`, then epochs of three steps
    assert (weights[tracked], last(resumed)[tracked]) == (1006, 1009)
    check = [output / 'last.pth.tar', *model]
    assert validate(folder, *check)['top1'] == validate(folder, *check, '--torchscript')['top1']
    assert validate(folder, *check, '--use-ema')['top1'] == accuracy(output)
    # from the adopted weights: nothing moves at this rate
    torch.save(weights, folder / 'adopted.pth')
    _, output = train(folder, 'again', *model, '--lr', 1e-12, *donor, 'adopted.pth')
    again = last(output)
    torch.testing.assert_close({k: again[k] for k in learned if 'running' not in k}, {
        k: v for k, v in learned.items() if 'running' not in k})


@pytest.mark.full
def test_compare(folder: Path, monkeypatch) -> None:
    """Broken and restarted runs give the rows of undisturbed ones, two shards too. Resumed runs end and are marked."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    train_args = [*map(str, MODEL[2:]), *map(str, DATA), '--epochs', '2', '--crop-pct', '0.95']

    def start(out: str, *options: str) -> subprocess.Popen:
        args = ['compare', '--out', out, '--seeds', '2', '--models', 'seresnet50', 'rgse_resnet50', *options]
        args += ['--train-script', 'train.py', '--', *train_args]
        return subprocess.Popen([sys.executable, '-m', 'timm_sepool', *args], start_new_session=True)

    rows = {}
    for out, how, shards in (
            ('a', None, 1), ('b', signal.SIGKILL, 1), ('c', signal.SIGINT, 1), ('d', signal.SIGINT, 2)):
        if how:
            process = start(out)
            while not Path(out, 'runs', 'seresnet50', '0', 'last.pth.tar').exists():
                assert process.poll() is None
                time.sleep(0.1)
            os.killpg(process.pid, how)
            process.wait()
        options = {'b': ['--restart', '--jobs', '2'], 'd': ['--restart']}.get(out, [])
        processes = [start(out, *options, '--shard', f'{i + 1}/{shards}') for i in range(shards)]
        assert [process.wait() for process in processes] == [0] * shards
        assert main(['compare', '--out', out, '--report']) == 0
        rows[out] = [{**row, 'seconds': ''} for row in csv.DictReader(Path(out, 'results.csv').read_text().split('\n'))]
    assert rows['a'] == rows['b'] == rows['d'] and len(rows['c']) == 4
    assert {row['model'] for row in rows['c'] if row['resumed'] != '0'} <= {'seresnet50'}


@pytest.mark.parametrize('options', ['', '--torchscript --channels-last'])
def test_validate(options: str, folder: Path, recipe: Path) -> None:
    """As train.py validated its EMA model."""
    checked = validate(folder, recipe / 'last.pth.tar', '--use-ema', *options.split(), *PREPROCESSING)
    keys = ('img_size', 'crop_pct', 'interpolation', 'top1')
    assert [checked[k] for k in keys] == [64, 0.875, 'bilinear', accuracy(recipe)]


@pytest.mark.parametrize('size, options', [
    (32, '--img-size 32 --interpolation bilinear --crop-pct 0.875'),
    (48, '--input-size 3 48 48'),  # interpolation and crop are those of the tag
], ids=['options', 'tag'])
def test_published(hub: HubServer, folder: Path, size: int, options: str) -> None:
    """From training to a published network, as docs/training.md shows it: all accuracies are that of the last epoch."""
    rng = np.random.default_rng(0)
    for split, c, i in product(('train', 'validation'), range(NUM_CLASSES), range(30)):
        pixels = rng.integers(0, 256, (60, 70, 3), dtype=np.uint8)
        pixels[:, ::3 + c] //= 2  # stripes whose period is the class
        save_image(pixels, folder / 'stripes' / split / f'class{c}' / f'{i}.png')
    data, output = '--data-dir stripes -j 0 --device cpu -b 24'.split(), folder / 'output' / f'published{size}'
    start = f'--model rgse_resnet50.from_resnet50_tv_in1k --num-classes {NUM_CLASSES} --opt momentum --lr 0.05'
    to = f'--epochs 2 --warmup-epochs 0 --output output --experiment {output.name}'
    run(folder, 'train.py', *data, *start.split(), *to.split(), *options.split(), *TINY_ARGS)
    # of one checkpoint, the last: the average is its weights
    averaged = output / 'averaged.pth'
    run(folder, 'avg_checkpoints.py', '--input', output, '--filter', 'last.pth.tar', '--no-sort', '--output', averaged)
    push = ['-m', 'timm_sepool', *push_args('rgse_resnet50', averaged, '--repo-id', f'user/flow{size}')]
    run(folder, *push, '--dry-run', f'dry-run{size}')
    used = ['validate.py', *data, '--pretrained', '--results-file', f'{size}.csv', '--model']
    validated = result(run(folder, *used, f'local-dir:dry-run{size}'))
    assert (validated['img_size'], validated['crop_pct'], validated['interpolation']) == (size, 0.875, 'bilinear')
    assert validated['top1'] == accuracy(output)
    run(folder, *push, '--metrics', f'{size}.csv')
    assert f'value: {validated["top1"]}' in hub.repos['model', f'user/flow{size}']['README.md'].decode()
    again = result(run(folder, *used, f'hf-hub:user/flow{size}'))
    assert (again['top1'], again['img_size']) == (validated['top1'], size)


@pytest.mark.parametrize('options', ['', '--dynamic-size', '--dynamo', '--dynamo --dynamic-size'])
@pytest.mark.parametrize('model', ['rgse_resnet50', 'spse_resnet50'])
def test_onnx_export(model: str, options: str, folder: Path, tmp_path: Path) -> None:
    _, _, onnxruntime = map(pytest.importorskip, ('onnx', 'onnxscript', 'onnxruntime'))
    torch_model = timm.create_model(model, num_classes=NUM_CLASSES).eval()  # this script has no --model-kwargs
    weights, exported = tmp_path / 'model.pth', tmp_path / 'model.onnx'
    torch.save(torch_model.state_dict(), weights)
    run(folder, 'onnx_export.py', exported, '--model', model, '--num-classes', NUM_CLASSES, '--img-size', 64,
        '--checkpoint', weights, '--check-forward', *options.split())
    session = onnxruntime.InferenceSession(exported)
    sizes = [(1, 3, 224, 224), (2, 3, 96, 80), (2, 3, 72, 40)] if '--dynamic-size' in options else []
    for x in map(torch.randn, [(3, 3, 64, 64), *sizes]):
        with torch.inference_mode():
            expected = torch_model(x)
        output, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-3, atol=1e-4)
