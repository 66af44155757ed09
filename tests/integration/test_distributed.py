""" Training on several processes equals training on one, and checkpoints of one kind load in the others """
import copy
import os
import signal
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

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
full = pytest.mark.full
needs_fsdp = pytest.mark.skipif(fully_shard is None, reason='fully_shard needs torch 2.6 or newer')
pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason='this torch is built without gloo')


@contextmanager
def process_group(folder: Path, rank: int, world: int, timeout: float = 300) -> Iterator[None]:
    """Processes that meet at a file, because a port can be in use."""
    store = dist.FileStore(str(folder / 'meeting'), world)
    dist.init_process_group('gloo', store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    yield  # after an error no process waits for the others
    dist.destroy_process_group()


def build(network: str, kind: str = 'single', frozen: bool = True, seed: int = 0) -> Tuple:
    """A small network in float64, in train mode with the norms' statistics frozen, and its optimizer."""
    name, kwargs = NETWORKS[network]
    torch.manual_seed(seed)
    model = realistic(timm.create_model(name, num_classes=10, **kwargs)).to(torch.float64)
    if frozen:
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


def train_step(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: int,
        rank: int = 0,
        world: int = 1,
        batch: int = BATCH,
) -> torch.Tensor:
    """One step on this process's share of the step's images. Returns the loss."""
    x = images(STEPS * batch, 48, 40, dtype=torch.float64).split(batch)[step][rank::world]
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), torch.arange(batch)[rank::world] % 10)
    loss.backward()
    optimizer.step()
    return loss.detach()


def save(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, rank: int = 0, **entries) -> None:
    """Write a temporary file and rename it, so that the checkpoint is whole at any time."""
    state = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(dict(zip(('model', 'optimizer'), state), **entries), path.with_suffix('.tmp'))
        os.replace(path.with_suffix('.tmp'), path)
    if dist.is_initialized():
        dist.barrier()


def read(path: Path) -> Dict:
    return torch.load(path, weights_only=True)


def run_and_resume(folder: Path, network: str, kind: str, source: str, rank: int = 0, world: int = 1) -> List[float]:
    """Train from the start if source is the kind itself, else from the source's checkpoint. Save, return the losses."""
    model, optimizer = build(network, kind, seed=0 if source == kind else 1)
    first = 0
    losses = []
    if source != kind:
        checkpoint = read(folder / f'{source}.pt')
        first = checkpoint['step']
        set_state_dict(
            model, optimizer, model_state_dict=checkpoint['model'], optim_state_dict=checkpoint['optimizer'],
            options=StateDictOptions(full_state_dict=True))
    for step in range(first, STEPS):
        if step == STEPS // 2 and source == kind:
            save(model, optimizer, folder / f'{kind}.pt', rank, step=step)
        losses.append(train_step(model, optimizer, step, rank, world).item())
    save(model, optimizer, folder / f'{kind}-from-{source}.pt', rank)
    return losses


def check_same(folder: Path, kind: str, source: str, losses: List[float], expected: List[float]) -> None:
    """The losses, and the parameters and momenta in the file, are those of single-process training."""
    torch.testing.assert_close(losses, expected[-len(losses):], rtol=0, atol=1e-10)
    a, b = (read(folder / f'{name}.pt') for name in (f'{kind}-from-{source}', 'single-from-single'))
    torch.testing.assert_close(a['model'], b['model'], rtol=0, atol=1e-10)
    torch.testing.assert_close(a['optimizer']['state'], b['optimizer']['state'], rtol=0, atol=1e-10)
    assert a['optimizer']['param_groups'] == b['optimizer']['param_groups']


def _train_rank(rank: int, folder: Path, network: str, world: int, runs: List[Tuple[str, str]]) -> List[List[float]]:
    with process_group(folder, rank, world):
        return [run_and_resume(folder, network, kind, source, rank, world) for kind, source in runs]


@pytest.mark.parametrize('network,kind,world', [
    ('rgse', 'ddp', 2),
    pytest.param('spse', 'fsdp', 2, marks=needs_fsdp),
    *(pytest.param(*case, marks=full) for case in (
        ('spse', 'ddp', 2), ('adopted', 'ddp', 2), ('rgse', 'ddp', 4), ('spse', 'ddp', 4))),
    *(pytest.param(*case, marks=[full, needs_fsdp]) for case in (
        ('rgse', 'fsdp', 2), ('rgse', 'fsdp', 4), ('spse', 'fsdp', 4))),
])
def test_equals_one_process(tmp_path: Path, network: str, kind: str, world: int) -> None:
    """DDP (no parameter unused) and FSDP2 (squeezes and blocks sharded) with frozen statistics take the same steps as
    one process with the global batch, and the checkpoint of each kind continues in the others."""
    expected = run_and_resume(tmp_path, network, 'single', 'single')
    start, end = (read(tmp_path / f'{n}.pt')['model'] for n in ('single', 'single-from-single'))
    assert all((start[n] - end[n]).abs().max() > 1e-6 for n, _ in build(network)[0].named_parameters())
    runs = [(kind, kind)]
    if world == 2:
        runs += [(kind, 'single')]
        runs += [('ddp', 'ddp'), ('fsdp', 'ddp'), ('ddp', 'fsdp')] * (kind == 'fsdp')
    losses = run_processes(_train_rank, world, tmp_path, network, world, runs)
    for run, *of_ranks in zip(runs, *losses):
        assert len({x[0] for x in of_ranks}) == world  # each has its own images
        check_same(tmp_path, *run, torch.tensor(of_ranks, dtype=torch.float64).mean(0).tolist(), expected)
    check_same(tmp_path, 'single', kind, run_and_resume(tmp_path, network, 'single', kind), expected)


