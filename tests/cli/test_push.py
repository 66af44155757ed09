""" `timm-sepool push`, against a local Hub """
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Dict, List

import pytest
import safetensors.torch
import torch
from torch import nn

import timm
from helpers.common import TINY, images, serve_donor, tiny
from helpers.hub_server import HubServer
from helpers.runs import TINY_ARGS, check_fails, files, push_args, write_results, write_run
from timm_sepool.cli.main import main

OTHER_REPOS = {
    'user/resnet50': {'config.json': b'{"architecture": "resnet50"}'}, 'user/damaged': {'config.json': b'{not'},
    'user/list': {'config.json': b'[]'}, 'user/bin': {'pytorch_model.bin': b'x'}}


@pytest.fixture
def trained(hub: HubServer, tmp_path: Path, tmp_path_factory, monkeypatch) -> SimpleNamespace:
    """A run with its results, no repository to push to, and nothing in the Hub client's cache."""
    hub.repos.pop(('model', 'user/net'), None)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path_factory.mktemp('cache')))
    model, ema = (tiny('spse_resnext50', num_classes=4, in_chans=1) for _ in range(2))
    preprocessing = dict(in_chans=1, img_size=96, interpolation='bilinear', crop_pct=0.8, mean=[0.4], std=[0.3])
    checkpoint = write_run(tmp_path / 'run', model, 'spse_resnext50', ema, **preprocessing)
    run = checkpoint.parent
    write_results(run / 'results.csv', dict(model='spse_resnext50'), dict(model='resnet18', top1=1, top5=2))
    (run / 'labels.txt').write_bytes('\ufeffcat\ndog\nbird\nfish\n'.encode())  # an editor's byte order mark
    push = partial(push_args, 'spse_resnext50', checkpoint)
    return SimpleNamespace(run=run, checkpoint=checkpoint, model=model, ema=ema, push_args=push)


def test_push_and_load(hub: HubServer, trained: SimpleNamespace, capsys) -> None:
    """The same bytes, preprocessing and labels arrive, and nothing of the donor's."""
    flags = ['--labels', trained.run / 'labels.txt', '--metrics', trained.run / 'results.csv']
    assert main(trained.push_args(*flags)) == 0
    assert "timm.create_model('hf-hub:user/net', pretrained=True)" in capsys.readouterr().out
    repo = hub.repos['model', 'user/net']
    assert set(repo) - {'.gitattributes'} == {'model.safetensors', 'config.json', 'README.md'}  # no pickle
    model = timm.create_model('hf-hub:user/net', pretrained=True).eval()
    assert (model.num_classes, model.conv1.in_channels) == (4, 1)
    assert list(model.pretrained_cfg['label_names']) == ['cat', 'dog', 'bird', 'fish']
    assert model.pretrained_cfg['hf_hub_id'] == 'user/net' and 'from_' not in str(model.pretrained_cfg)
    cfg = timm.data.resolve_data_config(model=model, use_test_size=True)
    assert {k: v if isinstance(v, (str, float)) else list(v) for k, v in cfg.items()} == dict(
        input_size=[1, 96, 96], interpolation='bilinear', crop_pct=0.8, crop_mode='center', mean=[0.4], std=[0.3])
    torch.testing.assert_close(model.state_dict(), trained.model.state_dict(), rtol=0, atol=0)
    card = repo['README.md'].decode()
    assert 'value: 71.5' in card and 'hf-hub:user/net' in card and 'license: apache-2.0' in card
    assert not any(s in card for s in ('value: 1.0', 'base_model', 'donor'))
    assert 'num_classes' not in json.loads(repo['config.json'])['model_args']

    sha = repo.sha
    assert main(trained.push_args(*flags)) == 0 and repo.sha == sha  # no commit without a change
    assert main(trained.push_args('--use-ema', '--license', 'mit')) == 0 and repo.sha != sha
    assert torch.equal(safetensors.torch.load(repo['model.safetensors'])['fc.bias'], trained.ema.fc.bias)
    assert json.loads(repo['config.json'])['pretrained_cfg']['license'] == 'mit'

    hub.add('user/net', OTHER_REPOS['user/resnet50'])
    assert main(trained.push_args('--force')) == 0


def test_transformers(hub: HubServer, trained: SimpleNamespace) -> None:
    transformers = pytest.importorskip('transformers')
    assert main(trained.push_args('--labels', trained.run / 'labels.txt')) == 0
    model = transformers.AutoModelForImageClassification.from_pretrained('user/net').eval()
    assert model.config.num_labels == 4 and model.config.id2label[1] == 'dog', model.config
    torch.testing.assert_close(model(torch.ones(2, 1, 96, 96)).logits, trained.model(torch.ones(2, 1, 96, 96)))


