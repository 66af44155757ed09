""" Options that several commands share """
import argparse
from pathlib import Path
from typing import Any, Dict

PREPROCESSING_FLAGS = ('img_size', 'interpolation', 'crop_pct', 'mean', 'std')


class ModelKwargs(argparse.Action):
    """KEY=VALUE pairs, parsed by timm's own action, which is imported only if they are given."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        from timm.utils import ParseKwargs
        try:
            ParseKwargs([option_string], self.dest)(parser, namespace, values)
        except ValueError as e:
            raise argparse.ArgumentError(self, f'expected KEY=VALUE, got {" ".join(values)}') from e


def add_model_kwargs(parser: argparse.ArgumentParser, help: str) -> None:
    """Add --model-kwargs, which is train.py's."""
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ModelKwargs, metavar='KEY=VALUE', help=help)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the options that name trained weights and say how the network is created."""
    parser.add_argument(
        '--checkpoint', type=Path, metavar='FILE', help="trained weights; train.py's args.yaml beside it is read")
    parser.add_argument('--use-ema', action='store_true', help='use the EMA weights of the checkpoint')
    add_model_kwargs(parser, 'model arguments, if there is no args.yaml')


def add_preprocessing(parser: argparse.ArgumentParser) -> None:
    """Add the options that replace the preprocessing of a training run."""
    parser.add_argument('--img-size', type=int, metavar='N', help='validation image size (px)')
    parser.add_argument('--interpolation', metavar='NAME', help='validation interpolation')
    parser.add_argument('--crop-pct', type=float, metavar='N', help='validation crop, a fraction of the resized image')
    parser.add_argument('--mean', type=float, nargs='+', metavar='MEAN', help='normalization mean')
    parser.add_argument('--std', type=float, nargs='+', metavar='STD', help='normalization std')


def preprocessing(args: argparse.Namespace) -> Dict[str, Any]:
    """The options of `add_preprocessing` that were given."""
    return {k: getattr(args, k) for k in PREPROCESSING_FLAGS if getattr(args, k) is not None}
