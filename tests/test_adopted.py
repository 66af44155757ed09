""" adopt and the registered model `adopted`, over timm's SE networks

By default one small architecture per model file of timm; every architecture on the meta device, some minutes, with
--full.
"""
import copy
import io
import itertools
import json
import os
import pickle
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import timm
from helpers.common import NAMES, TINY, images, training_step
from helpers.hub_server import HubServer
from timm.layers import SEModule
from timm.models import save_for_hf
from timm.models.senet import SEModule as SENetSEModule
from timm_sepool import adopt
from timm_sepool._private import SqueezeExcite

SE_CLASSES = (SEModule, SqueezeExcite, SENetSEModule)

# The smallest of each file of timm that has SE blocks, with arguments that make it smaller. The maps of some are too
# small for RGSE.
FAMILIES = {
    'efficientvim_m1': {},
    'efficientvit_m0': {},
    'fastvit_t8': {},
    'gcvit_xxtiny': {},
    'ghostnet_050': {},
    'haloregnetz_b': {},
    'hardcorenas_b': {},
    'lcnetv2_small': {},
    'legacy_seresnet18': dict(layers=(1, 1, 1, 1)),
    'mobilenetv3_small_050': {},
    'regnety_002': {},
    'repghostnet_050': {},
    'repvit_m1': dict(depth=(2, 2, 2, 2)),
    'rexnet_100': dict(width_mult=0.25),
    'sedarknet21': {},
    'seresnet18': dict(layers=(1, 1, 1, 1)),
    'shvit_s1': {},
    'test_byobnet': {},
    'test_efficientnet': {},
    'test_maxvit': {},
    'test_nfnet': {},
    'tresnet_m': dict(layers=(1, 1, 1, 1)),
}
FAMILIES = {name: args for name, args in FAMILIES.items() if timm.is_model(name)}  # older timm has fewer
# two input sizes, the second odd where it may be
SIZES = {
    'efficientvit_m0': ((224, 224),),  # the only one in older timm
    'gcvit_xxtiny': ((64, 64), (96, 96)),  # models are built for a size
    'haloregnetz_b': ((224, 224),),  # the only one
    'test_maxvit': ((64, 64), (96, 96)),  # models are built for a size
    'tresnet_m': ((64, 64), (68, 100)),  # multiples of 4
}
FIXED_SIZE = ('gcvit_xxtiny', 'test_maxvit')


def se_modules(model: nn.Module) -> Dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SE_CLASSES)}


def squeeze_weights(model: nn.Module) -> Dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if '.squeeze.weight' in name}


def map_sizes(model: nn.Module, input_size: Tuple[int, int, int]) -> Dict[str, Tuple[int, int]]:
    """Height and width of the output of every SE module of a network that is on the meta device."""
    sizes = {}
    model = copy.deepcopy(model).eval()
    for path, module in se_modules(model).items():
        module.register_forward_hook(lambda m, args, out, path=path: sizes.update({path: tuple(out.shape[-2:])}))
    with torch.no_grad():
        model(torch.empty(1, *input_size, device='meta'))
    return sizes


