""" What is published: wheel and sdist, their metadata, and the documentation strings """
import ast
import inspect
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from importlib import import_module
from pathlib import Path
from typing import Dict, List, Set

import pytest
import yaml
from test_autoload import CHECK, check_file, run, run_python

import timm_sepool

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(timm_sepool.__file__).parent
MODULES = ['squeeze', 'sepool_resnet', 'adopted', 'hub', 'bench', 'detection', 'plot', 'quickstart', 'cli', '_files']


def files_under(folder: Path) -> Set[str]:
    paths = [path.relative_to(folder.parent) for path in folder.rglob('*') if path.is_file()]
    return {path.as_posix() for path in paths if not any(p == '__pycache__' or p.startswith('.') for p in path.parts)}


@pytest.fixture(scope='module')
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the sdist and of the wheel that is built from it, as `python -m build` makes them."""
    sources = tmp_path_factory.mktemp('release') / 'sources'
    sources.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, sources)
    for name in ('timm_sepool', 'tests', 'hf_cards', '.ci', '.github'):
        shutil.copytree(ROOT / name, sources / name)
    result = subprocess.run(
        [sys.executable, '-m', 'build', '--no-isolation', '--outdir', sources.parent / 'dist', sources],
        cwd=sources.parent, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return sources.parent / 'dist'


@pytest.fixture(scope='module')
def wheel(dist: Path) -> Path:
    path, = dist.glob('*.whl')
    return path


def read_wheel(path: Path) -> Dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(files: Dict[str, bytes]) -> Message:
    text, = [data.decode() for name, data in files.items() if name.endswith('.dist-info/METADATA')]
    return Parser().parsestr(text)


def test_wheel(wheel: Path) -> None:
    """The package with its data and the licence, nothing else."""
    version = timm_sepool.__version__
    assert wheel.name == f'timm_sepool-{version}-py3-none-any.whl'
    files = read_wheel(wheel)
    info = f'timm_sepool-{version}.dist-info'
    assert set(files) == files_under(PACKAGE) | {
        f'{info}/{name}' for name in ('METADATA', 'WHEEL', 'RECORD', 'entry_points.txt', 'licenses/LICENSE')}
    assert {'timm_sepool/py.typed', 'timm_sepool/card_template.md'} <= set(files)
    assert files[f'{info}/licenses/LICENSE'] == (ROOT / 'LICENSE').read_bytes()
    entry_points = files[f'{info}/entry_points.txt'].decode()
    assert 'timm-sepool = timm_sepool.cli.main:main' in entry_points
    assert 'timm_sepool = timm_sepool._autoload:install' in entry_points


def test_installed(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / 'target'
    run([sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', target, wheel], cwd=tmp_path)
    code = ('import timm', CHECK, check_file(target / 'timm_sepool' / '__init__.py'))
    assert run_python(*code, cwd=tmp_path, path=[target]) == ''


def test_metadata(wheel: Path) -> None:
    data = metadata(read_wheel(wheel))
    assert data['Version'] == timm_sepool.__version__
    assert data['License-Expression'] == 'Apache-2.0'
    required = {r.split('>')[0].strip() for r in data.get_all('Requires-Dist', []) if 'extra ==' not in r}
    assert {name.replace('-', '_') for name in required} == {'torch', 'timm', 'huggingface_hub', 'safetensors'}
    assert data['Description-Content-Type'] == 'text/markdown'
    assert data.get_payload().strip() == (ROOT / 'README.md').read_text().strip()


def test_sdist(dist: Path) -> None:
    """All that it takes to build, to test and to read, and no more."""
    path, = dist.glob('*.tar.gz')
    with tarfile.open(path) as archive:
        files = {name.partition('/')[2] for name in archive.getnames()}
    expected = files_under(PACKAGE) | files_under(ROOT / 'tests') | files_under(ROOT / 'hf_cards')
    expected |= {'LICENSE', 'README.md', 'CHANGELOG.md', 'CITATION.cff', 'pyproject.toml', '.github/CONTRIBUTING.md'}
    assert expected <= files
    assert len([name for name in files if name.startswith('hf_cards/')]) == 10
    rest = {name for name in files - expected if not name.startswith(('.ci/', '.github/'))}
    assert rest <= {'PKG-INFO', '.gitignore'}


def test_version_and_citation() -> None:
    """The version is in one file; the citation is the paper's."""
    version = timm_sepool.__version__
    changelog = (ROOT / 'CHANGELOG.md').read_text()
    assert changelog.split('## ')[1].split()[0] == version
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert {'cff-version', 'message', 'title', 'authors'} <= citation.keys() and 'version' not in citation
    paper = citation['preferred-citation']
    assert f'https://doi.org/{paper["doi"]}' in (ROOT / 'README.md').read_text()
    bibtex = (PACKAGE / 'card_template.md').read_text()
    assert ' and '.join(f'{a["family-names"]}, {a["given-names"]}' for a in paper['authors']) in bibtex
    assert paper['title'].lower() in bibtex.lower() and f'{{{paper["year"]}}}' in bibtex


