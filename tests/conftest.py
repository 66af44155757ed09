import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers shared by the tests


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope='session')
def one_thread() -> None:
    # the networks here are too small to share, and two threads stall each other on a busy machine
    torch.set_num_threads(1)
