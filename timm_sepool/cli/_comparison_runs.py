""" The runs of `timm-sepool compare`: processes of timm's train.py, started, resumed, watched and ended """
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections import deque
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Deque, Dict, Iterator, List, NamedTuple, Optional, Tuple

from ._output import CommandError, replaced_path

LOG, STARTS, CHECKPOINT = 'train.log', 'starts.json', 'last.pth.tar'


class Plan(NamedTuple):
    """What one call of `compare` has to train, and how."""
    out: Path
    settings: Dict[str, Any]  # contents of compare.json
    labels: List[str]  # models of this call
    command: List[str]  # of every run, before its model and seed
    device: str  # as train.py's --device
    jobs: int
    batch_size: int  # of one process


class Run(NamedTuple):
    """One model with one seed."""
    out: Path
    label: str
    seed: int

    @property
    def folder(self) -> Path:
        return self.out / 'runs' / self.label / str(self.seed)

    def starts(self) -> List[Dict[str, Any]]:
        """Commands and times (s) of the processes of this run so far."""
        try:
            starts = json.loads((self.folder / STARTS).read_text(encoding='utf-8'))
            if starts[-1]['seconds'] is None:  # compare was killed, or trains it just now
                seconds = (self.folder / LOG).stat().st_mtime - starts[-1]['began']
                starts[-1]['seconds'] = max(0., round(seconds, 1))  # below 0: it has printed nothing yet
            return starts
        except (OSError, ValueError):
            return []


class Progress(NamedTuple):
    """What the files of a run say."""
    epochs: int  # scheduled, 0 if not known
    rows: Dict[int, Dict[str, float]]  # of summary.csv, by epoch
    damaged: Optional[int]  # number of the first unreadable line of summary.csv

    @property
    def finished(self) -> bool:
        return self.epochs > 0 and 'eval_top1' in self.rows.get(self.epochs - 1, {})


def read_progress(run: Run) -> Progress:
    """Read summary.csv and args.yaml.

    The last row of an epoch counts. A resumed run repeats the header, and an epoch whose checkpoint was not saved.
    """
    try:
        text = (run.folder / 'summary.csv').read_text(encoding='utf-8', errors='replace')
    except OSError:
        return Progress(0, {}, None)
    header: List[str] = []
    rows: Dict[int, Dict[str, float]] = {}
    damaged = None
    for i, line in enumerate(text.splitlines(keepends=True), 1):
        cells = line.strip().split(',')
        try:
            if not line.endswith('\n'):
                raise ValueError('cut')
            if cells[0] == 'epoch':
                header = cells
            else:
                row = {k: float(v) for k, v in zip(header, cells, strict=True)}
                rows[int(row['epoch'])] = row
        except (ValueError, KeyError):
            damaged = damaged or i
    try:
        args = (run.folder / 'args.yaml').read_text(encoding='utf-8')
    except (OSError, ValueError):
        args = ''
    return Progress(_scheduled_epochs(args), rows, damaged)


@lru_cache  # the bar asks ten times a second
def _scheduled_epochs(text: str) -> int:
    """Number of epochs that train.py schedules by the text of its args.yaml, 0 if that is damaged."""
    import torch
    import yaml

    from timm.scheduler import create_scheduler_v2, scheduler_kwargs

    try:
        args = Namespace(**yaml.safe_load(text))
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        return create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1)[1]
    except (TypeError, ValueError, AttributeError, yaml.YAMLError):
        return 0


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[Any]:
    """Hold the lock of a file. It ends with the last process that has the file open, however that process ends.

    Yields the open file, or None if another process holds the lock for `seconds` more.
    """
    import fcntl  # POSIX only

    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    with open(path, 'a') as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    yield None
                    return
                time.sleep(0.1)
        yield file


