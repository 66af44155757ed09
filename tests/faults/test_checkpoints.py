""" Damaged, hostile and unfit checkpoint files: refused with one clear error, or loaded as they are

Every id is one fault. --full flips ten times as many bits.
"""
import io
import json
import os
import pickle
import random
import struct
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import safetensors.torch
import torch

import timm
from helpers.common import TINY, tiny
from timm_sepool import checkpoint_filter_fn
from timm_sepool.cli.main import main

FLIPS = 60 * (10 if os.environ['TIMM_SEPOOL_FULL_TESTS'] else 1)
KEY = 'layer2.0.conv1.weight'
ARGS = ['--model', 'rgse_resnet50', '--model-kwargs', 'layers=(1,1,1,1)', 'channels=(16,32,64,128)']
StateDict = Dict[str, torch.Tensor]


@pytest.fixture(scope='module')
def sound() -> StateDict:
    return tiny('rgse_resnet50', num_classes=1000).state_dict()


def create(path: Path) -> torch.nn.Module:
    return timm.create_model('rgse_resnet50', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **TINY)


def save(content: Any, path: Path) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == '.safetensors':
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


def refused_by_create(path: Path) -> str:
    """One RuntimeError that names the file, the network and the mend."""
    with pytest.raises(RuntimeError) as e:
        create(path)
    message = str(e.value)
    assert type(e.value) is RuntimeError and '\n' not in message and len(message) < 800
    assert str(path) in message and 'rgse_resnet50' in message
    assert 'Check the name' in message or 'Use a sound checkpoint' in message
    return message


def refused_by_convert(path: Path, capsys) -> str:
    """Exit code 2, one line that names the file, nothing written."""
    out = path.with_name('out.safetensors')
    before = sorted(path.parent.iterdir())
    assert main(['convert', str(path), str(out), *ARGS]) == 2
    err = capsys.readouterr().err
    assert err.startswith('timm-sepool convert: error: ') and err.count('\n') == 1 and str(path) in err, err
    assert sorted(path.parent.iterdir()) == before
    return err


def refused_by_push(path: Path, capsys) -> None:
    out = path.with_name('pushed')
    flags = ['--img-size', '64', '--interpolation', 'bicubic', '--crop-pct', '1', '--mean', '0', '--std', '1']
    assert main(['push', 'rgse_resnet50', '--repo-id', 'user/net', '--checkpoint', str(path), '--dry-run', str(out),
                 *flags, *ARGS[2:]]) == 2
    err = capsys.readouterr().err
    assert err.startswith('timm-sepool push: error: ') and err.count('\n') == 1 and str(path) in err, err
    assert not out.exists()


def refused_by_timm(path: Path) -> None:
    """checkpoint_path is timm's own: any error will do, but no network."""
    with pytest.raises(Exception):  # noqa: B017
        timm.create_model('rgse_resnet50', checkpoint_path=str(path), **TINY)


def refused(path: Path, capsys) -> None:
    refused_by_create(path)
    refused_by_convert(path, capsys)
    refused_by_push(path, capsys)


def assert_loaded(model: torch.nn.Module, state_dict: StateDict) -> None:
    """Bit by bit, the weights of the file and no others."""
    ours = model.state_dict()
    assert ours.keys() == state_dict.keys()
    for k, v in state_dict.items():
        assert torch.equal(ours[k], v.to(ours[k].dtype)), k


def rewrite(data: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """A torch archive with its members changed, compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out.getvalue()


def resized(numel: int, to: int) -> bytes:
    """A checkpoint whose pickle has another number of elements than its storage."""
    data = io.BytesIO()
    torch.save({KEY: torch.zeros(numel)}, data)
    codes = [b'J' + struct.pack('<i', n) if n >= 2 ** 16 else b'M' + struct.pack('<H', n) for n in (numel, to)]

    def change(name: str, member: bytes) -> bytes:
        assert not name.endswith('data.pkl') or codes[0] in member
        return member.replace(*codes) if name.endswith('data.pkl') else member
    return rewrite(data.getvalue(), change)


@pytest.fixture
def checked_storages() -> None:
    """Older torch (2.5 and 2.7 do, 2.15 does not) takes the size of a storage on trust, and reads beyond its end."""
    try:
        torch.load(io.BytesIO(resized(1000, 1001)), weights_only=True)
    except RuntimeError:
        return
    pytest.skip('this torch does not check the size of storages')


# --- flipped bits and cut files

def flip_bits(path: Path, data: bytes, start: int, stop: int, read: Callable[[Path], StateDict]) -> List[bool]:
    """Flip single bits of a region and load: refused, or what is loaded is what the format's own reader reads."""
    rng, loaded = random.Random(0), []
    for _ in range(FLIPS):
        i, bit = rng.randrange(start, stop), rng.randrange(8)
        path.write_bytes(data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1:])
        try:
            model = create(path)
        except RuntimeError as e:
            assert type(e) is RuntimeError and str(path) in str(e), f'bit {bit} of byte {i}: {e!r}'
            loaded.append(False)
            continue
        state_dict = read(path)
        assert all(v.isfinite().all() for v in state_dict.values()), f'bit {bit} of byte {i}'
        assert_loaded(model, state_dict)
        loaded.append(True)
    return loaded


