""" Checkpoints of every source: converted, loaded as timm loads them, or refused with an error that names the fault """
import re
from functools import partial
from typing import Dict

import pytest
import safetensors.torch
import torch

import timm
from helpers.common import TINY, official_state_dict, tiny
from timm_sepool import SEPoolResNet, checkpoint_filter_fn, sepool_resnet
from timm_sepool.cli.main import main
from timm_sepool.detection import faster_rcnn

KEY = 'layer2.0.conv1.weight'
create = partial(timm.create_model, 'rgse_resnet50', pretrained=True, **TINY)


@pytest.fixture(scope='module')
def sources() -> Dict[str, Dict[str, torch.Tensor]]:
    official = official_state_dict('rgse_resnet50').items()
    return dict(
        native=tiny('rgse_resnet50', num_classes=1000).state_dict(),
        donor=tiny('resnet50', num_classes=1000).state_dict(),
        official={k: v for k, v in official if not re.search('_block_[1-9]', k)})  # the first block of each stage


def test_public_function(sources) -> None:
    """Returns a native checkpoint unchanged, and refuses as loading does."""
    native, model = sources['native'], tiny('rgse_resnet50', num_classes=1000)
    for filter_fn in (checkpoint_filter_fn, sepool_resnet.checkpoint_filter_fn):
        filtered = filter_fn(native, model)
        assert list(filtered) == list(native) and all(filtered[k] is native[k] for k in filtered)
    official, whole = sources['official'], timm.create_model('rgse_resnet50', layers=(1,) * 4)
    key, fc1 = 'layer1.layer1_block_0.fc_reduction.weight', 'layer1.0.se.fc1.weight'
    for network, bad, match in (
            (model, {**native, KEY: None}, rf'is not a state dict of rgse_resnet50 \(not dense .*: {KEY}\)'),
            (model, {**native, f'module.{KEY}': native[KEY]}, rf'not fit rgse_resnet50 \(tensors named twice: {KEY}\)'),
            (whole, {**official, fc1: official[key]}, rf'not fit rgse_resnet50 \(tensors named twice: {fc1}\)'),
            (whole, {**official, key: official[key][1:]}, rf'not fit rgse_resnet50 \(.*another shape: {fc1}\)'),
            (whole, {k: v for k, v in official.items() if k != key}, rf'not fit rgse_resnet50 \(missing .*: {fc1}\)')):
        with pytest.raises(RuntimeError, match=match):
            checkpoint_filter_fn(bad, network)


@pytest.mark.parametrize('source', ['native', 'donor', 'official'])
def test_old_checkpoint(source: str, sources, tmp_path) -> None:
    """Without num_batches_tracked, which torch 0.4.1 introduced, it loads on every path, as in plain timm."""
    kwargs = dict(layers=(1,) * 4) if source == 'official' else TINY
    path, whole = tmp_path / 'old.pth', sources[source]
    torch.save({'state_dict': {k: v for k, v in whole.items() if 'num_batches_tracked' not in k}}, path)
    load = partial(timm.create_model, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs)
    expected = timm.create_model('rgse_resnet50', **kwargs)
    expected.load_state_dict(checkpoint_filter_fn(whole, expected))
    new = r'num_batches_tracked|donor.*\.se\.'  # not from the file
    expected = {k: v for k, v in expected.state_dict().items() if not re.search(new, f'{source}.{k}')}
    weights = load('rgse_resnet50').state_dict()
    assert all(torch.equal(weights[k], v) for k, v in expected.items())
    assert not any(weights[k] for k in weights if 'num_batches_tracked' in k)
    model = load('rgse_resnet50', num_classes=7, in_chans=1)
    assert model.fc.out_features == 7
    torch.testing.assert_close(model.conv1.weight, expected['conv1.weight'].sum(1, keepdim=True))
    assert torch.equal(load('rgse_resnet50', features_only=True).conv1.weight, expected['conv1.weight'])
    detector = faster_rcnn('rgse_resnet50', pretrained=True, num_classes=2, backbone_kwargs={
        k: v for k, v in load.keywords.items() if k != 'pretrained'})
    assert torch.equal(detector.backbone.body.conv1.weight, expected['conv1.weight'])
    if source == 'donor':
        load('resnet50')
        with pytest.raises(RuntimeError, match='Missing key'):  # timm converts nothing there, nor loads a part of it
            timm.create_model('rgse_resnet50', checkpoint_path=str(path), **kwargs)
    else:
        flags = ['--model', 'rgse_resnet50', '--model-kwargs', *(f'{k}={v}' for k, v in kwargs.items())]
        assert main(['convert', str(path), f'{path}.safetensors', *flags]) == 0
        converted = safetensors.torch.load_file(f'{path}.safetensors')
        assert all(torch.equal(converted[k].to(v.dtype), v) for k, v in expected.items())


