""" RGSE and SPSE squeezes for any SE network of timm

`adopt` adds learned local averages to the global average of every SE block of a model. Unlike in the networks of the
paper the fusion is linear (no norm, no ReLU) and starts as the plain mean:

    x_se = mean(x) + sum over the cells of weight * local average,  weight = 0 at first

So an adopted model computes exactly what it did, in eval and train mode and at every input size, and learns from there.
The grids are the paper's (section 3): RGSE has one cell per 7x7 window of the map, SPSE 1x1 + 2x2 + 4x4 cells.

The registered model `adopted` does the same by name, for train.py, validate.py and the Hub:
`timm.create_model('adopted', base='regnety_032', squeeze='rgse', pretrained=True)`.
"""
from dataclasses import fields
from typing import Any, Collection, Dict, List, Optional, Tuple, Union

import torch
from torch import nn

from timm import models
from timm.layers import SEModule, get_attn, to_2tuple
from timm.models.senet import SEModule as SENetSEModule

from . import squeeze as squeeze_layers  # the module, not its names: it may be half-imported while it waits for timm
from ._private import SqueezeExcite

__all__ = ['adopt', 'RGSqueeze', 'SPSqueeze']


class RGSqueeze(nn.Module):
    """Global average plus a weighted sum of the averages over one grid of cells."""

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
        """Set the weights to zero: the squeeze is the global average."""
        nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Squeeze x (B, C, H, W) to (B, C, 1, 1)."""
        return x.mean((2, 3), keepdim=True) + squeeze_layers.spatial_weighted_sum(x, [self.weight])


class SPSqueeze(nn.Module):
    """Global average plus a weighted sum of the averages over grids of 1x1, 2x2 and 4x4 cells."""

    def __init__(self, channels: int, device=None, dtype=None):
        """Arguments as of `RGSqueeze`."""
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.weight1 = nn.Parameter(torch.empty(channels, 1, 1, 1, **dd))
        self.weight2 = nn.Parameter(torch.empty(channels, 1, 2, 2, **dd))
        self.weight4 = nn.Parameter(torch.empty(channels, 1, 4, 4, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Squeeze x (B, C, H, W) to (B, C, 1, 1)."""
        local = squeeze_layers.spatial_weighted_sum(x, [self.weight1, self.weight2, self.weight4])
        return x.mean((2, 3), keepdim=True) + local


class AdoptedSEModule(SEModule):
    """timm's SE module, its mean replaced by the submodule `squeeze`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale x (B, C, H, W) by its gate, same shape."""
        x_se = self.squeeze(x)  # type: ignore[operator]
        if self.add_maxpool:
            x_se = 0.5 * x_se + 0.5 * x.amax((2, 3), keepdim=True)
        x_se = self.act(self.bn(self.fc1(x_se)))
        return x * self.gate(self.fc2(x_se))


class AdoptedSqueezeExcite(SqueezeExcite):
    """The SE module of timm's EfficientNets and MobileNets, its mean replaced by the submodule `squeeze`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_se = self.act1(self.conv_reduce(self.squeeze(x)))
        return x * self.gate(self.conv_expand(x_se))


class AdoptedSENetSEModule(SENetSEModule):
    """The SE module of timm's SENets, its mean replaced by the submodule `squeeze`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_se = self.relu(self.fc1(self.squeeze(x)))  # type: ignore[operator]
        return x * self.sigmoid(self.fc2(x_se))


_ADOPTED: Dict[type, type] = {
    SEModule: AdoptedSEModule, SqueezeExcite: AdoptedSqueezeExcite, SENetSEModule: AdoptedSENetSEModule}


