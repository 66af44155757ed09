""" The main job from the command line """
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest
import torch
from safetensors.torch import load_file

import timm
from timm_sepool.cli._digits import NUM_HELD_OUT, load_digits
from timm_sepool.cli.main import main
from timm_sepool.cli.quickstart import top1

ROOT = Path(__file__).parents[2]


def one_line(text: str) -> str:
    return ' '.join(text.replace('\\\n', ' ').split())


def test_quickstart(tmp_path, capsys, monkeypatch) -> None:
    """At least 95 % top-1, saved, loaded back by timm, and the commands that are printed run as they stand."""
    monkeypatch.chdir(tmp_path)
    assert main(['quickstart', '--out', "it's $HOME"]) == 0
    out = capsys.readouterr().out
    accuracy = float(out.split('top-1 ')[-1].split(' %')[0])
    assert accuracy >= 95
    # says before the work how long it takes
    assert re.match(r'Training a small rgse_resnet50 .*This takes about [1-9]\d* s\.\nepoch  1 ', out)

    folder = Path("it's $HOME")
    assert sorted(os.listdir(folder)) == ['config.json', 'digit.png', 'model.safetensors']
    assert json.loads((folder / 'config.json').read_text())['label_names'] == [str(i) for i in range(10)]
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    digits, labels = load_digits()
    held_out = torch.stack([transform(image) for image in digits[-NUM_HELD_OUT:]])
    assert top1(model, held_out, labels[-NUM_HELD_OUT:]) == pytest.approx(accuracy, abs=0.01)

    predict = re.search(r'^  (python -c ".*digit.png\S*)$', out, re.MULTILINE | re.DOTALL)
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    process = subprocess.run(predict[1], shell=True, capture_output=True, text=True, env={**os.environ, 'PATH': path})
    digit, probability = re.fullmatch(r'(\d) with probability (\d\.\d+)\n', process.stdout).groups()
    expected = model(transform(digits[-NUM_HELD_OUT])[None]).softmax(1)[0]
    assert int(digit) == expected.argmax() and float(probability) == pytest.approx(expected.max().item(), abs=1e-3)

    fine_tune, train, validate = map(one_line, re.findall(r'^  (python \w+\.py(?:.*\\\n)*.*)$', out, re.MULTILINE))
    assert fine_tune.startswith('python train.py --data-dir DIR --model rgse_resnet50 --pretrained --num-classes N ')
    assert ('--device cpu' in fine_tune) != torch.cuda.is_available()
    docs = one_line('\n'.join(path.read_text() for path in [ROOT / 'README.md', *ROOT.glob('docs/*.md')]))
    assert train in docs and validate in docs


def test_same_seed_same_result(tmp_path) -> None:
    """Bit for bit; another seed gives other weights; the other family trains too."""
    def weights(name: str, seed: int, model: str = 'rgse_resnet50'):
        argv = ['quickstart', '--out', str(tmp_path / name), '--seed', str(seed), '--epochs', '1', '--model', model]
        assert main(argv) == 0
        return load_file(tmp_path / name / 'model.safetensors')

    a, b, c = weights('a', 3), weights('b', 3), weights('c', 4)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a['fc.weight'], c['fc.weight'])
    assert 'layer1.0.se.weight4' in weights('d', 3, 'spse_resnext50')


@pytest.mark.parametrize('argv,message', [
    (['--out', 'existing'], 'existing already exists. Choose another'),
    (['--out', 'no/out'], 'Create it first: mkdir -p no'),
    (['--epochs', '0'], '--epochs must be at least 1, got 0'),
    (['--seed', '-1'], '--seed must be from 0 to'),
    (['--model', 'resnet50'], "Unknown model 'resnet50'"),
    (['--model', 'rgse_resnext50_32x4d'], "Did you mean 'rgse_resnext50'?"),
    (['--model', 'adopted'], 'Choose an rgse_ or spse_ model'),
])
def test_bad_input(tmp_path, capsys, monkeypatch, argv: List[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'existing').mkdir()
    assert main(['quickstart', *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1
    assert os.listdir() == ['existing']
