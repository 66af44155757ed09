""" What breaks while the models are registered

A failure of ours never breaks `import torch` or `import timm` and says so in one RuntimeWarning, or one line of the log
where warnings are errors; Ctrl-C is nobody's failure. Each case is a process of its own, most with small stand-ins for
torch, which only calls its entry points, for timm, which only has a registry, and for the two modules that register
the models. --full runs those with the real ones as well.
"""
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Dict, List, Sequence

import pytest
from test_autoload import CHECK, CHECK_UNKNOWN, run_python

from helpers.common import NAMES

ROOT = Path(__file__).resolve().parents[2]
FULL = bool(os.environ['TIMM_SEPOOL_FULL_TESTS'])
FILES = {
    'torch/__init__.py': """
        import os
        if os.getenv('TORCH_DEVICE_BACKEND_AUTOLOAD', '1') == '1':
            from importlib.metadata import entry_points
            for entry_point in entry_points(group='torch.backends'):
                try:
                    entry_point.load()()
                except Exception as e:
                    raise RuntimeError(f'Failed to load the backend extension: {entry_point.name}') from e
        """,
    'timm/__init__.py': """
        import torch
        from .models import create_model, is_model
        """,
    'timm/layers.py': 'def get_attn(): pass',
    'timm/models/__init__.py': """
        import torch
        from ._registry import create_model, is_model, register_model
        from . import resnet
        """,
    'timm/models/_registry.py': """
        import warnings
        models = {}
        def register_model(fn):
            if fn.__name__ in models:
                warnings.warn(f'Overwriting {fn.__name__} in registry')
            models[fn.__name__] = fn
            return fn
        def is_model(name):
            return name in models
        def create_model(name):
            return models[name]()
        """,
    'timm/models/resnet.py': """
        from ._registry import register_model
        class ResNet: pass
        @register_model
        def resnet18(): return ResNet()
        """,
    'timm_sepool/sepool_resnet.py': """
        from timm.layers import get_attn
        from timm.models import register_model
        class SEPoolResNet: pass
        for name in NAMES:
            exec(f'def {name}(): return SEPoolResNet()')
            register_model(globals()[name])
        """.replace('NAMES', repr(NAMES)),
    'timm_sepool/adopted.py': """
        from timm.models import register_model
        @register_model
        def adopted(): pass
        """,
}
STAND_IN, REAL = 'stand_in', 'real'

# what a program may ask: which of ours are known, does timm work, is the hook gone
PRELUDE = f"""
import importlib, os, signal, sys, threading
NAMES = {NAMES}
def ours():
    import timm
    assert type(timm.create_model('resnet18')).__name__ == 'ResNet'
    known = [timm.is_model(name) for name in NAMES]
    assert len(set(known)) == 1, known
    return known[0], timm.is_model('adopted')
def hooks():
    return sum(type(f).__module__ == 'timm_sepool._autoload' for f in sys.meta_path)
"""
KNOWN = """
assert ours() == (True, True), ours()
assert not hooks(), sys.meta_path
"""


