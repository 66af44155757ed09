""" SPSE and RGSE ResNet / ResNeXt

timm's own ResNet with the squeeze of each block's SE replaced by spatial-pyramid (SPSE) or resolution-guided (RGSE)
pooling. The paper's comparators are timm's: `resnet50`, `seresnet50`, `resnet50` with
`block_args=dict(attn_layer='cbam')`, ...

Paper: `Delving deep into spatial pooling for squeeze-and-excitation networks`
    (Jin et al., Pattern Recognition 121, 2022) - https://doi.org/10.1016/j.patcog.2021.108159
"""
import re
from functools import partial
from typing import Any, Callable, Dict, Tuple

import torch
from torch import nn

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_norm_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet

# The module, not its names: when `timm_sepool.squeeze` is imported before timm, its own import of timm registers these
# models while it is still half-initialized.
from . import squeeze

__all__ = ['SEPoolBottleneck', 'SEPoolResNet']  # model_registry will add each entrypoint fn to this


class SEPoolBottleneck(Bottleneck):
    """timm's bottleneck with the scaling by the gate and the residual sum in one pass over x."""

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
        x = self.aa(x)

        x = self.conv3(x)
        x = self.bn3(x)

        if self.downsample is not None:
            shortcut = self.downsample(shortcut)

        if self.drop_path is None and hasattr(self.se, 'forward_gate'):
            x = torch.addcmul(shortcut, x, self.se.forward_gate(x))
        else:
            if self.se is not None:
                x = self.se(x)
            if self.drop_path is not None:
                x = self.drop_path(x)
            x += shortcut
        x = self.act3(x)

        return x


class SEPoolResNet(ResNet):
    """timm's ResNet with the official code's initialization of SPSE / RGSE networks."""

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
                module.init_weights()
                return
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            elif hasattr(module, 'reset_parameters'):
                module.reset_parameters()
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)
            for child in module.children():
                _init(child)

        _init(self)
        if zero_init_last:
            for module in self.modules():
                if hasattr(module, 'zero_init_last'):
                    module.zero_init_last()


def _stage_blocks(attn_layers: Tuple[Callable[..., nn.Module], ...]) -> Tuple[Callable[..., nn.Module], ...]:
    """One block factory per stage, in the place of ResNet's block class."""
    blocks = []
    for attn_layer in attn_layers:
        block = partial(SEPoolBottleneck, attn_layer=attn_layer)
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


