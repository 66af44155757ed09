""" Model cards and publishing on the Hugging Face Hub """
import csv
import json
import math
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Type, Union

import torch
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch.utils.flop_counter import FlopCounterMode

from timm.data import create_transform, resolve_data_config
from timm.models import create_model, get_arch_name, get_pretrained_cfg, list_models, save_for_hf

from ..sepool_resnet import checkpoint_filter_fn
from ._output import CommandError, first_line, load_checkpoint

# Top-1 / top-5 error (%) on ImageNet-1k, single crop, as claimed by the paper (Jin et al. 2022), not reproduced
FAMILIES = ('plain', 'SE', 'CBAM', 'SPSE', 'RGSE')
PAPER_ERRORS = {
    'resnet50': ((24.48, 7.49), (23.21, 6.60), (22.65, 6.32), (22.40, 6.18), (22.27, 6.15)),
    'resnet101': ((23.28, 6.70), (22.35, 6.13), (21.49, 5.68), (21.27, 5.66), (21.24, 5.62)),
    'resnet152': ((22.44, 6.37), (21.59, 5.74), (21.37, 5.70), (21.16, 5.60), (21.09, 5.58)),
    'resnext50': ((22.72, 6.44), (21.89, 6.02), (21.91, 5.89), (21.42, 5.76), (21.36, 5.72)),
    'resnext101': ((21.53, 5.77), (21.18, 5.67), (21.10, 5.58), (20.71, 5.45), (20.67, 5.43)),
}
# Donors' (image size, top-1, top-5 accuracy in %), published by timm in results/results-imagenet.csv
DONOR_RESULTS = {
    'timm/resnet50.a1_in1k': ((224, 80.382, 94.598), (288, 81.240, 95.112)),
    'timm/resnet101.a1h_in1k': ((224, 81.950, 95.760), (288, 82.796, 96.324)),
    'timm/resnet152.a1h_in1k': ((224, 82.818, 96.124), (288, 83.494, 96.522)),
    'timm/resnext50_32x4d.a1h_in1k': ((224, 81.140, 95.320), (288, 82.016, 95.934)),
    'timm/resnext101_32x4d.gluon_in1k': ((224, 80.336, 94.908),),
}
RESULTS_URL = 'https://github.com/huggingface/pytorch-image-models/blob/main/results/results-imagenet.csv'
SOURCE_FIELDS = ('tag', 'url', 'file', 'hf_hub_id', 'source', 'origin_url', 'description', 'paper_ids', 'paper_name')
PREPROCESSING = ('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')
# The bases of the Hub client's error are OSError and that of the HTTP library in use, which differs between its
# versions and whose errors while transferring are not OSErrors.
LOADING_ERRORS: Tuple[Type[BaseException], ...] = (
    SafetensorError, *(base for base in HfHubHTTPError.__bases__ if base is not Exception))


def check_model(name: str) -> str:
    """Architecture of a model name with or without a tag.

    Raises:
        CommandError: If it is none of this package.
    """
    arch = get_arch_name(name)
    models = list_models(module='sepool_resnet')
    tags = list_models(f'{arch}.*', module='sepool_resnet', include_tags=True)
    if name not in models + tags:
        raise CommandError(f'Unknown model {name!r}. Choose one of: {", ".join(tags or models)}.')
    return arch


def model_stats(name: str, input_size: Tuple[int, int, int] = (3, 224, 224), **kwargs) -> Dict[str, Any]:
    """Count without memory or weights.

    Args:
        name: Any timm model.
        input_size: Input (C, H, W) of one image.
        **kwargs: Model arguments.

    Returns:
        params; gmacs, multiply-adds of convolutions and matrix products; activations, elements that convolutions and
        linear layers put out; feature_shapes of the five stages.
    """
    activations = 0

    def count(module, args, output) -> None:
        nonlocal activations
        activations += output.numel()

    with torch.device('meta'), torch.no_grad():
        model: Any = create_model(name, in_chans=input_size[0], **kwargs).eval()
        for module in model.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.register_forward_hook(count)
        with FlopCounterMode(display=False) as flops:
            features = model.forward_intermediates(torch.empty(1, *input_size), intermediates_only=True)
            model.forward_head(features[-1])
    return dict(
        params=sum(p.numel() for p in model.parameters()),
        gmacs=flops.get_total_flops() / 2e9,
        activations=activations,
        feature_shapes=[list(f.shape) for f in features],
    )


