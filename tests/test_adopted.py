""" adopt and the registered model `adopted`: with --full over all of timm's SE networks, by default over a few """
import copy
import math
import pickle
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import pytest
import torch
from torch import nn

import timm
from helpers.common import FULL, NAMES, TINY, images, serve_donor, training_step
from helpers.hub_server import HubServer
from timm.layers import SEModule
from timm.models import save_for_hf
from timm.models.senet import SEModule as SENetSEModule
from timm_sepool import adopt
from timm_sepool._private import SqueezeExcite

SHALLOW = dict(layers=(1, 1, 1, 1))
SMALLER = {'legacy_seresnet18': SHALLOW, 'repvit_m1': dict(depth=(2, 2, 2, 2)), 'rexnet_100': dict(width_mult=0.25),
           'seresnet18': SHALLOW, 'tresnet_m': SHALLOW, 'gcvit_xxtiny': dict(img_size=96),
           'test_maxvit': dict(img_size=96)}
# the smallest of each file of timm that has SE blocks (older timm has fewer), with arguments that make it smaller
FAMILIES = {name: SMALLER.get(name, {}) for name in (
    *SMALLER, 'efficientvim_m1', 'efficientvit_m0', 'fastvit_t8', 'ghostnet_050', 'haloregnetz_b', 'hardcorenas_b',
    'lcnetv2_small', 'mobilenetv3_small_050', 'regnety_002', 'repghostnet_050', 'sedarknet21', 'shvit_s1',
    'test_byobnet', 'test_efficientnet', 'test_nfnet') if timm.is_model(name)}
# efficientvit of older timm and haloregnetz take one size, tresnet multiples of 4, the others are built for a size
SIZES = {'efficientvit_m0': ((224, 224),), 'haloregnetz_b': ((224, 224),), 'tresnet_m': ((64, 64), (68, 100)),
         'gcvit_xxtiny': ((96, 96),), 'test_maxvit': ((96, 96),)}
# parameters added by rgse and spse, and those of the base, as README and docs/adopt.md give them
ADDED = {'regnety_032': (56_448, 214_704, 19.4e6), 'efficientnet_b0': (41_792, 188_160, 5.3e6),
         'legacy_senet154': (262_144, 1_005_312, 115e6)}
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def se_modules(model: nn.Module) -> Dict[str, nn.Module]:
    return {k: m for k, m in model.named_modules() if isinstance(m, (SEModule, SqueezeExcite, SENetSEModule))}


def squeeze_weights(model: nn.Module) -> Dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if '.squeeze.weight' in name}


