""" What breaks while the models are registered

A failure of this package never breaks `import torch` or `import timm`. It gives one RuntimeWarning or, where warnings
are errors, one line in the log. Each case starts new processes, and importing torch and timm takes three CPU seconds.
So the default run uses small stand-ins (`STAND_INS`) for torch, of which only the call of the entry points matters, for
timm, of which only the registry matters, and for the two modules that register the models. --full runs every case with
the real ones instead; tests/test_autoload.py always does.
"""
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Dict, List, Sequence, Tuple

import pytest
from test_autoload import link_packages

from helpers.common import FULL, NAMES

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = {
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
        is_model = models.__contains__
        def create_model(name): return models[name]()
        """,
    'timm/models/resnet.py': """
        from timm.models import register_model
        class ResNet: pass
        @register_model
        def resnet18(): return ResNet()
        """,
    'timm_sepool/sepool_resnet.py': f"""
        from timm.layers import get_attn
        from timm.models import register_model
        class SEPoolResNet: pass
        for name in {NAMES}:
            exec(f'def {{name}}(): return SEPoolResNet()')
            register_model(globals()[name])
        """,
    'timm_sepool/adopted.py': """
        from timm.models import register_model
        @register_model
        def adopted(): pass
        """,
}

# put in front of each program
PRELUDE = f"""
import contextlib, importlib, importlib.machinery, importlib.util, os, sys, threading, warnings
NAMES = {NAMES}
def registered():
    '''Whether the ten networks are registered, and whether `adopted` is. Fails if timm does not work.'''
    import timm
    assert type(timm.create_model('resnet18')).__name__ == 'ResNet'
    networks, = {{timm.is_model(name) for name in NAMES}}
    return networks, timm.is_model('adopted')
def is_ours(finder):
    return type(finder).__module__ == 'timm_sepool._autoload'
def hooks():
    return sum(map(is_ours, sys.meta_path))
@contextlib.contextmanager
def raises(*errors):
    try:
        yield
    except errors:
        return
    raise AssertionError('not raised')
class Trap:
    '''A finder that finds nothing, but calls `action(name)` when one of the modules is looked for.'''
    def __init__(self, action, *names):
        self.action, self.names = action, names
        sys.meta_path.insert(0, self)
    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            self.action(name)
def throw(error):
    raise error
"""
REGISTERED = """
assert registered() == (True, True), registered()
assert not hooks(), sys.meta_path
"""
NOT_REGISTERED = 'assert registered() == (False, False), registered()'
# timm modules that were imported before register their models a second time, and timm warns of it
TIMM_AGAIN = "if 'torch.nn' in sys.modules: warnings.simplefilter('ignore')"
AUTOLOAD_OFF = dict(TORCH_DEVICE_BACKEND_AUTOLOAD='0')


class Tree:
    """The package and all it needs, installed in a folder where a test may break it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / 'timm_sepool'
        shutil.copytree(ROOT / 'timm_sepool', self.package, ignore=shutil.ignore_patterns('__pycache__'))
        self.add_entry_point('timm_sepool', 'timm_sepool._autoload:install')
        if FULL:
            link_packages(folder)
        else:
            for name, text in STAND_INS.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(textwrap.dedent(text))

    def add_entry_point(self, name: str, target: str) -> None:
        info = self.folder / f'{name}-1.0.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
        (info / 'entry_points.txt').write_text(f'[torch.backends]\n{name} = {target}\n')

    def run(self, *code: str, flags: Sequence[str] = (), env: Dict[str, str] = {}):  # noqa: B006
        """Run code that finds nothing but Python itself and the tree."""
        program = '\n'.join(textwrap.dedent(c) for c in (PRELUDE, *code))
        environ = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'TORCH_DEVICE_BACKEND'))}
        environ.update(PYTHONPATH=str(self.folder), PYTHONDONTWRITEBYTECODE='1')
        if '-I' in flags:
            program = f'import sys; sys.path.insert(0, {str(self.folder)!r})\n{program}'
        return subprocess.run(
            [sys.executable, '-S', *flags, '-c', program], cwd=self.folder.parent, env={**environ, **env},
            capture_output=True, text=True, timeout=300)

    def quiet(self, *code: str, flags: Sequence[str] = ('-W', 'error'), **kwargs) -> None:
        """Run code that succeeds and prints nothing on stderr."""
        result = self.run(*code, flags=flags, **kwargs)
        assert (result.returncode, result.stderr) == (0, ''), result.stderr

    def warns(self, *code: str, message: str = '') -> None:
        """Run code that succeeds with one warning and, under -W error, with one line in the log."""
        start = 'timm_sepool could not register its models: '
        for flags in ((), ('-W', 'error')):
            result = self.run(*code, flags=flags)
            assert result.returncode == 0, result.stderr
            assert result.stderr.count(start) == 1 and message in result.stderr, result.stderr
            assert result.stderr.count('Warning: ') == (0 if flags else 1) and 'Traceback' not in result.stderr
            assert flags or f'RuntimeWarning: {start}' in result.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / 'site')


