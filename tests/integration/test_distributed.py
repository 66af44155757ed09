""" Training on several processes equals training on one, and checkpoints of one kind load in the others """
import copy
import os
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from signal import SIGKILL, SIGSTOP
from typing import Callable, List, Tuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import timm
from helpers.common import TINY, images, realistic
from helpers.processes import Failed, run_processes
from timm.layers import convert_sync_batchnorm

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch < 2.6
    fully_shard = None

NETWORKS = {
    'rgse': ('rgse_resnext50', TINY),
    'spse': ('spse_resnet50', TINY),
    'adopted': ('adopted', dict(base='regnety_002', squeeze='rgse')),
}
BATCH, STEPS = 4, 4  # of all processes together; the checkpoint is written after half of the steps
EXACT = dict(rtol=0, atol=1e-10)
read = partial(torch.load, weights_only=True)
pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason='this torch is built without gloo')


def _train_rank(rank: int, folder: Path, world: int, timeout: float, runs: Tuple) -> List[List[float]]:
    store = dist.FileStore(str(folder / 'meeting'), world)  # at a file, because a port can be in use
    dist.init_process_group('gloo', store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    results = [train(folder, rank, world, *run) for run in runs]
    dist.destroy_process_group()
    return results


def train_group(folder: Path, world: int, *runs: Tuple, timeout: float = 300, check: bool = True) -> List:
    """Losses of the runs in each process of a group, whose collectives fail after `timeout` seconds."""
    (folder / 'meeting').unlink(missing_ok=True)
    return run_processes(_train_rank, world, folder, world, timeout, runs, check=check)


def build(network: str, kind: str = 'single', seed: int = 0) -> Tuple:
    """A small network in float64, in train mode with the norms' statistics frozen, and its optimizer."""
    name, kwargs = NETWORKS[network]
    torch.manual_seed(seed)
    model = realistic(timm.create_model(name, num_classes=10, **kwargs)).to(torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    if kind == 'ddp':
        model = DistributedDataParallel(model)
    if kind == 'fsdp':
        mesh = dist.init_device_mesh('cpu', (dist.get_world_size(),))
        for module in list(model.modules()):
            if hasattr(module, 'se'):
                fully_shard(module.se, mesh=mesh)
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def train(folder: Path, rank: int, world: int, network: str, kind: str, source: str, signal: int = 0) -> List[float]:
    """Train from the start if source is the kind itself, else from the source's checkpoint. Save, return the losses.

    The last process gets the signal in the backward of the first step after the checkpoint.
    """
    model, optimizer = build(network, kind, seed=0 if source == kind else 1)

    def save(name: str, **entries) -> None:
        state = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            torch.save(dict(zip(('model', 'optimizer'), state), **entries), folder / f'{name}.pt')
        if world > 1:
            dist.barrier()

    first, losses = 0, []
    if source != kind:
        checkpoint = read(folder / f'{source}.pt')
        first = checkpoint['step']
        set_state_dict(
            model, optimizer, model_state_dict=checkpoint['model'], optim_state_dict=checkpoint['optimizer'],
            options=StateDictOptions(full_state_dict=True))
    for step in range(first, STEPS):
        if step == STEPS // 2 and source == kind:
            save(kind, step=step)
            if signal and rank == world - 1:
                model.module.layer2[0].se.weight.register_hook(lambda grad: os.kill(os.getpid(), signal))
        x = images(STEPS * BATCH, 48, 40, dtype=torch.float64).split(BATCH)[step]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rank::world]), torch.arange(BATCH)[rank::world])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    save(f'{kind}-from-{source}')
    return losses


def check_same(folder: Path, kind: str, source: str, losses: List[List[float]], expected: List[float]) -> None:
    """The mean losses, and the parameters and momenta in the file, are those of single-process training."""
    mean = torch.tensor(losses, dtype=torch.float64).mean(0).tolist()
    torch.testing.assert_close(mean, expected[-len(mean):], **EXACT)
    a, b = (read(folder / f'{name}.pt') for name in (f'{kind}-from-{source}', 'single-from-single'))
    torch.testing.assert_close(a['model'], b['model'], **EXACT)
    torch.testing.assert_close(a['optimizer']['state'], b['optimizer']['state'], **EXACT)
    assert a['optimizer']['param_groups'] == b['optimizer']['param_groups']


