""" The main job from the command line """
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import timm
from helpers.common import FULL
from helpers.runs import check_fails
from timm_sepool.cli._digits import NUM_HELD_OUT, load_digits
from timm_sepool.cli.main import main
from timm_sepool.cli.quickstart import top1


def test_quickstart(tmp_path, capsys, monkeypatch) -> None:
    """It says how long it takes, has at least 95 % top-1, timm loads it, and the printed commands run as they stand."""
    monkeypatch.chdir(tmp_path)
    folder = Path("it's $HOME")
    assert main(['quickstart', '--out', str(folder), *([] if FULL else ['--epochs', '5'])]) == 0
    out = capsys.readouterr().out
    assert re.match(r'Training a small rgse_resnet50 .*This takes about [1-9]\d* s\.\nepoch  1 ', out)
    accuracy = float(out.split('top-1 ')[-1].split(' %')[0])
    assert sorted(os.listdir(folder)) == ['config.json', 'digit.png', 'model.safetensors']
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert list(model.pretrained_cfg['label_names']) == [str(i) for i in range(10)]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    digits, labels = load_digits()
    held_out = torch.stack([transform(image) for image in digits[-NUM_HELD_OUT:]])
    assert top1(model, held_out, labels[-NUM_HELD_OUT:]) == pytest.approx(accuracy, abs=0.01) and accuracy >= 95

    predict = re.search(r'^  (python -c ".*digit.png\S*)$', out, re.MULTILINE | re.DOTALL)[1]
    monkeypatch.setenv('PATH', str(Path(sys.executable).parent), prepend=os.pathsep)
    printed = subprocess.run(predict, shell=True, capture_output=True, text=True).stdout
    digit, probability = re.fullmatch(r'(\d) with probability (\d\.\d+)\n', printed).groups()
    expected = model(held_out[:1]).softmax(1)[0]
    assert int(digit) == expected.argmax() and float(probability) == pytest.approx(expected.max().item(), abs=1e-3)

    root = Path(__file__).parents[2]
    docs = ' '.join(path.read_text() for path in [root / 'README.md', *root.glob('docs/*.md')])
    commands = re.findall(r'^  (python \w+\.py(?:.*\\\n)*.*)$', out, re.MULTILINE)
    fine_tune, train, validate, docs = (re.sub(r'[\s\\]+', ' ', text) for text in (*commands, docs))
    assert fine_tune.startswith('python train.py --data-dir DIR --model rgse_resnet50 --pretrained --num-classes N ')
    assert ('--device cpu' in fine_tune) != torch.cuda.is_available() and train in docs and validate in docs


@pytest.mark.full
def test_same_seed_same_result(tmp_path) -> None:
    """Bit for bit; another seed gives other weights; the other family trains too."""
    a, b, c, d = (tmp_path / name for name in 'abcd')
    for out, options in ((a, '--seed 3'), (b, '--seed 3'), (c, '--seed 4'), (d, '--model spse_resnext50')):
        assert main(['quickstart', '--out', str(out), '--epochs', '1', *options.split()]) == 0
    a, b, c, d = (load_file(out / 'model.safetensors') for out in (a, b, c, d))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a['fc.weight'], c['fc.weight'])
    assert 'layer1.0.se.weight4' in d


@pytest.mark.parametrize('argv,message', [
    ('--out existing', 'existing already exists. Choose another'), ('--out no/out', 'Create it first: mkdir -p no'),
    ('--epochs 0', '--epochs must be at least 1, got 0'), ('--seed -1', '--seed must be from 0 to'),
    ('--model resnet50', "Unknown model 'resnet50'"), ('--model adopted', 'Choose an rgse_ or spse_ model'),
    ('--model rgse_resnext50_32x4d', "Did you mean 'rgse_resnext50'?"),
])
def test_bad_input(tmp_path, capsys, monkeypatch, argv: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'existing').mkdir()
    check_fails(capsys, tmp_path, ['quickstart', *argv.split()], message)
