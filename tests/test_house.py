""" The house's own rules: who may import whom, and how large a room gets """
import ast
from functools import lru_cache
from pathlib import Path
from typing import Dict, Set, Tuple

import timm_sepool

# 3,500 for the first networks and commands, 430 for attention in networks without SE, 960 for `compare`, 153 for speed,
# 420 for the kernels of a GPU, 54 for errors on bad input; of tests 130 for GPUs, 80 for plain inference
# and bad input
LINES, TEST_LINES = 5516, 6215
ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(timm_sepool.__file__).parent
FILES = {'.'.join(path.relative_to(PACKAGE).with_suffix('').parts): path for path in PACKAGE.rglob('*.py')}


def imports_of(name: str) -> Set[str]:
    """Files of the package that a file imports, inside functions too."""
    found, parents = set(), name.split('.')
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parents[:-node.level] + [node.module] * bool(node.module)
            found |= {'.'.join(base), *('.'.join([*base, alias.name]) for alias in node.names)}
    return found & set(FILES)


IMPORTS: Dict[str, Set[str]] = {name: imports_of(name) for name in FILES if name.split('.')[-1] not in (
    '__init__', '__main__')}


@lru_cache(None)
def longest_chain(name: str) -> Tuple[str, ...]:
    return (name, *max((longest_chain(i) for i in IMPORTS[name] & IMPORTS.keys()), key=len, default=()))


def test_imports_go_one_way() -> None:
    """The core never imports cli, chains have at most seven files, and there is no cycle (it would recurse here)."""
    assert IMPORTS['cli.main'] and IMPORTS['sepool_resnet']
    assert not [name for name, found in IMPORTS.items() if not name.startswith('cli.') and any(
        i.startswith('cli.') for i in found)]
    assert max(map(longest_chain, IMPORTS), key=len).__len__() <= 7
    assert (PACKAGE / 'cli' / '__init__.py').read_text() == ''


def test_sizes() -> None:
    """The package, the largest file, and the tests against the package."""
    lines = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    tests = sum(len(path.read_text().splitlines()) for path in (ROOT / 'tests').rglob('*.py'))
    assert max(lines.values()) <= 450 and sum(lines.values()) <= LINES
    assert tests <= min(TEST_LINES, 1.9 * sum(lines.values()))
