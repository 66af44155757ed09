""" SPSE and RGSE ResNet / ResNeXt

timm's own ResNet with the squeeze of each block's SE replaced by spatial-pyramid (SPSE) or resolution-guided (RGSE)
pooling. The paper's comparators are timm's: `resnet50`, `seresnet50`, `resnet50` with
`block_args=dict(attn_layer='cbam')`, ...

No trained SPSE / RGSE weights are public. `pretrained=True` loads those of the plain backbone, which the network then
computes exactly: the squeeze starts inert and learns in fine-tuning, and accuracy figures are the donor's.

Paper: `Delving deep into spatial pooling for squeeze-and-excitation networks`
    (Jin et al., Pattern Recognition 121, 2022) - https://doi.org/10.1016/j.patcog.2021.108159
"""
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Dict, Optional, Tuple, Union

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn

from timm.layers import get_norm_layer
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.resnet import Bottleneck, ResNet

# The module, not its names: when `timm_sepool.squeeze` is imported before timm, its own import of timm registers these
# models while it is still half-initialized.
from . import squeeze

__all__ = ['SEPoolBottleneck', 'SEPoolResNet']  # model_registry will add each entrypoint fn to this


class SEPoolBottleneck(Bottleneck):
    """timm's bottleneck, with the scaling by the gate and the residual sum in the hands of the squeeze's module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)

        x = self.conv2(x)
        x = self.bn2(x)
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.aa(x)  # type: ignore[misc]

        x = self.conv3(x)
        x = self.bn3(x)

        if self.downsample is not None:
            shortcut = self.downsample(shortcut)

        if self.se is not None:
            if (self.drop_path is None or not self.training) and hasattr(self.se, 'forward_gate'):
                x = self.se(x, shortcut)
                return self.act3(x)
            x = self.se(x)

        if self.drop_path is not None:
            x = self.drop_path(x)

        x += shortcut
        x = self.act3(x)

        return x


class SEPoolResNet(ResNet):
    """timm's ResNet with the official code's initialization of SPSE / RGSE networks."""
    _is_built = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._is_built = True

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """Initialize every parameter and buffer, of a model that was built on the meta device too.

        As the official code: kaiming-normal (fan-out) convolutions, torch's default for the squeeze and the linear
        layers, unit norms, every bias 0.

        Args:
            zero_init_last: Zero-initialize the last BN in each residual branch.
        """
        def _init(module: nn.Module) -> None:
            if isinstance(module, squeeze.SEPoolModule):
                if self._is_built:  # else its constructor just did
                    module.init_weights()
                return
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            elif self._is_built and hasattr(module, 'reset_parameters'):
                module.reset_parameters()  # type: ignore[operator]
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)
            for child in module.children():
                _init(child)

        _init(self)
        if zero_init_last:
            for module in self.modules():
                if hasattr(module, 'zero_init_last'):
                    module.zero_init_last()  # type: ignore[operator]


def _stage_blocks(attn_layers: Tuple[Any, ...]) -> Tuple[Any, ...]:
    """One block factory per stage, in the place of ResNet's block class."""
    blocks = []
    for attn_layer in attn_layers:
        block: Any = partial(SEPoolBottleneck, attn_layer=attn_layer)
        block.expansion = SEPoolBottleneck.expansion  # ResNet reads it off the class
        blocks.append(block)
    return tuple(blocks)


# official name -> timm's, in this order
_OFFICIAL_KEYS = (
    (r'^layer(\d)\.layer\d_block_(\d+)\.', r'layer\1.\2.'),
    (r'\.(?:conv|bn)_((?:conv|bn)\d\.)', r'.\1'),
    (r'\.shortcut\.shortcut_conv\.', '.downsample.0.'),
    (r'\.shortcut\.shortcut_bn\.', '.downsample.1.'),
    (r'\.fc_spatial\.bn_spatial\.', '.se.bn.'),
    (r'\.fc_spatial\.fc_spatial\.weight$', '.se.weight'),
    (r'\.fc_spatial([124])\.(weight|bias)$', r'.se.\2\1'),
    (r'\.fc_bn\.', '.se.bn.'),
    (r'\.fc_reduction\.', '.se.fc1.'),
    (r'\.fc_extention\.', '.se.fc2.'),
)


