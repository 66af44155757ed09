""" A Hub that fails, lies or hangs up: one clear error, nothing half-written, and the next call without the fault works

Every id is one fault.
"""
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, NamedTuple, Type

import pytest
import safetensors.torch
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

import timm
from helpers.common import TINY, serve_donor, tiny
from helpers.hub_server import HubServer, Repo
from helpers.runs import write_run
from timm_sepool.cli._output import CommandError, save_folder
from timm_sepool.cli.main import main
from timm_sepool.cli.push import hub_errors, upload

DONOR = 'timm/resnet50.a1_in1k'
HUB_ID = 'user/rgse_resnet50'  # it has the network's name in it, as the errors of the Hub's client then have
CREATE = f"""
import sys, timm
timm.create_model('rgse_resnet50', pretrained=True, cache_dir=sys.argv[1], **{TINY!r})
"""
COMPLETE = {'config.json', 'model.safetensors', 'README.md'}  # what push uploads
TIMEOUT = 300


class Source(NamedTuple):
    """Weights on the local Hub."""
    repo_id: str
    create: Callable
    conv1: torch.Tensor
    cache: Path


@pytest.fixture(params=['donor', 'hf-hub'])
def source(request, hub: HubServer, small_donor: Callable, tmp_path: Path) -> Source:
    """What `pretrained=True` of a registered name and of a published network load."""
    if request.param == 'donor':
        weights = safetensors.torch.load(hub.repos['model', DONOR]['model.safetensors'])
        return Source(DONOR, small_donor, weights['conv1.weight'], tmp_path / 'cache')
    model = tiny('rgse_resnet50')
    save_folder(model, tmp_path / 'saved', dict(TINY))
    hub.add(HUB_ID, {p.name: p for p in (tmp_path / 'saved').iterdir()})
    create = partial(timm.create_model, f'hf-hub:{HUB_ID}', pretrained=True, cache_dir=tmp_path / 'cache')
    return Source(HUB_ID, create, model.conv1.weight.detach(), tmp_path / 'cache')


@pytest.fixture(autouse=True)
def no_waiting(hub: HubServer, monkeypatch) -> None:
    """The client's pauses between its tries take no time."""
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    monkeypatch.setattr(hub, 'delay', 0.5)


@pytest.fixture
def impatient(monkeypatch) -> Iterator[Callable]:
    """A context in which the client gives up before the server hangs up."""
    @contextmanager
    def context() -> Iterator[None]:
        with monkeypatch.context() as m:
            for name in ('constants.HF_HUB_ETAG_TIMEOUT', 'constants.HF_HUB_DOWNLOAD_TIMEOUT',
                         'file_download._ETAG_RETRY_TIMEOUT'):
                m.setattr(f'huggingface_hub.{name}', 0.1, raising=False)
            yield
    return context


def check_refused(source: Source, match: str = 'Check the name and the network') -> str:
    """One RuntimeError that names the network, the repository and what to do. No partial download stays."""
    with pytest.raises(RuntimeError, match=f'(?s)rgse_resnet50.*{match}') as e:
        source.create()
    assert type(e.value) is RuntimeError and source.repo_id in str(e.value) and '\n' not in str(e.value)
    assert len(str(e.value)) < 800
    assert not list(source.cache.rglob('*.incomplete'))
    return str(e.value)


def check_works(source: Source) -> None:
    assert torch.equal(source.create().conv1.weight, source.conv1)


def damage(data: bytes, how: str) -> bytes:
    """Weights that are not those of the repository."""
    if how == 'flip':  # of the first bit in the header
        return data[:8] + bytes([data[8] ^ 1]) + data[9:]
    state_dict = safetensors.torch.load(data)
    if how == 'NaN':
        state_dict['layer2.0.conv1.weight'][0, 0] = float('nan')
    elif how == 'infinity':
        state_dict['layer3.0.bn1.running_var'][3] = float('inf')
    elif how == 'tensor missing':
        del state_dict['layer2.0.conv1.weight']
    return safetensors.torch.save(state_dict)