@pytest.mark.parametrize('region', ['length', 'start of the header', 'header', 'weights'])
def test_flipped_bits_in_safetensors(sound: StateDict, tmp_path: Path, region: str) -> None:
    data = safetensors.torch.save(sound, metadata={'format': 'pt'})
    body = 8 + int.from_bytes(data[:8], 'little')
    start, stop = {
        'length': (0, 8), 'start of the header': (8, 200), 'header': (200, body), 'weights': (body, len(data))}[region]
    loaded = flip_bits(tmp_path / 'x.safetensors', data, start, stop, safetensors.torch.load_file)
    assert any(loaded) == (region in ('start of the header', 'weights'))  # the former holds free text, "format": "pt"


@pytest.mark.parametrize('region', ['pickle', 'weights'])
def test_flipped_bits_in_pickles(sound: StateDict, tmp_path: Path, request, region: str) -> None:
    if region == 'pickle':
        request.getfixturevalue('checked_storages')
    data = io.BytesIO()
    torch.save(sound, data)
    archive, data = zipfile.ZipFile(data), data.getvalue()
    member = next(m for m in archive.infolist() if m.filename.endswith('data.pkl'))
    start, stop = {
        'pickle': (member.header_offset, member.header_offset + member.file_size),
        'weights': (member.header_offset + member.file_size, archive.start_dir),
    }[region]
    # not in the archive's directory, where torch checks nothing: some flips there give whatever is in memory
    read = partial(torch.load, map_location='cpu', weights_only=True)
    loaded = flip_bits(tmp_path / 'x.pth', data, start, stop, read)
    assert any(loaded) and (region == 'weights' or not all(loaded))


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')], ids=str)
@pytest.mark.parametrize('key', [KEY, 'conv1.weight', 'fc.bias', 'layer4.0.bn3.running_var', 'layer1.0.se.weight'])
def test_not_finite(sound: StateDict, tmp_path: Path, capsys, key: str, value: float) -> None:
    weight = sound[key].clone()
    weight.view(-1)[-1] = value
    path = save({**sound, key: weight}, tmp_path / 'x.safetensors')
    assert f'1 tensors holding NaN or infinity ({key})' in refused_by_create(path)
    assert 'NaN or infinity' in refused_by_convert(path, capsys)


@pytest.mark.parametrize('suffix', ['safetensors', 'pth', 'legacy.pth'])
@pytest.mark.parametrize('size', [0, 1, 7, 8, 9, 100, 8192, 0.25, 0.5, 0.75, -4096, -100, -22, -1], ids=str)
def test_truncated(sound: StateDict, tmp_path: Path, capsys, suffix: str, size: float) -> None:
    path = tmp_path / f'x.{suffix}'
    if suffix == 'legacy.pth':
        torch.save(sound, path, _use_new_zipfile_serialization=False)
    else:
        save(sound, path)
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * size) if 0 < size < 1 else size])
    refused_by_create(path)
    refused_by_convert(path, capsys)
    refused_by_timm(path)


def test_file_that_grew(sound: StateDict, tmp_path: Path, capsys) -> None:
    refused(save(safetensors.torch.save(sound) + b'more', tmp_path / 'x.safetensors'), capsys)


# --- headers that lie

