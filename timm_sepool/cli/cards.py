""" Model cards for the Hugging Face Hub """
import argparse
from pathlib import Path
from typing import Any, Dict, List, Optional

from ._models import DONOR_RESULTS, RESULTS_URL, TABLE, model_stats
from ._output import check_new, new_path

_SQUEEZES = {
    'SPSE': 'averages over 1x1, 2x2 and 4x4 grids (spatial pyramid)',
    'RGSE': 'averages over an 8x8, 4x4, 2x2 or 1x1 grid by stage (resolution-guided)',
}


def add_parser(subparsers) -> None:
    """Add the command to the parser of `timm-sepool`."""
    parser = subparsers.add_parser('cards', help='the model cards of all default tags')
    parser.add_argument('output', type=Path, metavar='OUT', help='folder to write, must not exist')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the cards."""
    check_new(args.output)  # before the work, not after it
    cards = default_cards()
    with new_path(args.output) as temporary:
        temporary.mkdir()
        for name, text in cards.items():
            (temporary / name).write_text(text, encoding='utf-8')
    print(f'wrote {len(cards)} cards to {args.output}')


def default_cards() -> Dict[str, str]:
    """Cards of all models with their default tags, file name to text."""
    from timm.models import get_pretrained_cfg, list_models

    cfgs: Dict[str, Any] = {arch: get_pretrained_cfg(arch) for arch in list_models(module='sepool_resnet')}
    names = [f'{arch}.{cfg.tag}' for arch, cfg in cfgs.items()]
    return {f'{name}.md': f'{model_card(name, name, cfgs[name.split(".")[0]].to_dict())}\n' for name in names}


def model_card(
        name: str,
        model_id: str,
        cfg: Dict[str, Any],
        model_args: Optional[Dict[str, Any]] = None,
        results: Optional[List[Dict[str, Any]]] = None,
        trained: bool = False,
        license: str = 'apache-2.0',
):
    """Create the `huggingface_hub.ModelCard` of a registered `MODEL.TAG` or of a network to be pushed.

    Args:
        name: Registered model name, with its tag if its weights are the tag's.
        model_id: What users pass to `timm.create_model`.
        cfg: Pretrained cfg of the weights: at least input_size and num_classes.
        model_args: Arguments of the network, if it is not the registered one.
        results: Measured accuracies, dicts of img_size (px), top1 and top5 (%).
        trained: The weights come from a checkpoint, not from the donor.
        license: License of trained weights.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    from timm.models import get_arch_name

    arch = get_arch_name(name)
    model_args = {k: v for k, v in (model_args or {}).items() if k not in ('num_classes', 'in_chans')}
    stats = model_stats(arch, tuple(cfg['input_size']), num_classes=cfg['num_classes'], **model_args)
    donor = None if trained else cfg['hf_hub_id']
    claim = None if trained else next((row for row in TABLE if row.model == arch), None)
    if arch == 'adopted':
        family = (model_args.get('attention') or model_args.get('squeeze') or 'rgse').upper()
        backbone = model_args.get('base', 'seresnet50')
        description = f'{backbone} with {family} attention by `timm_sepool.adopt`'
    else:
        family, backbone = arch.split('_')
        family = family.upper()
        backbone = backbone.replace('resnext', 'ResNeXt-').replace('resnet', 'ResNet-')
        description = f'{backbone} whose blocks squeeze each channel to {_SQUEEZES[family]}'

    repo_id = model_id.removeprefix('hf-hub:')
    measured: Dict[str, Any] = dict(
        of='these weights', dataset='imagefolder', dataset_name='the data set that they were validated on',
        source_name='validate.py of timm, run by the author', source_url=f'https://huggingface.co/{repo_id}')
    published: Dict[str, Any] = dict(
        of=f'the donor, {donor}', dataset='imagenet-1k', dataset_name='ImageNet-1k',
        source_name="timm's results-imagenet.csv", source_url=RESULTS_URL)
    rows = [{**row, **measured} for row in results or ()]
    rows += [dict(published, img_size=size, top1=a, top5=b) for size, a, b in DONOR_RESULTS.get(donor or '', ())]
    eval_results = [
        EvalResult(
            task_type='image-classification', dataset_type=row['dataset'], dataset_name=row['dataset_name'],
            metric_type='accuracy', metric_name=f'top-{k} accuracy (%) of {row["of"]}, {row["img_size"]} px',
            metric_value=row[f'top{k}'], source_name=row['source_name'], source_url=row['source_url'])
        for row in rows for k in (1, 5)]
    data = ModelCardData(
        license=cfg['license'] if donor else license,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'squeeze-and-excitation', family.lower()],
        datasets=['imagenet-1k'] if donor else None,
        base_model=donor,
        model_name=repo_id,
        eval_results=eval_results or None,
    )
    chans, *size = cfg['input_size']
    test_size = (cfg.get('test_input_size') or cfg['input_size'])[1:]
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / 'card_template.md'),
        model_id=model_id,
        family=family,
        backbone=backbone,
        description=description,
        weights='Trained by the author of this repository.' if trained else
        f'**No trained {family} weights are public. These are a donor\'s.** {cfg["description"]}',
        donor=donor,
        image_size=f'train = {size[0]} x {size[1]}, test = {test_size[0]} x {test_size[1]}',
        results=rows,
        claim=claim,
        # Pillow opens a picture with one or three channels only
        mode={1: 'L', 3: 'RGB'}.get(chans),
        input_shape=[1, *cfg['input_size']],
        k=min(5, cfg['num_classes']),
        gmacs_text=_three_digits(stats['gmacs']),
        params_text=_three_digits(stats['params'] / 1e6),
        activations_text=_three_digits(stats['activations'] / 1e6),
        **stats,
    )


def _three_digits(value: float) -> str:
    """One decimal as in timm's cards, or three significant digits for what that would round to almost nothing."""
    return f'{value:.1f}' if value >= 1 else f'{value:.3g}'
