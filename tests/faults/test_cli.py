""" What breaks while `timm-sepool` runs: signals, streams, disks, folders, locales, other processes

After each fault the exit code is the usual one, stderr holds one line, and the folder is as it was before or holds the
complete output. Signals are raised at a call of a function, not after a time, in forks of one process (see `forked`).
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import pytest
import torch
from PIL import Image

from helpers.common import tiny
from helpers.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[2]
FULL = bool(os.environ['TIMM_SEPOOL_FULL_TESTS'])  # every signal at every point of every command
SIGNALS = {'SIGINT': (130, 'interrupted\n'), 'SIGTERM': (143, 'terminated\n')}

TINY_ARGS = ['--model-kwargs', 'layers=(1,1,1,1)', 'channels=(16,32,64,128)']
CHECKPOINT = [
    '--checkpoint', '../in/net.pth', '--img-size', '64', '--interpolation', 'bilinear', '--crop-pct', '1',
    '--mean', '.5', '.5', '.5', '--std', '.5', '.5', '.5', *TINY_ARGS]
COMMANDS = {
    'quickstart': ['quickstart', '--epochs', '1', '--out', 'out'],
    'convert': ['convert', '../in/net.pth', 'out.safetensors', '--model', 'rgse_resnet50', *TINY_ARGS],
    'push': ['push', 'rgse_resnet50', '--repo-id', 'user/fault', *CHECKPOINT],
    'push_dry_run': ['push', 'rgse_resnet50', '--repo-id', 'user/fault', '--dry-run', 'out', *CHECKPOINT],
    'bench': [
        'bench', 'rgse_resnet50', '--mode', 'infer', '-b', '1', '--img-size', '32', '--rounds', '1', '--plot',
        'out.png', *TINY_ARGS],
    'plot': ['plot', 'kernels', 'rgse_resnet50', '--out', 'out.png', *CHECKPOINT],
    'imagefolder': ['imagefolder', '../in/list.txt', '../in/images', 'out'],
    'cards': ['cards', 'out'],
}
OUTPUTS = {
    'quickstart': ['out', 'out/config.json', 'out/model.safetensors'],
    'convert': ['out.safetensors'],
    'push': [],
    'push_dry_run': ['out', 'out/README.md', 'out/config.json', 'out/model.safetensors'],
    'bench': ['out.png'],
    'plot': ['out.png'],
    'imagefolder': [
        'out', 'out/000000', 'out/000000/0000001_a.png', 'out/000002', 'out/000002/0000002_b.png', 'out/class_map.txt'],
}
# command: where it is interrupted, as function, number of the call, and whether after it
POINTS: Dict[str, List[Tuple[str, int, bool]]] = {
    'quickstart': [
        ('timm_sepool.cli.quickstart:load_digits', 1, False),
        ('torch.optim:SGD.step', 5, False),
        ('torch.autograd:backward', 5, True),
        ('safetensors.torch:save_file', 1, False),
        ('safetensors.torch:save_file', 1, True),
        ('pathlib:Path.write_text', 1, False),
        ('timm_sepool.cli._output:_rename', 1, False),
        ('timm_sepool.cli._output:_rename', 1, True),
    ],
    'convert': [
        ('timm_sepool.cli.main:_ModelKwargs.__call__', 1, False),
        ('timm_sepool.cli.hub:load_checkpoint', 1, False),
        ('torch:load', 1, True),
        ('safetensors.torch:save_file', 1, False),
        ('safetensors.torch:save_file', 1, True),
        ('timm_sepool.cli._output:_rename', 1, False),
        ('os:link', 1, True),
    ],
    'push': [
        ('timm_sepool.cli.hub:load_trained', 1, True),
        ('timm_sepool.cli.hub:save_folder', 1, True),
        ('huggingface_hub:ModelCard.save', 1, True),
        ('huggingface_hub:HfApi.create_repo', 1, True),
        ('huggingface_hub:HfApi.model_info', 1, True),
        ('huggingface_hub:HfApi.upload_folder', 1, False),
    ],
    'push_dry_run': [
        ('timm_sepool.cli.hub:load_trained', 1, True),
        ('timm_sepool.cli.hub:save_folder', 1, True),
        ('huggingface_hub:ModelCard.save', 1, True),
        ('timm_sepool.cli._output:_rename', 1, False),
        ('os:rename', 1, True),
    ],
    'bench': [
        ('timm_sepool.cli._timing:create_network', 2, True),
        ('timm_sepool.cli._timing:interleave', 1, False),
        ('matplotlib.figure:Figure.savefig', 1, False),
        ('matplotlib.figure:Figure.savefig', 1, True),
        ('timm_sepool.cli._output:_rename', 1, False),
        ('os:link', 1, True),
    ],
    'plot': [
        ('timm_sepool.cli.plot:load_model', 1, False),
        ('timm_sepool.plot:plot_kernels', 1, True),
        ('matplotlib.figure:Figure.savefig', 1, False),
        ('matplotlib.figure:Figure.savefig', 1, True),
        ('timm_sepool.cli._output:_rename', 1, False),
        ('os:link', 1, True),
    ],
    'imagefolder': [
        ('pathlib:Path.read_text', 1, True),
        ('pathlib:Path.symlink_to', 1, False),
        ('pathlib:Path.symlink_to', 2, True),
        ('pathlib:Path.write_text', 1, True),
        ('timm_sepool.cli._output:_rename', 1, False),
        ('os:rename', 1, True),
    ],
    'cards': [
        ('timm_sepool.cli.hub:default_cards', 1, False),
        ('pathlib:Path.write_text', 3, True),
        ('timm_sepool.cli.hub:model_card', 2, True),
    ],
}


class Result(NamedTuple):
    code: int
    out: str
    err: str
    left: bool  # a process of its group outlives it


class Runner:
    """Runs the command in forks of one process, or in a process of its own, in an empty folder beside the inputs."""

    def __init__(self, process: subprocess.Popen, root: Path) -> None:
        self.process, self.root = process, root
        self.cwd = root / 'cwd'

    def new_folder(self) -> None:
        number = sum(1 for _ in self.root.glob('case*'))
        for name in ('', 'cwd', 'tmp'):
            (self.root / f'case{number}' / name).mkdir()
        (self.root / f'case{number}' / 'in').symlink_to(self.root / 'in')
        self.cwd, self.tmp = self.root / f'case{number}' / 'cwd', self.root / f'case{number}' / 'tmp'

    def __call__(
            self,
            argv: Sequence[str],
            *strikes: Tuple[str, int, str, bool],
            missing: Sequence[str] = (),
            fsize: int = 0,
            uid: Optional[int] = None,
            stdout: str = '',
    ) -> Result:
        """Run in a fork.

        Args:
            argv: The command's arguments.
            *strikes: Function, number of the call, signal or code, whether after the call.
            missing: Modules that can not be imported.
            fsize: Largest file (bytes) that can be written.
            uid: User.
            stdout: File.
        """
        out, err = self.root / 'stdout', self.root / 'stderr'
        out.write_text('')
        case = dict(
            argv=argv, strikes=strikes, missing=missing, fsize=fsize, uid=uid, cwd=str(self.cwd), tmp=str(self.tmp),
            stdout=stdout or str(out), stderr=str(err))
        self.process.stdin.write(json.dumps(case) + '\n')
        self.process.stdin.flush()
        code, left = json.loads(self.process.stdout.readline())
        errors = re.sub('timm-sepool bench: timing .*\n', '', err.read_text())  # what it does, not what fails
        return Result(code, out.read_text(errors='replace'), errors, left)

    def start(self, argv: Sequence[str], code: str = '', env: Optional[Dict[str, str]] = None, **kwargs) -> Any:
        """Start a process of its own, after some code."""
        main = f'import sys\n{code}\nfrom timm_sepool.cli.main import main\nsys.exit(main())'
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'TMPDIR': str(self.tmp), 'PYTHONUNBUFFERED': None, **(env or {})}
        command = [sys.executable, '-c', main, *argv]
        return subprocess.Popen(
            command, cwd=self.cwd, env={k: v for k, v in env.items() if v is not None}, text=True, errors='replace',
            **{**dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE), **kwargs})

    def run(self, argv: Sequence[str], code: str = '', env: Optional[Dict[str, str]] = None, **kwargs) -> Result:
        """Run in a process of its own."""
        with self.start(argv, code, env, **kwargs) as process:
            out, err = process.communicate(timeout=120)
        return Result(process.returncode, out or '', err or '', False)

    def files(self) -> List[str]:
        """Everything in the folder. There must be nothing in that of temporary files."""
        assert os.listdir(self.tmp) == []
        return sorted(str(p.relative_to(self.cwd)) for p in self.cwd.rglob('*'))

    def failed(self, result: Result, *messages: str) -> None:
        """Exit code 2 and one line that holds the messages, nothing written."""
        assert result.code == 2, result
        assert result.err.startswith('timm-sepool') and result.err.count('\n') == 1, result.err
        assert all(m in result.err for m in messages), result.err
        assert self.files() == []


@pytest.fixture(scope='module')
def forks() -> Iterator[Runner]:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)  # pytest's folders are for their owner only, and one test runs as another user
        (root / 'in' / 'images').mkdir(parents=True)
        torch.save(tiny('rgse_resnet50').state_dict(), root / 'in' / 'net.pth')
        for name in 'ab':
            Image.new('RGB', (8, 8)).save(root / 'in' / 'images' / f'{name}.png')
        (root / 'in' / 'list.txt').write_text('a.png 0\nb.png 2\n')
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}
        # a measurement of coverage would print that it can not write to the full disk
        env = {k: v for k, v in env.items() if not k.startswith('COV')}
        with subprocess.Popen(
                [sys.executable, ROOT / 'tests' / 'helpers' / 'forked.py'],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, env=env,
        ) as process:
            assert process.stdout.readline() == 'ready\n'
            yield Runner(process, root)
            process.stdin.close()


@pytest.fixture
def timm_sepool(forks: Runner) -> Runner:
    forks.new_folder()
    return forks


# --- signals

def signals() -> Iterator:
    """The cases. By default SIGINT at every other point of each command and SIGTERM at one."""
    for command, points in POINTS.items():
        for i, (target, number, after) in enumerate(points):
            for name in SIGNALS:
                if FULL or i % 2 == 0 and (name == 'SIGINT' or i == 2):
                    where = f'{"after" if after else "before"}_{target.split(":")[1]}'
                    yield pytest.param(command, (target, number, after), name, id=f'{command}-{where}-{name}')


@pytest.mark.parametrize('command,point,name', list(signals()))
def test_signal(timm_sepool: Runner, hub: HubServer, command: str, point: Tuple[str, int, bool], name: str) -> None:
    """Usual exit code, one line, no process left; nothing is written, or all of it if it was just renamed."""
    hub.repos.pop(('model', 'user/fault'), None)
    target, number, after = point
    code, message = SIGNALS[name]
    result = timm_sepool(COMMANDS[command], (target, number, name, after))
    assert (result.code, result.err, result.left) == (code, message, False), result
    complete = after and target in ('timm_sepool.cli._output:_rename', 'os:link', 'os:rename')
    assert timm_sepool.files() == (OUTPUTS[command] if complete else [])
    assert not hub.repos.get(('model', 'user/fault'))  # no file, if the repository was created


@pytest.mark.parametrize('second', SIGNALS)
@pytest.mark.parametrize('command', ['quickstart', 'convert', 'push', 'imagefolder'])
def test_second_signal(timm_sepool: Runner, command: str, second: str) -> None:
    """While the first is cleaned up after: what is left of that is done at exit."""
    target = 'timm_sepool.cli._output:_rename' if command != 'push' else 'huggingface_hub:HfApi.create_repo'
    result = timm_sepool(
        COMMANDS[command], (target, 1, 'SIGINT', False), ('shutil:_rmtree_safe_fd', 1, second, False))
    code, message = SIGNALS[second]
    assert (result.code, result.err, result.left) == (code, message, False), result
    assert timm_sepool.files() == []


@pytest.mark.parametrize('command,fault', [
    (command, fault) for command in OUTPUTS for fault in ('SIGINT', 'SIGTERM', 'SIGKILL')
    if FULL or fault == {'quickstart': 'SIGINT', 'push': 'SIGTERM'}.get(command, 'SIGKILL')])
def test_next_call(timm_sepool: Runner, hub: HubServer, command: str, fault: str) -> None:
    """The same call works after one that was interrupted or killed."""
    hub.repos.pop(('model', 'user/fault'), None)
    target = 'timm_sepool.cli._output:_rename' if command != 'push' else 'huggingface_hub:HfApi.upload_folder'
    code = {**{name: code for name, (code, _) in SIGNALS.items()}, 'SIGKILL': -9}[fault]
    assert timm_sepool(COMMANDS[command], (target, 1, fault, False)).code == code
    assert not set(OUTPUTS[command]) & {p.name for p in timm_sepool.cwd.iterdir()}
    result = timm_sepool(COMMANDS[command])
    assert (result.code, result.err.replace('\n', '')) == (0, '') or command == 'push' and result.code == 0, result
    kept = [p for p in timm_sepool.cwd.rglob('*') if '.timm-sepool-' not in str(p)]
    assert sorted(str(p.relative_to(timm_sepool.cwd)) for p in kept) == OUTPUTS[command]
    if command == 'push':
        assert 'model.safetensors' in hub.repos['model', 'user/fault']


# --- streams

UNREAD = 'import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1)'


@pytest.mark.parametrize('fault,code,error', [
    ('reader_gone', 141, ''),
    ('full', 2, 'timm-sepool imagefolder: error: Can not print: [Errno 28]'),
    ('full_unbuffered', 2, 'timm-sepool imagefolder: error: [Errno 28]'),
    ('closed', 0, ''),
], ids=['reader_gone', 'full', 'full_unbuffered', 'closed'])
def test_stdout(timm_sepool: Runner, fault: str, code: int, error: str) -> None:
    """The output that was written stays."""
    setup = {
        'reader_gone': UNREAD,
        'full': 'import os; os.dup2(os.open("/dev/full", os.O_WRONLY), 1)',
        'full_unbuffered': 'import os; os.dup2(os.open("/dev/full", os.O_WRONLY), 1)',
        'closed': 'import os; os.close(1); sys.stdout = None',
    }[fault]
    env = dict(PYTHONUNBUFFERED='1' if fault == 'full_unbuffered' else None)
    result = timm_sepool.run(COMMANDS['imagefolder'], setup, env)
    assert result.code == code and result.err.startswith(error) and result.err.count('\n') == bool(error), result
    assert timm_sepool.files() == OUTPUTS['imagefolder']


@pytest.mark.parametrize('argv', [['--help'], ['imagefolder', '--help']], ids=['help', 'command_help'])
def test_help_reader_gone(timm_sepool: Runner, argv: List[str]) -> None:
    result = timm_sepool.run(argv, UNREAD)
    assert (result.code, result.err) == (141, '')


def test_reader_gone_in_training(timm_sepool: Runner) -> None:
    """`timm-sepool quickstart | head -1`: not taken for a disk that is full, nothing is written."""
    code = f'{UNREAD}; sys.stdout.reconfigure(write_through=True)'
    result = timm_sepool(COMMANDS['quickstart'], ('torch.optim:SGD.step', 20, code, False))
    assert (result.code, result.err) == (141, '')
    assert timm_sepool.files() == []


def test_stdout_closed_in_training(timm_sepool: Runner) -> None:
    """The progress bar prints too."""
    result = timm_sepool(COMMANDS['quickstart'], ('timm_sepool.cli.main:_open_stdio', 1, 'sys.stdout = None', False))
    assert (result.code, result.out, result.err) == (0, '', '')
    assert timm_sepool.files() == OUTPUTS['quickstart']


@pytest.mark.parametrize('argv,code', [(COMMANDS['imagefolder'], 0), (['imagefolder', 'none', 'none', 'out'], 2)])
def test_stderr_closed(timm_sepool: Runner, argv: List[str], code: int) -> None:
    """No error is printed among the output, nor into a file that got the stream's number."""
    result = timm_sepool.run(argv, 'import os; os.close(2); sys.stderr = None')
    assert (result.code, result.err) == (code, '') and (code == 0 or not result.out)
    assert timm_sepool.files() == ([] if code else OUTPUTS['imagefolder'])


