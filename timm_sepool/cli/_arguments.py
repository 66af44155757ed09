""" Options that several subcommands share """
import argparse
from typing import Any, Dict


class ModelKwargs(argparse.Action):
    """key=value pairs, parsed by timm's own action when it is needed."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        from timm.utils import ParseKwargs
        try:
            ParseKwargs([option_string], self.dest)(parser, namespace, values)
        except ValueError as e:
            raise argparse.ArgumentError(self, f'expected KEY=VALUE, got {" ".join(values)}') from e


def add_preprocessing(parser: argparse.ArgumentParser) -> None:
    """Add the options that `preprocessing` reads."""
    parser.add_argument('--img-size', type=int, metavar='N', help='validation image size')
    parser.add_argument('--interpolation', metavar='NAME', help='validation interpolation')
    parser.add_argument('--crop-pct', type=float, metavar='N', help='validation crop')
    parser.add_argument('--mean', type=float, nargs='+', metavar='MEAN', help='normalization mean')
    parser.add_argument('--std', type=float, nargs='+', metavar='STD', help='normalization std')


def preprocessing(args: argparse.Namespace) -> Dict[str, Any]:
    """Preprocessing options that were given, by name."""
    options = ('img_size', 'interpolation', 'crop_pct', 'mean', 'std')
    return {k: getattr(args, k) for k in options if getattr(args, k) is not None}
