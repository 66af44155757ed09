""" The ten networks at full size, and every claim about them on a small network of each family """
import copy
import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import timm
from helpers import reference
from helpers.common import FULL, GOLDEN, NAMES, PARAMS, TINY, images, official_state_dict, tiny, training_step
from timm.layers import BlurPool2d, GroupNorm1
from timm.models.resnet import Bottleneck
from timm.utils import freeze
from timm_sepool import RGSEModule, SEPoolBottleneck, SEPoolResNet, SPSEModule, checkpoint_filter_fn
from timm_sepool.squeeze import SEPoolModule

FAMILIES = ['rgse_resnext50', 'spse_resnet50']


@pytest.mark.parametrize('name', NAMES)
def test_full_size(name: str) -> None:
    """Registered, buildable without memory, the official number of parameters."""
    assert timm.is_model(name) and name in timm.list_models(module='sepool_resnet')
    with torch.device('meta'):
        model = timm.create_model(name)
    assert isinstance(model, SEPoolResNet) and sum(p.numel() for p in model.parameters()) == PARAMS[name]
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    squeezes = [[block.se for block in stage] for stage in (model.layer1, model.layer2, model.layer3, model.layer4)]
    assert all(isinstance(se, SEPoolModule) for stage in squeezes for se in stage)
    if name.startswith('rgse'):
        assert [{se.grid for se in stage} for stage in squeezes] == [{8}, {4}, {2}, {1}]


@pytest.mark.parametrize(  # depth only repeats blocks
    'name', [pytest.param(name, marks=pytest.mark.full) if '152' in name or '101' in name else name for name in NAMES])
