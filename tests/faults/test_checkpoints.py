""" Damaged, hostile and unsuitable checkpoint files: refused with one clear error, or loaded unchanged """
import io
import os
import pickle
import random
import struct
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple

import pytest
import safetensors.torch
import torch

import timm
from helpers.common import FULL, TINY, tiny
from helpers.runs import TINY_ARGS, check_fails

FLIPS = 600 if FULL else 20
KEY = 'layer2.0.conv1.weight'
ARGS = ['--model', 'rgse_resnet50', *TINY_ARGS]
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


def refused(path: Path, capsys, match: str = '') -> None:
    """One error that names the model, the file, the fault and what to do; `convert`, which reads as `push` does."""
    with pytest.raises(RuntimeError) as e:
        create(path)
    message = str(e.value)
    assert type(e.value) is RuntimeError and '\n' not in message and len(message) < 800
    assert f'rgse_resnet50 cannot be loaded from {path}: ' in message and match in message
    assert '. Use a' in message or '. Check the path, use' in message
    check_fails(capsys, path.parent, ['convert', path, path.with_name('out.safetensors'), *ARGS], str(path))


def assert_loads(path: Path, state_dict: StateDict) -> None:
    """Bit by bit, the weights of the file and no others."""
    torch.testing.assert_close(dict(create(path).state_dict()), dict(state_dict), rtol=0, atol=0, check_dtype=False)


def archive(member: str, old: bytes, new: bytes) -> bytes:
    """A compressed checkpoint of one tensor of 123,456 zeros, with a part of one member of its archive replaced."""
    data, out = io.BytesIO(), io.BytesIO()
    torch.save({KEY: torch.zeros(123_456)}, data)
    with zipfile.ZipFile(data) as source, zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as changed:
        for name in source.namelist():
            content = source.read(name)
            assert old in content or not name.endswith(member)
            changed.writestr(name, content.replace(old, new, 1) if name.endswith(member) else content)
    assert len(out.getvalue()) < 100_000
    return out.getvalue()


ARCHIVES = {
    **{f'{n} numbers': ('data.pkl', struct.pack('<i', 123_456), struct.pack('<i', n)) for n in (123_457, 2 ** 31 - 1)},
    **{f'64 MB of zeros in {member}': (member, b'', bytes(2 ** 26)) for member in ('data.pkl', 'data/0')},
}


def need_checked_storages() -> None:
    """Old torch (2.5 and 2.7) does not check the size of a storage and reads beyond its end; 2.14 checks it."""
    try:
        torch.load(io.BytesIO(archive(*ARCHIVES['123457 numbers'])), weights_only=True)
    except RuntimeError:
        return
    pytest.skip('this torch does not check the size of storages')


@pytest.mark.parametrize('region', ['length', 'header', 'safetensors weights', 'pickle', 'zip weights'])
def test_flipped_bits(sound: StateDict, tmp_path: Path, region: str) -> None:
    """Refused, or what is loaded is what the format's own reader reads."""
    if region in ('pickle', 'zip weights'):
        buffer = io.BytesIO()
        torch.save(sound, buffer)
        archive, data, path = zipfile.ZipFile(buffer), buffer.getvalue(), tmp_path / 'x.pth'
        pickled = next(m for m in archive.infolist() if m.filename.endswith('data.pkl'))
        end = pickled.header_offset + pickled.file_size
        # not in the archive's directory, where torch checks nothing: some flips there give whatever is in memory
        start, stop = (pickled.header_offset, end) if region == 'pickle' else (end, archive.start_dir)
        read = partial(torch.load, map_location='cpu', weights_only=True)
        if region == 'pickle':
            need_checked_storages()
    else:
        data, path, read = safetensors.torch.save(sound), tmp_path / 'x.safetensors', safetensors.torch.load_file
        body = 8 + int.from_bytes(data[:8], 'little')
        start, stop = {'length': (0, 8), 'header': (8, body), 'safetensors weights': (body, len(data))}[region]
    # a file may lack these, as those of old torch do, and a flip may give one the name of another
    counters = {k: torch.zeros_like(v) for k, v in sound.items() if k.endswith('num_batches_tracked')}
    rng, refusals = random.Random(0), 0
    for _ in range(FLIPS):
        i, bit = rng.randrange(start, stop), rng.randrange(8)
        path.write_bytes(data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1:])
        try:
            create(path)
        except RuntimeError as e:
            assert type(e) is RuntimeError and str(path) in str(e), f'bit {bit} of byte {i}: {e!r}'
            refusals += 1
        else:
            state_dict = read(path)
            assert all(v.isfinite().all() for v in state_dict.values()), f'bit {bit} of byte {i}'
            assert_loads(path, {**counters, **state_dict})
    assert refusals < FLIPS if 'weights' in region else refusals > 0


