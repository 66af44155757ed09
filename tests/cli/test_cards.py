""" Model cards: what they say, and that their code runs """
import ast
import re
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any, Dict

import pytest
from huggingface_hub import ModelCard
from PIL import Image

import timm
from helpers.common import FULL, TINY, serve_donor
from helpers.hub_server import HubServer
from helpers.runs import write_run
from timm_sepool.cli.main import main

CARDS = Path(__file__).parents[2] / 'hf_cards'
NAMES = sorted(path.stem for path in CARDS.glob('*.md'))


def donor_of(name: str) -> str:
    return timm.get_pretrained_cfg(name).hf_hub_id


def run_code(hub: HubServer, card: str) -> list:
    """Execute the card's three blocks as they stand, and return their variables."""
    picture = BytesIO()
    Image.new('RGB', (300, 260), (200, 120, 40)).save(picture, 'PNG')
    hub.add('huggingface/documentation-images', {'beignets-task-guide.png': picture.getvalue()}, repo_type='dataset')
    blocks = re.findall(r'```python\n(.*?)```', card, re.DOTALL)
    assert len(blocks) == 3
    namespaces: list = [{} for _ in blocks]
    for block, namespace in zip(blocks, namespaces):
        exec(block, namespace)
    shapes = [ast.literal_eval(s) for s in re.findall(r'torch\.Size\((.*?)\)', card)]
    assert [list(o.shape) for o in namespaces[1]['output']] == shapes
    assert f'a {tuple(namespaces[2]["output"].shape)} shaped tensor' in card
    return namespaces


def test_committed_cards_are_what_the_registry_generates(tmp_path: Path, monkeypatch) -> None:
    assert len(NAMES) == 10
    archs = [name.split('.')[0] for name in NAMES]
    if not FULL:
        archs = ['rgse_resnet50', 'spse_resnext50']
        monkeypatch.setattr('timm.models.list_models', lambda **kwargs: archs)
    assert main(['cards', str(tmp_path / 'cards')]) == 0
    generated = {p.stem: p.read_text() for p in (tmp_path / 'cards').iterdir()}
    assert set(generated) == {name for name in NAMES if name.split('.')[0] in archs}
    for name, text in generated.items():
        assert (CARDS / f'{name}.md').read_text() == text, f'{name} differs: commit what `timm-sepool cards` writes'


@pytest.mark.parametrize('name', NAMES)
def test_metadata(name: str) -> None:
    """It is complete, every figure has a source, and the claim of the paper is told from the donor's figures."""
    card = ModelCard.load(CARDS / f'{name}.md')
    data, text = card.data, ' '.join(card.text.split())
    assert (data.library_name, data.pipeline_tag, data.license) == ('timm', 'image-classification', 'apache-2.0')
    assert data.base_model == donor_of(name) and data.datasets == ['imagenet-1k']
    assert data.eval_results and all(r.source_url and 'of the donor' in r.metric_name for r in data.eval_results)
    assert 'The claim is not reproduced here' in text and 'the squeeze starts inert' in text


@pytest.mark.parametrize('name', NAMES if FULL else ['rgse_resnet50.from_resnet50_a1_in1k'])
def test_code(hub: HubServer, name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    serve_donor(hub, donor_of(name).removeprefix('timm/'))
    first, _, last = run_code(hub, (CARDS / f'{name}.md').read_text())
    assert first['top5_probabilities'].shape == (1, 5) and last['output'].shape == (1, 2048)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize('name, kwargs, num_features, base', [
    ('rgse_resnet50', dict(global_pool='catavgmax'), 1024, None),
    ('spse_resnet50', dict(in_chans=4, num_classes=3), 512, None),
    ('rgse_resnext50', dict(in_chans=1), 512, None),
    ('adopted', dict(base='regnety_002', squeeze='spse'), 368, 'regnety_002'),
    ('adopted', dict(base='seresnet50', **TINY), 512, 'seresnet50'),
], ids=['catavgmax', '4-channels', 'grey', 'adopted', 'adopted-small'])
def test_code_of_trained_networks(
        hub: HubServer, tmp_path: Path, monkeypatch, name: str, kwargs: Dict[str, Any], num_features: int, base
) -> None:
    monkeypatch.chdir(tmp_path)
    kwargs = dict(dict(num_classes=10) if base else dict(TINY, num_classes=10), **kwargs)
    model = timm.create_model(name, **kwargs)
    model_kwargs = {k: v for k, v in kwargs.items() if k not in ('num_classes', 'in_chans')}
    checkpoint = write_run(
        tmp_path / 'run', model, name, in_chans=kwargs.get('in_chans'), img_size=64, model_kwargs=model_kwargs)
    assert main(['push', name, '--repo-id', 'user/net', '--checkpoint', str(checkpoint), '--dry-run', 'out']) == 0
    card = (tmp_path / 'out' / 'README.md').read_text()
    first, _, last = run_code(hub, card.replace("'hf-hub:user/net'", "'local-dir:out'"))
    assert first['top5_probabilities'].shape == (1, min(5, kwargs['num_classes']))
    assert last['output'].shape == (1, num_features)
    gmacs, params = (float(re.search(rf'{key}: (.*)', card)[1]) for key in ('GMACs', r'Params \(M\)'))
    assert gmacs > 0 and params == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, rel=0.06)
    assert (f'{base} whose blocks' if base else 'ResNe') in card and 'Trained by the author' in card
