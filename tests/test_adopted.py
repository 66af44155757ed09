""" adopt and the registered model `adopted`: with --full over all networks of timm, by default over a few """
import copy
import math
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import pytest
import torch
from test_export import onnx
from torch import nn

import timm
from helpers.common import FULL, NAMES, TINY, images, serve_donor, training_step
from helpers.hub_server import HubServer
from timm.layers import SEModule
from timm.models import save_for_hf
from timm.models.senet import SEModule as SENetSEModule
from timm_sepool import adopt
from timm_sepool._private import SqueezeExcite
from timm_sepool.adopted import ATTENTIONS, UnitGate

SHALLOW = dict(layers=(1, 1, 1, 1))
SMALLER = {'legacy_seresnet18': SHALLOW, 'repvit_m1': dict(depth=(2, 2, 2, 2)), 'rexnet_100': dict(width_mult=0.25),
           'seresnet18': SHALLOW, 'tresnet_m': SHALLOW, 'gcvit_xxtiny': dict(img_size=96),
           'test_maxvit': dict(img_size=96)}
# the smallest of each file of timm that has SE blocks (older timm has fewer), with arguments that make it smaller
FAMILIES = {name: SMALLER.get(name, {}) for name in (
    *SMALLER, 'efficientvim_m1', 'efficientvit_m0', 'fastvit_t8', 'ghostnet_050', 'haloregnetz_b', 'hardcorenas_b',
    'lcnetv2_small', 'mobilenetv3_small_050', 'regnety_002', 'repghostnet_050', 'sedarknet21', 'shvit_s1',
    'test_byobnet', 'test_efficientnet', 'test_nfnet') if timm.is_model(name)}
# The same for files without SE: attention, its arguments, and those of the network. Names only: named modules.
INSERTED: Dict[str, Tuple[str, Dict[str, Any], Dict[str, Any]]] = {
    'resnet18': ('cbam', {}, SHALLOW), 'resnet50': ('spse', dict(norm=True), SHALLOW),
    'res2net50_26w_4s': ('coord', {}, SHALLOW), 'hrnet_w18_small': ('eca', {}, {}),
    'regnetx_002': ('rgse', {}, {}), 'mobilenetv2_035': ('coord', {}, {}), 'mobilenetv4_conv_small': ('cbam', {}, {}),
    'efficientnet_lite0': ('spse', {}, {}), 'vovnet39a': ('rgse', dict(norm=True), {}), 'darknet17': ('se', {}, {}),
    'cspresnet50': ('cbam', {}, {}), 'repvgg_a0': ('eca', {}, {}), 'nf_resnet26': ('cbam', {}, {}),
    'vgg11': ('coord', {}, {}), 'vgg11_bn': ('spse', dict(norm=True), {}), 'inception_v3': ('cbam', {}, {}),
    'inception_v4': ('rgse', {}, {}), 'inception_resnet_v2': ('spse', {}, {}),
    'cspnext_l': ('se', {}, dict(channel_attention=False)),  # whose slot is called attention
    'densenet121': ('cbam', dict(modules=['features.denseblock*']), {}),
    'convnext_atto': ('coord', dict(modules='stages.*'), {}),
    'xception41': ('rgse', dict(modules=['blocks.*']), {}), 'resnetv2_50': ('se', dict(modules=['stages.*']), {})}
# efficientvit of older timm and haloregnetz take one size, tresnet multiples of 4, the others are built for a size
SIZES = {'efficientvit_m0': ((224, 224),), 'haloregnetz_b': ((224, 224),), 'tresnet_m': ((64, 64), (68, 100)),
         'gcvit_xxtiny': ((96, 96),), 'test_maxvit': ((96, 96),), 'hrnet_w18_small': ((96, 96), (96, 128))}
# parameters added by rgse and spse, and those of the base, as README and docs/adopt.md give them
ADDED = {'regnety_032': (56_448, 214_704, 19.4e6), 'efficientnet_b0': (41_792, 188_160, 5.3e6),
         'legacy_senet154': (262_144, 1_005_312, 115e6)}
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def se_modules(model: nn.Module) -> Dict[str, nn.Module]:
    return {k: m for k, m in model.named_modules() if isinstance(m, (SEModule, SqueezeExcite, SENetSEModule))}


def squeeze_weights(model: nn.Module) -> Dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if '.squeeze.weight' in name}


def blocks(model: nn.Module) -> Dict[str, nn.Module]:
    """The inserted attention blocks: the outermost modules around gates that can be 1."""
    gates = [path.rpartition('.')[0] for path, module in model.named_modules() if isinstance(module, UnitGate)]
    return {p: model.get_submodule(p) for p in dict.fromkeys(re.sub(r'\.(channel|spatial)$', '', g) for g in gates)}


