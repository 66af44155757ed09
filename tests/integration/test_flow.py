""" From a fine-tuning to a published network with timm's own scripts, as docs/training.md shows it

Every number along the way has to be that of the last line in the run's summary.csv.
"""
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if not os.environ.get('TIMM_SCRIPTS'):
    pytest.skip(
        'set TIMM_SCRIPTS to a checkout of https://github.com/huggingface/pytorch-image-models',
        allow_module_level=True,
    )

import numpy as np
from PIL import Image

from helpers.hub_server import HubServer

SCRIPTS = Path(os.environ['TIMM_SCRIPTS']).resolve()
CLASSES = 3
MODEL = 'rgse_resnet50.from_resnet50_tv_in1k'  # its preprocessing is not that of the default tag


def run(folder: Path, *args) -> str:
    """Run python in the folder, expect success, and return what it printed."""
    process = subprocess.run(
        [sys.executable, *map(str, args)], cwd=folder, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True,
        text=True, timeout=900)
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """The scripts, and images of noise with stripes whose period is their class."""
    folder = tmp_path_factory.mktemp('flow')
    for script in ('train.py', 'validate.py', 'avg_checkpoints.py'):
        shutil.copy(SCRIPTS / script, folder)
    rng = np.random.default_rng(0)
    for split, count in (('train', 24), ('validation', 40)):
        for c in range(CLASSES):
            (folder / 'data' / split / f'class{c}').mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (60, 70, 3), dtype=np.uint8)
                pixels[:, ::3 + c] //= 2
                Image.fromarray(pixels).save(folder / 'data' / split / f'class{c}' / f'{i}.png')
    return folder


@pytest.mark.parametrize('options', [
    ['--img-size', 32, '--interpolation', 'bilinear', '--crop-pct', 0.875],
    ['--input-size', 3, 48, 48],  # interpolation and crop are those of the tag
], ids=['options', 'tag'])
def test_flow(hub: HubServer, folder: Path, options: list) -> None:
    experiment = f'run{len(options)}'
    output = folder / 'output' / experiment
    averaged = output / 'averaged.pth'
    data = ['--data-dir', 'data', '-j', 0, '--device', 'cpu']
    run(
        folder, 'train.py', *data, '--model', MODEL, '--num-classes', CLASSES, '-b', 24, '--epochs', 2,
        '--warmup-epochs', 0, '--opt', 'momentum', '--lr', 0.05, '--checkpoint-hist', 1, '--output', 'output',
        '--experiment', experiment, *options, '--model-kwargs', 'layers=(1,1,1,1)', 'channels=(16,32,64,128)')
    with open(output / 'summary.csv', newline='') as f:
        top1 = float(list(csv.DictReader(f))[-1]['eval_top1'])
    # of one checkpoint, the last: the average is its weights
    run(folder, 'avg_checkpoints.py', '--input', output, '--filter', 'last.pth.tar', '--no-sort', '--output', averaged)

    push = ['-m', 'timm_sepool', 'push', 'rgse_resnet50', '--repo-id', f'user/{experiment}', '--checkpoint', averaged]
    run(folder, *push, '--dry-run', experiment)
    validate = ['validate.py', *data, '--pretrained', '-b', 24, '--model']
    printed = run(folder, *validate, f'local-dir:{experiment}', '--results-file', f'{experiment}.csv')
    validated = json.loads(printed.split('--result\n')[1])
    size = options[-1] if options[0] == '--input-size' else 32
    assert (validated['img_size'], validated['crop_pct'], validated['interpolation']) == (size, 0.875, 'bilinear')
    assert validated['top1'] == pytest.approx(top1, abs=1e-3)

    run(folder, *push, '--metrics', f'{experiment}.csv')
    assert f'value: {validated["top1"]}' in hub.repos['model', f'user/{experiment}']['README.md'].decode()
    used = json.loads(run(folder, *validate, f'hf-hub:user/{experiment}').split('--result\n')[1])
    assert used['top1'] == validated['top1'] and used['img_size'] == size
