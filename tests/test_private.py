""" The private names of other libraries: still there, and all in one module """
import ast
import re
import sys
from pathlib import Path
from typing import Iterator

import pytest

from timm_sepool import _private

PACKAGE = Path(_private.__file__).parent
HOSTS = ('torch', 'torchvision', 'timm', 'huggingface_hub', 'safetensors')


@pytest.mark.parametrize('name', _private.PRIVATE)
def test_is_there(name: str) -> None:
    """The first to disappear fails with the name, the purpose and the mend."""
    assert getattr(_private, name) is not None


@pytest.mark.parametrize('name', _private.PRIVATE)
def test_is_gone(name: str, monkeypatch) -> None:
    module, attribute, _ = _private.PRIVATE[name]
    getattr(_private, name)
    monkeypatch.delattr(sys.modules[module], attribute)
    # a submodule would be imported again
    monkeypatch.setitem(sys.modules, f'{module}.{attribute}', None)
    library = module.partition('.')[0]
    with pytest.raises(ImportError, match=rf'{library} \S+ has no {module}\.{attribute} \(.+an older {library}'):
        getattr(_private, name)


def private_names(source: str) -> Iterator[str]:
    """Dotted names of other libraries with a private part, as far as imports and attributes of modules show them."""
    modules = {}  # local name -> dotted name
    nodes = list(ast.walk(ast.parse(source)))
    for node in nodes:
        found = []
        if isinstance(node, ast.Import):
            found = [(a.asname or a.name.partition('.')[0], a.name, a.asname) for a in node.names]
            modules.update((local, name if asname else local) for local, name, asname in found)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = [(a.asname or a.name, f'{node.module}.{a.name}', None) for a in node.names]
            modules.update((local, name) for local, name, _ in found)
        yield from (name for _, name, _ in found if name.startswith(HOSTS) and '._' in name)
    for node in nodes:
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            first, _, rest = dotted.partition('.')
            if modules.get(first, '').startswith(HOSTS) and node.attr.startswith('_') and node.attr[:2] != '__':
                yield f'{modules[first]}.{rest}'


def test_in_one_module() -> None:
    files = [path for path in PACKAGE.rglob('*.py') if path.name != '_private.py']
    assert len(files) > 10
    found = {path.name: list(private_names(path.read_text())) for path in files}
    assert {name: names for name, names in found.items() if names} == {}
    sources = ''.join(path.read_text() for path in files)
    assert [name for name in _private.PRIVATE if not re.search(rf'\b{name}\b', sources)] == []


@pytest.mark.parametrize('source, expected', [
    ('from timm.models._hub import x', ['timm.models._hub.x']),
    ('from timm.models import _hub', ['timm.models._hub']),
    ('import torch._dynamo.config as dynamo', ['torch._dynamo.config']),
    ('import torch\ntorch._C._jit()', ['torch._C', 'torch._C._jit']),
    ('import torch.nn.functional as F\nF._pad', ['torch.nn.functional._pad']),
    ('from torch import nn\nnn.modules._functions.x', ['torch.nn.modules._functions']),
    ('import torch\ntorch.__version__\nself._own', []),
    ('from . import _private\nfrom ._files import x', []),
])
def test_scan(source: str, expected) -> None:
    assert sorted(private_names(source)) == sorted(expected)