class Tree:
    """An installed copy of the package and all it needs, in a folder, to break it."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        shutil.copytree(ROOT / 'timm_sepool', folder / 'timm_sepool', ignore=shutil.ignore_patterns('__pycache__'))
        info = folder / 'timm_sepool-1.0.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: timm_sepool\nVersion: 1.0\n')
        (info / 'entry_points.txt').write_text('[torch.backends]\ntimm_sepool = timm_sepool._autoload:install\n')
        if kind == STAND_IN:
            for name, text in FILES.items():
                self.write(name, text)
        else:  # all that is installed here but this project
            for entry in Path(sysconfig.get_path('purelib')).iterdir():
                if 'timm_sepool' not in entry.name:
                    (folder / entry.name).symlink_to(entry)

    def write(self, name: str, text: str) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text).lstrip())

    def own(self, name: str) -> None:
        """Have a copy of one package that may be changed."""
        package = self.folder / name
        if package.is_symlink():
            target = package.resolve()
            package.unlink()
            shutil.copytree(target, package)

    def run(
            self,
            *code: str,
            flags: Sequence[str] = (),
            env: Dict[str, str] = {},  # noqa: B006
            prelude: bool = True,
    ) -> subprocess.CompletedProcess:
        """Run code without site-packages, so that nothing but the tree is found."""
        program = '\n'.join(textwrap.dedent(c) for c in ((PRELUDE if prelude else ''), *code))
        environ = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'TORCH_DEVICE_BACKEND'))}
        environ.update(PYTHONPATH=str(self.folder), PYTHONDONTWRITEBYTECODE='1')
        if '-I' in flags:
            program = f'import sys; sys.path.insert(0, {str(self.folder)!r})\n{program}'
        return subprocess.run(
            [sys.executable, '-S', *flags, '-c', program], cwd=self.folder.parent, env={**environ, **env},
            capture_output=True, text=True, timeout=120)

    def quiet(self, *code: str, **kwargs) -> None:
        """Run code that succeeds, under -W error, and prints nothing on stderr."""
        result = self.run(*code, **{'flags': ('-W', 'error'), **kwargs})
        assert (result.returncode, result.stderr) == (0, ''), result.stderr

    def warns(self, *code: str, message: str = '') -> None:
        """Run code that succeeds with one warning, and under -W error with one line of the log."""
        for flags in ((), ('-W', 'error')):
            result = self.run(*code, flags=flags)
            assert result.returncode == 0, result.stderr
            said = 'timm_sepool could not register its models, timm works without them: '
            assert result.stderr.count(said) == 1 and message in result.stderr, result.stderr
            assert result.stderr.count('Warning: ') == (0 if flags else 1) and 'Traceback' not in result.stderr
            assert flags or f'RuntimeWarning: {said}' in result.stderr


@pytest.fixture(params=[STAND_IN, REAL] if FULL else [STAND_IN])
def tree(request, tmp_path: Path) -> Tree:
    return Tree(tmp_path / 'site', request.param)


# --- our own files

FAULTS = {
    'missing': (None, 'ModuleNotFoundError: '),
    'syntax_error': ('def f(:\n', 'SyntaxError: '),
    'null_bytes': ('x = 1\0\n', ''),
    'not_utf8': (b'x = "\xff\xfe"\n', ''),
    'import_error': ('raise ImportError("no such name")', 'ImportError: no such name'),
    'system_exit': ('raise SystemExit(3)', 'SystemExit: 3'),
    'recursion_error': ('def f(): f()\nf()', 'RecursionError: '),
    'memory_error': ('raise MemoryError', 'MemoryError: '),
    'os_error': ('raise OSError("disk on fire")', 'OSError: disk on fire'),
}


def damage(file: Path, content) -> None:
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize('first', ['timm', 'torch', 'timm_sepool'])
@pytest.mark.parametrize('fault', FAULTS)
def test_broken_module(tree: Tree, fault: str, first: str) -> None:
    """sepool_resnet.py, where the ten networks are."""
    content, message = FAULTS[fault]
    damage(tree.folder / 'timm_sepool' / 'sepool_resnet.py', content)
    tree.warns(f'import {first}', 'assert ours() == (False, False) and not hooks()', message=message)


@pytest.mark.parametrize('fault', ['missing', 'syntax_error', 'system_exit'])
def test_broken_adopted(tree: Tree, fault: str) -> None:
    """adopted.py alone: the ten networks are registered."""
    content, message = FAULTS[fault]
    damage(tree.folder / 'timm_sepool' / 'adopted.py', content)
    tree.warns('assert ours() == (True, False) and not hooks()', message=message)


def test_keyboard_interrupt(tree: Tree) -> None:
    """Ctrl-C breaks off the import, as it would without us; the next one registers the models."""
    flag = tree.folder / 'flag'
    file = tree.folder / 'timm_sepool' / 'sepool_resnet.py'
    interrupt = f'import os\nif not os.path.exists({str(flag)!r}):\n    raise KeyboardInterrupt\n'
    file.write_text(interrupt + file.read_text())
    tree.quiet(f"""
    try:
        import timm
    except KeyboardInterrupt:
        open({str(flag)!r}, 'w').close()
    else:
        assert False
    if 'torch.nn' in sys.modules:  # timm's own modules are known then, and timm says so
        import warnings
        warnings.simplefilter('ignore')
    """, KNOWN)


@pytest.mark.parametrize('keep', [[], ['__init__.py']], ids=['package', '_autoload'])
def test_removed_package(tree: Tree, keep: List[str]) -> None:
    """Its dist-info stays, so torch looks for it: torch's error names the package, and its switch works."""
    for file in (tree.folder / 'timm_sepool').iterdir():
        if file.name not in keep:
            file.unlink()
    if not keep:
        (tree.folder / 'timm_sepool').rmdir()
    result = tree.run('import torch')
    assert result.returncode == 1
    assert 'RuntimeError: Failed to load the backend extension: timm_sepool' in result.stderr
    assert "No module named 'timm_sepool" in result.stderr
    tree.quiet('assert ours() == (False, False)', env=dict(TORCH_DEVICE_BACKEND_AUTOLOAD='0'))


