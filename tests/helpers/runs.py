""" What train.py and validate.py leave behind, and commands that read it """
import csv
from argparse import Namespace
from pathlib import Path
from typing import List, Optional

import torch
import yaml
from torch import nn

from helpers.common import TINY
from timm_sepool.cli.main import main

TINY_ARGS = ['--model-kwargs', 'layers=(1,1,1,1)', 'channels=(16,32,64,128)']


def write_run(folder: Path, model: nn.Module, name: str, ema: Optional[nn.Module] = None, **args) -> Path:
    """Write last.pth.tar and args.yaml of a run of train.py that was started from `name`, and return the former."""
    folder.mkdir()
    unset = ('in_chans', 'input_size', 'img_size', 'crop_pct', 'mean', 'std', 'gp', 'bn_eps')
    args = {**dict.fromkeys(unset), 'interpolation': '', 'model_kwargs': TINY, 'model': name, **args}
    checkpoint = dict(epoch=3, arch=name, version=2, args=Namespace(**args), optimizer={}, metric=71.5)
    checkpoint['state_dict'] = {f'module.{k}': v for k, v in model.state_dict().items()}
    if ema is not None:
        checkpoint['state_dict_ema'] = ema.state_dict()
    torch.save(checkpoint, folder / 'last.pth.tar')
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    return folder / 'last.pth.tar'


def write_results(path: Path, *rows: dict) -> Path:
    """Write a results file of validate.py, with its columns."""
    row = dict(model='', top1=71.5, top1_err=28.5, top5=91.0, img_size=96, crop_pct=0.8, interpolation='bilinear')
    with open(path, 'w', newline='') as f:
        writer = csv.DictWriter(f, row)
        writer.writeheader()
        writer.writerows({**row, **r} for r in rows)
    return path


def push_args(model: str, checkpoint: Path, *flags: object) -> List[str]:
    return ['push', model, '--repo-id', 'user/net', '--checkpoint', str(checkpoint), *map(str, flags)]


def files(folder: Path) -> List[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*'))


def check_fails(capsys, folder: Path, argv: List[str], message: str) -> None:
    """Exit code 2, one line on stderr that holds the message, and a folder as it was."""
    before = files(folder)
    assert main([str(arg) for arg in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f'timm-sepool {argv[0]}: error: ') and err.count('\n') == 1 and message in err, err
    assert files(folder) == before
