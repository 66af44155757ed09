""" What breaks while `timm-sepool` runs: signals, streams, disks, folders, locales, other processes

Then the exit code is the usual one, stderr holds one line, and the folder is as it was or holds the complete output.
Signals are raised at a call of a function, not after a time, in forks of one process (see `forked`).
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import pytest
import torch
from PIL import Image

from helpers.common import FULL, tiny
from helpers.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = {'SIGINT': (130, 'interrupted\n'), 'SIGTERM': (143, 'terminated\n')}
UNREAD = 'r, w = os.pipe(); os.close(r); os.dup2(w, 1)'
DISK_FULL = 'os.dup2(os.open("/dev/full", os.O_WRONLY), 1)'
TINY_ARGS = '--model-kwargs layers=(1,1,1,1) channels=(16,32,64,128)'
CHECKPOINT = (
    '--checkpoint ../in/net.pth --img-size 64 --interpolation bilinear --crop-pct 1 --mean .5 .5 .5 --std .5 .5 .5 '
    + TINY_ARGS)
PARSER, RENAME = 'timm_sepool.cli.main:_parser', 'timm_sepool.cli._output:_rename'
WRITTEN = ['safetensors.torch:save_file', 'safetensors.torch:save_file after']
DRAWN = ['matplotlib.figure:Figure.savefig', 'matplotlib.figure:Figure.savefig after', RENAME, 'os:link after']
EXPORTED = [
    'timm_sepool.cli._training_run:load_trained after', 'timm_sepool.cli.push:save_folder after',
    'huggingface_hub:ModelCard.save after']


class Command:
    def __init__(self, argv: str, outputs: str, *points: str) -> None:
        self.argv, self.outputs, self.points = argv.split(), outputs.split(), points  # for these see `forked.strike`


COMMANDS = {
    'quickstart': Command(
        'quickstart --epochs 1 --out out', 'out out/config.json out/digit.png out/model.safetensors',
        'timm_sepool.cli.quickstart:load_digits', 'torch.autograd:backward 9 after', 'torch.optim:SGD.step 5', *WRITTEN,
        'pathlib:Path.write_text', f'{RENAME} after'),
    'convert': Command(
        f'convert ../in/net.pth out.safetensors --model rgse_resnet50 {TINY_ARGS}', 'out.safetensors',
        'timm_sepool.cli._arguments:ModelKwargs.__call__', 'timm_sepool.cli._training_run:load_checkpoint',
        'torch:load after', *WRITTEN, RENAME, 'os:link after'),
    'push': Command(
        f'push rgse_resnet50 --repo-id user/fault {CHECKPOINT}', '', *EXPORTED,
        *(f'huggingface_hub:HfApi.{call}' for call in ('create_repo after', 'model_info after', 'upload_folder'))),
    'push_dry_run': Command(
        f'push rgse_resnet50 --repo-id user/fault --dry-run out {CHECKPOINT}',
        'out out/README.md out/config.json out/model.safetensors', *EXPORTED, RENAME, 'os:rename after'),
    'bench': Command(
        f'bench rgse_resnet50 --mode infer -b 1 --img-size 32 --rounds 1 --plot out.png {TINY_ARGS}', 'out.png',
        'timm_sepool.cli._timing:create_network 2 after', 'timm_sepool.cli._timing:interleave', *DRAWN),
    'plot': Command(
        f'plot kernels rgse_resnet50 --out out.png {CHECKPOINT}', 'out.png',
        'timm_sepool.cli.plot:load_model', 'timm_sepool.plot:plot_kernels after', *DRAWN),
    'imagefolder': Command(
        'imagefolder ../in/list.txt ../in/images out',
        'out out/000000 out/000000/0000001_a.png out/000002 out/000002/0000002_b.png out/class_map.txt',
        'pathlib:Path.read_text after', 'pathlib:Path.symlink_to', 'pathlib:Path.symlink_to 2 after',
        'pathlib:Path.write_text after', RENAME, 'os:rename after'),
    'cards': Command(
        'cards out', '', 'timm_sepool.cli.cards:default_cards', 'pathlib:Path.write_text 3 after',
        'timm_sepool.cli.cards:model_card 2 after'),
}
IMAGEFOLDER = COMMANDS['imagefolder']


class Runner:
    """Runs the command in `cwd`, an empty folder beside the inputs."""

    def __init__(self, process: Any, root: Path) -> None:
        self.process, self.root, self.cwd, self.tmp = process, root, root, root

    def __call__(self, argv: Sequence[str], *strikes: Tuple[str, str], **faults: Any) -> CompletedProcess:
        """Run in a fork: strikes are where and what, a signal or code; for the faults see `forked.prepare`."""
        out, err = self.root / 'stdout', self.root / 'stderr'
        case = dict(argv=argv, strikes=strikes, cwd=self.cwd, tmp=self.tmp, stdout=out, stderr=err, **faults)
        print(json.dumps(case, default=str), file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        error = re.sub(r'^timm-sepool bench: timing .*\n', '', err.read_text())  # it is said before the work
        return CompletedProcess(argv, code, out.read_text(errors='replace'), error)

    def run(self, argv: Sequence[Any], code: str = '', env: Optional[Dict[str, Any]] = None) -> CompletedProcess:
        """Run in a process of its own, which first runs some code. None removes a variable of the environment."""
        main = f'import os, signal, sys\n{code}\nfrom timm_sepool.cli.main import main\nsys.exit(main())'
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'TMPDIR': str(self.tmp), 'PYTHONUNBUFFERED': None, **(env or {})}
        return subprocess.run(
            [sys.executable, '-c', main, *argv], cwd=self.cwd, env={k: v for k, v in env.items() if v is not None},
            text=True, errors='replace', capture_output=True, timeout=300)

    def files(self) -> List[str]:
        """Everything in the folder. That of temporary files must be empty."""
        assert os.listdir(self.tmp) == []
        return sorted(str(p.relative_to(self.cwd)) for p in self.cwd.rglob('*'))

    def failed(self, result: CompletedProcess, *messages: str) -> None:
        """Exit code 2 and one line that holds the messages. Nothing was written."""
        assert result.returncode == 2, result
        assert result.stderr.startswith('timm-sepool') and result.stderr.count('\n') == 1, result.stderr
        assert all(m in result.stderr for m in messages), result.stderr
        assert not self.files()


@pytest.fixture(scope='module')
def forks() -> Iterator[Runner]:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)  # one test runs as another user
        (root / 'in' / 'images').mkdir(parents=True)
        torch.save(tiny('rgse_resnet50').state_dict(), root / 'in' / 'net.pth')
        for name in 'ab':
            Image.new('RGB', (8, 8)).save(root / 'in' / 'images' / f'{name}.png')
        (root / 'in' / 'list.txt').write_text('a.png 0\nb.png 2\n')
        env = {k: v for k, v in os.environ.items() if not k.startswith('COV')}  # it would print that the disk is full
        with subprocess.Popen(
                [sys.executable, ROOT / 'tests/helpers/forked.py'], text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, env={**env, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}) as process:
            assert process.stdout and process.stdin and process.stdout.readline() == 'ready\n'
            yield Runner(process, root)
            process.stdin.close()


@pytest.fixture
def timm_sepool(forks: Runner, hub: HubServer) -> Runner:
    hub.repos.pop(('model', 'user/fault'), None)
    case = forks.root / f'case{len(os.listdir(forks.root))}'
    forks.cwd, forks.tmp = case / 'cwd', case / 'tmp'
    for folder in (forks.cwd, forks.tmp):
        folder.mkdir(parents=True)
    (case / 'in').symlink_to(forks.root / 'in')
    return forks


@pytest.mark.parametrize('command,point,name,second', [
    *((command, point, name, None)
      for command in COMMANDS for i, point in enumerate(COMMANDS[command].points) for name in SIGNALS
      if FULL or (i, name) in ((0, 'SIGINT'), (2, 'SIGTERM'))),
    *((command, 'huggingface_hub:HfApi.create_repo' if command == 'push' else RENAME, 'SIGINT', second)
      for command in ('imagefolder', 'quickstart', 'convert', 'push') for second in SIGNALS
      if FULL or command == 'imagefolder' or (command, second) == ('push', 'SIGTERM')),
])
def test_signal(
        timm_sepool: Runner, hub: HubServer, command: str, point: str, name: str, second: Optional[str]) -> None:
    """Usual exit code, one line; nothing is written, or all of it if it was just renamed.

    A second signal comes while the first is cleaned up after: what is left of that is done at exit.
    """
    result = timm_sepool(COMMANDS[command].argv, (point, name), *([('os:rmdir', second)] if second else []))
    assert (result.returncode, result.stderr) == SIGNALS[second or name], result
    complete = point in (f'{RENAME} after', 'os:link after', 'os:rename after')
    assert timm_sepool.files() == (COMMANDS[command].outputs if complete else [])
    assert not hub.repos.get(('model', 'user/fault'))  # no file, if the repository was created


@pytest.mark.parametrize('command,fault', [
    (command, fault) for command in COMMANDS for fault in ('SIGINT', 'SIGTERM', 'SIGKILL')
    if command != 'cards' and (
        FULL or fault == dict(quickstart=None, convert='SIGINT', push='SIGTERM').get(command, 'SIGKILL'))])
def test_next_call(timm_sepool: Runner, hub: HubServer, command: str, fault: str) -> None:
    """The same call works after one that was interrupted or killed."""
    argv, outputs = COMMANDS[command].argv, COMMANDS[command].outputs
    target = RENAME if command != 'push' else 'huggingface_hub:HfApi.upload_folder'
    assert timm_sepool(argv, (target, fault)).returncode == (-9 if fault == 'SIGKILL' else SIGNALS[fault][0])
    assert not set(outputs) & {p.name for p in timm_sepool.cwd.iterdir()}
    result = timm_sepool(argv)
    assert result.returncode == 0 and (command == 'push' or not result.stderr), result  # push shows progress
    kept = [p for p in timm_sepool.cwd.rglob('*') if '.timm-sepool-' not in str(p)]
    assert sorted(str(p.relative_to(timm_sepool.cwd)) for p in kept) == outputs
    if command == 'push':
        assert 'model.safetensors' in hub.repos['model', 'user/fault']


@pytest.mark.parametrize('module,num_args', [('torch.nn', 5), ('timm.layers', None)])  # timm: for --model-kwargs
@pytest.mark.parametrize('name', SIGNALS)
def test_signal_at_import(timm_sepool: Runner, name: str, module: str, num_args: Optional[int]) -> None:
    code = f"""signal.signal(signal.SIGINT, signal.default_int_handler)
