""" Where an attention block goes in a network that has none

1. In the empty slots of timm's blocks, the attribute that holds the attention of other networks of the same file.
2. At the output of a module: every convolution of a VGG, every Inception module, the residual branch of an
   Inception-ResNet (`Squeeze-and-Excitation Networks` - https://arxiv.org/abs/1709.01507), or modules that are named.

The names of the network's own parameters stay, and no hook stays on the network.
"""
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import lru_cache
from inspect import signature
from types import FunctionType
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import nn

from timm import models
from timm.layers import get_attn

# The slots of a block, by the file of its class, in all other files `se`. The first one is taken, or the last where
# the block's own argument attn_last is true by default.
_SLOTS = {
    'timm.models.byobnet': ('attn', 'attn_last'),
    'timm.models.cspnet': ('attn2', 'attn3', 'attn'),
    'timm.models.cspnext': ('attention',),
    'timm.models.maxxvit': ('se', 'se_early'),
    'timm.models.nfnet': ('attn_last', 'attn'),
    'timm.models.vovnet': ('attn',),
}


class Place(NamedTuple):
    """A slot of a module or, where slot is None, its output."""
    path: str
    module: nn.Module
    slot: Optional[str] = None

    def __str__(self) -> str:
        return f'{self.path}.{self.slot}'.removeprefix('.') if self.slot else self.path

    @property
    def source(self) -> nn.Module:
        """The module whose output the attention block scales: what fills the slot, or the module itself."""
        return getattr(self.module, self.slot) if self.slot else self.module


def _empty_slots(model: nn.Module) -> Iterator[Place]:
    for path, module in model.named_modules():
        file = next((c.__module__ for c in type(module).__mro__ if c.__module__ in _SLOTS), '')
        slots = [name for name in _SLOTS.get(file, ('se',)) if hasattr(module, name)]
        if file.endswith('vovnet') and module is not list(model.get_submodule(path.rpartition('.')[0]).children())[-1]:
            continue  # its authors put attention into the last block of a stage
        if slots and all(m is None or type(m) is nn.Identity for m in (getattr(module, name) for name in slots)):
            attn_last = signature(type(module)).parameters.get('attn_last')
            yield Place(path, module, slots[-1 if attn_last is not None and attn_last.default else 0])


def _known_outputs(model: nn.Module) -> Iterator[Place]:
    for prefix, net in model.named_modules():
        if isinstance(net, models.VGG):
            layers = list(net.features.named_children())
            for i, (name, layer) in enumerate(layers):
                # a convolution ends with its norm and activation, before the next one or the pooling
                ends = i + 1 == len(layers) or isinstance(layers[i + 1][1], (nn.Conv2d, nn.MaxPool2d))
                if ends and not isinstance(layer, nn.MaxPool2d):
                    yield Place(f'{prefix}.features.{name}'.removeprefix('.'), layer)
        elif isinstance(net, models.InceptionV3):
            yield from (Place(f'{prefix}.{k}'.removeprefix('.'), m) for k, m in net.named_children() if 'Mixed_' in k)
        elif isinstance(net, models.InceptionV4):
            yield from (Place(f'{prefix}.features.{k}'.removeprefix('.'), m) for k, m in net.features.named_children()
                        if type(m).__name__.startswith('Inception'))
        elif isinstance(net, models.InceptionResnetV2):
            yield from (Place(k, m) for k, m in net.named_modules(prefix=prefix) if k.endswith('.conv2d'))


