""" timm's own tests, from the source distribution of the installed timm, with this package installed

test_models.py runs on the models of this package: by default on two small networks, with --full on all of them
at full size. The tests of the factory, the Hub and checkpoints run unchanged, with --full. Needs the package
index. `pytest -s` shows the counts.
"""
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Dict, Tuple

import pytest

import timm
from helpers.common import NAMES, TINY, serve_donor
from helpers.hub_server import HubServer

# makes the registered models small, for the tests know names only
TINY_PLUGIN = f"""
from timm_sepool import sepool_resnet
create = sepool_resnet._create_sepool_resnet
sepool_resnet._create_sepool_resnet = lambda *args, **kwargs: create(*args, **{{**kwargs, **{TINY!r}}})
"""
# the models are known or, with TORCH_DEVICE_BACKEND_AUTOLOAD=0, not
KNOWN_PLUGIN = f"""
import os
import timm
known = os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD') != '0'
assert all(timm.is_model(name) == known for name in {[*NAMES, 'adopted']})
"""
UNCHANGED = ('test_factory.py', 'test_hub.py', 'test_checkpoint_loading.py')
FULL = bool(os.environ['TIMM_SEPOOL_FULL_TESTS'])
CLAIMS = [
    'test_model_forward', 'test_model_backward', 'test_model_default_cfgs', 'test_model_forward_torchscript',
    'test_model_forward_features', 'test_model_forward_intermediates_features', 'test_model_forward_intermediates',
    'test_prune_intermediate_layers_contract', 'test_model_forward_fx', 'test_model_backward_fx',
    'test_model_forward_fx_torchscript',
]


@pytest.fixture(scope='session')
def upstream(tmp_path_factory) -> Path:
    """The folder `tests` of timm's sdist, its lists of modules by feature extended by ours."""
    folder = tmp_path_factory.mktemp('timm')
    download = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-binary', ':all:', '-d', str(folder)]
    result = subprocess.run([*download, f'timm=={timm.__version__}'], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f'timm {timm.__version__} has no sdist here: {result.stderr.strip().splitlines()[-1]}')
    sdist, = folder.glob('*.tar.gz')
    with tarfile.open(sdist) as tar:
        tar.extractall(folder, filter='data')
    tests = folder / f'timm-{timm.__version__}' / 'tests'
    source = (tests / 'test_models.py').read_text()
    source, count = re.subn(r'(FEAT_INTER_FILTERS = \[\n)', r"\1    'sepool_resnet',\n", source, count=1)
    assert count == 1
    (tests / 'test_models.py').write_text(source)
    (tests / 'tiny_plugin.py').write_text(TINY_PLUGIN)
    (tests / 'known_plugin.py').write_text(KNOWN_PLUGIN)
    return tests


def run_upstream(upstream: Path, *args: str, **env: str) -> Tuple[str, Dict[str, str]]:
    """Run some of timm's tests, returns the output and the outcome of each test."""
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-rA', '-W', 'ignore', '-p', 'no:xdist', '-p', 'known_plugin', *args],
        cwd=upstream, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(upstream), **env})
    assert result.returncode in (0, 1), result.stdout[-6000:] + result.stderr[-2000:]
    print(f'timm {timm.__version__} {args[0]}: {result.stdout.splitlines()[-1].strip("= ")}')
    outcomes = re.findall(r'^(PASSED|FAILED|ERROR) (\S+)', result.stdout, re.MULTILINE)
    return result.stdout, {name: outcome for outcome, name in outcomes}


def test_models(hub: HubServer, upstream: Path) -> None:
    names = [*NAMES, 'adopted'] if FULL else ['rgse_resnet50', 'spse_resnext50']
    plugin = [] if FULL else ['-p', 'tiny_plugin']
    for tag in timm.list_pretrained([f'{name}.*' for name in names]):
        # its tests of pretrained weights find random ones
        serve_donor(hub, timm.get_pretrained_cfg(tag).hf_hub_id.removeprefix('timm/'), **({} if FULL else TINY))
    output, outcomes = run_upstream(upstream, 'test_models.py', '-k', ' or '.join(names), *plugin)
    assert set(outcomes.values()) == {'PASSED'}, output[-6000:]
    passed = set(re.findall(r'::(\w+)\[(?:\d-)?(\w+)', '\n'.join(outcomes)))
    source = (upstream / 'test_models.py').read_text()
    claims = [claim for claim in CLAIMS if f'def {claim}(' in source]  # older timm has fewer
    assert len(claims) >= 9
    expected = {(claim, name) for claim in claims for name in names}
    # asked of the models of listed modules only
    expected -= {(claim, 'adopted') for claim in claims if 'intermediate' in claim}
    assert not expected - passed


@pytest.mark.skipif(not FULL, reason='UPSTREAM_FULL is not set')
@pytest.mark.parametrize('file', UNCHANGED)
def test_unchanged(upstream: Path, file: str) -> None:
    """Each test ends as it does without this package."""
    if not (upstream / file).is_file():
        pytest.skip(f'timm {timm.__version__} has no {file}')
    output, outcomes = run_upstream(upstream, file)
    assert list(outcomes.values()).count('PASSED') >= 5
    failed = [name for name, outcome in outcomes.items() if outcome != 'PASSED']
    if failed:  # for lack of something else, as timm's scripts
        _, expected = run_upstream(upstream, file, TORCH_DEVICE_BACKEND_AUTOLOAD='0')
        assert outcomes == expected, output[-6000:]