def _convert_official(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    out = {}
    for k, v in state_dict.items():
        for pattern, repl in _OFFICIAL_KEYS:
            k = re.sub(pattern, repl, k)
        if re.search(r'\.se\.fc[12]\.weight$', k) and v.ndim == 2:
            v = v[:, :, None, None]  # Linear to 1x1 conv
        out[k] = v
    return out


def _convert_donor(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Carry a plain ResNet over, bit-exactly: every gate is sigmoid(0) = 1 / 2 and doubled norms undo it.

    The squeeze and fc1 keep the model's initialization. fc2 learns from the first step on, they from the second.
    Blocks without a squeeze stay as they are. For other attention or another gate there is no such start, their keys
    are left missing.
    """
    out = dict(state_dict)
    for name, module in model.named_modules():
        if isinstance(module, squeeze.SEPoolModule) and module.gate(torch.zeros(1, device='cpu')).item() == 0.5:
            for k in ('weight', 'bias'):
                bn3 = f'{name.rpartition(".")[0]}.bn3.{k}'
                if bn3 in out:
                    out[bn3] = 2 * out[bn3]
            for k, v in module.state_dict().items():
                out[f'{name}.{k}'] = torch.zeros_like(v) if k.startswith('fc2.') else v
    return out


def _is_weight(k: Any, v: Any, max_bytes: int) -> bool:
    """Whether an entry can be a parameter or buffer of at most max_bytes.

    Integers, complex numbers, 8-bit floats and the codes of quantized tensors would be cast to other values, and a view
    that repeats the few numbers in a file can take any amount of memory.
    """
    return (
        isinstance(k, str) and torch.is_tensor(v) and v.layout == torch.strided and not v.is_meta
        and (v.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64) or 'num_batches_tracked' in k)
        and v.numel() * v.element_size() <= max(v.untyped_storage().nbytes(), max_bytes)
    )


def _check_state_dict(state_dict: Dict[str, torch.Tensor], model: nn.Module, num_doubled: int) -> None:
    """timm drops `strict` when num_classes differs and for features_only, so a checkpoint of another architecture
    would load in part, with a warning only."""
    def _comparable(k: str, shape: torch.Size) -> Tuple[int, ...]:
        # timm adapts the first conv to in_chans after this
        return shape[:1] + shape[2:] if k in ('conv1.weight', 'conv1.0.weight') else tuple(shape)

    cfg = getattr(model, 'pretrained_cfg', {})
    problems = []
    theirs = {k: _comparable(k, v.shape) for k, v in state_dict.items() if not k.startswith('fc.')}
    ours = {k: _comparable(k, v.shape) for k, v in model.state_dict().items() if not k.startswith('fc.')}
    for what, keys in (
            ('missing', sorted(ours.keys() - theirs.keys())),
            ('unexpected', sorted(theirs.keys() - ours.keys())),
            ('of another shape', sorted(k for k in ours.keys() & theirs.keys() if ours[k] != theirs[k])),
            ('holding NaN or infinity', sorted(
                k for k, v in state_dict.items()
                if v.is_floating_point() and not v.is_meta and not v.isfinite().all())),
    ):
        if keys:
            problems.append(f'{len(keys)} tensors {what} ({", ".join(keys[:2])}{", ..." if len(keys) > 2 else ""})')
    if num_doubled:
        problems.append(f'{num_doubled} tensors with the name of another')
    # timm replaces the classifier where num_classes differs from the config's, so one of these it must be. A negative
    # number there, as of train.py's --pretrained-path, is to have any classifier replaced.
    classes = next(iter(state_dict['fc.weight'].shape), 0) if 'fc.weight' in state_dict else None
    expected = cfg.get('num_classes', model.num_classes)
    if classes not in (None, model.num_classes, expected) and (expected or 0) >= 0:
        problems.append(f'a classifier of {classes} classes instead of {expected}')
    if problems:
        name = cfg.get('architecture') or type(model).__name__
        source = cfg.get('file') or cfg.get('hf_hub_id')
        raise RuntimeError(
            f'The checkpoint{f" {source}" if source else ""} is not one for {name}: {"; ".join(problems)}. Use a sound '
            f'checkpoint of {name} with the same model arguments, or of the plain backbone with the same layers.'
        )


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Convert a checkpoint to the model's own state dict.

    Args:
        state_dict: State dict of this package (returned as is), of the paper's official code, or of the plain timm
            ResNet of the same topology (a donor, carried over bit-exactly). It may be inside `{'state_dict': ...}` and
            have the `module.` prefixes of DataParallel.
        model: The model to load it into. Only the classifier and the first conv's input channels may differ.

    Raises:
        RuntimeError: If it is the checkpoint of another architecture, of other classes than the model or its config,
            or not finite.
    """
    if isinstance(state_dict.get('state_dict', None), dict):
        state_dict = state_dict['state_dict']
    max_bytes = max(8 * v.numel() for v in model.state_dict().values())
    others = [str(k) for k, v in state_dict.items() if not _is_weight(k, v, max_bytes)]
    if others:
        raise RuntimeError(
            f'The checkpoint is no state dict, {len(others)} of its entries are no dense tensors of 16, 32 or 64-bit '
            f'floats by name ({shorten(", ".join(others[:2]), 80)}{", ..." if len(others) > 2 else ""}).'
        )
    renamed = {k[7:] if k.startswith('module.') else k: v for k, v in state_dict.items()}
    if any('.fc_reduction.' in k for k in renamed):
        renamed = _convert_official(renamed)
    num_doubled = len(state_dict) - len(renamed)
    if not any('.se.' in k for k in renamed):
        renamed = _convert_donor(renamed, model)
    _check_state_dict(renamed, model, num_doubled)
    return renamed


def _cached_weights(cfg: PretrainedCfg, cache_dir: Optional[Union[str, Path]]) -> str:
    """How to get weights from the Hub again. Its client does not check what it downloaded, and never asks again."""
    if cfg.state_dict or cfg.file or not cfg.hf_hub_id:
        return ''
    repo_id, _, revision = cfg.hf_hub_id.partition('@')
    file = cfg.hf_hub_filename or 'model.safetensors'
    try:
        path = try_to_load_from_cache(repo_id, file, cache_dir=cache_dir, revision=revision or None)
    except HFValidationError:  # of the name, and the error that there is already
        return ''
    return f' If the download is damaged, remove {os.path.realpath(path)}.' if isinstance(path, str) else ''


def _create_sepool_resnet(variant: str, pretrained: bool = False, **kwargs) -> SEPoolResNet:
    norm_layer = get_norm_layer(kwargs.get('norm_layer', nn.BatchNorm2d))
    if variant.startswith('rgse'):
        attn_layers = tuple(partial(squeeze.RGSEModule, grid=g, norm_layer=norm_layer) for g in (8, 4, 2, 1))
    else:
        attn_layers = (partial(squeeze.SPSEModule, norm_layer=norm_layer),) * 4
    model_args = dict(block=_stage_blocks(attn_layers), zero_init_last=False)

    def _build(pretrained: bool) -> SEPoolResNet:
        return build_model_with_cfg(
            SEPoolResNet, variant, pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            **dict(model_args, **kwargs))

    try:
        return _build(pretrained)
    except Exception as e:  # a damaged pickle can end in any
        if not pretrained or isinstance(e, MemoryError):
            raise
        _build(False)  # arguments that no network can be built with have errors of their own
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        source = 'the given state dict' if cfg.state_dict else cfg.file or cfg.hf_hub_id
        if not source:
            raise
        message = str(e)
        if not (isinstance(e, RuntimeError) and f'is not one for {variant}: ' in message):
            reason = shorten(message, 300).rstrip('.')
            reason = f'{type(e).__name__}: {reason}' if reason else type(e).__name__
            message = (
                f'The pretrained weights of {variant} can not be loaded from {source}: {reason}. '
                'Check the name and the network (and access to the repository), name a file on disk by '
                "pretrained_cfg_overlay=dict(file='...'), or use pretrained=False."
            )
        raise RuntimeError(message + _cached_weights(cfg, kwargs.get('cache_dir'))) from e


# backbone -> the plain timm model and its weights that are the default donor
_DONORS = {
    'resnet50': ('resnet50', 'resnet50.a1_in1k'),
    'resnet101': ('resnet101', 'resnet101.a1h_in1k'),
    'resnet152': ('resnet152', 'resnet152.a1h_in1k'),
    'resnext50': ('resnext50_32x4d', 'resnext50_32x4d.a1h_in1k'),
    'resnext101': ('resnext101_32x4d', 'resnext101_32x4d.gluon_in1k'),
}


def _donor_cfgs() -> Dict[str, Any]:
    """Pretrained cfgs of the plain backbones: `from_<donor>` tags, the first of each model its default.

    They come from timm's registry, with the donor's own preprocessing: all that are freely licensed, trained at 224 px
    on ImageNet-1k classes and on the Hub.
    """
    cfgs = {}
    for backbone, (donor, default) in _DONORS.items():
        donors = {
            name: cfg for name, cfg in get_arch_pretrained_cfgs(donor).items()
            if cfg.hf_hub_id and cfg.license in ('apache-2.0', 'bsd-3-clause')
            and tuple(cfg.input_size) == (3, 224, 224) and cfg.num_classes == 1000
        }
        for family in ('rgse', 'spse'):
            for name, cfg in sorted(donors.items(), key=lambda item: item[0] != default):
                cfgs[f'{family}_{backbone}.from_{name.replace(".", "_")}'] = replace(
                    cfg,
                    url=None,  # the Hub's safetensors only
                    architecture=None,
                    tag=None,
                    description=(
                        f'Computes exactly what {name} of timm computes (every gate is 1/2, bn3 is doubled): the '
                        'squeeze starts inert and learns in fine-tuning, accuracy figures are those of the donor.'
                    ),
                )
    return cfgs


default_cfgs = generate_default_cfgs(_donor_cfgs())


@register_model
def rgse_resnet50(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an RGSE-ResNet-50 model. Pretrained weights compute what a plain ResNet-50 computes.
    """
    model_args = dict(layers=(3, 4, 6, 3))
    return _create_sepool_resnet('rgse_resnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def rgse_resnet101(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an RGSE-ResNet-101 model. Pretrained weights compute what a plain ResNet-101 computes.
    """
    model_args = dict(layers=(3, 4, 23, 3))
    return _create_sepool_resnet('rgse_resnet101', pretrained, **dict(model_args, **kwargs))


@register_model
def rgse_resnet152(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an RGSE-ResNet-152 model. Pretrained weights compute what a plain ResNet-152 computes.
    """
    model_args = dict(layers=(3, 8, 36, 3))
    return _create_sepool_resnet('rgse_resnet152', pretrained, **dict(model_args, **kwargs))


@register_model
def rgse_resnext50(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an RGSE-ResNeXt-50 32x4d model. Pretrained weights compute what a plain ResNeXt-50 computes.
    """
    model_args = dict(layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create_sepool_resnet('rgse_resnext50', pretrained, **dict(model_args, **kwargs))


@register_model
def rgse_resnext101(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an RGSE-ResNeXt-101 32x4d model. Pretrained weights compute what a plain ResNeXt-101 computes.
    """
    model_args = dict(layers=(3, 4, 23, 3), cardinality=32, base_width=4)
    return _create_sepool_resnet('rgse_resnext101', pretrained, **dict(model_args, **kwargs))


@register_model
def spse_resnet50(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an SPSE-ResNet-50 model. Pretrained weights compute what a plain ResNet-50 computes.
    """
    model_args = dict(layers=(3, 4, 6, 3))
    return _create_sepool_resnet('spse_resnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def spse_resnet101(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an SPSE-ResNet-101 model. Pretrained weights compute what a plain ResNet-101 computes.
    """
    model_args = dict(layers=(3, 4, 23, 3))
    return _create_sepool_resnet('spse_resnet101', pretrained, **dict(model_args, **kwargs))


@register_model
def spse_resnet152(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an SPSE-ResNet-152 model. Pretrained weights compute what a plain ResNet-152 computes.
    """
    model_args = dict(layers=(3, 8, 36, 3))
    return _create_sepool_resnet('spse_resnet152', pretrained, **dict(model_args, **kwargs))


@register_model
def spse_resnext50(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an SPSE-ResNeXt-50 32x4d model. Pretrained weights compute what a plain ResNeXt-50 computes.
    """
    model_args = dict(layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create_sepool_resnet('spse_resnext50', pretrained, **dict(model_args, **kwargs))


@register_model
def spse_resnext101(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an SPSE-ResNeXt-101 32x4d model. Pretrained weights compute what a plain ResNeXt-101 computes.
    """
    model_args = dict(layers=(3, 4, 23, 3), cardinality=32, base_width=4)
    return _create_sepool_resnet('spse_resnext101', pretrained, **dict(model_args, **kwargs))
