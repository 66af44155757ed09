""" `timm-sepool plot`: pictures of a trained network's gates, kernels and descriptors on images of a folder """
import argparse
import math
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from ._arguments import add_checkpoint, add_preprocessing, preprocessing
from ._models import unknown_model
from ._output import CommandError, check_figure_path, first_line, save_figure

NUM_IMAGES = {'gates': 50, 'kernels': 0, 'descriptors': 4}


def add_parser(subparsers) -> None:
    """Add the command to the parser of `timm-sepool`."""
    parser = subparsers.add_parser('plot', help='draw what the squeeze looks at and what the gates do')
    parser.add_argument(
        'kind', choices=list(NUM_IMAGES),
        help='mean gate of every channel by class; weight of every position in the squeeze; pooled cells over images')
    parser.add_argument('model', metavar='MODEL', help='architecture[.tag], folder, or hf-hub:USER/NAME')
    add_checkpoint(parser)
    parser.add_argument('--data', default='digits', help="folder of images by class (default: scikit-learn's digits)")
    parser.add_argument('--class-map', default='', metavar='FILE', help="classes of the folder, as for timm's scripts")
    parser.add_argument(
        '--num-images', type=int, metavar='N',
        help='images to take: of each class for gates (default: 50), of the data for descriptors (default: 4)')
    parser.add_argument('--classes', nargs='+', metavar='NAME', help='classes to draw gates of (default: five)')
    add_preprocessing(parser)
    parser.add_argument(
        '--out', type=Path, metavar='FILE', help='.png, .pdf or .svg, must not exist (default: KIND.png)')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Draw one picture and save it.

    Raises:
        CommandError: If the network or the images cannot be loaded or drawn, or the picture cannot be written.
    """
    out = args.out or Path(f'{args.kind}.png')
    check_figure_path(out)

    from ..plot import plot_descriptors, plot_gates, plot_kernels

    try:
        model, cfg = load_model(args)
        if args.kind == 'kernels':
            figure = plot_kernels(model, cfg['input_size'])
        else:
            images, labels, class_names = load_images(args, cfg)
            if args.kind == 'gates':
                figure = plot_gates(model, images, labels, class_names)
            else:
                names = network_class_names(model)
                if names is None and len(class_names) == model.num_classes:
                    names = class_names
                figure = plot_descriptors(model, images, labels, class_names, names, cfg['mean'], cfg['std'])
    except ValueError as e:
        raise CommandError(str(e)) from e
    save_figure(figure, out)
    print(f'wrote {out}')


def load_model(args: argparse.Namespace) -> Tuple[Any, Dict[str, Any]]:
    """Load the network and its preprocessing. Whether it can be drawn is checked before a download.

    Raises:
        ValueError: If the network cannot be drawn.
        CommandError: If the network does not exist, or its weights or preprocessing do not fit it.
    """
    import torch

    from timm.models import create_model, get_arch_name, is_model, list_models

    from ..plot import check_kernels, last_se_modules
    from ._training_run import load_trained, training_preprocessing

    name, checkpoint = args.model, args.checkpoint
    check_drawable = check_kernels if args.kind == 'kernels' else last_se_modules
    if ':' not in name:
        if Path(name).is_dir() and not is_model(name):
            name = f'local-dir:{name}'
        elif not is_model(get_arch_name(name)):
            raise unknown_model(name, list_models())
    run_args: Optional[Dict[str, Any]] = {'interpolation': None}  # weights of a name have its preprocessing
    if checkpoint:
        if ':' in name:
            raise CommandError(f'{name} has its own weights. Name an architecture for those of {checkpoint}.')
        model, _, run_args = load_trained(name, checkpoint, args.use_ema, None, args.model_kwargs)
    else:
        try:
            with torch.device('meta'):
                skeleton = create_model(name, **args.model_kwargs)
        except Exception as e:  # of timm and the Hub client
            raise CommandError(f'Cannot create {name}: {first_line(e)}') from e
        check_drawable(skeleton)
        try:
            model = create_model(name, pretrained=True, **args.model_kwargs)
        except Exception as e:  # of timm, torch and the Hub client
            raise CommandError(f'Cannot load {name}: {first_line(e)}') from e
    check_drawable(model)
    cfg = training_preprocessing(model, run_args, preprocessing(args), checkpoint or name)
    chans = {cfg['input_size'][0], len(cfg['mean']), len(cfg['std'])}
    if chans != {model.in_chans}:
        raise CommandError(
            f'The network takes images with {model.in_chans} channels, but its preprocessing is for {max(chans)}. '
            'Give --img-size, --mean and --std.')
    return model, cfg


def network_class_names(model: Any) -> Optional[List[str]]:
    """Class names in a network's config, those of ImageNet if it has as many classes, or None."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    label_names = model.pretrained_cfg.get('label_names')
    subset = infer_imagenet_subset(model)
    if label_names or subset is None:
        return label_names and list(label_names)
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(info.num_classes())]


