""" A Hub that fails, lies or hangs up: one clear error, nothing half-written, and the next call without it works """
import json
import multiprocessing
import re
import resource
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from signal import SIGKILL
from typing import Callable, Iterator, Type, Union

import pytest
import safetensors.torch
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

import timm
from helpers.common import TINY, serve_donor, tiny
from helpers.hub_server import HubServer, Repo
from helpers.processes import run_processes
from helpers.runs import check_fails
from timm_sepool.cli._output import CommandError, save_folder
from timm_sepool.cli.push import hub_errors, upload

DONOR = 'timm/resnet50.a1_in1k'
HUB_ID = 'user/rgse_resnet50'  # it has the network's name in it, as the errors of the Hub's client then have
COMPLETE = {'config.json', 'model.safetensors', 'README.md'}  # what push uploads
TIMEOUT = 300
STATUSES = (401, 403, 404, 429, 500, 503)
HANGS = ('header', 'timeout')
WEIGHTS = '{}/model.safetensors'


class Source:
    """Weights on the local Hub, and how they are loaded."""

    def __init__(self, hub: HubServer, repo_id: str, create: Callable):
        self.repo_id, self.create = repo_id, create
        self.cache: Path = create.keywords['cache_dir']
        self.sound: bytes = hub.repos['model', repo_id]['model.safetensors']

    def check_refused(self, match: str = 'Check the name and the network') -> str:
        """One RuntimeError that names the network, the repository and what to do. No partial download stays."""
        with pytest.raises(RuntimeError, match=f'rgse_resnet50.*{self.repo_id}.*{match}') as e:
            self.create()
        assert type(e.value) is RuntimeError and '\n' not in str(e.value) and len(str(e.value)) < 800
        assert not list(self.cache.rglob('*.incomplete'))
        return str(e.value)

    def check_works(self) -> None:
        assert torch.equal(self.create().conv1.weight, safetensors.torch.load(self.sound)['conv1.weight'])


@pytest.fixture(params=['donor', pytest.param('hf-hub', marks=pytest.mark.full)])
def source(request, hub: HubServer, small_donor: Callable, tmp_path: Path) -> Source:
    """What `pretrained=True` of a registered name and of a published network load."""
    if request.param == 'donor':
        return Source(hub, DONOR, small_donor)
    save_folder(tiny('rgse_resnet50'), tmp_path / 'saved', dict(TINY))
    hub.add(HUB_ID, {p.name: p for p in (tmp_path / 'saved').iterdir()})
    create = partial(timm.create_model, f'hf-hub:{HUB_ID}', pretrained=True, cache_dir=tmp_path / 'cache')
    return Source(hub, HUB_ID, create)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch) -> None:
    """The client's pauses between its tries take no time."""
    monkeypatch.setattr('time.sleep', lambda seconds: None)


@pytest.fixture
def failing(hub: HubServer, monkeypatch) -> Callable:
    """A context in which the Hub has a fault, or the client is offline. It gives up before the server hangs up."""
    @contextmanager
    def context(key: str, fault: Union[int, str, bytes]) -> Iterator[None]:
        hub.faults[key] = fault
        with monkeypatch.context() as m:
            m.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', fault == 'offline')
            for name in ('constants.HF_HUB_ETAG_TIMEOUT', 'constants.HF_HUB_DOWNLOAD_TIMEOUT',
                         'file_download._ETAG_RETRY_TIMEOUT') if fault in ('timeout', 'stall') else ():
                m.setattr(f'huggingface_hub.{name}', 0.1, raising=False)
            yield
        hub.faults.clear()
    return context


@pytest.mark.parametrize('key, fault', [
    *((WEIGHTS, fault) for fault in (*STATUSES, 200, 'missing', *HANGS)),  # 200 is a login page
    *((f'GET {WEIGHTS}', fault) for fault in (*STATUSES[1:], 200, *HANGS, b'', b'short', 'cut', 'stall')),
], ids=lambda value: {WEIGHTS: 'all', f'GET {WEIGHTS}': 'download'}.get(value, str(value)))
def test_failing_download(source: Source, failing: Callable, key: str, fault) -> None:
    with failing(key.format(source.repo_id), fault):
        source.check_refused()
    source.check_works()


