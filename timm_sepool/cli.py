""" The command `timm-sepool`

Every subcommand reports bad input as one line on stderr with exit code 2 and writes its output under a temporary name
first, so that nothing is left half-written. torch and timm are imported by the subcommands, not for `--help`.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

from . import __version__
from ._files import CommandError, load_checkpoint, new_path

# Top-1 / top-5 error (%) on ImageNet-1k, single crop, as claimed by the paper (Jin et al. 2022), not reproduced
_FAMILIES = ('plain', 'SE', 'CBAM', 'SPSE', 'RGSE')
_PAPER_ERRORS = {
    'resnet50': ((24.48, 7.49), (23.21, 6.60), (22.65, 6.32), (22.40, 6.18), (22.27, 6.15)),
    'resnet101': ((23.28, 6.70), (22.35, 6.13), (21.49, 5.68), (21.27, 5.66), (21.24, 5.62)),
    'resnet152': ((22.44, 6.37), (21.59, 5.74), (21.37, 5.70), (21.16, 5.60), (21.09, 5.58)),
    'resnext50': ((22.72, 6.44), (21.89, 6.02), (21.91, 5.89), (21.42, 5.76), (21.36, 5.72)),
    'resnext101': ((21.53, 5.77), (21.18, 5.67), (21.10, 5.58), (20.71, 5.45), (20.67, 5.43)),
}


def check_model(name: str) -> str:
    """Architecture of a model name with or without a tag.

    Raises:
        CommandError: If it is none of this package.
    """
    from timm.models import get_arch_name, list_models

    from . import sepool_resnet  # noqa: F401, registers the models where autoload is switched off
    arch = get_arch_name(name)
    models = list_models(module='sepool_resnet')
    if arch not in models:
        raise CommandError(f'Unknown model {name!r}. Choose one of: {", ".join(models)}.')
    return arch


def model_table() -> List[Dict[str, Any]]:
    """Parameters, GMACs at 224 px and the paper's claimed errors of all models beside plain, SE and CBAM."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from timm.models import create_model

    from . import sepool_resnet  # noqa: F401, registers the models where autoload is switched off

    rows = []
    for backbone, errors in _PAPER_ERRORS.items():
        timm_name = backbone.replace('resnext50', 'resnext50_32x4d').replace('resnext101', 'resnext101_32x4d')
        for family, (top1_err, top5_err) in zip(_FAMILIES, errors, strict=True):
            kwargs = {}
            if family in ('SPSE', 'RGSE'):
                name = f'{family.lower()}_{backbone}'
            elif family == 'SE':
                name = f'se{timm_name}'
            else:
                name = timm_name
                kwargs = dict(block_args=dict(attn_layer='cbam')) if family == 'CBAM' else {}
            with torch.device('meta'):
                model = create_model(name, **kwargs).eval()
                with FlopCounterMode(display=False) as flops, torch.no_grad():
                    model(torch.empty(1, 3, 224, 224))
            rows.append(dict(
                model=name,
                family=family,
                kwargs=kwargs,
                params=sum(p.numel() for p in model.parameters()),
                gmacs=flops.get_total_flops() / 2e9,
                claimed_top1_err=top1_err,
                claimed_top5_err=top5_err,
            ))
    return rows


def cmd_list(args: argparse.Namespace) -> None:
    rows = model_table()
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(f'{"model":<28}{"family":<8}{"params (M)":>11}{"GMACs":>8}{"top-1 err":>11}{"top-5 err":>11}')
    for row in rows:
        name = row['model'] + (' + cbam' if row['kwargs'] else '')
        print(
            f'{name:<28}{row["family"]:<8}{row["params"] / 1e6:>11.2f}{row["gmacs"]:>8.3f}'
            f'{row["claimed_top1_err"]:>11.2f}{row["claimed_top5_err"]:>11.2f}'
        )
    print(
        '\nParameters and GMACs (multiply-adds of convolutions and matrix products at 224 px) are computed here.\n'
        'The errors (%, ImageNet-1k, single crop) are claims of the paper (Jin et al. 2022), not reproduced.\n'
        "+ cbam is create_model(NAME, block_args=dict(attn_layer='cbam'))."
    )


def cmd_convert(args: argparse.Namespace) -> None:
    import torch
    from safetensors.torch import save_file

    from timm.models import create_model

    from .sepool_resnet import checkpoint_filter_fn

    arch = check_model(args.model)
    with new_path(args.output) as temporary:
        state_dict = load_checkpoint(args.input, args.use_ema)
        kwargs = dict(args.model_kwargs)
        kwargs.setdefault('num_classes', state_dict['fc.weight'].shape[0] if 'fc.weight' in state_dict else 0)
        if getattr(state_dict.get('conv1.weight'), 'ndim', 0) == 4:
            kwargs.setdefault('in_chans', state_dict['conv1.weight'].shape[1])
        try:
            with torch.device('meta'):
                model = create_model(arch, **kwargs)
        except (TypeError, ValueError) as e:
            raise CommandError(f'{arch} can not be created with {kwargs}: {e}') from e
        try:
            state_dict = checkpoint_filter_fn(state_dict, model)
            model.load_state_dict(state_dict, strict=True, assign=True)
        except RuntimeError as e:
            raise CommandError(f'{args.input}: {e}') from e
        save_file({k: v.contiguous() for k, v in state_dict.items()}, temporary, metadata={'format': 'pt'})
    extra = ''.join(f', {k}={v!r}' for k, v in kwargs.items() if (k, v) not in (('num_classes', 1000), ('in_chans', 3)))
    print(f'wrote {args.output} ({sum(p.numel() for p in model.parameters()):,} parameters), to be used as\n')
    print(f'  timm.create_model({arch!r}{extra}, checkpoint_path={str(args.output)!r})')


