""" Pictures of what the squeeze looks at and of what the gates do

- gates: mean gate of every channel for several classes, as in section 7.2 of SENet, https://arxiv.org/abs/1709.01507
- kernels: weight of every position in the squeeze
- descriptors: the pooled cells over the image that they come from

Each is drawn for the last block of every stage. Gates and descriptors are drawn for timm's own SE networks too. Drawing
raises ImportError if matplotlib is not installed.
"""
import math
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from .squeeze import spatial_kernel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['plot_gates', 'plot_kernels', 'plot_descriptors']


def new_figure(width: float, height: float) -> Any:
    """Empty figure of width x height inches, independent of pyplot."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as e:
        raise ImportError('Drawing needs matplotlib: pip install "timm_sepool[plot]".') from e
    return Figure((width, height), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))


class Observation(NamedTuple):
    """What one SE module received and computed for N images."""
    name: str
    size: torch.Size  # of its input, (H, W)
    cells: torch.Tensor  # its input, average-pooled to its finest grid, (N, C, g, g)
    gate: torch.Tensor  # (N, C)


def last_se_modules(model: nn.Module) -> Dict[str, Any]:
    """SE module of the last block of each stage, by name. Raises ValueError if the network has none."""
    # a stage is the parent of blocks: 'layer1' for layer1.2.se, 'blocks.3' for blocks.3.1.se
    by_stage = {
        name.rsplit('.', 2)[0]: (name, module)
        for name, module in model.named_modules() if isinstance(getattr(module, 'gate', None), nn.Module)}
    if not by_stage:
        raise ValueError(
            f'{type(model).__name__} has no SE module with a gate layer. Use an SPSE, RGSE or SE network of timm.')
    return dict(by_stage.values())


def kernel_weights(module: nn.Module) -> List[torch.Tensor]:
    """Depthwise kernels (C, 1, g, g) of an SE module's averages, the finest grid last; none for a global average."""
    adopted = isinstance(getattr(module, 'squeeze', None), nn.Module)
    owner: Any = module.squeeze if adopted else module
    # attributes are the weights in use, from which parameters differ under pruning and parametrizations
    weights = [getattr(owner, name, None) for name in ('weight', 'weight1', 'weight2', 'weight4')]
    weights = [weight.detach() for weight in weights if torch.is_tensor(weight)]
    # the squeeze of an adopted module adds local averages to the global one
    return [torch.ones_like(weights[0][:, :, :1, :1]), *weights] if adopted else weights


def check_kernels(model: nn.Module) -> None:
    """Raise ValueError if the network has no kernel that `plot_kernels` could draw."""
    if not any(kernel_weights(module) for module in last_se_modules(model).values()):
        raise ValueError(
            f'Every squeeze of this {type(model).__name__} is the global average, which has no kernel. '
            'Use an SPSE, RGSE or adopted network.')


