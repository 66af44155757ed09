""" Donor weights: what `pretrained=True` loads """
from functools import partial
from itertools import product
from pathlib import Path
from typing import Dict

import pytest
import safetensors.torch
import torch
from torch import nn

import timm
from helpers.common import FULL, NAMES, TINY, images, serve_donor
from helpers.hub_server import HubServer
from timm_sepool.squeeze import SEPoolModule, SPSEModule

DONORS = {
    'resnet50': 'resnet50.a1_in1k', 'resnet101': 'resnet101.a1h_in1k', 'resnet152': 'resnet152.a1h_in1k',
    'resnext50': 'resnext50_32x4d.a1h_in1k', 'resnext101': 'resnext101_32x4d.gluon_in1k'}


def test_tags() -> None:
    """The default donors, all freely licensed and trained at 224 px, with their own preprocessing."""
    for name in NAMES:
        donor = DONORS[name.split('_')[1]]
        cfg, donor_cfg = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(donor)
        assert cfg.tag == f'from_{donor.replace(".", "_")}' and cfg.hf_hub_id == f'timm/{donor}' and cfg.url is None
        for key in ('input_size', 'test_input_size', 'interpolation', 'crop_pct', 'test_crop_pct', 'mean', 'std'):
            assert getattr(cfg, key) == getattr(donor_cfg, key)
        assert 'the gates are inert at the start' in cfg.description
        assert 'figures are those of the donor' in cfg.description
    tags = timm.list_pretrained(['rgse_*', 'spse_*'])
    assert len(tags) >= 40 and 'rgse_resnet50.from_resnet50_tv_in1k' in tags
    for tag in tags:
        cfg = timm.get_pretrained_cfg(tag)
        assert cfg.license in ('apache-2.0', 'bsd-3-clause') and cfg.input_size == (3, 224, 224), tag
        assert cfg.hf_hub_id.startswith('timm/resne') and 'fb_' not in tag and 'bamboo' not in tag


@pytest.mark.parametrize('backbone, kwargs', [
    *((backbone, TINY) for backbone in DONORS),
    ('resnet50', dict(TINY, stem_type='deep', stem_width=16, output_stride=8)),
    ('resnet50', dict(TINY, avg_down=True, block_reduce_first=2, layers=(1, 2, 1, 1))),
    *((backbone, {}) for backbone in (DONORS if FULL else ['resnet50'])),
], ids=lambda value: value if isinstance(value, str) else ','.join(value) or 'full-depth')
def test_computes_what_the_donor_computes(hub: HubServer, tmp_path: Path, backbone: str, kwargs: Dict) -> None:
    """Difference exactly 0.0 in eval and train mode, of the gradients too but for those of bn3, which is doubled."""
    create = partial(timm.create_model, pretrained=True, cache_dir=tmp_path, **kwargs)
    serve_donor(hub, DONORS[backbone], **kwargs)
    cases = ((False, (64, 64), torch.contiguous_format), (True, (40, 56), torch.channels_last))
    dtypes = (torch.float32, torch.float64, torch.bfloat16)[:3 if FULL or kwargs and backbone == 'resnet50' else 1]
    for family, dtype, (training, size, memory_format) in product(('rgse', 'spse'), dtypes, cases):
        results = []
        for name in (DONORS[backbone], f'{family}_{backbone}'):
            model = create(name).to(dtype).to(memory_format=memory_format).train(training)
            logits = model(images(2, *size, dtype=dtype).contiguous(memory_format=memory_format))
            logits.square().sum().backward()
            results.append((logits, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
        (theirs, their_grads, their_buffers), (ours, grads, buffers) = results
        assert theirs.isfinite().all() and theirs.any() and torch.equal(ours, theirs)
        assert all(torch.equal(buffers[n], b) for n, b in their_buffers.items())
        # oneDNN leaves parts of the bfloat16 gradient of a weight unwritten where a strided conv sees a width of 1
        for n, g in (their_grads if dtype != torch.bfloat16 else {}).items():
            assert torch.equal(grads[n] * (2 if '.bn3.' in n else 1), g), n


@pytest.mark.parametrize('family', ['rgse', 'spse'])
def test_squeeze_learns(hub: HubServer, small_donor: partial, family: str) -> None:
    """The gates move with the first step, every parameter of the squeeze with the second."""
    model = timm.create_model(f'{family}_resnet50', **{**small_donor.keywords, 'num_classes': 10}).double().train()
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, SEPoolModule)]
    for _, module in modules:
        module.bn.eval()  # in train mode a bias before the norm has no effect and no gradient
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in (1, 2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images(8, 64, 64, dtype=torch.float64)), torch.arange(8)).backward()
        optimizer.step()
        for name, module in modules:
            for n, p in module.named_parameters(prefix=name):
                assert (not torch.equal(p, start[n])) is (step == 2 or '.fc2.' in n), n


@pytest.mark.filterwarnings('ignore:.*copying from a non-meta parameter')  # to compare with what timm does
def test_options_of_create_model(hub: HubServer, small_donor: partial) -> None:
    """Features, a tag, the meta device: as in plain timm. test_checkpoints.py has other classes and channels."""
    donor_features = timm.create_model('resnet50', features_only=True, **small_donor.keywords).eval()
    features = small_donor(features_only=True).eval()
    assert all(map(torch.equal, features(images(2, 64, 64)), donor_features(images(2, 64, 64))))
    serve_donor(hub, 'resnet50.tv_in1k', **TINY)
    by_tag = timm.create_model('rgse_resnet50.from_resnet50_tv_in1k', **small_donor.keywords)
    assert by_tag.pretrained_cfg['interpolation'] == 'bilinear'
    by_cfg = small_donor(pretrained_cfg='from_resnet50_tv_in1k')
    for model, tag in ((small_donor(), 'a1'), (by_tag, 'tv'), (by_cfg, 'tv')):
        donor = safetensors.torch.load(hub.repos['model', f'timm/resnet50.{tag}_in1k']['model.safetensors'])
        assert torch.equal(model.fc.weight, donor['fc.weight'])
    assert small_donor(device='meta').fc.weight.is_meta


def test_other_blocks(hub: HubServer, small_donor: partial) -> None:
    """Exact without a squeeze and with another gate of 1/2 at 0, an error where no exact start is known."""
    donor = timm.create_model('resnet50', **small_donor.keywords).eval()
    x = images(2, 64, 64)
    for attn_layer in (None, partial(SPSEModule, gate_layer='hard_sigmoid')):
        assert torch.equal(small_donor(block_args=dict(attn_layer=attn_layer)).eval()(x), donor(x))
    for attn_layer in ('eca', partial(SPSEModule, gate_layer='relu')):
        with pytest.raises(RuntimeError, match='rgse_resnet50.*missing.*layer1.0.se'):
            small_donor(block_args=dict(attn_layer=attn_layer))