ENTRY = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HEADERS = {
    'length of 2**62': struct.pack('<Q', 2 ** 62) + b'{}',
    'length of 99 MB': struct.pack('<Q', 99_999_999) + b'{}',
    'length of 0': struct.pack('<Q', 0),
    'no JSON': '{not',
    'no object': '[]',
    'not UTF-8': b'{"\xff":1}',
    'nested 50000 deep': '{"a":' + 50_000 * '[' + 50_000 * ']' + '}',
    'shape of 4 TB': '{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}',
    'shape that overflows': '{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
    'negative shape': '{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    'shape of another size': '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
    'unknown dtype': '{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}',
    'offset beyond the file': '{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    'offsets that overlap': f'{{{ENTRY},{ENTRY.replace("a", "b", 1)}}}',
    'duplicate name': f'{{{ENTRY},{ENTRY}}}',
    'duplicate field': ENTRY.join('{}').replace('"dtype":"F32"', '"dtype":"F32","dtype":"I32"'),
}


@pytest.mark.parametrize('header', HEADERS)
def test_header(tmp_path: Path, capsys, header: str) -> None:
    data = HEADERS[header]
    if isinstance(data, str) or data.startswith(b'{'):
        data = data.encode() if isinstance(data, str) else data
        data = struct.pack('<Q', len(data)) + data
    refused(save(data + bytes(4), tmp_path / 'x.safetensors'), capsys)


def test_duplicate_name_in_a_whole_file(sound: StateDict, tmp_path: Path) -> None:
    """The last entry counts, and one name is missing or one part of the file is nobody's."""
    data = safetensors.torch.save(sound)
    length = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:8 + length])
    first, second = [k for k in header if k.endswith('bn1.weight')][:2]
    renamed = data[8:8 + length].replace(f'"{second}"'.encode(), f'"{first}"'.encode())
    path = save(struct.pack('<Q', len(renamed)) + renamed + data[8 + length:], tmp_path / 'x.safetensors')
    refused_by_create(path)
    refused_by_timm(path)


# --- pickles