# --- weights of create_model(NAME, pretrained=True) and create_model('hf-hub:...', pretrained=True)

BOTH_UNDER_FULL = pytest.mark.parametrize(
    'source', ['donor', pytest.param('hf-hub', marks=pytest.mark.full)], indirect=True)
EVERY_REQUEST = (401, 403, 404, 429, 500, 503, 200, 'header', 'timeout')  # 200 is a login page
DOWNLOAD = (403, 404, 429, 500, 503, 200, 'header', 'timeout', 'empty', 'short', 'cut', 'reset', 'stall')


@BOTH_UNDER_FULL
@pytest.mark.parametrize('key, fault', [
    *(('{}/model.safetensors', fault) for fault in EVERY_REQUEST),
    *(('GET {}/model.safetensors', fault) for fault in DOWNLOAD),
], ids=lambda value: {'{}/model.safetensors': 'all', 'GET {}/model.safetensors': 'download'}.get(value, str(value)))
def test_failing_download(hub: HubServer, source: Source, impatient: Callable, key: str, fault) -> None:
    hub.faults[key.format(source.repo_id)] = fault
    with impatient() if fault in ('timeout', 'stall') else nullcontext():
        check_refused(source)
    hub.faults.clear()
    check_works(source)


@pytest.mark.parametrize('source', ['donor'], indirect=True)
@pytest.mark.parametrize('fault', ['offline', 'no such repository', 'no such file', 'not the id of a repository'])
def test_nothing_to_download(hub: HubServer, source: Source, monkeypatch, fault: str) -> None:
    repo = hub.repos['model', DONOR]
    if fault == 'offline':
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    elif fault == 'no such repository':
        del hub.repos['model', DONOR]
    elif fault == 'no such file':
        hub.repos['model', DONOR] = Repo(DONOR)
    else:
        with pytest.raises(RuntimeError, match='rgse_resnet50 can ?not be loaded from timm/a b c: HFValidationError'):
            source.create(pretrained_cfg_overlay=dict(hf_hub_id='timm/a b c'))
        return
    check_refused(source)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    hub.repos['model', DONOR] = repo
    check_works(source)


def test_cut_download_is_resumed(hub: HubServer, source: Source) -> None:
    hub.was_cut.clear()
    hub.faults[source.repo_id] = 'cut-once'
    check_works(source)
    assert (source.repo_id, 'model.safetensors') in hub.was_cut


@pytest.mark.parametrize('fault', ['offline', 429, 500, 503, 'timeout'], ids=str)
def test_cached_weights_need_no_hub(hub: HubServer, source: Source, impatient: Callable, monkeypatch, fault) -> None:
    """What was downloaded once loads while the Hub fails."""
    check_works(source)
    if fault == 'offline':
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    else:
        hub.faults[source.repo_id] = fault
    with impatient():
        check_works(source)


@BOTH_UNDER_FULL
@pytest.mark.parametrize('fault', ['corrupt', 'empty', 'short', 'flip', 'NaN', 'infinity', 'tensor missing'])
def test_damaged_file_in_the_cache(hub: HubServer, source: Source, fault: str) -> None:
    """The Hub client does not verify downloads and reuses damaged cached files: the error says what to remove."""
    sound = hub.repos['model', source.repo_id]['model.safetensors']
    if fault in ('corrupt', 'empty', 'short'):  # under the ETag of the sound file
        hub.faults[f'{source.repo_id}/model.safetensors'] = fault
    else:
        hub.add(source.repo_id, {'model.safetensors': damage(sound, fault)})
    message = check_refused(source, 'If the download is damaged, remove ')
    hub.faults.clear()
    assert check_refused(source, 'If the download is damaged, remove ') == message
    if fault in ('corrupt', 'empty', 'short'):
        Path(re.search(r'remove (.*)\.$', message)[1]).unlink()
    else:
        hub.add(source.repo_id, {'model.safetensors': sound})
    check_works(source)


