""" What a training run leaves behind: its checkpoint, its args.yaml and the results of validate.py, each read here

The preprocessing of a run is resolved as train.py did: its arguments over the config of the model that it started from,
tag and source included.
"""
import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from timm.data import create_transform, resolve_data_config
from timm.models import clean_state_dict, create_model, get_arch_name, get_pretrained_cfg, load_model_config_from_hf

from ..checkpoints import checkpoint_filter_fn
from ..squeeze import SEPoolModule
from ._arguments import PREPROCESSING_FLAGS
from ._output import CommandError, first_line

PREPROCESSING = ('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')
# entry in the metadata of a converted file: what `push` and `plot` need of its args.yaml, as JSON
METADATA_KEY = 'timm_sepool.args'


class TrainedModel(NamedTuple):
    """A network with the weights of a checkpoint."""
    model: nn.Module
    model_kwargs: Dict[str, Any]  # arguments it was created with
    run_args: Optional[Dict[str, Any]]  # arguments of its training run, None if nothing tells


def load_checkpoint(path: Path, use_ema: bool = False) -> Dict[str, Any]:
    """Read the state dict of a safetensors file or of a pickled checkpoint, without running the pickle's code.

    Raises:
        CommandError: If the file is missing, damaged, would execute code, or has no (EMA) state dict.
    """
    try:
        if path.suffix == '.safetensors':
            checkpoint = load_file(path)
        else:
            # timm's training checkpoints hold their arguments
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError as e:
        raise CommandError(f'The checkpoint {path} does not exist.') from e
    except OSError as e:
        raise CommandError(f'Cannot read the checkpoint {path}: {first_line(e)}.') from e
    except Exception as e:  # a damaged pickle can end in any
        if 'unsupported global' in str(e).lower():  # torch has no class for this error
            raise CommandError(
                f'{path} would execute code when unpickled, so it was not loaded. If you trust it, save its state dict '
                'alone: torch.save(model.state_dict(), ...).') from e
        raise CommandError(
            f'{path} is damaged or is not a checkpoint ({type(e).__name__}). Copy or download it again. The name of a '
            'safetensors file must end in .safetensors.') from e

    keys = ('state_dict_ema', 'model_ema') if use_ema else ('state_dict', 'model')
    if isinstance(checkpoint, dict):
        found = next((checkpoint[k] for k in keys if isinstance(checkpoint.get(k), dict)), None)
        if use_ema and found is None:
            raise CommandError(f'{path} has no EMA weights. Leave out --use-ema, or train with --model-ema.')
        checkpoint = checkpoint if found is None else found
    if (
        not isinstance(checkpoint, dict) or not checkpoint
        or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in checkpoint.items())
    ):
        raise CommandError(
            f'{path} has no state dict (tensors by name). Save one with torch.save or safetensors.torch.save_file.')
    return clean_state_dict(checkpoint)


def read_run_args(checkpoint: Path, path: Optional[Path] = None) -> Optional[Dict[str, Any]]:
    """Arguments of the training run that a checkpoint comes from.

    Args:
        checkpoint: The checkpoint. Without `path` the args.yaml beside it counts, then its own metadata (`convert`).
        path: The run's args.yaml.

    Returns:
        Arguments of train.py, or None if nothing tells them.

    Raises:
        CommandError: If the file is not an args.yaml of train.py.
    """
    beside = checkpoint.with_name('args.yaml')
    if path is None and not beside.is_file():
        if checkpoint.suffix != '.safetensors' or not checkpoint.is_file():
            return None
        try:
            with safe_open(checkpoint, framework='pt') as f:
                return json.loads((f.metadata() or {}).get(METADATA_KEY, 'null'))
        except Exception:  # a damaged file, whose weights cannot be read either: `load_checkpoint` says it better
            return None
    path = path or beside
    try:
        arguments = yaml.safe_load(path.read_text(encoding='utf-8'))
        dict(arguments, model=str(arguments['model']), model_kwargs=dict(arguments.get('model_kwargs') or {}))
    except (OSError, TypeError, ValueError, KeyError, AttributeError, yaml.YAMLError) as e:
        raise CommandError(f'{path} is not an args.yaml of train.py: {first_line(e)}') from e
    return arguments


def _source_config(name: str) -> Tuple[str, Dict[str, Any]]:
    """Architecture and model arguments in the config.json of an `hf-hub:` or `local-dir:` name."""
    source, _, location = name.partition(':')
    if source == 'local-dir':
        config = json.loads((Path(location) / 'config.json').read_text(encoding='utf-8'))
        return config['architecture'], config.get('model_args') or {}
    _, arch, model_args = load_model_config_from_hf(location)
    return arch, model_args or {}