sys.addaudithook(lambda event, args: event == 'import' and args[0] == {module!r} and signal.raise_signal(signal.{name}))
"""
    result = timm_sepool.run(COMMANDS['convert'].argv[:num_args], code)
    assert (result.returncode, result.stderr) == SIGNALS[name]
    assert timm_sepool.files() == []


@pytest.mark.parametrize('argv,setup,unbuffered,code,error', [
    (IMAGEFOLDER.argv, UNREAD, None, 141, ''),
    (['--help'], UNREAD, None, 141, ''),
    (['imagefolder', '--help'], UNREAD, None, 141, ''),
    (IMAGEFOLDER.argv, DISK_FULL, None, 2, 'timm-sepool imagefolder: error: Cannot print the result: [Errno 28]'),
    (IMAGEFOLDER.argv, DISK_FULL, '1', 2, 'timm-sepool imagefolder: error: [Errno 28]'),
    (IMAGEFOLDER.argv, 'os.close(1); sys.stdout = None', None, 0, ''),
    # no error is printed among the output, nor into a file that got the stream's number
    (IMAGEFOLDER.argv, 'os.close(2); sys.stderr = None', None, 0, ''),
    (['imagefolder', 'none', 'none', 'out'], 'os.close(2); sys.stderr = None', None, 2, ''),
])
def test_streams(timm_sepool: Runner, argv: List[str], setup: str, unbuffered: Any, code: int, error: str) -> None:
    """What was written stays."""
    result = timm_sepool.run(argv, setup, dict(PYTHONUNBUFFERED=unbuffered))
    assert (result.returncode, result.stderr.count('\n')) == (code, bool(error)), result
    assert result.stderr.startswith(error), result
    assert timm_sepool.files() == (IMAGEFOLDER.outputs if argv == IMAGEFOLDER.argv else [])
    assert 'error' not in result.stdout


@pytest.mark.parametrize('target,fault,code', [
    # `timm-sepool quickstart | head -1`: not taken for a full disk, and nothing is written
    ('torch.optim:SGD.step 20', f'{UNREAD}; sys.stdout.reconfigure(write_through=True)', 141),
    ('timm_sepool.cli.main:_prepare_streams', 'sys.stdout = None', 0),  # the progress bar prints too
], ids=['unread', 'closed'])
def test_streams_in_training(timm_sepool: Runner, target: str, fault: str, code: int) -> None:
    result = timm_sepool(COMMANDS['quickstart'].argv, (target, fault))
    assert (result.returncode, result.stderr) == (code, '') and (code or not result.stdout)
    assert timm_sepool.files() == ([] if code else COMMANDS['quickstart'].outputs)


@pytest.mark.parametrize(
    'command', ['quickstart', 'convert', 'push', 'push_dry_run', 'bench', 'plot'][0 if FULL else 3:])
def test_disk_full(timm_sepool: Runner, hub: HubServer, command: str) -> None:
    """The error of the system, whoever writes the file."""
    requests = len(hub.requests)
    timm_sepool.failed(
        timm_sepool(COMMANDS[command].argv, fsize=10_000), 'Cannot write', 'too large', 'Free some disk space')
    assert len(hub.requests) == requests


@pytest.mark.parametrize('command', ['convert', 'plot', 'imagefolder'])
@pytest.mark.parametrize('target', [PARSER, RENAME], ids=['before', 'meanwhile'])
def test_folder_removed(timm_sepool: Runner, target: str, command: str) -> None:
    argv = [a.replace('out', 'sub/out') if a.startswith('out') else a for a in COMMANDS[command].argv]
    (timm_sepool.cwd / 'sub').mkdir()
    result = timm_sepool(argv, (target, 'import shutil; shutil.rmtree("sub")'))
    timm_sepool.failed(result, 'Cannot write sub/out', 'the directory sub does not exist', 'mkdir -p sub')
    if target == PARSER:  # the current directory
        argv = [a.replace('../in', str(timm_sepool.root / 'in')) for a in COMMANDS[command].argv]
        result = timm_sepool(argv, (target, 'os.mkdir("x"); os.chdir("x"); os.rmdir("../x")'))
        timm_sepool.failed(result, 'Cannot write out')


@pytest.mark.parametrize('command', [c for c in COMMANDS if c != 'push'])
def test_read_only_folder(timm_sepool: Runner, command: str) -> None:
    """Said before the work."""
    timm_sepool.cwd.chmod(0o555)
    uid = 65534 if os.geteuid() == 0 else None  # root may write whatever the mode
    result = timm_sepool(COMMANDS[command].argv, ('safetensors.torch:save_file', 'SIGKILL'), uid=uid)
    timm_sepool.failed(result, 'Cannot write out', 'is not a writable directory')


@pytest.mark.parametrize('command', ['convert', 'push_dry_run', 'bench', 'plot', 'imagefolder'][0 if FULL else 4:])
def test_output_appears(timm_sepool: Runner, command: str) -> None:
    """A second process writes the same output meanwhile: it wins and its output is left as it is."""
    second = """
