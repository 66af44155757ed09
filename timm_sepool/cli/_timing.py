""" What `timm-sepool bench` measures: interleaved timings of networks and blocks, and their statistics

All networks run in turns, in a new random order each round, because noise on a shared machine is larger than their
differences but hardly changes within a round. Blocks are compared with their roofline: the time of their least memory
traffic, everything after bn3 fused, at the bandwidth of a copy in the same run. Forward takes 4 passes over x (read for
the squeeze; x and the shortcut read and the output written for the sum), backward 6 more. Only maps that do not fit
into a cache are bound by memory.
"""
import argparse
import math
import platform
import random
import statistics
import sys
import timeit
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any, Callable, ContextManager, Dict, List, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from timm.models import create_model
from timm.models.resnet import Bottleneck, ResNet

from .. import __version__, _private
from ..squeeze import SEPoolModule
from ._models import parse_spec
from ._output import CommandError, first_line

PASSES = {'infer': 4, 'train': 10}  # over x, by a fused block
Step = Callable[[], Any]
Autocast = Callable[[], ContextManager]  # creates the context of a forward


class ReferenceBlock(nn.Module):
    """An SPSE / RGSE block computed as the paper writes it: each grid is pooled and convolved separately."""

    def __init__(self, module: SEPoolModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m = self.module
        params = dict(m.named_parameters(recurse=False))
        levels = [(w, params.get(name.replace('weight', 'bias'))) for name, w in params.items() if 'weight' in name]
        pooled: Any = [F.conv2d(F.adaptive_avg_pool2d(x, w.shape[-1]), w, b, groups=len(w)) for w, b in levels]
        x_se = sum(pooled) if pooled else x.mean((2, 3), keepdim=True)
        return x * m.fc2(m.fc1(m.bn(x_se).relu()).relu()).sigmoid()


def create_network(spec: str, **kwargs) -> nn.Module:
    """Create NAME, any model of timm; NAME+ATTN, with that attention layer of timm; or NAME+reference.

    Model arguments may follow (`parse_spec`). Raises CommandError if timm cannot create it, or NAME+reference is not an
    SPSE / RGSE network.
    """
    _, name, attn, own_kwargs = parse_spec(spec)
    kwargs.update(own_kwargs)
    if attn and attn != 'reference':
        kwargs['block_args'] = {**kwargs.get('block_args', {}), 'attn_layer': attn}
    try:
        model = create_model(name, **kwargs)
    except Exception as e:  # timm's own, of any type
        raise CommandError(f'Cannot create {spec}: {first_line(e)}') from e
    if attn == 'reference':
        modules = {path: module for path, module in model.named_modules() if isinstance(module, SEPoolModule)}
        if not modules:
            raise CommandError(f'{name} is not an SPSE or RGSE network. Leave out +reference.')
        for path, module in modules.items():
            model.set_submodule(path, ReferenceBlock(module))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            nn.init.ones_(module.weight)  # residual branches that start at zero could be faster
    return model


class Clock:
    """Mean time of a step in ms, on CUDA measured by events, with the cache overwritten before each step."""

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(2 ** 28, dtype=torch.int8, device=device) if device.type == 'cuda' else None

    def __call__(self, step: Step, repeats: int) -> float:
        if self.flush is None:
            return timeit.timeit(step, number=repeats) / repeats * 1e3
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for begin, end in events:
            self.flush.zero_()
            begin.record()
            step()
            end.record()
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in events) / repeats


def interleave(
        steps: Dict[str, Step], clock: Callable[[Step, int], float], rounds: int, repeats: int,
        after_each: Step = lambda: None,
) -> Dict[str, List[float]]:
    """Time functions in turns: by name `rounds` times (ms), `clock`'s means of `repeats` calls, after a warm-up."""
    times: Dict[str, List[float]] = {key: [] for key in steps}
    generator = random.Random(0)
    for _ in range(rounds + 1):
        for key in generator.sample(list(steps), len(steps)):
            times[key].append(clock(steps[key], repeats))
            after_each()
    return {key: values[1:] for key, values in times.items()}