def fill(model: nn.Module) -> nn.Module:
    """Nothing at its trivial value, so that every SE block matters to the output (timm zeroes the last norms)."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if '.squeeze.' not in name and (param.ndim < 2 or param.abs().max() <= 1e-4):
                param.uniform_(0.3, 0.9)
    return model


def learned(model: nn.Module, std: float = 0.3) -> nn.Module:
    """An adopted model whose squeezes have left their start."""
    assert squeeze_weights(model)
    with torch.no_grad():
        for param in squeeze_weights(model).values():
            param.normal_(std=std)
    return model


def small(squeeze: str = 'rgse', **kwargs) -> nn.Module:
    """A small `adopted` with learned squeezes, in eval mode."""
    if 'base' not in kwargs:
        kwargs.update(base='seresnet50', **TINY)
    kwargs = {'num_classes': 10, **kwargs}
    return learned(fill(timm.create_model('adopted', squeeze=squeeze, **kwargs))).eval()


def assert_same_weights(got: nn.Module, expected: nn.Module) -> None:
    got, expected = got.state_dict(), expected.state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[k], expected[k]) for k in got)


def check_architecture(name: str, squeezes: Tuple[str, ...] = ('rgse', 'spse'), **args) -> int:
    """Replacement, grids and parameters by formula, on the meta device. Returns the number of SE modules."""
    try:
        with torch.device('meta'):
            original = timm.create_model(name, **args)
    except NotImplementedError:  # older timm computes the widths of RegNets by tensors
        original = timm.create_model(name, **args).to('meta')
    modules = se_modules(original)
    if not modules:
        with pytest.raises(ValueError, match='has no SE block'):
            adopt(original)
        return 0
    convs = {path: [m for m in module.children() if isinstance(m, nn.Conv2d)] for path, module in modules.items()}
    channels = {path: expand.out_channels for path, (reduce, expand) in convs.items()}
    sizes = map_sizes(original, original.pretrained_cfg['input_size'])
    assert sizes.keys() == modules.keys(), name
    params = sum(p.numel() for p in original.parameters())
    for squeeze in squeezes:
        grids = {path: next(g for g in range(1, 99) if size[0] < 7 * g + 3.5) for path, size in sizes.items()}
        if squeeze == 'rgse' and max(grids.values()) == 1:
            with pytest.raises(ValueError, match='all grids would be 1 x 1'):
                adopt(original)
            continue
        model = copy.deepcopy(original)
        modes = {path: module.training for path, module in model.named_modules()}
        assert adopt(model, squeeze) is model
        assert modes == {path: m.training for path, m in model.named_modules() if '.squeeze' not in f'.{path}'}
        shapes = {k: tuple(p.shape) for k, p in squeeze_weights(model).items()}
        if squeeze == 'spse':
            expected = {f'{p}.squeeze.weight{g}': (channels[p], 1, g, g) for p in modules for g in (1, 2, 4)}
        else:
            expected = {f'{p}.squeeze.weight': (channels[p], 1, g, g) for p, g in grids.items() if g > 1}
        assert shapes == expected, name
        added = sum(c * (21 if squeeze == 'spse' else grids[p] ** 2 * (grids[p] > 1)) for p, c in channels.items())
        assert sum(p.numel() for p in model.parameters()) == params + added
        kept = {k: (v.shape, v.dtype) for k, v in model.state_dict().items() if '.squeeze.weight' not in k}
        assert kept == {k: (v.shape, v.dtype) for k, v in original.state_dict().items()}
        assert all(p.device.type == 'meta' for p in model.parameters())
    return len(modules)


def test_architectures() -> None:
    full = bool(os.environ['TIMM_SEPOOL_FULL_TESTS'])
    names = timm.list_models() if full else list(FAMILIES)
    counts = {
        name: check_architecture(name, **({} if full else dict(FAMILIES[name], squeezes=(squeeze,))))
        for name, squeeze in zip(names, itertools.cycle(['rgse', 'spse']))
        if name not in (*NAMES, 'adopted')}
    found = [name for name, count in counts.items() if count]
    print(f'{len(found)} of {len(counts)} architectures, {sum(counts.values())} SE modules')
    assert set(found) >= FAMILIES.keys()
    files = {timm.model_entrypoint(name).__module__ for name in found}
    assert files == {timm.model_entrypoint(name).__module__ for name in FAMILIES}  # every file has its family


def test_grids_of_the_paper() -> None:
    """The shapes of our own networks, which are the official code's."""
    for family in ('rgse', 'spse'):
        model = timm.create_model('adopted', base='seresnet50', squeeze=family, layers=(1, 1, 1, 1))
        paper = timm.create_model(f'{family}_resnet50', layers=(1, 1, 1, 1))
        got = {k.replace('.squeeze', ''): p.shape for k, p in squeeze_weights(model).items()}
        assert got == {k: p.shape for k, p in paper.named_parameters() if '.se.weight' in k}


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)  # for dropout
    out = model(x)
    return out if torch.is_tensor(out) else torch.stack(out)  # heads with a distillation token