# --- disks and folders

@pytest.mark.parametrize('command', ['quickstart', 'convert', 'push_dry_run', 'bench', 'plot'])
def test_disk_full(timm_sepool: Runner, command: str) -> None:
    """The error of the system, whoever writes the file."""
    result = timm_sepool(COMMANDS[command], fsize=10_000)
    timm_sepool.failed(result, f'Can not write {COMMANDS[command][-1] if command == "quickstart" else ""}', 'too large')


def test_disk_full_push(timm_sepool: Runner, hub: HubServer) -> None:
    """The folder for temporary files is full."""
    requests = len(hub.requests)
    timm_sepool.failed(timm_sepool(COMMANDS['push'], fsize=10_000), 'too large')
    assert len(hub.requests) == requests


@pytest.mark.parametrize('when', ['before', 'meanwhile'])
@pytest.mark.parametrize('command', ['convert', 'plot', 'imagefolder'])
def test_folder_removed(timm_sepool: Runner, command: str, when: str) -> None:
    argv = [a.replace('out', 'sub/out') if a.startswith('out') else a for a in COMMANDS[command]]
    (timm_sepool.cwd / 'sub').mkdir()
    target = {'before': 'timm_sepool.cli.main:_parser', 'meanwhile': 'timm_sepool.cli._output:_rename'}[when]
    result = timm_sepool(argv, (target, 1, 'import shutil; shutil.rmtree("sub")', False))
    timm_sepool.failed(result, 'Can not write sub/out', 'sub is no writable folder')