from timm_sepool.cli.main import main
if not os.fork():
    os._exit(main(sys.argv[1:]))
assert os.wait()[1] == 0
os.utime(next(name for name in os.listdir() if name.startswith('out')), (1, 1))
"""
    result = timm_sepool(COMMANDS[command].argv, (RENAME, second))
    assert result.returncode == 2 and 'already exists' in result.stderr, result
    assert timm_sepool.files() == COMMANDS[command].outputs
    assert (timm_sepool.cwd / COMMANDS[command].outputs[0]).stat().st_mtime == 1


@pytest.mark.parametrize('exists', [False, True])
def test_no_hard_links(timm_sepool: Runner, exists: bool) -> None:
    """On file systems without them a file is renamed, unless another one appeared."""
    code = 'def link(*args):\n    raise OSError(1, "no links")\nos.link = link'
    code += '\nopen("out.safetensors", "w").close()' * exists
    result = timm_sepool(COMMANDS['convert'].argv, (RENAME, code))
    assert result.returncode == 2 * exists and ('already exists' in result.stderr) == exists, result
    assert timm_sepool.files() == ['out.safetensors']
    assert bool((timm_sepool.cwd / 'out.safetensors').read_bytes()) != exists


@pytest.mark.parametrize('env', [
    dict(PYTHONIOENCODING='ascii'), dict(LC_ALL='C'), dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0'),
], ids=['ascii', 'C', 'C-no-utf8'])
@pytest.mark.parametrize('name', ['with space', '\xfcn\xef', 'new\nline', b'\xff'], ids=ascii)
def test_names(timm_sepool: Runner, name: Any, env: Dict[str, str]) -> None:
    """Outputs of any name, in any locale: written, and a second time one line says that it exists."""
    for code in (0, 2):
        result = timm_sepool.run([*IMAGEFOLDER.argv[:-1], os.fsencode(name)], env=env)
        assert result.returncode == code and result.stderr.count('\n') == bool(code), result
    assert os.listdir(timm_sepool.cwd) == [os.fsdecode(name)] and timm_sepool.files()


@pytest.mark.full
@pytest.mark.parametrize('home', ['/dev/null/home', None])
def test_home(timm_sepool: Runner, home: Optional[str]) -> None:
    """matplotlib and the Hub's client would have a cache there. Not even root can make this folder."""
    env = dict(HOME=home, HF_HOME=None, MPLCONFIGDIR=None, XDG_CACHE_HOME=None, XDG_CONFIG_HOME=None)
    result = timm_sepool.run(COMMANDS['plot'].argv, env=env)
    assert result.returncode == 0 and 'Traceback' not in result.stderr, result
    assert sorted(os.listdir(timm_sepool.cwd)) == COMMANDS['plot'].outputs


@pytest.mark.parametrize('command,module,extra', [
    ('quickstart', 'sklearn', 'quickstart'), ('quickstart', 'tqdm', 'quickstart'), ('bench', 'tqdm', 'quickstart'),
    ('bench', 'matplotlib', 'plot'), ('plot', 'matplotlib', 'plot')])
def test_missing_extra(timm_sepool: Runner, command: str, module: str, extra: str) -> None:
    message = f'{module.replace("sklearn", "scikit-learn")}: pip install "timm_sepool[{extra}]"'
    timm_sepool.failed(timm_sepool(COMMANDS[command].argv, missing=[module]), message)
