""" `timm-sepool push`, against a local Hub """
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import nn

import timm
from helpers.common import TINY, images, serve_donor, tiny
from helpers.hub_server import HubServer
from helpers.runs import TINY_ARGS, check_fails, files, write_results, write_run
from timm_sepool.cli.main import main

ROW = dict(model='spse_resnext50')


class Trained(NamedTuple):
    run: Path
    model: nn.Module
    ema: nn.Module


@pytest.fixture
def trained(hub: HubServer, tmp_path: Path) -> Trained:
    """A run with its results, and no repository to push to."""
    hub.repos.pop(('model', 'user/net'), None)
    model, ema = (tiny('spse_resnext50', num_classes=4, in_chans=1) for _ in range(2))
    run = tmp_path / 'run'
    write_run(
        run, model, 'spse_resnext50', ema, in_chans=1, img_size=96, interpolation='bilinear', crop_pct=0.8, mean=[0.4],
        std=[0.3])
    write_results(run / 'results.csv', ROW, dict(model='resnet18', top1=1, top5=2))
    (run / 'labels.txt').write_bytes('\ufeffcat\ndog\nbird\nfish\n'.encode())  # an editor's byte order mark
    return Trained(run, model, ema)


def push_args(run: Path, *flags: Any, repo_id: str = 'user/net', model: str = 'spse_resnext50') -> list:
    return ['push', model, '--repo-id', repo_id, '--checkpoint', str(run / 'last.pth.tar'), *map(str, flags)]


def run_code(code: str, home: Path, *args: Any) -> None:
    """Run it in a process without an import of ours, with nothing in the Hub client's cache."""
    env = {**os.environ, 'HF_HOME': str(home)}
    subprocess.run([sys.executable, '-c', code, *map(str, args)], env=env, check=True, timeout=300)


def test_push_and_load(hub: HubServer, trained: Trained, tmp_path: Path, capsys) -> None:
    """The same bytes, preprocessing and labels arrive, and nothing of the donor's."""
    flags = ['--labels', trained.run / 'labels.txt', '--metrics', trained.run / 'results.csv']
    assert main(push_args(trained.run, *flags)) == 0
    assert "timm.create_model('hf-hub:user/net', pretrained=True)" in capsys.readouterr().out
    repo = hub.repos['model', 'user/net']
    assert set(repo) - {'.gitattributes'} == {'model.safetensors', 'config.json', 'README.md'}  # no pickle
    run_code("""
import sys, timm, torch, safetensors.torch
model = timm.create_model('hf-hub:user/net', pretrained=True).eval()
cfg = timm.data.resolve_data_config(model=model, use_test_size=True)
assert (model.num_classes, model.conv1.in_channels) == (4, 1)
assert tuple(cfg['input_size']) == (1, 96, 96) and cfg['interpolation'] == 'bilinear' and cfg['crop_pct'] == 0.8, cfg
assert tuple(cfg['mean']) == (0.4,) and tuple(cfg['std']) == (0.3,)
assert list(model.pretrained_cfg['label_names']) == ['cat', 'dog', 'bird', 'fish']
assert model.pretrained_cfg['hf_hub_id'] == 'user/net' and not model.pretrained_cfg.get('tag')
assert 'from_' not in str(model.pretrained_cfg)
safetensors.torch.save_file(model.state_dict(), sys.argv[1])
""", tmp_path / 'home', tmp_path / 'loaded.safetensors')
    loaded, expected = safetensors.torch.load_file(tmp_path / 'loaded.safetensors'), trained.model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in expected.items())

    config, card = json.loads(repo['config.json']), repo['README.md'].decode()
    assert config['num_classes'] == 4 and 'num_classes' not in config['model_args']
    assert 'value: 71.5' in card and 'hf-hub:user/net' in card and 'license: apache-2.0' in card
    assert not any(s in card for s in ('value: 1.0', 'base_model', 'donor'))

    sha = repo.sha
    assert main(push_args(trained.run, *flags)) == 0 and repo.sha == sha  # no commit without a change
    assert main(push_args(trained.run, '--use-ema', '--license', 'mit')) == 0 and repo.sha != sha
    assert torch.equal(safetensors.torch.load(repo['model.safetensors'])['fc.bias'], trained.ema.fc.bias)
    assert json.loads(repo['config.json'])['pretrained_cfg']['license'] == 'mit'