# --- files of this package

FAULTS: Dict[str, Tuple] = {  # content of the file, part of the message
    'missing': (None, 'ModuleNotFoundError: '),
    'syntax_error': (b'def f(:\n', 'SyntaxError: '),
    'null_bytes': (b'x = 1\0\n', ''),
    'not_utf8': (b'x = "\xff\xfe"\n', ''),
    'import_error': (b'raise ImportError("no such name")', 'ImportError: no such name'),
    'system_exit': (b'raise SystemExit(3)', 'SystemExit: 3'),
    'recursion_error': (b'def f(): f()\nf()', 'RecursionError: '),
    'memory_error': (b'raise MemoryError', 'MemoryError: '),
    'timm_too_old': (b'from timm.layers import get_new', "cannot import name 'get_new' from 'timm.layers'"),
    'os_error': (b'raise OSError("disk on fire")', 'OSError: disk on fire'),
}


@pytest.mark.parametrize('file, fault, first', [
    *(('sepool_resnet', fault, 'timm') for fault in FAULTS),
    ('sepool_resnet', 'missing', 'torch'), ('sepool_resnet', 'missing', 'timm_sepool'),
    *(('adopted', fault, 'timm') for fault in ('missing', 'syntax_error', 'system_exit')),
])
def test_broken_module(tree: Tree, file: str, fault: str, first: str) -> None:
    """Without sepool_resnet.py nothing is registered, without adopted.py the ten networks are."""
    content, message = FAULTS[fault]
    path = tree.package / f'{file}.py'
    path.unlink() if content is None else path.write_bytes(content)
    check = f'assert registered() == ({file == "adopted"}, False) and not hooks()'
    tree.warns(f'import {first}', check, message=message)


@pytest.mark.parametrize('keep', [[], ['__init__.py']], ids=['package', '_autoload'])
def test_removed_package(tree: Tree, keep: List[str]) -> None:
    """torch fails if the files are gone and the dist-info stays: its error names the package, and its switch works."""
    for file in tree.package.iterdir():
        if file.name not in keep:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    if not keep:
        tree.package.rmdir()
    result = tree.run('import torch')
    assert result.returncode == 1
    assert 'RuntimeError: Failed to load the backend extension: timm_sepool' in result.stderr
    assert "No module named 'timm_sepool" in result.stderr
    tree.quiet(NOT_REGISTERED, env=AUTOLOAD_OFF)


# --- timm

def test_timm_missing(tree: Tree) -> None:
    (tree.folder / 'timm').unlink() if FULL else shutil.rmtree(tree.folder / 'timm')
    tree.quiet("""
    import torch, timm_sepool
    for module in ('timm', 'timm.models', 'timm_sepool.sepool_resnet'):
        with raises(ModuleNotFoundError):
            importlib.import_module(module)
    """)


def test_timm_stubbed(tree: Tree) -> None:
    """timm is a mock without a spec, as in builds of documentation."""
    tree.warns("""
    from unittest import mock
    sys.modules['timm'] = sys.modules['timm.models'] = mock.MagicMock()
    import torch
    """)


# --- the import system

HOOKS = {
    'wraps_loaders': """
        class Loader:
            def __init__(self, loader): self.loader = loader
            def __getattr__(self, name): return getattr(self.loader, name)
        class Hook:
            def find_spec(self, fullname, path=None, target=None):
                for finder in [f for f in sys.meta_path if f is not self]:
                    if spec := finder.find_spec(fullname, path, target):
                        if spec.loader and fullname.startswith('timm.'):
                            spec.loader = Loader(spec.loader)
                        return spec
        """,
    'lazy_loader': """
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
            def find_module(self, fullname, path=None): pass
        """,
    'returns_none': """
        class Hook:
            def find_spec(self, fullname, path=None, target=None): pass
        """,
    'raises': """
        class Hook:
            def find_spec(self, fullname, path=None, target=None):
                if fullname == 'timm.models': raise ZeroDivisionError('hook')
        """,
}