@pytest.mark.parametrize('command', ['quickstart', 'convert', 'push_dry_run', 'bench', 'plot', 'imagefolder', 'cards'])
def test_read_only_folder(timm_sepool: Runner, command: str) -> None:
    """Said before the work."""
    mode = timm_sepool.cwd.stat().st_mode
    timm_sepool.cwd.chmod(0o555)
    try:
        work = ('safetensors.torch:save_file', 1, 'SIGKILL', False)
        # no mode stops root
        result = timm_sepool(COMMANDS[command], work, uid=65534 if os.geteuid() == 0 else None)
    finally:
        timm_sepool.cwd.chmod(mode)
    timm_sepool.failed(result, 'Can not write out', 'is no writable folder')


def test_current_folder_deleted(timm_sepool: Runner) -> None:
    for command in ('convert', 'imagefolder'):
        result = timm_sepool(
            [a.replace('../in', str(timm_sepool.root / 'in')) for a in COMMANDS[command]],
            ('timm_sepool.cli.main:_parser', 1, 'os.mkdir("x"); os.chdir("x"); os.rmdir("../x")', False))
        timm_sepool.failed(result, 'Can not write out')


# --- other processes

@pytest.mark.parametrize('command', ['convert', 'push_dry_run', 'bench', 'plot', 'imagefolder'])
def test_output_appears(timm_sepool: Runner, command: str) -> None:
    """A second process writes the same output meanwhile: it wins and its output is left as it is."""
    second = """
from timm_sepool.cli.main import main
pid = os.fork()
if not pid:
    os._exit(main(sys.argv[1:]))
assert os.waitpid(pid, 0)[1] == 0
name = next(n for n in os.listdir() if n.startswith('out'))
with open('../inode', 'w') as f:
    f.write(str(os.stat(name).st_ino))
"""
    result = timm_sepool(COMMANDS[command], ('timm_sepool.cli._output:_rename', 1, second, False))
    assert result.code == 2 and result.err.count('\n') == 1 and 'exists and is left as it is' in result.err, result
    assert timm_sepool.files() == OUTPUTS[command]
    out = timm_sepool.cwd / OUTPUTS[command][0]
    assert out.stat().st_ino == int((timm_sepool.cwd.parent / 'inode').read_text())