@pytest.mark.parametrize('name, sizes', [
    (name, sizes) for name in FAMILIES
    for sizes in (SIZES[name] if name in FIXED_SIZE else [SIZES.get(name, ((64, 64), (65, 97)))])
])
def test_families(name: str, sizes: Tuple) -> None:
    """The same logits in eval and train mode at every size, then all squeezes learn."""
    args = dict(img_size=sizes) if name in FIXED_SIZE else {}
    inputs = [images(2, *size) for size in ([sizes] if args else sizes)]
    model = fill(timm.create_model(name, num_classes=10, **args, **FAMILIES[name]))
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = [logits(model.train(training), x) for x in inputs for training in (False, True)]
        statistics = copy.deepcopy(model.state_dict())
        model.load_state_dict(start)
        try:
            adopt(model, 'rgse', (3, *sizes) if args else None)
        except ValueError as e:
            assert 'all grids would be 1 x 1' in str(e)
            adopt(model, 'spse', (3, *sizes) if args else None)
        got = [logits(model.train(training), x) for x in inputs for training in (False, True)]
    for a, b in zip(got, expected):
        assert b.isfinite().all() and b.std() > 0
        assert torch.equal(a, b)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in statistics.items())

    weights = squeeze_weights(model)
    assert weights and all((w == 0).all() for w in weights.values())
    out = logits(model, x := inputs[-1])
    loss = nn.functional.cross_entropy(out.flatten(0, -2), torch.arange(len(out.flatten(0, -2))))
    with torch.no_grad():
        for weight, grad in zip(weights.values(), torch.autograd.grad(loss, list(weights.values()))):
            weight -= grad / grad.norm()  # a step of SGD at a rate that moves each as far
            assert weight.isfinite().all() and weight.abs().max() > 0
        assert (logits(model, x) - out).abs().max() > 1e-6


@pytest.mark.parametrize('squeeze', ['rgse', 'spse'])
@pytest.mark.parametrize('base', ['seresnet18', 'test_efficientnet', 'legacy_seresnet18'])
def test_learned_squeeze_is_the_formula(base: str, squeeze: str) -> None:
    """With learned weights: mean + depthwise convolution of adaptive average pooling, in each of the three classes."""
    model = timm.create_model(base).eval()
    adopt(model, squeeze, input_size=(3, 320, 320))
    module = [m for m in se_modules(learned(model)).values() if hasattr(m, 'squeeze')][0]
    fcs = [m for m in module.children() if isinstance(m, nn.Conv2d)]
    x = torch.randn(2, fcs[0].in_channels, 23, 30)
    s = x.mean((2, 3), keepdim=True)
    for weight in module.squeeze.parameters():
        s = s + nn.functional.conv2d(
            nn.functional.adaptive_avg_pool2d(x, weight.shape[-1]), weight, groups=x.shape[1])
    act = getattr(module, 'act', None) or getattr(module, 'act1', None) or module.relu
    gate = fcs[1](act(fcs[0](s))).sigmoid()
    torch.testing.assert_close(module(x), x * gate)


def test_add_maxpool_and_norm() -> None:
    """SE arguments that timm's models leave at their defaults."""
    args = dict(add_maxpool=True, norm_layer=nn.BatchNorm2d, act_layer=nn.SiLU, gate_layer='hard_sigmoid')
    model = nn.Sequential(nn.Conv2d(3, 16, 3), SEModule(16, **args)).eval()
    original = copy.deepcopy(model)
    adopt(model, input_size=(3, 30, 30))
    x = images(2, 33, 29)
    assert torch.equal(model(x), original(x))
    learned(model)
    y = model[0](x)
    s = y.mean((2, 3), keepdim=True) + nn.functional.conv2d(
        nn.functional.adaptive_avg_pool2d(y, 4), model[1].squeeze.weight, groups=16)
    s = original[1].bn(model[1].fc1((s + y.amax((2, 3), keepdim=True)) / 2))
    gate = nn.functional.hardsigmoid(model[1].fc2(nn.functional.silu(s)))
    torch.testing.assert_close(model(x), y * gate)


def test_leaves_the_rest_alone() -> None:
    """Modules, parameters, hooks and modes are the same objects; weights, statistics and the random state untouched."""
    model = timm.create_model('regnety_002').train()
    model.s2.eval()
    model.s1.b1.se.fc1.weight.requires_grad_(False)
    called = []
    model.s3.b1.se.register_forward_hook(lambda *args: called.append(args[0]))
    before = {name: module for name, module in model.named_modules()}
    params = dict(model.named_parameters())
    values = {k: v.clone() for k, v in model.state_dict().items()}
    modes = {name: module.training for name, module in before.items()}
    state = torch.get_rng_state()
    adopt(model)
    assert torch.equal(torch.get_rng_state(), state)
    after = {name: module for name, module in model.named_modules() if not name.endswith('.squeeze')}
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert all(dict(model.named_parameters())[k] is v for k, v in params.items())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in values.items())
    assert modes == {name: module.training for name, module in after.items()}
    assert not model.s2.b1.se.squeeze.training and model.s1.b1.se.squeeze.training
    assert not model.s1.b1.se.fc1.weight.requires_grad and model.s1.b1.se.squeeze.weight.requires_grad
    called.clear()
    model(images(2, 64, 64))
    assert called == [model.s3.b1.se]
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = fill(timm.create_model('seresnet50', num_classes=10, **TINY)).to(dtype).eval()
    x = images(2, 97, 131).to(dtype)
    expected = model(x)
    assert {p.dtype for p in adopt(model).parameters()} == {dtype}
    assert torch.equal(model(x), expected)
    for p in squeeze_weights(model).values():
        nn.init.constant_(p, 0.1)
    assert model(x).dtype == dtype and not torch.equal(model(x), expected)