class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')  # torch's
@pytest.mark.parametrize('where', ['alone', 'state dict', 'name', 'optimizer', 'beside'])
@pytest.mark.parametrize('form', ['zip', 'legacy', *(f'protocol {i}' for i in range(6))])
def test_code_does_not_run(sound: StateDict, tmp_path: Path, capsys, form: str, where: str) -> None:
    ran = tmp_path / 'ran'
    evil = Evil(ran)
    content = {
        'alone': evil,
        'state dict': {**sound, KEY: evil},
        'name': {**sound, evil: torch.zeros(1)},
        'optimizer': {'state_dict': sound, 'optimizer': evil},
        'beside': {'state_dict': sound, 'state_dict_ema': evil},
    }[where]
    path = tmp_path / 'x.pth'
    if form.startswith('protocol'):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch's, of tensors in plain pickles
            path.write_bytes(pickle.dumps(content, protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')
    refused_by_create(path)
    message = refused_by_convert(path, capsys)
    assert form not in ('zip', 'legacy') or 'asks for code to be run, which is refused' in message
    refused_by_timm(path)
    assert not ran.exists()
    if form in ('zip', 'legacy'):
        torch.load(path, weights_only=False)
        assert ran.exists()  # and it would have


@pytest.mark.parametrize('size', [2 ** 31 - 1, 123_457], ids=['8 GB', 'one number more'])
@pytest.mark.usefixtures('checked_storages')
def test_storage_that_is_not_there(tmp_path: Path, capsys, size: int) -> None:
    refused(save(resized(123_456, size), tmp_path / 'x.pth'), capsys)


@pytest.mark.parametrize('bomb', ['weights', 'pickle'])
def test_64_megabytes_of_zeros_in_64_kilobytes(tmp_path: Path, capsys, bomb: str) -> None:
    buffer = io.BytesIO()
    torch.save({KEY: torch.zeros(123_456)}, buffer)
    suffix = {'weights': '/data/0', 'pickle': 'data.pkl'}[bomb]
    data = rewrite(buffer.getvalue(), lambda name, data: bytes(2 ** 26) if name.endswith(suffix) else data)
    assert len(data) < 100_000
    refused(save(data, tmp_path / 'x.pth'), capsys)


@pytest.mark.parametrize('key', [KEY, 'extra', 'fc.weight', 'fc.bias', 'conv1.weight'])
def test_view_of_40_terabytes(sound: StateDict, tmp_path: Path, capsys, key: str) -> None:
    """One number in the file: to look at all of its elements would take all memory."""
    shape = {'fc.weight': (1000, 10 ** 10), 'conv1.weight': (64, 2 * 10 ** 8, 7, 7)}.get(key, (10 ** 13,))
    path = save({**sound, key: torch.zeros(1).expand(shape)}, tmp_path / 'x.pth')
    assert f'no dense tensors of 16, 32 or 64-bit floats by name ({key})' in refused_by_create(path)
    refused(path, capsys)


def cyclic(content: Any) -> Any:
    if isinstance(content, list):
        content.append(content)
    else:
        content['state_dict'] = content
    return content


NO_STATE_DICTS = {
    'None': lambda s: None,
    'tensor': lambda s: s[KEY],
    'list of tensors': lambda s: list(s.values()),
    'empty dict': lambda s: {},
    'number among the tensors': lambda s: {**s, KEY: 3},
    'list among the tensors': lambda s: {**s, KEY: s[KEY].tolist()},
    'integer name': lambda s: {**s, 3: s[KEY]},
    'bytes name': lambda s: {**s, b'3': s[KEY]},
    'tuple name': lambda s: {**s, ('a', 1): s[KEY]},
    'None as state_dict': lambda s: {'state_dict': None},
    'list as state_dict': lambda s: {'state_dict': [1, 2]},
    'state_dict four deep': lambda s: {'state_dict': {'state_dict': {'state_dict': {'state_dict': s}}}},
    'cyclic dict': lambda s: cyclic({}),
    'cyclic dict with weights': lambda s: cyclic(dict(s)),
    'cyclic list': lambda s: cyclic([]),
}


@pytest.mark.parametrize('fault', NO_STATE_DICTS)
def test_no_state_dict(sound: StateDict, tmp_path: Path, capsys, fault: str) -> None:
    path = save(NO_STATE_DICTS[fault](sound), tmp_path / 'x.pth')
    refused(path, capsys)
    refused_by_timm(path)


# --- tensors that do not fit

QUIET = pytest.mark.filterwarnings('ignore:.*(quantize|CSR|sparse tensor invariants|TypedStorage)')
NO_WEIGHTS = {
    'int8': lambda w: w.to(torch.int8),
    'uint8': lambda w: w.to(torch.uint8),
    'int32': lambda w: w.view(torch.int32),
    'int64': lambda w: w.to(torch.int64),
    'bool': lambda w: w.bool(),
    'complex64': lambda w: w.to(torch.complex64),
    'float8_e4m3fn': lambda w: w.to(torch.float8_e4m3fn),
    'float8_e5m2': lambda w: w.to(torch.float8_e5m2),
    'sparse COO': lambda w: w.to_sparse(),
    'sparse CSR': lambda w: w.flatten(1).to_sparse_csr(),
    'quantized': lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    'without data': lambda w: w.to('meta'),
}


@QUIET
@pytest.mark.parametrize('fault', NO_WEIGHTS)
def test_no_weights(sound: StateDict, tmp_path: Path, capsys, fault: str) -> None:
    path = save({**sound, KEY: NO_WEIGHTS[fault](sound[KEY])}, tmp_path / 'x.pth')
    assert f'no dense tensors of 16, 32 or 64-bit floats by name ({KEY})' in refused_by_create(path)
    refused(path, capsys)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precision(sound: StateDict, tmp_path: Path, dtype: torch.dtype) -> None:
    """The types that weights are trained in load as the same numbers."""
    state_dict = {k: v.to(dtype) if v.is_floating_point() else v for k, v in sound.items()}
    assert_loaded(create(save(state_dict, tmp_path / 'x.safetensors')), state_dict)


CHANGES = {
    'transposed': lambda w: w.transpose(0, 1),
    'flat': lambda w: w.flatten(),
    'one row more': lambda w: torch.cat([w, w[:1]]),
    'one column less': lambda w: w[:, 1:],
    'one dimension less': lambda w: w[..., 0],
    'no elements': lambda w: w[:0],
    'scalar': lambda w: w[0, 0, 0, 0],
    'missing': lambda w: None,
}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('key', [KEY, 'layer3.0.se.weight', 'conv1.weight'])
def test_shape(sound: StateDict, tmp_path: Path, capsys, key: str, change: str) -> None:
    state_dict = {**sound, key: CHANGES[change](sound[key].flatten(1)[:, :, None, None])}
    if key == 'conv1.weight' and change == 'one column less':  # channels, of which it may have any number
        state_dict[key] = sound[key][:, :, 1:]
    path = save({k: v.contiguous() for k, v in state_dict.items() if v is not None}, tmp_path / 'x.safetensors')
    refused(path, capsys)
    refused_by_timm(path)


@pytest.mark.parametrize('shape', [(), (1000,), (1000, 7), (1000, 512, 1), (0, 512), (999, 512)], ids=str)
def test_shape_of_the_classifier(sound: StateDict, tmp_path: Path, capsys, shape) -> None:
    path = save({**sound, 'fc.weight': torch.zeros(shape)}, tmp_path / 'x.safetensors')
    refused(path, capsys)
    refused_by_timm(path)


@pytest.mark.parametrize('fault', ['tensor more', 'prefix', 'last stage missing', 'weights of another network'])
def test_names(sound: StateDict, tmp_path: Path, capsys, fault: str) -> None:
    state_dict = {
        'tensor more': {**sound, 'extra': torch.zeros(1)},
        'prefix': {f'backbone.{k}': v for k, v in sound.items()},
        'last stage missing': {k: v for k, v in sound.items() if not k.startswith('layer4.')},
        'weights of another network': tiny('spse_resnet50', num_classes=1000).state_dict(),
    }[fault]
    path = save(state_dict, tmp_path / 'x.safetensors')
    refused(path, capsys)
    refused_by_timm(path)


def test_plain_network_as_checkpoint_path(tmp_path: Path) -> None:
    """checkpoint_path loads strictly, without conversion: a plain ResNet is refused, not loaded in part."""
    path = save(timm.create_model('resnet50', **TINY).state_dict(), tmp_path / 'plain.pth')
    with pytest.raises(RuntimeError, match='Missing key'):
        timm.create_model('rgse_resnet50', checkpoint_path=str(path), **TINY)


def test_ema_that_differs(sound: StateDict, tmp_path: Path) -> None:
    """timm loads the average of a training checkpoint, `convert` does with --use-ema."""
    ema = {k: v / 2 if v.is_floating_point() else v for k, v in sound.items()}
    path = save({'state_dict': sound, 'state_dict_ema': ema}, tmp_path / 'x.pth.tar')
    assert_loaded(create(path), ema)
    for out, flags, expected in (('weights', [], sound), ('ema', ['--use-ema'], ema)):
        out = tmp_path / f'{out}.safetensors'
        assert main(['convert', str(path), str(out), *flags, *ARGS]) == 0
        assert_loaded(create(out), expected)


def test_damaged_ema(sound: StateDict, tmp_path: Path, capsys) -> None:
    """The other weights do not stand in for it."""
    path = save({'state_dict': sound, 'state_dict_ema': {**sound, KEY: sound[KEY] / 0}}, tmp_path / 'x.pth.tar')
    assert 'NaN or infinity' in refused_by_create(path)
    assert main(['convert', str(path), str(tmp_path / 'out.safetensors'), '--use-ema', *ARGS]) == 2
    assert 'NaN or infinity' in capsys.readouterr().err


def test_filter_takes_nothing_else(sound: StateDict) -> None:
    """The public function refuses as the loading does."""
    model = tiny('rgse_resnet50', num_classes=1000)
    for bad in ({1: sound[KEY]}, {**sound, KEY: None}, {'state_dict': {**sound, KEY: sound[KEY].int()}}):
        with pytest.raises(RuntimeError, match='The checkpoint is no state dict, 1 of its entries'):
            checkpoint_filter_fn(bad, model)


# --- files

@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('fault', ['missing', 'folder', 'symlink loop', 'dangling symlink', 'unreadable', 'vanishes'])
def test_file(sound: StateDict, tmp_path: Path, capsys, monkeypatch, fault: str, suffix: str) -> None:
    path = tmp_path / f'rgse_resnet50.{suffix}'  # the errors of the system have the network's name in them
    if fault == 'folder':
        path.mkdir()
    elif fault.endswith('symlink') or fault.startswith('symlink'):
        path.symlink_to(path if fault == 'symlink loop' else tmp_path / 'nothing')
    elif fault == 'unreadable':
        if os.geteuid() == 0:
            pytest.skip('root may read everything')
        save(sound, path).chmod(0)
    elif fault == 'vanishes':  # between the look at it and the opening
        monkeypatch.setattr('os.path.isfile', lambda path: True)
    refused(path, capsys)


def test_arguments_have_errors_of_their_own(sound: StateDict, tmp_path: Path) -> None:
    """What no network can be built with is not put down to the checkpoint."""
    path = save(sound, tmp_path / 'x.safetensors')
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    with pytest.raises(TypeError, match='nonsense'):
        timm.create_model('rgse_resnet50', nonsense=1, **overlay, **TINY)