def model_card(
        name: str,
        model_id: str,
        model_args: Optional[Dict[str, Any]] = None,
        cfg: Optional[Dict[str, Any]] = None,
        results: Optional[List[Dict[str, Any]]] = None,
        trained: bool = False,
        license: str = 'apache-2.0',
) -> ModelCard:
    """Card of a registered `MODEL.TAG` or of a network to be pushed.

    Args:
        name: Registered model name with its tag.
        model_id: What users pass to `timm.create_model`.
        model_args: Arguments of the network, if it is not the registered one.
        cfg: Its input_size, test_input_size and num_classes, if they are not the registered ones.
        results: Measured accuracies, dicts of img_size, top1, top5.
        trained: The weights come from a checkpoint, not from the donor.
        license: License of trained weights.
    """
    arch = get_arch_name(name)
    family, backbone = arch.split('_')
    pretrained_cfg: Any = get_pretrained_cfg(name)
    cfg = {**pretrained_cfg.to_dict(), **(cfg or {})}
    donor = None if trained else pretrained_cfg.hf_hub_id
    stats = model_stats(
        arch, tuple(cfg['input_size']), num_classes=cfg['num_classes'],
        **{k: v for k, v in (model_args or {}).items() if k not in ('num_classes', 'in_chans')})

    repo_url = f'https://huggingface.co/{model_id.removeprefix("hf-hub:")}'
    rows = [
        dict(
            r, of='these weights', dataset='imagefolder', dataset_name='the data set that they were validated on',
            source_name='validate.py of timm, run by the author', source_url=repo_url)
        for r in results or ()]
    if donor:
        rows += [
            dict(
                img_size=size, top1=top1, top5=top5, of=f'the donor, {donor}', dataset='imagenet-1k',
                dataset_name='ImageNet-1k',
                source_name="timm's results-imagenet.csv", source_url=RESULTS_URL)
            for size, top1, top5 in DONOR_RESULTS.get(donor, ())]
    eval_results = [
        EvalResult(
            task_type='image-classification',
            dataset_type=row['dataset'],
            dataset_name=row['dataset_name'],
            metric_type='accuracy',
            metric_name=f'top-{k} accuracy (%) of {row["of"]}, {row["img_size"]} px',
            metric_value=row[f'top{k}'],
            source_name=row['source_name'],
            source_url=row['source_url'],
        )
        for row in rows for k in (1, 5)]
    data = ModelCardData(
        license=pretrained_cfg.license if donor else license,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'squeeze-and-excitation', family],
        datasets=['imagenet-1k'] if donor else None,
        base_model=donor,
        model_name=model_id.removeprefix('hf-hub:'),
        eval_results=eval_results or None,
    )
    size, test_size = cfg['input_size'], cfg.get('test_input_size') or cfg['input_size']
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / 'card_template.md'),
        model_id=model_id,
        family=family.upper(),
        backbone=backbone.replace('resnext', 'ResNeXt-').replace('resnet', 'ResNet-'),
        squeeze={
            'spse': 'averages over 1x1, 2x2 and 4x4 grids (spatial pyramid)',
            'rgse': 'averages over an 8x8, 4x4, 2x2 or 1x1 grid by stage (resolution-guided)',
        }[family],
        weights='Trained by the author of this repository.' if trained else
        f'**No trained {family.upper()} weights are public, these are of a donor.** {pretrained_cfg.description}',
        donor=donor,
        image_size=f'train = {size[1]} x {size[2]}, test = {test_size[1]} x {test_size[2]}',
        results=rows,
        claim=None if trained else PAPER_ERRORS[backbone][FAMILIES.index(family.upper())],
        mode='L' if size[0] == 1 else 'RGB',
        k=min(5, cfg['num_classes']),
        num_features=stats['feature_shapes'][-1][1],
        **stats,
    )