def _named_outputs(model: nn.Module, patterns: Union[str, Sequence[str]]) -> Iterator[Place]:
    names: Any = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(names, (tuple, list)) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"modules must be names of modules, for example ['layer4'], got {patterns!r}.")
    found: Dict[str, nn.Module] = {}
    for pattern in names:
        parts = pattern.split('.')
        hits = {
            path: module for path, module in model.named_modules()
            if path.count('.') + 1 == len(parts) and path and all(map(fnmatchcase, path.split('.'), parts))}
        if not hits:
            raise ValueError(
                f'{type(model).__name__} has no module named {pattern!r}. Choose names of model.named_modules(), where '
                f'* stands for one part. The first parts are {", ".join(k for k, _ in model.named_children())}.')
        found.update(hits)
    features = getattr(model, 'feature_info', [])
    feature_paths = [str(info.get('module')) for info in getattr(features, 'info', features)]
    for path, module in found.items():
        cls = type(module)
        where = f'{path} of {type(model).__name__} is of class {cls.__name__}'
        if any('BatchNorm' in c.__name__ for c in cls.__mro__) or hasattr(module, 'fuse') or (
                hasattr(module, 'reparameterize')):
            raise ValueError(
                f'{where}, which other tools replace (SyncBatchNorm, freeze, reparameterize_model), and the attention '
                'would be lost. Name the activation after it or the module around it.')
        if hasattr(module, 'attention') or 'forward' in vars(module) or not isinstance(cls.forward, FunctionType):
            raise ValueError(f'{where} and has an attribute attention or an unusual forward. Name another module.')
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and cls.forward is not nn.Sequential.forward:
            raise ValueError(f'{where}, which iterates over its children. Name its last child or the module around it.')
        if '.' not in path and any(feature.startswith(f'{path}.') for feature in feature_paths):
            raise ValueError(f'{where}, whose children timm runs one by one for features. Name its last child.')
        yield Place(path, module)


def find_places(model: nn.Module, modules: Union[None, str, Sequence[str]] = None) -> List[Place]:
    """The places of a network for attention blocks.

    Args:
        model: A network without SE blocks.
        modules: Names, or globs of names, of the modules whose output is scaled, instead of those that timm has.

    Raises:
        ValueError: If there is no place, or other attention, or a named module cannot hold an attention block.
    """
    if modules is not None:
        return list(_named_outputs(model, modules))
    places = list(_empty_slots(model)) or list(_known_outputs(model))
    kinds = tuple(map(get_attn, ('ese', 'eca', 'ceca', 'ge', 'gc', 'cbam', 'lcbam', 'sk', 'splat', 'coord')))
    others = sorted({type(m).__name__ for m in model.modules() if isinstance(m, kinds)})
    if others or not places:
        found = f'other attention already ({", ".join(others)})' if others else 'no SE block and no place for attention'
        raise ValueError(
            f'{type(model).__name__} has {found}. Pass modules, the names of the modules whose output '
            "the new attention scales, for example modules=['stages.*'], or choose another model, say resnet50.")
    return places


@contextmanager
def _filled(places: Sequence[Place]) -> Iterator[None]:
    """Put an Identity where a slot is None, so that it is run."""
    unfilled = [(p.module, p.slot) for p in places if p.slot and getattr(p.module, p.slot) is None]
    try:
        for module, slot in unfilled:
            setattr(module, slot, nn.Identity())
        yield
    finally:
        for module, slot in unfilled:
            delattr(module, slot)
            setattr(module, slot, None)


def record_calls(
        model: nn.Module, modules: Dict[str, nn.Module], input_size: Tuple[int, ...]) -> Dict[str, List[Any]]:
    """Arguments, keyword arguments and output of each call of each module, on the meta device. Changes nothing.

    Args:
        model: Model, on any device. Its hooks are run.
        modules: Some of its modules by name.
        input_size: Input (C, H, W) in px.

    Raises:
        ValueError: If the model does not run at this size or does not run one of the modules.
    """
    calls: Dict[str, List[Any]] = {path: [] for path in modules}
    modes = [(module, module.training) for module in model.modules()]
    hooks = [
        module.register_forward_hook(lambda m, *call, path=path: calls[path].append(call), with_kwargs=True)
        for path, module in modules.items()]
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
            f'Cannot run {type(model).__name__} at input_size={tuple(input_size)} on the meta device, for the sizes of '
            f'its maps ({type(e).__name__}: {e}). Pass an input_size (channels, height, width) that it takes.') from e
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    for path, runs in calls.items():
        if not runs:
            raise ValueError(
                f'The forward of {type(model).__name__} in eval mode does not run {path}, so the size of its map is '
                'unknown. Adopt the whole model, or name modules that it runs.')
    return calls


