""" The command line, run as a user runs it """
import json
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest
from PIL import Image

from helpers.common import NAMES, PARAMS
from timm.data import create_dataset
from timm_sepool.cli.main import main


def fails(capsys, argv: List[str], message: str) -> None:
    """Exit code 2 and one line on stderr that holds the message."""
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(f'timm-sepool {argv[0]}: error: ') and err.count('\n') == 1, err
    assert message in err, err


def test_command_is_installed() -> None:
    """As the console script and as a module; --help needs neither torch nor timm."""
    script = Path(sys.executable).with_name('timm-sepool')
    for command in ([str(script)], [sys.executable, '-m', 'timm_sepool']):
        out = subprocess.run([*command, '--help'], capture_output=True, text=True, check=True).stdout
        assert all(name in out for name in ('list', 'convert', 'imagefolder', 'quickstart'))
        assert subprocess.run(command, capture_output=True).returncode == 2
    code = (
        'import sys; from timm_sepool.cli.main import _parser; _parser().format_help(); '
        'assert not {"torch", "timm"} & {*sys.modules}')
    subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)


def test_list(capsys) -> None:
    assert main(['list', '--json']) == 0
    rows = {(row['model'], row['family']): row for row in json.loads(capsys.readouterr().out)}
    assert len(rows) == 25
    for name in NAMES:
        row = rows[name, name[:4].upper()]
        assert row['params'] == PARAMS[name]
    assert rows['resnet50', 'plain']['gmacs'] == pytest.approx(4.089, abs=1e-3)
    assert rows['rgse_resnet50', 'RGSE']['gmacs'] == pytest.approx(4.092, abs=1e-3)
    assert rows['rgse_resnext101', 'RGSE']['claimed_top1_err'] == 20.67
    assert rows['resnet152', 'CBAM']['claimed_top5_err'] == 5.70

    command = f'{sys.executable} -m timm_sepool list | head -n 1'
    pipe = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert pipe.stdout.startswith('model') and not pipe.stderr
    assert main(['list']) == 0
    out = capsys.readouterr().out
    assert 'not reproduced' in out and all(name in out for name in NAMES)


# --- imagefolder

@pytest.fixture
def image_list(tmp_path) -> Path:
    """Images of one grey value each, in two folders, with the same name in both."""
    for i, name in enumerate(('a/x.png', 'b/x.png', 'a/y.png', 'b/z.png')):
        (tmp_path / 'images' / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (i * 10,) * 3).save(tmp_path / 'images' / name)
    return tmp_path / 'list.txt'


def test_imagefolder(tmp_path, capsys, image_list: Path) -> None:
    """timm reads each image with its label, in the list's order within a class, repeats included."""
    image_list.write_text('a/x.png 0\nb/x.png 0\n\na/y.png 10\nb/z.png 2\na/y.png 10\n')
    out = tmp_path / 'out'
    assert main(['imagefolder', str(image_list), str(tmp_path / 'images'), str(out)]) == 0
    assert f'--class-map {out}/class_map.txt' in capsys.readouterr().out
    dataset = create_dataset('', root=str(out), class_map=str(out / 'class_map.txt'))
    greys = [(image.getpixel((0, 0))[0], label) for image, label in dataset]
    assert greys == [(0, 0), (10, 0), (30, 2), (20, 10), (20, 10)]

    # one class map serves both splits, whatever labels they hold
    image_list.write_text('a/x.png 0\nb/z.png 2\n')
    assert main(['imagefolder', str(image_list), str(tmp_path / 'images'), str(tmp_path / 'val')]) == 0
    dataset = create_dataset('', root=str(tmp_path / 'val'), class_map=str(out / 'class_map.txt'))
    assert [label for _, label in dataset] == [0, 2]

    capsys.readouterr()
    image_list.write_text('a/x.png 1\nb/z.png 0\n')
    assert main(['imagefolder', str(image_list), str(tmp_path / 'images'), str(tmp_path / 'dense')]) == 0
    assert 'class-map' not in capsys.readouterr().out
    dataset = create_dataset('', root=str(tmp_path / 'dense'))
    assert [(image.getpixel((0, 0))[0], label) for image, label in dataset] == [(30, 0), (0, 1)]


def test_imagefolder_bad_input(tmp_path, capsys, image_list: Path) -> None:
    out = tmp_path / 'out'
    (tmp_path / 'existing').mkdir()
    (tmp_path / 'existing' / 'file').write_text('precious')

    def imagefolder_fails(text: str, message: str, target: Path = out, root: str = 'images') -> None:
        image_list.write_text(text)
        fails(capsys, ['imagefolder', str(image_list), str(tmp_path / root), str(target)], message)
        assert sorted(p.name for p in tmp_path.iterdir()) == ['existing', 'images', 'list.txt']

    imagefolder_fails('imagename label\na/x.png 0\n', ':1: expected "image label"')
    imagefolder_fails('a/x.png 0\na/y.png -1\n', ':2: expected "image label"')
    imagefolder_fails('a/x.png 0 1\n', ':1: expected "image label"')
    imagefolder_fails('a/x.png 1000000\n', 'a label of 0 to 999999')
    imagefolder_fails('a/x.png\n', ':1: expected "image label"')
    imagefolder_fails('a/x.png 0\na/q.png 1\n', ':2: there is no image')
    imagefolder_fails('a/x.png 0\n', 'elsewhere the right folder?', root='elsewhere')
    imagefolder_fails('\n', 'lists no image')
    imagefolder_fails('a/x.png 0\n', 'exists and is left as it is', tmp_path / 'existing')
    imagefolder_fails('a/x.png 0\n', 'is no writable folder', image_list / 'out')
    assert (tmp_path / 'existing' / 'file').read_text() == 'precious'
    fails(capsys, ['imagefolder', str(tmp_path / 'none.txt'), str(tmp_path), str(out)], 'Can not read the list')