def _se_modules(model: nn.Module) -> Dict[Any, torch.Tensor]:
    """The modules to adopt, each with the weight (rd_channels, C, 1, 1) of its first layer. Raises as `adopt`."""
    name = type(model).__name__
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f'{name} would not know the new parameters. Adopt the model first, then wrap it.')
    found: Dict[Any, torch.Tensor] = {}
    for path, module in model.named_modules():
        where = f'{path} of {name} is of class {type(module).__name__}'
        if isinstance(module, tuple(_ADOPTED.values())):
            raise ValueError(f'{where}: it is adopted already. Create the model again to adopt it differently.')
        if isinstance(module, squeeze_layers.SEPoolModule):
            raise ValueError(f'{where}, which has local averages already. Adopt an SE network, for example seresnet50.')
        if not isinstance(module, tuple(_ADOPTED)):
            continue
        if type(module) not in _ADOPTED or 'forward' in vars(module):
            raise ValueError(
                f'{where} and has a forward of its own, which adopt would replace. Adopt a model with the unchanged '
                'SEModule or SqueezeExcite of timm.')
        layer_name = 'conv_reduce' if isinstance(module, SqueezeExcite) else 'fc1'
        layer = getattr(module, layer_name)
        if not isinstance(layer, nn.Conv2d) or not layer.weight.is_floating_point():
            raise ValueError(
                f'{path}.{layer_name} of {name} is of class {type(layer).__name__}, not a Conv2d with floating-point '
                'weights. Adopt the model first, then wrap (LoRA), quantize or replace its layers.')
        found[module] = layer.weight
    if not found:
        not_se = tuple(map(get_attn, ('ese', 'eca', 'ceca', 'ge', 'gc', 'cbam', 'lcbam', 'sk', 'splat')))
        others = sorted({type(m).__name__ for m in model.modules() if isinstance(m, not_se)})
        raise ValueError(
            f"{name} has no SE block to adopt{', only ' if others else ''}{', '.join(others)}. Choose a model with "
            "timm's SEModule or SqueezeExcite, for example seresnet50, regnety_032 or efficientnet_b0.")
    return found