def fill(model: nn.Module) -> nn.Module:
    """Nothing at its trivial value, so that every SE block matters to the output (timm zeroes the last norms)."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if '.squeeze.' not in name and (param.ndim < 2 or param.abs().max() <= 1e-4):
                param.uniform_(0.3, 0.9)
    return model


def learned(model: nn.Module, std: float = 0.3) -> nn.Module:
    """An adopted model whose squeezes have left their start."""
    assert [nn.init.normal_(param, std=std) for param in squeeze_weights(model).values()]
    return model


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * max(1., expected.abs().max().item()))


def test_architectures() -> None:
    """Replacement, grids and parameters by formula, on the meta device."""
    counts = {}
    names = [name for name in (*ADDED, 'test_maxvit') if timm.is_model(name)]  # some lack the last
    for name in set(timm.list_models() if FULL else names) - {*NAMES, 'adopted'}:
        try:
            original = build(name)
        except NotImplementedError:  # older timm computes the widths of RegNets by tensors
            original = timm.create_model(name).to('meta')
        if not se_modules(original):
            pytest.raises(ValueError, adopt, original).match('has no SE block')
            continue
        run, maps = copy.deepcopy(original).eval(), {}
        for path, module in se_modules(run).items():
            module.register_forward_hook(lambda m, args, out, path=path: maps.update({path: tuple(out.shape[1:])}))
        with torch.no_grad():
            run(torch.empty(1, *original.pretrained_cfg['input_size'], device='meta'))
        counts[name] = len(maps)
        grids = {k: next(g for g in range(1, 99) if height < 7 * g + 3.5) for k, (_, height, _) in maps.items()}
        rgse = {f'{k}.squeeze.weight': (maps[k][0], 1, g, g) for k, g in grids.items() if g > 1}
        spse = {f'{k}.squeeze.weight{g}': (maps[k][0], 1, g, g) for k in maps for g in (1, 2, 4)}
        shapes = {k: tuple(v.shape) for k, v in original.state_dict().items()}
        for squeeze, expected in (('rgse', rgse), ('spse', spse)):
            model = copy.deepcopy(original)
            if expected:
                assert adopt(model, squeeze) is model and all(p.is_meta for p in model.parameters())
                assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {**shapes, **expected}, name
            else:
                pytest.raises(ValueError, adopt, model, squeeze).match('every grid would be 1 x 1')
        if name in ADDED:
            assert tuple(sum(map(math.prod, added.values())) for added in (rgse, spse)) == ADDED[name][:2]
            assert sum(p.numel() for p in original.parameters()) == pytest.approx(ADDED[name][2], rel=0.005)
    if FULL:
        assert counts.keys() >= FAMILIES.keys()
        modules = [{timm.model_entrypoint(name).__module__ for name in names} for names in (counts, FAMILIES)]
        assert modules[0] == modules[1]
        if timm.__version__ == '1.0.31':  # as README and docs/adopt.md say
            assert (len(counts), sum(counts.values())) == (334, 6811)


@pytest.mark.parametrize('name', [name for name in FAMILIES if FULL or name in (
    'legacy_seresnet18', 'regnety_002', 'test_efficientnet', 'test_maxvit')])
def test_families(name: str) -> None:
    """The same logits in eval and train mode at every size, then all squeezes have gradients."""
    sizes = SIZES.get(name, ((64, 64), (65, 97)))
    inputs = [images(2, *size) for size in sizes]
    model = fill(timm.create_model(name, num_classes=10, **FAMILIES[name]))
    original = copy.deepcopy(model)
    try:
        adopt(model, 'rgse', (3, *sizes[0]) if 'img_size' in FAMILIES[name] else None)
    except ValueError as e:
        assert 'every grid would be 1 x 1' in str(e)
        adopt(model, 'spse')

    def logits(x: torch.Tensor, training: bool = True, model: nn.Module = model) -> torch.Tensor:
        torch.manual_seed(0)  # for dropout
        out = model.train(training)(x)
        return out if torch.is_tensor(out) else torch.stack(out)  # heads with a distillation token

    with torch.no_grad():
        expected, got = (
            [logits(x, training, m) for x in inputs for training in (False, True)] for m in (original, model))
    assert all(map(torch.equal, got, expected)) and all(x.isfinite().all() for x in got)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in original.state_dict().items())  # statistics of norms
    weights = squeeze_weights(model)
    assert weights and not any(w.any() for w in weights.values())
    grads = torch.autograd.grad(logits(inputs[-1]).log_softmax(-1)[..., 0].sum(), list(weights.values()))
    assert all(grad.isfinite().all() and grad.any() for grad in grads)


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


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    model = fill(timm.create_model('seresnet50', num_classes=10, **TINY)).to(dtype).eval()
    x = images(2, 97, 131, dtype=dtype)
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.float32):
        expected = model(x)
        assert {p.dtype for p in adopt(model).parameters()} == {dtype}
        assert torch.equal(model(x), expected)
        assert learned(model)(x).dtype == expected.dtype and not torch.equal(model(x), expected)


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


@pytest.mark.parametrize('where, args, other, counts', [
    ('hf-hub', dict(squeeze='spse', input_size=[3, 160, 160]), 'rgse', 'has 12 squeeze weights .* has 2'),
    ('local-dir', dict(squeeze='rgse'), 'spse', 'has 3 squeeze weights .* has 12')])
def test_saved_model(where: str, args: Dict[str, Any], other: str, counts: str, hub: HubServer, tmp_path: Path) -> None:
    """save_for_hf, and what then loads by name: weights, config, other classes and channels, features."""
    save_for_hf(adopt(timm.create_model('seresnet50', **TINY), **args), tmp_path / 'in_place', safe_serialization=True)
    pytest.raises(ValueError, timm.create_model, f'local-dir:{tmp_path}/in_place').match('as base, got None')
    args = dict(base='seresnet50', **args, **TINY)
    cfg = dict(input_size=(3, 96, 96), crop_pct=0.875)  # of a training run at another size, which changes no grid
    model = timm.create_model('adopted', num_classes=10, pretrained_cfg_overlay=cfg, **args)
    learned(fill(model)).eval()
    x, file, folder = images(2, 97, 131), tmp_path / 'model.pth', tmp_path / 'saved'
    torch.save(model.state_dict(), file)
    create = partial(timm.create_model, 'adopted', num_classes=10)
    assert_equal(create(checkpoint_path=file, **args).state_dict(), model.state_dict())
    with pytest.raises(RuntimeError, match=f'{counts} .* Use the base, squeeze and input_size'):
        create(pretrained=True, **{  # where timm would not be strict
            **args, 'squeeze': other, 'num_classes': 3, 'pretrained_cfg_overlay': dict(file=str(file))})
    # timm >= 1.0.31 saves the arguments by itself, older timm the given ones
    save_for_hf(model, folder, model_args=args, safe_serialization=True)
    assert not hasattr(timm.models, 'get_model_args') or timm.models.get_model_args(model).items() >= args.items()
    hub.add('user/adopted', {f.name: f.read_bytes() for f in folder.iterdir()})
    name = 'hf-hub:user/adopted' if where == 'hf-hub' else f'local-dir:{folder}'
    create = partial(timm.create_model, name, pretrained=True)
    loaded, other = create().eval(), create(num_classes=3).eval()
    assert_equal(loaded.state_dict(), model.state_dict())
    data = timm.data.resolve_data_config(model=loaded)
    assert (tuple(data['input_size']), data['crop_pct']) == ((3, 96, 96), 0.875)
    assert other(x).shape == (2, 3) and torch.equal(other.forward_features(x), model.forward_features(x))
    assert_close(create(in_chans=1).eval()(x[:, :1]), model(x[:, :1].expand(-1, 3, -1, -1)))
    features = create(features_only=True, out_indices=(1, 3), feature_cls='getter').eval()(x)
    torch.testing.assert_close(list(features), model.forward_intermediates(x, [1, 3], intermediates_only=True))


@pytest.mark.parametrize('base', ['regnety_002', 'test_efficientnet', 'fastvit_t8', 'ghostnet_050', 'test_byobnet'])
def test_features(base: str, tmp_path: Path) -> None:
    """Whatever way a base extracts features, they are those of the adopted weights."""
    args = dict(base=base, squeeze='spse', num_classes=3, **FAMILIES[base])
    model = learned(fill(timm.create_model('adopted', **args)), std=1.).eval()
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    overlay = dict(file=str(tmp_path / 'model.pth'))
    features = timm.create_model('adopted', True, pretrained_cfg_overlay=overlay, features_only=True, **args).eval()
    x, outputs = images(1, 97, 131), []
    maps = features(x)
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    for module in model.modules():
        module.register_forward_hook(lambda m, args, out: outputs.append(out))
    model(x)
    assert all(any(torch.is_tensor(out) and torch.equal(out, m) for out in outputs) for m in maps)
    blocks = len(se_modules(features))
    assert 3 * blocks == len(squeeze_weights(features)) and (base == 'fastvit_t8') == (blocks == 0)  # only in its head


FORMS: Dict[str, Callable[[nn.Module], Any]] = {
    'pickle': lambda model: pickle.loads(pickle.dumps(model)),
    'channels last': lambda model: copy.deepcopy(model).to(memory_format=torch.channels_last),
    'TorchScript': torch.jit.script,
    'timm': lambda model: lambda x: timm.models.create_feature_extractor(model, ['6'])(x)['6'],
    'compile': partial(torch.compile, fullgraph=True, backend='eager'),
    'export': lambda model: torch.export.export(
        model, (images(2, 28, 28),), dynamic_shapes=(dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO),)).module(),
}


@pytest.mark.parametrize('squeeze', ['spse', pytest.param('rgse', marks=pytest.mark.full)])
@pytest.mark.parametrize('form', FORMS)
def test_forms(form: str, squeeze: str) -> None:
    """All three classes compute the same in every form, at every size by one program; compiled, they learn the same."""
    model = nn.Sequential(*three_classes(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    learned(adopt(model, squeeze, (3, 28, 28))).eval()
    torch.compiler.reset()
    converted = FORMS[form](model)
    for x in (images(2, 28, 28), images(3, 27, 31)):
        x = x.to(memory_format=torch.channels_last if form == 'channels last' else torch.contiguous_format)
        with torch.no_grad():
            assert_close(converted(x), model(x))
    if form == 'compile':
        (loss, grads), (converted_loss, converted_grads) = (training_step(m, x) for m in (model.train(), converted))
        assert_close(converted_loss, loss)
        for n in squeeze_weights(model):
            assert grads[n].any()
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
    with torch.device('meta'):
        model = timm.create_model(name, **(dict(block_args=dict(attn_layer=attn)) if attn else {}))
    for key, value in last_se.items():
        setattr(list(se_modules(model).values())[-1], key, value)
    return model


OtherSE, conv = type('OtherSE', (SEModule,), {}), partial(nn.Conv2d, 512, 32, 1, device='meta')
SE, FC1 = 'seresnet18', r'layer4\.1\.se\.fc1 of ResNet is of class'
BAD: Dict[str, Tuple[Any, Dict[str, Any], str]] = {
    'no SE': (partial(build, 'resnet18'), {}, 'ResNet has no SE block to adopt. .* for example seresnet50'),
    **{attn: (partial(build, 'resnet26', attn), {}, f'has no SE block to adopt, only {cls}') for attn, cls in (
        ('ese', 'EffectiveSEModule'), ('eca', 'EcaModule'), ('cbam', 'CbamModule'), ('gc', 'GlobalContext'))},
    **{f'{name}_resnet50': (partial(build, f'{name}_resnet50'), {}, f'{name.upper()}Module, which has local averages '
                            'already. Adopt an SE network') for name in ('rgse', 'spse')},
    'squeeze': (partial(build, SE), dict(squeeze='sp'), "Unknown squeeze 'sp'. Choose 'rgse' or 'spse'"),
    'channels': (partial(build, SE), dict(input_size=(1, 224, 224)), 'Cannot run ResNet at .* Pass an input_size'),
    'small': (partial(build, SE), dict(input_size=(3, 32, 32)), "every grid would be 1 x 1. Use squeeze='spse'"),
    'not run': (partial(build, SE, unused=SEModule(16)), {}, r'ResNet does not run layer4\.1\.se\.unused, so the size'),
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
    *((dict(base=base), f"needs an SE model of timm as base, got '{base}'. Pass base='regnety_032'")
      for base in ('', 'seresnet999', 'hf-hub:timm/seresnet50')),
    (dict(base='adopted'), 'adopted already'),
    *((dict(features_only=True, feature_cls=cls), f"do not support feature_cls='{cls}'. Use 'getter'")
      for cls in ('hook', 'fx')),
])
def test_bad_adopted(args: Dict[str, Any], message: str) -> None:
    pytest.raises(ValueError, timm.create_model, 'adopted', **args).match(message)