def load_trained(
        name: str,
        checkpoint: Path,
        use_ema: bool = False,
        run_args_path: Optional[Path] = None,
        model_kwargs: Optional[Dict[str, Any]] = None,
) -> TrainedModel:
    """Create the network that a checkpoint was trained as, with the checkpoint's weights.

    The model name, arguments and config are those of the training run if its args.yaml (or the metadata of a converted
    file) tells them. The number of classes is that of the checkpoint.

    Args:
        name: Architecture that is expected, with or without a tag.
        checkpoint: Checkpoint of train.py, of the official code, or converted.
        use_ema: Use the checkpoint's EMA weights.
        run_args_path: args.yaml of the run, by default the one beside the checkpoint.
        model_kwargs: Model arguments that replace those of the run.

    Raises:
        CommandError: If a file cannot be read, or the checkpoint does not fit the architecture and its arguments.
    """
    arch = get_arch_name(name)
    run_args = read_run_args(checkpoint, run_args_path)
    kwargs: Dict[str, Any] = {}
    if run_args:
        name = run_args['model']
        trained_arch = get_arch_name(name)
        if ':' in name:
            try:
                trained_arch, kwargs = _source_config(name)
            except Exception as e:  # of the Hub client, of JSON or of the file system
                raise CommandError(
                    f'The training run of {checkpoint} started from {name}, whose config.json cannot be read: '
                    f'{first_line(e)}. Make it available again, or move args.yaml away and pass --model-kwargs and all '
                    'of --img-size, --interpolation, --crop-pct, --mean and --std.') from e
        if trained_arch != arch:
            raise CommandError(f'{checkpoint} was trained as {trained_arch}, not as {arch}. Name {trained_arch} instead.')
        if run_args.get('gp'):
            kwargs['global_pool'] = run_args['gp']  # train.py's --gp
        kwargs.update(run_args.get('model_kwargs') or {})
    kwargs.update(model_kwargs or {})

    state_dict = load_checkpoint(checkpoint, use_ema)
    cfg: Any = get_pretrained_cfg(str(kwargs.get('base') or arch), allow_unregistered=True)
    weights = {
        what: state_dict.get(f'{layer}.weight')
        for what, layer in (('classifier', cfg and cfg.classifier or 'fc'), ('first_conv', cfg and cfg.first_conv))}
    if weights['first_conv'] is None:
        weights['first_conv'] = state_dict.get('conv1.0.weight')  # a deep stem of ResNet
    kwargs['num_classes'] = len(weights['classifier']) if getattr(weights['classifier'], 'ndim', 0) == 2 else 0
    if run_args and ('in_chans' in run_args or 'input_size' in run_args):
        kwargs['in_chans'] = run_args.get('in_chans') or (run_args.get('input_size') or (3,))[0]
    elif getattr(weights['first_conv'], 'ndim', 0) == 4:
        kwargs['in_chans'] = weights['first_conv'].shape[1]
    hint = '' if run_args else ' There is no args.yaml beside it: pass the model arguments by --model-kwargs.'
    try:
        with torch.device('meta'):
            model: Any = create_model(name, **kwargs)
    except Exception as e:  # a foreign constructor can raise any
        raise CommandError(f'{arch} cannot be created with {kwargs}: {first_line(e)}') from e
    is_sepool = any(isinstance(module, SEPoolModule) for module in model.modules())
    if is_sepool and not any('.se.' in k or '.fc_reduction.' in k for k in state_dict):
        raise CommandError(
            f'{checkpoint} has the weights of a network without a squeeze, not of {arch}. Load them as a donor: '
            'pretrained_cfg_overlay=dict(file=...), or --pretrained-path of train.py.')
    try:
        if is_sepool:
            state_dict = checkpoint_filter_fn(state_dict, model)
        # contiguous: a channels_last training saves its weights in that format, which safetensors refuses
        model.load_state_dict({k: v.contiguous() for k, v in state_dict.items()}, strict=True, assign=True)
    except RuntimeError as e:
        raise CommandError(f'{checkpoint} does not fit {arch}: {" ".join(str(e).split())[:600]}{hint}') from e
    return TrainedModel(model, kwargs, run_args)


