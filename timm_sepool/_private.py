""" Every private name of timm, torch and torchvision that this package uses, and why

Any release of theirs may drop one: tests/test_private.py says which is gone first. They are looked up when they are
used, because torchvision is only there with timm's default installation and torch's compiler takes a second to import.
"""
from importlib import import_module
from typing import Any, Dict, Tuple

# name -> (module, attribute, what for: there is no public one)
PRIVATE: Dict[str, Tuple[str, str, str]] = {
    'SqueezeExcite': (
        'timm.models._efficientnet_blocks', 'SqueezeExcite',
        'the SE block of EfficientNets, MobileNetV3 and GhostNets, which timm exports nowhere'),
    'dynamo_config': (
        'torch._dynamo', 'config',
        'its limit of compiled variants per code object, which several networks of one class share in a benchmark'),
    'register_detector': (
        'torchvision.models._api', 'register_model',
        'the way into its registry of models, which has public functions for reading only'),
}


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
            f'Install an older {library}, or a newer timm_sepool.'
        ) from e