@pytest.mark.parametrize('source', ['native', 'donor'])
def test_pretrained_strict(source: str, sources, caplog) -> None:
    """False, as in timm, tolerates unexpected and missing tensors with a log line, and neither shapes nor NaN."""
    state_dict = sources[source]
    load = lambda state_dict, **kwargs: create(pretrained_cfg_overlay=dict(state_dict=state_dict), **kwargs)  # noqa: E731
    extra = {**state_dict, 'extra': torch.zeros(3, dtype=torch.long)}
    missing = {k: v for k, v in state_dict.items() if k not in (KEY, 'layer3.0.bn3.weight')}
    for kwargs in ({}, dict(num_classes=7), dict(features_only=True)):
        for match, bad in (
                (r'floats: extra\)', extra), (f'missing tensors: {KEY}, layer3.0.bn3.weight', missing),
                (f'another shape: {KEY}', {**state_dict, KEY: state_dict[KEY].flatten()})):
            with pytest.raises(RuntimeError, match=match):
                load(bad, **kwargs)
        model = load(extra, pretrained_strict=False, **kwargs)
        assert torch.equal(model.conv1.weight, state_dict['conv1.weight'])
        assert 'Unexpected keys (extra) found' in caplog.text
        caplog.clear()
    model = load(missing, pretrained_strict=False)
    assert not torch.equal(model.state_dict()[KEY], state_dict[KEY]) and (model.layer3[0].bn3.weight == 1).all()
    assert torch.equal(model.layer1[0].bn3.weight, state_dict['layer1.0.bn3.weight'] * (2 if source == 'donor' else 1))
    for match, bad in (('another shape', torch.zeros(1)), ('NaN', state_dict[KEY] / 0), ('64-bit floats', None)):
        with pytest.raises(RuntimeError, match=f'{match}.*: {KEY}'):
            load({**extra, KEY: bad}, pretrained_strict=False)


@pytest.mark.parametrize('kwargs, overlay, error, match', [
    (dict(nonsense=1), {}, TypeError, 'nonsense'),
    (dict(features_only=True, feature_cls='nonsense'), {}, AssertionError, 'Unknown feature class nonsense'),
    ({}, dict(nonsense=1), TypeError, 'nonsense'),
    ({}, None, RuntimeError, '^No pretrained weights exist for rgse_resnet50'),
    ({}, dict(state_dict={'bn1.bias': torch.ones(64, dtype=torch.int8)}), RuntimeError,
     'rgse_resnet50 cannot be loaded from the given state dict: The checkpoint is not a state dict .*floats: bn1.bias'),
    ({}, dict(label_offset=1), RuntimeError, "rgse_resnet50 cannot be loaded from .*: KeyError: 'fc.weight'"),
], ids=str)
def test_whose_fault(sources, kwargs, overlay, error, match, monkeypatch) -> None:
    """Errors of arguments are raised unchanged, errors of weights name them; no network is built to find out which."""
    built, init = [], SEPoolResNet.__init__
    monkeypatch.setattr(SEPoolResNet, '__init__', lambda *args, **kwargs: (built.append(1), init(*args, **kwargs))[1])
    headless = {k: v for k, v in sources['native'].items() if not k.startswith('fc.')}
    overlay = dict(hf_hub_id=None) if overlay is None else {'state_dict': headless, **overlay}
    with pytest.raises(error, match=match):
        create(pretrained_cfg_overlay=overlay, **kwargs)
    assert len(built) <= 1