# --- timm and torch

def test_timm_missing(tree: Tree) -> None:
    (tree.folder / 'timm').unlink() if tree.kind == REAL else shutil.rmtree(tree.folder / 'timm')
    tree.quiet("""
    import torch, timm_sepool
    for module in ('timm', 'timm.models', 'timm_sepool.sepool_resnet'):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as e:
            assert e.name == 'timm', e
        else:
            assert False
    """)


@pytest.mark.parametrize('tree', [STAND_IN], indirect=True)  # timm needs the name itself
def test_timm_too_old(tree: Tree) -> None:
    """A name that we need is missing."""
    tree.own('timm')
    layers = tree.folder / 'timm' / 'layers.py'
    layers.write_text(layers.read_text().replace('get_attn', 'get_attn_1'))
    tree.warns('assert ours() == (False, False)', message="cannot import name 'get_attn' from 'timm.layers'")


@pytest.mark.parametrize('error', ['ImportError("half")', 'KeyboardInterrupt', 'MemoryError'])
def test_timm_half_imported(tree: Tree, error: str) -> None:
    """The import of timm.models fails in the middle and is tried again."""
    module = 'timm.models.resnet'
    tree.quiet(f"""
    class Broken:
        def find_spec(self, fullname, path=None, target=None):
            if fullname == {module!r}:
                raise {error}
    import torch
    sys.meta_path.insert(0, Broken())
    try:
        import timm
    except BaseException as e:
        assert type(e).__name__ == {error!r}.split('(')[0], repr(e)
    else:
        assert False
    assert 'timm.models' not in sys.modules and hooks() == 1
    del sys.meta_path[0]
    if 'torch.nn' in sys.modules:  # timm's modules that were imported before register their models again
        import warnings
        warnings.simplefilter('ignore')
    """, KNOWN)


def test_timm_first(tree: Tree) -> None:
    """timm.models is there when torch calls its entry points."""
    tree.quiet("""
    import torch, timm_sepool
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != 'timm_sepool._autoload']
    import timm
    assert not timm.is_model(NAMES[0])
    timm_sepool._install()
    """, KNOWN)


def test_timm_barred(tree: Tree) -> None:
    """sys.modules['timm.models'] = None."""
    tree.quiet("""
    import torch
    sys.modules['timm.models'] = None
    try:
        import timm
    except ModuleNotFoundError:
        pass
    else:
        assert False
    assert hooks() == 1
    del sys.modules['timm.models']
    """, KNOWN)


# --- the import system

HOOKS = {
    'wraps_loaders': """
        class Loader:
            def __init__(self, loader): self.loader = loader
            def __getattr__(self, name): return getattr(self.loader, name)
            def create_module(self, spec): return self.loader.create_module(spec)
            def exec_module(self, module): self.loader.exec_module(module)
        class Hook:
            def find_spec(self, fullname, path=None, target=None):
                finders = [f for f in sys.meta_path if f is not self]
                for finder in finders:
                    if spec := finder.find_spec(fullname, path, target):
                        if spec.loader and fullname.startswith('timm.'):
                            spec.loader = Loader(spec.loader)
                        return spec
        """,
    'lazy_loader': """
        import importlib.util
        class Hook:
            def find_spec(self, fullname, path=None, target=None):
                if fullname != 'timm.models':
                    return None
                for finder in sys.meta_path:
                    if finder is not self and (spec := finder.find_spec(fullname, path, target)):
                        spec.loader = importlib.util.LazyLoader(spec.loader)
                        return spec
        """,
    'legacy_find_module': """
        class Hook:
            def find_module(self, fullname, path=None): return None
        """,
    'returns_none': """
        class Hook:
            def find_spec(self, fullname, path=None, target=None): return None
        """,
}


@pytest.mark.parametrize('place', ['in_front', 'behind'])
@pytest.mark.parametrize('hook', HOOKS)
def test_import_hook(tree: Tree, hook: str, place: str) -> None:
    """An import hook of another package, in front of ours or behind it."""
    insert = 'sys.meta_path.insert(0, Hook())'
    code = ('import torch', insert) if place == 'in_front' else (insert, 'import timm_sepool, torch')
    flags = ('-W', 'error', '-W', 'ignore::ImportWarning')  # Python's own, of finders without find_spec
    tree.quiet(HOOKS[hook], *code, 'ours()', KNOWN, flags=flags)