def new_parameters(model: nn.Module) -> Dict[str, nn.Parameter]:
    prefixes = tuple(f'{path}.' for path in blocks(model))
    return {k: p for k, p in model.named_parameters() if '.squeeze.weight' in k or k.startswith(prefixes)}


def fill(model: nn.Module) -> nn.Module:
    """Nothing at its trivial value, so that every block matters to the output (timm zeroes the last norms)."""
    new = new_parameters(model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name not in new and (param.ndim < 2 or param.abs().max() <= 1e-4):
                param.uniform_(0.3, 0.9)
    return model


def learned(model: nn.Module, std: float = 0.3) -> nn.Module:
    """An adopted model whose squeezes and last layers have left their start, zero."""
    assert [nn.init.normal_(param, std=std) for param in new_parameters(model).values() if not param.any()]
    return model


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * max(1., expected.abs().max().item()))


def shapes_at(model: nn.Module, modules: Dict[str, nn.Module], input_size: Tuple[int, ...]) -> Dict[str, Tuple]:
    """Shapes (C, H, W) of the outputs of some modules."""
    maps: Dict[str, Tuple] = {}
    hooks = [module.register_forward_hook(lambda m, args, out, path=path: maps.update({path: tuple(out.shape[1:])}))
             for path, module in modules.items()]
    with torch.no_grad():
        model.eval()(torch.empty(1, *input_size, device='meta'))
    assert [hook.remove() for hook in hooks] and maps.keys() == modules.keys()
    return maps


def grid(height: int) -> int:
    return next(g for g in range(1, 99) if height < 7 * g + 3.5)