def _map_sizes(model: nn.Module, modules: Collection[Any], input_size: Tuple[int, ...]) -> Dict[Any, torch.Size]:
    """Input height and width of each module, from a forward on the meta device that leaves the model as it is."""
    sizes: Dict[Any, torch.Size] = {}
    modes = [(module, module.training) for module in model.modules()]
    hooks = [se.register_forward_pre_hook(lambda m, args: sizes.update({m: args[0].shape[-2:]})) for se in modules]
    try:
        # by module and untied: functional_call would not restore the tensors of a module that is registered twice
        tensors = {
            f'{path}.{name}'.removeprefix('.'): torch.empty_like(t, device='meta')
            for path, module in model.named_modules()
            for name, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
        dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
        model.eval()
        with torch.no_grad():
            x = torch.empty(1, *input_size, device='meta', dtype=dtype)
            torch.func.functional_call(model, tensors, x, tie_weights=False)
    except Exception as e:  # any model's forward may raise anything at a size that it does not take
        raise ValueError(
            f'Cannot run {type(model).__name__} at input_size={tuple(input_size)} to find the sizes of its maps '
            f"({type(e).__name__}: {e}). Pass an input_size=(channels, height, width) that it takes, or "
            "squeeze='spse'.") from e
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    for path, module in model.named_modules():
        if module in modules and module not in sizes:
            raise ValueError(
                f"The forward of {type(model).__name__} does not run {path}, so the size of its map is unknown. Adopt "
                "the whole model, or use squeeze='spse'.")
    return sizes


def adopt(model: nn.Module, squeeze: str = 'rgse', input_size: Optional[Tuple[int, int, int]] = None) -> nn.Module:
    """Replace the squeeze of every SE block of a timm model in place, and return the model.

    Modules keep their layers, hooks, parameter names and values, so the model computes exactly what it did. The new
    parameters, `<module>.squeeze.weight*`, start at 0 and get gradients at the first step. A block whose RGSE grid has
    one cell stays as it is. Adopt before optimizer, EMA, LoRA, torch.compile and DDP; for the Hub see `adopted`.

    Args:
        model: Model, or feature extractor, with `SEModule` of `timm.layers` or of timm's SENets, or `SqueezeExcite` of
            timm's EfficientNets. It can be on any device, meta included, and of any float dtype.
        squeeze: 'rgse', one cell per 7x7 window of the block's map at input_size, or 'spse', 1x1 + 2x2 + 4x4 cells.
        input_size: Input (C, H, W) in px that the grids are made for, by default that of the model's pretrained_cfg.
            The adopted model still takes every size. 'rgse' runs the model once on the meta device, hooks included.

    Raises:
        ValueError: If the squeeze is unknown or the model cannot be adopted. The model is unchanged then.
    """
    if squeeze not in ('rgse', 'spse'):
        raise ValueError(f"Unknown squeeze {squeeze!r}. Choose 'rgse' or 'spse'.")
    weights = _se_modules(model)
    cfg: Any = getattr(model, 'pretrained_cfg', None)
    cfg = cfg if isinstance(cfg, dict) else {}
    if input_size is None:
        chans, *size = cfg.get('input_size', models.PretrainedCfg.input_size)
        input_size = (getattr(model, 'in_chans', chans), *size)
    if squeeze == 'spse':
        squeezes: Dict[Any, nn.Module] = {m: SPSqueeze(w.shape[1], w.device, w.dtype) for m, w in weights.items()}
    else:
        # a map that is not square gets the grid of the square with its area
        sizes = _map_sizes(model, weights, input_size)
        grids = {module: max(1, round((height * width) ** 0.5 / 7)) for module, (height, width) in sizes.items()}
        squeezes = {m: RGSqueeze(w.shape[1], grids[m], w.device, w.dtype) for m, w in weights.items() if grids[m] > 1}
        if not squeezes:
            raise ValueError(
                f'No SE block of {type(model).__name__} has a map larger than 10 x 10 at input_size='
                f"{tuple(input_size)}, so every grid would be 1 x 1. Use squeeze='spse' or a larger input_size.")

    # nothing fails from here on, so that no model is left half adopted
    for module, local_squeeze in squeezes.items():
        module.squeeze = local_squeeze.train(module.training)
        module.__class__ = _ADOPTED[type(module)]
    if cfg:
        # a saved model that loads under the name of its base would lose its squeezes
        model.pretrained_cfg = model.default_cfg = {**cfg, 'architecture': 'adopted'}  # type: ignore[assignment]
    return model


def _squeeze_keys(state_dict: Dict[str, Any]) -> List[str]:
    return sorted(k for k in state_dict if '.squeeze.weight' in k)


def _checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Compare the squeezes: timm loads without strict where num_classes differs."""
    theirs, ours = _squeeze_keys(state_dict), _squeeze_keys(model.state_dict())
    if theirs != ours:
        raise RuntimeError(
            f'The checkpoint has {len(theirs)} squeeze weights ({", ".join(theirs[:1])}), this adopted model has '
            f'{len(ours)} ({", ".join(ours[:1])}). Use the base, squeeze and input_size that it was trained with.')
    return state_dict


def _adopt_features(features: nn.Module, model: nn.Module) -> nn.Module:
    """Give a feature extractor, which may lack some SE blocks, the squeezes and all weights of an adopted model."""
    def _name_in_extractor(name: str) -> str:
        # timm's extractors hold a model as `model` or join nested names by `_`
        return name.removeprefix('model.').replace('.', '_')

    modules: Dict[str, Any] = {_name_in_extractor(name): module for name, module in model.named_modules()}
    for name, module in list(features.named_modules()):
        adopted_module = modules.get(_name_in_extractor(name))
        if type(adopted_module) is _ADOPTED.get(type(module)):
            module.squeeze = adopted_module.squeeze  # type: ignore[attr-defined]
            module.__class__ = type(adopted_module)
    weights = {_name_in_extractor(k): v for k, v in model.state_dict().items()}
    features.load_state_dict({k: weights[_name_in_extractor(k)] for k in features.state_dict()})
    return features


default_cfgs = models.generate_default_cfgs({'adopted': {}})  # weights and preprocessing are those of the base


@models.register_model
def adopted(
        pretrained: bool = False,
        base: Optional[str] = None,
        squeeze: str = 'rgse',
        input_size: Optional[Tuple[int, int, int]] = None,
        pretrained_cfg: Optional[Union[str, Dict[str, Any], models.PretrainedCfg]] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        cache_dir: Optional[str] = None,
        **kwargs,
) -> nn.Module:
    """Constructs an SE model of timm with RGSE or SPSE squeezes, see `adopt`.

    Args:
        pretrained: Load the base's weights. Where the name is that of a saved adopted model (`hf-hub:`, `local-dir:`),
            or the file of pretrained_cfg_overlay is a checkpoint of one, load the adopted model's weights.
        base: Name of the SE model, with or without tag, by default seresnet50. A saved model names its base.
        squeeze: 'rgse' or 'spse'.
        input_size: Input (C, H, W) in px that the grids are made for, by default the registered one of the base with
            the model's in_chans. It is part of the architecture, as base and squeeze are.
        pretrained_cfg: Config of a saved adopted model.
        pretrained_cfg_overlay: Entries that replace those of the base's or the saved model's config.
        cache_dir: Directory for downloaded weights.
        **kwargs: Arguments of the base.

    Raises:
        ValueError: If base is unknown, missing or cannot be adopted, or squeeze or feature_cls is not supported.
        RuntimeError: If the weights are those of another model.
    """
    cfg = models.resolve_pretrained_cfg('adopted', pretrained_cfg, pretrained_cfg_overlay)  # type: ignore[arg-type]
    saved = bool(cfg.source)  # set by timm for hf-hub: and local-dir:
    if base is None and not saved:
        base = 'seresnet50'  # so that loops over all models of timm can create this one
    if not base or not models.is_model(models.get_arch_name(base)):
        raise ValueError(
            f"The model 'adopted' needs an SE model of timm as base, got {base!r}. Pass base='regnety_032'; in timm's "
            "scripts, --model-kwargs base=regnety_032 squeeze=rgse.")
    if not saved:
        changes = {f.name: getattr(cfg, f.name) for f in fields(cfg) if getattr(cfg, f.name) != f.default}
        changes.pop('architecture', None)
        cfg = models.resolve_pretrained_cfg(base, None, {**changes, **(pretrained_cfg_overlay or {})})
        saved = bool(pretrained and cfg.file and _squeeze_keys(models.load_state_dict(cfg.file)))
    if input_size is None:
        # not the size of a saved config: that is the training run's, and would change the grids
        input_size = (models.get_pretrained_cfg(base) or models.PretrainedCfg()).input_size
        if 'img_size' in kwargs:
            input_size = (input_size[0], *to_2tuple(kwargs['img_size']))
    in_chans = kwargs.get('in_chans', cfg.input_size[0])

    kwargs.update(pretrained_cfg=cfg.to_dict(), cache_dir=cache_dir)
    if kwargs.get('feature_cls') in ('hook', 'fx'):
        raise ValueError(f"Adopted models do not support feature_cls={kwargs['feature_cls']!r}. Use 'getter'.")
    feature_names = ('features_only', 'out_indices', 'feature_cls') if kwargs.get('features_only', False) else ()
    feature_args = {k: kwargs.pop(k) for k in feature_names if k in kwargs}
    model: Any = models.create_model(base, pretrained and not saved, **kwargs)
    adopt(model, squeeze, (in_chans, *input_size[1:]))
    if pretrained and saved:
        models.load_pretrained(
            model, cfg.to_dict(), num_classes=model.num_classes, in_chans=in_chans, filter_fn=_checkpoint_filter_fn,
            strict=kwargs.get('pretrained_strict', True), cache_dir=cache_dir)
    if feature_args:
        # only the base's own constructor knows how its features are extracted
        model = _adopt_features(models.create_model(base, **kwargs, **feature_args), model)
    kept = {k: v for k, v in model.pretrained_cfg.items() if k != 'state_dict'}
    model.pretrained_cfg = model.default_cfg = {**kept, 'architecture': 'adopted'}
    return model