@torch.no_grad()
def observe(model: nn.Module, images: torch.Tensor, labels: Any = None) -> Tuple[torch.Tensor, List[Observation]]:
    """Run a network in eval mode on preprocessed images (N, C, H, W).

    Returns:
        Logits (N, num_classes) and an observation of the SE module of each stage's last block.

    Raises:
        ValueError: If the images do not fit the network or the labels, or a module does not use one gate per channel.
    """
    shape = images.shape[:1] if labels is None else torch.as_tensor(labels).shape
    if shape != images.shape[:1]:
        raise ValueError(f'labels must have shape ({len(images)},), one per image, got {tuple(shape)}.')
    chans = getattr(model, 'in_chans', None) or images.shape[1]
    if images.ndim != 4 or not len(images) or images.shape[1] != chans:
        raise ValueError(f'The network takes images (N, {chans}, H, W), N >= 1, got {tuple(images.shape)}.')
    modules = last_se_modules(model)
    sizes: Dict[str, torch.Size] = {}
    cells: Dict[str, List[torch.Tensor]] = {name: [] for name in modules}
    gates: Dict[str, List[torch.Tensor]] = {name: [] for name in modules}

    def record_input(name: str, module: nn.Module, args: Any) -> None:
        sizes[name] = args[0].shape[-2:]
        grid = max([weight.shape[-1] for weight in kernel_weights(module)], default=1)
        cells[name].append(F.adaptive_avg_pool2d(args[0].float(), grid).cpu())

    def record_gate(name: str, layer: nn.Module, args: Any, gate: torch.Tensor) -> None:
        if gate.ndim != 4 or gate.shape[2:] != (1, 1):
            kind = type(modules[name]).__name__
            raise ValueError(f'The gate of {name} ({kind}) is {tuple(gate.shape)}, not one per channel (B, C, 1, 1).')
        gates[name].append(gate.flatten(1).float().cpu())

    param = next(model.parameters())
    with ExitStack() as stack:  # leaves the network as it was
        for name, module in modules.items():
            stack.enter_context(module.register_forward_pre_hook(partial(record_input, name)))
            stack.enter_context(module.gate.register_forward_hook(partial(record_gate, name)))
        for module in model.modules():
            stack.callback(setattr, module, 'training', module.training)
        model.eval()
        outputs = [model(batch.to(param.device, param.dtype)) for batch in images.split(64)]
    if not torch.is_tensor(outputs[0]):
        raise ValueError(f'{type(model).__name__} returns features. Create it without features_only.')
    unused = [name for name in modules if not gates[name] or not cells[name]]
    if unused:
        raise ValueError(f'{unused[0]} ({type(modules[unused[0]]).__name__}) does not use its gate layer.')
    logits = torch.cat([output.float().cpu() for output in outputs])
    return logits, [Observation(name, sizes[name], torch.cat(cells[name]), torch.cat(gates[name])) for name in modules]


def _class_name(class_names: Optional[Sequence[str]], index: int) -> str:
    if class_names is None or index >= len(class_names):
        return str(index)
    name = str(class_names[index]).split(',')[0]  # names of ImageNet's classes list synonyms
    return name if len(name) <= 20 else f'{name[:17]}...'


def plot_gates(
        model: nn.Module, images: torch.Tensor, labels: torch.Tensor,
        class_names: Optional[Sequence[str]] = None, classes: Optional[Sequence[int]] = None,
) -> 'Figure':
    """Draw the mean gate of every channel for several classes, one panel per stage (SENet, section 7.2).

    Channels are sorted by their gate's mean over all classes. A panel's title gives the spread: the standard deviation
    over all classes of a channel's mean gate, averaged over the channels.

    Args:
        model: A network with SE modules of any kind.
        images: Preprocessed images (N, C, H, W), of several classes.
        labels: Class of each image, (N,).
        class_names: Name of each class, its number if None.
        classes: Classes to draw, by default up to five of those in labels.

    Raises:
        ValueError: If the network has no gates, or images, labels or classes do not fit.
    """
    labels = torch.as_tensor(labels).cpu()
    present = labels.unique().tolist()
    classes = present[::math.ceil(len(present) / 5) or 1] if classes is None else classes
    missing = [_class_name(class_names, c) for c in classes if c not in present]
    if missing:
        raise ValueError(f'There is no image of class {", ".join(missing)}.')
    _, observations = observe(model, images, labels)
    cols = min(len(observations), 2)
    rows = math.ceil(len(observations) / cols)
    figure = new_figure(7 * cols, 3.4 * rows + 1)
    axes = figure.subplots(rows, cols, squeeze=False, sharey=True).flat
    for ax, (name, _, _, gate) in zip(axes, observations):
        means = torch.stack([gate[labels == c].mean(0) for c in present])
        mean, order = means.mean(0).sort()
        for c in classes:
            ax.plot(means[present.index(c), order].numpy(), linewidth=0.8, label=f'class {_class_name(class_names, c)}')
        ax.plot(mean.numpy(), color='black', linewidth=1.6, label=f'mean over all {len(present)} classes')
        ax.set_title(f'{name}: standard deviation over classes {means.std(0, correction=0).mean():.3f}')
        ax.set(xlabel='channel, sorted by the mean over all classes', xlim=(0, len(mean) - 1))
        ax.set(ylim=(0, 2 if means.max() > 1 else 1))  # gates of inserted attention are twice a sigmoid
        ax.grid(alpha=0.3)
    for ax in axes[len(observations):]:
        ax.set_visible(False)
    for ax in axes[::cols]:
        ax.set_ylabel('mean gate')
    least = labels.unique(return_counts=True)[1].min()
    figure.suptitle(f'Mean gate of every channel by class, {len(images)} images, {least} or more of each class')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
    return figure


