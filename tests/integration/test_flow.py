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

import numpy as np
import pytest
from PIL import Image

from helpers.hub_server import HubServer

SCRIPTS = os.environ.get('TIMM_SCRIPTS')
pytestmark = pytest.mark.skipif(
    not SCRIPTS, reason='set TIMM_SCRIPTS to a checkout of https://github.com/huggingface/pytorch-image-models')
MODEL = 'rgse_resnet50.from_resnet50_tv_in1k'  # its preprocessing is not that of the default tag


@pytest.mark.parametrize('size, options', [
    (32, '--img-size 32 --interpolation bilinear --crop-pct 0.875'),
    (48, '--input-size 3 48 48'),  # interpolation and crop are those of the tag
], ids=['options', 'tag'])
def test_flow(hub: HubServer, tmp_path: Path, size: int, options: str) -> None:
    def run(command: str) -> str:
        process = subprocess.run(
            [sys.executable, *command.split()], cwd=tmp_path, env={**os.environ, 'OMP_NUM_THREADS': '1'},
            capture_output=True, text=True, timeout=900)
        assert process.returncode == 0, process.stderr[-4000:]
        return process.stdout

    for script in ('train.py', 'validate.py', 'avg_checkpoints.py'):  # without the checkout's timm beside them
        shutil.copy(Path(SCRIPTS) / script, tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (('train', 24), ('validation', 40)):
        for c in range(3):  # noise with stripes whose period is the class
            folder = tmp_path / 'data' / split / f'class{c}'
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (60, 70, 3), dtype=np.uint8)
                pixels[:, ::3 + c] //= 2
                Image.fromarray(pixels).save(folder / f'{i}.png')
    data = '--data-dir data -j 0 --device cpu -b 24'
    run(f'train.py {data} --model {MODEL} --num-classes 3 --epochs 2 --warmup-epochs 0 --opt momentum --lr 0.05 '
        f'--checkpoint-hist 1 --output output --experiment run {options} '
        '--model-kwargs layers=(1,1,1,1) channels=(16,32,64,128)')
    with open(tmp_path / 'output' / 'run' / 'summary.csv', newline='') as f:
        top1 = float(list(csv.DictReader(f))[-1]['eval_top1'])
    # of one checkpoint, the last: the average is its weights
    averaged = 'output/run/averaged.pth'
    run(f'avg_checkpoints.py --input output/run --filter last.pth.tar --no-sort --output {averaged}')

    push = f'-m timm_sepool push rgse_resnet50 --repo-id user/flow{size} --checkpoint {averaged}'
    run(f'{push} --dry-run folder')
    printed = run(f'validate.py {data} --pretrained --model local-dir:folder --results-file results.csv')
    validated = json.loads(printed.split('--result\n')[1])
    assert (validated['img_size'], validated['crop_pct'], validated['interpolation']) == (size, 0.875, 'bilinear')
    assert validated['top1'] == pytest.approx(top1, abs=1e-3)

    run(f'{push} --metrics results.csv')
    assert f'value: {validated["top1"]}' in hub.repos['model', f'user/flow{size}']['README.md'].decode()
    used = json.loads(run(f'validate.py {data} --pretrained --model hf-hub:user/flow{size}').split('--result\n')[1])
    assert used['top1'] == validated['top1'] and used['img_size'] == size