def se_shapes(path: str, channels: int) -> Dict[str, Tuple[int, ...]]:
    """Of timm's SE module with a ratio of 1/16 and a divisor of 8."""
    hidden = max(8, int(channels / 16 + 4) // 8 * 8)
    return {f'{path}.fc1.weight': (hidden, channels, 1, 1), f'{path}.fc1.bias': (hidden,),
            f'{path}.fc2.weight': (channels, hidden, 1, 1), f'{path}.fc2.bias': (channels,), f'{path}.gate.scale': ()}


def test_architectures() -> None:
    """What becomes of each network, and its new names and shapes by formula, on the meta device."""
    kinds: Dict[str, Dict[str, int]] = {kind: {} for kind in ('SE', 'inserted', 'named', 'refused')}
    for name in set(timm.list_models() if FULL else [*ADDED, *COUNTED]) - {*NAMES, 'adopted'}:
        original = build(name)
        size = original.pretrained_cfg['input_size']
        before = {k: tuple(v.shape) for k, v in original.state_dict().items()}
        if se_modules(original):
            maps = shapes_at(original, se_modules(original), size)
            kinds['SE'][name] = len(maps)
            rgse = {f'{k}.squeeze.weight': (c, 1, grid(h), grid(h)) for k, (c, h, _) in maps.items() if grid(h) > 1}
            spse = {f'{k}.squeeze.weight{g}': (maps[k][0], 1, g, g) for k in maps for g in (1, 2, 4)}
            parameters = sum(p.numel() for p in original.parameters())
            for attention, expected, model in (('rgse', rgse, copy.deepcopy(original)), ('spse', spse, original)):
                if expected:
                    assert adopt(model, attention) is model and all(p.is_meta for p in model.parameters())
                    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {**before, **expected}, name
                else:
                    pytest.raises(ValueError, adopt, model, attention).match('every grid would be 1 x 1')
            if name in ADDED:
                assert tuple(sum(map(math.prod, added.values())) for added in (rgse, spse)) == ADDED[name][:2]
                assert parameters == pytest.approx(ADDED[name][2], rel=0.005)
            continue
        info = getattr(original, 'feature_info', [])
        stages = [stage['module'] for stage in getattr(info, 'info', info) if stage.get('module')]
        for modules in (None, *stages[-1:], *stages[:1]):
            try:
                adopt(original, 'spse', modules=modules, norm=False)
            except ValueError as e:
                assert re.search(
                    'Name |has no module named|does not run|Cannot run' if modules else
                    'has (no SE block and no place for|other attention already)|Cannot run', str(e)), f'{name}: {e}'
            else:
                break
        kind = 'refused' if not blocks(original) else 'named' if modules else 'inserted'
        kinds[kind][name] = len(blocks(original))
        expected = {}
        for k, (c, _, _) in shapes_at(original, blocks(original), size).items() if kind != 'refused' else ():
            expected.update({**se_shapes(k, c), **{f'{k}.squeeze.weight{g}': (c, 1, g, g) for g in (1, 2, 4)}})
        assert {k: tuple(v.shape) for k, v in original.state_dict().items()} == {**before, **expected}, name
    if FULL:
        modules = [{timm.model_entrypoint(name).__module__ for name in names} for names in (kinds['SE'], FAMILIES)]
        assert kinds['SE'].keys() >= FAMILIES.keys() and modules[0] == modules[1]
        if timm.__version__ == '1.0.31':  # as docs/adopt.md says
            assert {kind: (len(names), sum(names.values())) for kind, names in kinds.items()} == {
                'SE': (334, 6811), 'inserted': (222, 5368), 'named': (318, 318), 'refused': (497, 0)}
    found = {name: (kind, n) for kind in kinds for name, n in kinds[kind].items()}
    assert {name: found[name] for name in COUNTED} == COUNTED


COUNTED = {
    'resnet18': ('inserted', 8), 'vgg11_bn': ('inserted', 8), 'inception_v3': ('inserted', 11),
    'vit_tiny_patch16_224': ('refused', 0)}


@pytest.mark.parametrize('plain, sibling', [
    ('resnet18', 'seresnet18'), ('resnext50_32x4d', 'seresnext50_32x4d'), ('resnet33ts', 'seresnet33ts'),
    ('darknet21', 'sedarknet21'), ('nf_resnet50', 'nf_seresnet50'), ('efficientnet_lite0', 'efficientnet_b0'),
    ('vovnet39a', 'ese_vovnet39b'), ('resnet50', 'cbam')])
def test_places_are_those_of_the_sibling(plain: str, sibling: str) -> None:
    """The blocks have the names that timm's own network with attention has, for ResNets with all their shapes."""
    if sibling != 'cbam':
        names = {path for path, module in build(sibling).named_modules()
                 if path.endswith(('.se', '.attn', '.attn_last')) and not isinstance(module, nn.Identity)}
        assert blocks(adopt(build(plain), 'eca')).keys() == names != set()
    if sibling in ('cbam', 'seresnet18'):
        model, theirs = (adopt(build(plain), 'cbam'), build(plain, 'cbam')) if sibling == 'cbam' else (
            adopt(build(plain), 'se'), build(sibling))
        shapes = {k: v.shape for k, v in model.state_dict().items()}
        factors = [k for k in shapes if k.endswith('gate.scale')]  # without them the weights must not load
        assert factors and {k: v for k, v in shapes.items() if k not in factors} == {
            k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize('name', [name for name in (*FAMILIES, *INSERTED) if FULL or name in (
    'legacy_seresnet18', 'regnety_002', 'test_efficientnet', 'resnet18', 'resnet50', 'nf_resnet26', 'convnext_atto')])
def test_families(name: str) -> None:
    """The same logits in eval and train mode at every size. The last layers have gradients, all have a step later."""
    attention, options, args = INSERTED.get(name, ('rgse', {}, FAMILIES.get(name, {})))
    sizes = SIZES.get(name, ((64, 64), (65, 97)) if name in FAMILIES else ((96, 96), (97, 131)))
    inputs = [images(2, *size) for size in sizes]
    model = fill(timm.create_model(name, num_classes=10, **args))
    original, random_state = copy.deepcopy(model), torch.get_rng_state()
    try:
        adopt(model, attention, (3, *sizes[0]) if 'img_size' in args else None, **options)
    except ValueError as e:
        assert 'every grid would be 1 x 1' in str(e)
        adopt(model, 'spse')
    assert torch.equal(torch.get_rng_state(), random_state)

    def logits(x: torch.Tensor, training: bool = True, model: nn.Module = model) -> torch.Tensor:
        torch.manual_seed(0)  # for dropout
        out = model.train(training)(x)
        return out if torch.is_tensor(out) else torch.stack(out)  # heads with a distillation token

    def gradients() -> Dict[str, bool]:
        new = new_parameters(model)
        grads = torch.autograd.grad(logits(inputs[-1]).log_softmax(-1)[..., 0].sum(), list(new.values()))
        assert all(grad.isfinite().all() for grad in grads)
        with torch.no_grad():
            for param, grad in zip(new.values(), grads):
                param.sub_(0.1 * grad / grad.abs().max().clamp(min=1e-30))
        return {k: bool(grad.any()) for k, grad in zip(new, grads)}

    with torch.no_grad():
        expected, got = (
            [logits(x, training, m) for x in inputs for training in (False, True)] for m in (original, model))
    assert all(map(torch.equal, got, expected)) and all(x.isfinite().all() for x in got)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in original.state_dict().items())  # statistics of norms
    first, second = gradients(), gradients()
    layers = dict(eca='conv', cbam='fc2|conv.bn', coord='conv_[hw]').get(attention, 'fc2')
    last = re.compile(layers if blocks(model) else 'squeeze')
    assert any(map(last.search, first)) and all(second.values())
    assert first == {k: bool(last.search(k)) for k in first}


def three_classes() -> nn.Sequential:
    """One module of each class, with the arguments that timm's models leave at their defaults."""
    args = dict(add_maxpool=True, norm_layer=nn.BatchNorm2d, act_layer=nn.SiLU, gate_layer='hard_sigmoid')
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), SEModule(16, rd_channels=8, **args), SqueezeExcite(16), SENetSEModule(16, reduction=4))
    model[1].fc2 = nn.Sequential(model[1].fc2)  # as LoRA wraps it: only the first layer has to tell the channels
    return model