def default_cards() -> Dict[str, str]:
    """Cards of all models with their default tags, file name to text."""
    cfgs: Dict[str, Any] = {arch: get_pretrained_cfg(arch) for arch in list_models(module='sepool_resnet')}
    names = [f'{arch}.{cfg.tag}' for arch, cfg in cfgs.items()]
    return {f'{name}.md': f'{model_card(name, name)}\n' for name in names}


def load_trained(
        arch: str,
        checkpoint: Path,
        use_ema: bool = False,
        model_kwargs: Optional[Dict[str, Any]] = None,
) -> Tuple[torch.nn.Module, Dict[str, Any]]:
    """Network with the weights of a checkpoint, whose classes and channels are read off it.

    Returns:
        The network and the arguments it was created with.

    Raises:
        CommandError: If the checkpoint can't be read or is not one of this architecture and these arguments.
    """
    state_dict = load_checkpoint(checkpoint, use_ema)
    kwargs = {**(model_kwargs or {}), 'num_classes': 0}
    if getattr(state_dict.get('fc.weight'), 'ndim', 0) == 2:
        kwargs['num_classes'] = state_dict['fc.weight'].shape[0]
    conv1: Any = state_dict.get('conv1.weight', state_dict.get('conv1.0.weight'))  # the latter of a deep stem
    if getattr(conv1, 'ndim', 0) == 4:
        kwargs['in_chans'] = conv1.shape[1]
    try:
        with torch.device('meta'):
            # these weights have no tag and do not come from a donor
            model = create_model(arch, pretrained_cfg_overlay=dict.fromkeys(SOURCE_FIELDS), **kwargs)
    except Exception as e:
        raise CommandError(f'{arch} can not be created with {kwargs}: {first_line(e)}') from e
    if not any('.se.' in k or '.fc_reduction.' in k for k in state_dict):
        raise CommandError(
            f'{checkpoint} holds no {arch} weights but those of a network without its squeeze. '
            'Load a donor by pretrained_cfg_overlay=dict(file=...) or --pretrained-path instead.'
        )
    try:
        # contiguous: a channels_last training saves its weights so, and safetensors takes no other than contiguous ones
        state_dict = {k: v.contiguous() for k, v in checkpoint_filter_fn(state_dict, model).items()}
        model.load_state_dict(state_dict, strict=True, assign=True)
    except RuntimeError as e:
        raise CommandError(f'{checkpoint}: {" ".join(str(e).split())}') from e
    return model, kwargs


def save_folder(
        model: torch.nn.Module,
        folder: Path,
        model_args: Dict[str, Any],
        cfg: Optional[Dict[str, Any]] = None,
        label_names: Optional[List[str]] = None,
) -> None:
    """Write model.safetensors and config.json, for `hf-hub:`, `local-dir:` and transformers' timm wrapper.

    Args:
        model: The network.
        folder: Folder to write.
        model_args: Arguments it was created with.
        cfg: Preprocessing that replaces the one it inherits from a donor, see PREPROCESSING.
        label_names: Class names.
    """
    save_for_hf(
        model, str(folder), safe_serialization=True, model_args=model_args,
        model_config=dict(label_names=label_names) if label_names else None)
    config = json.loads((folder / 'config.json').read_text())
    # it stays at the config's top level: transformers' wrapper passes it beside model_args
    config.setdefault('model_args', {}).pop('num_classes', None)
    pretrained_cfg = config['pretrained_cfg']
    for key in (*SOURCE_FIELDS, *(('test_input_size', 'test_crop_pct', 'pool_size', 'test_pool_size') if cfg else ())):
        pretrained_cfg.pop(key, None)
    pretrained_cfg.update(cfg or {})
    (folder / 'config.json').write_text(json.dumps(config, indent=2))


