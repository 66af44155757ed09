""" SPSE and RGSE ResNet / ResNeXt

timm's ResNet whose blocks have squeeze-and-excitation with spatial-pyramid (SPSE) or resolution-guided (RGSE) pooling.

No trained SPSE / RGSE weights are public. `pretrained=True` loads those of the plain backbone (the donor), and the
network computes exactly what the donor computes until it is fine-tuned.

Paper: `Delving deep into spatial pooling for squeeze-and-excitation networks`
    (Jin et al., Pattern Recognition 121, 2022) - https://doi.org/10.1016/j.patcog.2021.108159
"""
from dataclasses import replace
from functools import partial
from typing import Any, Dict, Optional, Tuple

import torch
from torch import nn

from timm.layers import get_norm_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, get_arch_pretrained_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet

# The modules, not their names: if one of them is imported before timm, its import of timm registers these models, and
# so imports this file, while the module is still half-initialized.
from . import checkpoints, fused, squeeze

__all__ = ['SEPoolBottleneck', 'SEPoolResNet']  # model_registry will add each entrypoint fn to this


class SEPoolBottleneck(Bottleneck):
    """timm's Bottleneck whose SE module also adds the shortcut and, by a kernel on a GPU, applies the ReLU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C_in, H, W) to (B, C_out, H / stride, W / stride), sizes rounded up."""
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
                if not torch.jit.is_scripting():
                    if fused.serves_residual_relu(self.act3, x, shortcut):
                        if getattr(self.se.forward, '__func__', None) is squeeze.SEPoolModule.forward:  # takes relu
                            return self.se(x, shortcut, relu=True)
                return self.act3(self.se(x, shortcut))
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        x += shortcut
        return self.act3(x)


class SEPoolResNet(ResNet):
    """timm's ResNet, initialized as the official code initializes SPSE / RGSE networks."""
    _is_constructed = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._is_constructed = True

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """Initialize every parameter and buffer, also after a construction on the meta device and `to_empty`.

        Convolutions: kaiming-normal (fan-out). Squeeze and linear layers: torch's default. Norm weights 1, biases 0.

        Args:
            zero_init_last: Zero-initialize the last BN in each residual branch.
        """
        def _init(module: nn.Module) -> None:
            if isinstance(module, squeeze.SEPoolModule):
                if self._is_constructed:  # else the squeeze's own constructor has just done it
                    module.init_weights()
                return
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            elif self._is_constructed and hasattr(module, 'reset_parameters'):
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


# NAME of `rgse_NAME` and `spse_NAME` -> donor of the default pretrained weights, arguments of timm's ResNet
BACKBONES: Dict[str, Tuple[str, Dict[str, Any]]] = {
    'resnet50': ('resnet50.a1_in1k', dict(layers=(3, 4, 6, 3))),
    'resnet101': ('resnet101.a1h_in1k', dict(layers=(3, 4, 23, 3))),
    'resnet152': ('resnet152.a1h_in1k', dict(layers=(3, 8, 36, 3))),
    'resnext50': ('resnext50_32x4d.a1h_in1k', dict(layers=(3, 4, 6, 3), cardinality=32, base_width=4)),
    'resnext101': ('resnext101_32x4d.gluon_in1k', dict(layers=(3, 4, 23, 3), cardinality=32, base_width=4)),
}


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module, strict: bool = True) -> Dict[str, torch.Tensor]:
    """Convert a checkpoint to the model's own state dict, see `checkpoints.checkpoint_filter_fn`."""
    return checkpoints.checkpoint_filter_fn(state_dict, model, strict)


