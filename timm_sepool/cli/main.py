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
from . import bench, plot
from ._arguments import ModelKwargs, add_preprocessing, preprocessing
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


def cmd_cards(args: argparse.Namespace) -> None:
    from .hub import default_cards

    check_new(args.output)  # before the work, not after it
    cards = default_cards()
    with new_path(args.output) as temporary:
        temporary.mkdir()
        for name, text in cards.items():
            (temporary / name).write_text(text, encoding='utf-8')
    print(f'wrote {len(cards)} cards to {args.output}')


def cmd_push(args: argparse.Namespace) -> None:
    from .hub import check_model, check_repo_id, check_token, export, upload

    check_model(args.model)
    check_repo_id(args.repo_id)
    flags = preprocessing(args)
    if flags and not args.checkpoint:
        raise CommandError('Preprocessing flags go with --checkpoint, the weights of a tag have their own.')
    if not args.dry_run:
        check_token()
    export_args = dict(
        checkpoint=args.checkpoint, use_ema=args.use_ema, run_args=args.args, model_kwargs=args.model_kwargs,
        preprocessing=flags, labels=args.labels, metrics=args.metrics, license=args.license)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='timm-sepool',
        description='SPSE and RGSE networks for timm, trained and validated by the train.py and validate.py of timm.',
    )
    parser.add_argument('--version', action='version', version=f'timm_sepool {__version__}')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    p = commands.add_parser('list', help='the models beside plain, SE and CBAM: parameters, GMACs, claimed errors')
    p.add_argument('--json', action='store_true', help='print JSON')
    p.set_defaults(run=cmd_list)

    p = commands.add_parser('convert', help='a checkpoint of the official code or of train.py to safetensors')
    p.add_argument('input', type=Path, metavar='IN', help='.pth, .pth.tar or .safetensors')
    p.add_argument('output', type=Path, metavar='OUT', help='.safetensors file to write, must not exist')
    p.add_argument('--model', required=True, help='its architecture, e.g. rgse_resnet50')
    p.add_argument('--use-ema', action='store_true', help='take the EMA weights of a training checkpoint')
    p.add_argument(
        '--model-kwargs', nargs='*', default={}, action=ModelKwargs, metavar='KEY=VALUE',
        help='model arguments as in train.py, num_classes and in_chans are read off the checkpoint',
    )
    p.set_defaults(run=cmd_convert)

    p = commands.add_parser('imagefolder', help='an official image list to a folder of links that timm reads')
    p.add_argument('list', type=Path, metavar='LIST', help='text file of lines "image label", labels from 0')
    p.add_argument('images', type=Path, metavar='IMAGES', help='folder that the listed images are relative to')
    p.add_argument('output', type=Path, metavar='OUT', help='folder to write, must not exist')
    p.set_defaults(run=cmd_imagefolder)

    p = commands.add_parser('quickstart', help='train, validate, save, load and predict on handwritten digits')
    p.add_argument('--model', default='rgse_resnet50', help='architecture, built small (default: %(default)s)')
    p.add_argument('--epochs', type=int, default=12, help='epochs (default: %(default)s)')
    p.add_argument('--seed', type=int, default=0, help='random seed (default: %(default)s)')
    p.add_argument('--out', type=Path, help='folder to write (default: the first free sepool_quickstart[-N])')
    p.set_defaults(run=cmd_quickstart)

    bench.add_parser(commands)
    plot.add_parser(commands)

    p = commands.add_parser('cards', help='the model cards of all default tags')
    p.add_argument('output', type=Path, metavar='OUT', help='folder to write, must not exist')
    p.set_defaults(run=cmd_cards)

    p = commands.add_parser('push', help='weights, config and model card to the Hugging Face Hub')
    p.add_argument('model', metavar='MODEL[.TAG]', help='architecture, with the tag whose weights to push')
    p.add_argument('--repo-id', required=True, metavar='USER/NAME', help='repository, created if there is none')
    p.add_argument('--checkpoint', type=Path, help='trained weights, with the args.yaml of train.py beside it')
    p.add_argument('--use-ema', action='store_true', help='take the EMA weights of the checkpoint')
    p.add_argument('--args', type=Path, metavar='FILE', help='args.yaml of the training run, if it is elsewhere')
    p.add_argument(
        '--model-kwargs', nargs='*', default={}, action=ModelKwargs, metavar='KEY=VALUE',
        help='model arguments, if there is no args.yaml',
    )
    add_preprocessing(p)
    p.add_argument('--labels', type=Path, metavar='FILE', help='class names, one a line')
    p.add_argument('--metrics', type=Path, metavar='FILE', help='results file (CSV) of validate.py, for the card')
    p.add_argument('--license', default='apache-2.0', help='license of trained weights (default: %(default)s)')
    p.add_argument('--private', action='store_true', help='create the repository private')
    p.add_argument('--force', action='store_true', help='replace a network of another architecture')
    p.add_argument('--dry-run', type=Path, metavar='DIR', help='write this folder instead of uploading')
    p.set_defaults(run=cmd_push)
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
            args.run(args)
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
