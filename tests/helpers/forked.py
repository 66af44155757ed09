""" Runs `timm-sepool` many times at the price of importing torch once, for tests of interrupts and broken outputs

Started as `python forked.py`, it reads one case a line from stdin (JSON) and answers with its exit code. Each runs in a
fork of its own, which has the modules but not the work of other cases. The fork ends as a program does, through threads
and exit handlers, but skips the second or more that Python takes to free the modules.
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
from functools import partial, reduce
from itertools import count
from typing import Any, Callable, Dict

MODULES = (
    'timm_sepool.cli.main', 'timm_sepool.cli._training_run', 'timm_sepool.cli._timing', 'timm_sepool.plot',
    'torch.utils.flop_counter', 'timm.optim', 'timm.scheduler', 'timm.utils', 'matplotlib.figure',
    'matplotlib.backends.backend_agg', 'sklearn.datasets', 'huggingface_hub.repocard', 'jinja2',
    'encodings.utf_8_sig')  # the other user of a case may not be allowed to read Python's files


def strike(where: str, action: Callable[[], Any]) -> None:
    """Have an action happen at one call of a function: 'module:function[ number][ after]', by default before call 1."""
    target, *options = where.split()
    number = next((int(option) for option in options if option.isdecimal()), 1)
    module, path = target.split(':')
    *parents, name = path.split('.')
    owner = reduce(getattr, parents, importlib.import_module(module))
    original = getattr(owner, name)
    calls = count(1)

    def patched(*args, **kwargs):
        now = next(calls) == number
        if now and 'after' not in options:
            action()
        result = original(*args, **kwargs)
        if now and 'after' in options:
            action()
        return result

    setattr(owner, name, patched)


def prepare(case: Dict[str, Any]) -> None:
    """Turn a fork into the process that a shell would start, with the faults of the case: `strikes`, `fsize` (bytes
    that a file can have), `missing` (modules that cannot be imported) and `uid` (another user)."""
    signal.alarm(300)  # ends what hangs
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(case['cwd'])
    tempfile.tempdir = case['tmp']
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd, name in ((1, case['stdout']), (2, case['stderr'])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), fd)
    if 'fsize' in case:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case['fsize'],) * 2)
    for where, what in case['strikes']:
        what = f'signal.raise_signal(signal.{what})' if what.startswith('SIG') else what
        strike(where, partial(exec, what, dict(os=os, signal=signal, sys=sys)))
    for name in case.get('missing', ()):
        for loaded in [module for module in sys.modules if module.startswith(f'{name}.')]:
            del sys.modules[loaded]
        sys.modules[name] = None
    if case.get('uid') is not None:
        os.setuid(case['uid'])
    sys.argv = ['timm-sepool', *case['argv']]


if __name__ == '__main__':
    for module in MODULES:
        importlib.import_module(module)
    assert threading.active_count() == 1, 'a fork has no other threads'
    print('ready', flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            prepare(json.loads(line))
            code = sys.modules['timm_sepool.cli.main'].main()
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