def _create_sepool_resnet(variant: str, pretrained: bool = False, **kwargs) -> SEPoolResNet:
    family, _, name = variant.partition('_')
    norm_layer = get_norm_layer(kwargs.get('norm_layer', nn.BatchNorm2d))
    blocks = []
    for grid in (8, 4, 2, 1):
        se_layer: Any = partial(squeeze.RGSEModule, grid=grid) if family == 'rgse' else squeeze.SPSEModule
        attn_layer: Any = partial(se_layer, norm_layer=norm_layer)
        block: Any = partial(SEPoolBottleneck, attn_layer=attn_layer)
        block.expansion = SEPoolBottleneck.expansion  # ResNet reads it from the class
        blocks.append(block)
    model_args = dict(BACKBONES[name][1], block=tuple(blocks), zero_init_last=False)

    # how far timm came, to tell its errors apart
    model: Optional[SEPoolResNet] = None
    is_converted = False

    def _construct(**kwargs) -> SEPoolResNet:
        nonlocal model
        model = SEPoolResNet(**kwargs)
        return model

    def _filter(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
        nonlocal is_converted
        state_dict = checkpoint_filter_fn(state_dict, model, kwargs.get('pretrained_strict', True))
        is_converted = True
        return state_dict

    try:
        return build_model_with_cfg(
            _construct, variant, pretrained, pretrained_filter_fn=_filter, **dict(model_args, **kwargs))
    except Exception as e:  # a damaged pickle can raise any
        # An argument's error comes before the model is constructed, or after the loading, from the feature extractor.
        # Torch and timm raise these two types for converted weights that they cannot load.
        is_loading = not is_converted or isinstance(e, (RuntimeError, KeyError))
        if not pretrained or model is None or not is_loading or isinstance(e, MemoryError):
            raise
        checkpoints.raise_loading_error(e, model, kwargs.get('cache_dir'))


def _donor_cfgs() -> Dict[str, Any]:
    """Pretrained cfgs with tags `from_<donor>`; the first of each model is its default.

    Donors are the plain backbones of timm's registry that are freely licensed, trained at 224 px, have the 1000 classes
    of ImageNet-1k and are on the Hub. Each keeps its own preprocessing.
    """
    cfgs = {}
    for name, (default_donor, _) in BACKBONES.items():
        donors = {
            donor: cfg for donor, cfg in get_arch_pretrained_cfgs(default_donor.partition('.')[0]).items()
            if cfg.hf_hub_id and cfg.license in ('apache-2.0', 'bsd-3-clause')
            and tuple(cfg.input_size) == (3, 224, 224) and cfg.num_classes == 1000
        }
        for family in ('rgse', 'spse'):
            for donor, cfg in sorted(donors.items(), key=lambda item: item[0] != default_donor):
                cfgs[f'{family}_{name}.from_{donor.replace(".", "_")}'] = replace(
                    cfg, architecture=None, tag=None,
                    url=None,  # the Hub's safetensors only
                    description=f'Computes exactly what {donor} of timm computes (every gate is 1/2, bn3 is doubled): '
                    'the gates are inert at the start and learn in fine-tuning. '
                    'Accuracy figures are those of the donor.',
                )
    return cfgs


default_cfgs = generate_default_cfgs(_donor_cfgs())


@register_model
def rgse_resnet50(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an RGSE-ResNet-50. Pretrained weights compute what a plain ResNet-50 computes."""
    return _create_sepool_resnet('rgse_resnet50', pretrained, **kwargs)


@register_model
def rgse_resnet101(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an RGSE-ResNet-101. Pretrained weights compute what a plain ResNet-101 computes."""
    return _create_sepool_resnet('rgse_resnet101', pretrained, **kwargs)


@register_model
def rgse_resnet152(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an RGSE-ResNet-152. Pretrained weights compute what a plain ResNet-152 computes."""
    return _create_sepool_resnet('rgse_resnet152', pretrained, **kwargs)


@register_model
def rgse_resnext50(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an RGSE-ResNeXt-50 32x4d. Pretrained weights compute what a plain ResNeXt-50 computes."""
    return _create_sepool_resnet('rgse_resnext50', pretrained, **kwargs)


@register_model
def rgse_resnext101(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an RGSE-ResNeXt-101 32x4d. Pretrained weights compute what a plain ResNeXt-101 computes."""
    return _create_sepool_resnet('rgse_resnext101', pretrained, **kwargs)


@register_model
def spse_resnet50(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an SPSE-ResNet-50. Pretrained weights compute what a plain ResNet-50 computes."""
    return _create_sepool_resnet('spse_resnet50', pretrained, **kwargs)


@register_model
def spse_resnet101(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an SPSE-ResNet-101. Pretrained weights compute what a plain ResNet-101 computes."""
    return _create_sepool_resnet('spse_resnet101', pretrained, **kwargs)


@register_model
def spse_resnet152(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an SPSE-ResNet-152. Pretrained weights compute what a plain ResNet-152 computes."""
    return _create_sepool_resnet('spse_resnet152', pretrained, **kwargs)


@register_model
def spse_resnext50(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an SPSE-ResNeXt-50 32x4d. Pretrained weights compute what a plain ResNeXt-50 computes."""
    return _create_sepool_resnet('spse_resnext50', pretrained, **kwargs)


@register_model
def spse_resnext101(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an SPSE-ResNeXt-101 32x4d. Pretrained weights compute what a plain ResNeXt-101 computes."""
    return _create_sepool_resnet('spse_resnext101', pretrained, **kwargs)
