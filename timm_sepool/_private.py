""" Every private name of timm, torch and torchvision that this package uses, and why

Any release may remove one. tests/test_private.py then fails, and where the name stands in PRIVATE the error names it. A
name is looked up when it is imported or used: torchvision may not be installed, and torch's compiler takes a second to
import.
"""
from importlib import import_module
from typing import Any, Dict, Tuple

import torch
from torch import nn

# name -> (module, attribute, what it is and why no public name serves)
PRIVATE: Dict[str, Tuple[str, str, str]] = {
    'SqueezeExcite': (
        'timm.models._efficientnet_blocks', 'SqueezeExcite',
        'the SE block of EfficientNets, MobileNetV3 and GhostNets, which timm does not export'),
    'dynamo_config': (
        'torch._dynamo', 'config',
        'the limit of compiled variants per code object, which the networks of one class share in a benchmark'),
    'autocast_is_on': (
        'torch._C', '_is_any_autocast_enabled',
        'whether autocast is on for any device; is_autocast_enabled takes 12 us to read the name of the device'),
    'functorch_is_active': (
        'torch._C', '_are_functorch_transforms_active',
        'whether vmap or another transform of torch.func runs, which can neither see into kernels nor keep tensors'),
    'count_dispatch_modes': (
        'torch._C', '_len_torch_dispatch_stack',
        'how many modes record operations, such as make_fx and FLOP counters, which do not see Triton kernels'),
    'register_detector': (
        'torchvision.models._api', 'register_model',
        'adds a builder to the model registry, whose public functions only read it'),
}


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks, its own or those of all modules. Torch has no function that tells."""
    kinds = ('forward', 'forward_pre', 'backward', 'backward_pre')
    return any(vars(module)[f'_{k}_hooks'] or vars(nn.modules.module)[f'_global_{k}_hooks'] for k in kinds)


def is_exporting() -> bool:
    """Whether torch.export runs. In torch 2.11, torch.compiler.is_exporting() is true under torch.compile too."""
    return getattr(torch.compiler, '_is_exporting_flag', False)


def __getattr__(name: str) -> Any:
    if name not in PRIVATE:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module, attribute, purpose = PRIVATE[name]
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        library = module.partition('.')[0]
        raise ImportError(
            f'{library} {getattr(import_module(library), "__version__", "")} has no {module}.{attribute} ({purpose}). '
            f'Install an older {library} or a newer timm_sepool.'
        ) from e