@pytest.mark.parametrize('squeeze', ['rgse', 'spse'])
def test_learned_squeeze_is_the_formula(squeeze: str) -> None:
    """Adopted on meta and filled, in all three classes: mean + depthwise convolution of adaptive average pooling."""
    model = adopt(three_classes().to('meta'), squeeze, (3, 28, 28)).to_empty(device='cpu').eval()
    model.apply(lambda module: getattr(module, 'reset_parameters', int)())
    assert not any(w.any() for w in squeeze_weights(model).values())
    for module in learned(model)[1:]:
        x = torch.randn(2, 16, 23, 30)
        s = x.mean((2, 3), keepdim=True)
        for w in module.squeeze.parameters():
            s = s + nn.functional.conv2d(nn.functional.adaptive_avg_pool2d(x, w.shape[-1]), w, groups=16)
        if getattr(module, 'add_maxpool', False):
            s = (s + x.amax((2, 3), keepdim=True)) / 2
        *layers, gate = [m for m in module.children() if m is not module.squeeze]  # in the order of use
        torch.testing.assert_close(module(x), x * gate(nn.Sequential(*layers)(s)))


def test_leaves_the_rest_alone() -> None:
    """Modules, parameters (shared ones too), hooks and modes are the same objects; values and random state stay."""
    model, called = fill(timm.create_model('regnety_002')).train(), []
    model.s2.eval()
    model.s4.b3.se, model.s4.b3.conv3.conv.weight = model.s4.b2.se, model.s4.b2.conv3.conv.weight
    original = copy.deepcopy(model)
    model.s3.b1.se.register_forward_hook(lambda *args: called.append(args[0]))
    modules = [(k, m, m.training) for k, m in model.named_modules(remove_duplicate=False)]
    params, state = dict(model.named_parameters(remove_duplicate=False)), torch.get_rng_state()
    adopt(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert modules == [(k, m, m.training) for k, m in model.named_modules(remove_duplicate=False) if 'squeeze' not in k]
    assert all(model.get_parameter(k) is v for k, v in params.items())
    assert not model.s2.b1.se.squeeze.training and model.s1.b1.se.squeeze.training
    called.clear()
    assert torch.equal(model(images(2, 64, 64)), original(images(2, 64, 64)))
    assert called == [model.s3.b1.se] and not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize('attention, dtype', [
    (attention, dtype) for attention in ('seresnet50', *ATTENTIONS, 'spse norm', 'rgse norm')
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if FULL or dtype == torch.float32 or attention in ('seresnet50', 'cbam', 'rgse norm')])
def test_dtypes(attention: str, dtype: torch.dtype) -> None:
    """Also under autocast, and for subnormal maps; with the dtype of the base."""
    options: Dict[str, Any] = {} if attention == 'seresnet50' else dict(
        attention=attention.split()[0], norm='norm' in attention or None)
    model = fill(timm.create_model('resnet50' if options else attention, num_classes=10, **TINY)).to(dtype)
    new, x = adopt(copy.deepcopy(model), **options), images(2, 64, 81, dtype=dtype)
    assert {p.dtype for p in new.parameters()} == {dtype}
    autocast = partial(torch.autocast, 'cpu', torch.bfloat16, enabled=dtype == torch.float32)
    with torch.no_grad(), autocast():
        for training, scale in ((True, 1), (False, torch.finfo(dtype).tiny), (False, 1)):
            expected, got = model.train(training)(scale * x), new.train(training)(scale * x)
            assert got.dtype == expected.dtype and torch.equal(got, expected)
    with torch.no_grad(), autocast():  # the one before keeps the old weights
        got = learned(new)(x)
    assert got.dtype == expected.dtype and not torch.equal(got, expected)


def test_adopted_is_adopt() -> None:
    """The same network, with the base's config and arguments."""
    args = dict(num_classes=7, in_chans=1, drop_path_rate=0.1)
    model = timm.create_model('adopted', base='regnety_002', **args)
    torch.manual_seed(0)
    expected = adopt(timm.create_model('regnety_002', **args))
    assert_equal(model.state_dict(), expected.state_dict())
    assert model.pretrained_cfg == {**expected.pretrained_cfg, 'architecture': 'adopted'} == model.default_cfg
    # a loop over all models of timm gives no base
    default, expected = timm.create_model('adopted', **TINY), timm.create_model('adopted', base='seresnet50', **TINY)
    assert str(default) == str(expected) and default.pretrained_cfg == expected.pretrained_cfg
    for base, size, grids in (
            ('gcvit_xxtiny', dict(img_size=448), [32, 16, 8, 4, 16, 8, 4, 8, 4, 4, 2]),  # built for a size
            ('seresnet18', dict(input_size=(3, 448, 448)), [16, 16, 8, 8, 4, 4, 2, 2]),
            ('seresnet18', dict(input_size=(3, 224, 112)), [6, 6, 3, 3])):  # 56 x 28 is the area of 5.7 x 5.7 windows
        assert [w.shape[-1] for w in squeeze_weights(timm.create_model('adopted', base=base, **size)).values()] == grids
    # scripts that resolve the config themselves pass it on
    cfg = timm.models.resolve_pretrained_cfg('adopted').to_dict()
    assert timm.create_model('adopted', base='regnety_002', pretrained_cfg=cfg).pretrained_cfg == model.pretrained_cfg


def test_pretrained_base(hub: HubServer, tmp_path: Path) -> None:
    """pretrained=True loads the base's own weights, of its tag; a file can be the base's or an adopted model's."""
    create = partial(timm.create_model, 'adopted', True, base='test_efficientnet.r160_in1k', squeeze='spse')
    serve_donor(hub, 'test_efficientnet.r160_in1k')
    base = timm.create_model('test_efficientnet.r160_in1k', pretrained=True).eval()
    model, x = create().eval(), images(2, 97, 131)
    assert torch.equal(model(x), base(x))
    assert model.pretrained_cfg['hf_hub_id'] == 'timm/test_efficientnet.r160_in1k'
    path = tmp_path / 'weights.pth'
    overlay = dict(file=str(path), num_classes=-1)  # as train.py --pretrained-path
    for state, donor in ((base.state_dict(), base), ({'state_dict': learned(model).state_dict()}, model)):
        torch.save(state, path)
        got = create(pretrained_cfg_overlay=overlay, num_classes=5).eval()
        assert got.num_classes == 5 and torch.equal(got.forward_features(x), donor.forward_features(x))
        assert squeeze_weights(got)['blocks.3.0.se.squeeze.weight4'].any() == (donor is model)
    # keys that are too many, which timm ignores with a log line
    torch.save({**model.state_dict(), 'ema.decay': torch.ones(1)}, path)
    overlay = dict(file=str(path))
    pytest.raises(RuntimeError, create, pretrained_cfg_overlay=overlay).match('ema.decay')
    assert_equal(create(pretrained_cfg_overlay=overlay, pretrained_strict=False).state_dict(), model.state_dict())


@pytest.mark.parametrize('where, base, args, other, counts', [
    ('hf-hub', 'seresnet50', dict(squeeze='spse', input_size=[3, 160, 160]), dict(squeeze='rgse'), '12 .* has 2'),
    ('local-dir', 'seresnet50', dict(attention='rgse'), dict(attention='spse'), '3 .* has 12'),
    ('local-dir', 'resnet50', dict(attention='cbam'), dict(attention='se'), '40 .* has 20'),
    ('hf-hub', 'resnet50', dict(attention='spse', norm=True), dict(norm=False), '64 .* has 32'),
    ('local-dir', 'resnet50', dict(attention='se', modules=['act1', 'layer*']), dict(modules='layer2'), '25 .* has 5'),
    ('hf-hub', 'resnet50', dict(attention='eca', modules='layer1'), dict(modules='layer2'), '2 .* has 2')])
def test_saved_model(
        where: str, base: str, args: Dict[str, Any], other: Dict[str, Any], counts: str, hub: HubServer, tmp_path: Path,
) -> None:
    """save_for_hf, and what then loads by name: weights, config, other classes and channels, features."""
    save_for_hf(adopt(timm.create_model(base, **TINY), **args), tmp_path / 'in_place', safe_serialization=True)
    pytest.raises(ValueError, timm.create_model, f'local-dir:{tmp_path}/in_place').match('as base, got None')
    args = dict(base=base, **args, **TINY)
    cfg = dict(input_size=(3, 96, 96), crop_pct=0.875)  # of a training run at another size, which changes no grid
    model = timm.create_model('adopted', num_classes=10, pretrained_cfg_overlay=cfg, **args)
    learned(fill(model)).eval()
    x, file, folder = images(2, 97, 131), tmp_path / 'model.pth', tmp_path / 'saved'
    torch.save(model.state_dict(), file)
    create = partial(timm.create_model, 'adopted', num_classes=10)
    assert_equal(create(checkpoint_path=file, **args).state_dict(), model.state_dict())
    with pytest.raises(RuntimeError, match=f'has {counts} .* Use the base, attention, input_size'):
        create(pretrained=True, **{  # where timm would not be strict
            **args, **other, 'num_classes': 3, 'pretrained_cfg_overlay': dict(file=str(file))})
    # timm >= 1.0.31 saves the arguments by itself, older timm the given ones
    save_for_hf(model, folder, model_args=args, safe_serialization=True)
    assert not hasattr(timm.models, 'get_model_args') or timm.models.get_model_args(model).items() >= args.items()
    hub.add('user/adopted', {f.name: f.read_bytes() for f in folder.iterdir()})
    name = 'hf-hub:user/adopted' if where == 'hf-hub' else f'local-dir:{folder}'
    create = partial(timm.create_model, name, pretrained=True)
    loaded, three_classes = create().eval(), create(num_classes=3).eval()
    assert_equal(loaded.state_dict(), model.state_dict())
    data = timm.data.resolve_data_config(model=loaded)
    assert (tuple(data['input_size']), data['crop_pct']) == ((3, 96, 96), 0.875)
    assert three_classes(x).shape == (2, 3)
    assert torch.equal(three_classes.forward_features(x), model.forward_features(x))
    assert_close(create(in_chans=1).eval()(x[:, :1]), model(x[:, :1].expand(-1, 3, -1, -1)))
    features = create(features_only=True, out_indices=(1, 3), feature_cls='getter').eval()(x)
    torch.testing.assert_close(list(features), model.forward_intermediates(x, [1, 3], intermediates_only=True))


@pytest.mark.parametrize('base', ['regnety_002', 'test_efficientnet', 'fastvit_t8', 'ghostnet_050', 'test_byobnet', *(
    name for name in INSERTED if FULL or name in ('resnet18', 'densenet121'))])
def test_features(base: str, tmp_path: Path) -> None:
    """Whatever way a base extracts features, they are those of the adopted weights."""
    attention, options, more = INSERTED.get(base, ('spse', {}, FAMILIES.get(base, {})))
    args = dict(base=base, attention=attention, num_classes=3, **options, **more)
    model = learned(fill(timm.create_model('adopted', **args)), std=1.).eval()
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    overlay = dict(file=str(tmp_path / 'model.pth'))
    features = timm.create_model('adopted', True, pretrained_cfg_overlay=overlay, features_only=True, **args).eval()
    x, outputs = images(1, *SIZES.get(base, [(97, 131)])[-1]), []
    maps = features(x)
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    for module in model.modules():
        module.register_forward_hook(lambda m, args, out: outputs.append(out))
    model(x)
    assert all(any(torch.is_tensor(out) and torch.equal(out, m) for out in outputs) for m in maps)
    new = new_parameters(features)
    assert bool(new) == (base != 'fastvit_t8')  # only in its head


FORMS: Dict[str, Callable[[nn.Module], Any]] = {
    'pickle': lambda model: pickle.loads(pickle.dumps(model)),
    'channels last': lambda model: copy.deepcopy(model).to(memory_format=torch.channels_last),
    'TorchScript': torch.jit.script,
    'timm': lambda model: lambda x: timm.models.create_feature_extractor(
        model, [(last := [k for k, m in model.named_modules() if isinstance(m, nn.Linear)][-1])])(x)[last],
    'compile': partial(torch.compile, fullgraph=True, backend='eager'),
    'export': lambda model: torch.export.export(
        model, (images(2, 64, 64),), strict=False,  # the default since torch 2.8
        dynamic_shapes=(dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO),)).module(),
}