def test_at_once(timm_sepool: Runner) -> None:
    """One of several processes writes the output, the others get the error."""
    processes = [timm_sepool.start(COMMANDS['imagefolder']) for _ in range(4)]
    results = [(*p.communicate(timeout=120), p.returncode) for p in processes]
    assert sorted(code for _, _, code in results) == [0, 2, 2, 2], results
    assert all('exists and is left as it is' in err for _, err, code in results if code)
    assert timm_sepool.files() == OUTPUTS['imagefolder']


def test_no_hard_links(timm_sepool: Runner) -> None:
    """On file systems without them a file is renamed, if there is none by then."""
    refuse = 'def link(*args):\n    raise OSError(1, "no links")\nos.link = link'
    argv = COMMANDS['convert']
    assert timm_sepool(argv, ('timm_sepool.cli._output:_rename', 1, refuse, False)).code == 0
    assert timm_sepool.files() == OUTPUTS['convert']
    (timm_sepool.cwd / 'out.safetensors').unlink()
    result = timm_sepool(
        argv, ('timm_sepool.cli._output:_rename', 1, f'{refuse}\nopen("out.safetensors", "w").close()', False))
    assert result.code == 2 and 'exists and is left as it is' in result.err
    assert timm_sepool.files() == ['out.safetensors'] and not (timm_sepool.cwd / 'out.safetensors').read_bytes()