def test_meta_device() -> None:
    """Adopted without memory, then filled: reset_parameters brings the start back."""
    with torch.device('meta'):
        model = timm.create_model('seresnet50', num_classes=10, **TINY)
    adopt(model, 'spse')
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device='cpu')
    for module in se_modules(model).values():
        for p in module.squeeze.parameters():
            nn.init.ones_(p)
        module.squeeze.reset_parameters()
    assert all((p == 0).all() for p in squeeze_weights(model).values())


def test_input_size() -> None:
    model = timm.create_model('seresnet18', in_chans=1)
    assert adopt(model).layer1[0].se.squeeze.weight.shape == (64, 1, 8, 8)
    model = adopt(timm.create_model('seresnet18'), input_size=(3, 448, 448))
    assert [model.get_submodule(f'layer{i}.0.se').squeeze.weight.shape[-1] for i in (1, 2, 3, 4)] == [16, 8, 4, 2]
    # 56 x 28: as many windows as in a square of this area
    model = adopt(timm.create_model('seresnet18'), input_size=(3, 224, 112))
    assert model.layer1[0].se.squeeze.weight.shape[-1] == round((56 * 28 / 49) ** 0.5) == 6
    model.eval()(images(1, 224, 112))


# --- the registered model


def test_adopted_is_adopt() -> None:
    """The same network, with the base's config and arguments."""
    torch.manual_seed(0)
    model = timm.create_model('adopted', base='regnety_002', num_classes=7, in_chans=1, drop_path_rate=0.1)
    torch.manual_seed(0)
    expected = adopt(timm.create_model('regnety_002', num_classes=7, in_chans=1, drop_path_rate=0.1))
    assert_same_weights(model, expected)
    assert [str(m) for m in model.modules()] == [str(m) for m in expected.modules()]
    assert model.pretrained_cfg == {**expected.pretrained_cfg, 'architecture': 'adopted'} == model.default_cfg
    assert timm.list_models(module='adopted') == ['adopted']
    assert not timm.is_model_pretrained('adopted')
    # a loop over all models of timm gives no base
    model, expected = timm.create_model('adopted', **TINY), timm.create_model('adopted', base='seresnet50', **TINY)
    assert str(model) == str(expected) and model.pretrained_cfg == expected.pretrained_cfg
    model = timm.create_model('adopted', base='regnety_002.pycls_in1k', squeeze='spse')
    assert model.pretrained_cfg['tag'] == 'pycls_in1k'
    assert model.s1.b1.se.squeeze.weight4.shape[-1] == 4
    # the size of a base that is built for one
    grids, larger = ({
        k: v.shape[-1] for k, v in squeeze_weights(timm.create_model('adopted', base='gcvit_xxtiny', **args)).items()
    } for args in ({}, dict(img_size=448)))
    assert grids and all(larger[k] == 2 * grid for k, grid in grids.items())
    # as scripts that resolve the config themselves pass it on
    cfg = timm.models.resolve_pretrained_cfg('adopted').to_dict()
    model = timm.create_model('adopted', base='tf_efficientnet_b0', pretrained_cfg=cfg)
    assert model.pretrained_cfg == {
        **timm.create_model('tf_efficientnet_b0').pretrained_cfg, 'architecture': 'adopted'}


