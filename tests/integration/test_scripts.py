""" timm's own, unmodified scripts with the models of this package

The scripts are not in timm's wheel, so they are taken from the checkout that TIMM_SCRIPTS names, which should be of
about the installed timm's version. Takes some minutes, most of it in torch.compile and the exporters.
"""
import csv
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
import torch
from PIL import Image

import timm
from helpers.common import TINY, realistic, serve_donor
from helpers.hub_server import HubServer
from timm_sepool.cli.quickstart import _next_steps

pytestmark = pytest.mark.skipif(
    not os.environ.get('TIMM_SCRIPTS'),
    reason='set TIMM_SCRIPTS to a checkout of https://github.com/huggingface/pytorch-image-models')
CHECKOUT = Path(os.environ.get('TIMM_SCRIPTS', '')).resolve()
NUM_CLASSES = 3
NUM_IMAGES = {'train': 24, 'validation': 12}  # three batches of 8; a full batch and a partial one

MODEL_KWARGS = ['--model-kwargs', *(f'{k}={v}' for k, v in TINY.items())]
MODEL = ['--device', 'cpu', *MODEL_KWARGS, '--num-classes', NUM_CLASSES, '--img-size', 64, '-b', 8]
DATA = ['--data-dir', 'data', '-j', 0]
PREPROCESSING = ['--interpolation', 'bilinear', '--crop-pct', 0.875]  # the default is that of the donor


def run(folder: Path, *args: Any, check: bool = True) -> subprocess.CompletedProcess:
    """Run python in the folder and expect success."""
    process = subprocess.run(
        [sys.executable, *map(str, args)], cwd=folder, env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True, text=True, timeout=1800)
    # only the ends of the output: the TorchScript exporter prints its whole graph
    assert process.returncode == 0 or not check, f'{args}\n{process.stdout[-4000:]}\n{process.stderr[-8000:]}'
    return process


def result(process: subprocess.CompletedProcess) -> Any:
    """What train.py, validate.py and benchmark.py print last, as JSON."""
    return json.loads(process.stdout.split('--result\n')[1])


def train(folder: Path, name: str, *options: Any, model: str = 'rgse_resnet50', check: bool = True) -> Any:
    """Train for one epoch, by default. Returns the process and the output folder."""
    process = run(
        folder, 'train.py', *DATA, '--model', model, *MODEL, '--epochs', 1, '--output', 'output', '--experiment', name,
        *options, check=check)
    return process, folder / 'output' / name


def validate(folder: Path, checkpoint: Any, *options: Any) -> Dict[str, Any]:
    return result(run(
        folder, 'validate.py', *DATA, '--model', 'rgse_resnet50', *MODEL, '--checkpoint', checkpoint, *options))


def rows(path: Path) -> List[Dict[str, str]]:
    """Rows of a CSV file. train.py writes the header of its summary again when it resumes."""
    return [row for row in csv.DictReader(path.read_text().splitlines()) if row.get('epoch') != 'epoch']


def load(checkpoint: Path) -> Dict[str, Any]:
    return torch.load(checkpoint, weights_only=False)


def printed_commands() -> List[List[str]]:
    """Arguments of the commands that the quickstart prints: fine-tune, train, validate."""
    text = _next_steps('rgse_resnet50', Path('out')).replace('\\\n', '')
    return [shlex.split(command) for command in re.findall(r'python \w+\.py (.*)', text)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """The scripts and a data set of coloured noise.

    The scripts are copied, as python puts a script's own folder first on sys.path, where the checkout's timm is.
    """
    folder = tmp_path_factory.mktemp('scripts')
    for script in ('train', 'validate', 'inference', 'benchmark', 'onnx_export', 'avg_checkpoints'):
        shutil.copy(CHECKOUT / f'{script}.py', folder)
    assert run(folder, '-c', 'import timm; print(timm.__file__)').stdout.strip() == timm.__file__
    rng = np.random.default_rng(0)
    for split, num_images in NUM_IMAGES.items():
        for i in range(num_images):
            label = i % NUM_CLASSES
            pixels = rng.integers(0, 56, (80, 90, 3), dtype=np.uint8)
            pixels[..., label] += 200
            (folder / 'data' / split / f'class{label}').mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / 'data' / split / f'class{label}' / f'{i}.png')
    return folder


@pytest.fixture(scope='module')
def recipe(folder: Path) -> Path:
    """Output of the paper's recipe: one epoch, resumed for a second, around the first decay of the learning rate."""
    args = [*printed_commands()[1], *DATA, *MODEL, '--model-ema', '--model-ema-decay', 0.9]
    first, output = train(folder, 'recipe', *args, '--start-epoch', 29, '--epochs', 30)
    second, _ = train(folder, 'recipe', *args, '--resume', output / 'last.pth.tar', '--epochs', 31)
    assert [r['epoch'] for r in result(first) + result(second)] == [29, 30]
    assert 'Restoring optimizer state from checkpoint' in second.stderr
    return output