@pytest.mark.parametrize('model_kwargs', [
    dict(base='regnety_002', squeeze='spse'), TINY, dict(base='resnet18', attention='cbam', modules=['layer*'], **TINY),
], ids=str)
def test_adopted(tmp_path: Path, monkeypatch, model_kwargs: Dict) -> None:
    """Published, converted and published again, fine-tuned from what was published: equal to the bit."""
    monkeypatch.chdir(tmp_path)
    trained = timm.create_model('adopted', num_classes=7, in_chans=1, **model_kwargs).eval()
    for parameter in trained.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    write_run(tmp_path / 'run', trained, 'adopted', in_chans=1, img_size=96, model_kwargs=model_kwargs)
    assert main('convert run/last.pth.tar b.safetensors --model adopted'.split()) == 0
    write_run(tmp_path / 'again', trained, 'local-dir:run-out', in_chans=1, model_kwargs={})
    x, configs = images(2, 1, 96, 96), []
    for checkpoint in (Path('run/last.pth.tar'), Path('b.safetensors'), Path('again/last.pth.tar')):
        folder = f'{checkpoint.parts[0]}-out'
        assert main(push_args('adopted', checkpoint, '--dry-run', folder)) == 0
        assert files(tmp_path / folder) == ['README.md', 'config.json', 'model.safetensors']
        assert torch.equal(timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(x), trained(x))
        configs.append(json.loads((tmp_path / folder / 'config.json').read_text()))
        assert configs[-1]['num_classes'] == 7  # timm reads this one; in pretrained_cfg, timm 1.0.26 writes the base's
        del configs[-1]['pretrained_cfg']['num_classes']
    assert configs[0]['architecture'] == 'adopted' and configs[0]['pretrained_cfg']['input_size'] == [1, 96, 96]
    assert configs == [configs[0]] * 3


def test_tag(hub: HubServer, tmp_path: Path, monkeypatch) -> None:
    """A tag's own weights, converted, with the donor's preprocessing and a card that says what they are."""
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    serve_donor(hub, 'resnet50.tv_in1k')
    (tmp_path / 'config.json').write_text('{"architecture": "rgse_resnet50"}')
    safetensors.torch.save_file({}, tmp_path / 'model.safetensors')  # the squeeze of a tag never has the same weights
    write_results(tmp_path / 'results', dict(model=f'local-dir:{tmp_path}', img_size=224, crop_pct=0.875, top1=50))
    argv = f'push rgse_resnet50.from_resnet50_tv_in1k --repo-id user/tv --private --metrics {tmp_path / "results"}'
    assert main(argv.split()) == 0
    repo = hub.repos['model', 'user/tv']
    card = repo['README.md'].decode()
    assert repo.private and 'base_model: timm/resnet50.tv_in1k' in card and 'value: 50.0' in card
    model, donor = (timm.create_model(n, pretrained=True).eval() for n in ('hf-hub:user/tv', 'resnet50.tv_in1k'))
    assert torch.equal(model(images(2, 64, 64)), donor(images(2, 64, 64)))
    assert model.pretrained_cfg['interpolation'] == 'bilinear' and not model.pretrained_cfg.get('tag')


@pytest.mark.parametrize('message, cases', [  # a model first, or spse_resnext50
    ('Unknown model', ['resnet50']),
    ("Did you mean 'spse_resnext50'?", ['spse_resnext50_32x4d']),
    ('was trained as spse_resnext50, not as rgse_resnext50. Name spse_resnext50', ['rgse_resnext50']),
    ('is not a repository id', ['--repo-id net', '--repo-id user/n..t']),
    ('is not an args.yaml', ['--args {run}/labels.txt', '--args {run}/none.yaml']),
    ('nope.csv does not exist', ['--metrics {run}/nope.csv']),
    ('Cannot read the labels', ['--labels {run}/none.txt']),
    ('names 3 classes, but the network has 4', ['--labels {run}/results.csv']),
    ('is invalid', ['--interpolation nonsense', '--img-size -5', '--mean 0.1 0.2', '--crop-pct 0']),
    ('user/resnet50 holds a resnet50, not a spse_resnext50', ['--repo-id user/resnet50']),
    ('user/resnet50 exists and is public', ['--repo-id user/resnet50 --private']),
    (" holds a config.json that is not timm's", ['--repo-id user/damaged', '--repo-id user/list']),
    ('user/bin holds pytorch_model.bin without a config.json', ['--repo-id user/bin']),
], ids=lambda value: value if isinstance(value, str) else '')
def test_bad_input(hub: HubServer, trained: SimpleNamespace, tmp_path: Path, capsys, message, cases: List[str]) -> None:
    repos = {repo_id: hub.add(repo_id, content) for repo_id, content in OTHER_REPOS.items()}
    for case in cases:
        argv = case.format(run=trained.run).split()
        model = 'spse_resnext50' if argv[0].startswith('--') else argv.pop(0)
        check_fails(capsys, tmp_path, push_args(model, trained.checkpoint, *argv), message)
    assert {repo_id: hub.repos['model', repo_id].sha for repo_id in repos} == repos
    assert ('model', 'user/net') not in hub.repos


def test_without_what_it_needs(trained: SimpleNamespace, tmp_path: Path, capsys, monkeypatch) -> None:
    for name in ('local-dir:nowhere', 'hf-hub:user/nowhere'):
        argv = push_args('rgse_resnet50', write_run(tmp_path / name[:5], tiny('rgse_resnet50'), name))
        check_fails(capsys, tmp_path, argv, f'started from {name}, whose config.json cannot be read: ')
    (trained.run / 'args.yaml').rename(trained.run / 'elsewhere.yaml')
    check_fails(capsys, tmp_path, trained.push_args(*TINY_ARGS), 'The preprocessing of')
    monkeypatch.setattr('huggingface_hub.get_token', lambda: None)
    check_fails(capsys, tmp_path, trained.push_args('--args', trained.run / 'elsewhere.yaml'), 'No Hugging Face token')
    for flags in ('--crop-pct 0.9', '--use-ema', '--model-kwargs base=x', '--args args.yaml'):
        check_fails(capsys, tmp_path, f'push rgse_resnet50 --repo-id user/net {flags}'.split(), 'need --checkpoint')
    check_fails(capsys, tmp_path, ['push', 'adopted', '--repo-id', 'user/net'], 'adopted has no weights of its own.')