# --- environments

@pytest.mark.parametrize('env', [
    dict(PYTHONIOENCODING='ascii'),
    dict(LC_ALL='C'),
    dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0'),
], ids=['ioencoding_ascii', 'LC_ALL_C', 'LC_ALL_C_no_utf8'])
@pytest.mark.parametrize('name', ['with space', '\xfcn\xef', 'new\nline', b'\xff'], ids=ascii)
def test_names(timm_sepool: Runner, name: Any, env: Dict[str, str]) -> None:
    """Outputs of any name, in any locale: written, and a second time one line says that it exists."""
    argv = [*COMMANDS['imagefolder'][:-1], os.fsencode(name) if isinstance(name, str) else name]
    for code in (0, 2):
        result = timm_sepool.run(argv, env=env)
        assert result.code == code and result.err.count('\n') == (1 if code else 0), result
    assert os.listdir(timm_sepool.cwd) == [os.fsdecode(argv[-1])] and timm_sepool.files()


@pytest.mark.parametrize('home', [None, 'list.txt/home'] if FULL else ['list.txt/home'])
def test_home(timm_sepool: Runner, home: Optional[str]) -> None:
    """matplotlib and the Hub's client would have a cache there."""
    home = home and str(timm_sepool.root / 'in' / home)  # not even root can make this folder
    env = dict(HOME=home, HF_HOME=None, MPLCONFIGDIR=None, XDG_CACHE_HOME=None, XDG_CONFIG_HOME=None)
    result = timm_sepool.run(COMMANDS['plot'], env=env)
    assert result.code == 0 and 'Traceback' not in result.err, result
    assert sorted(os.listdir(timm_sepool.cwd)) == OUTPUTS['plot']


