""" The command `timm-sepool`

Every subcommand reports bad input as one line on stderr with exit code 2 and writes its output under a temporary name
first, so that nothing is left half-written. torch and timm are imported by the subcommands, not for `--help`.
"""
import argparse
import io
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, Dict, List, Optional

from safetensors import SafetensorError

from .. import __version__
from ._output import CommandError, check_new, new_path, temporary_folder


def model_table() -> List[Dict[str, Any]]:
    """Parameters, GMACs at 224 px and the paper's claimed errors of all models beside plain, SE and CBAM."""
    from .hub import FAMILIES, PAPER_ERRORS, model_stats

    rows = []
    for backbone, errors in PAPER_ERRORS.items():
        timm_name = backbone.replace('resnext50', 'resnext50_32x4d').replace('resnext101', 'resnext101_32x4d')
        for family, (top1_err, top5_err) in zip(FAMILIES, errors):
            kwargs: Dict[str, Any] = {}
            if family in ('SPSE', 'RGSE'):
                name = f'{family.lower()}_{backbone}'
            elif family == 'SE':
                name = f'se{timm_name}'
            else:
                name = timm_name
                kwargs = dict(block_args=dict(attn_layer='cbam')) if family == 'CBAM' else {}
            stats = model_stats(name, **kwargs)
            rows.append(dict(
                model=name,
                family=family,
                kwargs=kwargs,
                params=stats['params'],
                gmacs=stats['gmacs'],
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
        "SPSE's GMACs contain the making of its kernels where a grid does not divide the map, once per batch.\n"
        'The errors (%, ImageNet-1k, single crop) are claims of the paper (Jin et al. 2022), not reproduced.\n'
        "+ cbam is create_model(NAME, block_args=dict(attn_layer='cbam'))."
    )


def cmd_convert(args: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    from .hub import check_model, load_trained

    arch = check_model(args.model)
    if args.output.suffix != '.safetensors':
        raise CommandError(f'{args.output} has to be named .safetensors, timm tells the format by it.')
    with new_path(args.output) as temporary:
        model, kwargs = load_trained(arch, args.input, args.use_ema, args.model_kwargs)
        save_file(model.state_dict(), temporary, metadata={'format': 'pt'})
    extra = ''.join(f', {k}={v!r}' for k, v in kwargs.items() if (k, v) not in (('num_classes', 1000), ('in_chans', 3)))
    print(f'wrote {args.output} ({sum(p.numel() for p in model.parameters()):,} parameters), to be used as\n')
    print(f'  timm.create_model({arch!r}{extra}, checkpoint_path={str(args.output)!r})')


def cmd_imagefolder(args: argparse.Namespace) -> None:
    try:
        lines = args.list.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise CommandError(f'Can not read the list {args.list}: {e}') from e
    samples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        image, label, *rest = line.split() + ['']
        if not label.isdecimal() or len(label) > 6 or any(rest):
            raise CommandError(f'{args.list}:{number}: expected "image label", a label of 0 to 999999, got {line!r}.')
        source = args.images / image
        if not source.is_file():
            raise CommandError(f'{args.list}:{number}: there is no image {source}. Is {args.images} the right folder?')
        samples.append((int(label), f'{number:07d}_{Path(image).name}', source.absolute()))
    if not samples:
        raise CommandError(f'{args.list} lists no image.')

    labels = {label for label, _, _ in samples}
    with new_path(args.output) as temporary:
        for label, name, source in samples:
            folder = temporary / f'{label:06d}'
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(source)
        gaps = len(labels) <= max(labels)
        if gaps:
            # timm numbers the folders it finds, so with a label missing the later ones would shift
            class_map = '\n'.join(f'{label:06d}' for label in range(max(labels) + 1))
            (temporary / 'class_map.txt').write_text(class_map + '\n')
    print(f'wrote {args.output}: {len(samples)} links in {len(labels)} classes')
    if gaps:
        print(
            f'some labels below {max(labels)} have no image, so the scripts of timm need '
            f'--class-map {args.output}/class_map.txt'
        )


def cmd_quickstart(args: argparse.Namespace) -> None:
    from .hub import check_model
    from .quickstart import quickstart
    quickstart(check_model(args.model), out=args.out, epochs=args.epochs, seed=args.seed)


def cmd_bench(args: argparse.Namespace) -> None:
    import torch

    from ..plot import new_figure
    from .bench import DEFAULT_MODELS, MODES, bench, plot, table

    size = args.img_size * 2 if len(args.img_size) == 1 else args.img_size
    if len(size) != 2:
        raise CommandError(f'--img-size takes a side or height and width, got {len(size)} numbers.')
    if args.plot:  # before the work, not after it
        check_new(args.plot)
        if args.plot.suffix != '.png':
            raise CommandError(f'{args.plot} has to be named .png.')
        new_figure(1, 1)  # says so if matplotlib is missing
    if args.threads is not None:
        if args.threads < 1:
            raise CommandError(f'--threads must be at least 1, got {args.threads}.')
        torch.set_num_threads(args.threads)
    report = bench(
        args.models or list(DEFAULT_MODELS), args.peer, (args.mode,) if args.mode else MODES, args.batch_size,
        tuple(size), args.device, args.compile, args.channels_last, args.amp, args.rounds, args.repeats, args.blocks,
        args.model_kwargs)
    print(json.dumps(report, indent=2) if args.json else table(report))
    if args.plot:
        plot(report, args.plot)


def cmd_cards(args: argparse.Namespace) -> None:
    from .hub import default_cards

    check_new(args.output)  # before the work, not after it
    cards = default_cards()
    with new_path(args.output) as temporary:
        temporary.mkdir()
        for name, text in cards.items():
            (temporary / name).write_text(text, encoding='utf-8')
    print(f'wrote {len(cards)} cards to {args.output}')


def _preprocessing(args: argparse.Namespace) -> Dict[str, Any]:
    flags = ('img_size', 'interpolation', 'crop_pct', 'mean', 'std')
    return {k: getattr(args, k) for k in flags if getattr(args, k) is not None}


def cmd_push(args: argparse.Namespace) -> None:
    from .hub import check_model, check_repo_id, check_token, export, upload

    check_model(args.model)
    check_repo_id(args.repo_id)
    preprocessing = _preprocessing(args)
    if preprocessing and not args.checkpoint:
        raise CommandError('Preprocessing flags go with --checkpoint, the weights of a tag have their own.')
    if not args.dry_run:
        check_token()
    export_args = dict(
        checkpoint=args.checkpoint, use_ema=args.use_ema, run_args=args.args, model_kwargs=args.model_kwargs,
        preprocessing=preprocessing, labels=args.labels, metrics=args.metrics, license=args.license)
    if args.dry_run:
        with new_path(args.dry_run) as temporary:
            export(args.model, args.repo_id, temporary, **export_args)
        print(f'wrote {args.dry_run}, nothing was uploaded')
        return
    with temporary_folder() as folder:
        try:
            export(args.model, args.repo_id, folder, **export_args)
        except (OSError, SafetensorError) as e:
            raise CommandError(f'Can not write temporary files: {e}. Make room or set TMPDIR to another folder.') from e
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f'uploading {size / 1e6:.1f} MB to {args.repo_id}')  # with the Hub client's own progress bars
        url = upload(folder, args.repo_id, args.private, args.force)
    print(f"pushed {url}\n\n  timm.create_model('hf-hub:{args.repo_id}', pretrained=True)")


def cmd_plot(args: argparse.Namespace) -> None:
    from .. import plot

    out = args.out or Path(f'{args.kind}.png')
    plot.new_figure(1, 1)  # says early if matplotlib is missing
    if out.suffix not in ('.png', '.pdf', '.svg'):
        raise CommandError(f'{out} has to be named .png, .pdf or .svg.')
    with new_path(out) as temporary:
        model, cfg = plot.load_model(args.model, args.checkpoint, args.use_ema, args.model_kwargs, _preprocessing(args))
        try:
            if args.kind == 'kernels':
                figure = plot.plot_kernels(model, cfg['input_size'])
            else:
                plot.last_squeezes(model)  # says early if there is none
                num_images = {'gates': 50, 'descriptors': 4}[args.kind] if args.num_images is None else args.num_images
                images, labels, class_names = plot.load_images(
                    args.data, cfg, num_images, args.class_map, args.kind == 'gates', args.classes)
                if args.kind == 'gates':
                    figure = plot.plot_gates(model, images, labels, class_names)
                else:
                    names = plot.network_class_names(model)
                    if names is None and len(class_names) == model.num_classes:
                        names = class_names
                    figure = plot.plot_descriptors(model, images, labels, class_names, names, cfg['mean'], cfg['std'])
        except ValueError as e:
            raise CommandError(str(e)) from e
        figure.savefig(temporary, format=out.suffix[1:])
    print(f'wrote {out}')


class _ModelKwargs(argparse.Action):
    """key=value pairs, parsed by timm's own action once it is needed."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        from timm.utils import ParseKwargs
        try:
            ParseKwargs([option_string], self.dest)(parser, namespace, values)
        except ValueError as e:
            raise argparse.ArgumentError(self, f'expected KEY=VALUE, got {" ".join(values)}') from e


def _add_preprocessing(p: argparse.ArgumentParser) -> None:
    p.add_argument('--img-size', type=int, metavar='N', help='validation image size')
    p.add_argument('--interpolation', metavar='NAME', help='validation interpolation')
    p.add_argument('--crop-pct', type=float, metavar='N', help='validation crop')
    p.add_argument('--mean', type=float, nargs='+', metavar='MEAN', help='normalization mean')
    p.add_argument('--std', type=float, nargs='+', metavar='STD', help='normalization std')


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

    p = commands.add_parser('bench', help='speed and memory beside the peers, in one run and in turns')
    p.add_argument(
        'models', nargs='*', metavar='MODEL[+ATTN]',
        help='any models of timm; NAME+cbam has that attention layer of timm, NAME+reference the block as the paper '
        'writes it (default: both ResNet-50 and their peers)',
    )
    p.add_argument(
        '--peer', default='seresnet50', metavar='MODEL[+ATTN]', help='the one compared to (default: %(default)s)')
    p.add_argument('--mode', choices=('infer', 'train'), help='inference or training step (default: both)')
    p.add_argument('-b', '--batch-size', type=int, default=8, metavar='N', help='images (default: %(default)s)')
    p.add_argument('--img-size', type=int, nargs='+', default=[224], metavar='N', help='side, or height and width')
    p.add_argument('--device', default='cpu', help='torch device (default: %(default)s)')
    p.add_argument('--compile', action='store_true', help='torch.compile the networks')
    p.add_argument('--channels-last', action='store_true', help='channels_last memory format')
    p.add_argument('--amp', action='store_true', help='autocast to bfloat16')
    p.add_argument('--rounds', type=int, default=7, metavar='N', help='measurements of each (default: %(default)s)')
    p.add_argument('--repeats', type=int, default=1, metavar='N', help='steps a measurement (default: %(default)s)')
    p.add_argument('--threads', type=int, metavar='N', help='CPU threads')
    p.add_argument('--blocks', action='store_true', help='also everything after bn3 of one block a stage')
    p.add_argument(
        '--model-kwargs', nargs='*', default={}, action=_ModelKwargs, metavar='KEY=VALUE', help='for all models')
    p.add_argument('--json', action='store_true', help='print JSON')
    p.add_argument('--plot', type=Path, metavar='FILE', help='write a bar chart (PNG), must not exist')
    p.set_defaults(func=cmd_bench)

    p = commands.add_parser('plot', help='pictures of what the squeeze looks at and of what the gates do')
    p.add_argument(
        'kind', choices=('gates', 'kernels', 'descriptors'),
        help='mean gate of every channel by class; weight of every position in the squeeze; pooled cells over images',
    )
    p.add_argument('model', metavar='MODEL', help='architecture[.tag], folder, or hf-hub:USER/NAME')
    p.add_argument('--checkpoint', type=Path, help='trained weights, by default those of MODEL')
    p.add_argument('--use-ema', action='store_true', help='take the EMA weights of the checkpoint')
    p.add_argument(
        '--model-kwargs', nargs='*', default={}, action=_ModelKwargs, metavar='KEY=VALUE', help='model arguments')
    p.add_argument('--data', default='digits', help="folder of images by class, or 'digits' (default: %(default)s)")
    p.add_argument('--class-map', default='', metavar='FILE', help="classes of the folder, as for timm's scripts")
    p.add_argument(
        '--num-images', type=int, metavar='N',
        help='images to take: gates of each class (default 50), descriptors of all (default 4)')
    p.add_argument('--classes', nargs='+', metavar='NAME', help='classes to draw gates of (default: five)')
    _add_preprocessing(p)
    p.add_argument('--out', type=Path, metavar='FILE', help='.png, .pdf or .svg, must not exist (default: KIND.png)')
    p.set_defaults(func=cmd_plot)

    p = commands.add_parser('cards', help='the model cards of all default tags')
    p.add_argument('output', type=Path, metavar='OUT', help='folder to write, must not exist')
    p.set_defaults(func=cmd_cards)

    p = commands.add_parser('push', help='weights, config and model card to the Hugging Face Hub')
    p.add_argument('model', metavar='MODEL[.TAG]', help='architecture, with the tag whose weights to push')
    p.add_argument('--repo-id', required=True, metavar='USER/NAME', help='repository, created if there is none')
    p.add_argument('--checkpoint', type=Path, help='trained weights, with the args.yaml of train.py beside it')
    p.add_argument('--use-ema', action='store_true', help='take the EMA weights of the checkpoint')
    p.add_argument('--args', type=Path, metavar='FILE', help='args.yaml of the training run, if it is elsewhere')
    p.add_argument(
        '--model-kwargs', nargs='*', default={}, action=_ModelKwargs, metavar='KEY=VALUE',
        help='model arguments, if there is no args.yaml',
    )
    _add_preprocessing(p)
    p.add_argument('--labels', type=Path, metavar='FILE', help='class names, one a line')
    p.add_argument('--metrics', type=Path, metavar='FILE', help='results file (CSV) of validate.py, for the card')
    p.add_argument('--license', default='apache-2.0', help='license of trained weights (default: %(default)s)')
    p.add_argument('--private', action='store_true', help='create the repository private')
    p.add_argument('--force', action='store_true', help='replace a network of another architecture')
    p.add_argument('--dry-run', type=Path, metavar='DIR', help='write this folder instead of uploading')
    p.set_defaults(func=cmd_push)
    return parser


class _Terminated(KeyboardInterrupt):
    """SIGTERM, to be cleaned up after like Ctrl-C."""


def _terminate(signum, frame) -> None:
    raise _Terminated


def _open_stdio() -> None:
    """Have somewhere to print to if a stream was closed (`>&-`), and print what its encoding lacks as escapes."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w'))
        elif isinstance(getattr(sys, name), io.TextIOWrapper) and getattr(sys, name).errors == 'strict':
            getattr(sys, name).reconfigure(errors='backslashreplace')


def _flush() -> None:
    """Print what is buffered. Where that fails it is forgotten, Python would try it again at its exit."""
    try:
        sys.stdout.flush()
    except OSError as e:
        with open(os.devnull, 'w') as devnull:
            os.dup2(devnull.fileno(), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):
            raise
        raise CommandError(f'Can not print: {e}. Make room or print elsewhere.') from e


def main(argv: Optional[List[str]] = None) -> int:
    """Run one subcommand.

    Returns:
        Exit code: 0, 2 for bad input, 130 or 143 if interrupted (SIGINT, SIGTERM), 141 if nobody reads the output.
    """
    _open_stdio()
    handle = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # else it is ignored or the caller's
    handle = handle and threading.current_thread() is threading.main_thread()
    if handle:
        signal.signal(signal.SIGTERM, _terminate)
    command = ''
    try:
        try:
            args = _parser().parse_args(argv)
            command = f' {args.command}'
            args.func(args)
        finally:
            _flush()
    except BrokenPipeError:  # `timm-sepool list | head`
        return 141
    except (CommandError, OSError) as e:  # the latter from print, or from a system at its limits
        message = ' '.join(str(e).splitlines())  # a path may hold a newline
        print(f'timm-sepool{command}: error: {message}', file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        terminated = isinstance(e, _Terminated)
        print('terminated' if terminated else 'interrupted', file=sys.stderr)
        return 143 if terminated else 130
    finally:
        if handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return 0
