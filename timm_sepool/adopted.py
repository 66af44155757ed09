""" Attention for other networks of timm, with no change of what it computes at the start

A network with SE blocks gets RGSE or SPSE squeezes: learned local averages beside the global average of every SE block.
Unlike in the networks of the paper the fusion is linear (no norm, no ReLU) and starts as the plain mean:

    x_se = mean(x) + sum over the cells of weight * local average,  weight = 0 at first

A network without SE blocks gets whole attention blocks, at the places of `places`. Their gates start at exactly 1:

    gate = 2 * sigmoid(last layer),  last layer = 0 at first

So an adopted model computes exactly what it did, in eval and train mode and at every input size, and learns from there.
The grids are the paper's (section 3): RGSE has one cell per 7x7 window of the map, SPSE 1x1 + 2x2 + 4x4 cells.

The registered model `adopted` does the same by name, for train.py, validate.py and the Hub:
`timm.create_model('adopted', base='regnety_032', attention='rgse', pretrained=True)`.
"""
import re
from dataclasses import fields
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import nn

from timm import models
from timm.layers import SEModule, get_attn, to_2tuple
from timm.models.senet import SEModule as SENetSEModule

from . import places as attention_places  # modules, not their names: they may be half-imported while they wait for timm
from . import squeeze as squeeze_layers
from ._private import SqueezeExcite

__all__ = ['adopt', 'RGSqueeze', 'SPSqueeze', 'UnitGate']

ATTENTIONS = ('se', 'spse', 'rgse', 'eca', 'cbam', 'coord')


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


class UnitGate(nn.Module):
    """Twice the sigmoid: a gate between 0 and 2 that is exactly 1 at 0, in every float dtype.

    The factor is part of the state dict: the weights of a gate without it must not load here, nor these there.
    """

    def __init__(self, device=None, dtype=None):
        super().__init__()
        self.register_buffer('scale', torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, 2.)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x.sigmoid()  # type: ignore[operator]


_ADOPTED: Dict[type, type] = {
    SEModule: AdoptedSEModule, SqueezeExcite: AdoptedSqueezeExcite, SENetSEModule: AdoptedSENetSEModule}


def _se_modules(model: nn.Module) -> Dict[str, Tuple[Any, torch.Tensor]]:
    """The SE modules by name, each with the weight (rd_channels, C, 1, 1) of its first layer. Raises as `adopt`."""
    name = type(model).__name__
    found: Dict[str, Tuple[Any, torch.Tensor]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, tuple(_ADOPTED)):
            continue
        if type(module) not in _ADOPTED or 'forward' in vars(module):
            raise ValueError(
                f'{path} of {name} is of class {type(module).__name__} and has a forward of its own, which adopt would '
                'replace. Adopt a model with the unchanged SEModule or SqueezeExcite of timm.')
        layer_name = 'conv_reduce' if isinstance(module, SqueezeExcite) else 'fc1'
        layer = getattr(module, layer_name)
        if not isinstance(layer, nn.Conv2d) or not layer.weight.is_floating_point():
            raise ValueError(
                f'{path}.{layer_name} of {name} is of class {type(layer).__name__}, not a Conv2d with floating-point '
                'weights. Adopt the model first, then wrap (LoRA), quantize or replace its layers.')
        found[path] = module, layer.weight
    return found


def _refuse_if_adopted(model: nn.Module) -> None:
    name = type(model).__name__
    if not isinstance(model, nn.Module) or not any(p.is_floating_point() for p in model.parameters()):
        raise ValueError(f'{name} has no floating-point parameters to train. Pass a model of timm.')
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise ValueError(f'{name} is or contains TorchScript. Adopt the model first, then script it.')
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f'{name} would not know the new parameters. Adopt the model first, then wrap it.')
    for path, module in model.named_modules():
        where = f'{path} of {name} is of class {type(module).__name__}'
        if isinstance(module, tuple(_ADOPTED.values())) or _is_inserted(module):
            raise ValueError(f'{where}: it is adopted already. Create the model again to adopt it differently.')
        if isinstance(module, squeeze_layers.SEPoolModule):
            raise ValueError(f'{where}, which has local averages already. Adopt an SE network, for example seresnet50.')


def _grid(height: int, width: int) -> int:
    """Cells per side of RGSE: one per 7x7 window. A map that is not square gets the grid of the square of its area."""
    return max(1, round((height * width) ** 0.5 / 7))