@pytest.mark.parametrize('in_front', [True, False], ids=['in_front', 'behind'])
@pytest.mark.parametrize('hook', HOOKS)
def test_import_hook(tree: Tree, hook: str, in_front: bool) -> None:
    """An import hook of another package, in front of ours or behind it."""
    insert = 'sys.meta_path.insert(0, Hook())'
    code = ('import torch', insert) if in_front else (insert, 'import timm_sepool, torch')
    # its error is the one that is seen, and the models are registered once it is gone
    error = """
    with raises(ZeroDivisionError): import timm
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, Hook)]
    """ if hook == 'raises' else ''
    flags = ('-W', 'error', '-W', 'ignore::ImportWarning')  # Python's own, of finders without find_spec
    tree.quiet(HOOKS[hook], *code, error, 'registered()', REGISTERED, flags=flags)


@pytest.mark.parametrize('finders', [
    ['other_addon', 'timm_sepool._autoload'], ['timm_sepool._autoload', 'other_addon']], ids=lambda f: f'{f[0]}_first')
def test_other_addon(tree: Tree, finders: List[str]) -> None:
    """Another package that registers models in the same way, whichever of the two finders asks the other."""
    (tree.folder / 'other_addon.py').write_text(textwrap.dedent("""
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
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (load(module), module.register_model(other_addon_net))
            return spec

    def other_addon_net(pretrained=False, **kwargs):
        pass

    def install():
        if not any(isinstance(f, Finder) for f in sys.meta_path):
            sys.meta_path.insert(0, Finder())
    """))
    tree.add_entry_point('other_addon', 'other_addon:install')
    first = 'import timm_sepool' if finders[0] == 'other_addon' else 'import other_addon; other_addon.install()'
    tree.quiet(first, f"""
    import torch
    found = [type(f).__module__ for f in sys.meta_path]
    assert [f for f in found if f in {finders}] == {finders}, found
    import timm
    assert timm.is_model('other_addon_net')
    """, REGISTERED)


def test_meta_path_is_a_tuple(tree: Tree) -> None:
    """The hook cannot be added or removed: torch and timm can be imported all the same."""
    freeze = 'sys.meta_path = tuple(sys.meta_path)'
    tree.warns(freeze, 'import torch', NOT_REGISTERED)
    tree.warns('import torch', freeze, 'assert registered() == (True, True)')



OFF = "os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'"
REMOVE_HOOK = 'sys.meta_path[:] = [f for f in sys.meta_path if not is_ours(f)]'
RELOAD = 'importlib.reload(timm_sepool); importlib.reload(timm_sepool._autoload).install()'
# Programs that print nothing on stderr, at whose end the models are registered and the hook is gone
PROGRAMS = {
    **{f'{error}_in_{module}': f"""
        # the import of timm.models fails in the middle and is tried again
        import torch
        trap = Trap(lambda name: throw({error}('half')), {module!r})
        with raises({error}): import timm
        assert 'timm.models' not in sys.modules and hooks() == 1
        sys.meta_path.remove(trap)
        {TIMM_AGAIN}
        """ for module, error in (
            ('timm.models.resnet', 'ImportError'), ('timm.models.resnet', 'MemoryError'),
            ('timm.models.resnet', 'KeyboardInterrupt'), ('timm_sepool.sepool_resnet', 'KeyboardInterrupt'))},
    'timm_imported_before': f"""
        import torch, timm_sepool
        {REMOVE_HOOK}
        {NOT_REGISTERED}
        timm_sepool._install()
        """,
    'timm_barred': """
        import torch
        sys.modules['timm.models'] = None
        with raises(ModuleNotFoundError): import timm
        assert hooks() == 1
        del sys.modules['timm.models']
        """,
    'hook_asks_nobody': f"""
        # it finds timm itself, so ours is not asked: timm works, an import of our modules registers the models
        import torch
        class Hook:
            find_spec = importlib.machinery.PathFinder.find_spec
        sys.meta_path.insert(0, Hook())
        {NOT_REGISTERED}
        import timm_sepool.sepool_resnet, timm_sepool.adopted
        {REMOVE_HOOK}
        """,
    'loader_without_exec_module': f"""
        # of the old kind, it is left alone: timm works
        warnings.simplefilter('ignore')
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
                    return importlib.machinery.ModuleSpec(fullname, Loader(spec), is_package=True)
        import torch
        sys.meta_path.insert(1, Hook())
        {NOT_REGISTERED}
        import timm_sepool.sepool_resnet, timm_sepool.adopted
        {REMOVE_HOOK}
        """,
    'meta_path_cleared': """
        import torch
        saved = sys.meta_path[:]
        sys.meta_path.clear()
        with raises(ImportError, ImportWarning): import timm
        sys.meta_path[:] = saved
        """,
    'unpickled': """
        # a class of ours is the first thing that is imported
        import pickle
        assert pickle.loads(b'ctimm_sepool.sepool_resnet\\nSEPoolResNet\\n.').__name__ == 'SEPoolResNet'
        """,
    'autoload_off': f"""
        {OFF}
        {NOT_REGISTERED}
        import timm_sepool
        """,
    'autoload_off_ours_first': f"""
        {OFF}
        import timm_sepool
        """,
    'installed_and_reloaded_often': f"""
        import torch, timm_sepool
        timm_sepool._install()
        assert hooks() == 1
        {RELOAD}
        import timm
        function = vars(sys.modules['timm_sepool.sepool_resnet'])[NAMES[0]]
        timm_sepool._install()
        importlib.reload(timm.models)
        importlib.reload(timm)
        {RELOAD}
        import timm_sepool.sepool_resnet
        assert getattr(timm_sepool.sepool_resnet, NAMES[0]) is function
        """,
    **{f'thread_imports_{module}': f"""
        # while timm is half-imported: it waits for timm.models, which waits for it
        import time
        {'' if autoload else OFF}
        threads = []
        def start(name):
            threads.append(threading.Thread(target=importlib.import_module, args=({module!r},), daemon=True))
            threads[0].start()
            time.sleep(0.5)
        Trap(start, 'timm.models.resnet')
        import timm
        threads[0].join(60)
        assert not threads[0].is_alive() and {module!r} in sys.modules
        """ for module, autoload in (('timm_sepool.sepool_resnet', True), ('timm_sepool', False))},
    'deadlock_of_threads': f"""
        # Python found another thread that imports our modules and waits for timm.models: it will register the models
        from importlib._bootstrap import _DeadlockError
        import torch
        trap = Trap(lambda name: throw(_DeadlockError()), 'timm_sepool.sepool_resnet', 'timm_sepool.adopted')
        {NOT_REGISTERED}
        sys.meta_path.remove(trap)
        import timm_sepool.sepool_resnet, timm_sepool.adopted
        """,
    **{f'{number}_threads_{shift}': f"""
        # they import torch, timm and our package at the same time, each in another order
        import itertools
        sys.setswitchinterval(1e-6)
        # no submodules: Python may report a deadlock between the import of one and of its package
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
        """ for number in (2, 8) for shift in (0, 2, 4)},
}