def plot_kernels(model: nn.Module, input_size: Optional[Sequence[int]] = None, num_channels: int = 4) -> 'Figure':
    """Draw the weight of every position in the squeeze, before its norm, one row per stage.

    A row shows the mean over all channels and the channels whose weights have the largest norm.

    Args:
        model: A network with SPSE, RGSE or adopted squeezes.
        input_size: Size (C, H, W) of an input, by default that of the network's pretrained_cfg.
        num_channels: Channels to draw.

    Raises:
        ValueError: If no squeeze has a kernel, or an argument is invalid.
    """
    if num_channels < 1:
        raise ValueError(f'num_channels must be at least 1, got {num_channels}.')
    input_size = input_size or getattr(model, 'pretrained_cfg', {}).get('input_size')
    if not input_size:
        raise ValueError(f'This {type(model).__name__} has no pretrained_cfg. Pass input_size.')
    check_kernels(model)
    _, observations = observe(model, torch.zeros(1, *input_size))
    figure = new_figure(3 * (num_channels + 1), 2.7 * len(observations) + 0.8)
    axes = figure.subplots(len(observations), num_channels + 1, squeeze=False)
    for row, (name, (height, width), _, _) in zip(axes, observations):
        weights = kernel_weights(model.get_submodule(name))  # after the forward, in which pruning computes them
        if weights:
            kernel = spatial_kernel(height, width, weights).float().cpu().unflatten(1, (height, width))
            channels = kernel.flatten(1).norm(dim=1).topk(min(num_channels, len(kernel))).indices.tolist()
            maps = [(f'{name}\nmean of {len(kernel)} channels', kernel.mean(0))]
            maps += [(f'channel {c}', kernel[c]) for c in channels]
        else:
            maps = [(f'{name}\nevery channel', torch.full((height, width), 1 / (height * width)))]
            text = f'Global average, no kernel:\nevery weight is 1 / ({height} x {width}).'
            row[1].text(0, 0.5, text, transform=row[1].transAxes, verticalalignment='center')
        panels = list(zip(row, maps))
        # the mean is much smaller than the largest kernels, so it has its own scale
        for group in filter(None, (panels[:1], panels[1:])):
            limit = max(m.abs().max().item() for _, (_, m) in group) or 1.
            for ax, (title, m) in group:
                image = ax.imshow(m.numpy(), cmap='RdBu_r', vmin=-limit, vmax=limit)
                ax.set_title(title, fontsize='medium')
                ax.set(yticks=range(0, height, math.ceil(height / 4)), xticks=range(0, width, math.ceil(width / 4)))
            figure.colorbar(
                image, ax=[ax for ax, _ in group], fraction=0.15 / len(group), pad=0.05 / len(group),
                format='%.2g', ticks=(-limit, 0, limit))
        for ax in row[len(maps):]:
            ax.set_axis_off()
        row[0].set(xlabel='column', ylabel='row')
    shown = f'input {input_size[1]} x {input_size[2]}: mean over channels and the channels of largest norm'
    figure.suptitle(f'Weight of every position in the squeeze, {shown}')
    return figure


