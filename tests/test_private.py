""" The private names of other libraries: still there, and all in one module """
import re
import sys
from pathlib import Path

import pytest
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from timm_sepool import _private


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


def test_has_hooks() -> None:
    """The hooks of a module and those of all modules count."""
    module = nn.ReLU()
    own = module.register_forward_pre_hook, module.register_full_backward_hook
    for register in (*own, register_module_forward_hook):
        assert not _private.has_hooks(module)
        handle = register(print)
        assert _private.has_hooks(module)
        handle.remove()
    assert not _private.has_hooks(module)


def test_in_one_module() -> None:
    """The other files import and use no name with an underscore, but their own."""
    files = [path for path in Path(_private.__file__).parent.rglob('*.py') if path.name != '_private.py']
    assert {path.parent.name for path in files} >= {'timm_sepool', 'cli'}
    source = ''.join(path.read_text() for path in files)
    foreign = r'^(?! *from \.).*((?<!self)(?<!cls)\._(?!asdict)[a-z]|import .*\b_[a-z]).*'
    assert not [match[0] for match in re.finditer(foreign, source, re.MULTILINE)]
    assert [name for name in _private.PRIVATE if not re.search(rf'\b{name}\b', source)] == []