def test_train_recipe(recipe: Path) -> None:
    """The quickstart prints the command. Decay on biases and norms too, the learning rate falls at epoch 30."""
    summary = rows(recipe / 'summary.csv')
    assert [float(row['lr']) for row in summary] == pytest.approx([0.1, 0.01])
    assert all(math.isfinite(float(row[k])) for row in summary for k in ('train_loss', 'eval_loss'))
    assert float(summary[1]['train_loss']) < float(summary[0]['train_loss'])
    group, = load(recipe / 'last.pth.tar')['optimizer']['param_groups']
    assert (group['momentum'], group['weight_decay'], group['nesterov']) == (0.9, 1e-4, False)


def test_fine_tune(hub: HubServer, folder: Path) -> None:
    """The command that the quickstart prints, from a donor on the Hub, with a small network for one epoch."""
    serve_donor(hub, 'resnet50.a1_in1k', **TINY)
    command = [{'DIR': 'data', 'N': NUM_CLASSES}.get(arg, arg) for arg in printed_commands()[0]]
    _, output = train(folder, 'fine_tune', *command, *DATA, *MODEL, '--epochs', 1)
    assert math.isfinite(float(rows(output / 'summary.csv')[0]['eval_loss']))


@pytest.mark.parametrize('model,size', [('rgse_resnet50', 64), ('spse_resnet50', 72)])  # 72: grids divide no map
def test_train_options(model: str, size: int, folder: Path) -> None:
    process, output = train(
        folder, f'options-{model}', '--img-size', size, '--amp', '--amp-dtype', 'bfloat16', '--torchcompile',
        'aot_eager', '--channels-last', '--grad-checkpointing', '--sync-bn', '--model-ema', model=model)
    assert 'Using native Torch AMP' in process.stderr and 'backend=aot_eager' in process.stderr
    state_dict = load(output / 'last.pth.tar')['state_dict']
    assert state_dict['layer1.0.conv2.weight'].is_contiguous(memory_format=torch.channels_last)
    assert all(v.isfinite().all() for v in state_dict.values())
    timm.create_model(model, num_classes=NUM_CLASSES, checkpoint_path=str(output / 'last.pth.tar'), **TINY)  # strict


def test_donor_on_disk(folder: Path) -> None:
    """A plain ResNet's file is carried over by --pretrained-path. avg_checkpoints.py and `convert` read the result."""
    donor = realistic(timm.create_model('resnet50', num_classes=NUM_CLASSES, **TINY))
    torch.save(donor.state_dict(), folder / 'plain.pth')
    # strict, not converted
    assert train(folder, 'strict', '--initial-checkpoint', 'plain.pth', check=False)[0].returncode
    _, output = train(
        folder, 'mine', '--pretrained', '--pretrained-path', 'plain.pth', '--lr', 1e-9, '--warmup-epochs', 0,
        *PREPROCESSING)
    weights = load(output / 'last.pth.tar')['state_dict']
    torch.testing.assert_close(weights['layer1.0.bn3.weight'], 2 * donor.layer1[0].bn3.weight.detach())

    averaged = output / 'averaged.pth'
    run(folder, 'avg_checkpoints.py', '--input', output, '--filter', 'checkpoint-*.pth.tar', '--output', averaged)
    run(folder, '-m', 'timm_sepool', 'convert', averaged, 'mine.safetensors', '--model', 'rgse_resnet50')
    top1 = float(rows(output / 'summary.csv')[0]['eval_top1'])
    assert validate(folder, 'mine.safetensors', *PREPROCESSING)['top1'] == pytest.approx(top1, abs=1e-3)


def test_adopted(folder: Path) -> None:
    """A base's weights, trained and validated with another squeeze, also from a checkpoint of the adopted model."""
    base = realistic(timm.create_model('regnety_002', num_classes=NUM_CLASSES))
    torch.save(base.state_dict(), folder / 'base.pth')
    model = [*MODEL, '--model', 'adopted', '--model-kwargs', 'base=regnety_002', 'squeeze=rgse', '--warmup-epochs', 0]
    _, output = train(
        folder, 'adopted', *model, '--epochs', 2, '--pretrained', '--pretrained-path', 'base.pth', '--lr', 0.01,
        '--model-ema', '--amp', '--amp-dtype', 'bfloat16', '--channels-last')
    weights = load(output / 'last.pth.tar')['state_dict']
    squeezes = {k: v for k, v in weights.items() if '.squeeze.' in k}
    assert sorted(v.shape[-1] for v in squeezes.values()) == [2, 2, 2, 2, 4, 8]
    assert all(v.abs().max() > 0 for v in squeezes.values())
    assert weights['stem.bn.num_batches_tracked'] == 1006  # 1000 of `realistic`, then two epochs of 3

    check = [output / 'last.pth.tar', *model[:-2]]  # --warmup-epochs is train.py's
    assert validate(folder, *check)['top1'] == validate(folder, *check, '--torchscript')['top1']
    ema = validate(folder, *check, '--use-ema')
    assert ema['top1'] == pytest.approx(float(rows(output / 'summary.csv')[-1]['eval_top1']), abs=1e-3)

    # from the adopted weights: nothing moves at this rate
    torch.save(weights, folder / 'adopted.pth')
    _, output = train(
        folder, 'again', *model, '--pretrained', '--pretrained-path', 'adopted.pth', '--lr', 1e-12)
    again = load(output / 'last.pth.tar')['state_dict']
    for k, v in squeezes.items():
        torch.testing.assert_close(again[k], v)


