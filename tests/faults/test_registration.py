""" What breaks while the models are registered: `import torch` and `import timm` work, with one warning or line of log

Each case starts processes that import torch and timm, which takes seconds, so most cases run with --full only.
"""
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Collection, Dict, Iterable, List, Sequence, Tuple

import pytest
from test_autoload import link_packages, run

from helpers.common import NAMES

ROOT = Path(__file__).resolve().parents[2]
# put in front of each program
PRELUDE = f"""
import importlib, importlib.machinery, importlib.util, os, sys, threading, time, unittest, warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
NAMES = {NAMES}
def registered():
    '''Whether the ten networks are registered, and whether `adopted` is. Fails if timm does not work.'''
    import timm
    assert type(timm.create_model('resnet18')).__name__ == 'ResNet'
    networks, = {{timm.is_model(name) for name in NAMES}}
    return networks, timm.is_model('adopted')
def hooks():
    return [f for f in sys.meta_path if type(f).__module__ == 'timm_sepool._autoload']
def remove_hook():
    sys.meta_path[:] = [f for f in sys.meta_path if f not in hooks()]
raises = unittest.TestCase().assertRaises
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
def other_net(pretrained=False, **kwargs):
    pass
"""
REGISTERED = """
assert registered() == (True, True), registered()
assert not hooks(), sys.meta_path
"""
NOT_REGISTERED = 'assert registered() == (False, False), registered()'


