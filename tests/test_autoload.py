""" Registration without an import

Every claim is about what happens while Python, torch and timm are imported, so each is tested in a process of its own.
The programs run under `-W error`, where timm's 'Overwriting ... in registry' would be a failed registration, and have
to leave stderr empty.
"""
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path
from typing import Sequence

import pytest

from helpers.common import NAMES

ROOT = Path(__file__).resolve().parents[1]

# appended to a program: the models are known and the hook has left no trace
CHECK = f"""
import sys
import timm
import torch
names = {NAMES}
assert sorted(timm.list_models(['*gse_*', 'spse_*'])) == sorted(names), timm.list_models(['*gse_*', 'spse_*'])
assert sorted(timm.list_models(module='sepool_resnet')) == sorted(names)
assert timm.list_models(module='adopted') == ['adopted']
assert all(timm.is_model(name) for name in names)
with torch.device('meta'):
    for name in ('rgse_resnet50', 'spse_resnet50'):
        assert type(timm.create_model(name)).__module__ == 'timm_sepool.sepool_resnet'
assert not [f for f in sys.meta_path if type(f).__module__.startswith('timm_sepool')], sys.meta_path
assert type(timm.models.__loader__) is type(timm.models.__spec__.loader) is type(timm.layers.__loader__)
"""

# appended to a program: timm is as if we were not there
CHECK_UNKNOWN = f"""
import timm
assert not timm.list_models(['*gse_*', 'spse_*'])
assert not any(timm.is_model(name) for name in {[*NAMES, 'adopted']})
"""


