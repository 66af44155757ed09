""" Pictures of what the squeeze looks at and of what the gates do with it

- gates: mean gate of every channel for several classes, as in section 7 of `Squeeze-and-Excitation Networks`
    - https://arxiv.org/abs/1709.01507
- kernels: weight of every position in the squeeze
- descriptors: the pooled cells over the picture that they come from

Each at the last block of every stage. The functions take a network and tensors and return a matplotlib figure, for a
notebook or for `figure.savefig`. Gates and descriptors are drawn for timm's own SE networks too, whose SE modules have
a `gate` layer as well.
"""
import math
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from timm.data import ImageNetInfo, create_dataset, create_transform, infer_imagenet_subset
from timm.models import create_model, get_arch_name, is_model, list_models, load_checkpoint

from .cli._output import CommandError, first_line
from .cli.hub import load_trained, read_run_args, training_preprocessing
from .squeeze import spatial_kernel

__all__ = ['plot_gates', 'plot_kernels', 'plot_descriptors']

BATCH_SIZE = 64
DPI = 100


def new_figure(width: float, height: float):
    """Empty figure of width x height inches that no global state of matplotlib knows of.

    Raises:
        CommandError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise CommandError('The pictures are drawn by matplotlib: pip install "timm_sepool[plot]".') from e
    figure = Figure(figsize=(width, height), dpi=DPI)
    figure.set_layout_engine('constrained', w_pad=0.08, h_pad=0.08)  # inches
    return figure


class Squeeze(NamedTuple):
    """What one SE module saw and did, N images."""
    name: str
    module: nn.Module
    size: Tuple[int, int]  # of the feature map x, (H, W)
    cells: torch.Tensor  # x, average-pooled to the module's finest grid, (N, C, g, g)
    gate: torch.Tensor  # (N, C)


def last_squeezes(model: nn.Module) -> Dict[str, Any]:
    """SE module of the last block of each stage, by name.

    Raises:
        ValueError: If the network has none.
    """
    # a stage is what the blocks are children of: 'layer1' for layer1.2.se, 'blocks.3' for blocks.3.1.se
    found = {
        name.rsplit('.', 2)[0]: (name, module)
        for name, module in model.named_modules() if isinstance(getattr(module, 'gate', None), nn.Module)
    }
    if not found:
        raise ValueError(f'{type(model).__name__} has no SE module with a gate layer, as SPSE, RGSE and timm have it.')
    return dict(found.values())


def kernel_weights(module: nn.Module) -> List[torch.Tensor]:
    """Depthwise kernels (C, 1, g, g) of an SE module's averages, the finest grid last, none if it has but the mean."""
    squeeze = getattr(module, 'squeeze', None)
    owner = squeeze if isinstance(squeeze, nn.Module) else module
    weights: List[torch.Tensor] = [p for n, p in owner.named_parameters(recurse=False) if n.startswith('weight')]
    # an adopted module's squeeze adds local averages to the mean
    return weights if owner is module else [torch.ones_like(weights[0][:, :, :1, :1]), *weights]