def read_run_args(
        path: Path,
        arch: str,
        model_kwargs: Optional[Dict[str, Any]] = None,
) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Read the args.yaml of a training run.

    Returns:
        The run's arguments and its model arguments under `model_kwargs`.

    Raises:
        CommandError: If it is none, or of another architecture.
    """
    try:
        arguments = yaml.safe_load(path.read_text(encoding='utf-8'))
        trained_as = str(arguments['model'])
        global_pool = {'global_pool': arguments['gp']} if arguments.get('gp') else {}  # train.py's --gp
        model_kwargs = {**global_pool, **(arguments.get('model_kwargs') or {}), **(model_kwargs or {})}
    except (OSError, TypeError, ValueError, KeyError, AttributeError, yaml.YAMLError) as e:
        raise CommandError(f'{path} is no args.yaml of train.py: {type(e).__name__}') from e
    if ':' not in trained_as and get_arch_name(trained_as) != arch:  # hf-hub:, local-dir: tell at the load
        raise CommandError(f'{path} is of a training of {trained_as}, not of {arch}.')
    return arguments, model_kwargs


def training_preprocessing(
        model: torch.nn.Module,
        run_args: Optional[Dict[str, Any]],
        flags: Dict[str, Any],
        checkpoint: Union[Path, str],
) -> Dict[str, Any]:
    """Preprocessing that a checkpoint was validated with: flags over the training run's arguments.

    Raises:
        CommandError: If neither tells.
    """
    if run_args is None and not {'img_size', 'interpolation', 'crop_pct', 'mean', 'std'} <= flags.keys():
        raise CommandError(
            f'The preprocessing of {checkpoint} is not known. Put the args.yaml of its training run beside it, name it '
            'by --args, or give all of --img-size, --interpolation, --crop-pct, --mean and --std.'
        )
    # as train.py and validate.py resolve it
    args = {**(run_args or {}), 'in_chans': model.in_chans, 'chans': None, **flags}
    if 'img_size' in flags:
        args['input_size'] = None
    try:
        resolved = resolve_data_config(args, model=model)
        create_transform(**resolved)  # knows which values make sense
    except Exception as e:
        raise CommandError(f'The preprocessing of {checkpoint} makes no sense: {first_line(e)}') from e
    if min(resolved['input_size']) < 1 or not 0 < flags.get('crop_pct', resolved['crop_pct']) <= 1:
        raise CommandError(f'The preprocessing of {checkpoint} makes no sense: {({**resolved, **flags})}')
    return {k: resolved[k] for k in PREPROCESSING if k in resolved}


def read_results(path: Path, arch: str) -> List[Dict[str, Any]]:
    """Accuracies of a network in a results file of timm's validate.py, one dict of img_size, top1, top5 a row.

    Raises:
        CommandError: If it is none, or holds none of this network.
    """
    try:
        with open(path, newline='', encoding='utf-8') as f:
            rows = [row for row in csv.DictReader(f) if get_arch_name(row['model']) == arch]
        results = [dict(img_size=int(r['img_size']), top1=float(r['top1']), top5=float(r['top5'])) for r in rows]
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise CommandError(
            f'{path} is no results file of validate.py (CSV with model, img_size, top1, top5): {first_line(e)}') from e
    if not results or not all(math.isfinite(r['top1']) and math.isfinite(r['top5']) for r in results):
        raise CommandError(f'{path} holds no accuracy of {arch}.')
    return results


def export(
        name: str,
        repo_id: str,
        folder: Path,
        checkpoint: Optional[Path] = None,
        use_ema: bool = False,
        run_args: Optional[Path] = None,
        model_kwargs: Optional[Dict[str, Any]] = None,
        preprocessing: Optional[Dict[str, Any]] = None,
        labels: Optional[Path] = None,
        metrics: Optional[Path] = None,
        license: str = 'apache-2.0',
) -> None:
    """Write what `push` uploads: model.safetensors, config.json and README.md (the card).

    Args:
        name: Registered model name, with or without tag.
        repo_id: Repository the card is for, USER/NAME.
        folder: Folder to write.
        checkpoint: Trained weights. Without, the weights of the tag.
        use_ema: Take the checkpoint's EMA weights.
        run_args: args.yaml of the training run, by default the one beside the checkpoint.
        model_kwargs: Model arguments over those of run_args.
        preprocessing: img_size, interpolation, crop_pct, mean, std over those of run_args.
        labels: Text file of class names, one a line.
        metrics: Results file of timm's validate.py.
        license: License of trained weights.

    Raises:
        CommandError: If an input is missing, damaged or does not fit the others.
    """
    arch = check_model(name)
    label_names = None
    kwargs: Dict[str, Any] = {}
    cfg: Optional[Dict[str, Any]] = None
    if checkpoint is None:
        try:
            model = create_model(name, pretrained=True)
        except RuntimeError as e:
            raise CommandError(first_line(e)) from e
    else:
        yaml_path = run_args or checkpoint.with_name('args.yaml')
        arguments = None
        if run_args or yaml_path.is_file():
            arguments, model_kwargs = read_run_args(yaml_path, arch, model_kwargs)
        model, kwargs = load_trained(arch, checkpoint, use_ema, model_kwargs)
        cfg = training_preprocessing(model, arguments, preprocessing or {}, checkpoint)
        cfg['license'] = license
    if labels is not None:
        try:
            label_names = labels.read_text(encoding='utf-8').splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise CommandError(f'Can not read the labels {labels}: {e}') from e
        if len(label_names) != model.num_classes:
            raise CommandError(f'{labels} names {len(label_names)} classes, the network has {model.num_classes}.')
    results = read_results(metrics, arch) if metrics else None
    save_folder(model, folder, kwargs, cfg, label_names)
    card_cfg = dict(cfg, test_input_size=None, num_classes=model.num_classes) if cfg else None
    card = model_card(
        name, f'hf-hub:{repo_id}', kwargs, card_cfg, results=results, trained=checkpoint is not None, license=license)
    card.save(folder / 'README.md')


def check_repo_id(repo_id: str) -> None:
    """Check that something can be pushed there before any work is done.

    Raises:
        CommandError: If repo_id is not of the form USER/NAME.
    """
    try:
        validate_repo_id(repo_id)
        if repo_id.count('/') != 1:
            raise HFValidationError('expected USER/NAME')
    except HFValidationError as e:
        raise CommandError(f'{repo_id!r} is no repository id: {first_line(e)}') from e


def check_token() -> None:
    """Raise CommandError if there is no token to push with."""
    if get_token() is None:
        raise CommandError('There is no Hugging Face token. Run `hf auth login` or set HF_TOKEN.')


def upload(folder: Path, repo_id: str, private: bool = False, force: bool = False) -> str:
    """Upload an exported folder, creating the repository if there is none. Without a change there is no commit.

    Args:
        folder: What `export` wrote.
        repo_id: USER/NAME.
        private: Create the repository private.
        force: Replace whatever the repository holds.

    Returns:
        URL of the commit.

    Raises:
        CommandError: If the Hub refuses, or the repository holds something else or is public against `private`.
    """
    api = HfApi(library_name='timm_sepool')
    ours = json.loads((folder / 'config.json').read_text())['architecture']
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: the default of an organization
        info = api.model_info(repo_id)
        if private and not info.private:
            raise CommandError(f'{repo_id} exists and is public. Make it private on the Hub or leave out --private.')
        files = {sibling.rfilename for sibling in info.siblings or ()} - {'.gitattributes'}
        theirs = None
        if 'config.json' in files:
            try:
                config = hf_hub_download(repo_id, 'config.json', revision=info.sha)  # no older one from the cache
                theirs = json.loads(Path(config).read_text())['architecture']
            except (ValueError, KeyError, TypeError):
                theirs = 'config.json that is not of timm'
        elif files:
            theirs = f'{len(files)} files without a config.json'
        if theirs not in (None, ours) and not force:
            raise CommandError(f'{repo_id} holds a {theirs}, not a {ours}. Choose another repository or use --force.')
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f'Add {ours}'))
    except LOADING_ERRORS + (OSError, ValueError) as e:
        raise CommandError(f'The Hub refused {repo_id}: {first_line(e)}') from e
