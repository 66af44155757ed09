""" timm's own, unmodified scripts with the models of this package

The scripts are not in timm's wheel, so they are taken from the checkout that TIMM_SCRIPTS names, which should be of
about the installed timm's version. Takes some minutes, most of it in torch.compile and the exporters.
"""
import csv
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest

if not os.environ.get('TIMM_SCRIPTS'):
    pytest.skip(
        'set TIMM_SCRIPTS to a checkout of https://github.com/huggingface/pytorch-image-models',
        allow_module_level=True,
    )

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import timm
from helpers.common import TINY, realistic
from helpers.hub_server import HubServer

_CHECKOUT = Path(os.environ['TIMM_SCRIPTS']).resolve()
_SCRIPTS = ('train.py', 'validate.py', 'inference.py', 'benchmark.py', 'onnx_export.py', 'avg_checkpoints.py')

_CLASSES = 3
_TRAIN_IMAGES = 24  # three batches of 8
_VAL_IMAGES = 12  # a full batch and a partial one

_MODEL_KWARGS = ['--model-kwargs', *(f'{k}={v}' for k, v in TINY.items())]
_MODEL = ['--device', 'cpu', *_MODEL_KWARGS, '--num-classes', _CLASSES, '-b', 8]
_DATA = ['--data-dir', 'data', '-j', 0]

# The paper's recipe, but for the batch size and the number of epochs
_RECIPE = shlex.split(
    '--opt momentum --momentum 0.9 --lr 0.1 --sched step --decay-epochs 30 --decay-rate 0.1 --warmup-epochs 0 '
    '--weight-decay 1e-4 --opt-kwargs filter_bias_and_bn=False --smoothing 0 --color-jitter 0 '
    '--train-interpolation bilinear --interpolation bilinear --crop-pct 0.875'
)
_PREPROCESSING = _RECIPE[-4:]  # the default is that of the donor


def _run(folder: Path, *args) -> subprocess.CompletedProcess:
    """Run python in the folder and expect success."""
    process = _try(folder, *args)
    if process.returncode != 0:
        # only the ends, as the TorchScript exporter prints its whole graph
        pytest.fail(
            f'python {shlex.join(str(a) for a in args)}\nexited with {process.returncode}\n'
            f'--- stdout\n{process.stdout[-4000:]}\n--- stderr\n{process.stderr[-8000:]}'
        )
    return process


def _try(folder: Path, *args) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *(str(a) for a in args)],
        cwd=folder,
        # the networks are too small for several threads, which stall each other on a busy machine
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=900,
    )


def _result(process: subprocess.CompletedProcess) -> Any:
    """What train.py, validate.py and benchmark.py print last, as JSON."""
    return json.loads(process.stdout.split('--result\n')[1])


def _validate(folder: Path, checkpoint: str, *options) -> Dict[str, Any]:
    return _result(_run(
        folder, 'validate.py', *_DATA, '--model', 'rgse_resnet50', *_MODEL, '--img-size', 64,
        '--checkpoint', checkpoint, *options,
    ))


