""" Speed and memory of the networks beside their peers

Noise on a shared machine is larger than what there is to tell apart. So all networks run in one process and in turns,
in a random order each round, and what counts is the ratio of the medians to that of one peer.

Blocks are compared with the roofline, the time of their least memory traffic at the bandwidth of a copy in the same
run: everything after bn3 fused, 4 passes over x forward (read for the squeeze; read, the shortcut read and the output
written for the sum) and 6 backward. The copy writes to memory that is there, a block allocates its output; and a map
that fits into a cache is not bound by memory, so the share says something for large x only.

What was tried for the squeeze and the sum and is not in use. Times in ms of the form in use / of the alternative,
medians of interleaved rounds, batch 8, fp32, one thread of an AVX-512 CPU, torch 2.15; C @ H = W of ResNet-50 at 224:

| alternative | where it would be | in use / alternative |
|---|---|---|
| pool each grid by itself | SPSE 256 @ 56, forward and backward | 7.9 / 40.1 |
| x times windows (a matrix product) where cells overlap | SPSE 1024 @ 14, forward and backward | 2.0 / 4.5 |
| x times the kernel where cells tile the map | SPSE 256 @ 56, forward and backward | 7.9 / 14.6 |
| batched product with the kernel | SPSE 256 @ 56, channels_last, forward | 1.6 / 16.1 |
| avg_pool2d in channels_first too | RGSE 256 @ 56, forward | 2.1 / 3.9 |
| row means times spread weights | the same (keeps more for the backward) | 2.3 / 2.0 |
| addcmul in training | sum, 256 @ 56, channels_last, forward and backward | 20.5 / 28.2 |
| addcmul into the memory of x at inference | sum and bn3, 256 @ 56 (overwrites what hooks were given) | 6.0 / 4.7 |
| the squeeze's norm folded into its kernel | RGSE 256 @ 56, one image, forward | 0.28 / 0.39 |
| the same, into scale and bias | SPSE 256 @ 56, forward | 2.3 / 2.5 |
| excitation by linear layers | 2048 channels, forward (0.05 % of the network) | 0.38 / 0.20 |
| products with the kernel, compiled | RGSE 256 @ 56, block, training step | 261 / 260 |
"""
import itertools
import math
import platform
import random
import statistics
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from timm.models import create_model, is_model
from timm.models.resnet import Bottleneck, ResNet

from .. import __version__, _private
from ..squeeze import SEPoolModule, SPSEModule
from ._output import CommandError, first_line, new_path

DEFAULT_MODELS = (
    'resnet50', 'seresnet50', 'resnet50+cbam', 'resnet50+eca', 'rgse_resnet50+reference', 'spse_resnet50+reference',
    'rgse_resnet50', 'spse_resnet50')
MODES = ('infer', 'train')
PASSES = {'infer': 4, 'train': 10}  # over x, of a block whose every step after bn3 is fused


def reference_descriptor(module: SEPoolModule, x: torch.Tensor) -> torch.Tensor:
    """Fused descriptor (B, C, 1, 1) of x (B, C, H, W) as the paper writes it, each grid pooled and convolved by itself.
    """
    p: Dict[str, Any] = dict(module.named_parameters(recurse=False))
    if isinstance(module, SPSEModule):
        levels = [(1, p['weight1'], p['bias1']), (2, p['weight2'], p['bias2']), (4, p['weight4'], p['bias4'])]
    elif 'weight' in p:
        levels = [(p['weight'].shape[-1], p['weight'], None)]
    else:
        return F.adaptive_avg_pool2d(x, 1).relu()
    s: Any = sum(F.conv2d(F.adaptive_avg_pool2d(x, g), w, b, groups=x.shape[1]) for g, w, b in levels)
    return module.bn(s).relu()


def reference_gate(module: SEPoolModule, x: torch.Tensor) -> torch.Tensor:
    """Gate (B, C, 1, 1) of x (B, C, H, W)."""
    return module.fc2(module.fc1(reference_descriptor(module, x)).relu()).sigmoid()