def _train_statistics_rank(rank: int, folder: Path, network: str, world: int) -> Tuple[List, Dict]:
    with process_group(folder, rank, world):
        model, optimizer = build(network, 'ddp', frozen=False)
        record = []
        for step in range(2):
            loss = train_step(model, optimizer, step, rank, world, 3 * world)
            record.append((loss, {n: b.clone() for n, b in model.module.named_buffers()}))
        return record, dict(model.module.named_parameters())


@pytest.mark.parametrize('network,world', [('rgse', 2), pytest.param('spse', 4, marks=full)])
def test_statistics_of_each_process(tmp_path: Path, network: str, world: int) -> None:
    """Norms that are not frozen do what DDP defines: each process normalizes by its own images, gradients are averaged,
    and each step starts with the running statistics of rank 0."""
    ranks = run_processes(_train_statistics_rank, world, tmp_path, network, world)
    model, optimizer = build(network, frozen=False)
    for step in range(2):
        copies = [copy.deepcopy(model) for _ in range(world)]
        for rank, replica in enumerate(copies):
            loss = train_step(replica, torch.optim.SGD(replica.parameters(), lr=0.), step, rank, world, 3 * world)
            torch.testing.assert_close(
                (loss, dict(replica.named_buffers())), ranks[rank][0][step], rtol=0, atol=1e-10)
        for p, *of_ranks in zip(model.parameters(), *(c.parameters() for c in copies)):
            p.grad = torch.stack([q.grad for q in of_ranks]).mean(0)
        optimizer.step()
        model.load_state_dict({**model.state_dict(), **dict(copies[0].named_buffers())})
    for _, params in ranks:
        torch.testing.assert_close(params, dict(model.named_parameters()), rtol=0, atol=1e-10)


@pytest.mark.parametrize('network,convert', [
    ('rgse', nn.SyncBatchNorm.convert_sync_batchnorm), ('spse', convert_sync_batchnorm),
    ('adopted', convert_sync_batchnorm)])
def test_sync_bn_conversion(network: str, convert) -> None:
    """Every norm is converted, the network computes the same and state dicts fit both ways."""
    model = build(network)[0].eval()
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    converted = convert(copy.deepcopy(model))
    assert [n for n, m in converted.named_modules() if isinstance(m, nn.SyncBatchNorm)] == norms
    assert network == 'adopted' or any(n.endswith('.se.bn') for n in norms)  # adopted squeezes have no norm
    x = images(2, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(converted(x), model(x), rtol=0, atol=1e-12)
    for source, other in ((model, convert(build(network, seed=1)[0].eval())), (converted, build(network)[0].eval())):
        other.load_state_dict(source.state_dict())
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-12)


def _train_until_lost_rank(rank: int, folder: Path, world: int, how: int, timeout: float) -> None:
    with process_group(folder, rank, world, timeout=timeout):
        model, optimizer = build('rgse', 'ddp')
        for step in range(STEPS):
            if step == 2 and rank == world - 1:
                model.module.layer2[0].se.weight.register_hook(lambda grad: os.kill(os.getpid(), how))
            train_step(model, optimizer, step, rank, world)
            save(model, optimizer, folder / 'ddp.pt', rank, step=step + 1)


@pytest.mark.parametrize('how', ['SIGKILL', pytest.param('SIGSTOP', marks=full)])  # the second waits for the timeout
def test_lost_process(tmp_path: Path, how: str) -> None:
    """One of four processes is killed or stopped in the middle of a backward: the others end with an error, and two new
    ones continue from the last checkpoint to the result of undisturbed training."""
    expected = run_and_resume(tmp_path, 'rgse', 'single', 'single')
    timeout = 300 if how == 'SIGKILL' else 60
    *others, lost = run_processes(
        _train_until_lost_rank, 4, tmp_path, 4, getattr(signal, how), timeout, timeout=240, check=False)
    assert isinstance(lost, Failed) and lost.exitcode == -signal.SIGKILL  # one that was stopped is killed in the end
    for other in others:
        assert isinstance(other, Failed) and other.exitcode == 1 and 'RuntimeError' in other.traceback
    (tmp_path / 'meeting').unlink(missing_ok=True)
    assert read(tmp_path / 'ddp.pt')['step'] == 2
    (tmp_path / 'ddp.pt').rename(tmp_path / 'lost.pt')
    losses = run_processes(_train_rank, 2, tmp_path, 'rgse', 2, [('ddp', 'lost')])
    check_same(tmp_path, 'ddp', 'lost', torch.tensor(losses, dtype=torch.float64).mean(0)[0].tolist(), expected)