@pytest.mark.parametrize('suffix', ['safetensors', 'pth', 'legacy.pth'])
@pytest.mark.parametrize('size', [0, 8, 0.5, -1, *map(full, (1, 7, 9, 100, 8192, 0.25, -4096, -100, -22))], ids=str)
def test_truncated(sound: StateDict, tmp_path: Path, capsys, suffix: str, size: float) -> None:
    path = save(sound, tmp_path / f'x.{suffix}')
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * size) if 0 < size < 1 else size])
    refused(path, capsys)


class MakesDirectory(NamedTuple):  # when it is unpickled
    path: str

    def __reduce__(self):
        return os.mkdir, (self.path,)


PLACES: Dict[str, Callable[[StateDict, MakesDirectory], Any]] = {
    'state dict': lambda s, evil: {**s, KEY: evil}, 'alone': lambda s, evil: evil,
    'name': lambda s, evil: {**s, evil: torch.zeros(1)},
    'optimizer': lambda s, evil: {'state_dict': s, 'optimizer': evil},
    'beside': lambda s, evil: {'state_dict': s, 'state_dict_ema': evil},
}


@pytest.mark.filterwarnings('ignore')  # torch's, of pickle protocols and of tensors in plain pickles
@pytest.mark.parametrize('form, place', [
    *(('zip', place) for place in PLACES), ('legacy', 'state dict'), ('protocol 2', 'state dict'),
    *(full(form, place) for form in ('legacy', *(f'protocol {i}' for i in range(6))) for place in list(PLACES)[1:]),
])
def test_code_does_not_run(sound: StateDict, tmp_path: Path, capsys, form: str, place: str) -> None:
    path, ran = tmp_path / f'{form.replace(" ", "")}.pth', tmp_path / 'ran'
    content = PLACES[place](sound, MakesDirectory(str(ran)))
    save(pickle.dumps(content, protocol=int(form[-1])) if form.startswith('protocol') else content, path)
    refused(path, capsys)
    assert not ran.exists()
    if not form.startswith('protocol'):
        torch.load(path, weights_only=False)
        assert ran.exists()  # and it would have run


ENTRY = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HEADERS = {
    'no JSON': '{not', 'no object': '[]', 'not UTF-8': '{"\xff":1}',
    'nested 50000 deep': '{"a":' + 50_000 * '[' + 50_000 * ']' + '}',
    'shape of 4 TB': '{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}',
    'shape that overflows': '{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
    **{f'{old} is {new}': ENTRY.join('{}').replace(old, new, 1) for old, new in (
        ('[1]', '[-1]'), ('[1]', '[2]'), ('F32', 'X9'), ('[0,4]', '[4,8]'), ('"F32"', '"F32","dtype":"I32"'))},
    'offsets that overlap': f'{{{ENTRY},{ENTRY.replace("a", "b", 1)}}}',
    'duplicate name': f'{{{ENTRY},{ENTRY}}}',
}


def changed(key: str, change: Callable[[torch.Tensor], Any]) -> Callable[[StateDict], StateDict]:
    return lambda s: {**s, key: change(s[key])}