FULL_CASES = [*product(NETWORKS, ['ddp'], [2]), ('rgse', 'fsdp', 2), *product(('rgse', 'spse'), ('ddp', 'fsdp'), [4])]


@pytest.mark.parametrize('network, kind, world', [
    ('spse', 'fsdp', 2), *(pytest.param(*case, marks=pytest.mark.full) for case in FULL_CASES)])
def test_equals_one_process(tmp_path: Path, network: str, kind: str, world: int) -> None:
    """DDP (no parameter unused) and FSDP2 (squeezes and blocks sharded) with frozen statistics take the same steps as
    one process with the global batch, and the checkpoint of each kind continues in the others."""
    if kind == 'fsdp' and fully_shard is None:
        pytest.skip('fully_shard needs torch 2.6 or newer')
    expected = train(tmp_path, 0, 1, network, 'single', 'single')
    start, end = (read(tmp_path / f'{n}.pt')['model'] for n in ('single', 'single-from-single'))
    assert all((start[n] - end[n]).abs().max() > 1e-6 for n, _ in build(network)[0].named_parameters())
    runs = [(kind, kind)]
    if world == 2:
        runs += [(kind, 'single')]
        runs += [('ddp', 'ddp'), ('fsdp', 'ddp'), ('ddp', 'fsdp')] * (kind == 'fsdp')
    losses = train_group(tmp_path, world, *((network, *run) for run in runs))
    for run, *of_ranks in zip(runs, *losses):
        assert len({x[0] for x in of_ranks}) == world  # each has its own images
        check_same(tmp_path, *run, of_ranks, expected)
    check_same(tmp_path, 'single', kind, [train(tmp_path, 0, 1, network, 'single', kind)], expected)


# the second waits for the timeout
@pytest.mark.parametrize('signal, timeout', [(SIGKILL, 300), pytest.param(SIGSTOP, 60, marks=pytest.mark.full)])
def test_lost_process(tmp_path: Path, signal: int, timeout: int) -> None:
    """One of four processes is killed or stopped in the middle of a backward: the others end with an error, and two new
    ones continue from the last checkpoint to the result of undisturbed training."""
    expected = train(tmp_path, 0, 1, 'rgse', 'single', 'single')
    *others, lost = train_group(tmp_path, 4, ('rgse', 'ddp', 'ddp', signal), timeout=timeout, check=False)
    assert isinstance(lost, Failed) and lost.exitcode == -SIGKILL  # one that was stopped is killed in the end
    for other in others:
        assert isinstance(other, Failed) and other.exitcode == 1 and 'RuntimeError' in other.traceback
    (tmp_path / 'ddp.pt').rename(tmp_path / 'lost.pt')
    (a,), (b,) = train_group(tmp_path, 2, ('rgse', 'ddp', 'lost'))
    check_same(tmp_path, 'ddp', 'lost', [a, b], expected)


@pytest.mark.parametrize('network, convert', [
    ('rgse', nn.SyncBatchNorm.convert_sync_batchnorm), ('spse', convert_sync_batchnorm),
    ('adopted', convert_sync_batchnorm)])
def test_sync_bn_conversion(network: str, convert: Callable) -> None:
    """Every norm is converted, the network computes the same and state dicts fit both ways."""
    model, other = (build(network, seed=seed)[0].eval() for seed in (0, 1))
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    converted = convert(copy.deepcopy(other))
    assert [n for n, m in converted.named_modules() if isinstance(m, nn.SyncBatchNorm)] == norms
    assert network == 'adopted' or any(n.endswith('.se.bn') for n in norms)  # adopted squeezes have no norm
    x = images(2, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(converted(x), other(x), rtol=0, atol=1e-12)
    converted.load_state_dict(model.state_dict())
    other.load_state_dict(converted.state_dict())
    for restored in (converted, other):
        torch.testing.assert_close(restored(x), model(x), rtol=0, atol=1e-12)