def summarize(times: Dict[str, List[float]], peer: str) -> Dict[str, Dict[str, float]]:
    """By name: ms is the median of the times and spread their interquartile range over ms.

    ratio, ratio_low and ratio_high are median and quartiles of the rounds' throughputs relative to the peer's.
    """
    rows = {}
    for key, values in times.items():
        (low, ms, high), (ratio_low, ratio, ratio_high) = (
            statistics.quantiles(v, n=4, method='inclusive') if len(v) > 1 else v * 3
            for v in (values, [theirs / ours for theirs, ours in zip(times[peer], values)]))
        rows[key] = dict(ms=ms, spread=(high - low) / ms, ratio=ratio, ratio_low=ratio_low, ratio_high=ratio_high)
    return rows


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that one forward keeps for its backward, not counting parameters, buffers and x."""
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    saved = {}

    def pack(t: torch.Tensor) -> None:
        # a storage that is kept keeps its address to itself; the tensor t would hold its graph, which leaks
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(storage.nbytes() for ptr, storage in saved.items() if ptr not in known)


def network_step(model: nn.Module, x: torch.Tensor, mode: str, autocast: Autocast) -> Step:
    """One inference or training step of a network on images x (B, C, H, W)."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0., momentum=0.9)  # does its work and leaves the weights

    @torch.inference_mode()
    def infer() -> None:
        with autocast():
            model(x)

    def train() -> None:
        with autocast():
            logits = model(x)
            loss = F.cross_entropy(logits, torch.arange(len(x), device=x.device) % logits.shape[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return infer if mode == 'infer' else train


def block_step(block: nn.Module, shape: Sequence[int], mode: str, like: torch.Tensor, autocast: Autocast) -> Step:
    """One step of everything after bn3 of a Bottleneck, on a random output x (B, C, H, W) of bn3 and shortcut.

    x has the dtype, device and memory format of `like`. The step returns the output (infer) or x's gradient (train).
    """
    fmt = torch.channels_last if like.stride(1) == 1 else torch.contiguous_format
    train = mode == 'train'
    x, shortcut, gradient = (
        torch.randn(*shape, dtype=like.dtype, device=like.device).to(memory_format=fmt) for _ in range(3))
    tail: Any = deepcopy(block).train(train)
    for name in dict(block.named_children()).keys() - {'se', 'act3'}:
        setattr(tail, name, nn.Identity())
    tail.bn3.register_forward_hook(lambda module, args, output: x)
    tail.downsample = tail.drop_path = None
    inputs = [x.requires_grad_(train), shortcut.requires_grad_(train), *tail.se.parameters()]

    def step() -> torch.Tensor:
        with torch.set_grad_enabled(train):
            with autocast():
                out = tail(shortcut)
            return torch.autograd.grad(out, inputs, gradient.to(out.dtype))[0] if train else out
    return step


def attention_blocks(model: Any) -> List[Any]:
    """Last block of each stage of a ResNet of Bottlenecks with attention, else nothing."""
    blocks = [getattr(model, f'layer{i}')[-1] for i in (1, 2, 3, 4)] if isinstance(model, ResNet) else []
    return blocks if all(isinstance(block, Bottleneck) and block.se is not None for block in blocks) else []


def measure(args: argparse.Namespace) -> Dict[str, Any]:
    """Time networks, and with --blocks their blocks, in turns, by the options of `timm-sepool bench`.

    Returns settings; results, dicts of model, mode, images_per_s, what `summarize` returns, saved_mb (kept for the
    backward, train mode without compile) and peak_mb (CUDA); and, if args.blocks, what `measure_blocks` returns.
    Raises CommandError if tqdm is missing, or the device or a network does not exist or cannot do what is asked.
    """
    try:
        from tqdm import tqdm
    except ImportError as e:
        raise CommandError('The progress bar needs tqdm: pip install "timm_sepool[quickstart]".') from e
    if args.threads:
        torch.set_num_threads(args.threads)
    size = (args.img_size * 2)[:2]
    args.modes = list(PASSES) if args.mode is None else [args.mode]
    fmt = torch.channels_last if args.channels_last else torch.contiguous_format
    try:
        x = torch.randn(args.batch_size, 3, *size, device=args.device).to(memory_format=fmt)
    except (RuntimeError, AssertionError) as e:  # torch asserts that it was built with CUDA
        raise CommandError(f'Cannot use the device {args.device!r}: {first_line(e)}') from e
    if x.device.type not in ('cpu', 'cuda'):
        raise CommandError(f'--device must be cpu or cuda, because others run asynchronously; got {args.device!r}.')
    if x.is_cuda:
        torch.cuda.set_device(x.device)  # events and memory statistics are those of the current device
    networks: Dict[str, Any] = {
        spec: create_network(spec, **args.model_kwargs).to(x.device).to(memory_format=fmt)
        for spec in dict.fromkeys([args.peer, *args.models])}
    blocks = {spec: attention_blocks(model) for spec, model in networks.items() if attention_blocks(model)}
    if args.blocks and not blocks:
        raise CommandError('--blocks needs a ResNet of bottlenecks with attention. Name one, such as seresnet50.')
    if args.compile:  # networks of one class share this limit; with fullgraph they fail beyond it
        config = _private.dynamo_config
        config.cache_size_limit = max(config.cache_size_limit, 4 * len(networks))
    autocast = partial(torch.autocast, x.device.type, torch.bfloat16) if args.amp else nullcontext
    results: List[Dict[str, Any]] = []
    total = len(args.modes) * len(networks) * (args.rounds + 1)
    what = f'{"compiling and " if args.compile else ""}timing {len(networks)} networks, {total} measurements'
    print(f'timm-sepool bench: {what}; the table comes at the end', file=sys.stderr)
    with tqdm(total=total, unit='measurement', disable=None) as progress:  # None: on a terminal only
        for mode in args.modes:
            steps: Dict[str, Step] = {}
            memory: Dict[str, Dict[str, float]] = {spec: {} for spec in networks}
            for spec, model in networks.items():
                model.train(mode == 'train')
                try:
                    if mode == 'train' and not args.compile:
                        with autocast():
                            memory[spec]['saved_mb'] = saved_bytes(model, x) / 1e6
                    network: Any = torch.compile(model, fullgraph=True) if args.compile else model
                    steps[spec] = network_step(network, x, mode, autocast)
                    steps[spec]()
                    if x.is_cuda:
                        before = torch.cuda.memory_allocated()
                        torch.cuda.reset_peak_memory_stats()
                        steps[spec]()
                        memory[spec]['peak_mb'] = (torch.cuda.max_memory_allocated() - before) / 1e6
                except Exception as e:  # of the network, of any type
                    raise CommandError(f'{spec} cannot {mode} on {tuple(x.shape)}: {first_line(e)}') from e
            times = interleave(steps, Clock(x.device), args.rounds, args.repeats, progress.update)
            results += [
                dict(model=spec, mode=mode, images_per_s=len(x) / row['ms'] * 1e3, **row, **memory[spec])
                for spec, row in summarize(times, args.peer).items()]
    keys = ('peer', 'batch_size', 'compile', 'channels_last', 'amp', 'rounds', 'repeats', 'model_kwargs')
    cpu = f'{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}'
    settings = dict(
        {k: getattr(args, k) for k in keys}, size=list(size), threads=torch.get_num_threads(), torch=torch.__version__,
        timm_sepool=__version__, device=torch.cuda.get_device_name(x.device) if x.is_cuda else cpu)
    report = dict(settings=settings, results=results)
    if args.blocks:
        print('timm-sepool bench: timing the blocks', file=sys.stderr)
        report['blocks'] = measure_blocks(blocks, x.bfloat16() if args.amp else x, autocast, args)
    return report


def measure_blocks(blocks: Dict[str, list], like: torch.Tensor, autocast: Autocast, args: argparse.Namespace) -> list:
    """Time the four blocks of each network in turns, for images of the shape and kind of `like`.

    Returns dicts of model, mode, stage, mb (size of x), what `summarize` returns, and roofline (its time over ms).
    """
    results = []
    for mode, stage in [(mode, stage) for mode in args.modes for stage in range(4)]:
        size = [-(-n // 2 ** (stage + 2)) for n in like.shape[2:]]
        steps: Dict[str, Step] = {}
        for spec, stages in blocks.items():
            shape = (len(like), stages[stage].bn3.num_features, *size)
            steps[spec] = block_step(stages[stage], shape, mode, like, autocast)
        nbytes = math.prod(shape) * like.itemsize
        source = torch.ones(nbytes, dtype=torch.int8, device=like.device)  # memory never written is cheaper to read
        steps['copy'] = partial(torch.empty_like(source).copy_, source)
        times = interleave(steps, Clock(like.device), args.rounds, max(5, args.repeats))
        rows = summarize(times, args.peer if args.peer in steps else 'copy')
        bound = rows.pop('copy')['ms'] / 2 * PASSES[mode]  # a copy takes two passes
        results += [
            dict(model=spec, mode=mode, stage=stage + 1, mb=nbytes / 1e6, roofline=bound / row['ms'], **row)
            for spec, row in rows.items()]
    return results
