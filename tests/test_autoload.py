""" Registration without an import, with the real torch and timm in new processes

The programs run under `-W error`, where timm's 'Overwriting ... in registry' is an error, and must leave stderr empty.
"""
import multiprocessing
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import List, Sequence

import pytest

from helpers.common import NAMES

full = pytest.mark.full
# appended to a program: the models are registered and the hook is gone
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


def run(
        args: Sequence, cwd: Path, path: Sequence[Path] = (), autoload: bool = True, check: bool = True,
) -> subprocess.CompletedProcess:
    """Run a command in `cwd` outside the checkout, where only an installed package is found, or one in `path`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'TORCH_DEVICE_BACKEND'))}
    env.update(PYTHONPATH=os.pathsep.join(map(str, path)), TORCH_DEVICE_BACKEND_AUTOLOAD=str(int(autoload)))
    result = subprocess.run([str(a) for a in args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert not check or result.returncode == 0, f'{result.stdout}\n{result.stderr}'
    return result


def run_python(*code: str, cwd: Path, **kwargs) -> str:
    """Run the pieces of code as one program in a new process, return its stderr."""
    # os._exit saves the second that torch takes to shut down, and torch 2.5's ResourceWarning there
    program = '\n'.join(textwrap.dedent(c) for c in (*code, 'import os; os._exit(0)'))
    return run([sys.executable, '-W', 'error', '-c', program], cwd, **kwargs).stderr


def link_packages(folder: Path) -> None:
    """Link every installed package but this one into a folder."""
    for entry in (e for p in sys.path if p.endswith('-packages') for e in Path(p).iterdir()):
        if 'timm_sepool' not in entry.name and entry.suffix != '.pth' and not (folder / entry.name).exists():
            (folder / entry.name).symlink_to(entry)


FIRST = ['import torch', """
    import importlib.util, sys, torch
    path = importlib.util.find_spec('timm').submodule_search_locations
    assert any([finder.find_spec('timm.models', path) for finder in sys.meta_path])
    assert 'timm' not in sys.modules
    assert importlib.util.find_spec('timm.models')  # imports timm
    """]
OURS = [f'from timm_sepool{x}' for x in (
    '.sepool_resnet import SEPoolResNet', '.squeeze import RGSEModule', '.adopted import adopt', ' import SPSEModule',
    '.checkpoints import CheckpointError')]


@pytest.mark.parametrize('first, autoload', [
    ('', True),
    *(pytest.param(x, True, marks=full) for x in [*FIRST, *OURS]),  # ours import timm, which imports them
    *(pytest.param(x, False, marks=full) for x in OURS),
])
def test_import_timm(first: str, autoload: bool, tmp_path: Path) -> None:
    """`import timm` alone registers the models, whatever was imported or looked up before it."""
    assert run_python(first, 'import timm', CHECK, cwd=tmp_path, autoload=autoload) == ''


def test_imports_nothing_else(tmp_path: Path) -> None:
    """Python alone imports nothing of this package, and torch imports neither timm nor the models."""
    assert run_python("""
    import sys
    def imported(*names):
        return [m for m in sys.modules if m in names or m.startswith(tuple(f'{n}.' for n in names))]
    assert not imported('timm_sepool', 'timm', 'torch')
    import torch
    assert sorted(imported('timm_sepool', 'timm')) == ['timm_sepool', 'timm_sepool._autoload']
    """, cwd=tmp_path) == ''


RANK = 'import os, timm\nprint(os.environ["RANK"], timm.is_model("rgse_resnext50"))'
WORKER = """
import os
from torch.utils.data import DataLoader
class Data(list):
    def __getitem__(self, index):
        import timm
        return os.getpid(), timm.is_model('spse_resnet50')
if __name__ == '__main__':
    (pid, registered), = DataLoader(Data([0]), num_workers=1, multiprocessing_context='{}')
    print(pid.item() != os.getpid(), registered.item())
"""


@pytest.mark.parametrize('launcher, program, printed', [
    ('-m torch.distributed.run --standalone --nproc_per_node 2', RANK, ['0 True', '1 True']),
    *(pytest.param('', WORKER.format(x), ['True True'], marks=full) for x in multiprocessing.get_all_start_methods()),
])
def test_other_processes(launcher: str, program: str, printed: List[str], tmp_path: Path) -> None:
    """The models are registered in every process that torch.distributed.run or a DataLoader starts."""
    (tmp_path / 'train.py').write_text(program)
    out = run([sys.executable, *launcher.split(), 'train.py'], tmp_path).stdout
    assert sorted(out.splitlines()) == printed
