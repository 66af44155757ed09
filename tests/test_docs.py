""" README and docs: what they say is what the package does """
import csv
import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import List

import pytest
from PIL import Image

import timm
from helpers.common import NAMES, serve_donor
from helpers.hub_server import HubServer
from timm_sepool.cli._models import DONOR_RESULTS, TABLE
from timm_sepool.cli.main import _parser, main

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / 'README.md', ROOT / '.github' / 'CONTRIBUTING.md', *(ROOT / 'docs').rglob('*.md')])


def blocks(page: Path, language: str) -> List[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', page.read_text(), re.DOTALL | re.MULTILINE)


def test_readme_is_two_screens() -> None:
    text = (ROOT / 'README.md').read_text()
    assert len(text.splitlines()) <= 170 and len(text.split()) <= 1400


@pytest.mark.parametrize('page', [page for page in PAGES if blocks(page, 'python')], ids=lambda page: page.name)
def test_python_runs(hub: HubServer, tmp_path, monkeypatch, page: Path) -> None:
    """The Python of a page, in one namespace, with a picture of the reader's and donors of random weights."""
    for donor in ('resnet50.a1_in1k', 'resnext101_32x4d.gluon_in1k', 'regnety_032.ra_in1k', 'mobilenetv2_100.ra_in1k',
                  'densenet121.ra_in1k', 'convnext_atto.d2_in1k'):
        if donor.split('.')[0].removesuffix('_32x4d') in page.read_text():
            serve_donor(hub, donor)
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (300, 200), (200, 120, 40)).save('photo.jpg')
    exec('\n'.join(blocks(page, 'python')).replace('min_size=800', 'min_size=128'), {})


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_commands_and_links(page: Path) -> None:
    """Every timm-sepool command is one that the parser takes; every relative link leads to a file of the repository."""
    for block in blocks(page, 'bash'):
        for line in block.replace('\\\n', ' ').splitlines():
            for command in re.split(r'&&|\|', line.split('  #')[0]):
                words = shlex.split(command)
                while words and re.match(r'\w+=', words[0]):
                    del words[0]
                if words[:1] == ['timm-sepool'] and '...' not in words:
                    _parser().parse_args([re.sub(r'^\[|\]$', '', word) for word in words[1:]])
    for link in re.findall(r'\]\(([^)#]+?)(?:#[^)]*)?\)', page.read_text()):
        assert link.startswith('https://') or (page.parent / link).exists(), link


def test_exact_start() -> None:
    """The tables of the experiment are those of its runs, of which none is missing."""
    script = runpy.run_path(str(ROOT / 'docs' / 'exact_start.py'))
    with (ROOT / 'docs' / 'exact_start.csv').open(newline='') as f:
        rows = list(csv.DictReader(f))
    assert len({(r['seed'], r['arm'], r['images'], r['regime']) for r in rows}) == len(rows) == 10 * 12 * 4
    assert script['tables'](rows) in (ROOT / 'docs' / 'exact_start.md').read_text()


@pytest.mark.parametrize('task', [path.parent.name for path in sorted((ROOT / 'docs' / 'evidence').glob('*/runs'))])
def test_evidence(tmp_path: Path, task: str) -> None:
    """The page has the tables that `compare` makes of the rows of all its runs, eight of each model."""
    folder = shutil.copytree(ROOT / 'docs' / 'evidence' / task, tmp_path / task)
    report, results = ((folder / name).read_text() for name in ('report.md', 'results.csv'))
    assert main(['compare', '--out', str(folder), '--report']) == 0
    assert (report, results) == ((folder / 'report.md').read_text(), (folder / 'results.csv').read_text())
    table = re.search(r'(^\|.*\n)+', report, re.MULTILINE).group()
    page = (ROOT / 'docs' / 'evidence.md').read_text()
    assert table.count(' 8 |\n') == table.count('\n') - 2 and table in page
    for path in (ROOT / 'docs' / 'evidence' / 'calibration').rglob('summary.csv'):
        assert f'{float(path.read_text().splitlines()[-1].split(",")[3]):.2f} %' in page


def test_tables() -> None:
    """The models' table and the donors' table are those of the package."""
    models, weights = ((ROOT / 'docs' / name).read_text() for name in ('models.md', 'weights.md'))
    for row in TABLE:
        name = f'`{row.model}`' + (' + CBAM' if row.kwargs else '')
        assert (
            f'| {name} | {row.family} | {row.params / 1e6:.2f} | {row.gmacs:.3f} '
            f'| {row.claimed_top1_err:.2f} | {row.claimed_top5_err:.2f} |') in models
        if row.model.endswith('resnet50') and not row.kwargs:
            assert f'| {row.params / 1e6:.2f} | {row.gmacs:.3f} |' in (ROOT / 'README.md').read_text()
    for donor, results in DONOR_RESULTS.items():
        backbone = donor.removeprefix('timm/').split('.')[0].removesuffix('_32x4d')
        figures = ' / '.join(f'{top1:.2f}' for _, top1, _ in results) + (' / -' if len(results) == 1 else '')
        tag = f'from_{donor.removeprefix("timm/").replace(".", "_")}'
        assert f'| `*_{backbone}` | `{tag}` | {figures} |' in weights
        assert timm.get_pretrained_cfg(f'rgse_{backbone}').tag == tag
    assert set(timm.list_models(['rgse_*', 'spse_*'])) == set(NAMES)