@pytest.mark.parametrize('fault', ['offline', 429, 500, 503, 'timeout'], ids=str)
def test_cached_weights_need_no_hub(source: Source, failing: Callable, fault) -> None:
    """What was downloaded once loads while the Hub fails. Without it, the error of being offline is as clear."""
    if fault == 'offline' and source.repo_id == DONOR:
        with failing('', fault):
            source.check_refused()
    source.check_works()
    with failing(source.repo_id, fault):
        source.check_works()


@pytest.mark.parametrize('damage', [
    pytest.param(lambda data: b'', id='empty'),
    pytest.param(lambda data: data[:len(data) // 2], id='truncated'),
    pytest.param(lambda data: data.translate(bytes(range(255, -1, -1))), id='all bits flipped'),
    pytest.param(lambda data: data[:8] + b'z' + data[9:], id='bit of the header flipped'),  # of {
    pytest.param(lambda data: data[:-4] + b'\xff' * 4, id='NaN'),
    pytest.param(lambda data: data.replace(b'layer2.0.conv1', b'layer2.0.conv0'), id='tensor missing'),
])
def test_damaged_file_in_the_cache(hub: HubServer, source: Source, damage: Callable[[bytes], bytes]) -> None:
    """The Hub client does not verify downloads and reuses damaged cached files: the error says what to remove."""
    hub.faults[WEIGHTS.format(source.repo_id)] = damage(source.sound)
    message = source.check_refused('If the download is damaged, remove ')
    hub.faults.clear()
    assert source.check_refused('If the download is damaged, remove ') == message
    Path(re.search(r'remove (.*)\.$', message)[1]).unlink()
    source.check_works()


def test_changed_weight(hub: HubServer, source: Source) -> None:
    """A flipped bit gives a valid weight. Only the client's own verification finds it."""
    hub.faults[WEIGHTS.format(source.repo_id)] = source.sound[:-1] + bytes([source.sound[-1] ^ 1])
    source.create()
    if hasattr(HfApi, 'verify_repo_checksums'):
        mismatches = HfApi().verify_repo_checksums(source.repo_id, cache_dir=source.cache).mismatches
        assert [m['path'] if isinstance(m, dict) else m.path for m in mismatches] == ['model.safetensors']


@pytest.mark.parametrize('source', ['hf-hub'], indirect=True)
@pytest.mark.parametrize('key, faults, error', [
    ('', (401, 404), RepositoryNotFoundError),
    ('', (403,), GatedRepoError),
    ('', (429, 500, 503, 200), LocalEntryNotFoundError),
    ('GET ', (429, 500, 503), HfHubHTTPError),
    ('GET ', (200, b'', b'{"architecture'), OSError),
    ('', HANGS, hub_errors()),
    ('GET ', (*HANGS, 'cut'), hub_errors()),
], ids=lambda value: '-'.join(map(str, value)) if isinstance(value, tuple) and value != hub_errors() else '')
def test_failing_config(source: Source, failing: Callable, key: str, faults: tuple, error: Type[Exception]) -> None:
    """Of create_model('hf-hub:...'): the errors are huggingface_hub's, as docs/weights.md says."""
    for fault in faults:
        with failing(f'{key}{source.repo_id}/config.json', fault), pytest.raises(error):
            source.create()
    source.check_works()


def test_disk_full(source: Source) -> None:
    """No file can be written beyond 100 kB, as on a full disk or over a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        source.check_refused()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    source.check_works()


def test_cache_that_cannot_be_written(hub: HubServer, small_donor: Callable) -> None:
    source = Source(hub, DONOR, small_donor)
    source.cache.write_text('a file in its place')
    source.check_refused(f': .*{source.cache}.* Check')
    source.cache.unlink()
    source.check_works()
    with pytest.raises(RuntimeError, match='rgse_resnet50 cannot be loaded from timm/a b c: HFValidationError'):
        small_donor(pretrained_cfg_overlay=dict(hf_hub_id='timm/a b c'))


def create_donor(rank: int, cache: Path) -> None:
    timm.create_model('rgse_resnet50', pretrained=True, cache_dir=cache, **TINY)


def test_two_processes(hub: HubServer, small_donor: Callable) -> None:
    """Both download at the same time, into one cache."""
    cache = small_donor.keywords['cache_dir']
    run_processes(create_donor, 2, cache)
    blobs = [p for p in cache.rglob('*') if p.is_file() and not p.is_symlink() and 'blobs' in p.parts]
    assert [p.read_bytes() for p in blobs] == [hub.repos['model', DONOR]['model.safetensors']]


def test_killed_while_downloading(hub: HubServer, small_donor: Callable, monkeypatch) -> None:
    source = Source(hub, DONOR, small_donor)
    monkeypatch.undo()  # time.sleep
    monkeypatch.setattr(hub, 'delay', TIMEOUT)
    hub.was_cut.clear()
    hub.faults[f'GET {WEIGHTS}'.format(DONOR)] = 'stall'
    process = multiprocessing.get_context('spawn').Process(target=create_donor, args=(0, source.cache), daemon=True)
    process.start()
    deadline = time.monotonic() + TIMEOUT
    while not hub.was_cut and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join()
    assert hub.was_cut and process.exitcode == -SIGKILL
    hub.faults.clear()
    source.check_works()


@pytest.fixture
def repo(hub: HubServer) -> Repo:
    """The repository to push to, with an older network of the same architecture."""
    hub.repos.pop(('model', 'user/net'), None)
    config = dict(architecture='rgse_resnet50', now=time.time())  # no config that is in the cache
    hub.add('user/net', {'config.json': json.dumps(config).encode(), 'README.md': b'old'})
    return hub.repos['model', 'user/net']


@pytest.mark.parametrize('key, fault', [
    *(('user/net', fault) for fault in (*STATUSES, 200, *HANGS)),
    *(('user/net/config.json', fault) for fault in (401, 403, 429, 500, 503, *HANGS)),
    *(('user/net/preupload', fault) for fault in (*STATUSES, 200, *HANGS)),
    *(('user/net/commit', fault) for fault in (*STATUSES, 412, 413, *HANGS, 'lost')),
], ids=str)
def test_failing_push(hub: HubServer, repo: Repo, tmp_path: Path, key: str, fault) -> None:
    """One line, and the repository as it was; then again, and it is complete. A lost commit is made as a whole."""
    save_folder(tiny('rgse_resnet50'), tmp_path, dict(TINY))
    (tmp_path / 'README.md').write_text('new')
    before, made = dict(repo), len(repo.commits)
    hub.faults[key] = fault
    with pytest.raises(CommandError, match='^The Hub refused user/net: [^\n]+$'):
        upload(tmp_path, 'user/net')
    hub.faults.clear()
    if fault == 'lost':  # the client has repeated it, with the same files
        made, first = len(repo.commits) - 1, made
        assert made >= first and all(set(files) == COMPLETE for files in list(repo.commits.values())[first:])
    else:
        assert dict(repo) == before and len(repo.commits) == made
    upload(tmp_path, 'user/net')  # makes no commit where all files have arrived
    assert len(repo.commits) == made + 1 and set(repo) == COMPLETE


@pytest.mark.parametrize('fault', [503, b'damaged'], ids=str)
def test_push_without_a_donor(hub: HubServer, repo: Repo, tmp_path: Path, monkeypatch, capsys, fault) -> None:
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    serve_donor(hub, 'resnet50.a1_in1k', **TINY)
    hub.faults[DONOR] = fault
    argv = ['push', 'rgse_resnet50', '--repo-id', 'user/net']
    check_fails(capsys, tmp_path / 'none', argv, f'pretrained weights of rgse_resnet50 cannot be loaded from {DONOR}: ')
    assert set(repo) == {'config.json', 'README.md'}