def test_transformers(hub: HubServer, trained: Trained, tmp_path: Path) -> None:
    pytest.importorskip('transformers')
    assert main(push_args(trained.run, '--labels', trained.run / 'labels.txt')) == 0
    run_code("""
import sys, torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained('user/net').eval()
assert model.config.num_labels == 4 and model.config.id2label[1] == 'dog', model.config
torch.save(model(torch.ones(2, 1, 96, 96)).logits.detach(), sys.argv[1])
""", tmp_path / 'home', tmp_path / 'logits.pt')
    expected = trained.model(torch.ones(2, 1, 96, 96))
    torch.testing.assert_close(torch.load(tmp_path / 'logits.pt'), expected.detach())


@pytest.mark.parametrize('model_kwargs', [
    dict(base='regnety_002', squeeze='spse'), TINY,
    pytest.param(dict(base='mobilenetv3_small_050'), marks=pytest.mark.full)], ids=str)
def test_adopted(tmp_path: Path, monkeypatch, model_kwargs: Dict) -> None:
    """Published, converted and published again, fine-tuned from what was published: equal to the bit."""
    monkeypatch.chdir(tmp_path)
    trained = timm.create_model('adopted', num_classes=7, in_chans=1, **model_kwargs).eval()
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if '.squeeze.' in name:
                parameter.normal_(std=0.1)
    write_run(
        tmp_path / 'run', trained, 'adopted', in_chans=1, img_size=96, mean=[0.4], std=[0.3], model_kwargs=model_kwargs)
    assert main(push_args(tmp_path / 'run', '--dry-run', 'a', model='adopted')) == 0
    assert main(['convert', 'run/last.pth.tar', 'b.safetensors', '--model', 'adopted']) == 0
    converted = ['push', 'adopted', '--repo-id', 'user/net', '--checkpoint', 'b.safetensors', '--dry-run', 'b']
    assert main(converted) == 0
    write_run(tmp_path / 'again', trained, 'local-dir:a', in_chans=1, model_kwargs={})
    assert main(push_args(tmp_path / 'again', '--dry-run', 'c', model='adopted')) == 0
    assert files(tmp_path / 'a') == ['README.md', 'config.json', 'model.safetensors']
    x = images(2, 1, 96, 96)
    for folder in 'abc':
        model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        assert torch.equal(model(x), trained(x))
        config = json.loads((tmp_path / folder / 'config.json').read_text())
        assert config['architecture'] == 'adopted' and config['pretrained_cfg']['input_size'] == [1, 96, 96]
        assert config == json.loads((tmp_path / 'a' / 'config.json').read_text())


def test_tag(hub: HubServer, tmp_path: Path, monkeypatch) -> None:
    """A tag's own weights, converted, with the donor's preprocessing and a card that says what they are."""
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    serve_donor(hub, 'resnet50.tv_in1k')
    hub.repos.pop(('model', 'user/tv'), None)
    results = write_results(
        tmp_path / 'results.csv', dict(model='rgse_resnet50', img_size=224, crop_pct=0.875, top1=50))
    argv = ['push', 'rgse_resnet50.from_resnet50_tv_in1k', '--repo-id', 'user/tv', '--private']
    assert main([*argv, '--metrics', str(results)]) == 0
    repo = hub.repos['model', 'user/tv']
    card = repo['README.md'].decode()
    assert repo.private and 'base_model: timm/resnet50.tv_in1k' in card and 'value: 50.0' in card
    model = timm.create_model('hf-hub:user/tv', pretrained=True, cache_dir=tmp_path).eval()
    donor = timm.create_model('resnet50.tv_in1k', pretrained=True, cache_dir=tmp_path).eval()
    assert torch.equal(model(images(2, 64, 64)), donor(images(2, 64, 64)))
    assert model.pretrained_cfg['interpolation'] == 'bilinear' and not model.pretrained_cfg.get('tag')
    shutil.rmtree(tmp_path)


def test_dry_run(hub: HubServer, trained: Trained, tmp_path: Path) -> None:
    """Nothing is uploaded, no token is needed; options stand in for a missing args.yaml."""
    (trained.run / 'args.yaml').unlink()
    requests = len(hub.requests)
    options = '--img-size 96 --interpolation bicubic --crop-pct 0.9 --mean 0.4 --std 0.3'.split()
    assert main(push_args(trained.run, '--dry-run', tmp_path / 'out', *options, *TINY_ARGS)) == 0
    assert len(hub.requests) == requests
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert torch.equal(model(images(2, 1, 64, 64)), trained.model(images(2, 1, 64, 64)))
    cfg = model.pretrained_cfg
    assert (tuple(cfg['input_size']), cfg['crop_pct'], cfg['interpolation']) == ((1, 96, 96), 0.9, 'bicubic')


