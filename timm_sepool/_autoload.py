""" Registers the models as timm.models is imported, so that nobody has to import timm_sepool

torch calls `install` through the `torch.backends` entry point at the end of its own import (torch >= 2.5, switched off
by TORCH_DEVICE_BACKEND_AUTOLOAD=0). `install` only puts a finder in front of `sys.meta_path`, neither torch nor timm is
imported here. No failure below may break `import torch` or `import timm`.
"""
import importlib
import logging
import sys
import threading
import warnings
from contextlib import contextmanager
from typing import Iterator, Set

_TRIGGER = 'timm.models'
_MODELS = ('timm_sepool.sepool_resnet', 'timm_sepool.adopted')
_said: Set[str] = set()


def install() -> None:
    """Register the models: at once if timm.models has been imported, else as soon as it is. Idempotent."""
    with _failure_is_a_warning():
        if any(isinstance(f, _Finder) for f in sys.meta_path):
            return
        if sys.modules.get(_TRIGGER) is not None:
            _register()  # waits for timm.models if another thread is still importing it
        else:
            sys.meta_path.insert(0, _Finder())


@contextmanager
def _failure_is_a_warning() -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as e:  # Ctrl-C is not ours to swallow
        message = f'timm_sepool could not register its models, timm works without them: {type(e).__name__}: {e}'
        if message in _said:  # `install` is called by the package and by torch
            return
        _said.add(message)
        try:
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        except RuntimeWarning:  # raised under -W error
            logging.getLogger(__name__).warning(message)


def _register() -> None:
    for name in _MODELS:
        # else registered, or about to be by its importer, maybe a thread that waits for the timm.models of this one
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except RuntimeError as e:
                if type(e).__name__ != '_DeadlockError':  # such a thread, which Python had seen after us
                    raise


class _Finder:
    """Finds timm.models through the finders behind it and has its loader register our models afterwards."""

    def __init__(self) -> None:
        self._searching = threading.local()

    def find_spec(self, fullname, path=None, target=None):
        # the guard lets other add-ons of this technique delegate to us while we delegate to them
        if fullname != _TRIGGER or getattr(self._searching, 'value', False):
            return None
        self._searching.value = True
        try:
            # importlib.util.find_spec would import timm first, and with it timm.models behind our back. The finders in
            # front have been asked: one that delegates to us would wrap its own loader, which LazyLoader can not take.
            finders = list(sys.meta_path)
            position = next((i for i, f in enumerate(finders) if f is self), -1)
            specs = (f.find_spec(fullname, path, target) for f in finders[position + 1:] if hasattr(f, 'find_spec'))
            spec = next((s for s in specs if s is not None), None)
        finally:
            self._searching.value = False
        if spec is not None and hasattr(spec.loader, 'exec_module'):
            spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
        return spec


class _Loader:
    """The module's own loader, which also registers our models and then leaves no trace."""

    def __init__(self, loader, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        with _failure_is_a_warning():
            _register()
        # last, so that an import that Ctrl-C broke off is caught when it is tried again
        with _failure_is_a_warning():
            if self._finder in sys.meta_path:
                sys.meta_path.remove(self._finder)
