""" The same seed gives the same bits, and nothing grows in long runs

--full runs ten times as many steps and cycles.
"""
import ctypes
import gc
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import torch
from torch import nn

import timm
from helpers.common import TINY, images, training_step
from helpers.processes import run_processes

FAMILIES = ['rgse_resnext50', 'spse_resnet50']
TESTS = Path(__file__).parents[1]
MORE = 10 if os.environ['TIMM_SEPOOL_FULL_TESTS'] else 1


# --- determinism

CASES = {
    'plain': {},
    'channels_last': {},
    'drop_path': dict(drop_path_rate=0.5),
    'drop_block': dict(drop_block_rate=0.2, drop_rate=0.2),
    'checkpointing': dict(drop_path_rate=0.5),
}


def digest(name: str, case: str, seed: int = 0) -> str:
    """Hash of all bits of a new network, of its losses, of it after three steps, and of its logits and features."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=10, **TINY, **CASES[case])
    tensors = [t.clone() for t in model.state_dict().values()]
    memory_format = torch.channels_last if case == 'channels_last' else torch.contiguous_format
    model = model.to(memory_format=memory_format).train()
    model.set_grad_checkpointing(case == 'checkpointing')
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sizes = [(64, 64), (40, 56), (97, 33)]  # grids tile the maps, or cells overlap
    for size in sizes:
        loss, grads = training_step(model, images(4, *size).to(memory_format=memory_format))
        for n, p in model.named_parameters():
            p.grad = grads[n]
        optimizer.step()
        tensors.append(loss)
    tensors += model.state_dict().values()
    model.eval()
    with torch.no_grad():
        for size in sizes:
            x = images(2, *size).to(memory_format=memory_format)
            tensors += [model(x), *model.forward_intermediates(x, intermediates_only=True)]
    assert all(t.isfinite().all() for t in tensors)
    return hashlib.sha256(b''.join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def digests() -> Dict[str, str]:
    return {f'{name}-{case}': digest(name, case) for name in FAMILIES for case in CASES}


def test_same_seed_same_bits() -> None:
    """Construction, training and inference, in this process and in two new ones that order sets differently."""
    code = 'import json, torch, test_long_runs; torch.set_num_threads(1); print(json.dumps(test_long_runs.digests()))'
    path = os.pathsep.join(p for p in (str(TESTS), str(TESTS.parent), os.environ.get('PYTHONPATH')) if p)
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, 'PYTHONHASHSEED': hash_seed, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'})
        for hash_seed in '12']
    expected = digests()
    try:
        for process in processes:
            stdout, stderr = process.communicate(timeout=300)
            assert process.returncode == 0, stderr[-3000:]
            assert json.loads(stdout) == expected
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert digest(FAMILIES[0], 'plain', seed=1) != expected[f'{FAMILIES[0]}-plain']
    for name in FAMILIES:
        assert len({expected[f'{name}-{case}'] for case in ('plain', 'drop_path', 'drop_block')}) == 3


@pytest.mark.parametrize('case', ['plain', 'channels_last'])
@pytest.mark.parametrize('name', FAMILIES)
def test_deterministic_algorithms(name: str, case: str) -> None:
    """Accepted in training and inference, and no uninitialized memory (then NaN) gets into a result."""
    expected = digest(name, case)
    torch.use_deterministic_algorithms(True)
    try:
        assert digest(name, case) == expected
    finally:
        torch.use_deterministic_algorithms(False)


# --- memory

class _MallInfo(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in (
        'arena', 'ordblks', 'smblks', 'hblks', 'hblkhd', 'usmblks', 'fsmblks', 'uordblks', 'fordblks', 'keepcost')]


def usage() -> Dict[str, int]:
    """What the process holds now. 'heap' is exact, 'rss' has pages that no object needs."""
    gc.collect()
    kinds = [type(o) for o in gc.get_objects()]
    held = {
        'tensors': sum(issubclass(k, torch.Tensor) for k in kinds),
        'modules': sum(issubclass(k, nn.Module) for k in kinds),
        'objects': len(kinds),
    }
    if sys.platform == 'linux':
        libc = ctypes.CDLL(None)
        if hasattr(libc, 'mallinfo2'):  # glibc 2.33
            libc.malloc_trim(0)  # free pages between kept ones, such as those of the source code that fx keeps
            libc.mallinfo2.restype = _MallInfo
            info = libc.mallinfo2()
            held['heap'] = info.uordblks + info.hblkhd
        held['rss'] = int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    return held


def growth(run: Callable[[int], Any], count: int) -> Dict[str, int]:
    """Growth of each kind over `count` runs, after a warm-up."""
    for i in range(max(5, count // 10)):
        run(i)
    before = usage()
    for i in range(count):
        run(i)
    return {k: v - before[k] for k, v in usage().items()}


def _memory_rank(rank: int, build: Callable, args: tuple, count: int, leak: str) -> Dict[str, int]:
    run = build(*args)
    kept = []

    def leaking(i: int) -> None:
        result = run(i)
        if leak == 'tensor':
            kept.append(torch.zeros(256))
        elif leak == 'graph':
            kept.append(result().grad_fn)  # of a forward without a backward: no tensor that Python sees
        elif leak == 'model':
            kept.append(result)

    return growth(leaking, count)


def training(name: str) -> Callable:
    """A training step, on maps that the grids tile and maps that they don't in turn."""
    model = timm.create_model(name, num_classes=10, **TINY).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = [images(2, size, 32) for size in (32, 40)]

    def run(i: int) -> Callable:
        optimizer.zero_grad()
        model(x[i % 2]).square().mean().backward()
        optimizer.step()
        return lambda: model(x[i % 2]).mean()

    return run