def _check_keys(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> None:
    """timm drops `strict` when num_classes differs and for features_only, so a checkpoint of another architecture
    would load in part, with a warning only."""
    def _comparable(k: str, shape: torch.Size) -> Tuple[int, ...]:
        # the classifier may be replaced and the first conv adapted to in_chans by timm after this
        return shape[:1] + shape[2:] if k in ('conv1.weight', 'conv1.0.weight') else tuple(shape)

    theirs = {k: _comparable(k, v.shape) for k, v in state_dict.items() if not k.startswith('fc.')}
    ours = {k: _comparable(k, v.shape) for k, v in model.state_dict().items() if not k.startswith('fc.')}
    if theirs == ours:
        return
    differences = []
    for what, keys in (
            ('missing', sorted(ours.keys() - theirs.keys())),
            ('unexpected', sorted(theirs.keys() - ours.keys())),
            ('of another shape', sorted(k for k in ours.keys() & theirs.keys() if ours[k] != theirs[k])),
    ):
        if keys:
            differences.append(f'{len(keys)} {what} ({", ".join(keys[:2])}{", ..." if len(keys) > 2 else ""})')
    name = getattr(model, 'pretrained_cfg', {}).get('architecture', None) or type(model).__name__
    raise RuntimeError(
        f'The checkpoint is not one of {name}, tensors {"; ".join(differences)}. '
        'Use a checkpoint of the same architecture (and model arguments).'
    )


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Convert a checkpoint of this architecture to the model's own state dict.

    Args:
        state_dict: State dict of this package (returned as is) or of the paper's official code, maybe inside
            `{'state_dict': ...}`, maybe with the `module.` prefixes of DataParallel.
        model: The model to load it into. Only the classifier and the first conv's input channels may differ.

    Raises:
        RuntimeError: If it is the checkpoint of another architecture.
    """
    if isinstance(state_dict.get('state_dict', None), dict):
        state_dict = state_dict['state_dict']
    state_dict = {k[7:] if k.startswith('module.') else k: v for k, v in state_dict.items()}
    if any('.fc_reduction.' in k for k in state_dict):
        state_dict = _convert_official(state_dict)
    _check_keys(state_dict, model)
    return state_dict


def _create_sepool_resnet(variant: str, pretrained: bool = False, **kwargs) -> SEPoolResNet:
    norm_layer = get_norm_layer(kwargs.get('norm_layer', nn.BatchNorm2d))
    if variant.startswith('rgse'):
        attn_layers = tuple(partial(squeeze.RGSEModule, grid=g, norm_layer=norm_layer) for g in (8, 4, 2, 1))
    else:
        attn_layers = (partial(squeeze.SPSEModule, norm_layer=norm_layer),) * 4
    model_args = dict(block=_stage_blocks(attn_layers), zero_init_last=False)
    return build_model_with_cfg(
        SEPoolResNet, variant, pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **dict(model_args, **kwargs))


def _cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc',
        'license': 'apache-2.0',
        'paper_ids': 'doi:10.1016/j.patcog.2021.108159',
        'paper_name': 'Delving deep into spatial pooling for squeeze-and-excitation networks',
        **kwargs
    }


default_cfgs = generate_default_cfgs({
    f'{family}_{backbone}.untrained': _cfg()
    for family in ('rgse', 'spse')
    for backbone in ('resnet50', 'resnet101', 'resnet152', 'resnext50', 'resnext101')
})


@register_model
def rgse_resnet50(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an RGSE-ResNet-50 model.
    """
    model_args = dict(layers=(3, 4, 6, 3))
    return _create_sepool_resnet('rgse_resnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def rgse_resnet101(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an RGSE-ResNet-101 model.
    """
    model_args = dict(layers=(3, 4, 23, 3))
    return _create_sepool_resnet('rgse_resnet101', pretrained, **dict(model_args, **kwargs))


@register_model
def rgse_resnet152(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an RGSE-ResNet-152 model.
    """
    model_args = dict(layers=(3, 8, 36, 3))
    return _create_sepool_resnet('rgse_resnet152', pretrained, **dict(model_args, **kwargs))


@register_model
def rgse_resnext50(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an RGSE-ResNeXt-50 32x4d model.
    """
    model_args = dict(layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create_sepool_resnet('rgse_resnext50', pretrained, **dict(model_args, **kwargs))


@register_model
def rgse_resnext101(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an RGSE-ResNeXt-101 32x4d model.
    """
    model_args = dict(layers=(3, 4, 23, 3), cardinality=32, base_width=4)
    return _create_sepool_resnet('rgse_resnext101', pretrained, **dict(model_args, **kwargs))


@register_model
def spse_resnet50(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an SPSE-ResNet-50 model.
    """
    model_args = dict(layers=(3, 4, 6, 3))
    return _create_sepool_resnet('spse_resnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def spse_resnet101(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an SPSE-ResNet-101 model.
    """
    model_args = dict(layers=(3, 4, 23, 3))
    return _create_sepool_resnet('spse_resnet101', pretrained, **dict(model_args, **kwargs))


@register_model
def spse_resnet152(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an SPSE-ResNet-152 model.
    """
    model_args = dict(layers=(3, 8, 36, 3))
    return _create_sepool_resnet('spse_resnet152', pretrained, **dict(model_args, **kwargs))


@register_model
def spse_resnext50(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an SPSE-ResNeXt-50 32x4d model.
    """
    model_args = dict(layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create_sepool_resnet('spse_resnext50', pretrained, **dict(model_args, **kwargs))


@register_model
def spse_resnext101(pretrained: bool = False, **kwargs) -> SEPoolResNet:
    """Constructs an SPSE-ResNeXt-101 32x4d model.
    """
    model_args = dict(layers=(3, 4, 23, 3), cardinality=32, base_width=4)
    return _create_sepool_resnet('spse_resnext101', pretrained, **dict(model_args, **kwargs))