@torch.no_grad()
def observe(model: nn.Module, images: torch.Tensor) -> Tuple[torch.Tensor, List[Squeeze]]:
    """Run the network in eval mode and watch the SE module of the last block of each stage.

    Args:
        model: A network with SE modules.
        images: Preprocessed images (N, C, H, W).

    Returns:
        Logits (N, num_classes) and what each module saw and did.

    Raises:
        ValueError: If the images do not fit the network, or it has no module with a gate per channel.
    """
    chans = getattr(model, 'in_chans', None) or images.shape[1]
    if images.ndim != 4 or not len(images) or images.shape[1] != chans:
        raise ValueError(f'The network takes images (N, {chans}, H, W), N >= 1, got {tuple(images.shape)}.')
    modules = last_squeezes(model)
    grids = {name: max([w.shape[-1] for w in kernel_weights(module)], default=1) for name, module in modules.items()}
    sizes: Dict[str, Tuple[int, int]] = {}
    cells: Dict[str, List[torch.Tensor]] = {name: [] for name in modules}
    gates: Dict[str, List[torch.Tensor]] = {name: [] for name in modules}

    def see_input(name: str, x: torch.Tensor) -> None:
        sizes[name] = (x.shape[-2], x.shape[-1])
        cells[name].append(F.adaptive_avg_pool2d(x.float(), grids[name]).cpu())

    def see_gate(name: str, gate: torch.Tensor) -> None:
        if gate.ndim != 4 or gate.shape[2:] != (1, 1):
            raise ValueError(
                f'{name} ({type(modules[name]).__name__}) has no gates (B, C, 1, 1), but {tuple(gate.shape)}.')
        gates[name].append(gate.flatten(1).float().cpu())

    handles = []
    for name, module in modules.items():
        handles.append(module.gate.register_forward_hook(lambda m, args, out, name=name: see_gate(name, out)))
        handles.append(module.register_forward_pre_hook(lambda m, args, name=name: see_input(name, args[0])))
    param = next(model.parameters())
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        outputs = [model(batch.to(param.device, param.dtype)) for batch in images.split(BATCH_SIZE)]
        if not torch.is_tensor(outputs[0]):
            raise ValueError(f'{type(model).__name__} puts out features, a network that classifies is needed.')
        logits = torch.cat([output.float().cpu() for output in outputs])
    finally:
        for module, mode in training.items():
            module.training = mode
        for handle in handles:
            handle.remove()
    unused = [name for name in modules if not gates[name] or not cells[name]]
    if unused:
        raise ValueError(f'{unused[0]} ({type(modules[unused[0]]).__name__}) is no SE module that uses its gate layer.')
    return logits, [
        Squeeze(name, module, sizes[name], torch.cat(cells[name]), torch.cat(gates[name]))
        for name, module in modules.items()]


def _class_name(class_names: Optional[Sequence[str]], index: int) -> str:
    if class_names is None or index >= len(class_names):
        return str(index)
    name = str(class_names[index]).split(',')[0]  # ImageNet's have synonyms
    return name if len(name) <= 20 else f'{name[:17]}...'


def _check_labels(labels: Any, num_images: int) -> torch.Tensor:
    labels = torch.as_tensor(labels).cpu()
    if labels.shape != (num_images,):
        raise ValueError(f'There are {num_images} images, so labels has to be ({num_images},), not {labels.shape}.')
    return labels


def plot_gates(
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        class_names: Optional[Sequence[str]] = None,
        classes: Optional[Sequence[int]] = None,
):
    """Draw the mean gate of every channel for several classes, one panel per stage (SENet, section 7.2).

    Channels are sorted by their gate's mean over all classes. A panel's title holds the spread: the standard deviation
    over all classes of a channel's mean gate, averaged over the channels.

    Args:
        model: A network with SE modules of any kind.
        images: Preprocessed images (N, C, H, W), of several classes.
        labels: Class of each image, (N,).
        class_names: Name of each class, its number if None.
        classes: Classes to draw, by default up to five of those in labels.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: If the network has no gates, or images, labels or classes do not fit.
    """
    labels = _check_labels(labels, len(images))
    present = labels.unique().tolist()
    if classes is None:
        classes = present[::math.ceil(len(present) / 5)]
    missing = [_class_name(class_names, c) for c in classes if c not in present]
    if missing:
        raise ValueError(f'There is no image of class {", ".join(missing)}.')
    _, squeezes = observe(model, images)

    cols = min(len(squeezes), 2)
    rows = math.ceil(len(squeezes) / cols)
    figure = new_figure(7 * cols, 3.4 * rows + 1)
    axes = figure.subplots(rows, cols, squeeze=False, sharey=True).flat
    for ax, squeeze in zip(axes, squeezes):
        means = torch.stack([squeeze.gate[labels == c].mean(0) for c in present])
        mean = means.mean(0)
        order = mean.argsort()
        for c in classes:
            gate = means[present.index(c)][order]
            ax.plot(gate.numpy(), linewidth=0.8, label=f'class {_class_name(class_names, c)}')
        ax.plot(mean[order].numpy(), color='black', linewidth=1.6, label=f'mean over all {len(present)} classes')
        ax.set_title(f'{squeeze.name}: standard deviation over classes {means.std(0, correction=0).mean():.3f}')
        ax.set_xlim(0, len(mean) - 1)
        ax.set_ylim(0, 1)
        ax.grid(alpha=0.3)
        ax.set_xlabel('channel, sorted by the mean over all classes')
    for ax in axes[len(squeezes):]:
        ax.set_visible(False)
    for ax in axes[::cols]:
        ax.set_ylabel('mean gate')
    least = min(int((labels == c).sum()) for c in present)
    figure.suptitle(f'Mean gate of every channel by class, {len(images)} images, {least} or more of each class')
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc='outside lower center', ncols=3)
    return figure


