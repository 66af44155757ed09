""" timm's own tests, from the source distribution of the installed timm, with this package installed

test_models.py runs on models of this package, the others unchanged, all with --full only: they need the package index.
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
from helpers.common import NAMES, serve_donor
from helpers.hub_server import HubServer

pytestmark = pytest.mark.full
# the models are registered or, with TORCH_DEVICE_BACKEND_AUTOLOAD=0, not
PLUGIN = f"""
import os
import timm
registered = os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD') != '0'
assert all(timm.is_model(name) == registered for name in {[*NAMES, 'adopted']})
"""
CLAIMS = [f'test_{claim}' for claim in (
    'model_forward', 'model_backward', 'model_default_cfgs', 'model_forward_torchscript', 'model_forward_features',
    'model_forward_intermediates_features', 'model_forward_intermediates', 'prune_intermediate_layers_contract',
    'model_forward_fx', 'model_backward_fx', 'model_forward_fx_torchscript')]


@pytest.fixture(scope='session')
def upstream(tmp_path_factory) -> Path:
    """The folder `tests` of timm's sdist, with our module in its list of those with intermediate features."""
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
    (tests / 'sepool_plugin.py').write_text(PLUGIN)
    return tests


def run_upstream(upstream: Path, *args: str, **env: str) -> Tuple[str, Dict[str, str]]:
    """Run some of timm's tests. Returns the output and the outcome of each test."""
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-rA', '-W', 'ignore', '-p', 'no:xdist', '-p', 'sepool_plugin', *args],
        cwd=upstream, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(upstream), **env})
    assert result.returncode in (0, 1), result.stdout[-6000:] + result.stderr[-2000:]
    print(f'timm {timm.__version__} {args[0]}: {result.stdout.splitlines()[-1].strip("= ")}')
    outcomes = re.findall(r'^(PASSED|FAILED|ERROR) (\S+)', result.stdout, re.MULTILINE)
    return result.stdout, {name: outcome for outcome, name in outcomes}


def test_models(hub: HubServer, upstream: Path) -> None:
    names = [*(name for name in NAMES if name.endswith('50')), 'adopted']  # depth only repeats blocks
    for tag in timm.list_pretrained([f'{name}.*' for name in names]):
        # timm's tests of pretrained weights find random ones
        serve_donor(hub, timm.get_pretrained_cfg(tag).hf_hub_id.removeprefix('timm/'))
    output, outcomes = run_upstream(upstream, 'test_models.py', '-k', ' or '.join(names))
    assert set(outcomes.values()) == {'PASSED'}, output[-6000:]
    passed = set(re.findall(r'::(\w+)\[(?:\d-)?(\w+)', '\n'.join(outcomes)))
    source = (upstream / 'test_models.py').read_text()
    claims = [claim for claim in CLAIMS if f'def {claim}(' in source]  # older timm has fewer
    assert len(claims) >= 9
    # timm runs the tests of intermediate features for the modules in its list only
    assert not {(c, n) for c in claims for n in names if n != 'adopted' or 'intermediate' not in c} - passed


@pytest.mark.parametrize('file', ['test_factory.py', 'test_hub.py', 'test_checkpoint_loading.py'])
def test_unchanged(upstream: Path, file: str) -> None:
    """Each test ends as it does without this package."""
    if not (upstream / file).is_file():
        pytest.skip(f'timm {timm.__version__} has no {file}')
    output, outcomes = run_upstream(upstream, file)
    assert list(outcomes.values()).count('PASSED') >= 5
    if set(outcomes.values()) != {'PASSED'}:  # something else is missing, as timm's scripts
        assert outcomes == run_upstream(upstream, file, TORCH_DEVICE_BACKEND_AUTOLOAD='0')[1], output[-6000:]
