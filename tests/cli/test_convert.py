""" `timm-sepool convert` """
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import timm
from helpers.common import TINY, images, official_state_dict, tiny
from helpers.runs import TINY_ARGS, check_fails, files, write_run
from timm_sepool.cli.main import main


@pytest.mark.parametrize('name', ['rgse_resnext50', pytest.param('spse_resnet50', marks=pytest.mark.full)])
def test_official_checkpoint(tmp_path: Path, capsys, name: str) -> None:
    """To a file that timm loads strictly, by the call that is printed."""
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
    argv = ['push', name, '--repo-id', 'user/net', '--checkpoint', out, '--dry-run', tmp_path / 'folder']
    check_fails(capsys, tmp_path, argv, 'The preprocessing of')  # nothing tells it


@pytest.mark.parametrize('model_args', ['args.yaml', '--model-kwargs'])
def test_training_checkpoint(tmp_path: Path, capsys, model_args: str) -> None:
    """The printed call works as it stands, and what is known of the run goes on to `push`."""
    model, ema = (tiny('spse_resnet50', num_classes=7, in_chans=1, global_pool='catavgmax') for _ in range(2))
    checkpoint = write_run(
        tmp_path / 'run', model, 'spse_resnet50.from_resnet50_tv_in1k', ema, in_chans=1, img_size=32, gp='catavgmax')
    flags = []
    if model_args == '--model-kwargs':
        checkpoint.with_name('args.yaml').unlink()
        argv = ['convert', checkpoint, tmp_path / 'out.safetensors', '--model', 'spse_resnet50']
        check_fails(capsys, tmp_path, argv, ' pass its model arguments by --model-kwargs.')
        flags = [*TINY_ARGS, 'global_pool=catavgmax']
    for i, (ema_flag, expected) in enumerate((([], model), (['--use-ema'], ema))):
        out = tmp_path / f'out{i}.safetensors'
        assert main(['convert', str(checkpoint), str(out), '--model', 'spse_resnet50', *ema_flag, *flags]) == 0
        command = capsys.readouterr().out.splitlines()[-1].strip()
        assert 'num_classes=7' in command and 'in_chans=1' in command
        loaded = eval(command, {'timm': timm}).eval()
        assert torch.equal(loaded(images(2, 1, 64, 64)), expected(images(2, 1, 64, 64)))
    again = tmp_path / 'again.safetensors'
    assert main(['convert', str(out), str(again), '--model', 'spse_resnet50']) == 0  # from its metadata
    a, b = load_file(out), load_file(again)
    assert all(torch.equal(a[k], b[k]) for k in a) and len(a) == len(b)

    push = ['push', 'spse_resnet50', '--repo-id', 'user/net', '--checkpoint', str(again)]
    push += ['--dry-run', str(tmp_path / 'o')]
    if flags:
        check_fails(capsys, tmp_path, push, 'The preprocessing of')
        push += '--img-size 32 --interpolation bilinear --crop-pct 0.875 --mean 0.449 --std 0.226'.split()
    (tmp_path / 'args.yaml').write_text('model: of another run')  # the file's own metadata counts
    assert main(push) == (2 if flags else 0)
    if flags:
        (tmp_path / 'args.yaml').unlink()
        assert main(push) == 0
    pushed = timm.create_model(f'local-dir:{tmp_path / "o"}', pretrained=True).eval()
    assert torch.equal(pushed(images(2, 1, 64, 64)), ema(images(2, 1, 64, 64)))
    cfg = pushed.pretrained_cfg
    assert (tuple(cfg['input_size']), cfg['interpolation'], cfg['crop_pct']) == ((1, 32, 32), 'bilinear', 0.875)
    assert cfg['mean'] == pytest.approx([0.449]) and cfg['std'] == pytest.approx([0.226])


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory) -> Path:
    """A sound checkpoint, good.pth, and bad ones. tests/faults/test_checkpoints.py has many more."""
    folder = tmp_path_factory.mktemp('checkpoints')
    good = tiny('rgse_resnet50').state_dict()
    torch.save(good, folder / 'good.pth')
    torch.save(timm.create_model('resnet50', **TINY).state_dict(), folder / 'plain.pth')
    save_file(good, folder / 'misnamed.pth')
    (folder / 'existing.safetensors').write_text('precious')
    return folder


@pytest.mark.parametrize('source, message, flags', [
    ('good.pth', "Unknown model 'resnet50'. Choose one of: rgse_resnet50", ['--model', 'resnet50']),
    ('good.pth', "Unknown model 'rgse_resnext50_32x4d'. Did you mean 'rgse_resnext50'?",
     ['--model', 'rgse_resnext50_32x4d']),
    ('none.pth', 'does not exist', []),
    ('misnamed.pth', 'The name of a safetensors file must end in .safetensors', []),
    ('', 'Cannot read the checkpoint', []),
    ('plain.pth', 'has the weights of a network without a squeeze, not of rgse_resnet50', []),
    ('good.pth', 'does not fit spse_resnet50', ['--model', 'spse_resnet50']),
    ('good.pth', 'has no EMA weights', ['--use-ema']),
    ('good.pth', 'cannot be created', ['--model-kwargs', 'act_layer=nope']),
    ('good.pth', "cannot be created with {'base': 'seresnet50.nope'", [
        '--model', 'adopted', '--model-kwargs', 'base=seresnet50.nope']),
    ('good.pth', 'must end in .safetensors', ['out.pth']),
    ('good.pth', 'already exists', ['existing.safetensors']),
    ('good.pth', 'does not exist. Create it first: mkdir -p', ['no/folder/out.safetensors']),
    ('good.pth', 'is not a writable directory', ['good.pth/out.safetensors']),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else None)
def test_bad_input(checkpoints: Path, capsys, monkeypatch, source: str, message: str, flags: list) -> None:
    """One clear error, nothing written, what is there untouched."""
    monkeypatch.chdir(checkpoints)
    out = flags.pop() if flags and '.' in flags[-1] and '=' not in flags[-1] else 'out.safetensors'
    argv = ['convert', checkpoints / source, out, '--model', 'rgse_resnet50', *TINY_ARGS, *flags]
    check_fails(capsys, checkpoints, argv, message)
    assert (checkpoints / 'existing.safetensors').read_text() == 'precious'


def test_interrupted(checkpoints: Path, monkeypatch) -> None:
    def interrupt(*args, **kwargs) -> None:
        Path(args[1]).write_text('half')
        raise KeyboardInterrupt
    monkeypatch.setattr('safetensors.torch.save_file', interrupt)
    before = files(checkpoints)
    argv = ['convert', str(checkpoints / 'good.pth'), str(checkpoints / 'out.safetensors'), '--model', 'rgse_resnet50']
    assert main([*argv, *TINY_ARGS]) == 130
    assert files(checkpoints) == before


@pytest.mark.parametrize('flags, message', [
    (['--model', 'rgse_resnet50', '--model-kwargs', 'layers'], '--model-kwargs: expected KEY=VALUE, got layers'),
    ([], 'the following arguments are required: --model'),
], ids=str)
def test_bad_command_line(capsys, flags: list, message: str) -> None:
    with pytest.raises(SystemExit, match='2'):
        main(['convert', 'in.pth', 'out.safetensors', *flags])
    assert message in capsys.readouterr().err