def command_of(plan: Plan, run: Run, restart: bool) -> Tuple[List[str], Dict[str, str], bool]:
    """Command of a run, what it sets in the environment, and whether it resumes."""
    model = plan.settings['models'][run.label]
    command = [*plan.command, '--model', model['model']]
    if model['model_kwargs']:
        command += ['--model-kwargs', *model['model_kwargs']]
    command += ['--seed', str(run.seed), '--output', str(run.folder.parent), '--experiment', run.folder.name]
    resume = not restart and (run.folder / CHECKPOINT).is_file()
    if resume:
        command += ['--resume', str(run.folder / CHECKPOINT)]
    return command, {'OMP_NUM_THREADS': str(plan.settings['threads'])}, resume


def describe(plan: Plan, wanted: List[Run], restart: bool) -> str:
    """What --dry-run prints: commands, number of runs, images in a step and, after one finished run, the hours."""
    finished = [run for run in wanted if read_progress(run).finished]
    missing = [run for run in wanted if run not in finished]
    lines = []
    for command, env, _ in (command_of(plan, run, restart) for run in missing):
        lines.append(' '.join([*(f'{k}={v}' for k, v in env.items()), shlex.join(command)]))
    nproc = plan.settings['nproc']
    lines.append(
        f'runs: {len(finished)} finished, {len(missing)} to train; images in a step: {plan.batch_size} x '
        f'{nproc} process{"es" * (nproc > 1)} = {plan.batch_size * nproc}')
    times = {run: sum(s['seconds'] for s in run.starts()) for run in finished}
    if times:
        of_model = [[t for r, t in times.items() if r.label == run.label] or [*times.values()] for run in missing]
        minutes = sum(sum(t) / len(t) for t in of_model) / plan.jobs / 60
        time_left = f'{minutes / 60:.1f} hours' if minutes >= 90 else f'{math.ceil(minutes)} min'
        lines.append(f'about {time_left} left with --jobs {plan.jobs}, by the times of the finished runs')
    return '\n'.join(lines)


class Job:
    """A process of train.py. It holds the lock of its run, so no other starts the run even if compare is killed."""

    def __init__(self, plan: Plan, run: Run, lock: Any, slot: int, restart: bool) -> None:
        self.run, self.lock = run, lock
        command, env, resumes = command_of(plan, run, restart)
        if not resumes and run.folder.exists():
            shutil.rmtree(run.folder)
        run.folder.mkdir(parents=True, exist_ok=True)
        nproc, cores = plan.settings['nproc'], []  # type: int, List[int]
        if plan.jobs > 1:
            if plan.device.startswith('cuda'):
                env['CUDA_VISIBLE_DEVICES'] = ','.join(_gpus()[slot * nproc:(slot + 1) * nproc])
            if hasattr(os, 'sched_setaffinity'):
                cores = sorted(os.sched_getaffinity(0))[slot::plan.jobs]
        self.starts = run.starts()
        self.starts.append(dict(command=shlex.join(command), env=env, resumed=resumes, began=time.time(), seconds=None))
        self._save()
        with open(run.folder / LOG, 'ab') as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                command, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=[lock.fileno()])
        if cores:
            with suppress(ProcessLookupError):  # it has failed already
                os.sched_setaffinity(self.process.pid, cores)

    def _save(self) -> None:
        with replaced_path(self.run.folder / STARTS) as temporary:
            temporary.write_text(json.dumps(self.starts, indent=2), encoding='utf-8')

    def close(self) -> None:
        """Keep the time of the process, which has ended, and let the lock go."""
        self.lock.close()
        self.starts[-1]['seconds'] = round(time.time() - self.starts[-1]['began'], 1)
        self._save()


def _gpus() -> List[str]:
    import torch

    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    return visible.split(',') if visible else [str(i) for i in range(torch.cuda.device_count())]


