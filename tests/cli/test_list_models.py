""" The table of models and peers, and where its figures come from """
import json

import pytest

from helpers.common import FULL, PARAMS
from timm_sepool.cli._models import TABLE, model_stats
from timm_sepool.cli.main import main


def test_list(capsys) -> None:
    """JSON and the table show the same figures, the paper's as claims."""
    assert main(['list', '--json']) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row['model']: row['params'] for row in rows if row['family'] in ('RGSE', 'SPSE')} == PARAMS
    by_name = {(row['model'], row['family']): row for row in rows}
    assert len(by_name) == len(rows) == 25
    # the paper's table 3
    assert by_name['rgse_resnext101', 'RGSE']['claimed_top1_err'] == 20.67
    assert by_name['resnet152', 'CBAM']['claimed_top5_err'] == 5.70
    assert main(['list']) == 0
    table, notes = capsys.readouterr().out.split('\n\n')
    assert 'claims' in notes and 'not reproduced' in notes
    lines = [line.replace(' + ', '+').split() for line in table.splitlines()[1:]]
    assert lines == [[
        row['model'] + ('+cbam' if row['kwargs'] else ''), row['family'], f'{row["params"] / 1e6:.2f}',
        f'{row["gmacs"]:.3f}', f'{row["claimed_top1_err"]:.2f}', f'{row["claimed_top5_err"]:.2f}'] for row in rows]


# by default one network of each family, and SPSE and RGSE of both topologies
@pytest.mark.parametrize('row', [
    row for row in TABLE
    if FULL or row.model.endswith('resnet50') or row.model in ('rgse_resnext50', 'spse_resnext50')
], ids=lambda row: f'{row.model}-{row.family}')
def test_figures(row) -> None:
    """Parameters and GMACs in the table are those of the networks."""
    stats = model_stats(row.model, **row.kwargs)
    assert (stats['params'], round(stats['gmacs'], 3)) == (row.params, row.gmacs)