class _Reference(nn.Module):
    def __init__(self, module: SEPoolModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * reference_gate(self.module, x)


def create_network(spec: str, **kwargs) -> nn.Module:
    """Network of a name of timm, or NAME+ATTN: with that attention of timm, or with `reference`, the paper's block
    written out in the place of ours.

    Raises:
        CommandError: If it can't be created.
    """
    name, _, attn = spec.partition('+')
    if not is_model(name):
        raise CommandError(f'Unknown model {name!r}. timm.list_models() lists those that there are.')
    if attn and attn != 'reference':
        kwargs['block_args'] = dict(attn_layer=attn)
    try:
        model = create_model(name, **kwargs)
    except Exception as e:
        raise CommandError(f'{spec} can not be created: {first_line(e)}') from e
    if attn == 'reference':
        modules = {n: m for n, m in model.named_modules() if isinstance(m, SEPoolModule)}
        if not modules:
            raise CommandError(f'{name} is no SPSE / RGSE network, it has no reference.')
        for n in modules:
            model.set_submodule(n, _Reference(modules[n]))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            nn.init.ones_(module.weight)  # some networks start with residual branches of zeros
    return model


class _Clock:
    """Times a function's steps in ms, on CUDA by events and after the caches were overwritten."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == 'cuda'
        self.flush = torch.empty(2 ** 28 if self.cuda else 0, dtype=torch.int8, device=device)

    def __call__(self, step: Callable[[], Any], steps: int) -> float:
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(steps):
                step()
            return (time.perf_counter() - start) / steps * 1e3
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(steps)]
        for start, end in events:
            self.flush.zero_()
            start.record()
            step()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / steps


def interleave(
        steps: Dict[Any, Callable[[], Any]],
        clock: Callable[[Callable[[], Any], int], float],
        rounds: int,
        repeats: int,
        tick: Callable[[], Any] = lambda: None,
) -> Dict[Any, List[float]]:
    """Time several functions in turns.

    Args:
        steps: Functions by key.
        clock: Times `repeats` calls of one, in ms a call.
        rounds: Times each, after one round that does not count.
        repeats: Calls in a row.
        tick: Called after each measurement.

    Returns:
        Times (ms) of the rounds, by key.
    """
    times: Dict[Any, List[float]] = {key: [] for key in steps}
    generator = random.Random(0)
    for i in range(-1, rounds):
        for key in generator.sample(list(steps), len(steps)):
            ms = clock(steps[key], repeats)
            if i >= 0:
                times[key].append(ms)
            tick()
    return times


def summary(times: Dict[Any, List[float]], peer: Any) -> Dict[Any, Dict[str, float]]:
    """Median (ms) and its spread, and the throughput relative to the peer's.

    Returns:
        By key: ms, the median; spread, the interquartile range over the median; ratio, the peer's median over this one;
        ratio_low and ratio_high, the quartiles of the rounds' ratios.
    """
    def quartiles(values: List[float]) -> Tuple[float, float]:
        q = statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else values * 3
        return q[0], q[2]

    out = {}
    for key, ms in times.items():
        median = statistics.median(ms)
        low, high = quartiles(ms)
        ratio_low, ratio_high = quartiles([theirs / ours for theirs, ours in zip(times[peer], ms)])
        out[key] = dict(
            ms=median, spread=(high - low) / median, ratio=statistics.median(times[peer]) / median,
            ratio_low=ratio_low, ratio_high=ratio_high)
    return out


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that one forward keeps for its backward, parameters and x apart."""
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    saved = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    del out
    return sum(nbytes for ptr, nbytes in saved.items() if ptr not in known)


def _step(model: nn.Module, x: torch.Tensor, mode: str, autocast: Callable[[], Any]) -> Callable[[], Any]:
    if mode == 'infer':
        @torch.inference_mode()
        def infer() -> None:
            with autocast():
                model(x)
        return infer

    optimizer = torch.optim.SGD(model.parameters(), lr=0., momentum=0.9)  # its work, without its result

    def train() -> None:
        with autocast():
            logits = model(x)
            loss = F.cross_entropy(logits, torch.arange(len(x), device=x.device) % logits.shape[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return train


class _Given(nn.Module):
    """Stands for a block's layers up to bn3."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.x = x

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.x


def _block_step(
        block: Bottleneck,
        shape: Tuple[int, int, int, int],
        mode: str,
        x: torch.Tensor,
        autocast: Callable[[], Any],
) -> Callable[[], torch.Tensor]:
    """Everything after bn3 of a bottleneck on a new bn3 output of a shape (B, C, H, W), dtype and format as x."""
    fmt = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    train = mode == 'train'
    given, shortcut, cotangent = (
        torch.randn(shape, dtype=x.dtype, device=x.device).to(memory_format=fmt).requires_grad_(train and i < 2)
        for i in range(3))
    tail = type(block).__new__(type(block))
    nn.Module.__init__(tail)
    tail.__dict__.update({k: v for k, v in block.__dict__.items() if k != '_modules'})
    for name, child in block.named_children():
        tail.add_module(name, child if name in ('se', 'act3') else nn.Identity())
    tail.bn3, tail.downsample, tail.drop_path = _Given(given), None, None
    tail.train(train)
    params = [given, shortcut, *block.se.parameters()]

    def step() -> torch.Tensor:
        with torch.set_grad_enabled(train):
            with autocast():
                out = tail(shortcut)
            return torch.autograd.grad(out, params, cotangent.to(out.dtype))[0] if train else out
    return step


def bench(
        models: List[str],
        peer: str,
        modes: Tuple[str, ...] = MODES,
        batch_size: int = 8,
        size: Tuple[int, int] = (224, 224),
        device: str = 'cpu',
        compile: bool = False,
        channels_last: bool = False,
        amp: bool = False,
        rounds: int = 7,
        repeats: int = 1,
        blocks: bool = False,
        model_kwargs: Optional[Dict[str, Any]] = None,
) -> Dict[str, Any]:
    """Time networks in turns.

    Args:
        models: Names, or NAME+ATTN as of `create_network`.
        peer: One more of these, to which the others are compared.
        modes: 'infer', a forward in inference mode; 'train', forward, backward and an SGD step with momentum.
        batch_size: Images a step.
        size: Image height and width.
        device: Torch device.
        compile: Compile the networks with torch.compile.
        channels_last: Memory format of networks and images.
        amp: Autocast to bfloat16.
        rounds: Measurements of each network.
        repeats: Steps in a row in one measurement.
        blocks: Also time everything after bn3 of each stage's last block.
        model_kwargs: Arguments of all networks.

    Returns:
        settings, and results, a list of dicts of model, mode, images_per_s, what `summary` holds, saved_mb (kept for
        the backward, train mode without compile) and peak_mb (most that a step allocates, CUDA); and, if blocks,
        blocks, dicts of model, mode, stage, `summary` and roofline (share of the bandwidth that the bound takes).

    Raises:
        CommandError: If an argument makes no sense or a network can't be created or run.
    """
    try:
        from tqdm import tqdm
    except ImportError as e:
        raise CommandError('The progress bar needs tqdm: pip install "timm_sepool[quickstart]".') from e
    if min(batch_size, rounds, repeats, *size) < 1:
        raise CommandError('Batch size, image size, rounds and repeats must be at least 1.')
    if blocks and compile:
        raise CommandError('Blocks are timed as they are, not compiled. Leave out one of the two.')
    if not device.startswith(('cpu', 'cuda')):
        raise CommandError(f'The device has to be cpu or cuda, others run asynchronously, got {device!r}.')
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:  # torch asserts that it was built with CUDA
        raise CommandError(f'There is no device {device!r}: {first_line(e)}') from e
    device = torch.device(device)
    if device.type == 'cuda':
        torch.cuda.set_device(device)  # events and memory are those of the current device

    specs = list(dict.fromkeys([peer, *models]))
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(batch_size, 3, *size, device=device).to(memory_format=fmt)
    networks: Dict[str, Any] = {
        spec: create_network(spec, **(model_kwargs or {})).to(device).to(memory_format=fmt) for spec in specs}

    with_se = [
        spec for spec, m in networks.items()
        if isinstance(m, ResNet) and isinstance(m.get_submodule('layer1')[-1], Bottleneck)  # type: ignore[index]
        and m.get_submodule('layer1')[-1].se is not None]  # type: ignore[index]
    if blocks and not with_se:
        raise CommandError('No network has the bottlenecks of ResNet with attention, which --blocks is about.')

    def autocast():
        return torch.autocast(device.type, torch.bfloat16) if amp else nullcontext()

    if compile:
        # networks of one class share the limit, beyond it they would silently run uncompiled (with fullgraph they fail)
        config = _private.dynamo_config
        config.cache_size_limit = max(config.cache_size_limit, 4 * len(specs))

    clock = _Clock(device)
    results, block_results = [], []
    with tqdm(total=len(modes) * len(specs) * (rounds + 1), unit='measurement', disable=None) as progress:
        for mode in modes:
            steps: Dict[str, Callable[[], Any]] = {}
            memory: Dict[str, Dict[str, float]] = {}
            for spec, model in networks.items():
                model.train(mode == 'train')
                try:
                    if mode == 'train' and not compile:
                        with autocast():
                            memory.setdefault(spec, {})['saved_mb'] = saved_bytes(model, x) / 1e6
                    network: Any = torch.compile(model, fullgraph=True) if compile else model
                    steps[spec] = _step(network, x, mode, autocast)
                    steps[spec]()
                    if device.type == 'cuda':
                        before = torch.cuda.memory_allocated()
                        torch.cuda.reset_peak_memory_stats()
                        steps[spec]()
                        peak = (torch.cuda.max_memory_allocated() - before) / 1e6
                        memory.setdefault(spec, {})['peak_mb'] = peak
                except Exception as e:
                    raise CommandError(f'{spec} can not {mode} on {tuple(x.shape)}: {first_line(e)}') from e
            times = interleave(steps, clock, rounds, repeats, progress.update)
            for spec, row in summary(times, peer).items():
                results.append(dict(
                    model=spec, mode=mode, images_per_s=batch_size / row['ms'] * 1e3, **row, **memory.get(spec, {})))
            for model in networks.values():
                model.zero_grad()

    for mode, stage in itertools.product(modes if blocks else (), (1, 2, 3, 4)):
        steps, nbytes = {}, 0
        for spec in with_se:
            block = networks[spec].get_submodule(f'layer{stage}')[-1]
            shape = (batch_size, block.bn3.num_features, *(-(-s // 2 ** (stage + 1)) for s in size))
            like = x.bfloat16() if amp else x
            nbytes = math.prod(shape) * like.itemsize
            steps[spec] = _block_step(block, shape, mode, like, autocast)
        source = torch.ones(nbytes, dtype=torch.int8, device=device)  # written: pages of nothing cost nothing to read
        steps['copy'] = partial(torch.empty_like(source).copy_, source)
        rows = summary(interleave(steps, clock, rounds, max(5, repeats)), peer if peer in steps else 'copy')
        bound = rows.pop('copy')['ms'] / 2 * PASSES[mode]  # a copy is two passes
        block_results += [
            dict(model=spec, mode=mode, stage=stage, mb=nbytes / 1e6, roofline=bound / row['ms'], **row)
            for spec, row in rows.items()]

    settings = dict(
        peer=peer, batch_size=batch_size, size=list(size), compile=compile, channels_last=channels_last, amp=amp,
        rounds=rounds, repeats=repeats, model_kwargs=model_kwargs or {}, threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else
        f'{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}',
        torch=torch.__version__, timm_sepool=__version__)
    return dict(settings=settings, results=results, **(dict(blocks=block_results) if blocks else {}))


def table(report: Dict[str, Any]) -> str:
    """What `bench` returns, for a terminal."""
    s = report['settings']
    flags = ''.join(f', {k}' for k in ('compile', 'channels_last', 'amp') if s[k])
    lines = [
        f'{s["device"]}, {s["threads"]} threads, torch {s["torch"]}: batch {s["batch_size"]}, '
        f'{s["size"][0]} x {s["size"][1]}{flags}, {s["rounds"]} rounds',
        f'{"model":<28}{"mode":<7}{"ms":>9}{"+-%":>6}{"images/s":>10}{"ratio":>7}  {"(quartiles)":<13}'
        f'{"MB":>7}']
    for r in report['results']:
        memory = r.get('peak_mb', r.get('saved_mb'))
        lines.append(
            f'{r["model"]:<28}{r["mode"]:<7}{r["ms"]:>9.1f}{50 * r["spread"]:>6.1f}{r["images_per_s"]:>10.1f}'
            f'{r["ratio"]:>7.3f}  ({r["ratio_low"]:.3f}-{r["ratio_high"]:.3f})'
            + (f'{memory:>7.0f}' if memory else f'{"-":>7}'))
    lines.append(
        f'ratio: throughput relative to {s["peer"]} (ratio of medians), higher is better\n'
        'MB: on CUDA the most that a step allocates, else what is kept for the backward')
    if 'blocks' in report:
        lines.append(f'\n{"after bn3":<28}{"mode":<7}{"stage":>6}{"x (MB)":>8}{"ms":>9}{"ratio":>7}{"roofline":>10}')
        lines += [
            f'{r["model"]:<28}{r["mode"]:<7}{r["stage"]:>6}{r["mb"]:>8.1f}{r["ms"]:>9.2f}{r["ratio"]:>7.2f}'
            f'{100 * r["roofline"]:>9.0f}%' for r in report['blocks']]
    return '\n'.join(lines)


def plot(report: Dict[str, Any], path: Path) -> None:
    """Bar chart of the throughputs relative to the peer's, as PNG.

    Raises:
        CommandError: If path exists or can't be written.
    """
    from matplotlib.figure import Figure

    settings, results = report['settings'], report['results']
    models = list(dict.fromkeys(r['model'] for r in results))[::-1]
    modes = list(dict.fromkeys(r['mode'] for r in results))
    figure = Figure(figsize=(8, 0.9 + 0.5 * len(models)), layout='constrained')
    axes = figure.subplots()
    height = 0.8 / len(modes)
    for i, mode in enumerate(modes):
        rows = {r['model']: r for r in results if r['mode'] == mode}
        ratio = [rows[m]['ratio'] for m in models]
        whiskers = [
            [max(0., rows[m]['ratio'] - rows[m]['ratio_low']) for m in models],
            [max(0., rows[m]['ratio_high'] - rows[m]['ratio']) for m in models]]
        offset = (len(modes) - 1) / 2 - i
        bars = axes.barh(
            [k + offset * height for k in range(len(models))], ratio, height, xerr=whiskers, capsize=2,
            label={'infer': 'inference', 'train': 'training step'}[mode])
        axes.bar_label(bars, fmt='%.2f', label_type='center', color='white')
    axes.axvline(1., color='black', linewidth=0.8)
    axes.set_yticks(range(len(models)), models)
    axes.set_xlabel(f'throughput relative to {settings["peer"]} (ratio of medians, whiskers: quartiles of the rounds)')
    flags = ''.join(f', {k}' for k in ('compile', 'channels_last', 'amp') if settings[k])
    axes.set_title(
        f'{settings["device"]}, batch {settings["batch_size"]}, {settings["size"][0]} x {settings["size"][1]}{flags}')
    axes.legend(loc='lower center', ncols=2, bbox_to_anchor=(0.5, 1.08), frameon=False)
    with new_path(path) as temporary:
        figure.savefig(temporary, format='png', dpi=120)