def run(
        args: Sequence[str],
        cwd: Path,
        path: Sequence[Path] = (),
        autoload: bool = True,
) -> subprocess.CompletedProcess:
    """Run a command away from the checkout, which must not serve as the installed package. Fails if the command does.

    Args:
        args: The command.
        cwd: Directory to run in.
        path: Directories to put first on the module search path.
        autoload: Leave torch's autoload mechanism on, which is its default.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'TORCH_DEVICE_BACKEND'))}
    env['PYTHONPATH'] = os.pathsep.join(str(p) for p in path)
    if not autoload:
        env['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'
    # no import takes that long, only one that waits for itself
    result = subprocess.run([str(a) for a in args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f'{result.stdout}\n{result.stderr}'
    return result


def run_python(
        *code: str,
        cwd: Path,
        path: Sequence[Path] = (),
        autoload: bool = True,
        flags: Sequence[str] = ('-W', 'error'),
        python: str = sys.executable,
) -> str:
    """Run the pieces of code as one program in a fresh process, returns its stderr."""
    # the exit spares the second that torch takes to shut down, and torch 2.5's own ResourceWarning there
    program = '\n'.join(textwrap.dedent(c) for c in (*code, 'import os; os._exit(0)'))
    return run([python, *flags, '-c', program], cwd=cwd, path=path, autoload=autoload).stderr


@pytest.mark.parametrize('first', [
    '',
    'import torch',
    """
    import importlib.util, sys, torch
    path = importlib.util.find_spec('timm').submodule_search_locations
    assert any([finder.find_spec('timm.models', path) for finder in sys.meta_path])
    assert 'timm' not in sys.modules
    assert importlib.util.find_spec('timm.models')  # imports timm
    """,
], ids=['timm', 'torch', 'find_spec'])
def test_import_timm(first: str, tmp_path: Path) -> None:
    """timm alone is enough, whatever was imported or looked up before it."""
    assert run_python(first, 'import timm', CHECK, cwd=tmp_path) == ''


@pytest.mark.parametrize('autoload', [True, False], ids=['autoload', 'no_autoload'])
@pytest.mark.parametrize('first', [
    'from timm_sepool import SPSEModule',
    'from timm_sepool.squeeze import RGSEModule',
    'from timm_sepool.sepool_resnet import SEPoolResNet',
    'from timm_sepool.adopted import adopt',
])
def test_import_ours_first(first: str, autoload: bool, tmp_path: Path) -> None:
    """Our modules import timm, which imports our modules."""
    assert run_python(first, CHECK, cwd=tmp_path, autoload=autoload) == ''


def test_imports_nothing_else(tmp_path: Path) -> None:
    """Python alone imports nothing of ours, torch neither timm nor our models."""
    code = """
    import sys
    def imported(*names):
        return [m for m in sys.modules if m in names or m.startswith(tuple(f'{n}.' for n in names))]
    assert not imported('timm_sepool', 'timm', 'torch')
    import torch
    assert sorted(imported('timm_sepool', 'timm')) == ['timm_sepool', 'timm_sepool._autoload']
    """
    assert run_python(code, cwd=tmp_path) == ''


def test_idempotent(tmp_path: Path) -> None:
    """There is one hook, and neither importing nor reloading anything registers the models twice."""
    code = """
    import importlib
    import sys
    import torch
    import timm_sepool
    from timm_sepool._autoload import install
    install()
    assert [type(f).__module__ for f in sys.meta_path].count('timm_sepool._autoload') == 1
    import timm
    entrypoint = timm.model_entrypoint('spse_resnet50')
    install()
    importlib.reload(timm.models)
    importlib.reload(timm)
    importlib.reload(timm_sepool)
    importlib.reload(timm_sepool._autoload).install()
    import timm_sepool.sepool_resnet
    assert timm.model_entrypoint('spse_resnet50') is entrypoint
    """
    assert run_python(code, CHECK, cwd=tmp_path) == ''


def check_file(expected: Path) -> str:
    """Code to append to a program: timm_sepool was imported from there."""
    return f'import timm_sepool; assert timm_sepool.__file__ == {str(expected)!r}, timm_sepool.__file__'


def test_editable(tmp_path: Path) -> None:
    sources = tmp_path / 'sources'
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns('.*', 'tests'))
    run([sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'venv'], cwd=tmp_path)
    scheme = {'base': str(tmp_path / 'venv'), 'platbase': str(tmp_path / 'venv')}
    python = Path(sysconfig.get_path('scripts', vars=scheme)) / Path(sys.executable).name
    # everything installed here but this project itself, which might be found first
    site_packages = Path(sysconfig.get_path('purelib', vars=scheme))
    for entry in Path(sysconfig.get_path('purelib')).iterdir():
        if 'timm_sepool' not in entry.name:
            (site_packages / entry.name).symlink_to(entry)
    pip = [sys.executable, '-m', 'pip', '--python', python]
    run([*pip, 'install', '--quiet', '--no-deps', '-e', sources], cwd=tmp_path)
    code = ('import timm', CHECK, check_file(sources / 'timm_sepool' / '__init__.py'))
    assert run_python(*code, cwd=tmp_path, python=str(python)) == ''


def test_distributed(tmp_path: Path) -> None:
    """Each process of a launcher knows the models."""
    (tmp_path / 'train.py').write_text(textwrap.dedent("""
    import os
    import timm
    import torch
    with torch.device('meta'):
        model = timm.create_model('rgse_resnext50')
    print(f'rank {os.environ["RANK"]} {type(model).__name__}')
    """))
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    stdout = run([*launcher, 'train.py'], cwd=tmp_path).stdout
    assert sorted(stdout.splitlines()) == ['rank 0 SEPoolResNet', 'rank 1 SEPoolResNet']


def test_data_loader_workers(tmp_path: Path) -> None:
    """Workers of every start method know the models, a forked one imports timm itself too."""
    (tmp_path / 'train.py').write_text(textwrap.dedent("""
    import multiprocessing
    import os
    import sys
    from torch.utils.data import DataLoader, Dataset

    class Data(Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            import timm
            return os.getpid(), timm.is_model('spse_resnet50')

    if __name__ == '__main__':
        for context in multiprocessing.get_all_start_methods():
            (pid, known), = DataLoader(Data(), num_workers=1, multiprocessing_context=context)
            assert pid != os.getpid() and known, context
            print(context)
        assert 'timm' not in sys.modules
    """))
    contexts = run([sys.executable, 'train.py'], cwd=tmp_path).stdout.split()
    assert 'spawn' in contexts and (os.name == 'nt' or 'fork' in contexts)
