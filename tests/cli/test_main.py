""" The command line, run as a user runs it """
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import List

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import timm
from helpers.common import NAMES, PARAMS, TINY, images, official_state_dict, tiny
from timm.data import create_dataset
from timm_sepool.cli.main import main

TINY_ARGS = ['--model-kwargs', 'layers=(1,1,1,1)', 'channels=(16,32,64,128)']


def fails(capsys, argv: List[str], message: str) -> None:
    """Exit code 2 and one line on stderr that holds the message."""
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(f'timm-sepool {argv[0]}: error: ') and err.count('\n') == 1, err
    assert message in err, err


def files(folder: Path) -> List[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*'))


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


# --- convert

@pytest.mark.parametrize('name', ['rgse_resnext50', 'spse_resnet50'])
def test_convert_official(tmp_path, capsys, name: str) -> None:
    """An official checkpoint to a file that timm loads strictly, as it is printed."""
    official = official_state_dict(name)
    state_dict = {f'module.{k}': v.float() if v.is_floating_point() else v for k, v in official.items()}
    checkpoint = {'epoch': 100, 'arch': 'X', 'state_dict': state_dict, 'best_prec1': torch.tensor(77.), 'optimizer': {}}
    torch.save(checkpoint, tmp_path / 'in.pth.tar')
    out = tmp_path / 'out.safetensors'
    assert main(['convert', str(tmp_path / 'in.pth.tar'), str(out), '--model', name]) == 0
    assert f'timm.create_model({name!r}, checkpoint_path={str(out)!r})' in capsys.readouterr().out
    model = timm.create_model(name, checkpoint_path=str(out))
    assert torch.equal(model.fc.weight, state_dict['module.fc.weight'])
    reduction = state_dict['module.layer1.layer1_block_0.fc_reduction.weight']
    assert torch.equal(model.layer1[0].se.fc1.weight[:, :, 0, 0], reduction)
    assert files(tmp_path) == ['in.pth.tar', 'out.safetensors']
    assert out.stat().st_mode == (tmp_path / 'in.pth.tar').stat().st_mode  # readable as any file


def test_convert_training_checkpoint(tmp_path, capsys) -> None:
    """timm's own: with arguments, wrapped by DDP, with EMA weights; other classes and channels are read off it."""
    model, ema = tiny('spse_resnet50', num_classes=7, in_chans=1), tiny('spse_resnet50', num_classes=7, in_chans=1)
    torch.save(
        dict(
            epoch=3,
            arch='spse_resnet50',
            version=2,
            args=Namespace(model='spse_resnet50', lr=0.1),
            state_dict={f'module.{k}': v for k, v in model.state_dict().items()},
            state_dict_ema=ema.state_dict(),
            metric=71.5,
        ),
        tmp_path / 'last.pth.tar',
    )
    for flags, expected in (([], model), (['--use-ema'], ema)):
        out = tmp_path / f'out{len(flags)}.safetensors'
        argv = ['convert', str(tmp_path / 'last.pth.tar'), str(out), '--model', 'spse_resnet50', *flags, *TINY_ARGS]
        assert main(argv) == 0
        command = capsys.readouterr().out.splitlines()[-1].strip()
        assert 'num_classes=7' in command and 'in_chans=1' in command
        loaded = eval(command, {'timm': timm}).eval()  # the printed call as it stands
        assert torch.equal(loaded(images(2, 1, 64, 64)), expected(images(2, 1, 64, 64)))
    again = tmp_path / 'again.safetensors'
    assert main(['convert', str(out), str(again), '--model', 'spse_resnet50', *TINY_ARGS]) == 0
    a, b = load_file(out), load_file(again)
    assert all(torch.equal(a[k], b[k]) for k in a) and len(a) == len(b)  # never converted twice


def test_convert_bad_input(tmp_path, capsys, monkeypatch) -> None:
    """One clear error each, nothing written, what is there untouched."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    good, out = tmp_path / 'good.pth', tmp_path / 'out.safetensors'
    before: List[str] = []
    model = tiny('rgse_resnet50')
    torch.save(model.state_dict(), good)
    truncated, evil, text, other = (tmp_path / n for n in ('truncated.pth', 'evil.pth', 'text.pth', 'other.pth'))
    truncated.write_bytes(good.read_bytes()[:200_000])
    torch.save({'state_dict': Evil()}, evil)
    text.write_text('no checkpoint')
    torch.save([1, 2], other)
    save_file(model.state_dict(), tmp_path / 'cut.safetensors')
    (tmp_path / 'cut.safetensors').write_bytes((tmp_path / 'cut.safetensors').read_bytes()[:-100])
    torch.save(timm.create_model('resnet18').state_dict(), tmp_path / 'resnet18.pth')
    broken = model.state_dict()
    broken['layer2.0.se.weight'] = torch.zeros(128, 1, 3, 3)
    torch.save(broken, tmp_path / 'broken.pth')
    del broken['layer2.0.se.weight']
    del broken['fc.bias']
    torch.save(broken, tmp_path / 'nobias.pth')
    existing = tmp_path / 'existing.safetensors'
    existing.write_text('precious')
    before = files(tmp_path)

    def convert_fails(source, message: str, target=out, name: str = 'rgse_resnet50', *flags: str) -> None:
        fails(capsys, ['convert', str(source), str(target), '--model', name, *TINY_ARGS, *flags], message)
        assert files(tmp_path) == before
        assert existing.read_text() == 'precious'

    convert_fails(good, "Unknown model 'resnet50'. Choose one of: rgse_resnet50", out, 'resnet50')
    convert_fails(tmp_path / 'none.pth', 'There is no checkpoint')
    convert_fails(truncated, 'is damaged or no checkpoint')
    empty, keyed, scalar, safe = (tmp_path / n for n in ('empty.pth', 'keyed.pth', 'scalar.pth', 'safe.pth'))
    empty.write_bytes(b'')
    torch.save({1: torch.zeros(1)}, keyed)
    torch.save({'fc.weight': torch.tensor(1.)}, scalar)
    save_file(model.state_dict(), safe)
    torch.save({**model.state_dict(), 'extra': torch.zeros(1)}, tmp_path / 'extra.pth')
    before = files(tmp_path)
    convert_fails(empty, 'is damaged or no checkpoint')
    convert_fails(keyed, 'holds no state dict')
    convert_fails(scalar, 'scalar.pth')
    convert_fails(safe, 'a safetensors file has to be named .safetensors')
    convert_fails(tmp_path, 'Can not read the checkpoint')
    convert_fails(tmp_path / 'extra.pth', 'extra.pth: The checkpoint does not fit rgse_resnet50 (unexpected')
    convert_fails(good, 'has to be named .safetensors', tmp_path / 'out.pth')
    convert_fails(good, 'can not be created', out, 'rgse_resnet50', '--model-kwargs', 'act_layer=nope')
    convert_fails(evil, 'asks for code to be run, which is refused')
    convert_fails(text, 'text.pth is damaged')
    convert_fails(other, 'holds no state dict')
    convert_fails(tmp_path / 'cut.safetensors', 'is damaged or no checkpoint')
    convert_fails(tmp_path / 'resnet18.pth', 'holds no rgse_resnet50 weights but those of a network without its')
    convert_fails(tmp_path / 'broken.pth', 'tensors of another shape: layer2.0.se.weight)')
    convert_fails(tmp_path / 'nobias.pth', 'missing tensors: layer2.0.se.weight)')
    convert_fails(good, 'does not fit spse_resnet50', out, 'spse_resnet50')
    convert_fails(good, 'holds no EMA weights', out, 'rgse_resnet50', '--use-ema')
    convert_fails(good, 'exists and is left as it is', existing)
    convert_fails(good, 'is no writable folder', tmp_path / 'no' / 'folder' / 'out.safetensors')
    convert_fails(good, 'is no writable folder', good / 'out.safetensors')

    def interrupt(*args, **kwargs) -> None:
        Path(args[1]).write_text('half')
        raise KeyboardInterrupt
    monkeypatch.setattr('safetensors.torch.save_file', interrupt)
    assert main(['convert', str(good), str(out), '--model', 'rgse_resnet50', *TINY_ARGS]) == 130
    assert files(tmp_path) == before
    with pytest.raises(SystemExit, match='2'):
        main(['convert', str(good), str(out)])


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


def test_model_kwargs_bad_input(capsys) -> None:
    with pytest.raises(SystemExit, match='2'):
        main(['convert', 'in.pth', 'out.safetensors', '--model', 'rgse_resnet50', '--model-kwargs', 'layers'])
    assert 'argument --model-kwargs: expected KEY=VALUE, got layers' in capsys.readouterr().err


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


def test_tiny_is_what_the_flags_say() -> None:
    assert TINY == dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128))