def train(plan: Plan, wanted: List[Run], restart: bool) -> int:
    """Train the runs that are not finished, and return how many have failed.

    Raises CommandError, before any is started, if another process trains one of them.
    """
    from tqdm import tqdm

    failed, total = 0, len(wanted)
    jobs: Dict[int, Job] = {}  # by slot
    todo: Deque[Tuple[Run, Any]] = deque()
    with ExitStack() as stack:
        for run in [run for run in wanted if not read_progress(run).finished]:
            lock = stack.enter_context(locked(plan.out / '.locks' / f'{run.label}-{run.seed}', seconds=6))
            if lock is None:  # a worker of train.py's loader outlives it by 5 s
                raise CommandError(
                    f'Another process trains {run.folder}. Wait for it, end it, or share the runs by --shard I/N.')
            progress = read_progress(run)  # another process may have trained it meanwhile
            if progress.damaged and not progress.finished and not restart and not (run.folder / CHECKPOINT).exists():
                raise CommandError(
                    f'{run.folder} has a damaged summary.csv and no checkpoint. Restore summary.csv, or pass '
                    '--restart to train the run anew.')
            if not progress.finished:
                todo.append((run, lock))
        done = total - len(todo)
        bar = stack.enter_context(tqdm(
            total=total, initial=done, disable=None,  # None: on a terminal only
            bar_format='{percentage:3.0f}%|{bar}| {n:.1f}/{total} runs [{elapsed}<{remaining}]'))
        if bar.disable:
            print(f'timm-sepool compare: {done} of {total} runs finished', file=sys.stderr, flush=True)
        try:
            while todo or jobs:
                for slot in range(plan.jobs):
                    if todo and slot not in jobs:
                        jobs[slot] = Job(plan, *todo.popleft(), slot, restart)
                time.sleep(0.1)
                for slot in [slot for slot, job in jobs.items() if job.process.poll() is not None]:
                    job = jobs.pop(slot)
                    job.close()
                    done += 1
                    failed += not _tell(job, f'{done}/{total}', bar)
                if not bar.disable:
                    epochs = [read_progress(job.run) for job in jobs.values()]
                    bar.n = done + sum(len(p.rows) / p.epochs for p in epochs if p.epochs)
                    bar.refresh()
        except BaseException:
            _end(list(jobs.values()))
            finished = sum(read_progress(run).finished for run in wanted)
            print(
                f'timm-sepool compare: {finished} of {total} runs finished. Repeat the command to continue; '
                'with --restart broken runs start anew.', file=sys.stderr)
            raise
    return failed


def _tell(job: Job, count: str, bar: Any) -> bool:
    """Print how a run has ended. Returns whether it is finished."""
    progress, code = read_progress(job.run), job.process.returncode
    head = f'[{count}] {job.run.label}, seed {job.run.seed}:'
    if progress.finished and not code:
        if bar.disable:
            top1, seconds = progress.rows[progress.epochs - 1]['eval_top1'], job.starts[-1]['seconds']
            print(f'{head} top-1 {top1:.2f} % after {seconds:.0f} s', file=sys.stderr, flush=True)
        return True
    why = f'failed with exit code {code}' if code else 'ended before its last epoch'
    if progress.damaged and not code:
        why += f' and line {progress.damaged} of its summary.csv is cut off, so it needs --restart'
    with open(job.run.folder / LOG, encoding='utf-8', errors='replace') as file:
        file.seek(job.log_start)
        log = file.read().strip().splitlines()
    lines = [
        f'{head} train.py {why}. Correct the cause and repeat the command. The end of {job.run.folder / LOG}:',
        *(f'    {line}' for line in log[-8:])]
    bar.write('\n'.join(lines), file=sys.stderr)
    return False


def _end(jobs: List[Job]) -> None:
    """Terminate the processes. After 20 s or a second Ctrl-C, kill them."""
    try:
        for job in jobs:
            job.process.terminate()
        deadline = time.monotonic() + 20
        for job in jobs:
            job.process.wait(max(0., deadline - time.monotonic()))
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        pass
    for job in jobs:
        job.process.kill()
        job.process.wait()
        with suppress(CommandError):  # a full disk has its message already
            job.close()
