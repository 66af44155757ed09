""" Runs functions in processes of their own, with a time limit """
import multiprocessing
import os
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Callable, List, NamedTuple

import torch

_CONTEXT = multiprocessing.get_context('forkserver' if hasattr(os, 'fork') else 'spawn')
_CONTEXT.set_forkserver_preload(['timm'])  # imported once, the processes are new otherwise


class Failed(NamedTuple):
    """How a process without a result ended: its exit code, and its traceback unless a signal killed it."""
    exitcode: int
    traceback: str


def _main(path: Path, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        torch.save(function(*args), path)
    except Exception:
        path.write_text(traceback.format_exc())
        os._exit(1)  # a process group would wait for its other processes


def run_processes(function: Callable, count: int, *args: Any, timeout: float = 300, check: bool = True) -> List[Any]:
    """Results of `function(rank, *args)` in `count` processes. Those that still run after `timeout` seconds are killed.

    With `check` a process that fails raises RuntimeError, without it is a `Failed` among the results.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, str(rank)) for rank in range(count)]
        processes = [
            _CONTEXT.Process(target=_main, args=(p, function, (r, *args)), daemon=True) for r, p in enumerate(paths)]
        for process in processes:
            process.start()
        running, deadline = {p.sentinel: p for p in processes}, time.monotonic() + timeout
        while running and time.monotonic() < deadline:
            ended = [running.pop(s) for s in wait(list(running), deadline - time.monotonic())]
            if check and any(p.exitcode for p in ended):
                break  # the others wait for it
        for process in processes:
            process.kill()
            process.join()
        results = [
            Failed(process.exitcode, path.read_text() if process.exitcode == 1 else '') if process.exitcode
            else torch.load(path, weights_only=False) for process, path in zip(processes, paths)]
    failures = [f'rank {rank}: {r.exitcode}\n{r.traceback}' for rank, r in enumerate(results) if isinstance(r, Failed)]
    if check and failures:
        raise RuntimeError('\n'.join(failures))
    return results
