""" The arguments, the preprocessing and the results of a training run, as `push` publishes them """
import json
import os
from pathlib import Path
from typing import Any, Dict

import pytest
import torch
import yaml

import timm
from helpers.common import TINY, images, tiny
from helpers.hub_server import HubServer
from helpers.runs import check_fails, push_args, write_results, write_run
from timm.data import resolve_data_config
from timm_sepool.cli._output import save_folder
from timm_sepool.cli.main import main

TAG = 'rgse_resnet50.from_resnet50_tv_in1k'
OF_TAG = dict(
    input_size=[3, 224, 224], interpolation='bilinear', crop_pct=0.875, crop_mode='center', mean=[0.485, 0.456, 0.406],
    std=[0.229, 0.224, 0.225])
SOURCE_CFG = dict(
    input_size=(3, 96, 96), test_input_size=(3, 128, 128), interpolation='bicubic', crop_pct=0.9, test_crop_pct=1.0,
    crop_mode='border', mean=(0.3, 0.3, 0.3), std=(0.2, 0.2, 0.2), num_classes=7, label_names=['stale'] * 7)
OF_SOURCE = dict(
    input_size=[3, 96, 96], interpolation='bicubic', crop_pct=0.9, crop_mode='center', mean=[0.3] * 3, std=[0.2] * 3)
ROW = dict(model='spse_resnet50')


@pytest.fixture
def source(hub: HubServer, tmp_path: Path) -> Path:
    """A published network with a config of its own, as folder `source` and on the Hub as user/source."""
    model = tiny('rgse_resnet50', pretrained_cfg_overlay=SOURCE_CFG, num_classes=7)
    save_folder(model, tmp_path / 'source', TINY)
    hub.add('user/source', {p.name: p for p in (tmp_path / 'source').iterdir()})
    return tmp_path / 'source'


@pytest.mark.parametrize('name, args, expected', [
    (TAG, {}, OF_TAG),
    ('local-dir:source', dict(model_kwargs={}), OF_SOURCE),
    ('hf-hub:user/source', dict(model_kwargs={}), OF_SOURCE),
    ('rgse_resnet50', dict(img_size=32, interpolation='bilinear', crop_pct=.875), dict(OF_TAG, input_size=[3, 32, 32])),
    (TAG, dict(input_size=[1, 48, 40], crop_pct=0.),  # train.py takes 0 for nothing, and averages mean and std
     dict(OF_TAG, input_size=[1, 48, 40], mean=[pytest.approx(0.449)], std=[pytest.approx(0.226)])),
    (TAG, dict(gp='max', mean=[0.5], std=[0.5]), dict(OF_TAG, mean=[0.5] * 3, std=[0.5] * 3)),
], ids=['tag', 'local-dir', 'hf-hub', 'options', 'input-size', 'gp'])
def test_network_and_preprocessing_of_the_run(
        source: Path, tmp_path: Path, monkeypatch, name: str, args: Dict[str, Any], expected: Dict[str, Any]) -> None:
    """The published config is that of the run's own start, and its network computes what was trained."""
    monkeypatch.chdir(tmp_path)
    chans = expected['input_size'][0]
    trained = tiny('rgse_resnet50', in_chans=chans, num_classes=7, global_pool=args.get('gp', 'avg'))
    checkpoint = write_run(tmp_path / 'run', trained, name, **args)
    assert main(push_args('rgse_resnet50', checkpoint, '--dry-run', 'out')) == 0
    cfg = json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg']
    assert {k: cfg[k] for k in expected} == expected and 'stale' not in str(cfg)
    model = timm.create_model('local-dir:out', pretrained=True).eval()
    assert torch.equal(model(images(2, chans, 64, 64)), trained(images(2, chans, 64, 64)))
    run_args = yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())
    start = timm.create_model(name, in_chans=chans, **run_args['model_kwargs'])
    # by default validate.py takes the test size; what train.py resolves is the same
    by_validate = resolve_data_config({}, model=model, use_test_size=True)
    for resolved in (by_validate, resolve_data_config(run_args, model=start)):
        assert (resolved['interpolation'], resolved['crop_pct']) == (expected['interpolation'], expected['crop_pct'])
        assert list(resolved['input_size']) == expected['input_size']


@pytest.mark.parametrize('rows, message', [
    ([dict(model='local-dir:out')], None),
    ([ROW, dict(model='resnet18', img_size=224)], None),
    ([dict(ROW, img_size=224)], 'img_size 224, crop_pct 0.8, interpolation bilinear, but the config to publish says '),
    ([dict(ROW, crop_pct=0.95)], 'was measured with img_size 96, crop_pct 0.95, '),
    ([dict(ROW, interpolation='bicubic')], 'bicubic, but the config to publish says img_size 96, crop_pct 0.8, '),
    ([ROW, dict(model='local-dir:out', top1=1)], 'has several rows of spse_resnet50'),
    ([dict(ROW, top1='nan')], 'has no accuracy of spse_resnet50'),
    ([dict(model='resnet18'), dict(model='local-dir:nowhere')], 'has no accuracy of spse_resnet50'),
    ([dict(ROW, top1='high')], 'is not a results file of validate.py'),
    ([dict(model='local-dir:older')], 'has the accuracy of local-dir:older, whose weights are not those to publish'),
], ids=str)
def test_results(tmp_path: Path, capsys, monkeypatch, rows: list, message) -> None:
    """Only figures of the preprocessing and weights that are published become figures of the card."""
    monkeypatch.chdir(tmp_path)
    cfg = dict(img_size=96, crop_pct=0.8, interpolation='bilinear')
    model, ema = (tiny('spse_resnet50') for _ in range(2))
    argv = push_args('spse_resnet50', write_run(tmp_path / 'run', model, 'spse_resnet50', ema, **cfg))
    assert main([*argv, '--dry-run', 'out']) == main([*argv, '--use-ema', '--dry-run', 'older']) == 0
    results = write_results(tmp_path / 'results.csv', *rows)
    results.write_bytes(b'\xef\xbb\xbf' + results.read_bytes())  # a spreadsheet's byte order mark
    argv += ['--dry-run', 'again', '--metrics', 'results.csv']
    if message:
        check_fails(capsys, tmp_path, argv, message)
    else:
        os.utime('out/model.safetensors', (2e9, 2e9))
        if rows[0]['model'] == 'local-dir:out':
            check_fails(capsys, tmp_path, argv, 'results.csv is older than out/model.safetensors')
            os.utime('out/model.safetensors', (1e9, 1e9))
        assert main(argv) == 0
        card = (tmp_path / 'again' / 'README.md').read_text()
        assert card.count('value: 71.5') == 1 and '| 96 | 71.5 | 91.0 | these weights |' in card