def test_import_hook_asks_nobody(tree: Tree) -> None:
    """One in front of ours that finds timm itself: ours is never asked, timm works, an import registers the models."""
    tree.quiet("""
    import importlib.machinery, torch
    class Hook:
        find_spec = importlib.machinery.PathFinder.find_spec
    sys.meta_path.insert(0, Hook())
    assert ours() == (False, False)
    import timm_sepool.sepool_resnet, timm_sepool.adopted
    assert ours() == (True, True)
    """)


@pytest.mark.parametrize('place', ['in_front', 'behind'])
def test_import_hook_raises(tree: Tree, place: str) -> None:
    """Its error is the one that is seen, and the models are known once it is gone."""
    insert = 'sys.meta_path.insert(0, Hook())'
    code = ('import torch', insert) if place == 'in_front' else (insert, 'import timm_sepool, torch')
    tree.quiet("""
    class Hook:
        def find_spec(self, fullname, path=None, target=None):
            if fullname == 'timm.models':
                raise ZeroDivisionError('hook')
    """, *code, """
    try:
        import timm
    except ZeroDivisionError:
        pass
    else:
        assert False
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, Hook)]
    """, KNOWN)


def test_loader_without_exec_module(tree: Tree) -> None:
    """A loader of the old kind is left alone: timm works."""
    result = tree.run("""
    import importlib.machinery, importlib.util
    class Loader:
        def __init__(self, spec): self.spec = spec
        def load_module(self, name):
            module = sys.modules[name] = importlib.util.module_from_spec(self.spec)
            self.spec.loader.exec_module(module)
            return module
    class Hook:
        def find_spec(self, fullname, path=None, target=None):
            if fullname == 'timm.models':
                spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
                old = importlib.machinery.ModuleSpec(fullname, Loader(spec), is_package=True)
                return old
    import torch
    sys.meta_path.insert(1, Hook())
    assert ours() == (False, False)
    import timm_sepool.sepool_resnet, timm_sepool.adopted
    assert ours() == (True, True)
    """)
    assert result.returncode == 0, result.stderr


def test_meta_path_is_a_tuple(tree: Tree) -> None:
    """Nothing can be put in front or taken away: torch and timm are imported all the same."""
    freeze = 'sys.meta_path = tuple(sys.meta_path)'
    tree.warns(freeze, 'import torch', 'assert ours() == (False, False)')
    tree.warns('import torch', freeze, 'assert ours() == (True, True)')


def test_meta_path_is_cleared(tree: Tree) -> None:
    """And restored; or made anew without us."""
    tree.quiet("""
    import torch
    saved = sys.meta_path[:]
    sys.meta_path.clear()
    try:
        import timm
    except (ImportError, ImportWarning):
        pass
    else:
        assert False
    sys.meta_path[:] = saved
    """, KNOWN)
    tree.quiet("""
    import torch
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != 'timm_sepool._autoload']
    assert ours() == (False, False)
    from timm_sepool._autoload import install
    install()
    """, KNOWN)


def test_reload(tree: Tree) -> None:
    """Of everything, in the middle and afterwards."""
    tree.quiet("""
    import torch, timm_sepool
    importlib.reload(timm_sepool)
    importlib.reload(timm_sepool._autoload).install()
    ours()
    """, """
    import timm
    entry = [timm.create_model, timm.models]
    importlib.reload(timm.models)
    importlib.reload(timm)
    importlib.reload(timm_sepool._autoload).install()
    importlib.reload(timm_sepool)
    """, 'assert ours() == (True, True)')


def test_zip(tree: Tree, tmp_path: Path) -> None:
    """The package in a zip archive."""
    archive = tmp_path / 'timm_sepool.zip'
    with zipfile.ZipFile(archive, 'w') as f:
        for file in (tree.folder / 'timm_sepool').glob('*.py'):
            f.write(file, f'timm_sepool/{file.name}')
    shutil.rmtree(tree.folder / 'timm_sepool')
    tree.quiet(f'sys.path.insert(0, {str(archive)!r})', KNOWN, f"""
    import timm_sepool.adopted
    assert timm_sepool.adopted.__file__.startswith({str(archive)!r})
    """)


# --- the interpreter

@pytest.mark.parametrize('flags', ['-I', '-O', '-OO', '-B', '-X importtime', '-X dev'])
def test_interpreter_flags(tree: Tree, flags: str) -> None:
    check = 'if ours() != (True, True) or hooks(): raise SystemExit(1)'  # -O takes assert away
    result = tree.run('import timm', check, flags=flags.split())
    assert result.returncode == 0 and 'Warning' not in result.stderr and 'Error' not in result.stderr, result.stderr