@pytest.mark.skipif(not shutil.which(os.environ.get('CXX', 'g++')), reason='inductor needs a C++ compiler')
def test_train_inductor(folder: Path) -> None:
    # no validation, which would compile the model once or twice more
    options = ['--val-split', '', '--warmup-epochs', 0]
    eager, _ = train(folder, 'eager', *options)
    compiled, output = train(folder, 'inductor', *options, '--torchcompile')
    assert 'backend=inductor' in compiled.stderr
    assert result(compiled)[0]['train']['loss'] == pytest.approx(result(eager)[0]['train']['loss'], rel=1e-3)
    assert validate(folder, output / 'last.pth.tar')['img_size'] == 64


@pytest.mark.parametrize('options', ['', '--torchscript --channels-last'])
def test_validate(options: str, folder: Path, recipe: Path) -> None:
    """As train.py validated its EMA model."""
    checked = validate(folder, recipe / 'last.pth.tar', '--use-ema', *options.split(), *PREPROCESSING)
    assert (checked['img_size'], checked['crop_pct'], checked['interpolation']) == (64, 0.875, 'bilinear')
    assert checked['top1'] == pytest.approx(float(rows(recipe / 'summary.csv')[-1]['eval_top1']), abs=1e-3)


def test_inference(folder: Path, recipe: Path) -> None:
    """inference.py takes the EMA weights, whose validation train.py reports."""
    pytest.importorskip('pandas')
    run(
        folder, 'inference.py', *DATA, '--model', 'rgse_resnet50', *MODEL, *PREPROCESSING,
        '--checkpoint', recipe / 'last.pth.tar', '--label-type', 'none', '--include-index', '--fullname',
        '--results-dir', 'inference', '--results-file', 'predictions', '--results-format', 'csv')
    predictions = rows(folder / 'inference' / 'predictions.csv')
    correct = sum(row['filename'].startswith(f'class{row["index"]}/') for row in predictions)
    assert len(predictions) == NUM_IMAGES['validation']
    accuracy = float(rows(recipe / 'summary.csv')[-1]['eval_top1'])
    assert 100 * correct / len(predictions) == pytest.approx(accuracy, abs=1e-3)


@pytest.mark.parametrize('model,options', [
    ('rgse_resnet50', ''),
    ('spse_resnet50', '--amp --amp-dtype bfloat16 --channels-last --grad-checkpointing --detail')])
def test_benchmark(model: str, options: str, folder: Path) -> None:
    measured = result(run(
        folder, 'benchmark.py', '--model', model, *MODEL, '--bench', 'both', *options.split(), '--num-warm-iter', 1,
        '--num-bench-iter', 5))
    assert 'error' not in measured  # the script reports failures here, with exit code 0
    assert measured['infer_samples_per_sec'] > 0 and measured['train_samples_per_sec'] > 0
    params = sum(p.numel() for p in timm.create_model(model, num_classes=NUM_CLASSES, **TINY).parameters())
    assert measured['param_count'] == pytest.approx(params / 1e6, abs=0.01)


@pytest.mark.parametrize('model,options', [
    ('rgse_resnet50', ''), ('rgse_resnet50', '--dynamic-size'), ('spse_resnet50', '--dynamic-size'),
    ('rgse_resnet50', '--dynamo'), ('rgse_resnet50', '--dynamo --dynamic-size'),
    ('spse_resnet50', '--dynamo --dynamic-size')])
def test_onnx_export(model: str, options: str, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    torch_model = timm.create_model(model, num_classes=NUM_CLASSES).eval()  # this script has no --model-kwargs
    torch.save(torch_model.state_dict(), tmp_path / 'model.pth')
    run(
        folder, 'onnx_export.py', tmp_path / 'model.onnx', '--model', model, '--num-classes', NUM_CLASSES,
        '--img-size', 64, '--checkpoint', tmp_path / 'model.pth', '--check-forward', *options.split())
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    sizes = [(1, 3, 224, 224), (2, 3, 96, 80), (2, 3, 72, 40)] if '--dynamic-size' in options else []
    for x in map(torch.randn, [(3, 3, 64, 64), *sizes]):
        with torch.inference_mode():
            expected = torch_model(x)
        output, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-3, atol=1e-4)
