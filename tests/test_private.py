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
def test_is_there_or_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first to disappear fails with its name, its purpose and what to do."""
    module, attribute, _ = _private.PRIVATE[name]
    assert getattr(_private, name) is not None
    monkeypatch.delattr(sys.modules[module], attribute)
    monkeypatch.setitem(sys.modules, f'{module}.{attribute}', None)  # a submodule would be imported again
    library = module.partition('.')[0]
    with pytest.raises(ImportError, match=rf'{library} \S+ has no {module}\.{attribute} \(.+an older {library}'):
        getattr(_private, name)


def private_names(source: str) -> Iterator[str]:
    """Dotted names of other libraries with a private part, as far as imports and attributes of modules show them."""
    modules = {}  # local name -> dotted name
    nodes = list(ast.walk(ast.parse(source)))
    for node in nodes:
        if isinstance(node, ast.Import):
            modules.update((a.asname or a.name.partition('.')[0], a.name if a.asname else a.name.partition('.')[0])
                           for a in node.names)
            yield from (a.name for a in node.names if a.name.startswith(HOSTS) and '._' in a.name)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = {a.asname or a.name: f'{node.module}.{a.name}' for a in node.names}
            modules.update(found)
            yield from (name for name in found.values() if name.startswith(HOSTS) and '._' in name)
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr.startswith('_') and node.attr[:2] != '__':
            first, _, rest = ast.unparse(node).partition('.')
            if modules.get(first, '').startswith(HOSTS):
                yield f'{modules[first]}.{rest}'


def test_in_one_module() -> None:
    files = [path for path in PACKAGE.rglob('*.py') if path.name != '_private.py']
    assert {path.parent.name for path in files} >= {'timm_sepool', 'cli'}
    sources = {str(path): path.read_text() for path in files}
    found = {name: list(private_names(source)) for name, source in sources.items()}
    assert {name: names for name, names in found.items() if names} == {}
    assert [name for name in _private.PRIVATE if not re.search(rf'\b{name}\b', ''.join(sources.values()))] == []
