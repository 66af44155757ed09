""" What is published: wheel and sdist, their metadata, and the documentation strings """
import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Set

import pytest
import yaml
from test_autoload import CHECK, run, run_python

import timm_sepool

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(timm_sepool.__file__).parent
INFO = f'timm_sepool-{timm_sepool.__version__}.dist-info'
UNDOCUMENTED = re.compile('_|add_parser$|run$|extra_repr$')  # the parsers document the subcommands


def files_under(folder: Path) -> Set[str]:
    paths = [path.relative_to(folder.parent) for path in folder.rglob('*') if path.is_file()]
    return {path.as_posix() for path in paths if not any(p == '__pycache__' or p.startswith('.') for p in path.parts)}


@pytest.fixture(scope='module')
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the sdist and of the wheel that is built from it, as `python -m build` makes them."""
    folder = tmp_path_factory.mktemp('release')
    ignore = shutil.ignore_patterns('.git', '__pycache__', '.*_cache', '.venv', 'dist', 'build')
    shutil.copytree(ROOT, folder / 'sources', ignore=ignore)
    run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder / 'dist', folder / 'sources'], folder)
    return folder / 'dist'


@pytest.fixture(scope='module')
def wheel(dist: Path) -> zipfile.ZipFile:
    path, = dist.glob(f'timm_sepool-{timm_sepool.__version__}-py3-none-any.whl')
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel(wheel: zipfile.ZipFile) -> None:
    """The package with its data and the licence, nothing else."""
    assert set(wheel.namelist()) == files_under(PACKAGE) | {
        f'{INFO}/{name}' for name in ('METADATA', 'WHEEL', 'RECORD', 'entry_points.txt', 'licenses/LICENSE')}
    assert {'timm_sepool/py.typed', 'timm_sepool/cli/main.py'} <= set(wheel.namelist())
    assert wheel.read(f'{INFO}/licenses/LICENSE') == (ROOT / 'LICENSE').read_bytes()
    entry_points = wheel.read(f'{INFO}/entry_points.txt').decode()
    assert 'timm-sepool = timm_sepool.cli.main:main' in entry_points
    assert 'timm_sepool = timm_sepool._autoload:install' in entry_points
    data = Parser().parsestr(wheel.read(f'{INFO}/METADATA').decode())
    assert data['Version'] == timm_sepool.__version__
    assert data['License-Expression'] == 'Apache-2.0'
    required = {r.split('>')[0].strip() for r in data.get_all('Requires-Dist', []) if 'extra ==' not in r}
    assert {name.replace('-', '_') for name in required} == {'torch', 'timm', 'huggingface_hub', 'safetensors'}
    assert data['Description-Content-Type'] == 'text/markdown'
    assert data.get_payload().strip() == (ROOT / 'README.md').read_text().strip()


def test_installed(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    target = tmp_path / 'target'
    install = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', target, wheel.filename]
    run(install, tmp_path)
    check = f'import timm_sepool; assert timm_sepool.__file__.startswith({str(target)!r})'
    assert run_python('import timm', CHECK, check, cwd=tmp_path, path=[target]) == ''


def test_sdist(dist: Path) -> None:
    """All that it takes to build, to test and to read, and no more."""
    path, = dist.glob('*.tar.gz')
    with tarfile.open(path) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    expected = {file for name in ('timm_sepool', 'tests', 'docs', 'hf_cards') for file in files_under(ROOT / name)}
    expected |= {'LICENSE', 'README.md', 'CHANGELOG.md', 'CITATION.cff', 'pyproject.toml', '.github/CONTRIBUTING.md'}
    assert expected <= names
    rest = {name for name in names - expected if not name.startswith(('.ci/', '.github/'))}
    assert rest <= {'PKG-INFO', '.gitignore'}


def test_version_and_citation() -> None:
    """The version is in one file; the citation is the paper's."""
    changelog = (ROOT / 'CHANGELOG.md').read_text()
    assert changelog.split('## ')[1].split()[0] == timm_sepool.__version__
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert {'cff-version', 'message', 'title', 'authors'} <= citation.keys() and 'version' not in citation
    paper = citation['preferred-citation']
    assert f'https://doi.org/{paper["doi"]}' in (ROOT / 'README.md').read_text()
    bibtex = next(PACKAGE.rglob('card_template.md')).read_text()
    assert ' and '.join(f'{a["family-names"]}, {a["given-names"]}' for a in paper['authors']) in bibtex
    assert paper['title'].lower() in bibtex.lower() and f'{{{paper["year"]}}}' in bibtex


@pytest.mark.parametrize('file', sorted(f.relative_to(PACKAGE).as_posix() for f in PACKAGE.rglob('[!_]*.py')))
def test_documentation(file: str) -> None:
    """Every module and all public functions, classes and methods say what they are, and a function what it raises."""
    tree = ast.parse((PACKAGE / file).read_text())
    assert ast.get_docstring(tree)
    nodes = [*tree.body, *(n for c in tree.body if isinstance(c, ast.ClassDef) and c.name[0] != '_' for n in c.body)]
    nodes = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not UNDOCUMENTED.match(n.name)]
    docs = {n.name: ast.get_docstring(n) for n in reversed(nodes)}  # what overrides a method need not say it again
    for node in nodes:
        doc = ast.get_docstring(node) or docs[node.name]
        assert doc, f'{file}: {node.name} has no documentation string'
        source = ast.unparse(node) if isinstance(node, ast.FunctionDef) else ''
        for error in re.findall(r'raise ([A-Z]\w+)\(', source):
            assert error in doc or f'except {error}' in source, f'{file}: {node.name} does not say: raises {error}'


@pytest.mark.full
def test_types(tmp_path: Path) -> None:
    """A user's type checker sees what the package exports."""
    pytest.importorskip('mypy')
    (tmp_path / 'user.py').write_text('import timm_sepool\n' + ''.join(
        f'reveal_type(timm_sepool.{name})\n' for name in timm_sepool.__all__))
    command = [sys.executable, '-m', 'mypy', '--ignore-missing-imports', 'user.py']
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    revealed = [line for line in result.stdout.splitlines() if 'Revealed type' in line]
    assert len(revealed) == len(timm_sepool.__all__), result.stdout + result.stderr
    assert not [line for line in revealed if '"Any"' in line]