def adopted_model(attention: str, kind: str) -> nn.Module:
    """With SE modules of all classes, with attention in slots, or behind a layer of torch, of timm and a Sequential."""
    if kind == 'SE':
        model: nn.Module = nn.Sequential(*three_classes(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    else:
        model = fill(timm.create_model('resnet18', num_classes=10, **TINY))
    modules = ['conv1', 'layer1', 'layer2.0', 'layer3.0.act1'] if kind == 'outputs' else None
    return learned(adopt(model, attention, (3, 28, 28) if kind == 'SE' else (3, 224, 224), modules)).eval()


@pytest.mark.parametrize('attention, kind', [
    ('spse', 'SE'), ('cbam', 'outputs'), *(pytest.param(*case, marks=pytest.mark.full) for case in (
        ('rgse', 'SE'), ('rgse', 'outputs'), *((attention, 'slots') for attention in ATTENTIONS)))])
@pytest.mark.parametrize('form', [*FORMS, pytest.param('onnx', marks=pytest.mark.full)])
def test_forms(form: str, attention: str, kind: str) -> None:
    """The same in every form, at every size by one program; compiled, they learn the same."""
    model = adopted_model(attention, kind)
    torch.compiler.reset()
    converted = {**FORMS, 'onnx': onnx}[form](model)
    for x in (images(2, 64, 64), images(3, 67, 95)):
        x = x.to(memory_format=torch.channels_last if form == 'channels last' else torch.contiguous_format)
        with torch.no_grad():
            assert_close(converted(x), model(x))
    if form == 'compile':
        (loss, grads), (converted_loss, converted_grads) = (training_step(m, x) for m in (model.train(), converted))
        assert_close(converted_loss, loss)
        assert any(grads[n].any() for n in new_parameters(model))  # a CBAM of 16 channels has one hidden unit
        for n in new_parameters(model):
            assert_close(converted_grads[f'_orig_mod.{n}'], grads[n])


@pytest.mark.parametrize('squeeze', [None, 'rgse', 'spse'])
def test_learns_positions(squeeze: str) -> None:
    """In which half of a noisy image is a bright square? The global average cannot tell, local averages can."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 1), nn.ReLU(), SEModule(16, rd_channels=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(1),
        nn.Linear(16, 2))
    if squeeze:
        adopt(model, squeeze, input_size=(1, 28, 28))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for count in 150 * [32] + [500]:  # the last batch is the test
        labels = torch.randint(2, (count,))
        top, left = torch.randint(20, (count, 1, 1)), torch.randint(6, (count, 1, 1)) + 14 * labels.view(-1, 1, 1)
        square = ((torch.arange(28).view(-1, 1) - top) // 8 == 0) & ((torch.arange(28) - left) // 8 == 0)
        logits = model(0.3 * torch.randn(count, 1, 28, 28) + 2 * square.unsqueeze(1))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    accuracy = (logits.argmax(1) == labels).float().mean()
    assert accuracy > 0.95 if squeeze else accuracy < 0.6


def build(name: str, attn: Any = None, **last_se) -> nn.Module:
    """On the meta device, with changed attributes of the last SE module: those before it can be adopted."""
    model = timm.create_model(name, device='meta', **(dict(block_args=dict(attn_layer=attn)) if attn else {}))
    for key, value in last_se.items():
        setattr(list(se_modules(model).values())[-1], key, value)
    return model


def unused(name: str, cls: type = nn.ReLU) -> nn.Module:
    model = build(name)
    model.unused = cls()
    return model


def shared(name: str) -> nn.Module:
    model = build(name)
    model.layer1[1] = model.layer1[0]
    return model


Static = type('Static', (nn.Module,), {'forward': staticmethod(torch.relu)})
OtherSE, conv = type('OtherSE', (SEModule,), {}), partial(nn.Conv2d, 512, 32, 1, device='meta')
SE, PLAIN, FC1 = 'seresnet18', 'resnet18', r'layer4\.1\.se\.fc1 of ResNet is of class'
BAD: Dict[str, Tuple[Any, Dict[str, Any], str]] = {
    **{attn: (partial(build, 'resnet26', attn), {}, rf'has other attention already \({cls}\). Pass modules')
       for attn, cls in (('ese', 'EffectiveSEModule'), ('eca', 'EcaModule'), ('gc', 'GlobalContext'))},
    'ViT': (partial(build, 'vit_tiny_patch16_224'), {}, 'VisionTransformer has no SE block and no place for'),
    'second attention': (partial(build, SE), dict(attention='cbam'), "has SE blocks, and 'cbam' would be a second"),
    'two names': (partial(build, SE), dict(attention='spse', squeeze='spse'), 'not both'),
    'norm of SE': (partial(build, SE), dict(attention='spse', norm=True), 'not of the SE blocks of a model'),
    **{f'{key}={value!r}': (partial(build, PLAIN), dict([('attention', 'se'), (key, value)]), message)
       for key, message, values in (
        ('attention', 'Unknown attention', ['', 3]), ('norm', 'norm must be', ['no']),
        ('modules', 'modules must be names', [[], 5, [None]]), ('input_size', 'three positive', [224, (3, 224)]))
       for value in values},
    'no parameters': (lambda: nn.Sequential(nn.ReLU()), {}, 'has no floating-point parameters'),
    'scripted': (lambda: nn.Sequential(torch.jit.script(nn.Linear(1, 1))), {}, 'contains TorchScript'),
    'static forward': (partial(unused, PLAIN, Static), dict(modules=['act1', 'unused']), 'an unusual forward'),
    'norm of CBAM': (partial(build, PLAIN), dict(attention='cbam', norm=True), 'Leave it out'),
    'grid': (partial(build, PLAIN), dict(input_size=(3, 32, 32)), 'would be 1 x 1, which is SE'),
    'inserted': (lambda: adopt(build(PLAIN), 'eca'), {}, r'layer1\.0\.se of ResNet .*EcaModule: it is adopted already'),
    **{f'modules {pattern}': (partial(build, name), dict(attention='se', modules=[pattern]), message)
       for pattern, name, message in (
        ('layer9', PLAIN, "no module named 'layer9'. .* The first parts are conv1, bn1"),
        ('global_pool', PLAIN, r'output of global_pool is not a feature map .*: \(1, 512\)'),
        ('bn1', PLAIN, 'of class BatchNorm2d, which other tools replace'),
        ('blocks.0', 'vit_tiny_patch16_224', r'is not a feature map .* \(1, 197, 192\)'),
        ('layers.0', 'swin_tiny_patch4_window7_224', r'is not a feature map .* \(1, 56, 56, 96\)'),
        ('stages.0.blocks.0.mlp', 'convnext_tiny', r'not a feature map .* \(1, 56, 56, 96\)'),
        ('stage2', 'hrnet_w18_small', 'iterates over its children'),
        ('stages', 'convnext_atto', 'whose children timm runs one by one'), ('stem.conv1', 'repvit_m1', 'other tools'),
        ('features.denseblock1.denselayer1', 'densenet121', 'takes more than one tensor'))},
    'not run, named': (partial(unused, PLAIN), dict(modules=['unused']), 'in eval mode does not run unused'),
    'run twice': (partial(shared, PLAIN), dict(attention='se'), r'ResNet runs layer1\.0\.se 2 times in a forward'),
    **{f'{name}_resnet50': (partial(build, f'{name}_resnet50'), {}, f'{name.upper()}Module, which has local averages '
                            'already. Adopt an SE network') for name in ('rgse', 'spse')},
    'unknown': (partial(build, SE), dict(squeeze='sp'), "Unknown attention 'sp'. Choose one of se, spse, rgse"),
    'channels': (partial(build, SE), dict(input_size=(1, 224, 224)), 'Cannot run ResNet at .* Pass an input_size'),
    'small': (partial(build, SE), dict(input_size=(3, 32, 32)), "every grid would be 1 x 1. Use 'spse'"),
    'not run': (partial(build, SE, unused=SEModule(16)), {}, r'does not run layer4\.1\.se\.unused, so the size'),
    'subclass': (partial(build, 'resnet26', OtherSE), {}, r'layer1\.0\.se .* OtherSE and has a forward of its own'),
    'forward': (partial(build, SE, forward=abs), {}, r'layer4\.1\.se .* has a forward of its own'),
    'LoRA': (partial(build, SE, fc1=nn.Sequential(conv())), {}, f'{FC1} Sequential, not a Conv2d with floating-point'),
    'not floats': (partial(build, SE, fc1=conv(dtype=torch.complex64)), {}, FC1 + r'.* Adopt .* then wrap \(LoRA\)'),
    'adopted': (lambda: adopt(build(SE)), {}, r'layer1\.0\.se of ResNet .*: it is adopted already. Create'),
    'last one fails': (partial(build, SE, fc1=nn.LazyConv2d(32, 1)), dict(squeeze='spse'), "Can't access the shape"),
    'wrapped': (lambda: nn.DataParallel(build(SE)), {}, 'Adopt the model first, then wrap it'),
}


@pytest.mark.parametrize('create, kwargs, message', BAD.values(), ids=BAD)
def test_bad_input(create: Callable, kwargs: Dict[str, Any], message: str) -> None:
    model = create().train()
    next(model.children()).eval()

    def state() -> Tuple[Any, ...]:
        modules = [(m._forward_pre_hooks.copy(), m.training) for m in model.modules()]
        return str(model), list(model.state_dict()), copy.deepcopy(getattr(model, 'pretrained_cfg', None)), modules

    before = state()
    pytest.raises(RuntimeError if 'shape' in message else ValueError, adopt, model, **kwargs).match(message)
    assert state() == before


@pytest.mark.parametrize('args, message', [
    *((dict(base=base), f"needs a model of timm as base, got '{base}'. Pass base='regnety_032'")
      for base in ('', 'seresnet999', 'hf-hub:timm/seresnet50')),
    (dict(base='adopted'), 'adopted already'),
    *((dict(features_only=True, feature_cls=cls), f"do not support feature_cls='{cls}'. Use 'getter'")
      for cls in ('hook', 'fx')),
])
def test_bad_adopted(args: Dict[str, Any], message: str) -> None:
    pytest.raises(ValueError, timm.create_model, 'adopted', **args).match(message)