def plot_kernels(model: nn.Module, input_size: Optional[Sequence[int]] = None, num_channels: int = 4):
    """Draw the weight of every position in the squeeze, before its norm, one row per stage.

    A row holds the mean over all channels and the channels whose weights have the largest norm.

    Args:
        model: A network with SPSE, RGSE or adopted squeezes.
        input_size: Size (C, H, W) of an input, by default that of the network's pretrained_cfg.
        num_channels: Channels to draw.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: If no squeeze has a kernel, or the arguments make no sense.
    """
    if num_channels < 1:
        raise ValueError(f'num_channels has to be at least 1, got {num_channels}.')
    input_size = input_size or getattr(model, 'pretrained_cfg', {}).get('input_size')
    if not input_size:
        raise ValueError(f'This {type(model).__name__} has no pretrained_cfg, so input_size is needed.')
    input_size = tuple(input_size)
    weights = [kernel_weights(module) for module in last_squeezes(model).values()]
    if not any(weights):
        raise ValueError(f'Every squeeze of this {type(model).__name__} is the global average, there is no kernel.')
    _, squeezes = observe(model, torch.zeros(1, *input_size))

    figure = new_figure(3 * (num_channels + 1), 2.7 * len(squeezes) + 0.8)
    axes = figure.subplots(len(squeezes), num_channels + 1, squeeze=False)
    for row, squeeze, weight in zip(axes, squeezes, weights):
        height, width = squeeze.size
        if weight:
            kernel = spatial_kernel(height, width, weight).detach().float().cpu().unflatten(1, squeeze.size)
            channels = kernel.flatten(1).norm(dim=1).topk(min(num_channels, len(kernel))).indices.tolist()
            maps = {f'{squeeze.name}\nmean of {len(kernel)} channels': kernel.mean(0)}
            maps.update((f'channel {c}', kernel[c]) for c in channels)
        else:
            maps = {f'{squeeze.name}\nevery channel': torch.full(squeeze.size, 1 / (height * width))}
            row[1].text(
                0, 0.5, f'Global average, no kernel:\nevery weight is 1 / ({height} x {width}).',
                transform=row[1].transAxes, verticalalignment='center')
        # the mean is much smaller than the largest kernels, so it has its own scale
        for first, last in ((0, 1), (1, len(maps))):
            group = list(maps.items())[first:last]
            limit = max([m.abs().max().item() for _, m in group], default=0.) or 1.
            for ax, (title, m) in zip(row[first:], group):
                image = ax.imshow(m.numpy(), cmap='RdBu_r', vmin=-limit, vmax=limit)
                ax.set_title(title, fontsize='medium')
                ax.set_yticks(range(0, height, math.ceil(height / 4)))
                ax.set_xticks(range(0, width, math.ceil(width / 4)))
            if group:
                figure.colorbar(
                    image, ax=list(row[first:last]), fraction=0.15 / len(group), pad=0.05 / len(group),
                    format='%.2g', ticks=(-limit, 0, limit))
        for ax in row[len(maps):]:
            ax.set_axis_off()
        row[0].set_ylabel('row')
        row[0].set_xlabel('column')
    figure.suptitle(
        f'Weight of every position in the squeeze, input {input_size[1]} x {input_size[2]}: mean over channels and the '
        'channels of largest norm')
    return figure