def map_shapes(model: nn.Module, places: Sequence[Place], input_size: Tuple[int, int, int]) -> List[torch.Size]:
    """Shapes (1, C, H, W) of the maps at each place.

    Raises:
        ValueError: As `record_calls`, and if a place is used twice or its module does not map one tensor to one map.
    """
    with _filled(places):
        calls = record_calls(model, {str(place): place.source for place in places}, input_size)
    height, width = input_size[1:]
    shapes = []
    for path, runs in calls.items():
        args, kwargs, out = runs[0]
        if len(runs) > 1:
            raise ValueError(
                f'{type(model).__name__} runs {path} {len(runs)} times in a forward, and one attention block cannot '
                'serve two maps. Name other modules.')
        if len(args) != 1 or kwargs or not torch.is_tensor(args[0]):
            raise ValueError(f'{path} takes more than one tensor. Name a module that maps one tensor to another.')
        # the map has the sides of the input in about the same ratio, which (B, H, W, C) and (B, N, C) have not
        is_map = torch.is_tensor(out) and out.ndim == 4 and abs(out.shape[2] * width - out.shape[3] * height) <= (
            height + width)
        if not is_map:
            shape = tuple(out.shape) if torch.is_tensor(out) else type(out).__name__
            raise ValueError(
                f'The output of {path} is not a feature map (B, C, H, W) with the proportions of the input: {shape}. '
                'Name another module.')
        shapes.append(out.shape)
    return shapes


class Attended:
    """Mixin for the class of a module whose output goes through its child `attention`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale the output (B, C, H, W) of the module's own forward."""
        return self.attention(self.forward_base(x))  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol):
        # pickle finds no class that was made while the program ran
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return (_new_attended, (self.base_class,), *reduced[2:])  # type: ignore[attr-defined]


class _AttendedDict(Attended):
    """The forward of a ModuleDict iterates over its children."""

    def items(self):
        """The children but for the attention; keys and values likewise."""
        return [(key, module) for key, module in self._modules.items() if key != 'attention']  # type: ignore

    def keys(self):
        return [key for key, _ in self.items()]

    def values(self):
        return [module for _, module in self.items()]


@lru_cache(None)
def _attended_class(cls: Any) -> Any:
    base = _AttendedDict if issubclass(cls, nn.ModuleDict) else Attended
    f = cls.forward
    # TorchScript names a method by its function's __name__, and `forward` is taken
    forward_base = FunctionType(f.__code__, f.__globals__, 'forward_base', f.__defaults__, f.__closure__)
    forward_base.__annotations__, forward_base.__kwdefaults__ = f.__annotations__, f.__kwdefaults__
    return type(f'Attended{cls.__name__}', (base, cls), {
        '__module__': __name__, 'base_class': cls, 'forward_base': forward_base})


def _new_attended(cls: type) -> Any:
    return nn.Module.__new__(_attended_class(cls))


def attach(place: Place, attention: nn.Module) -> None:
    """Put the attention block into the slot, or behind the module. The module stays the same object."""
    module: Any = place.module
    if place.slot:
        setattr(module, place.slot, attention)
        if hasattr(module, 'attn_gain'):
            module.attn_gain = 1.  # NFNets double the output of their attention, which halves the signal at the start
    elif type(module).forward is nn.Sequential.forward:
        module.add_module('attention', attention)
    else:
        module.attention = attention
        module.__class__ = _attended_class(type(module))  # type: ignore[arg-type]


def attach_to_features(
        path: str, block: nn.Module, model: nn.Module, targets: Dict[str, Any], rename: Callable[[str], str]) -> None:
    """Put a block of model, at path, into a feature extractor whose modules are `targets` by their renamed names.

    Raises:
        ValueError: If the extractor has the module's children, but not the module.
    """
    parent, _, slot = path.rpartition('.')
    owner: Any = model.get_submodule(parent)
    name = rename(parent)
    holder = targets.get(name, nn.Identity())
    is_pruned = isinstance(holder, nn.Sequential) and not len(holder)
    if type(holder) is getattr(owner, 'base_class', type(owner)) and not is_pruned:
        # the block at the output of a module is its child too
        attach(Place(parent, holder, None if isinstance(owner, (Attended, nn.Sequential)) else slot), block)
    elif any(target.startswith(f'{name}_') for target in targets):
        raise ValueError(f'features_only takes {parent} apart and would lose its attention. Name modules in it.')
