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
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import nn

from timm import models

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
        names = next((_SLOTS[c.__module__] for c in type(module).__mro__ if c.__module__ in _SLOTS), ('se',))
        slots = [name for name in names if hasattr(module, name)]
        held = [getattr(module, name) for name in slots]
        if slots and all(m is None or type(m) is nn.Identity for m in held):
            attn_last = signature(type(module)).parameters.get('attn_last')
            yield Place(path, module, slots[-1 if attn_last is not None and attn_last.default else 0])


def _known_outputs(model: nn.Module) -> Iterator[Place]:
    for prefix, net in model.named_modules():
        modules = {path: m for path, m in net.named_modules(prefix=prefix) if path != prefix}
        if isinstance(net, models.VGG):
            layers = list(net.features.named_children())
            for i, (_, layer) in enumerate(layers):
                # a convolution ends with its norm and activation, before the next one or the pooling
                ends = i + 1 == len(layers) or isinstance(layers[i + 1][1], (nn.Conv2d, nn.MaxPool2d))
                if ends and not isinstance(layer, nn.MaxPool2d):
                    yield Place(f'{prefix}.features.{layers[i][0]}'.removeprefix('.'), layer)
        elif isinstance(net, models.InceptionV3):
            yield from (Place(k, m) for k, m in modules.items() if k.rpartition('.')[2].startswith('Mixed_'))
        elif isinstance(net, models.InceptionV4):
            yield from (Place(k, m) for k, m in modules.items() if type(m).__name__.startswith('Inception'))
        elif isinstance(net, models.InceptionResnetV2):
            yield from (Place(k, m) for k, m in modules.items() if k.endswith('.conv2d'))


def _named_outputs(model: nn.Module, patterns: Union[str, Sequence[str]]) -> Iterator[Place]:
    found: Dict[str, nn.Module] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        parts = pattern.split('.')
        hits = {
            path: module for path, module in model.named_modules()
            if path.count('.') + 1 == len(parts) and path and all(map(fnmatchcase, path.split('.'), parts))}
        if not hits:
            raise ValueError(
                f'{type(model).__name__} has no module named {pattern!r}. Choose names of model.named_modules(), where '
                f'* stands for one part. The first parts are {", ".join(k for k, _ in model.named_children())}.')
        found.update(hits)
    for path, module in found.items():
        where = f'{path} of {type(model).__name__} is of class {type(module).__name__}'
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            raise ValueError(
                f'{where}, which a conversion to SyncBatchNorm replaces, attention block and all. Name the activation '
                'after it or the module around it.')
        if hasattr(module, 'attention') or 'forward' in vars(module):
            raise ValueError(f'{where} and has an attribute attention or a forward of its own. Name another module.')
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and type(module).forward is not nn.Sequential.forward:
            raise ValueError(f'{where}, which iterates over its children. Name its last child or the module around it.')
        yield Place(path, module)


def find_places(model: nn.Module, modules: Union[None, str, Sequence[str]] = None) -> List[Place]:
    """The places of a network for attention blocks, none if modules is None and there is no empty or known one.

    Args:
        model: Any network.
        modules: Names, or globs of names, of the modules whose output is scaled, instead of those that timm has.

    Raises:
        ValueError: If a name or glob matches no module, or the module cannot hold an attention block.
    """
    if modules is not None:
        return list(_named_outputs(model, modules))
    return list(_empty_slots(model)) or list(_known_outputs(model))


@contextmanager
def _filled(places: Sequence[Place]) -> Iterator[None]:
    """Put an Identity where a slot is None, so that it is run."""
    unfilled = [(p.module, p.slot) for p in places if p.slot and getattr(p.module, p.slot) is None]
    for module, slot in unfilled:
        setattr(module, slot, nn.Identity())
    try:
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
            f'Cannot run {type(model).__name__} at input_size={tuple(input_size)} to find the sizes of its maps '
            f'({type(e).__name__}: {e}). Pass an input_size=(channels, height, width) that it takes.') from e
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    for path, runs in calls.items():
        if not runs:
            raise ValueError(
                f'The forward of {type(model).__name__} does not run {path}, so the size of its map is unknown. Adopt '
                'the whole model, or name modules that it runs.')
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
            raise ValueError(f'The output of {path} is no feature map (B, C, H, W): {shape}. Name another module.')
        shapes.append(out.shape)
    return shapes


class Attended:
    """Mixin for the class of a module whose output goes through its child `attention`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(self.forward_base(x))  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol):
        # pickle finds no class that was made while the program ran
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return (_new_attended, (self.base_class,), *reduced[2:])  # type: ignore[attr-defined]


class _AttendedDict(Attended):
    """The forward of a ModuleDict iterates over its children."""

    def items(self):
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
