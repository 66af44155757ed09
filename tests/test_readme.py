""" What README says is what the package does """
import re
from pathlib import Path

import pytest
from common import NAMES

import timm
from timm_sepool.cli import model_table

README = (Path(__file__).parents[1] / 'README.md').read_text()


def test_model_table() -> None:
    for row in model_table():
        name = f'`{row["model"]}`' + (' + CBAM' if row['kwargs'] else '')
        line = (
            f'| {name} | {row["family"]} | {row["params"] / 1e6:.2f} | {row["gmacs"]:.3f} '
            f'| {row["claimed_top1_err"]:.2f} | {row["claimed_top5_err"]:.2f} |'
        )
        assert line in README


@pytest.mark.parametrize('block', re.findall(r'```python\n(.*?)```', README, re.DOTALL), ids=lambda b: b.split('\n')[0])
def test_python_blocks_run(block: str) -> None:
    namespace = {}
    exec(block, namespace)
    if 'features' in namespace:
        assert [f.shape[-1] for f in namespace['features'](namespace['x'])] == [120, 60, 30, 15]
        assert set(timm.list_models(['rgse_*', 'spse_*'])) == set(NAMES)
