""" The command `timm-sepool`: parser, exit codes and signals

Bad input to a command ends in one line on stderr, after a usage if argparse finds it; the exit code is 2. A command
writes its output under a temporary name first, so nothing is left half-written. The commands import torch and timm only
as they run, so `--help` is fast.
"""
import argparse
import io
import os
import signal
import sys
import threading
from typing import List, Optional

from .. import __version__
from . import bench, cards, compare, convert, imagefolder, list_models, plot, push, quickstart
from ._output import CommandError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='timm-sepool',
        description="SPSE and RGSE networks for timm. To train and validate them, use timm's train.py and validate.py.")
    parser.add_argument('--version', action='version', version=f'timm_sepool {__version__}')
    subparsers = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for command in (quickstart, list_models, imagefolder, push, convert, plot, bench, compare, cards):
        command.add_parser(subparsers)
    return parser


class _Terminated(KeyboardInterrupt):
    """Raised on SIGTERM. A command cleans up as after Ctrl-C."""


def _prepare_streams() -> None:
    """Replace streams that were closed (`>&-`), and print characters that the encoding lacks as escapes."""
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, 'w'))
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == 'strict':
            stream.reconfigure(errors='backslashreplace')


def _flush_stdout() -> None:
    """Print what is buffered. If that fails, drop it, or Python would try to print it again at exit."""
    try:
        sys.stdout.flush()
    except OSError as e:
        with open(os.devnull, 'w') as devnull:
            os.dup2(devnull.fileno(), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):
            raise
        raise CommandError(f'Cannot print the result: {e}. Free some disk space or redirect the output.') from e


def main(argv: Optional[List[str]] = None) -> int:
    """Run one command line, without the program's name, by default that of the process.

    Returns:
        Exit code: 0, 1 if a training run of `compare` has failed, 2 for bad input, 130 or 143 if interrupted (SIGINT,
        SIGTERM), 141 if nobody reads the output.
    """
    def terminate(signum, frame) -> None:
        raise _Terminated

    _prepare_streams()
    in_main_thread = threading.current_thread() is threading.main_thread()
    catches_sigterm = in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # else a caller's
    if catches_sigterm:
        signal.signal(signal.SIGTERM, terminate)
    command = ''
    try:
        try:
            parser = _parser()
            args, unknown = parser.parse_known_args(argv)
            if unknown:
                hint = " Write ' -- ' before the arguments of train.py." if args.command == 'compare' else ''
                parser.error(f'unrecognized arguments: {" ".join(unknown)}.{hint}')
            command = f' {args.command}'
            code = args.run(args)
        finally:
            _flush_stdout()
    except BrokenPipeError:  # `timm-sepool list | head`
        return 141
    except (CommandError, OSError) as e:  # OSError: from print, or because the system is out of files or memory
        message = ' '.join(str(e).splitlines())  # a path may hold a newline
        print(f'timm-sepool{command}: error: {message}', file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        terminated = isinstance(e, _Terminated)
        print('terminated' if terminated else 'interrupted', file=sys.stderr)
        return 143 if terminated else 130
    finally:
        if catches_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return code or 0
