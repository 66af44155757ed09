""" timm's own tests/test_models.py, from the source distribution of the installed timm, on the models of this package

By default two small networks; all ten at full size, some 15 minutes, with UPSTREAM_FULL=1. Needs the package index.
"""
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from common import NAMES, TINY, serve_donor
from hub_server import HubServer

import timm

# makes the registered models small, for the tests know names only
TINY_PLUGIN = f"""
from timm_sepool import sepool_resnet
create = sepool_resnet._create_sepool_resnet
sepool_resnet._create_sepool_resnet = lambda *args, **kwargs: create(*args, **{{**kwargs, **{TINY!r}}})
"""
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
    return tests


def test_models(hub: HubServer, upstream: Path) -> None:
    full = bool(os.environ.get('UPSTREAM_FULL'))
    names = NAMES if full else ['rgse_resnet50', 'spse_resnext50']
    plugin = [] if full else ['-p', 'tiny_plugin']
    for tag in timm.list_pretrained([f'{name}.*' for name in names]):
        # its tests of pretrained weights find random ones
        serve_donor(hub, timm.get_pretrained_cfg(tag).hf_hub_id.removeprefix('timm/'), **({} if full else TINY))
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', 'test_models.py', '-rA', '-W', 'ignore', '-k', ' or '.join(names), *plugin],
        cwd=upstream, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(upstream)})
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    print(result.stdout.splitlines()[-1])
    passed = set(re.findall(r'^PASSED test_models\.py::(\w+)\[(?:\d-)?(\w+)', result.stdout, re.MULTILINE))
    source = (upstream / 'test_models.py').read_text()
    claims = [claim for claim in CLAIMS if f'def {claim}(' in source]  # older timm has fewer
    assert len(claims) >= 9
    missing = {(claim, name) for claim in claims for name in names} - passed
    assert not missing