def documented(module: str) -> List[ast.AST]:
    """Public functions, classes and methods of a module, but subcommands, documented by their parsers, and a hook."""
    tree = ast.parse((PACKAGE / f'{module}.py').read_text())
    nodes = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith(('_', 'cmd_')):
            nodes.append(node)
            if isinstance(node, ast.ClassDef):
                nodes += [n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith('_')]
    return [node for node in nodes if node.name != 'extra_repr']


@pytest.mark.parametrize('module', MODULES)
def test_documentation(module: str) -> None:
    """Every public thing says what it is, and a function that raises says what."""
    assert import_module(f'timm_sepool.{module}').__doc__
    nodes = documented(module)
    assert nodes
    for node in nodes:
        doc = ast.get_docstring(node) or ''
        assert doc, f'{module}.{node.name} has no documentation string'
        if isinstance(node, ast.FunctionDef):
            raised = {
                n.exc.func.id for n in ast.walk(node)
                if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call) and isinstance(n.exc.func, ast.Name)}
            handlers = [n.type for n in ast.walk(node) if isinstance(n, ast.ExceptHandler)]
            raised -= {t.id for t in handlers if isinstance(t, ast.Name)}
            missing = {name for name in raised if name not in doc}
            assert not missing, f'{module}.{node.name} does not say that it raises {missing}'


def test_types(tmp_path: Path) -> None:
    """A user's type checker sees what the package exports."""
    pytest.importorskip('mypy')
    (tmp_path / 'user.py').write_text('import timm_sepool\n' + ''.join(
        f'reveal_type(timm_sepool.{name})\n' for name in timm_sepool.__all__))
    command = [sys.executable, '-m', 'mypy', '--ignore-missing-imports', 'user.py']
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    revealed = [line for line in result.stdout.splitlines() if 'Revealed type' in line]
    assert len(revealed) == len(timm_sepool.__all__), result.stdout + result.stderr
    assert not [line for line in revealed if '"Any"' in line]


@pytest.mark.parametrize('name', sorted(set(timm_sepool.__all__) - {'__version__'}))
def test_public_names(name: str) -> None:
    """What the package exports documents its arguments and its shapes or units."""
    thing = getattr(timm_sepool, name)
    assert name in dir(timm_sepool)
    doc = inspect.getdoc(thing)
    target = thing.__init__ if inspect.isclass(thing) else thing
    if inspect.isclass(thing):
        doc = f'{doc}\n{inspect.getdoc(target)}'
        doc += inspect.getdoc(thing.forward) or ''
    params = [p for p in inspect.signature(target).parameters if p not in ('self', 'args', 'kwargs', 'device', 'dtype')]
    missing = [p for p in params if p not in doc]
    assert not missing or issubclass(thing, timm_sepool.SEPoolBottleneck), missing