def _rows(path: Path) -> List[Dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def _summary(output: Path) -> List[Dict[str, str]]:
    # train.py writes the header again when it resumes
    return [row for row in _rows(output / 'summary.csv') if row['epoch'] != 'epoch']


def _load(name: str, checkpoint: Path) -> torch.nn.Module:
    """Load a checkpoint as users do, timm is strict here."""
    return timm.create_model(name, num_classes=_CLASSES, checkpoint_path=str(checkpoint), **TINY)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """The scripts and a data set of coloured noise.

    The scripts are copied, as python puts a script's own folder first on sys.path, where the checkout's timm is.
    """
    folder = tmp_path_factory.mktemp('scripts')
    for script in _SCRIPTS:
        assert (_CHECKOUT / script).is_file(), f'TIMM_SCRIPTS={_CHECKOUT} is no checkout of timm, it has no {script}'
        shutil.copy(_CHECKOUT / script, folder)
    rng = np.random.default_rng(0)
    for split, images in (('train', _TRAIN_IMAGES), ('validation', _VAL_IMAGES)):
        for c in range(_CLASSES):
            class_folder = folder / 'data' / split / f'class{c}'
            class_folder.mkdir(parents=True)
            for i in range(images // _CLASSES):
                pixels = rng.integers(0, 56, (80, 90, 3), dtype=np.uint8)
                pixels[..., c] += 200
                Image.fromarray(pixels).save(class_folder / f'{i}.png')
    return folder


@pytest.fixture(scope='module')
def trained(folder: Path) -> Path:
    """Output folder of the paper's recipe: one epoch, resumed for a second, around the first decay of the rate."""
    args = [
        'train.py', '--data-dir', 'data', '-j', 1, '--model', 'rgse_resnet50', *_MODEL, '--img-size', 64, *_RECIPE,
        '--model-ema', '--model-ema-decay', 0.9, '--output', 'output', '--experiment', 'recipe',
    ]
    first = _result(_run(folder, *args, '--start-epoch', 29, '--epochs', 30))
    second = _run(folder, *args, '--resume', 'output/recipe/last.pth.tar', '--epochs', 31)
    assert [r['epoch'] for r in first] == [29]
    assert [r['epoch'] for r in _result(second)] == [30]
    assert 'Restoring model state from checkpoint' in second.stderr
    assert 'Restoring optimizer state from checkpoint' in second.stderr
    return folder / 'output' / 'recipe'


def test_installed_timm(folder: Path):
    (folder / 'which.py').write_text(
        'import timm\n'
        'print(timm.__file__)\n'
        'print(timm.list_models("rgse_resnet50"))\n'
    )
    timm_file, models = _run(folder, 'which.py').stdout.splitlines()
    assert timm_file == timm.__file__
    assert not Path(timm_file).resolve().is_relative_to(_CHECKOUT)
    assert models == "['rgse_resnet50']"
    for script in _SCRIPTS:
        assert (folder / script).read_bytes() == (_CHECKOUT / script).read_bytes()


def test_train_recipe(trained: Path):
    summary = _summary(trained)
    assert [row['epoch'] for row in summary] == ['29', '30']
    assert [float(row['lr']) for row in summary] == pytest.approx([0.1, 0.01])
    assert all(math.isfinite(float(row[k])) for row in summary for k in ('train_loss', 'eval_loss'))
    assert float(summary[1]['train_loss']) < float(summary[0]['train_loss'])

    names = {p.name for p in trained.iterdir()}
    assert {'args.yaml', 'checkpoint-29.pth.tar', 'checkpoint-30.pth.tar', 'last.pth.tar'} <= names
    checkpoint = torch.load(trained / 'last.pth.tar', weights_only=False)
    assert checkpoint['arch'] == 'rgse_resnet50'
    assert checkpoint['epoch'] == 30
    assert checkpoint['state_dict'].keys() == checkpoint['state_dict_ema'].keys()
    assert not torch.equal(checkpoint['state_dict']['fc.weight'], checkpoint['state_dict_ema']['fc.weight'])
    group, = checkpoint['optimizer']['param_groups']  # decay on biases and norms too
    assert (group['momentum'], group['weight_decay'], group['nesterov']) == (0.9, 1e-4, False)


@pytest.mark.parametrize('model, img_size', [
    ('rgse_resnet50', 64),
    ('spse_resnet50', 72),  # grids that do not divide the size
])
def test_train_options(model: str, img_size: int, folder: Path):
    process = _run(
        folder, 'train.py', *_DATA, '--model', model, *_MODEL, '--img-size', img_size, '--epochs', 1,
        '--amp', '--amp-dtype', 'bfloat16', '--torchcompile', 'aot_eager', '--channels-last', '--grad-checkpointing',
        '--sync-bn', '--model-ema', '--output', 'output', '--experiment', f'options-{model}',
    )
    assert 'Using native Torch AMP' in process.stderr
    assert 'backend=aot_eager' in process.stderr
    # accepted, but a single process has nothing to synchronize
    assert 'Synchronized BatchNorm' not in process.stderr
    output = folder / 'output' / f'options-{model}'
    assert [row['epoch'] for row in _summary(output)] == ['0']
    checkpoint = torch.load(output / 'last.pth.tar', weights_only=False)
    assert checkpoint['state_dict']['layer1.0.conv2.weight'].is_contiguous(memory_format=torch.channels_last)
    assert all(v.isfinite().all() for v in checkpoint['state_dict'].values())
    _load(model, output / 'last.pth.tar')


def test_after_training(hub: HubServer, folder: Path, trained: Path):
    """README's five commands: train from a plain ResNet on disk, average, validate, push, use."""
    donor = realistic(timm.create_model('resnet50', num_classes=_CLASSES, **TINY))
    torch.save(donor.state_dict(), folder / 'plain.pth')
    train = [
        'train.py', *_DATA, '--model', 'rgse_resnet50', *_MODEL, '--img-size', 64, '--epochs', 1, '--output', 'output',
        '--experiment', 'mine']
    # strict and without conversion
    assert _try(folder, *train, '--initial-checkpoint', 'plain.pth').returncode != 0
    _run(folder, *train, '--pretrained', '--pretrained-path', 'plain.pth', '--lr', 1e-9, '--warmup-epochs', 0)
    run = folder / 'output' / 'mine'
    weights = torch.load(run / 'last.pth.tar', weights_only=False)['state_dict']
    torch.testing.assert_close(weights['layer1.0.bn3.weight'], 2 * donor.layer1[0].bn3.weight.detach())

    averaged = run / 'averaged.pth'
    _run(folder, 'avg_checkpoints.py', '--input', run, '--filter', 'checkpoint-*.pth.tar', '--output', averaged)
    validated = _validate(folder, averaged, '--use-train-size', '--results-file', 'results.csv')
    hub.repos.pop(('model', 'user/mine'), None)
    _run(
        folder, '-m', 'timm_sepool', 'push', 'rgse_resnet50', '--repo-id', 'user/mine',
        '--checkpoint', averaged, '--metrics', 'results.csv')
    assert f'value: {validated["top1"]}' in hub.repos['model', 'user/mine']['README.md'].decode()
    use = ['validate.py', *_DATA, '--device', 'cpu', '--model', 'hf-hub:user/mine', '--pretrained']
    used = _result(_run(folder, *use))
    for key in ('top1', 'img_size', 'crop_pct', 'interpolation'):
        assert used[key] == validated[key]


def test_adopted(folder: Path):
    """A base's weights, trained and validated with another squeeze, also from a checkpoint of the adopted model."""
    base = realistic(timm.create_model('regnety_002', num_classes=_CLASSES))
    torch.save(base.state_dict(), folder / 'base.pth')
    model = [
        '--device', 'cpu', '--model', 'adopted', '--num-classes', _CLASSES, '-b', 8, '--img-size', 64,
        '--model-kwargs', 'base=regnety_002', 'squeeze=rgse',
    ]
    train = ['train.py', *_DATA, *model, '--output', 'output', '--warmup-epochs', 0, '--experiment']
    _run(
        folder, *train, 'adopted', '--epochs', 2, '--pretrained', '--pretrained-path', 'base.pth', '--lr', 0.01,
        '--model-ema', '--amp', '--amp-dtype', 'bfloat16', '--channels-last')
    run = folder / 'output' / 'adopted'
    assert [row['epoch'] for row in _summary(run)] == ['0', '1']
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)
    assert checkpoint['arch'] == 'adopted'
    weights = checkpoint['state_dict']
    squeezes = {k: v for k, v in weights.items() if '.squeeze.' in k}
    assert sorted(v.shape[-1] for v in squeezes.values()) == [2, 2, 2, 2, 4, 8]
    assert all(v.abs().max() > 0 for v in squeezes.values())
    # the base's norms had seen 1000 batches, this run's two epochs were 3 each
    assert weights['stem.bn.num_batches_tracked'] == 1006

    validate = ['validate.py', *_DATA, *model, '--checkpoint', 'output/adopted/last.pth.tar']
    result = _result(_run(folder, *validate))
    assert result['model'] == 'adopted'
    assert _result(_run(folder, *validate, '--torchscript'))['top1'] == result['top1']
    ema = _result(_run(folder, *validate, '--use-ema'))
    assert ema['top1'] == pytest.approx(float(_summary(run)[-1]['eval_top1']), abs=1e-3)

    # from the adopted weights: nothing moves at this rate
    torch.save(weights, folder / 'adopted.pth')
    _run(folder, *train, 'again', '--epochs', 1, '--pretrained', '--pretrained-path', 'adopted.pth', '--lr', 1e-12)
    again = torch.load(folder / 'output' / 'again' / 'last.pth.tar', weights_only=False)['state_dict']
    for k, v in squeezes.items():
        torch.testing.assert_close(again[k], v)


def test_train_inductor(folder: Path):
    if not shutil.which(os.environ.get('CXX', 'g++')):
        pytest.skip('inductor needs a C++ compiler')
    # no validation, which would compile the model once or twice more
    args = [
        'train.py', *_DATA, '--val-split', '', '--model', 'rgse_resnet50', *_MODEL, '--img-size', 64, '--epochs', 1,
        '--warmup-epochs', 0, '--output', 'output', '--experiment',
    ]
    eager = _result(_run(folder, *args, 'eager'))
    process = _run(folder, *args, 'inductor', '--torchcompile')
    assert 'backend=inductor' in process.stderr
    assert _result(process)[0]['train']['loss'] == pytest.approx(eager[0]['train']['loss'], rel=1e-3)
    _load('rgse_resnet50', folder / 'output' / 'inductor' / 'last.pth.tar')


@pytest.mark.parametrize('options', ['', '--torchscript --channels-last'])
def test_validate(options: str, folder: Path, trained: Path):
    result = _validate(
        folder, 'output/recipe/last.pth.tar', '--use-ema', *options.split(), *_PREPROCESSING,
        '--results-file', 'validate.csv',
    )
    assert result['model'] == 'rgse_resnet50'
    assert (result['img_size'], result['crop_pct'], result['interpolation']) == (64, 0.875, 'bilinear')
    # train.py reports the validation of the EMA model
    assert result['top1'] == pytest.approx(float(_summary(trained)[-1]['eval_top1']), abs=1e-3)
    row, = _rows(folder / 'validate.csv')
    assert float(row['top1']) == result['top1']


def test_validate_other_architecture(folder: Path, trained: Path):
    process = _try(
        folder, 'validate.py', *_DATA, '--model', 'spse_resnet50', *_MODEL, '--img-size', 64,
        '--checkpoint', 'output/recipe/last.pth.tar',
    )
    assert process.returncode != 0
    assert 'Error(s) in loading state_dict for SEPoolResNet' in process.stderr


@pytest.mark.parametrize('options, output', [
    ('', 'averaged.pth'),
    ('--safetensors', 'averaged.safetensors'),
])
def test_avg_checkpoints(options: str, output: str, folder: Path, trained: Path):
    _run(
        folder, 'avg_checkpoints.py', '--input', 'output/recipe', '--filter', 'checkpoint-*.pth.tar', '--no-use-ema',
        '--output', output, *options.split(),
    )
    model = _load('rgse_resnet50', folder / output)
    checkpoints = [
        torch.load(trained / f'checkpoint-{epoch}.pth.tar', weights_only=False)['state_dict'] for epoch in (29, 30)
    ]
    for k, v in model.state_dict().items():
        if v.is_floating_point():
            torch.testing.assert_close(v, (checkpoints[0][k] + checkpoints[1][k]) / 2)
    assert _validate(folder, output)['img_size'] == 64


def test_convert(folder: Path, trained: Path):
    _run(
        folder, '-m', 'timm_sepool', 'convert', 'output/recipe/last.pth.tar', 'last.safetensors',
        '--model', 'rgse_resnet50', *_MODEL_KWARGS,
    )
    state_dict = torch.load(trained / 'last.pth.tar', weights_only=False)['state_dict']
    converted = load_file(folder / 'last.safetensors')
    assert converted.keys() == state_dict.keys()
    assert all(torch.equal(converted[k], v) for k, v in state_dict.items())
    assert _validate(folder, 'last.safetensors') == _validate(folder, 'output/recipe/last.pth.tar')


def test_inference(folder: Path, trained: Path):
    pytest.importorskip('pandas')
    _run(
        folder, 'inference.py', *_DATA, '--model', 'rgse_resnet50', *_MODEL, '--img-size', 64, *_PREPROCESSING,
        '--checkpoint', 'output/recipe/last.pth.tar', '--label-type', 'none', '--include-index', '--fullname',
        '--results-dir', 'inference', '--results-file', 'predictions', '--results-format', 'csv', 'json',
    )
    rows = _rows(folder / 'inference' / 'predictions.csv')
    images = (folder / 'data' / 'validation').rglob('*.png')
    assert sorted(row['filename'] for row in rows) == sorted(p.relative_to(p.parents[1]).as_posix() for p in images)
    assert len(rows) == len(json.loads((folder / 'inference' / 'predictions.json').read_text())) == _VAL_IMAGES
    # inference.py takes the EMA weights, whose validation train.py reports
    correct = sum(row['filename'].startswith(f'class{row["index"]}/') for row in rows)
    assert 100 * correct / len(rows) == pytest.approx(float(_summary(trained)[-1]['eval_top1']))


@pytest.mark.parametrize('model, options', [
    ('rgse_resnet50', ''),
    ('spse_resnet50', '--amp --amp-dtype bfloat16 --channels-last --grad-checkpointing --detail'),
])
def test_benchmark(model: str, options: str, folder: Path):
    process = _run(
        folder, 'benchmark.py', '--model', model, *_MODEL, '--img-size', 64, '--bench', 'both', *options.split(),
        '--num-warm-iter', 1, '--num-bench-iter', 5, '--results-file', 'benchmark.csv',
    )
    result = _result(process)  # failures are reported here, with exit code 0
    assert 'error' not in result
    assert result['model'] == model
    assert (result['infer_batch_size'], result['train_batch_size']) == (8, 8)
    assert result['infer_samples_per_sec'] > 0
    assert result['train_samples_per_sec'] > 0
    params = sum(p.numel() for p in timm.create_model(model, num_classes=_CLASSES, **TINY).parameters())
    assert result['param_count'] == pytest.approx(params / 1e6, abs=0.01)
    row, = _rows(folder / 'benchmark.csv')
    assert row['model'] == model


@pytest.mark.parametrize('model, options', [
    ('rgse_resnet50', ''),
    ('rgse_resnet50', '--dynamic-size'),
    ('spse_resnet50', '--dynamic-size'),
    ('rgse_resnet50', '--dynamo'),
    ('rgse_resnet50', '--dynamo --dynamic-size'),
    ('spse_resnet50', '--dynamo --dynamic-size'),
])
def test_onnx_export(model: str, options: str, folder: Path, tmp_path: Path):
    pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    # full-size, this script has no --model-kwargs
    torch.manual_seed(0)
    torch_model = timm.create_model(model, num_classes=_CLASSES).eval()
    torch.save(torch_model.state_dict(), tmp_path / 'model.pth')
    _run(
        folder, 'onnx_export.py', tmp_path / 'model.onnx', '--model', model, '--num-classes', _CLASSES,
        '--img-size', 64, '--checkpoint', tmp_path / 'model.pth', '--check-forward', *options.split(),
    )
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    shapes = [(3, 3, 64, 64)]
    if '--dynamic-size' in options:
        shapes += [(1, 3, 224, 224), (2, 3, 96, 80), (2, 3, 72, 40)]
    for shape in shapes:
        x = torch.randn(shape)
        with torch.inference_mode():
            expected = torch_model(x)
        output, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-3, atol=1e-4)
