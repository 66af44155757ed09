""" SPSE and RGSE networks for timm

The models are registered with timm as soon as torch and timm are imported, see `_autoload`. This file imports neither:
torch loads this package at the end of its own import, and timm may be half-imported then.
"""
from typing import TYPE_CHECKING

from ._autoload import install as _install

if TYPE_CHECKING:
    from .adopted import adopt as adopt
    from .checkpoints import checkpoint_filter_fn as checkpoint_filter_fn
    from .plot import plot_descriptors as plot_descriptors
    from .plot import plot_gates as plot_gates
    from .plot import plot_kernels as plot_kernels
    from .sepool_resnet import SEPoolBottleneck as SEPoolBottleneck
    from .sepool_resnet import SEPoolResNet as SEPoolResNet
    from .squeeze import RGSEModule as RGSEModule
    from .squeeze import SPSEModule as SPSEModule

__version__ = '0.1.0'

_PUBLIC = {
    'SPSEModule': 'squeeze', 'RGSEModule': 'squeeze',
    'SEPoolBottleneck': 'sepool_resnet', 'SEPoolResNet': 'sepool_resnet',
    'checkpoint_filter_fn': 'checkpoints',
    'adopt': 'adopted',
    'plot_gates': 'plot', 'plot_kernels': 'plot', 'plot_descriptors': 'plot',
}
__all__ = ['__version__', *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    return getattr(import_module(f'.{_PUBLIC[name]}', __name__), name)


def __dir__():
    return sorted({*globals(), *__all__})


_install()