def test_equals_official_code(name: str) -> None:
    """Logits of the official code (float64, eval) after the filter and a strict load; --full: channels_last too."""
    model = timm.create_model(name).double().eval()
    state_dict = {f'module.{k}': v for k, v in official_state_dict(name).items()}  # as DataParallel saves it
    model.load_state_dict(checkpoint_filter_fn({'state_dict': state_dict, 'epoch': 100}, model), strict=True)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 224, 224)))
    expected = torch.from_numpy(GOLDEN[f'{name}/logits'])
    assert expected.abs().max() > 1
    with torch.no_grad():
        assert (model(x[:1]) - expected[:1]).abs().max() <= 1e-12
        if FULL:
            model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
            assert (model(x) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize('name', FAMILIES)
def test_shapes(name: str) -> None:
    """As in timm, also where the classifier changes. Dilation keeps the parameters: the grid belongs to the stage."""
    model, x = tiny(name), images(2, 64, 64)
    features = model.forward_features(x)
    assert model.forward_head(features, pre_logits=True).shape == (2, 512)
    assert tiny(name, num_classes=0)(x).shape == (2, 512)
    assert tiny(name, num_classes=0, global_pool='')(x).shape == (2, 512, 2, 2)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    model.reset_classifier(0, 'max')
    torch.testing.assert_close(model(x), features.amax((2, 3)))
    tiny(name, output_stride=8).load_state_dict(tiny(name).state_dict(), strict=True)


@pytest.mark.parametrize('name', FAMILIES)
def test_features(name: str) -> None:
    """out_indices and pruning give the maps of forward_intermediates. test_properties.py has all maps and strides."""
    model, x = tiny(name), images(2, 97, 131)
    maps = model.forward_intermediates(x, intermediates_only=True)
    extractor = timm.create_model(name, features_only=True, out_indices=(1, 3), **TINY).eval()
    extractor.load_state_dict({k: v for k, v in model.state_dict().items() if k in extractor.state_dict()})
    assert all(map(torch.equal, extractor(x), (maps[1], maps[3])))
    assert model.prune_intermediate_layers([1, 3]) == [1, 3] and not list(model.layer4.parameters())
    pruned = model.forward_intermediates(x, [1, 3], intermediates_only=True, stop_early=True)
    assert torch.equal(pruned[0], maps[1]) and torch.equal(pruned[1], maps[3])


BLOCK_ARGS = [
    dict(), dict(aa_layer=BlurPool2d), dict(stem_type='deep', stem_width=16), dict(avg_down=True, output_stride=8),
    dict(replace_stem_pool=True), dict(block_reduce_first=2, cardinality=1, base_width=64), dict(act_layer='silu'),
    dict(drop_path_rate=0.5), dict(drop_block_rate=0.5), dict(block_args=dict(attn_layer='eca')),
    dict(block_args=dict(attn_layer=None), layers=(1, 2, 1, 1)),
]


@pytest.mark.parametrize('name, kwargs', [
    pytest.param(name, kwargs, marks=[] if (i + j) % 2 == 0 else pytest.mark.full)
    for i, name in enumerate(FAMILIES) for j, kwargs in enumerate(BLOCK_ARGS)
], ids=str)
def test_equals_formula(name: str, kwargs) -> None:
    """Loss and every gradient of timm's own bottleneck around the gate that is written out, with everything that ResNet
    can put into a block or a stem."""
    model, x = tiny(name, **kwargs).double(), images(3, 160, 144, dtype=torch.float64)
    formula = copy.deepcopy(model)
    for module in formula.modules():
        if isinstance(module, SEPoolBottleneck):
            module.forward = partial(Bottleneck.forward, module)
        elif isinstance(module, SEPoolModule):
            module.forward = partial(lambda se, x: x * reference.squeeze_gate(se, x), module)
    for training in (True, False):
        results = []
        for network in (model, formula):
            torch.manual_seed(3)  # of what is dropped
            results.append(training_step(network.train(training), x))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize('training, drop_path_rate', [(False, 0.), (False, 0.5), (True, 0.), (True, 0.5)])
def test_squeeze_is_called(training: bool, drop_path_rate: float, monkeypatch) -> None:
    """Its hooks run, which pruning and sharding need. At inference it adds the shortcut, which is cheaper there."""
    calls, shapes, addcmul = [], [], torch.addcmul
    monkeypatch.setattr(torch, 'addcmul', lambda *args: calls.append(args) or addcmul(*args))
    model = tiny('rgse_resnet50', drop_path_rate=drop_path_rate).train(training)
    for block in (model.layer1[0], model.layer4[0]):
        block.se.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
        block.se.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    model(images(2, 64, 64))
    assert shapes == [(2, 64, 16, 16)] * 2 + [(2, 512, 2, 2)] * 2
    assert len(calls) == (0 if training else 4)


@pytest.mark.parametrize('name', FAMILIES)
def test_copies_amp_and_grad_checkpointing(name: str) -> None:
    """Equal results, up to rounding in bfloat16, without a warning. test_properties.py has the memory formats."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model, x = tiny(name), images(3, 97, 131)
        logits = model(x)
        assert torch.equal(copy.deepcopy(model)(x), logits)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), logits)
        with torch.autocast('cpu', torch.bfloat16):
            amp = model(x)
        assert amp.dtype == torch.bfloat16 and (amp.float() - logits).abs().max() < 0.1 * logits.abs().max()
        expected = training_step(model.train(), x)
        model.set_grad_checkpointing()
        torch.testing.assert_close(training_step(model, x), expected)


@pytest.mark.parametrize('name', FAMILIES)
def test_other_attention_and_norms(name: str) -> None:
    """block_args replaces the squeeze as in timm's resnet, which takes ours; norm_layer reaches the squeeze too."""
    for attn_layer in ('eca', 'cbam', None):
        model = tiny(name, block_args=dict(attn_layer=attn_layer))
        assert not any(isinstance(m, SEPoolModule) for m in model.modules())
        assert (model.layer1[0].se is None) is (attn_layer is None)
        assert model(images(2, 64, 64)).isfinite().all()
    drop_in = SPSEModule if name.startswith('spse') else partial(RGSEModule, grid=4)
    assert tiny('resnet26', block_args=dict(attn_layer=drop_in))(images(2, 64, 64)).shape == (2, 10)
    model = tiny(name, norm_layer=GroupNorm1).train()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    x = images(1, 64, 64)
    assert model(x).isfinite().all()  # and so one image trains
    model = tiny(name).train()
    with pytest.raises(ValueError, match='larger batch, SyncBatchNorm .* or freeze the norms of the squeeze'):
        model(x)
    freeze(model, [n for n, _ in model.named_modules() if n.endswith('.se.bn')])  # as the error says
    model.train()(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize('name', FAMILIES)
def test_initialization(name: str) -> None:
    """Official, after create_model, and after meta, to_empty and init_weights."""
    again = timm.create_model(name, layers=(1, 1, 1, 1), device='meta').to_empty(device='cpu')
    with torch.no_grad():
        for t in (*again.parameters(), *again.buffers()):
            t.fill_(123)
    again.init_weights()
    for model in (timm.create_model(name, layers=(1, 1, 1, 1)), again):
        for n, p in model.named_parameters():
            if '.bias' in n or isinstance(model.get_submodule(n.rpartition('.')[0]), nn.BatchNorm2d):
                assert (p == (0 if '.bias' in n else 1)).all(), n
            elif '.se.' in n or n == 'fc.weight':  # torch's default
                bound = p[0].numel() ** -0.5
                assert p.abs().max() <= bound and p.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.2), n
            else:  # kaiming-normal, fan-out
                assert p.std().item() == pytest.approx((2 / (p.shape[0] * p[0, 0].numel())) ** 0.5, rel=0.1), n
        for n, b in model.named_buffers():
            assert (b == (1 if n.endswith('running_var') else 0)).all(), n
    assert (timm.create_model(name, zero_init_last=True, **TINY).layer1[0].bn3.weight == 0).all()
