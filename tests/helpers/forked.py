""" Runs `timm-sepool` many times at the price of importing torch once, for tests of interrupts and broken outputs

Started as `python forked.py`, it reads one case a line from stdin (JSON) and answers with one line. Each case runs in a
fork of its own, which has the modules but not the work of other cases. The fork ends as a program does, through threads
and exit handlers, but skips the second or more that Python takes to free the modules (not with --full).
"""
import atexit
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import threading
from typing import Any, Callable, Dict, Optional

MODULES = (
    'timm_sepool.cli.main', 'timm_sepool.cli._training_run', 'timm_sepool.cli._timing', 'timm_sepool.plot',
    'torch.utils.flop_counter', 'timm.optim',
    'timm.scheduler', 'timm.utils', 'matplotlib.figure', 'matplotlib.backends.backend_agg', 'sklearn.datasets',
    'huggingface_hub.repocard', 'jinja2',
    'encodings.utf_8_sig')  # the other user of a case may not be allowed to read Python's files
TIMEOUT = 300


def strike(where: str, action: Callable[[], Any]) -> None:
    """Have an action happen at one call of a function: 'module:function[ number][ after]', by default before call 1."""
    target, *options = where.split()
    after = 'after' in options
    number = next((int(option) for option in options if option.isdecimal()), 1)
    module, _, path = target.partition(':')
    owner = importlib.import_module(module)
    *parents, name = path.split('.')
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)
    calls = 0

    def patched(*args, **kwargs):
        nonlocal calls
        calls += 1
        now = calls == number
        if now and not after:
            action()
        result = original(*args, **kwargs)
        if now and after:
            action()
        return result

    setattr(owner, name, patched)


def prepare(case: Dict[str, Any]) -> None:
    """Turn a fork into the process that a shell would start, with the faults of the case: `strikes`, `fsize` (bytes
    that a file can have), `missing` (modules that cannot be imported) and `uid` (another user)."""
    os.setsid()
    signal.alarm(TIMEOUT)  # ends what hangs
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(case['cwd'])
    tempfile.tempdir = case['tmp']
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd, name in ((1, case['stdout']), (2, case['stderr'])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), fd)
    if 'fsize' in case:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case['fsize'],) * 2)
    for where, what in case['strikes']:
        if what.startswith('SIG'):
            what = f'import signal; signal.raise_signal(signal.{what})'
        strike(where, lambda what=what: exec(what, {'os': os, 'sys': sys}))
    for name in case.get('missing', ()):
        for loaded in [m for m in sys.modules if m == name or m.startswith(f'{name}.')]:
            del sys.modules[loaded]
        sys.modules[name] = None
    if case.get('uid') is not None:
        os.setuid(case['uid'])
    sys.argv = ['timm-sepool', *case['argv']]


def serve() -> Optional[Dict[str, Any]]:
    """Answer cases until stdin ends. Returns in each fork, with its case."""
    assert threading.active_count() == 1, 'a fork has no other threads'
    print('ready', flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        pid = os.fork()
        if not pid:
            return case
        _, status = os.waitpid(pid, 0)
        try:
            os.killpg(pid, signal.SIGKILL)
            left = True
        except ProcessLookupError:
            left = False
        print(json.dumps([os.waitstatus_to_exitcode(status), left]), flush=True)
    return None


if __name__ == '__main__':
    for module in MODULES:
        importlib.import_module(module)
    case = serve()
    if case is not None:
        prepare(case)
        from timm_sepool.cli.main import main
        if os.environ['TIMM_SEPOOL_FULL_TESTS']:
            sys.exit(main())
        code = main()
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