def _new_squeezes(model: nn.Module, attention: str, input_size: Tuple[int, int, int]) -> Dict[Any, nn.Module]:
    """The new squeeze of each SE module of a model, none if it has no SE module. Raises as `adopt`."""
    weights = _se_modules(model)
    if not weights or attention == 'spse':
        return {m: SPSqueeze(w.shape[1], w.device, w.dtype) for m, w in weights.values()}
    if attention != 'rgse':
        raise ValueError(
            f'{type(model).__name__} has SE blocks, and {attention!r} would be a second attention beside them. Choose '
            "'rgse' or 'spse', which add local averages to the SE blocks, or pass modules, the names of the modules "
            'whose output the new attention scales.')
    calls = attention_places.record_calls(model, {path: m for path, (m, _) in weights.items()}, input_size)
    grids = {path: _grid(*runs[-1][-1].shape[-2:]) for path, runs in calls.items()}
    if max(grids.values()) == 1:
        raise ValueError(
            f'No SE block of {type(model).__name__} has a map larger than 10 x 10 at input_size={tuple(input_size)}, '
            "so every grid would be 1 x 1. Use 'spse' or a larger input_size.")
    return {
        m: RGSqueeze(w.shape[1], grids[path], w.device, w.dtype)
        for path, (m, w) in weights.items() if grids[path] > 1}


def _new_block(attention: str, channels: int, grid: int, norm: bool, **dd) -> nn.Module:
    """An attention block whose gates are 1: the layers before them are zero."""
    block: Any
    kwargs: Any = dict(gate_layer=partial(UnitGate, **dd), **dd)
    if attention not in ('spse', 'rgse'):
        block = get_attn(attention)(channels, **kwargs)
    elif not norm:
        block = SEModule(channels, **kwargs)
        if attention == 'spse' or grid > 1:
            block.squeeze = SPSqueeze(channels, **dd) if attention == 'spse' else RGSqueeze(channels, grid, **dd)
            block.__class__ = AdoptedSEModule
    elif attention == 'spse':
        block = squeeze_layers.SPSEModule(channels, **kwargs)
    else:
        block = squeeze_layers.RGSEModule(channels, grid, **kwargs)
    layers = {'eca': ['conv'], 'cbam': ['channel.fc2', 'spatial.conv.bn'], 'coord': ['conv_h', 'conv_w']}
    for name in layers.get(attention, ['fc2']):
        for param in block.get_submodule(name).parameters():
            nn.init.zeros_(param)
    return block


def _new_blocks(
        model: nn.Module, attention: str, input_size: Tuple[int, int, int], modules: Any, norm: bool,
) -> Dict[Any, nn.Module]:
    """The new attention block of each place of a model. Raises as `adopt`."""
    places = attention_places.find_places(model, modules)
    shapes = attention_places.map_shapes(model, places, input_size)
    grids = [_grid(*shape[2:]) for shape in shapes]
    if attention == 'rgse' and max(grids) == 1:
        raise ValueError(
            f'No map of {type(model).__name__} is larger than 10 x 10 at input_size={tuple(input_size)}, so every grid '
            "would be 1 x 1, which is SE. Use 'se', 'spse' or a larger input_size.")
    blocks: Dict[Any, nn.Module] = {}
    with torch.random.fork_rng(devices=[]):  # the new layers take no random numbers from training
        for place, shape, grid in zip(places, shapes, grids):
            # a ReLU has no parameters to take device and dtype from
            near = next(p for m in (place.module, model) for p in m.parameters() if p.is_floating_point())
            device = 'meta' if near.is_meta else 'cpu'
            block = _new_block(attention, shape[1], grid, norm, device=device, dtype=near.dtype)
            blocks[place] = block.to(near.device)
    return blocks


def _check_arguments(attention: Any, squeeze: Any, input_size: Any, norm: Any) -> str:
    """Raise as `adopt`, and return the attention by either of its names."""
    if attention is not None and squeeze is not None:
        raise ValueError('Pass attention or its earlier name squeeze, not both.')
    name = 'rgse' if attention is squeeze is None else squeeze if attention is None else attention
    if name not in ATTENTIONS:
        raise ValueError(f'Unknown attention {name!r}. Choose one of {", ".join(ATTENTIONS)}.')
    sizes = input_size if isinstance(input_size, (tuple, list)) else ()
    if input_size is not None and (len(sizes) != 3 or not all(isinstance(n, int) and n > 0 for n in sizes)):
        raise ValueError(f'input_size must be three positive integers (channels, height, width), got {input_size!r}.')
    if norm not in (None, True, False):
        raise ValueError(f'norm must be True, False or None, got {norm!r}.')
    return name