def test_changed_weight(hub: HubServer, source: Source) -> None:
    """A flipped bit gives a valid weight. Only the client's own verification finds it."""
    hub.faults[f'{source.repo_id}/model.safetensors'] = 'flip'
    source.create()
    verify = getattr(HfApi(), 'verify_repo_checksums', None)
    if verify is not None:
        mismatches = verify(source.repo_id, cache_dir=source.cache).mismatches
        assert [m['path'] if isinstance(m, dict) else m.path for m in mismatches] == ['model.safetensors']


@pytest.mark.parametrize('kwargs', [dict(), dict(num_classes=10), dict(features_only=True)], ids=str)
def test_donor_of_other_classes(hub: HubServer, small_donor: Callable, kwargs: Dict) -> None:
    serve_donor(hub, 'resnet50.a1_in1k', num_classes=21, **TINY)
    with pytest.raises(RuntimeError, match='a classifier of 21 classes instead of 1000'):
        small_donor(**kwargs)
    assert small_donor(num_classes=21).fc.out_features == 21  # says what it is


# --- config.json of create_model('hf-hub:...'): the errors are huggingface_hub's, as README says

@pytest.mark.parametrize('source', ['hf-hub'], indirect=True)
@pytest.mark.parametrize('key, faults, error', [
    ('', (401, 404), RepositoryNotFoundError),
    ('', (403,), GatedRepoError),
    ('', (429, 500, 503, 200), LocalEntryNotFoundError),
    ('GET ', (429, 500, 503), HfHubHTTPError),
    ('GET ', (200, 'empty', 'short'), OSError),
    ('', ('timeout', 'header'), hub_errors()),
    ('GET ', ('timeout', 'header', 'cut'), hub_errors()),
], ids=lambda value: '-'.join(map(str, value)) if isinstance(value, tuple) and value != hub_errors() else '')
def test_failing_config(
        hub: HubServer, source: Source, impatient: Callable, key: str, faults, error: Type[Exception]) -> None:
    for fault in faults:
        hub.faults[f'{key}{source.repo_id}/config.json'] = fault
        with impatient() if fault == 'timeout' else nullcontext(), pytest.raises(error):
            source.create()
    hub.faults.clear()
    check_works(source)


# --- this machine