CYCLIC: Dict[str, Any] = {}
CYCLIC['state_dict'] = CYCLIC
NOT_STATE_DICTS = {
    'None': lambda s: None, 'tensor': lambda s: s[KEY],
    'list of tensors': lambda s: list(s.values()), 'empty dict': lambda s: {},
    'number among the tensors': changed(KEY, lambda w: 3), 'list among the tensors': changed(KEY, torch.Tensor.tolist),
    **{f'{name!r} as name': lambda s, name=name: {**s, name: s[KEY]} for name in (3, b'3', ('a', 1))},
    **{f'{value} as state_dict': lambda s, value=value: {'state_dict': value} for value in (None, [1, 2])},
    'state_dict four deep': lambda s: {'state_dict': {'state_dict': {'state_dict': {'state_dict': s}}}},
    'cyclic dict': lambda s: CYCLIC,
}
DTYPES = ('int8', 'uint8', 'int32', 'int64', 'bool', 'complex64', 'float8_e4m3fn', 'float8_e5m2')
NOT_WEIGHTS = {
    **{dtype: partial(torch.Tensor.to, dtype=getattr(torch, dtype)) for dtype in DTYPES},
    'sparse COO': lambda w: w.to_sparse(), 'sparse CSR': lambda w: w.flatten(1).to_sparse_csr(),
    'quantized': lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    'without data': lambda w: w.to('meta'),
}
CHANGES = {
    'transposed': lambda w: w.transpose(0, 1), 'flat': lambda w: w.flatten(),
    'one row more': lambda w: torch.cat([w, w[:1]]),
    'one column less': lambda w: w[..., 1:] if w.shape[-1] > 1 else w[:, 1:],  # of conv1, the input channels may differ
    'one dimension less': lambda w: w[..., 0], 'no elements': lambda w: w[:0], 'scalar': lambda w: w[0, 0, 0, 0],
}
OTHERS = [
    *(dict(name=name) for name in (
        'spse_resnet50', 'rgse_resnext50', 'seresnet50', 'resnet50d', 'resnext50_32x4d', 'resnet18')),
    dict(name='rgse_resnet50', layers=(1, 1, 2, 1)), dict(name='resnet26', layers=(2, 1, 1, 1))]
NAMES = {
    'one more': lambda s: {**s, 'extra': torch.zeros(1)},
    'prefix': lambda s: {f'backbone.{k}': v for k, v in s.items()},
    'last stage missing': lambda s: {k: v for k, v in s.items() if not k.startswith('layer4.')},
    **{f'{kwargs}': lambda s, kwargs=kwargs: tiny(**kwargs, num_classes=1000).state_dict() for kwargs in OTHERS},
    **{f'{key} missing': lambda s, key=key: {k: v for k, v in s.items() if k != key} for key in (KEY, 'conv1.weight')},
}
FAULTS = [  # id, part of the message, content of the file
    ('larger file', '', lambda s: safetensors.torch.save(s) + b'more'),
    *((f'length of {n}', '', lambda s, n=n: struct.pack('<Q', n) + b'{}' + bytes(4))
      for n in (2 ** 62, 99_999_999, 0)),
    *((fault, '', lambda s, text=text: struct.pack('<Q', len(text)) + text.encode('latin-1') + bytes(4))
      for fault, text in HEADERS.items()),
    *((fault, '', content) for fault, content in (NOT_STATE_DICTS | NAMES).items()),
    *((fault, f'64-bit floats: {KEY})', changed(KEY, change)) for fault, change in NOT_WEIGHTS.items()),
    *((f'view of 40 TB as {key}', f'64-bit floats: {key})',  # of one number in the file
       lambda s, key=key, shape=shape: {**s, key: torch.zeros(1).expand(shape)})
      for key, shape in ((KEY, (10 ** 13,)), ('extra', (10 ** 13,)), ('fc.weight', (1000, 10 ** 10)),
                         ('fc.bias', (10 ** 13,)), ('conv1.weight', (64, 2 * 10 ** 8, 7, 7)))),
    *((f'{value} in {key}', f'tensors with NaN or infinity: {key})',
       changed(key, lambda w, v=float(value): torch.where(torch.arange(w.numel()).view(w.shape) == 5, v, w)))
      for value, key in (('nan', KEY), ('inf', KEY), ('-inf', KEY), ('nan', 'conv1.weight'), ('inf', 'fc.bias'),
                         ('nan', 'layer4.0.bn3.running_var'), ('-inf', 'layer1.0.se.weight'))),
    *((f'{key} {fault}', f'another shape: {key})', changed(key, change))
      for key in (KEY, 'layer3.0.se.weight', 'conv1.weight') for fault, change in CHANGES.items()),
    *((f'classifier {shape}', '', changed('fc.weight', lambda w, shape=shape: torch.zeros(shape)))
      for shape in ((), (1000,), (1000, 7), (1000, 512, 1), (0, 512), (999, 512))),
]