@pytest.mark.parametrize('message, flags, kwargs', [
    ('Unknown model', [], dict(model='resnet50')),
    ('Unknown model', [], dict(model='spse_resnext50.a1_in1k')),
    ("Did you mean 'spse_resnext50'?", [], dict(model='spse_resnext50_32x4d')),
    ('is not a repository id', [], dict(repo_id='net')),
    ('is not a repository id', [], dict(repo_id='user/n e t')),
    ('was trained as spse_resnext50, not as rgse_resnext50. Name spse_resnext50', [], dict(model='rgse_resnext50')),
    ('was trained as spse_resnext50, not as adopted', [], dict(model='adopted')),
    ('best.pth.tar does not exist', ['--checkpoint', '{run}/best.pth.tar'], {}),
    ('is not an args.yaml', ['--args', '{run}/labels.txt'], {}),
    ('is not an args.yaml', ['--args', '{run}/none.yaml'], {}),
    ('is not a results file', ['--metrics', '{run}/labels.txt'], {}),
    ('nope.csv does not exist', ['--metrics', '{run}/nope.csv'], {}),
    ('Cannot read the labels', ['--labels', '{run}/none.txt'], {}),
    ('names 3 classes, but the network has 4', ['--labels', '{run}/results.csv'], {}),
    ('is invalid', ['--interpolation', 'nonsense'], {}),
    ('is invalid', ['--img-size', '-5'], {}),
    ('is invalid', ['--mean', '0.1', '0.2'], {}),
    ('is invalid', ['--crop-pct', '0'], {}),
    ('cannot be created', ['--model-kwargs', 'layer=3'], {}),
    ('does not fit spse_resnext50', ['--model-kwargs', 'layers=(1,1,2,1)'], {}),
    ('does not exist. Create it first: mkdir -p', ['--dry-run', '{run}/no/out'], {}),
    ('already exists', ['--dry-run', '{run}'], {}),
    ('user/other holds a resnet50, not a spse_resnext50', [], dict(repo_id='user/other')),
    ('user/other exists and is public', ['--private'], dict(repo_id='user/other')),
    ("user/other0 holds a config.json that is not timm's", [], dict(repo_id='user/other0')),
    ("user/other1 holds a config.json that is not timm's", [], dict(repo_id='user/other1')),
    ('user/other2 holds pytorch_model.bin without a config.json', [], dict(repo_id='user/other2')),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else None)
def test_bad_input(hub: HubServer, trained: Trained, tmp_path: Path, capsys, message, flags, kwargs) -> None:
    other = dict(architecture='resnet50')
    for name, content in (
            ('', {'config.json': json.dumps(other).encode()}), ('0', {'config.json': b'{not'}),
            ('1', {'config.json': b'[]'}), ('2', {'pytorch_model.bin': b'x'})):
        hub.repos.pop(('model', f'user/other{name}'), None)
        hub.add(f'user/other{name}', content)
    before = {repo_id: repo.sha for (_, repo_id), repo in hub.repos.items()}
    argv = push_args(trained.run, *(flag.format(run=trained.run) for flag in flags), **kwargs)
    check_fails(capsys, tmp_path, argv, message)
    assert {repo_id: repo.sha for (_, repo_id), repo in hub.repos.items()} == before


def test_force(hub: HubServer, trained: Trained) -> None:
    hub.add('user/net', {'config.json': json.dumps(dict(architecture='resnet50')).encode()})
    assert main(push_args(trained.run)) == 2
    assert main(push_args(trained.run, '--force')) == 0


def test_without_what_it_needs(trained: Trained, tmp_path: Path, capsys, monkeypatch) -> None:
    (trained.run / 'args.yaml').rename(trained.run / 'elsewhere.yaml')
    check_fails(capsys, tmp_path, push_args(trained.run, *TINY_ARGS), 'The preprocessing of')
    monkeypatch.setattr('huggingface_hub.get_token', lambda: None)
    argv = push_args(trained.run, '--args', trained.run / 'elsewhere.yaml')
    check_fails(capsys, tmp_path, argv, 'No Hugging Face token was found.')
    for flags in (['--crop-pct', '0.9'], ['--use-ema'], TINY_ARGS, ['--args', 'args.yaml']):
        check_fails(capsys, tmp_path, ['push', 'rgse_resnet50', '--repo-id', 'user/net', *flags], 'need --checkpoint')
    check_fails(capsys, tmp_path, ['push', 'adopted', '--repo-id', 'user/net'], 'adopted has no weights of its own.')
