""" RGSE and SPSE squeezes for any SE network of timm

`adopt` gives the SE blocks of a model learned local averages beside their global one. Unlike in the networks of the
paper the fusion is linear, without norm and ReLU, and starts as the plain mean,

    x_se = mean(x) + sum over the cells of weight * local average,  weight = 0 at first,

so that the model computes what it did before, in eval and train mode and at every input size, and learns from there.
The grids follow the paper's rules (section 3): RGSE has one cell per 7x7 window of the map, SPSE 1x1 + 2x2 + 4x4 cells.

The registered model `adopted` does the same for train.py, validate.py and the Hub:
`timm.create_model('adopted', base='regnety_032', squeeze='rgse', pretrained=True)`.
"""
from dataclasses import fields
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from torch import nn

from timm.layers import SEModule, get_attn, to_2tuple
from timm.models import (
    PretrainedCfg,
    create_model,
    generate_default_cfgs,
    get_arch_name,
    get_pretrained_cfg,
    is_model,
    load_pretrained,
    load_state_dict,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.senet import SEModule as SENetSEModule

from . import squeeze  # not its names: it may be half-imported when this file is, and waiting for timm
from ._private import SqueezeExcite

__all__ = ['adopt', 'RGSqueeze', 'SPSqueeze']


class RGSqueeze(nn.Module):
    """Global average plus weighted sum of the averages over one grid."""

    def __init__(self, channels: int, grid: int, device=None, dtype=None):
        """
        Args:
            channels: Number of input channels.
            grid: Cells per side.
            device: Device to place tensors on.
            dtype: Data type for tensors.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, grid, grid, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the global average."""
        nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Squeeze x (B, C, H, W) to (B, C, 1, 1)."""
        return x.mean((2, 3), keepdim=True) + squeeze.spatial_weighted_sum(x, [self.weight])


class SPSqueeze(nn.Module):
    """Global average plus weighted sum of the averages over 1x1, 2x2 and 4x4 grids."""

    def __init__(self, channels: int, device=None, dtype=None):
        """
        Args:
            channels: Number of input channels.
            device: Device to place tensors on.
            dtype: Data type for tensors.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.weight1 = nn.Parameter(torch.empty(channels, 1, 1, 1, **dd))
        self.weight2 = nn.Parameter(torch.empty(channels, 1, 2, 2, **dd))
        self.weight4 = nn.Parameter(torch.empty(channels, 1, 4, 4, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the global average."""
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Squeeze x (B, C, H, W) to (B, C, 1, 1)."""
        local = squeeze.spatial_weighted_sum(x, [self.weight1, self.weight2, self.weight4])
        return x.mean((2, 3), keepdim=True) + local


class AdoptedSEModule(SEModule):
    """timm's SE module with the submodule `squeeze` in the place of its mean."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale x (B, C, H, W) by its gate, same shape."""
        x_se = self.squeeze(x)  # type: ignore[operator]
        if self.add_maxpool:
            x_se = 0.5 * x_se + 0.5 * x.amax((2, 3), keepdim=True)
        x_se = self.act(self.bn(self.fc1(x_se)))
        return x * self.gate(self.fc2(x_se))


class AdoptedSqueezeExcite(SqueezeExcite):
    """The same for EfficientNet's and MobileNet's SE module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale x (B, C, H, W) by its gate, same shape."""
        x_se = self.act1(self.conv_reduce(self.squeeze(x)))
        return x * self.gate(self.conv_expand(x_se))


class AdoptedSENetSEModule(SENetSEModule):
    """The same for SENet's SE module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale x (B, C, H, W) by its gate, same shape."""
        x_se = self.relu(self.fc1(self.squeeze(x)))  # type: ignore[operator]
        return x * self.sigmoid(self.fc2(x_se))


_ADOPTED: Dict[type, type] = {
    SEModule: AdoptedSEModule,
    SqueezeExcite: AdoptedSqueezeExcite,
    SENetSEModule: AdoptedSENetSEModule,
}
# timm's names of the attention layers that pool in another way
_OTHER_ATTENTION = ('ese', 'eca', 'ceca', 'ge', 'gc', 'cbam', 'lcbam', 'sk', 'splat')


def _se_modules(model: nn.Module) -> List[nn.Module]:
    """The modules to adopt. Raises ValueError if there is none or one that can't be."""
    name = type(model).__name__
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f'Adopt the model before it is wrapped in {name}, which would not know the new parameters.')
    found: List[nn.Module] = []
    for path, module in model.named_modules():
        if isinstance(module, tuple(_ADOPTED.values())):
            raise ValueError(f'{name} has been adopted already ({path}). Build it anew for another squeeze.')
        if isinstance(module, squeeze.SEPoolModule):
            raise ValueError(
                f'{name} pools locally already, {path} is a {type(module).__name__}. Adopt the SE network instead, '
                'for example seresnet50.'
            )
        if isinstance(module, tuple(_ADOPTED)):
            if type(module) not in _ADOPTED:
                raise ValueError(
                    f'{path} of {name} is a {type(module).__name__}, a subclass of an SE module of timm whose forward '
                    "may differ. Only timm's own SEModule and SqueezeExcite can be adopted."
                )
            found.append(module)  # type: ignore[arg-type]
    if not found:
        classes = tuple(get_attn(attn) for attn in _OTHER_ATTENTION)
        others = sorted({type(m).__name__ for m in model.modules() if isinstance(m, classes)})
        but = f', but {", ".join(others)}' if others else ''
        raise ValueError(
            f'{name} has no SE block to adopt{but}. Choose a model with '
            "timm's SEModule or SqueezeExcite, for example seresnet50, regnety_032 or efficientnet_b0."
        )
    return found


def _map_sizes(model: nn.Module, modules: List[nn.Module], input_size: Tuple[int, int, int]) -> List[Tuple[int, int]]:
    """Input height and width of each module, by a forward on the meta device that leaves the model as it is."""
    sizes: Dict[nn.Module, Tuple[int, int]] = {}

    def record(module: nn.Module, args: Tuple[torch.Tensor]) -> None:
        sizes[module] = (args[0].shape[-2], args[0].shape[-1])

    # by module and untied: a module that is registered twice would not get its tensors back
    tensors = {
        f'{path}.{name}'.removeprefix('.'): torch.empty_like(t, device='meta')
        for path, module in model.named_modules()
        for name, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
    modes = [(module, module.training) for module in model.modules()]
    hooks = [module.register_forward_pre_hook(record) for module in modules]
    try:
        model.eval()
        with torch.no_grad():
            x = torch.empty(1, *input_size, device='meta', dtype=dtype)
            torch.func.functional_call(model, tensors, x, tie_weights=False)
    except Exception as e:  # whatever a foreign forward does with a size that it can't take
        raise ValueError(
            f'{type(model).__name__} can not be run at input_size={tuple(input_size)} to see the sizes of its maps '
            f'({type(e).__name__}: {e}). Pass input_size=(channels, height, width) that it takes.'
        ) from e
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    if len(sizes) < len(modules):
        path = next(path for path, module in model.named_modules() if module in modules and module not in sizes)
        raise ValueError(
            f"{path} of {type(model).__name__} is not run by the model's forward, so its map has no size. Adopt the "
            "whole model, or use squeeze='spse'."
        )
    return [sizes[module] for module in modules]


def adopt(
        model: nn.Module,
        squeeze: str = 'rgse',
        input_size: Optional[Tuple[int, int, int]] = None,
) -> nn.Module:
    """Replace the squeeze of every SE block of a timm model, in place.

    The modules keep their layers, hooks, parameter names and values, so the model computes exactly what it did; the
    new parameters, `<module>.squeeze.weight*`, start at 0 and get gradients from the first step on. An RGSE grid of
    one cell is the global average, which the module computes already: such modules stay as they are. Adopt before the
    optimizer, an EMA copy, torch.compile or DDP see the model. To save it for the Hub create it by name, see `adopted`.

    Args:
        model: Model, or feature extractor, that holds `timm.layers.SEModule`, `SqueezeExcite` of timm's EfficientNets
            or `SEModule` of timm's SENets. On any device, the meta device too, and of any float dtype.
        squeeze: 'rgse', one cell per 7x7 window of the module's map at input_size, or 'spse', 1x1 + 2x2 + 4x4 cells.
        input_size: Input (C, H, W) that the grids are made for, by default that of the model's pretrained_cfg. The
            adopted model takes every size all the same. For RGSE the model is run once, hooks and all, on the meta
            device, which touches neither weights nor statistics.

    Returns:
        The model.

    Raises:
        ValueError: If the squeeze is unknown, or the model can't be adopted: the message says why. Nothing is changed.
    """
    if squeeze not in ('rgse', 'spse'):
        raise ValueError(f"Unknown squeeze {squeeze!r}. Choose 'rgse' or 'spse'.")
    modules = _se_modules(model)
    if input_size is None:
        chans, *size = getattr(model, 'pretrained_cfg', {}).get('input_size', PretrainedCfg.input_size)
        input_size = (getattr(model, 'in_chans', chans), *size)
    grids = [1] * len(modules)
    if squeeze == 'rgse':
        # cells per side, of as many windows as fit into the map if it is not square
        grids = [max(1, round((height * width) ** 0.5 / 7)) for height, width in _map_sizes(model, modules, input_size)]
        if max(grids) == 1:
            raise ValueError(
                f'No SE block of {type(model).__name__} has a map larger than 10 x 10 at '
                f"input_size={tuple(input_size)}, so all grids would be 1 x 1. Use squeeze='spse' or a larger "
                'input_size.'
            )
    for module, grid in zip(modules, grids):
        fc = next(m for m in module.children() if isinstance(m, nn.Conv2d))
        dd = {'device': fc.weight.device, 'dtype': fc.weight.dtype}
        if squeeze == 'spse':
            pool = SPSqueeze(fc.in_channels, **dd)
        elif grid > 1:
            pool = RGSqueeze(fc.in_channels, grid, **dd)
        else:
            continue
        module.squeeze = pool.train(module.training)
        module.__class__ = _ADOPTED[type(module)]
    cfg: Any = getattr(model, 'pretrained_cfg', None)
    if isinstance(cfg, dict):
        # a saved model that is loaded as its base would lose its squeezes, this name asks for base and squeeze
        model.pretrained_cfg = model.default_cfg = {**cfg, 'architecture': 'adopted'}  # type: ignore[assignment]
    return model


def _squeeze_keys(state_dict: Dict[str, Any]) -> List[str]:
    return sorted(k for k in state_dict if '.squeeze.weight' in k)


def _checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """timm is not strict where num_classes differs, so the squeezes are compared here."""
    theirs, ours = _squeeze_keys(state_dict), _squeeze_keys(model.state_dict())
    if theirs != ours:
        raise RuntimeError(
            f'The checkpoint is one of another adopted model: it has {len(theirs)} tensors of squeezes '
            f'({", ".join(theirs[:1])}), not {len(ours)} ({", ".join(ours[:1])}). Use the base and the squeeze that it '
            'was trained with.'
        )
    return state_dict


def _flat(name: str) -> str:
    """Name of a module or tensor, alike in a model and in its feature extractor.

    timm's extractors hold the model as `model`, or join the names of sequential layers by an underscore.
    """
    return name.removeprefix('model.').replace('.', '_')


def _adopt_features(features: nn.Module, model: nn.Module) -> nn.Module:
    """Give a feature extractor, which may lack some of the SE blocks, the squeezes and all weights of a model."""
    modules: Dict[str, Any] = {_flat(name): module for name, module in model.named_modules()}
    for name, module in list(features.named_modules()):
        adopted_module = modules.get(_flat(name))
        if type(adopted_module) is _ADOPTED.get(type(module)):
            module.squeeze = adopted_module.squeeze  # type: ignore[attr-defined]
            module.__class__ = type(adopted_module)
    weights = {_flat(k): v for k, v in model.state_dict().items()}
    features.load_state_dict({k: weights[_flat(k)] for k in features.state_dict()})
    return features


default_cfgs = generate_default_cfgs({'adopted': {}})  # weights and preprocessing are those of the base


@register_model
def adopted(
        pretrained: bool = False,
        base: Optional[str] = None,
        squeeze: str = 'rgse',
        input_size: Optional[Tuple[int, int, int]] = None,
        pretrained_cfg: Optional[Union[str, Dict[str, Any], PretrainedCfg]] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        cache_dir: Optional[str] = None,
        **kwargs,
) -> nn.Module:
    """Constructs any SE model of timm with an RGSE or SPSE squeeze, see `adopt`.

    Args:
        pretrained: Load the weights of the base, or the adopted ones where the name is that of a saved adopted model
            (hf-hub:, local-dir:) or pretrained_cfg_overlay's file holds such.
        base: Name of the SE model, with or without a tag. By default seresnet50, so that loops over all models of timm
            can create this one; a saved model names its own.
        squeeze: 'rgse' or 'spse'.
        input_size: Input (C, H, W) that the grids are made for, by default the registered one of the base; the model's
            own in_chans counts. It is part of the architecture, as are base and squeeze.
        pretrained_cfg: Config of a saved adopted model.
        pretrained_cfg_overlay: Replaces entries of the base's or the saved model's config.
        cache_dir: Cache of downloaded weights.
        **kwargs: Arguments of the base.

    Raises:
        ValueError: If base is unknown, missing in a saved model or can't be adopted, or the squeeze is unknown.
        RuntimeError: If the weights are not those of the model.
    """
    cfg = resolve_pretrained_cfg('adopted', pretrained_cfg, pretrained_cfg_overlay)  # type: ignore[arg-type]
    saved = bool(cfg.source)  # timm has set it for hf-hub: and local-dir:
    if base is None and not saved:
        base = 'seresnet50'
    if not base or not is_model(get_arch_name(base)):
        raise ValueError(
            f'The model adopted needs a base, an SE model of timm such as base=regnety_032; got {base!r}. In the '
            'scripts of timm: --model-kwargs base=regnety_032 squeeze=rgse.'
        )
    if not saved:
        changes = {f.name: getattr(cfg, f.name) for f in fields(cfg) if getattr(cfg, f.name) != f.default}
        changes.pop('architecture', None)
        cfg = resolve_pretrained_cfg(base, None, {**changes, **(pretrained_cfg_overlay or {})})
        saved = bool(pretrained and cfg.file and _squeeze_keys(load_state_dict(cfg.file)))
    if input_size is None:
        # not that of a saved config, which is the training run's and would change the grids
        input_size = (get_pretrained_cfg(base) or PretrainedCfg()).input_size
        if 'img_size' in kwargs:
            input_size = (input_size[0], *to_2tuple(kwargs['img_size']))
    in_chans = kwargs.get('in_chans', cfg.input_size[0])

    kwargs.update(pretrained_cfg=cfg.to_dict(), cache_dir=cache_dir)
    if kwargs.get('feature_cls') in ('hook', 'fx'):
        raise ValueError(f'feature_cls={kwargs["feature_cls"]!r} is not supported for adopted models.')
    feature_args = {}
    if kwargs.get('features_only', False):
        feature_args = {k: kwargs.pop(k) for k in ('features_only', 'out_indices', 'feature_cls') if k in kwargs}
    model: Any = create_model(base, pretrained and not saved, **kwargs)
    adopt(model, squeeze, (in_chans, *input_size[1:]))
    if pretrained and saved:
        load_pretrained(
            model, cfg.to_dict(), num_classes=model.num_classes, in_chans=in_chans, filter_fn=_checkpoint_filter_fn,
            cache_dir=cache_dir)
    if feature_args:
        # only the builder of the base knows how its features are extracted
        model = _adopt_features(create_model(base, **kwargs, **feature_args), model)
    model.pretrained_cfg = {k: v for k, v in model.pretrained_cfg.items() if k != 'state_dict'}
    model.pretrained_cfg['architecture'] = 'adopted'
    model.default_cfg = model.pretrained_cfg
    return model