@pytest.mark.parametrize('program', PROGRAMS)
def test_program(tree: Tree, program: str) -> None:
    tree.quiet(PROGRAMS[program], REGISTERED)


# --- the interpreter

def test_zip(tree: Tree, tmp_path: Path) -> None:
    archive = tmp_path / 'timm_sepool.zip'
    with zipfile.ZipFile(archive, 'w') as f:
        for file in tree.package.glob('*.py'):
            f.write(file, f'timm_sepool/{file.name}')
    shutil.rmtree(tree.package)
    tree.quiet(f'sys.path.insert(0, {str(archive)!r})', REGISTERED, f"""
    import timm_sepool.adopted
    assert timm_sepool.adopted.__file__.startswith({str(archive)!r})
    """)


@pytest.mark.parametrize('flags', ['-I', '-O', '-OO', '-B', '-X importtime', '-X dev'])
def test_interpreter_flags(tree: Tree, flags: str) -> None:
    check = 'if registered() != (True, True) or hooks(): raise SystemExit(1)'  # -O removes assert
    result = tree.run(check, flags=flags.split())
    assert result.returncode == 0 and 'Warning' not in result.stderr and 'Error' not in result.stderr, result.stderr


def test_read_only_installation(tree: Tree) -> None:
    """A user other than root, who cannot write byte code."""
    root = os.geteuid() == 0
    if root and FULL:
        pytest.skip('root may have a Python that no other user can read')
    with TemporaryDirectory() as temporary:
        if root:
            Path(temporary).chmod(0o755)  # only their owner can read pytest's folders
            tree = Tree(Path(temporary) / 'site')
        folders = [p for p in (tree.folder, *tree.folder.rglob('*')) if p.is_dir() and not p.is_symlink()]
        for folder in folders:
            folder.chmod(0o555)
        # that user may be unable to read Python itself, so this much of it is loaded before
        load = 'import importlib.metadata, logging\nimportlib.metadata.entry_points()'
        tree.quiet(f'{load}\nos.setuid(65534)' if root else '', 'sys.dont_write_bytecode = False', REGISTERED)
        assert not list(tree.package.glob('__pycache__'))
        for folder in folders:
            folder.chmod(0o755)


def test_import_at_exit(tree: Tree) -> None:
    """timm is imported by an exit handler."""
    tree.quiet(f'import atexit, torch\natexit.register(exec, {REGISTERED!r}, globals())')
