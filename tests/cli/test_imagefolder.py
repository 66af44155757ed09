""" Image lists of the official code, read by timm """
from pathlib import Path

import pytest
from PIL import Image

from helpers.runs import check_fails
from timm.data import create_dataset
from timm_sepool.cli.main import main


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    """The current directory, with images of one grey value each, one name twice, and a directory `existing`."""
    for i, name in enumerate(('a/x.png', 'b/x.png', 'a/y.png', 'b/z.png')):
        (tmp_path / 'images' / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (i * 10,) * 3).save(tmp_path / 'images' / name)
    (tmp_path / 'existing').mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('start', [b'', b'\xef\xbb\xbf'], ids=['plain', 'byte_order_mark'])
def test_imagefolder(capsys, start: bytes) -> None:
    """timm reads each image (grey value) with its label, in the list's order within a class, repeats included."""
    for split, text, class_map, expected in (
            ('train', b'a/x.png 0\r\nb/x.png 0\n\na/y.png 10\nb/z.png 2\na/y.png 10\n', 'train/class_map.txt',
             [(0, 0), (10, 0), (30, 2), (20, 10), (20, 10)]),
            # one class map serves both splits, whatever labels they hold
            ('val', b'a/x.png 0\nb/z.png 2\n', 'train/class_map.txt', [(0, 0), (30, 2)]),
            ('dense', b'a/x.png 1\nb/z.png 0\n', '', [(30, 0), (0, 1)])):
        Path('list.txt').write_bytes(start + text)
        assert main(['imagefolder', 'list.txt', 'images', split]) == 0
        assert (f'--class-map {split}/class_map.txt' in capsys.readouterr().out) == bool(class_map)
        samples = create_dataset('', root=split, class_map=class_map)
        assert [(image.getpixel((0, 0))[0], label) for image, label in samples] == expected


@pytest.mark.parametrize('text,argv,message', [
    ('imagename label\n', '', 'list.txt:1: expected "IMAGE LABEL"'),
    ('a/x.png 0\na/y.png -1\n', '', 'list.txt:2: expected "IMAGE LABEL"'),
    ('a/x.png 0 1\n', '', 'list.txt:1: expected "IMAGE LABEL"'),
    ('a/x.png 1000000\n', '', 'a label from 0 to 999999'),
    ('a/x.png\n', '', 'list.txt:1: expected "IMAGE LABEL"'),
    ('a/x.png 0\na/q.png 1\n', '', 'list.txt:2: the image images/a/q.png does not exist'),
    ('a/x.png 0\n', 'list.txt elsewhere out', 'Is elsewhere the right directory?'),
    ('\n', '', 'list.txt lists no images'),
    ('\xff', '', 'Cannot read the list list.txt: '),
    ('a/x.png 0\n', 'none.txt images out', 'Cannot read the list none.txt: '),
    ('a/x.png 0\n', 'list.txt images existing', 'existing already exists. Choose another'),
    ('a/x.png 0\n', 'list.txt images data/train', 'Create it first: mkdir -p data'),
    ('a/x.png 0\n', 'list.txt images list.txt/out', 'list.txt is not a writable directory'),
])
def test_bad_input(capsys, text: str, argv: str, message: str) -> None:
    Path('list.txt').write_text(text, encoding='latin-1')
    check_fails(capsys, Path(), ['imagefolder', *(argv or 'list.txt images out').split()], message)