def adopt(
        model: nn.Module,
        attention: Optional[str] = None,
        input_size: Optional[Tuple[int, int, int]] = None,
        modules: Union[None, str, Sequence[str]] = None,
        norm: Optional[bool] = None,
        squeeze: Optional[str] = None,
) -> nn.Module:
    """Give a timm model attention that changes nothing at the start, in place, and return the model.

    With SE blocks: replace their squeezes. Modules keep their layers, hooks, parameter names and values. The new
    parameters, `<module>.squeeze.weight*`, start at 0 and get gradients at the first step. A block whose RGSE grid has
    one cell stays as it is.

    Without SE blocks, or where modules are named: insert attention blocks, see `places`. Their last layers start at 0
    and get gradients at the first step, their other layers at the second.

    Adopt before optimizer, EMA, LoRA, torch.compile and DDP; for the Hub see `adopted`.

    Args:
        model: Model of timm, or feature extractor of one whose blocks have a place for attention. It can be on any
            device, meta included, and of any float dtype. It is run once on the meta device, hooks included, unless
            'spse' is added to SE blocks.
        attention: 'rgse', one cell per 7x7 window of the block's map at input_size (the default), or 'spse', 1x1 + 2x2
            + 4x4 cells; only without SE blocks also 'se', 'eca', 'cbam' or 'coord', the modules of `timm.layers`.
        input_size: Input (C, H, W) in px that the grids are made for, by default that of the model's pretrained_cfg.
            The adopted model still takes every size.
        modules: Names of modules, or globs (`*` stands for one part of a name), whose output (B, C, H, W) is scaled by
            a new attention block, instead of the places that timm or the SENet paper gives.
        norm: For inserted 'rgse' and 'spse': whether the squeeze has the paper's batch norm and ReLU, which need more
            than one image per device in training, or is linear as in SE networks.
        squeeze: Earlier name of attention.

    Raises:
        ValueError: If an argument is wrong or the model cannot be adopted. The model is unchanged then.
    """
    attention = _check_arguments(attention, squeeze, input_size, norm)
    _refuse_if_adopted(model)
    cfg: Any = getattr(model, 'pretrained_cfg', None)
    cfg = cfg if isinstance(cfg, dict) else {}
    if input_size is None:
        chans, *size = cfg.get('input_size', models.PretrainedCfg.input_size)
        input_size = (getattr(model, 'in_chans', chans), *size)
    squeezes = {} if modules is not None else _new_squeezes(model, attention, input_size)
    if norm is not None and (squeezes or attention not in ('rgse', 'spse')):
        raise ValueError(
            "norm is an option of inserted 'rgse' and 'spse' blocks, not of the SE blocks of a model. Leave it out.")
    blocks = {} if squeezes else _new_blocks(model, attention, input_size, modules, bool(norm))

    # nothing fails from here on, so that no model is left half adopted
    for module, local_squeeze in squeezes.items():
        module.squeeze = local_squeeze.train(module.training)
        module.__class__ = _ADOPTED[type(module)]
    for place, block in blocks.items():
        attention_places.attach(place, block.train(place.module.training))
    if cfg:
        # a saved model that loads under the name of its base would lose its attention
        model.pretrained_cfg = model.default_cfg = {**cfg, 'architecture': 'adopted'}  # type: ignore[assignment]
    return model


def _is_inserted(module: nn.Module) -> bool:
    """Whether adopt made this attention block."""
    kinds = (*map(get_attn, ('se', 'eca', 'cbam', 'coord')), squeeze_layers.SEPoolModule)
    return isinstance(module, kinds) and any(isinstance(m, UnitGate) for m in module.modules())


_BLOCK_KEY = re.compile(  # of an adopted model, whatever its places and attention
    r'\.squeeze\.weight|\b(se|attention|attn\w*)\.((channel|spatial)\.)?'
    r'(gate\.scale|fc[12]\.|conv|bn1?\.|(weight|bias)\d?$)')


def _attention_keys(state_dict: Dict[str, Any], model: nn.Module) -> List[str]:
    """Keys of a state dict that belong to the new squeezes and blocks of an adopted model, or of another one."""
    own = model.state_dict()
    prefixes = tuple(f'{path}.' for path, module in model.named_modules() if _is_inserted(module))
    return sorted(
        k for k in state_dict
        if '.squeeze.weight' in k or k.startswith(prefixes) or (k not in own and _BLOCK_KEY.search(k)))


