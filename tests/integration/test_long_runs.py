""" The same seed gives the same bits, and nothing grows in long runs (--full: 20 times as many steps and cycles) """
import ctypes
import gc
import hashlib
import os
import sys
from pathlib import Path
from typing import Any, Dict

import pytest
import torch

import timm
from helpers.common import FULL, TINY, images, training_step
from helpers.processes import run_processes

FAMILIES = ['rgse_resnext50', 'spse_resnet50']
CASES = {'plain': {}, 'dropping': dict(drop_path_rate=0.5, drop_block_rate=0.2, drop_rate=0.2)}


def digest(name: str, case: str, seed: int = 0) -> str:
    """Hash of all bits of a new network, of its losses, of it after three steps, and of its logits and features."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=10, **TINY, **CASES[case]).train()
    tensors = [t.clone() for t in model.state_dict().values()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sizes = [(64, 64), (40, 56), (97, 33)]  # the pooling windows tile the maps, or overlap
    for size in sizes:
        loss, grads = training_step(model, images(4, *size))
        for n, p in model.named_parameters():
            p.grad = grads[n]
        optimizer.step()
        tensors.append(loss)
    tensors += model.eval().state_dict().values()
    with torch.no_grad():
        for size in sizes:
            x = images(2, *size)
            tensors += [model(x), *model.forward_intermediates(x, intermediates_only=True)]
    assert all(t.isfinite().all() for t in tensors)
    return hashlib.sha256(b''.join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def digests(rank: int = 0, deterministic: bool = True) -> Dict[str, str]:
    """With `deterministic`, torch must accept the operations as that, and fills uninitialized memory with NaN."""
    torch.use_deterministic_algorithms(deterministic)
    return {f'{name}-{case}': digest(name, case) for name in FAMILIES for case in CASES}


def test_same_seed_same_bits() -> None:
    """Construction, training and inference, in this process and in a new one, whose strings have other hashes."""
    expected = digests(deterministic=False)
    assert run_processes(digests, 1) == [expected]
    assert digest(FAMILIES[0], 'plain', seed=1) != expected[f'{FAMILIES[0]}-plain']
    assert len(set(expected.values())) == len(expected)


def usage() -> Dict[str, int]:
    """What the process holds now. 'rss': in bytes, on Linux, without the free pages that glibc keeps for later."""
    gc.collect()
    kinds = [type(o) for o in gc.get_objects()]
    counted = dict(objects=object, tensors=torch.Tensor, modules=torch.nn.Module)
    held = {name: sum(issubclass(k, kind) for k in kinds) for name, kind in counted.items()}
    if sys.platform == 'linux':
        getattr(ctypes.CDLL(None), 'malloc_trim', abs)(0)
        held['rss'] = int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    return held


def _growth(rank: int, name: str, mode: str, kwargs: Dict[str, Any], count: int) -> Dict[str, int]:
    """Growth of each kind over `count` training steps, or as many short-lived networks, after a warm-up."""
    sys.settrace(None)  # coverage keeps what it traces
    model = timm.create_model(name, **kwargs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = [images(2, size, 32) for size in (32, 40)]  # the pooling windows tile the maps, or overlap

    def run(i: int) -> None:
        network = model if mode == 'train' else timm.create_model(name, **kwargs)
        out = (torch.fx.symbolic_trace(network) if mode == 'fx' else network)(x[i % 2])
        optimizer.zero_grad()
        (out[-1] if isinstance(out, list) else out).square().mean().backward()
        optimizer.step()

    for i in range(max(5, count // 10)):
        run(i)
    before = usage()
    for i in range(count):
        run(i)
    return {k: v - before[k] for k, v in usage().items()}


NETWORKS = {**dict.fromkeys(FAMILIES, TINY), 'adopted': dict(base='regnety_002', squeeze='rgse')}
RUNS = {
    f'{mode}-{name}': (name, mode, dict(kwargs, features_only=True) if mode == 'features' else kwargs)
    for name, kwargs in NETWORKS.items() for mode in ('train', 'create', 'features', 'fx')}
QUICK = ('train-spse_resnet50', 'features-rgse_resnext50')


@pytest.mark.parametrize('run', [run if run in QUICK else pytest.param(run, marks=pytest.mark.full) for run in RUNS])
def test_nothing_grows(run: str) -> None:
    training = run.startswith('train')
    count = (100 if training else 10) * (20 if FULL else 1)
    growth, = run_processes(_growth, 1, *RUNS[run], count, timeout=6000)
    limits = dict(tensors=0, modules=0, objects=count * (0.1 if training else 10), rss=2 ** 25)  # fx keeps sources
    assert not {k: v for k, v in growth.items() if v > limits[k]}
