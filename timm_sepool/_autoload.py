""" Registers the models when timm.models is imported, so that nobody has to import timm_sepool

torch >= 2.5 calls `install`, a `torch.backends` entry point, at the end of its import (TORCH_DEVICE_BACKEND_AUTOLOAD=0
switches that off). This file imports neither torch nor timm, and no failure in it may break `import torch` or timm.
"""
import importlib
import logging
import sys
import threading
import warnings
from contextlib import contextmanager, suppress
from typing import Iterator, Set

_TRIGGER = 'timm.models'
_MODEL_MODULES = ('timm_sepool.sepool_resnet', 'timm_sepool.adopted')
_reported_failures: Set[str] = set()


def install() -> None:
    """Register the models now if timm.models is imported, else when it is. More than one call changes nothing."""
    with _warn_on_failure():
        if not any(isinstance(f, _Finder) for f in sys.meta_path):
            if sys.modules.get(_TRIGGER) is None:
                sys.meta_path.insert(0, _Finder())
            else:
                _register()  # waits for timm.models if another thread is still importing it


@contextmanager
def _warn_on_failure() -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as e:  # not KeyboardInterrupt: Ctrl-C must stop the program
        message = (f'timm_sepool could not register its models: {type(e).__name__}: {e}. timm works without them. '
                   'Reinstall timm_sepool and timm, or uninstall timm_sepool.')
        if message not in _reported_failures:  # both torch and timm_sepool/__init__.py call `install`
            _reported_failures.add(message)
            try:
                warnings.warn(message, RuntimeWarning, stacklevel=4)
            except RuntimeWarning:  # raised under -W error
                logging.getLogger(__name__).warning(message)


def _register() -> None:
    for name in _MODEL_MODULES:
        try:
            if name not in sys.modules:  # else it is imported, or a thread that may wait for this one imports it
                importlib.import_module(name)
        except RuntimeError as e:
            if type(e).__name__ != '_DeadlockError':  # another thread imports the module, and will register the models
                raise


class _Finder(threading.local):
    """Finds timm.models with the finders after this one and wraps its loader in `_Loader`."""

    searching = False  # in this thread

    def find_spec(self, fullname, path=None, target=None):
        # another package's finder may ask all finders, so this one too, while it is asked by this one
        if fullname != _TRIGGER or self.searching:
            return None
        self.searching = True
        try:
            # importlib.util.find_spec would import timm, and timm.models with it. A finder before this one may have
            # called it: if asked again, that finder would wrap its own loader, which LazyLoader does not allow.
            position = next((i for i, f in enumerate(sys.meta_path) if f is self), -1)
            finders = [f for f in sys.meta_path[position + 1:] if hasattr(f, 'find_spec')]
            spec = next(filter(None, (f.find_spec(fullname, path, target) for f in finders)), None)
        finally:
            self.searching = False
        if spec is not None and hasattr(spec.loader, 'exec_module'):
            spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
        return spec


class _Loader:
    """Loads timm.models with its original loader, registers our models and removes itself and the finder."""

    def __init__(self, loader, finder: _Finder) -> None:
        self._original, self._finder = loader, finder

    def __getattr__(self, name):  # create_module and what else a loader may have
        return getattr(self._original, name)

    def exec_module(self, module) -> None:
        module.__loader__ = module.__spec__.loader = self._original
        self._original.exec_module(module)
        with _warn_on_failure():
            _register()
        with _warn_on_failure(), suppress(ValueError):  # last, so that the finder is still there after Ctrl-C
            sys.meta_path.remove(self._finder)
