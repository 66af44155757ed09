""" `timm-sepool plot`: pictures of a trained network's gates, kernels and descriptors on images of a folder """
import argparse
import math
from pathlib import Path
from typing import Any, Dict, List, Tuple

from ._arguments import add_checkpoint, add_preprocessing, preprocessing
from ._models import unknown_model
from ._output import CommandError, check_figure_path, first_line, save_figure

NUM_IMAGES = {'gates': 50, 'kernels': 0, 'descriptors': 4}


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser('plot', help='draw what the squeeze looks at and what the gates do')
    parser.add_argument(
        'kind', choices=list(NUM_IMAGES),
        help='mean gate of every channel by class; weight of every position in the squeeze; pooled cells over images')
    parser.add_argument('model', metavar='MODEL', help='architecture[.tag], folder, or hf-hub:USER/NAME')
    add_checkpoint(parser)
    parser.add_argument('--data', default='digits', help="folder of images by class (default: scikit-learn's digits)")
    parser.add_argument('--class-map', default='', metavar='FILE', help="classes of the folder, as for timm's scripts")
    parser.add_argument(
        '--num-images', type=int, metavar='N', help='images (default: 50 of each class for gates, 4 for descriptors)')
    parser.add_argument('--classes', nargs='+', metavar='NAME', help='classes to draw gates of (default: five)')
    add_preprocessing(parser)
    parser.add_argument('--out', type=Path, metavar='FILE', help='new .png, .pdf or .svg file (default: KIND.png)')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Draw one picture and save it.

    Raises:
        CommandError: If the network or the images cannot be loaded or drawn, or the picture cannot be written.
    """
    out = args.out or Path(f'{args.kind}.png')
    check_figure_path(out)

    from timm.data import ImageNetInfo, infer_imagenet_subset

    from ..plot import plot_descriptors, plot_gates, plot_kernels

    try:
        model, cfg = load_model(args)
        if args.kind == 'kernels':
            figure = plot_kernels(model, cfg['input_size'])
        elif args.kind == 'gates':
            figure = plot_gates(model, *load_images(args, cfg))
        else:
            images, labels, class_names = load_images(args, cfg)
            subset = infer_imagenet_subset(model)
            names: Any = model.pretrained_cfg.get('label_names')
            names = names or (subset and ImageNetInfo(subset).label_descriptions())
            if not names and len(class_names) == model.num_classes:
                names = class_names
            figure = plot_descriptors(model, images, labels, class_names, names, cfg['mean'], cfg['std'])
    except ValueError as e:
        raise CommandError(str(e)) from e
    except (AssertionError, RuntimeError) as e:  # some networks of timm take one image size only
        raise CommandError(f'{args.model} does not run at this size: {first_line(e)}. Correct --img-size.') from e
    save_figure(figure, out)
    print(f'wrote {out}' if args.kind == 'kernels' else f'wrote {out}, with images of {args.data}')


def load_model(args: argparse.Namespace) -> Tuple[Any, Dict[str, Any]]:
    """Load the network and its preprocessing. Whether it can be drawn is checked before a download.

    Raises ValueError if the network cannot be drawn, CommandError if it does not exist or something does not fit it.
    """
    import torch

    from timm.models import create_model, is_model, list_models

    from ..plot import check_kernels, last_se_modules
    from ._training_run import load_trained, training_preprocessing

    name, kwargs = args.model, args.model_kwargs
    check_drawable = check_kernels if args.kind == 'kernels' else last_se_modules
    if ':' not in name and not is_model(name):
        if not Path(name).is_dir():
            raise CommandError(f'There is no folder {name}.') if '/' in name else unknown_model(name, list_models())
        name = f'local-dir:{name}'
    run_args: Dict[str, Any] = {'interpolation': None}  # that of the network's config, unless a run had another
    if args.checkpoint:
        if ':' in name:
            raise CommandError(f'{name} has its own weights. Name an architecture for those of {args.checkpoint}.')
        model, _, found = load_trained(name, args.checkpoint, args.use_ema, model_kwargs=kwargs)
        check_drawable(model)
        run_args.update(found or {})
    else:
        for verb, device in (('create', 'meta'), ('load', 'cpu')):
            try:
                with torch.device(device):
                    model = create_model(name, pretrained=verb == 'load', **kwargs)
            except Exception as e:  # of timm, torch and the Hub client
                raise CommandError(f'Cannot {verb} {name}: {first_line(e)}') from e
            check_drawable(model)
    cfg = training_preprocessing(model, run_args, preprocessing(args), args.checkpoint or name)
    chans = {cfg['input_size'][0], len(cfg['mean']), len(cfg['std'])}
    if chans != {model.in_chans}:
        raise CommandError(
            f'The network takes images with {model.in_chans} channels, but its preprocessing is for {max(chans)}. '
            'Give --img-size, --mean and --std.')
    return model, cfg


def load_images(args: argparse.Namespace, cfg: Dict[str, Any]) -> Tuple[Any, Any, List[str]]:
    """Load preprocessed images (N, C, H, W), spread evenly over the data, or for gates over each of the drawn classes.

    Returns the images, their labels (N,) and the names of all classes. Raises CommandError if data cannot be read.
    """
    import torch

    from timm.data import create_dataset, create_transform

    mode = {1: 'L', 3: 'RGB'}.get(cfg['input_size'][0])
    if mode is None:
        raise CommandError(f'The network takes images with {cfg["input_size"][0]} channels. Only 1 or 3 can be read.')
    num_images = NUM_IMAGES[args.kind] if args.num_images is None else args.num_images
    if num_images < 1:
        raise CommandError(f'--num-images must be at least 1, got {num_images}.')
    if args.data == 'digits':
        from ._digits import NUM_HELD_OUT, load_digits
        dataset: Any = [(image.convert(mode), int(digit)) for image, digit in zip(*load_digits())][-NUM_HELD_OUT:]
        targets = [target for _, target in dataset]
        class_names = [str(i) for i in range(10)]
    elif not Path(args.data).is_dir():
        raise CommandError(f"{args.data} is not a directory. --data takes a folder of images by class, or 'digits'.")
    else:
        try:
            dataset = create_dataset('', root=args.data, class_map=args.class_map, input_img_mode=mode)
        except (OSError, RuntimeError, ValueError, AssertionError) as e:  # timm asserts that a class map exists
            raise CommandError(f'{args.data} is not a folder of images by class: {first_line(e)}') from e
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
    transform = create_transform(**cfg)
    try:
        images, labels = zip(*((transform(image), target) for image, target in map(dataset.__getitem__, indices)))
    except (OSError, RuntimeError, ValueError) as e:
        raise CommandError(f'Cannot read the images of {args.data}: {first_line(e)}') from e
    return torch.stack(images), torch.tensor(labels), class_names