def test_pretrained_base(hub: HubServer, tmp_path: Path) -> None:
    """pretrained=True loads the base's own weights, of its tag; a file can be the base's or an adopted model's."""
    args = dict(base='test_efficientnet.r160_in1k', squeeze='spse')
    base = fill(timm.create_model('test_efficientnet')).eval()
    hub.add('timm/test_efficientnet.r160_in1k', {'model.safetensors': safetensors.torch.save(base.state_dict())})
    x = images(2, 97, 131)
    model = timm.create_model('adopted', pretrained=True, **args).eval()
    assert torch.equal(model(x), base(x))
    assert model.pretrained_cfg['hf_hub_id'] == 'timm/test_efficientnet.r160_in1k'
    features = timm.create_model('adopted', pretrained=True, features_only=True, **args).eval()
    expected = timm.create_model('test_efficientnet.r160_in1k', pretrained=True, features_only=True).eval()
    assert all(torch.equal(a, b) for a, b in zip(features(x), expected(x)))

    torch.save(base.state_dict(), tmp_path / 'base.pth')
    torch.save({'state_dict': learned(model).state_dict()}, tmp_path / 'adopted.pth')
    for file, donor in (('base.pth', base), ('adopted.pth', model)):
        # as train.py --pretrained-path
        overlay = dict(file=str(tmp_path / file), num_classes=-1)
        got = timm.create_model('adopted', True, pretrained_cfg_overlay=overlay, num_classes=5, **args).eval()
        assert got.num_classes == 5
        assert torch.equal(got.forward_features(x), donor.forward_features(x))
        assert (squeeze_weights(got)['blocks.3.0.se.squeeze.weight4'].abs().max() > 0) == (donor is model)


def test_checkpoint_path(tmp_path: Path) -> None:
    model = small()
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    loaded = timm.create_model(
        'adopted', base='seresnet50', num_classes=10, checkpoint_path=tmp_path / 'model.pth', **TINY)
    assert_same_weights(loaded, model)
    with pytest.raises(RuntimeError, match='squeeze.weight1'):
        timm.create_model(
            'adopted', base='seresnet50', squeeze='spse', num_classes=10, checkpoint_path=tmp_path / 'model.pth',
            **TINY)


@pytest.mark.parametrize('squeeze', ['rgse', 'spse'])
def test_state_dict(squeeze: str) -> None:
    model = small(squeeze)
    loaded = timm.create_model('seresnet50', num_classes=10, **TINY)
    adopt(loaded, squeeze).load_state_dict(model.state_dict())
    assert torch.equal(loaded.eval()(images(2, 97, 131)), model(images(2, 97, 131)))


