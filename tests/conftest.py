import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # for the package `helpers`

from helpers.hub_server import TOKEN, HubServer  # noqa: E402

# huggingface_hub reads these when it is imported: no test, and no process of one, reaches the real Hub or its cache
HUB = HubServer()
HUB_HOME = tempfile.TemporaryDirectory()
os.environ.update(HF_ENDPOINT=HUB.endpoint, HF_HOME=HUB_HOME.name, HF_TOKEN=TOKEN, HF_HUB_DISABLE_TELEMETRY='1')
os.environ.pop('HF_HUB_CACHE', None)

import torch  # noqa: E402

# the networks here are too small to share, and two threads stall each other on a busy machine
torch.set_num_threads(1)


def pytest_addoption(parser) -> None:
    parser.addoption('--full', action='store_true', help='also run the tests marked `full`, and more cases of others')


def pytest_configure(config) -> None:
    config.addinivalue_line('markers', 'full: runs with --full only, another test checks the same claim faster')
    os.environ['TIMM_SEPOOL_FULL_TESTS'] = '1' if config.getoption('--full') else ''
    settings.register_profile('quick', max_examples=20, derandomize=True, deadline=None)
    settings.register_profile('full', max_examples=200, deadline=None, print_blob=True)
    settings.load_profile('full' if config.getoption('--full') else 'quick')


def pytest_collection_modifyitems(config, items) -> None:
    if not config.getoption('--full'):
        left_out = [item for item in items if item.get_closest_marker('full')]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def hub() -> HubServer:
    """The local Hub, without the faults of other tests."""
    HUB.faults.clear()
    return HUB


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_donor(hub: HubServer, tmp_path) -> partial:
    """create_model of a small rgse_resnet50 whose donor has weights, with a cache of its own."""
    from helpers.common import TINY, serve_donor
    from timm import create_model

    serve_donor(hub, 'resnet50.a1_in1k', **TINY)
    return partial(create_model, 'rgse_resnet50', pretrained=True, cache_dir=tmp_path / 'cache', **TINY)
