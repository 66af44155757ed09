""" The private names of other libraries: still there, and all in one module """
import ast
import re
import sys
from pathlib import Path
from typing import List

import pytest

from timm_sepool import _private

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


def private_names(source: str) -> List[str]:
    """Dotted names of other libraries with a private part, as far as imports and attributes of modules show them."""
    nodes = list(ast.walk(ast.parse(source)))
    imported = [
        (a.asname or a.name.partition('.')[0], f'{getattr(node, "module", "")}.{a.name}'.lstrip('.'))
        for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, 'level', 0)
        for a in node.names]
    modules = {local for local, name in imported if name.startswith(HOSTS)}
    attributes = [ast.unparse(n) for n in nodes if isinstance(n, ast.Attribute) and re.match('_(?!_)', n.attr)]
    return [name for _, name in imported if name.startswith(HOSTS) and '._' in name] + [
        name for name in attributes if name.partition('.')[0] in modules]


def test_in_one_module() -> None:
    files = [path for path in Path(_private.__file__).parent.rglob('*.py') if path.name != '_private.py']
    assert {path.parent.name for path in files} >= {'timm_sepool', 'cli'}
    assert [(path, names) for path in files if (names := private_names(path.read_text()))] == []
    source = ''.join(path.read_text() for path in files)
    assert [name for name in _private.PRIVATE if not re.search(rf'\b{name}\b', source)] == []