def load_images(args: argparse.Namespace, cfg: Dict[str, Any]) -> Tuple[Any, Any, List[str]]:
    """Load images spread evenly over the data, or for gates over each of the drawn classes.

    Returns:
        Preprocessed images (N, C, H, W), labels (N,) and the names of all classes.

    Raises:
        CommandError: If the data cannot be read.
    """
    import torch

    from timm.data import create_dataset, create_transform

    mode = {1: 'L', 3: 'RGB'}.get(cfg['input_size'][0])
    if mode is None:
        raise CommandError(f'The network takes images with {cfg["input_size"][0]} channels. Only 1 or 3 can be read.')
    num_images = NUM_IMAGES[args.kind] if args.num_images is None else args.num_images
    if num_images < 1:
        raise CommandError(f'--num-images must be at least 1, got {num_images}.')
    transform = create_transform(**cfg)
    if args.data == 'digits':
        from ._digits import NUM_HELD_OUT, load_digits
        pil_images, digits = load_digits()
        held_out = range(len(pil_images) - NUM_HELD_OUT, len(pil_images))
        targets = digits[held_out.start:].tolist()

        def load(i: int) -> Tuple[Any, int]:
            return transform(pil_images[held_out[i]].convert(mode)), targets[i]
        class_names = [str(i) for i in range(10)]
    elif not Path(args.data).is_dir():
        raise CommandError(f"{args.data} is not a directory. --data takes a folder of images by class, or 'digits'.")
    else:
        try:
            dataset: Any = create_dataset('', root=args.data, class_map=args.class_map, input_img_mode=mode)
        except (OSError, RuntimeError, ValueError, AssertionError) as e:  # timm asserts that a class map exists
            raise CommandError(f'{args.data} is not a folder of images by class: {first_line(e)}') from e
        dataset.transform = transform
        load = dataset.__getitem__
        targets = [target for _, target in dataset.reader.samples]
        class_names = sorted(dataset.reader.class_to_idx, key=dataset.reader.class_to_idx.get)

    groups = [list(range(len(targets)))]
    if args.kind == 'gates':
        present = [class_names[target] for target in sorted(set(targets))]
        missing = sorted(set(args.classes or ()) - set(present))
        if missing:
            raise CommandError(f'{args.data} has no image of class {", ".join(missing)}.')
        classes = args.classes or present[::math.ceil(len(present) / 5)]
        groups = [[i for i, target in enumerate(targets) if class_names[target] == name] for name in classes]
    indices = [
        group[i] for group in groups for i in torch.linspace(0, len(group) - 1, min(num_images, len(group))).long()]
    try:
        images, labels = zip(*map(load, indices))
    except (OSError, RuntimeError, ValueError) as e:
        raise CommandError(f'Cannot read the images of {args.data}: {first_line(e)}') from e
    return torch.stack(images), torch.tensor(labels), class_names
