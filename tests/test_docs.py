""" What README says is what the package does """
import os
import re
import subprocess
import sys
from pathlib import Path

import timm
from helpers.common import NAMES, serve_donor
from helpers.hub_server import HubServer
from timm_sepool.cli.hub import DONOR_RESULTS
from timm_sepool.cli.main import model_table

TESTS = Path(__file__).parent
README = (TESTS.parent / 'README.md').read_text()


def test_model_table() -> None:
    for row in model_table():
        name = f'`{row["model"]}`' + (' + CBAM' if row['kwargs'] else '')
        line = (
            f'| {name} | {row["family"]} | {row["params"] / 1e6:.2f} | {row["gmacs"]:.3f} '
            f'| {row["claimed_top1_err"]:.2f} | {row["claimed_top5_err"]:.2f} |'
        )
        assert line in README


def test_python_blocks_run(hub: HubServer) -> None:
    serve_donor(hub, 'resnext101_32x4d.gluon_in1k')
    serve_donor(hub, 'regnety_032.ra_in1k')
    serve_donor(hub, 'resnet50.a1_in1k')
    pretrained, use, adopt, detect = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    exec(pretrained, {})
    namespace = {}
    exec(use, namespace)
    assert [f.shape[-1] for f in namespace['features'](namespace['x'])] == [120, 60, 30, 15]
    assert set(timm.list_models(['rgse_*', 'spse_*'])) == set(NAMES)
    exec(adopt, namespace)
    assert type(namespace['model'].s1.b1.se).__name__ == 'AdoptedSEModule'
    exec(detect.replace('min_size=800', 'min_size=128'), namespace)
    assert namespace['boxes'].shape[1] == 4


def test_donor_table() -> None:
    for donor, results in DONOR_RESULTS.items():
        backbone = donor.removeprefix('timm/').split('.')[0].removesuffix('_32x4d')
        figures = ' / '.join(f'{top1:.2f}' for _, top1, _ in results) + (' / -' if len(results) == 1 else '')
        tag = f'from_{donor.removeprefix("timm/").replace(".", "_")}'
        assert f'| `*_{backbone}` | `{tag}` | {figures} |' in README
        assert timm.get_pretrained_cfg(f'rgse_{backbone}').tag == tag


def test_reliability_table() -> None:
    """As many faults as there are tests of them."""
    rows = re.findall(r'\| \w+(?: \w+)? \(\[(test_faults_\w+\.py)\].*\| (\d+) \| \d+ \|', README)
    assert {file for file, _ in rows} == {path.name for path in TESTS.glob('test_faults_*.py')}
    command = [sys.executable, '-m', 'pytest', '--collect-only', '-q', *(file for file, _ in rows)]
    collected, full = (
        re.findall(r'(\S+)::', subprocess.run(
            command, cwd=TESTS, capture_output=True, text=True, timeout=300, check=True,
            env={**os.environ, 'FAULTS_FULL': switch}).stdout)
        for switch in ('', '1'))
    assert {file: full.count(f'tests/{file}') for file, _ in rows} == {file: int(count) for file, count in rows}
    assert f'`pytest` alone {len(collected)} ' in README