def test_read_only_installation(tree: Tree) -> None:
    """No byte code can be written, as another user than root."""
    root = os.geteuid() == 0
    if root and tree.kind == REAL:
        pytest.skip('root may have a Python that no other user can read')
    with TemporaryDirectory() as temporary:
        if root:
            Path(temporary).chmod(0o755)  # pytest's folders are for their owner only
            tree = Tree(Path(temporary) / 'site', tree.kind)
        folders = [p for p in (tree.folder, *tree.folder.rglob('*')) if p.is_dir() and not p.is_symlink()]
        for folder in folders:
            folder.chmod(0o555)
        # first what of Python itself that user may be unable to read
        load = 'import importlib.metadata, logging\nimportlib.metadata.entry_points()'
        drop = f'{load}\nos.setuid(65534)' if root else ''
        tree.quiet(drop, 'sys.dont_write_bytecode = False', 'import timm', KNOWN, prelude=True)
        assert not list((tree.folder / 'timm_sepool').glob('__pycache__'))
        for folder in folders:
            folder.chmod(0o755)


@pytest.mark.parametrize('number', [2, 8])
def test_threads_at_once(tree: Tree, number: int) -> None:
    """Threads import torch, timm and our package at the same time, each in another order."""
    orders = 6 if tree.kind == STAND_IN else 1
    for shift in range(orders):
        tree.quiet(f"""
        import itertools
        sys.setswitchinterval(1e-6)
        # no submodules: Python may find a deadlock between the import of one and of its package, whatever they hold
        orders = list(itertools.permutations(['torch', 'timm', 'timm_sepool']))[{shift}:]
        barrier, errors = threading.Barrier({number}), []
        def work(order):
            barrier.wait()
            try:
                for module in order:
                    importlib.import_module(module)
            except BaseException as e:
                errors.append(e)
        threads = [threading.Thread(target=work, args=(orders[i % len(orders)],)) for i in range({number})]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        """, KNOWN)


def test_deadlock_of_threads(tree: Tree) -> None:
    """Python found another thread that imports our module and waits for timm.models: that one registers the models."""
    tree.quiet("""
    from importlib._bootstrap import _DeadlockError
    class Other:
        def find_spec(self, fullname, path=None, target=None):
            if fullname in ('timm_sepool.sepool_resnet', 'timm_sepool.adopted'):
                raise _DeadlockError
    import torch
    sys.meta_path.insert(0, Other())
    import timm
    del sys.meta_path[0]
    assert ours() == (False, False)
    import timm_sepool.sepool_resnet, timm_sepool.adopted
    """, KNOWN)


@pytest.mark.parametrize('method', ['fork', 'spawn', 'forkserver'])
def test_child_process(tree: Tree, method: str) -> None:
    """Of a parent that has imported torch, but not timm."""
    check = 'def check():\n    assert ours() == (True, True) and not hooks()\n'
    (tree.folder / 'child.py').write_text(f'{PRELUDE}\n{check}')
    tree.quiet(f"""
    import multiprocessing
    import torch, child
    process = multiprocessing.get_context({method!r}).Process(target=child.check)
    process.start()
    process.join(100)
    assert process.exitcode == 0 and hooks() == 1
    """)


def test_pickle(tree: Tree, tmp_path: Path) -> None:
    """A pickled model into a process that has imported nothing."""
    file = tmp_path / 'net.pkl'
    tree.quiet(f"""
    import pickle, timm
    with open({str(file)!r}, 'wb') as f:
        pickle.dump(timm.create_model(NAMES[0]), f)
    """)
    tree.quiet(f"""
    import pickle
    with open({str(file)!r}, 'rb') as f:
        assert type(pickle.load(f)).__name__ == 'SEPoolResNet'
    """, KNOWN)


def test_import_at_exit(tree: Tree) -> None:
    tree.quiet("""
    import atexit, torch
    def late():
        try:
            assert ours() == (True, True) and not hooks()
        except BaseException as e:
            print(repr(e), file=sys.stderr, flush=True)
    atexit.register(late)
    """)


# --- with the real torch and timm

def test_autoload_off(tmp_path: Path) -> None:
    """TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches us off, `import timm_sepool` on again."""
    assert run_python(CHECK_UNKNOWN, 'import timm_sepool', CHECK, cwd=tmp_path, autoload=False) == ''
    assert run_python('import timm_sepool', CHECK, cwd=tmp_path, autoload=False) == ''