@pytest.mark.parametrize('command,module,message', [
    ('quickstart', 'sklearn', 'scikit-learn: pip install "timm_sepool[quickstart]"'),
    ('quickstart', 'tqdm', 'tqdm: pip install "timm_sepool[quickstart]"'),
    ('bench', 'tqdm', 'tqdm: pip install "timm_sepool[quickstart]"'),
    ('bench', 'matplotlib', 'matplotlib: pip install "timm_sepool[plot]"'),
    ('plot', 'matplotlib', 'matplotlib: pip install "timm_sepool[plot]"'),
], ids=lambda value: None if ' ' in value else value)
def test_missing_extra(timm_sepool: Runner, command: str, module: str, message: str) -> None:
    timm_sepool.failed(timm_sepool(COMMANDS[command], missing=[module]), message)


@pytest.mark.parametrize('module,argv', [
    ('torch.nn', COMMANDS['convert'][:5]),
    ('timm.layers', COMMANDS['convert']),
], ids=['torch', 'timm_for_arguments'])
@pytest.mark.parametrize('name', SIGNALS)
def test_signal_at_import(timm_sepool: Runner, name: str, module: str, argv: List[str]) -> None:
    """While torch and timm are imported, by the subcommand or already by the parser."""
    code = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
class Strike:
    def find_spec(self, fullname, path=None, target=None):
        if fullname == {module!r}:
            signal.raise_signal(signal.{name})
sys.meta_path.insert(0, Strike())
"""
    result = timm_sepool.run(argv, code)
    assert (result.code, result.err) == SIGNALS[name]
    assert timm_sepool.files() == []
