""" `timm-sepool convert`; tests/test_checkpoints.py converts official checkpoints """
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import timm
from helpers.common import TINY, images, tiny
from helpers.hub_server import HubServer
from helpers.runs import TINY_ARGS, check_fails, push_args, write_run
from timm_sepool.cli.main import main


@pytest.mark.parametrize('model_args', ['args.yaml', '--model-kwargs'])
def test_training_checkpoint(hub: HubServer, tmp_path: Path, capsys, model_args: str) -> None:
    """The printed call works as it stands, and what is known of the run goes on to `push`."""
    model, ema = (tiny('spse_resnet50', num_classes=7, in_chans=1, global_pool='catavgmax') for _ in range(2))
    checkpoint = write_run(
        tmp_path / 'run', model, 'spse_resnet50.from_resnet50_tv_in1k', ema, in_chans=1, img_size=32, gp='catavgmax')
    x = images(2, 1, 64, 64)
    convert = ['convert', checkpoint, tmp_path / 'out.safetensors', '--model', 'spse_resnet50']
    flags = []
    if model_args == '--model-kwargs':
        checkpoint.with_name('args.yaml').unlink()
        check_fails(capsys, tmp_path, convert, ' pass its model arguments by --model-kwargs.')
        flags = [*TINY_ARGS, 'global_pool=catavgmax']
    for expected, ema_flag in ((model, []), (ema, ['--use-ema'])):
        convert[2] = tmp_path / f'out{len(ema_flag)}.safetensors'
        assert main([*map(str, convert), *ema_flag, *flags]) == 0
        command = capsys.readouterr().out.splitlines()[-1].strip()
        assert 'num_classes=7' in command and 'in_chans=1' in command
        assert torch.equal(eval(command, {'timm': timm}).eval()(x), expected(x))
        assert convert[2].stat().st_mode == checkpoint.stat().st_mode  # readable as any file
    convert[1], convert[2] = convert[2], tmp_path / 'again.safetensors'
    assert main([*map(str, convert)]) == 0  # from its metadata
    a, b = load_file(convert[1]), load_file(convert[2])
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    push = push_args('spse_resnet50', convert[2], '--dry-run', tmp_path / 'o')
    if flags:
        check_fails(capsys, tmp_path, push, 'The preprocessing of')
        push += '--img-size 32 --interpolation bilinear --crop-pct 0.875 --mean 0.449 --std 0.226'.split()
    else:
        (tmp_path / 'args.yaml').write_text('model: of another run')  # the file's own metadata counts
    requests = len(hub.requests)
    assert main(push) == 0 and len(hub.requests) == requests  # a dry run uploads nothing
    pushed = timm.create_model(f'local-dir:{tmp_path / "o"}', pretrained=True).eval()
    assert torch.equal(pushed(x), ema(x))
    cfg = pushed.pretrained_cfg
    assert (tuple(cfg['input_size']), cfg['interpolation'], cfg['crop_pct']) == ((1, 32, 32), 'bilinear', 0.875)
    assert cfg['mean'] == pytest.approx([0.449]) and cfg['std'] == pytest.approx([0.226])


@pytest.mark.parametrize('message, argv', [  # tests/faults/test_checkpoints.py has many more checkpoints
    ('does not exist', 'none.pth out.safetensors'),
    ('The name of a safetensors file must end in .safetensors', 'misnamed.pth out.safetensors'),
    ('Cannot read the checkpoint', '. out.safetensors'),
    ('has the weights of a network without a squeeze, not of rgse_resnet50', 'plain.pth out.safetensors'),
    ('has no EMA weights', 'good.pth out.safetensors --use-ema'),
    ("cannot be created with {'base': 'seresnet50.nope'",
     'good.pth out.safetensors --model adopted --model-kwargs base=seresnet50.nope'),
    ('must end in .safetensors', 'good.pth out.pth'),
    ('already exists', 'good.pth existing.safetensors'),
    ('is not a writable directory', 'good.pth good.pth/out.safetensors'),
])
def test_bad_input(tmp_path: Path, capsys, monkeypatch, message: str, argv: str) -> None:
    """One clear error, nothing written, what is there untouched."""
    monkeypatch.chdir(tmp_path)
    good = tiny('rgse_resnet50').state_dict()
    torch.save(good, 'good.pth')
    save_file(good, 'misnamed.pth')
    torch.save(timm.create_model('resnet50', **TINY).state_dict(), 'plain.pth')
    Path('existing.safetensors').write_text('precious')
    source, out, *flags = argv.split()
    argv = ['convert', source, out, '--model', 'rgse_resnet50', *TINY_ARGS, *flags]
    check_fails(capsys, tmp_path, argv, message)
    assert Path('existing.safetensors').read_text() == 'precious'


def test_bad_model_kwargs(capsys) -> None:
    with pytest.raises(SystemExit, match='2'):
        main('convert in.pth out.safetensors --model rgse_resnet50 --model-kwargs layers'.split())
    assert '--model-kwargs: expected KEY=VALUE, got layers' in capsys.readouterr().err