def mark_full(cases: Iterable, default: Collection) -> List:
    """The cases, of which only those in `default` run without --full."""
    return [case if case in default else pytest.param(
        *(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full) for case in cases]


class Tree:
    """The package and all it needs, installed in a folder where a test may break it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / 'timm_sepool'
        shutil.copytree(ROOT / 'timm_sepool', self.package, ignore=shutil.ignore_patterns('__pycache__'))
        info = folder / 'timm_sepool-1.0.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: timm_sepool\nVersion: 1.0\n')
        (info / 'entry_points.txt').write_text('[torch.backends]\ntimm_sepool = timm_sepool._autoload:install\n')
        link_packages(folder)

    def run(self, *code: str, flags: Sequence[str] = (), autoload: bool = True) -> subprocess.CompletedProcess:
        """Run code that finds nothing but Python itself and the tree."""
        path = f'import sys; sys.path.insert(0, {str(self.folder)!r})'  # -I ignores PYTHONPATH
        program = '\n'.join(textwrap.dedent(c) for c in (path, PRELUDE, *code, 'os._exit(0)'))  # saves torch's shutdown
        return run([sys.executable, '-S', *flags, '-c', program], self.folder.parent, autoload=autoload, check=False)

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


FAULTS: Dict[str, Tuple] = {  # content of the file, part of the message
    'missing': (None, 'ModuleNotFoundError: '),
    'syntax_error': (b'def f(:\n', 'SyntaxError: '),
    'import_error': (b'raise ImportError("no such name")', 'ImportError: no such name'),
    'system_exit': (b'raise SystemExit(3)', 'SystemExit: 3'),
    'recursion_error': (b'def f(): f()\nf()', 'RecursionError: '),
    'memory_error': (b'raise MemoryError', 'MemoryError: '),
    'timm_too_old': (b'from timm.layers import get_new', "cannot import name 'get_new' from 'timm.layers'"),
    'os_error': (b'raise OSError("disk on fire")', 'OSError: disk on fire'),
}


@pytest.mark.parametrize('file, fault, first', mark_full([
    *(('sepool_resnet', fault, 'timm') for fault in FAULTS),
    ('sepool_resnet', 'missing', 'torch'), ('sepool_resnet', 'missing', 'timm_sepool'),
    *(('adopted', fault, 'timm') for fault in ('missing', 'syntax_error', 'system_exit')),
], default=[('sepool_resnet', 'timm_too_old', 'timm')]))
def test_broken_module(tree: Tree, file: str, fault: str, first: str) -> None:
    """Without sepool_resnet.py nothing is registered, without adopted.py the ten networks are."""
    content, message = FAULTS[fault]
    path = tree.package / f'{file}.py'
    path.unlink() if content is None else path.write_bytes(content)
    check = f'assert registered() == ({file == "adopted"}, False) and not hooks()'
    tree.warns(f'import {first}', check, message=message)


@pytest.mark.full
@pytest.mark.parametrize('removed', ['.', '_autoload.py'])
def test_removed_package(tree: Tree, removed: str) -> None:
    """torch fails if the files are gone and the dist-info stays: its error names the package, and its switch works."""
    path = tree.package / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    result = tree.run('import torch')
    assert result.returncode == 1
    assert 'RuntimeError: Failed to load the backend extension: timm_sepool' in result.stderr
    assert "No module named 'timm_sepool" in result.stderr
    tree.quiet(NOT_REGISTERED, autoload=False)


def test_timm_missing(tree: Tree) -> None:
    (tree.folder / 'timm').unlink()
    tree.quiet("""
    import torch, timm_sepool
    for module in ('timm', 'timm.models', 'timm_sepool.sepool_resnet'):
        raises(ModuleNotFoundError, importlib.import_module, module)
    """)


FREEZE = 'sys.meta_path = tuple(sys.meta_path)'


@pytest.mark.full
@pytest.mark.parametrize('code', [
    ("import unittest.mock; sys.modules['timm.models'] = sys.modules['timm'] = unittest.mock.Mock()", 'import torch'),
    (FREEZE, 'import torch', NOT_REGISTERED),
    ('import torch', FREEZE, 'assert registered() == (True, True)'),
], ids=['timm_is_a_mock', 'hook_not_added', 'hook_not_removed'])
def test_warning(tree: Tree, code: Tuple[str, ...]) -> None:
    tree.warns(*code)


HOOKS = {  # bodies of find_spec(self, name, path=None, target=None)
    'lazy_loader': """
        for finder in [f for f in sys.meta_path if f is not self and name == 'timm.models']:
            if spec := finder.find_spec(name, path, target):
                spec.loader = importlib.util.LazyLoader(spec.loader)
                return spec
        """,
    'legacy': 'return None',  # has find_module instead
    'raises': "if name == 'timm.models': raise ZeroDivisionError('hook')",
    'other_addon': """
        # registers models as we do
        if name == 'timm.models' and not vars(self).get('searching'):
            self.searching = True
            spec = importlib.util.find_spec(name)
            self.searching = False
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (load(module), module.register_model(other_net))
            return spec
        """,
}


@pytest.mark.parametrize('hook, place', mark_full(
    [(hook, place) for place in ('in_front', 'behind') for hook in HOOKS], default=[('lazy_loader', 'in_front')]))
def test_import_hook(tree: Tree, hook: str, place: str) -> None:
    """An import hook of another package, in front of ours or behind it."""
    insert = 'sys.meta_path.insert(0, Hook())'
    code = ('import torch', insert) if place == 'in_front' else (insert, 'import timm_sepool, torch')
    check = {
        'other_addon': "import timm; assert timm.is_model('other_net')",
        'raises': """
            # its error is the one that is seen, and the models are registered once it is gone
            with raises(ZeroDivisionError): import timm
            sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, Hook)]
            """,
    }.get(hook, '')
    flags = ('-W', 'error', '-W', 'ignore::ImportWarning')  # Python's own, of finders without find_spec
    method = 'find_module(self, name, path)' if hook == 'legacy' else 'find_spec(self, name, path=None, target=None)'
    code = (f'class Hook:\n    def {method}:\n{textwrap.indent(HOOKS[hook], " " * 8)}', *code)
    tree.quiet(*code, check, 'registered()', REGISTERED, flags=flags)


OFF = "os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'"
BY_HAND = f'{NOT_REGISTERED}; import timm_sepool.sepool_resnet, timm_sepool.adopted; remove_hook()'
RELOAD = 'importlib.reload(timm_sepool); importlib.reload(timm_sepool._autoload).install()'
# Programs that print nothing on stderr, at whose end the models are registered and the hook is gone
PROGRAMS = {
    **{f'{error}_in_{module}': f"""
        # the import of timm.models fails in the middle and is tried again
        import torch
        trap = Trap(lambda name: throw({error}('half')), {module!r})
        with raises({error}): import timm
        assert 'timm.models' not in sys.modules and len(hooks()) == 1
        sys.meta_path.remove(trap)
        warnings.simplefilter('ignore')  # timm's: the modules that were imported register their models again
        """ for module, error in (
            ('timm.models.resnet', 'ImportError'), ('timm.models.resnet', 'MemoryError'),
            ('timm.models.resnet', 'KeyboardInterrupt'), ('timm_sepool.sepool_resnet', 'KeyboardInterrupt'))},
    'timm_imported_before': f"""
        import torch, timm_sepool
        remove_hook()
        {NOT_REGISTERED}
        timm_sepool._install()
        """,
    'hook_asks_nobody': f"""
        # it finds timm itself, so ours is not asked: timm works, an import of our modules registers the models
        import torch
        class Hook:
            find_spec = importlib.machinery.PathFinder.find_spec
        sys.meta_path.insert(0, Hook())
        {BY_HAND}
        """,
    'installed_and_reloaded_often': f"""
        import torch, timm_sepool
        timm_sepool._install()
        assert len(hooks()) == 1
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
        {'' if autoload else OFF}
        pool, started = ThreadPoolExecutor(1), []
        def start(name):
            started.append(pool.submit(importlib.import_module, {module!r}))
            time.sleep(0.5)
        Trap(start, 'timm.models.resnet')
        import timm
        assert started[0].result(60).__name__ == {module!r}
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
        sys.setswitchinterval(1e-6)
        # no submodules: Python may report a deadlock between the import of one and of its package
        orders, barrier = list(permutations(['torch', 'timm', 'timm_sepool']))[{shift}:], threading.Barrier({number})
        def work(i):
            barrier.wait()
            for module in orders[i % len(orders)]:
                importlib.import_module(module)
        with ThreadPoolExecutor({number}) as pool:
            list(pool.map(work, range({number})))  # raises what one of them raised
        """ for number, shift in ((2, 0), (2, 2), (2, 4), (8, 0))},
    'import_at_exit': f"""
        import atexit, torch
        atexit.register(exec, {REGISTERED!r}, globals())
        sys.exit()
        """,
}
DEFAULT = ['KeyboardInterrupt_in_timm_sepool.sepool_resnet', 'thread_imports_timm_sepool.sepool_resnet']


@pytest.mark.parametrize('program', mark_full(PROGRAMS, DEFAULT))
def test_program(tree: Tree, program: str) -> None:
    tree.quiet(PROGRAMS[program], REGISTERED)


@pytest.mark.parametrize('flags', mark_full(['-I', '-O', '-OO', '-B', '-X importtime', '-X dev'], default=['-OO']))
def test_flags_and_read_only_installation(tree: Tree, flags: str) -> None:
    """Of a user who, unless it is root, cannot write byte code."""
    check = 'if registered() != (True, True) or hooks(): raise SystemExit(1)'  # -O removes assert
    tree.package.chmod(0o555)
    result = tree.run(check, flags=flags.split())
    tree.package.chmod(0o755)
    assert result.returncode == 0 and 'Warning' not in result.stderr and 'Error' not in result.stderr, result.stderr