def _cell_edges(size: int, grid: int) -> Tuple[List[float], List[int]]:
    """Borders of adaptive pooling's windows along an axis of `size` positions.

    Returns:
        grid + 1 edges of cells that tile the axis, where windows overlap in the middle of the overlap; and every
        position at which a window starts or ends.
    """
    starts = [i * size // grid for i in range(grid)]
    ends = [-(-(i + 1) * size // grid) for i in range(grid)]
    edges = [0., *((end + start) / 2 for end, start in zip(ends, starts[1:])), float(size)]
    return edges, sorted({*starts, *ends})


def plot_descriptors(
        model: nn.Module,
        images: torch.Tensor,
        labels: Optional[torch.Tensor] = None,
        class_names: Optional[Sequence[str]] = None,
        prediction_names: Optional[Sequence[str]] = None,
        mean: Optional[Sequence[float]] = None,
        std: Optional[Sequence[float]] = None,
):
    """Draw the cells that each stage's squeeze pools to over the picture, one row per image, one column per stage.

    A cell's colour is the mean over channels of its average times the channel's gate. Lines are the borders of the
    pooling windows, which overlap where the grid does not divide the map. SPSE's grid is its finest, 4 x 4, a plain SE
    module's cell is the whole picture.

    Args:
        model: A network with SE modules.
        images: Preprocessed images (N, C, H, W), a few.
        labels: Class of each image, (N,), if known.
        class_names: Name of each class of labels, its number if None.
        prediction_names: Name of each class of the network, its number if None.
        mean: Mean that the preprocessing subtracted, by default that of the network's pretrained_cfg.
        std: Standard deviation that it divided by.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: If the network has no gates, or images or labels do not fit.
    """
    if labels is not None:
        labels = _check_labels(labels, len(images))
    logits, squeezes = observe(model, images)
    cfg = getattr(model, 'pretrained_cfg', {})
    if not {'mean', 'std'} <= cfg.keys() and (mean is None or std is None):
        raise ValueError(f'This {type(model).__name__} has no pretrained_cfg, so mean and std are needed.')
    mean, std = (
        torch.as_tensor(cfg[key] if value is None else value).view(-1, 1, 1)
        for key, value in (('mean', mean), ('std', std)))
    if {len(mean), len(std)} != {images.shape[1]}:
        raise ValueError(f'mean and std are of {len(mean)} channels, the images of {images.shape[1]}.')
    pictures = (images.cpu().float() * std + mean).clamp(0, 1)
    height, width = pictures.shape[-2:]
    heats = [(s.cells * s.gate[:, :, None, None]).mean(1) for s in squeezes]
    probabilities = logits.softmax(1) if getattr(model, 'num_classes', 0) else None

    cols = len(squeezes) + 1
    side = max(2.5, 12.5 / cols)  # room for the text beside a row
    figure = new_figure(side * cols + 1.5, side * len(images) + 1.6)
    # the last row holds the colour bars
    axes = figure.subplots(len(images) + 1, cols, squeeze=False, height_ratios=[1] * len(images) + [0.05])
    for i, (row, picture) in enumerate(zip(axes, pictures)):
        picture = picture.movedim(0, 2).numpy() if len(picture) == 3 else picture.mean(0).numpy()
        text = [] if labels is None else [f'class {_class_name(class_names, int(labels[i]))}']
        if probabilities is not None:
            prediction = int(probabilities[i].argmax())
            percent = 100 * probabilities[i, prediction].item()
            text += [f'predicted {_class_name(prediction_names, prediction)}', f'({percent:.0f} %)']
        row[0].set_ylabel('\n'.join(text), fontsize='small')
        for ax in row:
            ax.imshow(
                picture if ax is row[0] or picture.ndim == 2 else picture.mean(2),
                cmap='gray', vmin=0 if ax is row[0] else -1, vmax=1,  # pale under the cells
                extent=(0, width, height, 0))
            ax.set_xticks([])
            ax.set_yticks([])
    axes[0, 0].set_title(f'input\n{height} x {width}', fontsize='medium')
    axes[-1, 0].set_axis_off()
    for col, squeeze, heat in zip(axes.T[1:], squeezes, heats):
        grid = heat.shape[-1]
        (y_edges, y_borders), (x_edges, x_borders) = (_cell_edges(size, grid) for size in squeeze.size)
        y_scale, x_scale = height / squeeze.size[0], width / squeeze.size[1]
        limit = heat.abs().max().item() or 1.
        for ax, cells in zip(col, heat):
            mesh = ax.pcolormesh(
                [x * x_scale for x in x_edges], [y * y_scale for y in y_edges], cells.numpy(),
                cmap='RdBu_r', vmin=-limit, vmax=limit, alpha=0.65, linewidth=0)
            ax.hlines([y * y_scale for y in y_borders], 0, width, color='white', linewidth=0.6)
            ax.vlines([x * x_scale for x in x_borders], 0, height, color='white', linewidth=0.6)
            ax.set_xlim(0, width)
            ax.set_ylim(height, 0)
        col[0].set_title(
            f'{squeeze.name}\n{grid} x {grid} cells\nmap {squeeze.size[0]} x {squeeze.size[1]}', fontsize='medium')
        bar = figure.colorbar(mesh, cax=col[-1], orientation='horizontal', format='%.2g', ticks=(-limit, 0, limit))
        bar.ax.set_box_aspect(0.05)
        for label, alignment in zip(bar.ax.get_xticklabels(), ('left', 'center', 'right')):
            label.set_horizontalalignment(alignment)  # else the ends of neighbours meet
    figure.suptitle('Cells that the squeeze pools to: mean over channels of average x gate')
    return figure


def load_model(
        name: str,
        checkpoint: Optional[Path] = None,
        use_ema: bool = False,
        model_kwargs: Optional[Dict[str, Any]] = None,
        preprocessing: Optional[Dict[str, Any]] = None,
) -> Tuple[nn.Module, Dict[str, Any]]:
    """Load a network and the preprocessing that it asks for.

    Args:
        name: Registered name with or without tag, a folder, `local-dir:` or `hf-hub:`.
        checkpoint: Its weights, by default those of the name.
        use_ema: Take the checkpoint's EMA weights.
        model_kwargs: Model arguments.
        preprocessing: img_size, mean and std over those of the network or of the args.yaml beside the checkpoint.

    Raises:
        CommandError: If there is no such network, or its weights or preprocessing do not fit it.
    """
    if ':' not in name and not is_model(name) and Path(name).is_dir():
        name = f'local-dir:{name}'
    run_args: Dict[str, Any] = {}
    if checkpoint is None:
        try:
            model = create_model(name, pretrained=True, **(model_kwargs or {}))
        except Exception as e:  # timm's and the Hub client's
            raise CommandError(f'{name} can not be loaded: {first_line(e)}') from e
    else:
        if ':' in name:
            raise CommandError(f'{name} has weights of its own. Name an architecture for those of {checkpoint}.')
        arch = get_arch_name(name)
        if checkpoint.with_name('args.yaml').is_file():
            run_args, model_kwargs = read_run_args(checkpoint.with_name('args.yaml'), arch, model_kwargs)
        if arch in list_models(module='sepool_resnet'):
            model, _ = load_trained(arch, checkpoint, use_ema, model_kwargs)
        else:
            try:
                model_kwargs = {'num_classes': run_args.get('num_classes') or 1000, **(model_kwargs or {})}
                model = create_model(arch, **model_kwargs)
                load_checkpoint(model, str(checkpoint), use_ema=use_ema)
            except Exception as e:  # timm's and torch's
                raise CommandError(f'{checkpoint} can not be loaded as a {arch}: {first_line(e)}') from e
    cfg = training_preprocessing(model, run_args, preprocessing or {}, checkpoint or name)
    chans = {cfg['input_size'][0], len(cfg['mean']), len(cfg['std'])}
    if chans != {model.in_chans}:
        raise CommandError(
            f'The network takes images of {model.in_chans} channels, its preprocessing is for {max(chans)}. '
            'Give --img-size, --mean and --std.')
    return model, cfg


def network_class_names(model: nn.Module) -> Optional[List[str]]:
    """Class names in a network's config, or those of ImageNet if it has as many classes, or None."""
    cfg = getattr(model, 'pretrained_cfg', {})
    label_names = cfg.get('label_names')
    if label_names:
        return list(label_names)
    subset = infer_imagenet_subset(model)
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(info.num_classes())]


def load_images(
        data: str,
        cfg: Dict[str, Any],
        num_images: int,
        class_map: str = '',
        by_class: bool = False,
        classes: Optional[Sequence[str]] = None,
) -> Tuple[torch.Tensor, torch.Tensor, List[str]]:
    """Images spread evenly over a data set.

    Args:
        data: Folder of one folder per class, or 'digits' for scikit-learn's, the 360 that quickstart holds out.
        cfg: Preprocessing.
        num_images: Images to take at most, of each class if by_class.
        class_map: File of a folder's classes, as for timm's scripts.
        by_class: Take images of some classes only.
        classes: Names of these, by default five spread evenly.

    Returns:
        Preprocessed images (N, C, H, W), labels (N,) and the names of all classes.

    Raises:
        CommandError: If the data can't be read.
    """
    modes = {1: 'L', 3: 'RGB'}
    chans = cfg['input_size'][0]
    if chans not in modes:
        raise CommandError(f'The network takes images of {chans} channels, pictures are read with 1 or 3.')
    if num_images < 1:
        raise CommandError(f'--num-images must be at least 1, got {num_images}.')
    transform = create_transform(**cfg)
    if data == 'digits':
        from .cli.quickstart import load_digits
        pil_images, labels = load_digits()
        start = len(pil_images) * 4 // 5
        targets = labels[start:].tolist()
        dataset = [
            (transform(image.convert(modes[chans])), target) for image, target in zip(pil_images[start:], targets)]
        class_names = [str(i) for i in range(10)]
    else:
        if not Path(data).is_dir():
            raise CommandError(f"There is no folder {data}. --data takes a folder of images by class, or 'digits'.")
        try:
            dataset = create_dataset('', root=data, class_map=class_map, input_img_mode=modes[chans])  # type: ignore
        except (OSError, RuntimeError, ValueError, AssertionError) as e:
            raise CommandError(f'{data} is no folder of images by class: {first_line(e)}') from e
        dataset.transform = transform
        targets = [target for _, target in dataset.reader.samples]
        class_to_idx = dataset.reader.class_to_idx
        class_names = sorted(class_to_idx, key=class_to_idx.get)

    groups = [range(len(targets))]
    if by_class:
        present = [class_names[target] for target in sorted(set(targets))]
        missing = sorted(set(classes or ()) - set(present))
        if missing:
            raise CommandError(f'{data} has no image of class {", ".join(missing)}.')
        classes = classes or present[::math.ceil(len(present) / 5)]
        groups = [[i for i, target in enumerate(targets) if class_names[target] == name] for name in classes]
    indices = [
        group[i] for group in groups for i in torch.linspace(0, len(group) - 1, min(num_images, len(group))).long()]
    try:
        images, labels = zip(*(dataset[i] for i in indices))
    except (OSError, RuntimeError, ValueError) as e:
        raise CommandError(f'The images of {data} can not be read: {first_line(e)}') from e
    return torch.stack(images), torch.tensor(labels), class_names
