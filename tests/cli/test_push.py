""" Donor weights, model cards and publishing, against a local Hub """
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Dict

import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from torch import nn

import timm
from helpers.common import NAMES, TINY, images, serve_donor, tiny
from helpers.hub_server import HubServer
from timm_sepool import checkpoint_filter_fn
from timm_sepool.cli.main import main
from timm_sepool.squeeze import SEPoolModule, SPSEModule

CARDS = Path(__file__).parents[2] / 'hf_cards'
DONORS = {
    'resnet50': 'resnet50.a1_in1k',
    'resnet101': 'resnet101.a1h_in1k',
    'resnet152': 'resnet152.a1h_in1k',
    'resnext50': 'resnext50_32x4d.a1h_in1k',
    'resnext101': 'resnext101_32x4d.gluon_in1k',
}


# --- donor weights

def test_default_tags() -> None:
    """The first donors, all freely licensed and trained at 224, with their own preprocessing."""
    for name in NAMES:
        donor = DONORS[name.split('_')[1]]
        cfg, donor_cfg = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(donor)
        assert cfg.tag == f'from_{donor.replace(".", "_")}' and cfg.hf_hub_id == f'timm/{donor}' and cfg.url is None
        for key in ('input_size', 'test_input_size', 'interpolation', 'crop_pct', 'test_crop_pct', 'mean', 'std'):
            assert getattr(cfg, key) == getattr(donor_cfg, key)
        assert 'the squeeze starts inert' in cfg.description
        assert 'accuracy figures are those of the donor' in cfg.description
    tags = timm.list_pretrained(['rgse_*', 'spse_*'])
    assert len(tags) >= 40
    for tag in tags:
        cfg = timm.get_pretrained_cfg(tag)
        assert cfg.license in ('apache-2.0', 'bsd-3-clause') and cfg.input_size == (3, 224, 224), tag
        assert cfg.hf_hub_id.startswith('timm/resne') and 'fb_' not in tag and 'bamboo' not in tag
    assert {'rgse_resnet50.from_resnet50_tv_in1k', 'spse_resnet101.from_resnet101_gluon_in1k'} <= set(tags)


@pytest.mark.parametrize('backbone', DONORS)
def test_computes_what_the_donor_computes(hub: HubServer, tmp_path, backbone: str) -> None:
    """Difference exactly 0.0, at full depth, in eval and train mode, and not without the doubling of bn3."""
    serve_donor(hub, DONORS[backbone])
    donor = timm.create_model(DONORS[backbone], pretrained=True, cache_dir=tmp_path)
    for family in ('rgse', 'spse'):
        model = timm.create_model(f'{family}_{backbone}', pretrained=True, cache_dir=tmp_path)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            model, donor = model.to(dtype), donor.to(dtype)
            x = images(2, 64, 64, dtype=dtype)
            with torch.no_grad():
                for training in (False, True):
                    ours, theirs = model.train(training)(x), donor.train(training)(x)
                    assert theirs.abs().max() > 0 and (ours - theirs).abs().max().item() == 0.0
                    assert torch.equal(model.layer1[0].bn3.running_var, donor.layer1[0].bn3.running_var)
        with torch.no_grad():
            for name, module in model.named_modules():
                if name.endswith('.bn3'):
                    module.weight /= 2
                    module.bias /= 2
            assert (model.eval()(x) - donor.eval()(x)).abs().max().item() > 0
        weights = hub.repos['model', f'timm/{DONORS[backbone]}']['model.safetensors']
        donor.float().load_state_dict(safetensors.torch.load(weights))
    shutil.rmtree(tmp_path)  # the donors are large