@pytest.mark.parametrize('imports, autoload', [
    # the second waits for timm.models, which waits for it
    ({'timm.layers.activations': 'timm_sepool.squeeze', 'timm.models.vgg': 'timm_sepool.sepool_resnet'}, True),
    # too late for a hook on timm.models
    ({'timm.models.vgg': 'timm_sepool.squeeze'}, False),
], ids=['autoload', 'no_autoload'])
def test_threads(imports: Dict[str, str], autoload: bool, tmp_path: Path) -> None:
    """Other threads may import our modules while timm is half-imported."""
    code = f"""
    import importlib
    import sys
    import threading
    import time

    threads = {{
        name: threading.Thread(target=importlib.import_module, args=(module,), daemon=True)
        for name, module in {imports}.items()
    }}

    class Trap:
        def find_spec(self, fullname, path=None, target=None):
            if fullname in threads:
                threads[fullname].start()
                time.sleep(0.5)  # until it waits for timm

    sys.meta_path.insert(0, Trap())
    import timm
    for thread in threads.values():
        thread.join(60)
        assert not thread.is_alive()
    assert all(module in sys.modules for module in {imports}.values())
    """
    assert run_python(code, CHECK, cwd=tmp_path, autoload=autoload) == ''


# a meta path finder that breaks the registration
BREAK = """
import sys

class Broken:
    def find_spec(self, fullname, path=None, target=None):
        if fullname == 'timm_sepool.sepool_resnet':
            raise OSError('disk on fire')

sys.meta_path.insert(0, Broken())
"""


def test_failure_is_one_warning(tmp_path: Path) -> None:
    code = """
    import torch
    import timm
    import timm_sepool
    assert type(timm.create_model('resnet18')).__name__ == 'ResNet'
    """
    stderr = run_python(BREAK, code, CHECK_UNKNOWN, cwd=tmp_path, flags=())
    assert stderr.count('Warning') == 1
    assert 'RuntimeWarning: timm_sepool could not register its models' in stderr
    assert 'OSError: disk on fire' in stderr

    # where the warning would be an error, it is logged
    stderr = run_python(BREAK, code, CHECK_UNKNOWN, cwd=tmp_path)
    assert 'Warning' not in stderr and 'Traceback' not in stderr
    assert stderr.count('timm_sepool could not register its models') == 1
    assert 'OSError: disk on fire' in stderr


def test_stubbed_timm(tmp_path: Path) -> None:
    """`import torch` works where timm is a stand-in without a spec, as in builds of documentation."""
    code = """
    import sys
    from unittest import mock
    sys.modules['timm'] = sys.modules['timm.models'] = mock.MagicMock()
    import torch
    """
    stderr = run_python(code, cwd=tmp_path, flags=())
    assert stderr.count('RuntimeWarning: timm_sepool could not register its models') == 1


ADDON = """
import importlib.util
import sys

class Finder:
    searching = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname != 'timm.models' or self.searching:
            return None
        self.searching = True
        spec = importlib.util.find_spec(fullname)
        self.searching = False
        exec_module = spec.loader.exec_module

        def exec_and_register(module):
            exec_module(module)
            from timm.models import register_model
            register_model(other_addon_net)

        spec.loader.exec_module = exec_and_register
        return spec

def other_addon_net(pretrained=False, **kwargs):
    pass

def install():
    if not any(isinstance(f, Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize('first, finders', [
    ('import timm_sepool', ['other_addon', 'timm_sepool._autoload']),
    ('import other_addon; other_addon.install()', ['timm_sepool._autoload', 'other_addon']),
], ids=['ours_behind', 'ours_in_front'])
def test_other_addon(first: str, finders: List[str], tmp_path: Path) -> None:
    """Another package with the same technique works beside us, whichever of the two finders asks the other."""
    (tmp_path / 'other_addon.py').write_text(ADDON)
    info = tmp_path / 'other_addon-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: other_addon\nVersion: 1.0\n')
    (info / 'entry_points.txt').write_text('[torch.backends]\nother_addon = other_addon:install\n')
    code = f"""
    import sys
    import torch
    found = [type(f).__module__ for f in sys.meta_path]
    assert [f for f in found if f in {finders}] == {finders}, found
    import timm
    assert timm.is_model('other_addon_net')
    """
    assert run_python(first, code, CHECK, cwd=tmp_path, path=[tmp_path]) == ''