def cycle(name: str, kwargs: Dict[str, Any], trace: bool = False) -> Callable:
    """A network that is made, used and forgotten."""
    x = images(2, 32, 32)

    def run(i: int) -> nn.Module:
        model = timm.create_model(name, **kwargs)
        if trace:
            model = torch.fx.symbolic_trace(model)
        out = model(x)
        (out[-1] if isinstance(out, list) else out).mean().backward()
        return model

    return run


STEPS, CYCLES = 200 * MORE, 20 * MORE
LIMITS = {  # per run, far below the leaks that are planted, and above the source code that fx keeps of every trace
    training: dict(tensors=0, modules=0, objects=0.1, heap=256),
    cycle: dict(tensors=0, modules=0, objects=10, heap=100_000),
}
RSS_LIMIT = 32 * 2 ** 20  # in all, however many runs
ADOPTED = dict(base='regnety_002', squeeze='rgse', num_classes=10)
RUNS = {
    **{f'train-{n}': (training, (n,), STEPS) for n in FAMILIES},
    **{f'create-{n}': (cycle, (n, dict(TINY, num_classes=10)), CYCLES) for n in FAMILIES},
    **{f'features-{n}': (cycle, (n, dict(TINY, features_only=True)), CYCLES) for n in FAMILIES},
    **{f'fx-{n}': (cycle, (n, dict(TINY, num_classes=10), True), CYCLES) for n in FAMILIES},
    'create-adopted': (cycle, ('adopted', ADOPTED), CYCLES),
    'features-adopted': (cycle, ('adopted', dict(ADOPTED, features_only=True)), CYCLES),
}


def leaks(build: Callable, args: tuple, count: int, leak: str = '') -> List[str]:
    """What grows by more than its limit."""
    grown, = run_processes(_memory_rank, 1, build, args, count, leak, timeout=300 * MORE)
    limits = {k: v * count for k, v in LIMITS[build].items()}
    return [f'{k} +{v}' for k, v in grown.items() if v > limits.get(k, RSS_LIMIT)]


@pytest.mark.parametrize('run', RUNS)
def test_nothing_grows(run: str) -> None:
    assert leaks(*RUNS[run]) == []


@pytest.mark.parametrize('build,leak,seen', [
    (training, 'tensor', ['tensors', 'objects', 'heap']),
    (training, 'graph', ['objects', 'heap', 'rss']),
    (cycle, 'model', ['tensors', 'modules', 'objects', 'heap', 'rss']),
], ids=['tensor', 'graph', 'model'])
def test_leaks_are_seen(build: Callable, leak: str, seen: List[str]) -> None:
    """A kilobyte or a graph kept at every step, a network kept at every cycle."""
    args = (FAMILIES[0],) if build is training else (FAMILIES[0], dict(TINY, num_classes=10))
    available = usage()
    found = {x.split()[0] for x in leaks(build, args, 50, leak)}
    assert found >= {k for k in seen if k in available}
