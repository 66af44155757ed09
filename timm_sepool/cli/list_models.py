""" Prints the models beside their plain, SE and CBAM peers """
import argparse
import json

from ._models import TABLE


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'list', help='print the models and their peers: parameters, GMACs and the errors that the paper claims')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    if args.json:
        print(json.dumps([row._asdict() for row in TABLE], indent=2))
        return
    print(f'{"model":<28}{"family":<8}{"params (M)":>11}{"GMACs":>8}{"top-1 err":>11}{"top-5 err":>11}')
    for row in TABLE:
        name = row.model + (' + cbam' if row.kwargs else '')
        sizes = f'{row.params / 1e6:>11.2f}{row.gmacs:>8.3f}'
        print(f'{name:<28}{row.family:<8}{sizes}{row.claimed_top1_err:>11.2f}{row.claimed_top5_err:>11.2f}')
    print(
        '\nParameters and GMACs (multiply-adds of convolutions and matrix products for one image of 224 x 224) were\n'
        "counted on these networks. SPSE's GMACs include building its kernels where a grid does not divide the map,\n"
        'which happens once per batch.\n'
        "The errors (%, ImageNet-1k, single crop) are the paper's claims (Jin et al. 2022), not reproduced here.\n"
        "NAME + cbam is timm.create_model(NAME, block_args=dict(attn_layer='cbam')).")