@pytest.mark.parametrize('where', ['hf-hub', 'local-dir'])
def test_saved_model(where: str, hub: HubServer, tmp_path: Path) -> None:
    """save_for_hf, and what then loads by name: weights, other classes and channels, features."""
    args = dict(base='seresnet50', squeeze='spse', input_size=[3, 160, 160], num_classes=10, **TINY)
    model = learned(fill(timm.create_model('adopted', **args))).eval()
    # timm >= 1.0.31 saves the arguments by itself, older timm the given ones
    save_for_hf(model, tmp_path, model_args={k: v for k, v in args.items() if k != 'num_classes'},
                safe_serialization=True)
    assert not hasattr(timm.models, 'get_model_args') or timm.models.get_model_args(model).items() >= args.items()
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == 'adopted'
    assert (config['model_args']['base'], config['model_args']['squeeze']) == ('seresnet50', 'spse')
    if where == 'hf-hub':
        hub.add('user/adopted', {f.name: f.read_bytes() for f in tmp_path.iterdir()})
        name = 'hf-hub:user/adopted'
    else:
        name = f'local-dir:{tmp_path}'
    x = images(2, 97, 131)
    loaded = timm.create_model(name, pretrained=True).eval()
    assert_same_weights(loaded, model)
    assert torch.equal(loaded(x), model(x))
    assert squeeze_weights(timm.create_model(name))['layer1.0.se.squeeze.weight1'].abs().max() == 0
    loaded = timm.create_model(name, pretrained=True, num_classes=3).eval()
    assert loaded(x).shape == (2, 3)
    assert torch.equal(loaded.forward_features(x), model.forward_features(x))
    loaded = timm.create_model(name, pretrained=True, in_chans=1).eval()
    gray = x[:, :1]
    torch.testing.assert_close(loaded(gray), model(gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    for extra in ({}, dict(out_indices=(1, 3)), dict(feature_cls='getter', out_indices=(1, 2))):
        features = timm.create_model(name, pretrained=True, features_only=True, **extra).eval()(x)
        maps = [model.maxpool(model.act1(model.bn1(model.conv1(x))))]
        for i in (1, 2, 3, 4):
            maps.append(model.get_submodule(f'layer{i}')(maps[-1]))
        expected = [maps[i] for i in extra.get('out_indices', (1, 2, 3, 4))]
        for got, want in zip(features[-len(expected):], expected):
            torch.testing.assert_close(got, want)


def test_saved_config_of_another_size(tmp_path: Path) -> None:
    """The grids belong to the base, not to the size that a network was trained at."""
    model = small(pretrained_cfg_overlay=dict(input_size=(3, 96, 96), crop_pct=0.875))
    assert model.pretrained_cfg['input_size'] == (3, 96, 96)
    assert model.layer1[0].se.squeeze.weight.shape[-1] == 8
    save_for_hf(model, tmp_path, model_args=dict(base='seresnet50', squeeze='rgse', **TINY), safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert_same_weights(loaded, model)
    assert tuple(loaded.pretrained_cfg['input_size']) == (3, 96, 96)
    assert loaded.pretrained_cfg['crop_pct'] == 0.875
    data = timm.data.resolve_data_config(model=loaded)
    assert (tuple(data['input_size']), data['crop_pct']) == ((3, 96, 96), 0.875)


@pytest.mark.parametrize('base', [
    'fastvit_t8', 'ghostnet_050', 'legacy_seresnet18', 'mobilenetv3_small_050', 'regnety_002', 'rexnet_100',
    'test_byobnet', 'test_efficientnet',
])
def test_features(base: str, tmp_path: Path) -> None:
    """Whatever way a base extracts features, they are those of the adopted weights."""
    args = dict(base=base, squeeze='spse', **FAMILIES[base])
    model = learned(fill(timm.create_model('adopted', num_classes=3, **args)), std=1.).eval()
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    args.update(features_only=True, num_classes=3)
    overlay = dict(file=str(tmp_path / 'model.pth'))
    features = timm.create_model('adopted', True, pretrained_cfg_overlay=overlay, **args).eval()
    # fastvit's only SE block is in its head
    blocks = len(se_modules(features))
    assert 3 * blocks == len(squeeze_weights(features)) and (base == 'fastvit_t8') == (blocks == 0)
    x = images(1, 97, 131)
    maps = features(x)
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    inputs = []
    for module in model.modules():
        module.register_forward_hook(lambda m, args, out: inputs.append(out))
    model(x)
    same = [any(torch.is_tensor(out) and out.shape == m.shape and torch.equal(out, m) for out in inputs) for m in maps]
    assert all(same), same
    # without weights it starts as the base
    torch.manual_seed(0)
    features = timm.create_model('adopted', **args).eval()
    assert features.pretrained_cfg['architecture'] == 'adopted'
    assert len(squeeze_weights(features)) == 3 * blocks
    assert not any(w.abs().max() for w in squeeze_weights(features).values())


# --- copies, compilers, exporters


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * max(1., expected.abs().max().item()))


@pytest.mark.parametrize('base, args', [
    ('seresnet50', TINY),
    ('test_efficientnet', {}),
    ('legacy_seresnet18', dict(layers=(1, 1, 1, 1))),
])
def test_copies(base: str, args: Dict[str, Any]) -> None:
    """deepcopy, pickle, torch.save of the module."""
    model = small('spse', base=base, **args)
    x = images(2, 97, 131)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)


@pytest.mark.parametrize('squeeze, base, args', [
    ('spse', 'seresnet50', TINY),
    ('rgse', 'test_efficientnet', {}),
    ('spse', 'legacy_seresnet18', dict(layers=(1, 1, 1, 1))),
])
def test_torchscript_and_fx(squeeze: str, base: str, args: Dict[str, Any]) -> None:
    model = small(squeeze, base=base, scriptable=True, input_size=(3, 320, 320), **args)
    head = model.pretrained_cfg['classifier']
    graphs = [
        torch.jit.script(model),
        torch.fx.symbolic_trace(model),
        lambda x: create_feature_extractor(model, [head])(x)[head],
        lambda x: timm.models.create_feature_extractor(model, [head])(x)[head],
    ]
    for graph in graphs:
        for size in ((64, 64), (97, 131)):
            assert_same(graph(images(2, *size)), model(images(2, *size)))


@pytest.mark.parametrize('squeeze', ['rgse', 'spse'])
def test_compile_and_export(squeeze: str) -> None:
    """All three classes: no graph break, in eval and train mode, and one exported program for every size."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), SEModule(16, rd_channels=8), SqueezeExcite(16), SENetSEModule(16, reduction=4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    learned(adopt(model, squeeze, (3, 28, 28))).eval()
    assert len(squeeze_weights(model)) == (3 if squeeze == 'rgse' else 9)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        for size in ((28, 28), (27, 31)):
            assert_same(compiled(images(2, *size)), model(images(2, *size)))
    auto = torch.export.Dim.AUTO
    program = torch.export.export(model, (images(2, 28, 28),), dynamic_shapes=({0: auto, 2: auto, 3: auto},)).module()
    for batch, size in ((2, (28, 28)), (1, (27, 31))):
        assert_same(program(images(batch, *size)), model(images(batch, *size)))
    loss, grads = training_step(model.train(), images(3, 27, 31))
    loss_compiled, grads_compiled = training_step(compiled, images(3, 27, 31))
    assert_same(loss_compiled, loss)
    for n in squeeze_weights(model):
        assert grads[n].abs().max() > 0
        assert_same(grads_compiled[f'_orig_mod.{n}'], grads[n])


@pytest.mark.parametrize('squeeze', ['rgse', 'spse'])
def test_channels_last_and_autocast(squeeze: str) -> None:
    model = small(squeeze)
    x = images(2, 97, 131)
    expected = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        amp = model(x)
    assert amp.dtype == torch.bfloat16
    assert (amp - expected).norm() < 0.05 * expected.norm()
    assert_same(model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), expected)
    # inert squeezes change no bit of autocast's result either
    base = fill(timm.create_model('seresnet50', num_classes=10, **TINY)).eval()
    with torch.autocast('cpu', torch.bfloat16):
        before = base(x)
        assert torch.equal(adopt(base, squeeze)(x), before)


# --- learning


class PointwiseNet(nn.Sequential):
    """Nothing in it but its SE block can tell positions apart: convolutions of one pixel and a global average."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 16, 1), nn.ReLU(), SEModule(16, rd_channels=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, 2))


def left_or_right(count: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Noise with a bright square, (count, 1, 28, 28), and the half of the image that the square is in."""
    x = 0.3 * torch.randn(count, 1, 28, 28)
    labels = torch.randint(2, (count,))
    for image, label in zip(x, labels):
        top, left = torch.randint(0, 20, (1,)).item(), torch.randint(0, 6, (1,)).item() + 14 * label
        image[:, top:top + 8, left:left + 8] += 2
    return x, labels


@pytest.mark.parametrize('squeeze', [None, 'rgse', 'spse'])
def test_learns_positions(squeeze: str) -> None:
    """The global average can not tell left from right, local averages can."""
    torch.manual_seed(0)
    model = PointwiseNet()
    if squeeze:
        adopt(model, squeeze, input_size=(1, 28, 28))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        x, labels = left_or_right(32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    x, labels = left_or_right(500)
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == labels).float().mean().item()
    print(f'{squeeze}: {accuracy:.3f}')
    assert accuracy > 0.95 if squeeze else accuracy < 0.6


# --- bad input


class OtherSE(SEModule):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


BAD: Dict[str, Tuple[Any, Dict[str, Any], List[str]]] = {
    'no_se': ('resnet18', {}, ['ResNet has no SE block to adopt', 'seresnet50']),
    'ese': ('ese_vovnet19b_dw', {}, ['VovNet has no SE block', 'EffectiveSEModule']),
    'eca': ('ecaresnet26t', {}, ['has no SE block', 'EcaModule']),
    'rgse': ('rgse_resnet50', {}, ['pools locally already', 'RGSEModule']),
    'spse': ('spse_resnext50', {}, ['pools locally already', 'SPSEModule']),
    'squeeze': ('seresnet18', dict(squeeze='sp'), ["Unknown squeeze 'sp'", "'rgse' or 'spse'"]),
    'channels': ('seresnet18', dict(input_size=(1, 224, 224)), ['can not be run at', 'Pass input_size']),
    'small': ('seresnet18', dict(input_size=(3, 32, 32)), ['all grids would be 1 x 1', "squeeze='spse'"]),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input(case: str) -> None:
    name, kwargs, messages = BAD[case]
    with torch.device('meta'):
        model = timm.create_model(name)
    state = {k: v.shape for k, v in model.state_dict().items()}
    types = [type(m) for m in model.modules()]
    for training in (True, False):
        model.train(training)
        with pytest.raises(ValueError) as e:
            adopt(model, **kwargs)
        assert all(message in str(e.value) for message in messages), e.value
        assert {k: v.shape for k, v in model.state_dict().items()} == state
        assert [type(m) for m in model.modules()] == types
        assert model.training == training and not any(m._forward_pre_hooks for m in model.modules())


def test_bad_modules() -> None:
    with torch.device('meta'):
        for attn, cls in (('cbam', 'CbamModule'), ('gc', 'GlobalContext')):
            model = timm.create_model('resnet26', block_args=dict(attn_layer=attn))
            with pytest.raises(ValueError, match=f'has no SE block to adopt, but {cls}'):
                adopt(model)
        model = timm.create_model('resnet26', block_args=dict(attn_layer=OtherSE))
        with pytest.raises(ValueError, match='layer1.0.se of ResNet is a OtherSE'):
            adopt(model)
        model = timm.create_model('seresnet18')
        model.unused = SEModule(16)
        with pytest.raises(ValueError, match="unused of ResNet is not run by the model's forward"):
            adopt(model)
        model = adopt(timm.create_model('seresnet18'))
        for squeeze in ('rgse', 'spse'):
            with pytest.raises(ValueError, match=r'adopted already \(layer1.0.se\)'):
                adopt(model, squeeze)


def test_bad_adopted(tmp_path: Path) -> None:
    for args in (dict(base=''), dict(base='seresnet999'), dict(base='hf-hub:timm/seresnet50')):
        with pytest.raises(ValueError, match='The model adopted needs a base'):
            timm.create_model('adopted', **args)
    with pytest.raises(ValueError, match='has been adopted already'):
        timm.create_model('adopted', base='adopted')
    with pytest.raises(RuntimeError, match='Invalid pretrained tag'):
        timm.create_model('adopted', base='seresnet50.nonsense')
    with pytest.raises(ValueError, match='Unknown squeeze'):
        timm.create_model('adopted', base='seresnet18', squeeze='se')
    # weights of the other squeeze, where timm would not be strict
    torch.save(small('spse').state_dict(), tmp_path / 'spse.pth')
    with pytest.raises(RuntimeError, match='another adopted model: it has 12 tensors of squeezes .* not 3'):
        timm.create_model(
            'adopted', True, base='seresnet50', num_classes=3, **TINY,
            pretrained_cfg_overlay=dict(file=str(tmp_path / 'spse.pth')))


@pytest.mark.parametrize('squeeze', ['rgse', 'spse'])
def test_shared_modules(squeeze: str) -> None:
    """A module that is registered twice keeps its values, a tied weight stays tied."""
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            act, se = nn.PReLU(16), SEModule(16, rd_channels=8)
            self.layers = nn.Sequential(nn.Conv2d(3, 16, 1), act, se, nn.Conv2d(16, 16, 1), act, se)
            self.tied = nn.Conv2d(16, 16, 1)
            self.tied.weight = self.layers[3].weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tied(self.layers(x))

    model = Net()
    nn.init.normal_(model.layers[1].weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, 56, 56)
    expected = model(x)
    adopt(model, squeeze, input_size=(3, 56, 56))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert model.layers[2] is model.layers[5] and model.tied.weight is model.layers[3].weight
    assert torch.equal(model(x), expected)


def test_wrapped() -> None:
    with pytest.raises(ValueError, match='before it is wrapped in DataParallel'):
        adopt(nn.DataParallel(timm.create_model('seresnet50', layers=(1, 1, 1, 1))))


def test_saved_in_place(tmp_path) -> None:
    """A model that was adopted in place and saved does not come back without its squeezes: the error names the mend."""
    model = adopt(timm.create_model('seresnet50', layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), num_classes=5))
    save_for_hf(model, tmp_path / 'folder', safe_serialization=True)
    with pytest.raises(ValueError, match='needs a base'):
        timm.create_model(f'local-dir:{tmp_path}/folder', pretrained=True, num_classes=3)


@pytest.mark.parametrize('feature_cls', ['hook', 'fx'])
def test_other_feature_extractors(feature_cls: str) -> None:
    with pytest.raises(ValueError, match='is not supported for adopted models'):
        timm.create_model('adopted', base='seresnet50', features_only=True, feature_cls=feature_cls)
