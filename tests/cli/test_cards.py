""" Model cards: what they say, and that their code runs """
import ast
import re
from io import BytesIO
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

import timm
from helpers.common import FULL, TINY, serve_donor
from helpers.hub_server import HubServer
from helpers.runs import push_args, write_run
from timm_sepool.cli.main import main

CARDS = Path(__file__).parents[2] / 'hf_cards'
NAMES = sorted(path.stem for path in CARDS.glob('*.md'))


def run_code(hub: HubServer, card: str) -> list:
    """Execute the card's three blocks as they stand, and return their variables."""
    picture = BytesIO()
    Image.new('RGB', (300, 260), (200, 120, 40)).save(picture, 'PNG')
    hub.add('huggingface/documentation-images', {'beignets-task-guide.png': picture.getvalue()}, repo_type='dataset')
    blocks = re.findall(r'```python\n(.*?)```', card, re.DOTALL)
    namespaces: list = [{}, {}, {}]
    for block, namespace in zip(blocks, namespaces, strict=True):
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


@pytest.mark.parametrize('name', [name for name in NAMES if FULL or '_resnet50.' in name])
def test_card(hub: HubServer, name: str, tmp_path: Path, monkeypatch) -> None:
    """Every figure has a source, the claim of the paper is told from the donor's figures, and the code runs."""
    card, donor = ModelCard.load(CARDS / f'{name}.md'), timm.get_pretrained_cfg(name).hf_hub_id
    data, text = card.data, ' '.join(card.text.split())
    assert (data.library_name, data.pipeline_tag, data.license) == ('timm', 'image-classification', 'apache-2.0')
    assert data.base_model == donor and data.datasets == ['imagenet-1k']
    assert data.eval_results and all(r.source_url and 'of the donor' in r.metric_name for r in data.eval_results)
    assert 'The claim is not reproduced here' in text and 'the gates are inert at the start' in text
    if not FULL and name != 'rgse_resnet50.from_resnet50_a1_in1k':
        return
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    serve_donor(hub, donor.removeprefix('timm/'))
    first, _, last = run_code(hub, card.text)
    assert first['top5_probabilities'].shape == (1, 5) and last['output'].shape == (1, 2048)


@pytest.mark.parametrize('name, chans, classes, model_kwargs, num_features', [
    ('rgse_resnet50', 3, 10, dict(TINY, global_pool='catavgmax'), 1024),
    ('spse_resnet50', 4, 3, TINY, 512),
    ('rgse_resnext50', 1, 10, TINY, 512),
    ('adopted', 3, 10, dict(base='regnety_002', squeeze='spse'), 368),
], ids=['catavgmax', '4-channels', 'grey', 'adopted'])
def test_trained(hub: HubServer, tmp_path: Path, monkeypatch, name, chans, classes, model_kwargs, num_features) -> None:
    """The card of a training run, whose code runs too."""
    monkeypatch.chdir(tmp_path)
    model = timm.create_model(name, in_chans=chans, num_classes=classes, **model_kwargs)
    checkpoint = write_run(tmp_path / 'run', model, name, in_chans=chans, img_size=64, model_kwargs=model_kwargs)
    assert main(push_args(name, checkpoint, '--dry-run', 'out')) == 0
    card = (tmp_path / 'out' / 'README.md').read_text()
    first, _, last = run_code(hub, card.replace("'hf-hub:user/net'", "'local-dir:out'"))
    assert first['top5_probabilities'].shape == (1, min(5, classes)) and last['output'].shape == (1, num_features)
    gmacs, params = (float(re.search(rf'{key}: (.*)', card)[1]) for key in ('GMACs', r'Params \(M\)'))
    assert gmacs > 0 and params == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, rel=0.06)
    assert ('regnety_002 with SPSE' if name == 'adopted' else 'ResNe') in card and 'Trained by the author' in card
