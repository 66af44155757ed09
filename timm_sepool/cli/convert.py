""" A checkpoint of the official code or of train.py to safetensors """
import argparse
import json
from pathlib import Path

from ._arguments import add_model_kwargs
from ._models import check_model
from ._output import CommandError, new_path


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser('convert', help='a checkpoint of the official code or of train.py to safetensors')
    parser.add_argument(
        'input', type=Path, metavar='IN', help=".pth, .pth.tar or .safetensors; train.py's args.yaml beside it is read")
    parser.add_argument('output', type=Path, metavar='OUT', help='.safetensors file to write, must not exist')
    parser.add_argument('--model', required=True, help='its architecture, for example rgse_resnet50')
    parser.add_argument('--use-ema', action='store_true', help='use the EMA weights of a training checkpoint')
    add_model_kwargs(parser, 'model arguments as in train.py; num_classes and in_chans are read from the checkpoint')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Convert the checkpoint and print how to create the network."""
    from safetensors.torch import save_file

    from ._training_run import METADATA_KEY, load_trained, training_preprocessing

    arch = check_model(args.model)
    if args.output.suffix != '.safetensors':
        raise CommandError(f'The name of {args.output} must end in .safetensors: timm tells the format by it.')
    with new_path(args.output) as temporary:
        model, kwargs, run_args = load_trained(args.model, args.input, args.use_ema, model_kwargs=args.model_kwargs)
        # what `push` and `plot` need, in the form of args.yaml; without a known preprocessing they ask for it
        model_kwargs = {k: v for k, v in kwargs.items() if k not in ('num_classes', 'in_chans')}
        metadata = dict(model=arch, model_kwargs=model_kwargs, in_chans=model.in_chans)
        if 'interpolation' in (run_args or {}):
            metadata.update(training_preprocessing(model, run_args, {}, args.input))
        save_file(model.state_dict(), temporary, metadata={'format': 'pt', METADATA_KEY: json.dumps(metadata)})
    extra = ''.join(f', {k}={v!r}' for k, v in kwargs.items() if (k, v) not in (('num_classes', 1000), ('in_chans', 3)))
    print(f'wrote {args.output} ({sum(p.numel() for p in model.parameters()):,} parameters). Create the network by\n')
    print(f'  timm.create_model({arch!r}{extra}, checkpoint_path={str(args.output)!r})')