def _cell_edges(size: int, grid: int, scale: float) -> Tuple[List[float], List[float]]:
    """Borders of adaptive pooling's windows along an axis of `size` positions, which are `scale` pixels each.

    Returns grid + 1 edges of cells that tile the axis, in the middle of the overlap where windows overlap; and every
    position at which a window starts or ends.
    """
    starts = [i * size // grid * scale for i in range(grid)]
    ends = [-(-(i + 1) * size // grid) * scale for i in range(grid)]
    edges = [0., *((end + start) / 2 for end, start in zip(ends, starts[1:])), size * scale]
    return edges, sorted({*starts, *ends})


def plot_descriptors(
        model: nn.Module, images: torch.Tensor, labels: Optional[torch.Tensor] = None,
        class_names: Optional[Sequence[str]] = None, prediction_names: Optional[Sequence[str]] = None,
        mean: Optional[Sequence[float]] = None, std: Optional[Sequence[float]] = None,
) -> 'Figure':
    """Draw the cells that each stage's squeeze pools to over the image, one row per image, one column per stage.

    A cell's colour is the mean over channels of average x gate. Lines are the borders of the pooling windows, which
    overlap where the grid does not divide the map. SPSE is drawn with its finest grid; a plain SE module has one cell.

    Args:
        model: A network with SE modules.
        images: Preprocessed images (N, C, H, W), a few.
        labels: Class of each image, (N,), if known.
        class_names: Name of each class of labels, its number if None.
        prediction_names: Name of each class of the network, its number if None.
        mean: Mean that the preprocessing subtracted, by default that of the network's pretrained_cfg.
        std: Standard deviation that it divided by.

    Raises:
        ValueError: If the network has no gates, or images or labels do not fit.
    """
    logits, observations = observe(model, images, labels)
    cfg = {**getattr(model, 'pretrained_cfg', {}), **{k: v for k, v in (('mean', mean), ('std', std)) if v is not None}}
    if not {'mean', 'std'} <= cfg.keys():
        raise ValueError(f'This {type(model).__name__} has no pretrained_cfg. Pass mean and std.')
    if {len(cfg['mean']), len(cfg['std'])} != {images.shape[1]}:
        raise ValueError(f'The images have {images.shape[1]} channels, so mean and std must have as many values.')
    shift, scale = (torch.as_tensor(cfg[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    pictures = (images.cpu().float() * scale + shift).clamp(0, 1).movedim(1, 3)
    height, width = pictures.shape[1:3]
    cols = len(observations) + 1
    side = max(2.5, 12.5 / cols)  # room for the text beside a row
    figure = new_figure(side * cols + 1.5, side * len(images) + 1.6)
    # the last row holds the colour bars
    axes = figure.subplots(len(images) + 1, cols, squeeze=False, height_ratios=[1] * len(images) + [0.05])
    for i, (row, picture) in enumerate(zip(axes, pictures)):
        text = [] if labels is None else [f'class {_class_name(class_names, int(labels[i]))}']
        if getattr(model, 'num_classes', 0):
            probability, prediction = logits[i].softmax(0).max(0)
            text += [f'predicted {_class_name(prediction_names, int(prediction))}', f'({100 * probability:.0f} %)']
        row[0].set_ylabel('\n'.join(text), fontsize='small')
        for ax in row:
            shown = picture if ax is row[0] and picture.shape[2] == 3 else picture.mean(2)
            vmin = 0 if ax is row[0] else -1  # pale under the cells
            ax.imshow(shown.numpy(), cmap='gray', vmin=vmin, vmax=1, extent=(0, width, height, 0))
            ax.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    axes[0, 0].set_title(f'input\n{height} x {width}', fontsize='medium')
    axes[-1, 0].set_axis_off()
    for col, (name, size, cells, gate) in zip(axes.T[1:], observations):
        weighted_cells = (cells * gate[:, :, None, None]).mean(1)
        limit = weighted_cells.abs().max().item() or 1.
        grid = weighted_cells.shape[-1]
        y_edges, y_borders = _cell_edges(size[0], grid, height / size[0])
        x_edges, x_borders = _cell_edges(size[1], grid, width / size[1])
        for ax, values in zip(col, weighted_cells):
            mesh = ax.pcolormesh(
                x_edges, y_edges, values.numpy(), cmap='RdBu_r', vmin=-limit, vmax=limit, alpha=0.65, linewidth=0)
            ax.hlines(y_borders, 0, width, color='white', linewidth=0.6)
            ax.vlines(x_borders, 0, height, color='white', linewidth=0.6)
        col[0].set_title(f'{name}\n{grid} x {grid} cells\nmap {size[0]} x {size[1]}', fontsize='medium')
        bar = figure.colorbar(mesh, cax=col[-1], orientation='horizontal', format='%.2g', ticks=(-limit, 0, limit))
        bar.ax.set_box_aspect(0.05)
        for label, alignment in zip(bar.ax.get_xticklabels(), ('left', 'center', 'right')):
            label.set_horizontalalignment(alignment)  # keeps the ends of neighbours apart
    figure.suptitle('Cells that the squeeze pools to: mean over channels of average x gate')
    return figure