@pytest.mark.parametrize('family', ['rgse', 'spse'])
def test_squeeze_learns(hub: HubServer, small_donor: partial, family: str) -> None:
    """The gates move with the first step, every parameter of the squeeze with the second."""
    model = timm.create_model(f'{family}_resnet50', **{**small_donor.keywords, 'num_classes': 10}).double().train()
    modules = {n: m for n, m in model.named_modules() if isinstance(m, SEPoolModule)}
    for module in modules.values():
        module.bn.eval()  # in train mode a bias before the norm has no effect and no gradient
    x, y = images(8, 64, 64, dtype=torch.float64), torch.arange(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in (1, 2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        for name, module in modules.items():
            for n, p in module.named_parameters(prefix=name):
                assert (not torch.equal(p, start[n])) is (step == 2 or '.fc2.' in n), n
    gate = modules['layer1.0.se'].forward_gate(torch.randn(2, 64, 16, 16, dtype=torch.float64))
    assert (gate != 0.5).any()


@pytest.mark.filterwarnings('ignore:.*copying from a non-meta parameter')  # to compare with what timm does
def test_what_timm_does_with_pretrained_weights(hub: HubServer, small_donor: partial, tmp_path) -> None:
    donor = safetensors.torch.load(hub.repos['model', 'timm/resnet50.a1_in1k']['model.safetensors'])
    model = small_donor()
    assert torch.equal(model.fc.weight, donor['fc.weight'])
    assert torch.equal(model.layer4[0].bn3.bias, 2 * donor['layer4.0.bn3.bias'])

    gray = small_donor(in_chans=1, num_classes=10)
    torch.testing.assert_close(gray.conv1.weight, donor['conv1.weight'].sum(1, keepdim=True))
    assert gray.fc.out_features == 10
    features = small_donor(features_only=True)
    donor_features = timm.create_model(
        'resnet50', pretrained=True, features_only=True, cache_dir=tmp_path / 'cache', **TINY).eval()
    for ours, theirs in zip(features.eval()(images(2, 64, 64)), donor_features(images(2, 64, 64))):
        assert torch.equal(ours, theirs)

    (tmp_path / 'donor.safetensors').write_bytes(safetensors.torch.save(donor))
    from_file = small_donor(pretrained_cfg_overlay=dict(file=str(tmp_path / 'donor.safetensors')))
    assert torch.equal(from_file.conv1.weight, donor['conv1.weight'])

    serve_donor(hub, 'resnet50.tv_in1k', **TINY)
    tv = safetensors.torch.load(hub.repos['model', 'timm/resnet50.tv_in1k']['model.safetensors'])
    assert torch.equal(small_donor(pretrained_cfg='from_resnet50_tv_in1k').fc.weight, tv['fc.weight'])
    by_tag = timm.create_model('rgse_resnet50.from_resnet50_tv_in1k', **small_donor.keywords)
    assert torch.equal(by_tag.fc.weight, tv['fc.weight']) and by_tag.pretrained_cfg['interpolation'] == 'bilinear'

    assert small_donor(device='meta').fc.weight.is_meta
    # offline, which old Hub clients read once: from the cache
    requests = len(hub.requests)
    kwargs = {**small_donor.keywords, 'cache_dir': str(tmp_path / 'cache')}
    code = f"""if True:
        import safetensors.torch, timm, torch
        donor = safetensors.torch.load_file({str(tmp_path / 'donor.safetensors')!r})
        assert torch.equal(timm.create_model('rgse_resnet50', **{kwargs}).conv1.weight, donor['conv1.weight'])
    """
    subprocess.run([sys.executable, '-c', code], env={**os.environ, 'HF_HUB_OFFLINE': '1'}, check=True, timeout=120)
    assert len(hub.requests) == requests


def test_donor_with_other_blocks(hub: HubServer, small_donor: partial) -> None:
    """Exact without a squeeze and with another gate of 1/2 at 0, an error where no exact start is known."""
    donor = timm.create_model('resnet50', **TINY).eval()
    donor.load_state_dict(
        safetensors.torch.load(hub.repos['model', 'timm/resnet50.a1_in1k']['model.safetensors']))
    x = images(2, 64, 64)
    for attn_layer in (None, partial(SPSEModule, gate_layer='hard_sigmoid')):
        assert torch.equal(small_donor(block_args=dict(attn_layer=attn_layer)).eval()(x), donor(x))
    for attn_layer in ('eca', partial(SPSEModule, gate_layer='relu')):
        with pytest.raises(RuntimeError, match='does not fit rgse_resnet50 .missing tensors: layer1.0.se'):
            small_donor(block_args=dict(attn_layer=attn_layer))


def test_native_checkpoint_is_never_converted(small_donor: partial, tmp_path) -> None:
    """Load, save, load, save: unchanged."""
    model = small_donor()
    for i in range(3):
        safetensors.torch.save_file(model.state_dict(), tmp_path / f'{i}.safetensors')
        model = small_donor(pretrained_cfg_overlay=dict(file=str(tmp_path / f'{i}.safetensors')))
        for k, v in safetensors.torch.load_file(tmp_path / f'{i}.safetensors').items():
            assert torch.equal(model.state_dict()[k], v), k


@pytest.mark.parametrize('kwargs', [dict(), dict(num_classes=10), dict(features_only=True)], ids=str)
@pytest.mark.parametrize(
    'other', ['seresnet50', 'resnet50d', 'resnet101', 'legacy_seresnext101_32x4d', 'resnext50_32x4d', 'resnet26'])
def test_donor_of_another_topology(tmp_path, other: str, kwargs) -> None:
    """One clear error, also where timm itself would load in part."""
    path = tmp_path / f'{other}.safetensors'
    safetensors.torch.save_file(timm.create_model(other).state_dict(), path)
    with pytest.raises(RuntimeError, match=f'{other}.safetensors: .* does not fit rgse_resnet50 .* Use an undamaged'):
        timm.create_model('rgse_resnet50', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs)


def test_plain_checkpoint_path(small_donor: partial, tmp_path) -> None:
    """checkpoint_path loads strictly, without conversion: a plain ResNet is refused, not loaded in part."""
    torch.save(timm.create_model('resnet50', **TINY).state_dict(), tmp_path / 'plain.pth')
    with pytest.raises(RuntimeError, match='Missing key'):
        timm.create_model('rgse_resnet50', checkpoint_path=str(tmp_path / 'plain.pth'), **TINY)


def test_fine_tuning_beats_training_from_scratch() -> None:
    from finetune_digits import compare, summary
    accuracies = compare('rgse_resnet50', seeds=[0, 1, 2])
    (donor, spread), (scratch, _) = summary(accuracies['donor']), summary(accuracies['scratch'])
    assert donor > scratch + 2 * spread and min(accuracies['donor']) > max(accuracies['scratch'])


# --- cards

def test_committed_cards_are_what_the_registry_generates(tmp_path) -> None:
    assert main(['cards', str(tmp_path / 'cards')]) == 0
    generated = {p.name: p.read_text() for p in (tmp_path / 'cards').iterdir()}
    assert set(generated) == {p.name for p in CARDS.iterdir()} and len(generated) == 10
    for name, text in generated.items():
        assert (CARDS / name).read_text() == text, f'{name} differs: run `timm-sepool cards` and commit its output'


@pytest.mark.parametrize('path', sorted(CARDS.glob('*.md')), ids=lambda p: p.name)
def test_card(path: Path) -> None:
    """The metadata is complete, and every figure in it has a source."""
    from huggingface_hub import ModelCard
    card = ModelCard.load(path)
    data, backbone = card.data, path.name.split('.')[0].split('_')[1]
    assert (data.library_name, data.pipeline_tag, data.license) == ('timm', 'image-classification', 'apache-2.0')
    assert data.base_model == f'timm/{DONORS[backbone]}' and data.datasets == ['imagenet-1k']
    assert data.eval_results and all(r.source_url and 'of the donor' in r.metric_name for r in data.eval_results)
    text = card.text
    assert 'the claim is not reproduced here' in ' '.join(text.split()) and 'the squeeze starts inert' in text


@pytest.mark.parametrize(
    'name', sorted(p.stem for p in CARDS.glob('*.md')) if os.environ['TIMM_SEPOOL_FULL_TESTS'] else
    ['rgse_resnet50.from_resnet50_a1_in1k', 'spse_resnext50.from_resnext50_32x4d_a1h_in1k'])
def test_code_of_cards_runs(hub: HubServer, name: str) -> None:
    picture = BytesIO()
    Image.new('RGB', (300, 260), (200, 120, 40)).save(picture, 'PNG')
    hub.add('huggingface/documentation-images', {'beignets-task-guide.png': picture.getvalue()}, repo_type='dataset')
    serve_donor(hub, DONORS[name.split('.')[0].split('_')[1]])
    text = (CARDS / f'{name}.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    assert len(blocks) == 3
    namespaces = []
    for block in blocks:
        namespaces.append({})
        exec(block, namespaces[-1])
    assert namespaces[0]['top5_probabilities'].shape == (1, 5)
    shapes = [ast.literal_eval(s) for s in re.findall(r'torch\.Size\((.*?)\)', text)]
    assert [list(o.shape) for o in namespaces[1]['output']] == shapes
    assert namespaces[2]['output'].shape == (1, 2048)
    shutil.rmtree(os.environ['HF_HOME'])


# --- push

@pytest.fixture
def trained(tmp_path) -> Dict:
    """What train.py leaves: a checkpoint, args.yaml, and results of validate.py."""
    run = tmp_path / 'run'
    run.mkdir()
    model = tiny('spse_resnext50', num_classes=4, in_chans=1)
    ema = tiny('spse_resnext50', num_classes=4, in_chans=1)
    torch.save(dict(state_dict=model.state_dict(), state_dict_ema=ema.state_dict()), run / 'last.pth.tar')
    (run / 'args.yaml').write_text(yaml.safe_dump(dict(
        model='spse_resnext50', num_classes=4, in_chans=1, input_size=None, img_size=96, interpolation='bilinear',
        crop_pct=0.8, mean=[0.4], std=[0.3], model_kwargs=dict(layers=[1, 1, 1, 1], channels=[16, 32, 64, 128]))))
    (run / 'results.csv').write_text(
        'model,top1,top1_err,top5,top5_err,img_size\nspse_resnext50,71.5,28.5,91.0,9.0,96\nresnet18,1,99,2,98,96\n')
    (run / 'labels.txt').write_text('cat\ndog\nbird\nfish\n')
    return dict(run=run, model=model, ema=ema)


def push(run: Path, *flags: str, repo_id: str = 'user/net', model: str = 'spse_resnext50') -> int:
    return main(['push', model, '--repo-id', repo_id, '--checkpoint', str(run / 'last.pth.tar'), *flags])


def test_push_and_load(hub: HubServer, trained: Dict, tmp_path, capsys) -> None:
    """From the Hub, in a fresh process without an import of ours: the same bytes, preprocessing and labels."""
    hub.repos.pop(('model', 'user/net'), None)
    run = trained['run']
    assert push(run, '--labels', str(run / 'labels.txt'), '--metrics', str(run / 'results.csv')) == 0
    assert "timm.create_model('hf-hub:user/net', pretrained=True)" in capsys.readouterr().out
    repo = hub.repos['model', 'user/net']
    assert set(repo) - {'.gitattributes'} == {'model.safetensors', 'config.json', 'README.md'}  # no pickle
    code = """
import sys, timm, torch, safetensors.torch
model = timm.create_model('hf-hub:user/net', pretrained=True).eval()
cfg = timm.data.resolve_data_config(model=model)
assert (model.num_classes, model.conv1.in_channels) == (4, 1)
assert tuple(cfg['input_size']) == (1, 96, 96) and cfg['interpolation'] == 'bilinear' and cfg['crop_pct'] == 0.8, cfg
assert tuple(cfg['mean']) == (0.4,) and tuple(cfg['std']) == (0.3,)
pretrained_cfg = model.pretrained_cfg
assert list(pretrained_cfg['label_names']) == ['cat', 'dog', 'bird', 'fish']
assert pretrained_cfg['hf_hub_id'] == 'user/net' and not pretrained_cfg.get('tag')
assert not pretrained_cfg.get('test_input_size')
assert 'from_' not in str({k: v for k, v in pretrained_cfg.items()})
safetensors.torch.save_file(model.state_dict(), sys.argv[1])
"""
    env = {**os.environ, 'HF_HOME': str(tmp_path / 'fresh')}
    subprocess.run([sys.executable, '-c', code, str(tmp_path / 'loaded.safetensors')], env=env, check=True)
    loaded = safetensors.torch.load_file(tmp_path / 'loaded.safetensors')
    expected = trained['model'].state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in expected.items())

    config = json.loads(repo['config.json'])
    assert config['num_classes'] == 4 and 'num_classes' not in config['model_args']
    card = repo['README.md'].decode()
    assert 'value: 71.5' in card and 'hf-hub:user/net' in card
    assert not any(s in card for s in ('value: 1.0', 'base_model', 'donor'))

    sha = repo.sha
    assert push(run, '--labels', str(run / 'labels.txt'), '--metrics', str(run / 'results.csv')) == 0
    assert repo.sha == sha  # idempotent
    assert push(run, '--use-ema') == 0
    assert repo.sha != sha
    assert torch.equal(safetensors.torch.load(repo['model.safetensors'])['fc.bias'], trained['ema'].fc.bias)


def test_pushed_network_in_transformers(hub: HubServer, trained: Dict, tmp_path) -> None:
    pytest.importorskip('transformers')
    hub.repos.pop(('model', 'user/tf'), None)
    run = trained['run']
    assert push(run, '--labels', str(run / 'labels.txt'), repo_id='user/tf') == 0
    code = """
import sys, torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained('user/tf').eval()
assert model.config.num_labels == 4 and model.config.id2label[1] == 'dog', model.config
torch.save(model(torch.ones(2, 1, 96, 96)).logits.detach(), sys.argv[1])
"""
    env = {**os.environ, 'HF_HOME': str(tmp_path / 'fresh')}
    subprocess.run([sys.executable, '-c', code, str(tmp_path / 'logits.pt')], env=env, check=True)
    expected = trained['model'](torch.ones(2, 1, 96, 96))
    torch.testing.assert_close(torch.load(tmp_path / 'logits.pt'), expected.detach())


def test_global_pool_of_the_training_run(trained: Dict, tmp_path) -> None:
    """train.py's --gp is a model argument; a run that started from a network of the Hub has its name in args.yaml."""
    run = trained['run']
    arguments = yaml.safe_load((run / 'args.yaml').read_text())
    (run / 'args.yaml').write_text(yaml.safe_dump({**arguments, 'gp': 'max', 'model': 'hf-hub:user/net'}))
    assert push(run, '--dry-run', str(tmp_path / 'out')) == 0
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    trained['model'].reset_classifier(4, 'max')
    trained['model'].fc.load_state_dict(model.fc.state_dict())
    assert torch.equal(model(images(2, 1, 64, 64)), trained['model'].eval()(images(2, 1, 64, 64)))


def test_push_a_tag(hub: HubServer, tmp_path, monkeypatch) -> None:
    """A tag's own weights, converted, with the donor's preprocessing and a card that says what they are."""
    serve_donor(hub, 'resnet50.tv_in1k')
    hub.repos.pop(('model', 'user/tv'), None)
    assert main(['push', 'rgse_resnet50.from_resnet50_tv_in1k', '--repo-id', 'user/tv', '--private']) == 0
    repo = hub.repos['model', 'user/tv']
    assert repo.private and 'base_model: timm/resnet50.tv_in1k' in repo['README.md'].decode()
    model = timm.create_model('hf-hub:user/tv', pretrained=True, cache_dir=tmp_path).eval()
    donor = timm.create_model('resnet50.tv_in1k', pretrained=True, cache_dir=tmp_path).eval()
    assert torch.equal(model(images(2, 64, 64)), donor(images(2, 64, 64)))
    assert model.pretrained_cfg['interpolation'] == 'bilinear' and not model.pretrained_cfg.get('tag')
    shutil.rmtree(tmp_path)


def test_dry_run(hub: HubServer, trained: Dict, tmp_path, capsys) -> None:
    """Writes what would be uploaded, uploads nothing, needs no token; flags stand in for a missing args.yaml."""
    run, out = trained['run'], tmp_path / 'out'
    (run / 'args.yaml').unlink()
    flags = ['--img-size', '96', '--interpolation', 'bicubic', '--crop-pct', '0.9', '--mean', '0.4', '--std', '0.3',
             '--model-kwargs', 'layers=(1,1,1,1)', 'channels=(16,32,64,128)']
    requests = len(hub.requests)
    assert push(run, '--dry-run', str(out), *flags) == 0
    assert len(hub.requests) == requests
    assert sorted(os.listdir(out)) == ['README.md', 'config.json', 'model.safetensors']
    model = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    assert torch.equal(model(images(2, 1, 64, 64)), trained['model'](images(2, 1, 64, 64)))
    cfg = json.loads((out / 'config.json').read_text())['pretrained_cfg']
    assert cfg['input_size'] == [1, 96, 96] and cfg['crop_pct'] == 0.9 and cfg['interpolation'] == 'bicubic'
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()


def test_push_bad_input(hub: HubServer, trained: Dict, tmp_path, capsys, monkeypatch) -> None:
    run = trained['run']
    before = sorted(str(p) for p in tmp_path.rglob('*'))
    hub.add('user/net', {})
    repos = set(hub.repos)

    def push_fails(message: str, *flags: str, **kwargs) -> None:
        assert push(run, *flags, **kwargs) == 2
        err = capsys.readouterr().err
        assert message in err and err.startswith('timm-sepool push: error: ') and err.rstrip().count('\n') == 0, err
        assert sorted(str(p) for p in tmp_path.rglob('*')) == before and set(hub.repos) == repos

    push_fails('Unknown model', model='resnet50')
    push_fails('Unknown model', model='spse_resnext50.a1_in1k')
    push_fails('is no repository id', repo_id='net')
    push_fails('is no repository id', repo_id='user/n e t')
    push_fails('is of a training of spse_resnext50, not of rgse_resnext50', model='rgse_resnext50')
    push_fails('There is no checkpoint', '--checkpoint', str(run / 'best.pth.tar'))
    push_fails('is no args.yaml', '--args', str(run / 'labels.txt'))
    push_fails('is no args.yaml', '--args', str(run / 'none.yaml'))
    push_fails('is no results file', '--metrics', str(run / 'labels.txt'))
    push_fails('Can not read the labels', '--labels', str(run / 'none.txt'))
    push_fails('makes no sense', '--interpolation', 'nonsense')
    push_fails('makes no sense', '--img-size', '-5')
    push_fails('makes no sense', '--mean', '0.1', '0.2')
    push_fails('makes no sense', '--crop-pct', '0')
    results = (run / 'results.csv').read_text()
    (run / 'results.csv').write_text('model,top1,top5,img_size\nresnet18,70.1,89.0,96\n')
    push_fails('holds no accuracy of spse_resnext50', '--metrics', str(run / 'results.csv'))
    (run / 'results.csv').write_text(results.replace('71.5', 'nan'))
    push_fails('holds no accuracy of spse_resnext50', '--metrics', str(run / 'results.csv'))
    push_fails('names 3 classes, the network has 4', '--labels', str(run / 'results.csv'))
    push_fails('can not be created', '--model-kwargs', 'layer=3')
    push_fails('does not fit spse_resnext50', '--model-kwargs', 'layers=(1,1,2,1)')
    push_fails('is no writable folder', '--dry-run', str(tmp_path / 'no' / 'out'))
    push_fails('exists and is left as it is', '--dry-run', str(run))
    hub.add('user/other', {'config.json': json.dumps(dict(architecture='resnet50')).encode()})
    repos.add(('model', 'user/other'))
    push_fails('user/other holds a resnet50, not a spse_resnext50', repo_id='user/other')
    push_fails('user/other exists and is public', '--private', repo_id='user/other')
    for n, other in enumerate(({'config.json': b'{not'}, {'config.json': b'[]'}, {'pytorch_model.bin': b'x'})):
        hub.add(f'user/other{n}', other)
        repos.add(('model', f'user/other{n}'))
        push_fails(f'user/other{n} holds a ', repo_id=f'user/other{n}')
    assert push(run, '--force', repo_id='user/other') == 0
    (run / 'args.yaml').rename(run / 'elsewhere.yaml')
    before[:] = sorted(str(p) for p in tmp_path.rglob('*'))
    push_fails('The preprocessing of', '--model-kwargs', 'layers=(1,1,1,1)', 'channels=(16,32,64,128)')
    monkeypatch.setattr('timm_sepool.cli.hub.get_token', lambda: None)
    push_fails('There is no Hugging Face token', '--args', str(run / 'elsewhere.yaml'))
    assert main(['push', 'rgse_resnet50', '--repo-id', 'user/net', '--crop-pct', '0.9']) == 2
    assert 'go with --checkpoint' in capsys.readouterr().err