@pytest.mark.filterwarnings('ignore:.*(quantize|CSR|sparse tensor invariants|TypedStorage)')
@pytest.mark.parametrize('match, content', [pytest.param(*row, id=fault) for fault, *row in FAULTS])
def test_content(sound: StateDict, tmp_path: Path, capsys, match: str, content: Callable) -> None:
    data = content(sound)
    refused(save(data, tmp_path / ('x.safetensors' if isinstance(data, bytes) else 'x.pth')), capsys, match)


@pytest.mark.parametrize('change', ARCHIVES)
def test_archive(tmp_path: Path, capsys, change: str) -> None:
    """Storages larger than the file, zip bombs."""
    need_checked_storages()
    refused(save(archive(*ARCHIVES[change]), tmp_path / 'x.pth'), capsys)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_unusual_weights(sound: StateDict, tmp_path: Path, dtype: torch.dtype) -> None:
    """The types that weights are trained in, and small tensors that repeat one number, load as the same numbers."""
    state_dict = {k: v.to(dtype) if v.is_floating_point() else v for k, v in sound.items()}
    state_dict['bn1.bias'] = torch.full((1,), 0.5, dtype=dtype).expand(64)
    assert_loads(save(state_dict, tmp_path / 'x.pth'), state_dict)


def test_average_that_differs(sound: StateDict, tmp_path: Path, capsys) -> None:
    """timm loads the EMA of a training checkpoint. A damaged EMA is not replaced."""
    ema = {k: v / 2 if v.is_floating_point() else v for k, v in sound.items()}
    path = save({'state_dict': sound, 'state_dict_ema': ema}, tmp_path / 'x.pth.tar')
    assert_loads(path, ema)
    save({'state_dict': sound, 'state_dict_ema': {**sound, KEY: sound[KEY] / 0}}, path)
    with pytest.raises(RuntimeError, match='NaN or infinity'):
        create(path)
    convert = ['convert', path, tmp_path / 'out.safetensors', *ARGS, '--use-ema']
    check_fails(capsys, tmp_path, convert, 'NaN or infinity')


@pytest.mark.parametrize('suffix', ['pth', full('safetensors')])
@pytest.mark.parametrize('fault', ['missing', 'folder', 'symlink loop', 'dangling symlink', 'unreadable', 'vanishes'])
def test_file(sound: StateDict, tmp_path: Path, capsys, monkeypatch, fault: str, suffix: str) -> None:
    path = tmp_path / f'rgse_resnet50.{suffix}'  # the system's errors then contain the model's name
    if fault == 'unreadable' and os.geteuid() == 0:
        pytest.skip('root may read everything')
    if fault == 'folder':
        path.mkdir()
    elif 'symlink' in fault:
        path.symlink_to(path if fault == 'symlink loop' else tmp_path / 'nothing')
    elif fault == 'unreadable':
        save(sound, path).chmod(0)
    elif fault == 'vanishes':  # after timm has seen it, before it is opened
        monkeypatch.setattr('os.path.isfile', lambda path: True)
    refused(path, capsys)