def cmd_imagefolder(args: argparse.Namespace) -> None:
    try:
        lines = args.list.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise CommandError(f'Can not read the list {args.list}: {e}') from e
    samples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        image, label = (line.split() + ['', ''])[:2]
        if not label.isdecimal():
            raise CommandError(f'{args.list}:{number}: expected "image label" with a label of 0 or more, got {line!r}.')
        source = args.images / image
        if not source.is_file():
            raise CommandError(f'{args.list}:{number}: there is no image {source}. Is {args.images} the right folder?')
        samples.append((int(label), f'{number:07d}_{Path(image).name}', source.absolute()))
    if not samples:
        raise CommandError(f'{args.list} lists no image.')

    labels = {label for label, _, _ in samples}
    width = len(str(max(labels)))
    with new_path(args.output) as temporary:
        for label, name, source in samples:
            folder = temporary / f'{label:0{width}d}'
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(source)
        gaps = len(labels) <= max(labels)
        if gaps:
            # timm numbers the folders it finds, so with a label missing the later ones would shift
            class_map = '\n'.join(f'{label:0{width}d}' for label in range(max(labels) + 1))
            (temporary / 'class_map.txt').write_text(class_map + '\n')
    print(f'wrote {args.output}: {len(samples)} links in {len(labels)} classes')
    if gaps:
        print(
            f'some labels below {max(labels)} have no image, so the scripts of timm need '
            f'--class-map {args.output}/class_map.txt'
        )


def cmd_quickstart(args: argparse.Namespace) -> None:
    from .quickstart import quickstart
    quickstart(check_model(args.model), out=args.out, epochs=args.epochs, seed=args.seed)


class _ModelKwargs(argparse.Action):
    """key=value pairs, parsed by timm's own action once it is needed."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        from timm.utils import ParseKwargs
        ParseKwargs([option_string], self.dest)(parser, namespace, values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='timm-sepool',
        description='SPSE and RGSE networks for timm, trained and validated by the train.py and validate.py of timm.',
    )
    parser.add_argument('--version', action='version', version=f'timm_sepool {__version__}')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    p = commands.add_parser('list', help='the models beside plain, SE and CBAM: parameters, GMACs, claimed errors')
    p.add_argument('--json', action='store_true', help='print JSON')
    p.set_defaults(func=cmd_list)

    p = commands.add_parser('convert', help='a checkpoint of the official code or of train.py to safetensors')
    p.add_argument('input', type=Path, metavar='IN', help='.pth, .pth.tar or .safetensors')
    p.add_argument('output', type=Path, metavar='OUT', help='.safetensors file to write, must not exist')
    p.add_argument('--model', required=True, help='its architecture, e.g. rgse_resnet50')
    p.add_argument('--use-ema', action='store_true', help='take the EMA weights of a training checkpoint')
    p.add_argument(
        '--model-kwargs', nargs='*', default={}, action=_ModelKwargs, metavar='KEY=VALUE',
        help='model arguments as in train.py, num_classes and in_chans are read off the checkpoint',
    )
    p.set_defaults(func=cmd_convert)

    p = commands.add_parser('imagefolder', help='an official image list to a folder of links that timm reads')
    p.add_argument('list', type=Path, metavar='LIST', help='text file of lines "image label", labels from 0')
    p.add_argument('images', type=Path, metavar='IMAGES', help='folder that the listed images are relative to')
    p.add_argument('output', type=Path, metavar='OUT', help='folder to write, must not exist')
    p.set_defaults(func=cmd_imagefolder)

    p = commands.add_parser('quickstart', help='train, validate, save, load and predict on handwritten digits')
    p.add_argument('--model', default='rgse_resnet50', help='architecture, built small (default: %(default)s)')
    p.add_argument('--epochs', type=int, default=12, help='epochs (default: %(default)s)')
    p.add_argument('--seed', type=int, default=0, help='random seed (default: %(default)s)')
    p.add_argument('--out', type=Path, help='folder to write (default: the first free sepool_quickstart[-N])')
    p.set_defaults(func=cmd_quickstart)
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Run one subcommand and return its exit code: 0, 2 for bad input, 130 if interrupted."""
    args = _parser().parse_args(argv)
    try:
        args.func(args)
    except CommandError as e:
        print(f'timm-sepool {args.command}: error: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130
    return 0
