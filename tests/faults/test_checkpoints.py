""" Damaged, hostile and unsuitable checkpoint files: refused with one clear error, or loaded unchanged

Every id is one fault. --full flips more bits, cuts at more places and lets `push` read the files too.
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
from helpers.common import FULL, TINY, tiny
from timm_sepool.cli.main import main

FLIPS = 600 if FULL else 20
KEY = 'layer2.0.conv1.weight'
ARGS = ['--model-kwargs', 'layers=(1,1,1,1)', 'channels=(16,32,64,128)']
PREPROCESSING = ['--img-size', '64', '--interpolation', 'bicubic', '--crop-pct', '1', '--mean', '0', '--std', '1']
StateDict = Dict[str, torch.Tensor]
full = partial(pytest.param, marks=pytest.mark.full)


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
        torch.save(content, path, _use_new_zipfile_serialization='legacy' not in path.name)
    return path


def refused_by_create(path: Path, match: str = '') -> None:
    """One RuntimeError that names the model, the file, the fault and what to do."""
    with pytest.raises(RuntimeError) as e:
        create(path)
    message = str(e.value)
    assert type(e.value) is RuntimeError and '\n' not in message and len(message) < 800
    assert f'rgse_resnet50 cannot be loaded from {path}: ' in message and match in message
    assert '. Use a' in message or '. Check the path, use' in message


def refused_by_commands(path: Path, capsys) -> None:
    """Exit code 2, one line that names the file, nothing written."""
    out, before = path.with_name('out.safetensors'), sorted(path.parent.iterdir())
    commands = [
        ['convert', str(path), str(out), '--model', 'rgse_resnet50', *ARGS],
        ['push', 'rgse_resnet50', '--repo-id', 'user/net', '--checkpoint', str(path), '--dry-run', str(out),
         *PREPROCESSING, *ARGS],
    ]
    for command in commands if FULL else commands[:1]:
        assert main(command) == 2
        err = capsys.readouterr().err
        assert err.startswith(f'timm-sepool {command[0]}: error: ') and err.count('\n') == 1 and str(path) in err, err
        assert sorted(path.parent.iterdir()) == before


def refused_by_timm(path: Path) -> None:
    """timm loads checkpoint_path without our code: any error is right, a network is not."""
    with pytest.raises(Exception):  # noqa: B017
        timm.create_model('rgse_resnet50', checkpoint_path=str(path), **TINY)


def refused(path: Path, capsys, match: str = '') -> None:
    refused_by_create(path, match)
    refused_by_commands(path, capsys)


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
    """Old torch (2.5 and 2.7) does not check the size of a storage and reads beyond its end; 2.14 checks it."""
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
    if region != 'start of the header':  # which holds free text, "format": "pt"
        assert any(loaded) == (region == 'weights')


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
    assert any(loaded) if region == 'weights' else not all(loaded)


@pytest.mark.parametrize('suffix', ['safetensors', 'pth', 'legacy.pth'])
@pytest.mark.parametrize('size', [0, 8, 0.5, -1, *map(full, (1, 7, 9, 100, 8192, 0.25, 0.75, -4096, -100, -22))], ids=str)
def test_truncated(sound: StateDict, tmp_path: Path, capsys, suffix: str, size: float) -> None:
    path = save(sound, tmp_path / f'x.{suffix}')
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * size) if 0 < size < 1 else size])
    refused(path, capsys)
    refused_by_timm(path)


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


@pytest.mark.parametrize('fault', ['grew', 'duplicate name'])
def test_whole_file(sound: StateDict, tmp_path: Path, capsys, fault: str) -> None:
    data = safetensors.torch.save(sound)
    length = int.from_bytes(data[:8], 'little')
    header, body = data[8:8 + length], data[8 + length:]
    if fault == 'grew':
        body += b'more'
    else:  # the last entry counts: one name is missing, and one part of the file belongs to no name
        first, second = [k for k in json.loads(header) if k.endswith('bn1.weight')][:2]
        header = header.replace(f'"{second}"'.encode(), f'"{first}"'.encode())
    path = save(struct.pack('<Q', len(header)) + header + body, tmp_path / 'x.safetensors')
    refused(path, capsys)
    refused_by_timm(path)


# --- pickles

class Evil:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


PLACES: Dict[str, Callable[[StateDict, Evil], Any]] = {
    'state dict': lambda s, evil: {**s, KEY: evil},
    'alone': lambda s, evil: evil,
    'name': lambda s, evil: {**s, evil: torch.zeros(1)},
    'optimizer': lambda s, evil: {'state_dict': s, 'optimizer': evil},
    'beside': lambda s, evil: {'state_dict': s, 'state_dict_ema': evil},
}
FORMS = ['zip', 'legacy', *(f'protocol {i}' for i in range(6))]
DEFAULT_FORMS = [('zip', place) for place in PLACES] + [(form, 'state dict') for form in ('legacy', 'protocol 2')]


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')  # torch's
@pytest.mark.parametrize(
    'form, place', [*DEFAULT_FORMS, *(full(f, p) for f in FORMS for p in PLACES if (f, p) not in DEFAULT_FORMS)])
def test_code_does_not_run(sound: StateDict, tmp_path: Path, capsys, form: str, place: str) -> None:
    ran = tmp_path / 'ran'
    content = PLACES[place](sound, Evil(ran))
    path = tmp_path / 'x.pth'
    if form.startswith('protocol'):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch's, of tensors in plain pickles
            path.write_bytes(pickle.dumps(content, protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')
    refused(path, capsys)
    refused_by_timm(path)
    assert not ran.exists()
    if form in ('zip', 'legacy'):
        torch.load(path, weights_only=False)
        assert ran.exists()  # and it would have run


@pytest.mark.parametrize('size', [2 ** 31 - 1, 123_457], ids=['8 GB', 'one number more'])
@pytest.mark.usefixtures('checked_storages')
def test_storage_larger_than_the_file(tmp_path: Path, capsys, size: int) -> None:
    refused(save(resized(123_456, size), tmp_path / 'x.pth'), capsys)


@pytest.mark.parametrize('bomb', ['weights', 'pickle'])
def test_64_megabytes_of_zeros_in_64_kilobytes(tmp_path: Path, capsys, bomb: str) -> None:
    buffer = io.BytesIO()
    torch.save({KEY: torch.zeros(123_456)}, buffer)
    suffix = {'weights': '/data/0', 'pickle': 'data.pkl'}[bomb]
    data = rewrite(buffer.getvalue(), lambda name, data: bytes(2 ** 26) if name.endswith(suffix) else data)
    assert len(data) < 100_000
    refused(save(data, tmp_path / 'x.pth'), capsys)


# --- files that can be read, with content that does not fit

def cyclic(content: Any) -> Any:
    if isinstance(content, list):
        content.append(content)
    else:
        content['state_dict'] = content
    return content


def changed(key: str, change: Callable[[torch.Tensor], Any]) -> Callable[[StateDict], StateDict]:
    return lambda s: {**s, key: change(s[key])}


def ending_in(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda w: torch.cat([w.flatten()[:-1], torch.tensor([value])]).view(w.shape)


NOT_STATE_DICTS = {
    'None': lambda s: None,
    'tensor': lambda s: s[KEY],
    'list of tensors': lambda s: list(s.values()),
    'empty dict': lambda s: {},
    'number among the tensors': changed(KEY, lambda w: 3),
    'list among the tensors': changed(KEY, torch.Tensor.tolist),
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
NOT_WEIGHTS = {
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
VIEWS = {  # of one number in the file, 40 TB in memory
    KEY: (10 ** 13,), 'extra': (10 ** 13,), 'fc.weight': (1000, 10 ** 10), 'fc.bias': (10 ** 13,),
    'conv1.weight': (64, 2 * 10 ** 8, 7, 7),
}
CHANGES = {
    'transposed': lambda w: w.transpose(0, 1),
    'flat': lambda w: w.flatten(),
    'one row more': lambda w: torch.cat([w, w[:1]]),
    'one column less': lambda w: w[..., 1:] if w.shape[-1] > 1 else w[:, 1:],  # of conv1, the input channels may differ
    'one dimension less': lambda w: w[..., 0],
    'no elements': lambda w: w[:0],
    'scalar': lambda w: w[0, 0, 0, 0],
}
NAMES = {
    'one more': lambda s: {**s, 'extra': torch.zeros(1)},
    'prefix': lambda s: {f'backbone.{k}': v for k, v in s.items()},
    'last stage missing': lambda s: {k: v for k, v in s.items() if not k.startswith('layer4.')},
    'another network': lambda s: tiny('spse_resnet50', num_classes=1000).state_dict(),
    **{f'{key} missing': lambda s, key=key: {k: v for k, v in s.items() if k != key} for key in (KEY, 'conv1.weight')},
}
NAN, INFINITY = float('nan'), float('inf')
FAULTS = [  # id, part of the message, content of the file, whether timm's own checkpoint_path refuses it too
    *((fault, '', content, True) for fault, content in NOT_STATE_DICTS.items()),
    *((fault, f'64-bit floats: {KEY})', changed(KEY, change), False) for fault, change in NOT_WEIGHTS.items()),
    *((f'view of 40 TB as {key}', f'64-bit floats: {key})',
       lambda s, key=key, shape=shape: {**s, key: torch.zeros(1).expand(shape)}, False) for key, shape in VIEWS.items()),
    *((f'{value} in {key}', f'tensors with NaN or infinity: {key})', changed(key, ending_in(value)), False)
      for value, key in ((NAN, KEY), (INFINITY, KEY), (-INFINITY, KEY), (NAN, 'conv1.weight'), (INFINITY, 'fc.bias'),
                         (NAN, 'layer4.0.bn3.running_var'), (-INFINITY, 'layer1.0.se.weight'))),
    *((f'{key} {fault}', f'another shape: {key})', changed(key, change), True)
      for key in (KEY, 'layer3.0.se.weight', 'conv1.weight') for fault, change in CHANGES.items()),
    *((f'classifier {shape}', '', changed('fc.weight', lambda w, shape=shape: torch.zeros(shape)), True)
      for shape in ((), (1000,), (1000, 7), (1000, 512, 1), (0, 512), (999, 512))),
    *((f'names: {fault}', '', content, True) for fault, content in NAMES.items()),
]


@pytest.mark.filterwarnings('ignore:.*(quantize|CSR|sparse tensor invariants|TypedStorage)')
@pytest.mark.parametrize('match, content, by_timm', [pytest.param(*row, id=fault) for fault, *row in FAULTS])
def test_content(sound: StateDict, tmp_path: Path, capsys, match: str, content: Callable, by_timm: bool) -> None:
    path = save(content(sound), tmp_path / 'x.pth')
    refused(path, capsys, match)
    if by_timm:
        refused_by_timm(path)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precision(sound: StateDict, tmp_path: Path, dtype: torch.dtype) -> None:
    """The types that weights are trained in load as the same numbers."""
    state_dict = {k: v.to(dtype) if v.is_floating_point() else v for k, v in sound.items()}
    assert_loaded(create(save(state_dict, tmp_path / 'x.safetensors')), state_dict)


def test_average_that_differs(sound: StateDict, tmp_path: Path, capsys) -> None:
    """timm loads the EMA of a training checkpoint, `convert` with --use-ema; the weights never replace a damaged EMA."""
    ema = {k: v / 2 if v.is_floating_point() else v for k, v in sound.items()}
    path = save({'state_dict': sound, 'state_dict_ema': ema}, tmp_path / 'x.pth.tar')
    assert_loaded(create(path), ema)
    convert = ['convert', str(path), '--model', 'rgse_resnet50', *ARGS]
    for name, flags, expected in (('weights', [], sound), ('ema', ['--use-ema'], ema)):
        out = tmp_path / f'{name}.safetensors'
        assert main([*convert[:2], str(out), *flags, *convert[2:]]) == 0
        assert_loaded(create(out), expected)
    save({'state_dict': sound, 'state_dict_ema': {**sound, KEY: sound[KEY] / 0}}, path)
    refused_by_create(path, 'NaN or infinity')
    assert main([*convert[:2], str(tmp_path / 'damaged.safetensors'), '--use-ema', *convert[2:]]) == 2
    assert 'NaN or infinity' in capsys.readouterr().err


# --- files that cannot be read

@pytest.mark.parametrize('suffix', ['pth', full('safetensors')])
@pytest.mark.parametrize('fault', ['missing', 'folder', 'symlink loop', 'dangling symlink', 'unreadable', 'vanishes'])
def test_file(sound: StateDict, tmp_path: Path, capsys, monkeypatch, fault: str, suffix: str) -> None:
    path = tmp_path / f'rgse_resnet50.{suffix}'  # the system's errors then contain the model's name
    if fault == 'folder':
        path.mkdir()
    elif 'symlink' in fault:
        path.symlink_to(path if fault == 'symlink loop' else tmp_path / 'nothing')
    elif fault == 'unreadable':
        if os.geteuid() == 0:
            pytest.skip('root may read everything')
        save(sound, path).chmod(0)
    elif fault == 'vanishes':  # after timm has seen it, before it is opened
        monkeypatch.setattr('os.path.isfile', lambda path: True)
    refused(path, capsys)