def training_preprocessing(
        model: nn.Module,
        run_args: Optional[Dict[str, Any]],
        flags: Dict[str, Any],
        checkpoint: Union[Path, str],
) -> Dict[str, Any]:
    """Preprocessing that train.py validated a checkpoint with: flags, then the run's arguments, then the model's config.

    Args:
        model: The network, as `load_trained` creates it.
        run_args: Arguments of the training run.
        flags: img_size, interpolation, crop_pct, mean, std, as far as the user gives them.
        checkpoint: Name for messages.

    Returns:
        The entries PREPROCESSING of a pretrained cfg.

    Raises:
        CommandError: If the run's preprocessing is not known, or is invalid.
    """
    if 'interpolation' not in (run_args or {}) and not flags.keys() >= {*PREPROCESSING_FLAGS}:
        raise CommandError(
            f'The preprocessing of {checkpoint} is not known. Put the args.yaml of its training run beside it, name it '
            'by --args, or pass all of --img-size, --interpolation, --crop-pct, --mean and --std.')
    # as train.py and validate.py resolve it
    args = {**(run_args or {}), 'in_chans': model.in_chans, 'chans': None, **flags}
    if 'img_size' in flags:
        args['input_size'] = None
    try:
        resolved = resolve_data_config(args, model=model)
        create_transform(**resolved)  # raises for most invalid values
    except Exception as e:  # timm asserts some
        raise CommandError(f'The preprocessing of {checkpoint} is invalid: {first_line(e)}') from e
    if min(resolved['input_size']) < 1 or not 0 < flags.get('crop_pct', resolved['crop_pct']) <= 1:
        raise CommandError(f'The preprocessing of {checkpoint} is invalid: {({**resolved, **flags})}')
    return {k: resolved[k] for k in PREPROCESSING if k in resolved}


def read_results(path: Path, arch: str, preprocessing: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Read the accuracies of a network from a results file of timm's validate.py.

    Rows of other networks are skipped. A row counts if its model is `arch`, or a `local-dir:` folder or `hf-hub:`
    repository that holds `arch`.

    Args:
        path: Results file (CSV).
        arch: The network's architecture.
        preprocessing: Entries of the pretrained cfg that will be published, which the rows must agree with.

    Returns:
        A dict of img_size (px), top1 and top5 (%) for every row.

    Raises:
        CommandError: If the file cannot be read, has no row of this network, or has one of another preprocessing.
    """
    if not path.exists():
        raise CommandError(f'The results file {path} does not exist.')
    try:
        with open(path, newline='', encoding='utf-8-sig') as f:
            rows = [row for row in csv.DictReader(f) if _results_arch(row['model']) == arch]
        results = [dict(img_size=int(r['img_size']), top1=float(r['top1']), top5=float(r['top5'])) for r in rows]
        used = [
            dict(img_size=int(r['img_size']), crop_pct=float(r['crop_pct']), interpolation=r['interpolation'])
            for r in rows]
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise CommandError(
            f'{path} is not a results file of validate.py (CSV with the columns model, top1, top5, img_size, crop_pct '
            f'and interpolation): {first_line(e)}') from e
    if not results or not all(math.isfinite(r['top1']) and math.isfinite(r['top5']) for r in results):
        raise CommandError(f'{path} has no accuracy of {arch}.')
    published = [dict(
        img_size=preprocessing['input_size'][-1], crop_pct=preprocessing['crop_pct'],
        interpolation=preprocessing['interpolation'])]
    if preprocessing.get('test_input_size'):  # what validate.py takes by default
        published.append(dict(
            img_size=preprocessing['test_input_size'][-1],
            crop_pct=preprocessing.get('test_crop_pct') or preprocessing['crop_pct'],
            interpolation=preprocessing['interpolation']))
    for measured in used:
        if measured not in published:
            raise CommandError(
                f'{path} was measured with {_as_text(measured)}, but the config to publish says '
                f'{" or ".join(map(_as_text, published))}. Validate the folder that `push --dry-run FOLDER` writes: '
                'validate.py --model local-dir:FOLDER --pretrained.')
    return results


def _results_arch(name: str) -> str:
    """Architecture of a row's model, '' if it cannot be told."""
    if ':' not in name:
        return get_arch_name(name)
    try:
        return _source_config(name)[0]
    except Exception:  # of the Hub client, of JSON or of the file system: not a row that can be used
        return ''


def _as_text(preprocessing: Dict[str, Any]) -> str:
    return ', '.join(f'{k} {v}' for k, v in preprocessing.items())