def test_disk_full(source: Source) -> None:
    """No file can be written beyond 100 kB, as on a full disk or over a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        check_refused(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_works(source)


@pytest.mark.parametrize('fault', ['file in its place', 'read-only'])
def test_cache_that_cannot_be_written(small_donor: Callable, tmp_path: Path, fault: str) -> None:
    cache = small_donor.keywords['cache_dir']
    if fault == 'read-only':
        if os.geteuid() == 0:
            pytest.skip('root may write everywhere')
        cache.mkdir()
        cache.chmod(0o500)
    else:
        cache.write_text('')
    with pytest.raises(RuntimeError, match=f'rgse_resnet50 can ?not be loaded from {DONOR}: .*{cache}.* Check'):
        small_donor()
    cache.unlink() if cache.is_file() else cache.chmod(0o700)
    small_donor()


def start(cache: Path) -> subprocess.Popen:
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, '-c', CREATE, str(cache)], env=env, stderr=subprocess.PIPE, text=True)


def test_two_processes(hub: HubServer, small_donor: Callable) -> None:
    """Both download at the same time, into one cache."""
    cache = small_donor.keywords['cache_dir']
    processes = [start(cache) for _ in range(2)]
    try:
        for process in processes:
            assert process.wait(TIMEOUT) == 0, process.stderr.read()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    blobs = [p for p in cache.rglob('*') if p.is_file() and not p.is_symlink() and 'blobs' in p.parts]
    assert [p.read_bytes() for p in blobs] == [hub.repos['model', DONOR]['model.safetensors']]


def test_killed_while_downloading(hub: HubServer, small_donor: Callable, monkeypatch) -> None:
    monkeypatch.undo()  # time.sleep
    monkeypatch.setattr(hub, 'delay', TIMEOUT)
    hub.was_cut.clear()
    hub.faults[f'GET {DONOR}/model.safetensors'] = 'stall'
    process = start(small_donor.keywords['cache_dir'])
    try:
        deadline = time.monotonic() + TIMEOUT
        while not hub.was_cut and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert hub.was_cut and process.poll() is None
    finally:
        process.kill()
        process.communicate()
    hub.faults.clear()
    donor = safetensors.torch.load(hub.repos['model', DONOR]['model.safetensors'])
    assert torch.equal(small_donor().conv1.weight, donor['conv1.weight'])


# --- push

@pytest.fixture(scope='module')
def exported(tmp_path_factory) -> Path:
    """What `timm-sepool push` uploads."""
    folder = tmp_path_factory.mktemp('push')
    checkpoint = write_run(folder / 'run', tiny('rgse_resnet50'), 'rgse_resnet50', img_size=64)
    argv = ['push', 'rgse_resnet50', '--repo-id', 'user/net', '--checkpoint', str(checkpoint)]
    assert main([*argv, '--dry-run', str(folder / 'out')]) == 0
    return folder / 'out'


@pytest.fixture
def repo(hub: HubServer, tmp_path: Path, monkeypatch) -> Repo:
    """The repository to push to, with an older network of the same architecture."""
    monkeypatch.setattr(hub, 'delay', 0.1)
    hub.repos.pop(('model', 'user/net'), None)
    config = dict(architecture='rgse_resnet50', of=str(tmp_path))  # no config that is in the cache
    hub.add('user/net', {'config.json': json.dumps(config).encode(), 'README.md': b'old'})
    return hub.repos['model', 'user/net']


@pytest.mark.parametrize('key, fault', [
    *(('user/net', fault) for fault in (401, 403, 404, 429, 500, 503, 200, 'header', 'timeout')),
    *(('user/net/config.json', fault) for fault in (401, 403, 429, 500, 503, 'header', 'timeout')),
    *(('user/net/preupload', fault) for fault in (401, 403, 404, 429, 500, 503, 200, 'header', 'timeout')),
    *(('user/net/commit', fault) for fault in (401, 403, 404, 412, 413, 429, 500, 503, 'header', 'timeout')),
], ids=str)
def test_failing_push(hub: HubServer, exported: Path, repo: Repo, key: str, fault) -> None:
    """One line, and the repository as it was; then again, and it is complete."""
    before, commits = dict(repo), len(repo.commits)
    hub.faults[key] = fault
    with pytest.raises(CommandError, match='^The Hub refused user/net: [^\n]+$'):
        upload(exported, 'user/net')
    assert dict(repo) == before and len(repo.commits) == commits
    hub.faults.clear()
    upload(exported, 'user/net')
    assert len(repo.commits) == commits + 1 and set(repo) == COMPLETE


def test_push_whose_answer_is_lost(hub: HubServer, exported: Path, repo: Repo) -> None:
    """The commit is made as a whole. The client repeats it, with the same files."""
    before = len(repo.commits)
    hub.faults['user/net/commit'] = 'lost'
    with pytest.raises(CommandError, match='The Hub refused user/net: '):
        upload(exported, 'user/net')
    hub.faults.clear()
    commits = len(repo.commits)
    assert commits > before
    assert all(set(files) == COMPLETE for files in list(repo.commits.values())[before:])
    upload(exported, 'user/net')
    assert len(repo.commits) == commits


@pytest.mark.parametrize('fault', [503, 'corrupt'], ids=str)
def test_push_without_a_donor(hub: HubServer, repo: Repo, capsys, fault) -> None:
    serve_donor(hub, 'resnet50.a1_in1k', **TINY)
    hub.faults[DONOR] = fault
    shutil.rmtree(os.environ['HF_HOME'], ignore_errors=True)  # it may hold the sound file
    try:
        assert main(['push', 'rgse_resnet50', '--repo-id', 'user/net']) == 2
    finally:
        shutil.rmtree(os.environ['HF_HOME'], ignore_errors=True)  # or now the damaged one
    err = capsys.readouterr().err
    assert err.startswith('timm-sepool push: error: The pretrained weights of rgse_resnet50 can') and DONOR in err
    assert 'Traceback' not in err and set(repo) == {'config.json', 'README.md'}