def _checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Compare the attention: timm loads without strict where num_classes differs."""
    theirs, ours = _attention_keys(state_dict, model), _attention_keys(model.state_dict(), model)
    if theirs != ours:
        raise RuntimeError(
            f'The checkpoint has {len(theirs)} attention weights, this adopted model has {len(ours)} and only one has '
            f'{min({*theirs} ^ {*ours})}. Use the base, attention, input_size, modules and norm of the training run.')
    return state_dict


def _adopt_features(features: nn.Module, model: nn.Module) -> nn.Module:
    """Give a feature extractor, which may lack some blocks, the attention and all weights of an adopted model."""
    def _name_in_extractor(name: str) -> str:
        # timm's extractors hold a model as `model` or join nested names by `_`
        return name.removeprefix('model.').replace('.', '_')

    targets: Dict[str, Any] = {_name_in_extractor(name): module for name, module in features.named_modules()}
    for path, module in list(model.named_modules()):
        target = targets.get(_name_in_extractor(path))
        if target is not None and type(module) is _ADOPTED.get(type(target)):
            target.squeeze, target.__class__ = module.squeeze, type(module)  # type: ignore[attr-defined]
        elif _is_inserted(module):
            attention_places.attach_to_features(path, module, model, targets, _name_in_extractor)
    weights = {_name_in_extractor(k): v for k, v in model.state_dict().items()}
    features.load_state_dict({k: weights[_name_in_extractor(k)] for k in features.state_dict()})
    return features


default_cfgs = models.generate_default_cfgs({'adopted': {}})  # weights and preprocessing are those of the base


@models.register_model
def adopted(
        pretrained: bool = False,
        base: Optional[str] = None,
        attention: Optional[str] = None,
        input_size: Optional[Tuple[int, int, int]] = None,
        modules: Union[None, str, Sequence[str]] = None,
        norm: Optional[bool] = None,
        squeeze: Optional[str] = None,
        pretrained_cfg: Optional[Union[str, Dict[str, Any], models.PretrainedCfg]] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        cache_dir: Optional[str] = None,
        **kwargs,
) -> nn.Module:
    """Constructs a model of timm with attention that changes nothing at the start, see `adopt`.

    Args:
        pretrained: Load the base's weights. Where the name is that of a saved adopted model (`hf-hub:`, `local-dir:`),
            or the file of pretrained_cfg_overlay is a checkpoint of one, load the adopted model's weights.
        base: Name of the model, with or without tag, by default seresnet50. A saved model names its base.
        attention: As of `adopt`.
        input_size: Input (C, H, W) in px that the grids are made for, by default the registered one of the base with
            the model's in_chans. It is part of the architecture, as base, attention, modules and norm are.
        modules: As of `adopt`.
        norm: As of `adopt`.
        squeeze: Earlier name of attention.
        pretrained_cfg: Config of a saved adopted model.
        pretrained_cfg_overlay: Entries that replace those of the base's or the saved model's config.
        cache_dir: Directory for downloaded weights.
        **kwargs: Arguments of the base.

    Raises:
        ValueError: If base is unknown, missing or cannot be adopted, or an argument or feature_cls is not supported.
        RuntimeError: If the weights are those of another model.
    """
    attention = _check_arguments(attention, squeeze, input_size, norm)
    cfg = models.resolve_pretrained_cfg('adopted', pretrained_cfg, pretrained_cfg_overlay)  # type: ignore[arg-type]
    saved = bool(cfg.source)  # set by timm for hf-hub: and local-dir:
    if base is None and not saved:
        base = 'seresnet50'  # so that loops over all models of timm can create this one
    if not base or not models.is_model(models.get_arch_name(base)):
        raise ValueError(
            f"The model 'adopted' needs a model of timm as base, got {base!r}. Pass base='regnety_032'; in timm's "
            "scripts, --model-kwargs base=regnety_032 attention=rgse.")
    if not saved:
        changes = {f.name: getattr(cfg, f.name) for f in fields(cfg) if getattr(cfg, f.name) != f.default}
        changes.pop('architecture', None)
        cfg = models.resolve_pretrained_cfg(base, None, {**changes, **(pretrained_cfg_overlay or {})})
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

    def _create(pretrained: bool) -> nn.Module:
        model = models.create_model(base, pretrained, **kwargs)
        return adopt(model, attention, (in_chans, *input_size[1:]), modules, norm)

    maybe_saved = bool(pretrained and cfg.file)  # the file can be the base's or the adopted model's
    model: Any = _create(pretrained and not saved and not maybe_saved)
    if maybe_saved and not saved:
        saved = bool(_attention_keys(models.load_state_dict(str(cfg.file)), model))
        model = model if saved else _create(True)
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
