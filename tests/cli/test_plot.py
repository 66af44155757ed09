""" `timm-sepool plot`: which network, weights, preprocessing and images reach the picture, and its errors """
import json
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import timm
from helpers.common import TINY, tiny
from helpers.runs import TINY_ARGS, check_fails
from timm.data import resolve_data_config
from timm_sepool.cli._output import save_folder
from timm_sepool.cli.main import main
from timm_sepool.cli.quickstart import DATA_CFG


@pytest.fixture(autouse=True)
def figures(tmp_path, monkeypatch) -> list:
    """Every figure that the command saves. It runs beside the folder that quickstart writes, and images by class."""
    monkeypatch.chdir(tmp_path)
    saved, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *a, **k: (saved.append(self), savefig(self, *a, **k)))
    model = tiny('spse_resnet50', in_chans=1, pretrained_cfg_overlay=DATA_CFG)
    for path in ('digits', 'photos/a', 'photos/b', 'photos/c', 'run', 'empty/class', 'broken/class'):
        Path(path).mkdir(parents=True)
    Path('map.txt').write_text('z\na\nb\nc\n')
    save_folder(model, Path('digits'), dict(TINY, in_chans=1), resolve_data_config(model=model), 10 * ['a digit'])
    for i, name in enumerate(('b/x.png', 'a/y.jpg', 'a/x.png', 'c/z.png')):
        Image.new('RGB', (60, 40), (250, 60 * i, 0)).save(Path('photos', name))
    return saved


def test_digits(capsys, tmp_path, figures: list) -> None:
    """A folder by its path and as local-dir:, the digits by default, each picture under its kind's name."""
    for kind, name in (('gates', './digits'), ('kernels', 'local-dir:digits'), ('descriptors', f'{tmp_path}/digits')):
        assert main(['plot', kind, name, *(['--num-images', '3'] if kind == 'gates' else [])]) == 0
        data = '' if kind == 'kernels' else ', with images of digits'
        assert capsys.readouterr().out == f'wrote {kind}.png{data}\n' and Image.open(f'{kind}.png').width > 1300
    assert '15 images, 3 or more of each' in figures[0].get_suptitle() and len(figures[0].axes[0].lines) == 6
    assert 'input 32 x 32' in figures[1].get_suptitle()
    truth, prediction, _ = figures[2].axes[0].get_ylabel().split('\n')  # the data's names and the network's
    assert truth.removeprefix('class ').isdecimal() and prediction.startswith('predicted a digit')
    assert main(['plot', 'gates', './digits', '--classes', '3', '7', '--num-images', '99', '--out', 'gates.svg']) == 0
    assert Path('gates.svg').read_text().startswith('<?xml')
    assert '78 images, 36 or more' in figures[3].get_suptitle()  # all that there are


def test_checkpoint_and_images(figures: list) -> None:
    """A checkpoint with the preprocessing of its args.yaml, images by class; a network of timm has ImageNet's names."""
    torch.save({'state_dict': tiny('rgse_resnet50', num_classes=3).state_dict()}, 'run/last.pth.tar')
    args = dict(model='rgse_resnet50', model_kwargs=TINY, img_size=64, in_chans=None, interpolation='')
    Path('run/args.yaml').write_text(json.dumps(args))
    argv = ['rgse_resnet50', '--checkpoint', 'run/last.pth.tar', '--data', 'photos']
    assert main(['plot', 'descriptors', *argv, '--num-images', '3']) == 0  # of four, spread over the data
    rows = figures[0].axes[:15:5]
    assert rows[0].get_title() == 'input\n64 x 64'
    assert [ax.get_ylabel().split('\n')[0] for ax in rows] == ['class a', 'class a', 'class c']
    greens = [255 * ax.images[0].get_array()[32, 32, 1] for ax in rows]
    assert greens == pytest.approx([120, 60, 180], abs=5)  # each image beside its class
    assert main(['plot', 'gates', *argv, '--class-map', 'map.txt', '--classes', 'b', 'c']) == 0
    assert [line.get_label() for line in figures[1].axes[0].lines] == ['class b', 'class c', 'mean over all 2 classes']
    torch.save({'state_dict': timm.create_model('seresnet50', **TINY).state_dict()}, 'se.pth')
    argv = ['seresnet50', *TINY_ARGS, '--checkpoint', 'se.pth', '--data', 'photos', '--img-size', '32']
    assert main(['plot', 'descriptors', *argv, '--out', 'se.png']) == 0
    prediction = figures[2].axes[0].get_ylabel().split('\n')[1].removeprefix('predicted ').removesuffix('...')
    assert any(name.startswith(prediction) for name in timm.data.ImageNetInfo().label_descriptions())


def test_bad_input(capsys, tmp_path, hub) -> None:
    """One clear line each, exit code 2, nothing downloaded or written."""
    for name, chans in (('rgse', 3), ('grey', 1), ('four', 4)):
        torch.save(tiny('rgse_resnet50', num_classes=3, in_chans=chans).state_dict(), f'{name}.pth')
    Path('broken/class/x.png').write_text('not an image')
    requests = len(hub.requests)
    rgse, four = (['rgse_resnet50', *TINY_ARGS, '--checkpoint', f'{name}.pth'] for name in ('rgse', 'four'))
    mean_std = ['--img-size', '32', '--mean', *4 * ['0.5'], '--std', *4 * ['0.5']]
    for message, kind, *argv in (
            ('ResNet has no SE module', 'kernels', 'resnet50'),
            ('Every squeeze of this ResNet is the global average', 'kernels', 'seresnet50'),
            ('The name of out.txt must end in .png, .pdf or .svg', 'kernels', './digits', '--out', 'out.txt'),
            ('rgse.pth: Error(s) in loading state_dict', 'gates', 'seresnet50', '--checkpoint', 'rgse.pth'),
            ("Unknown model 'nope'", 'gates', 'nope'),
            ('There is no folder ./nope', 'gates', './nope'),
            ('Cannot create rgse_resnet50.nope', 'gates', 'rgse_resnet50.nope'),
            ('local-dir:digits has its own weights', 'gates', 'local-dir:digits', *rgse[1:]),
            ('its preprocessing is for 3', 'kernels', 'rgse_resnet50', *TINY_ARGS, '--checkpoint', 'grey.pth'),
            ('images with 4 channels. Only 1 or 3', 'descriptors', *four, *mean_std),
            ('none is not a directory', 'gates', *rgse, '--data', 'none'),
            ('empty is not a folder of images by class: Found 0 images', 'gates', *rgse, '--data', 'empty'),
            ('Cannot read the images of broken', 'descriptors', *rgse, '--data', 'broken'),
            ('photos is not a folder of images', 'gates', *rgse, '--data', 'photos', '--class-map', 'no.txt'),
            ('--num-images must be at least 1, got 0', 'descriptors', *rgse, '--num-images', '0'),
            ('no image of class d', 'gates', *rgse, '--data', 'photos', '--classes', 'a', 'd'),
            ('no image of class z', 'gates', *rgse, '--data', 'photos', '--class-map', 'map.txt', '--classes', 'z'),
    ):
        check_fails(capsys, tmp_path, ['plot', kind, *argv], message)
    assert len(hub.requests) == requests
