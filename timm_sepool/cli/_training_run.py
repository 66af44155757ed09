""" What a training run leaves behind: its checkpoint, its args.yaml and the results of validate.py, each read here """
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
from timm.models import clean_state_dict, get_arch_name, get_pretrained_cfg, load_model_config_from_hf

from ..checkpoints import checkpoint_filter_fn
from ..squeeze import SEPoolModule
from ._arguments import PREPROCESSING_FLAGS
from ._models import create_on_meta
from ._output import CommandError, first_line

PREPROCESSING = ('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')
# entry in the metadata of a converted file: what `push` and `plot` need of its args.yaml, as JSON
METADATA_KEY = 'timm_sepool.args'
HOW_TO_VALIDATE = (
    'Validate the folder that `push --dry-run FOLDER` writes: validate.py --model local-dir:FOLDER --pretrained.')


class TrainedModel(NamedTuple):
    """A network with the weights of a checkpoint."""
    model: nn.Module
    model_kwargs: Dict[str, Any]  # arguments it was created with
    run_args: Optional[Dict[str, Any]]  # arguments of its training run, None if nothing tells


def load_checkpoint(path: Path, use_ema: bool = False) -> Dict[str, Any]:
    """Read the state dict of a safetensors file or of a pickled checkpoint, without running the pickle's code.

    Raises CommandError if the file is missing, damaged, would execute code, or has no (EMA) state dict.
    """
    try:
        if path.suffix == '.safetensors':
            checkpoint = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's checkpoints hold train.py's arguments
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
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    found = next((entries[k] for k in keys if isinstance(entries.get(k), dict)), None)
    if use_ema and found is None:
        raise CommandError(f'{path} has no EMA weights. Leave out --use-ema, or train with --model-ema.')
    state_dict = checkpoint if found is None else found
    if not isinstance(state_dict, dict) or not state_dict or not all(
            isinstance(k, str) and torch.is_tensor(v) for k, v in state_dict.items()):
        raise CommandError(
            f'{path} has no state dict (tensors by name). Save one with torch.save or safetensors.torch.save_file.')
    return clean_state_dict(state_dict)


def _read_metadata(checkpoint: Path) -> Optional[Dict[str, Any]]:
    """What `convert` has kept of the training run in a safetensors file, None if there is nothing."""
    if checkpoint.suffix != '.safetensors' or not checkpoint.is_file():
        return None
    try:
        with safe_open(checkpoint, framework='pt') as f:
            return json.loads((f.metadata() or {}).get(METADATA_KEY, 'null'))
    except Exception:  # `load_checkpoint` has a better message for a damaged file
        return None


def read_run_args(checkpoint: Path, path: Optional[Path] = None) -> Optional[Dict[str, Any]]:
    """Arguments of train.py from `path`, or from a converted checkpoint's metadata, or from the args.yaml beside it.

    Metadata without the preprocessing counts only where there is no args.yaml. Returns None if nothing tells them.
    Raises CommandError if the file is not an args.yaml of train.py.
    """
    if path is None:
        beside = checkpoint.parent / 'args.yaml'  # with_name fails for '.'
        metadata = _read_metadata(checkpoint)
        if 'interpolation' in (metadata or {}) or not beside.is_file():
            return metadata
        path = beside
    try:
        arguments = yaml.safe_load(path.read_text(encoding='utf-8'))
        return dict(arguments, model=str(arguments['model']), model_kwargs=dict(arguments.get('model_kwargs') or {}))
    except (OSError, TypeError, ValueError, KeyError, AttributeError, yaml.YAMLError) as e:
        raise CommandError(f'{path} is not an args.yaml of train.py: {first_line(e)}') from e


def _source_config(name: str) -> Tuple[str, Dict[str, Any]]:
    """Architecture and model arguments of a model name, read from config.json for `hf-hub:` and `local-dir:`."""
    source, _, location = name.partition(':')
    if not location:
        return get_arch_name(name), {}
    if source == 'local-dir':  # timm's function for it is not public in timm 1.0.26
        config = json.loads((Path(location) / 'config.json').read_text(encoding='utf-8'))
        return config['architecture'], config.get('model_args') or {}
    _, arch, model_args = load_model_config_from_hf(location)
    return arch, model_args or {}


def _run_model_kwargs(run_args: Dict[str, Any], arch: str, checkpoint: Path) -> Dict[str, Any]:
    """Model arguments of a training run. CommandError if it trained another architecture or its source is missing."""
    try:
        trained_arch, kwargs = _source_config(run_args['model'])
    except Exception as e:  # the Hub client, JSON and the file system raise many
        raise CommandError(
            f'The training run of {checkpoint} started from {run_args["model"]}, whose config.json cannot be read: '
            f'{first_line(e)}. Make it available again, or move args.yaml away and pass --model-kwargs and all of '
            '--img-size, --interpolation, --crop-pct, --mean and --std.') from e
    if trained_arch != arch:
        raise CommandError(f'{checkpoint} was trained as {trained_arch}, not as {arch}. Name {trained_arch} instead.')
    for option, name in (('gp', 'global_pool'), ('bn_eps', 'bn_eps')):  # options of train.py that change the output
        if run_args.get(option):
            kwargs[name] = run_args[option]
    return {**kwargs, **run_args['model_kwargs']}


def load_trained(
        name: str, checkpoint: Path, use_ema: bool = False, run_args_path: Optional[Path] = None,
        model_kwargs: Optional[Dict[str, Any]] = None,
) -> TrainedModel:
    """Create the network that a checkpoint was trained as, with the checkpoint's weights.

    Its config and arguments are those of the training run (`model_kwargs` replace some), its classes the checkpoint's.
    `name` is the architecture that is expected, `run_args_path` is what `read_run_args` takes. Raises CommandError if a
    file cannot be read, or the checkpoint does not fit the architecture and its arguments.
    """
    arch = get_arch_name(name)
    run_args = read_run_args(checkpoint, run_args_path)
    kwargs = _run_model_kwargs(run_args, arch, checkpoint) if run_args else {}
    kwargs.update(model_kwargs or {})
    if arch == 'adopted':
        kwargs.setdefault('base', 'seresnet50')  # the default of train.py, but a saved network has to name its base
    hint = '' if run_args or model_kwargs else ' No args.yaml is beside it: pass its model arguments by --model-kwargs.'

    state_dict = load_checkpoint(checkpoint, use_ema)
    try:
        cfg: Any = get_pretrained_cfg(str(kwargs.get('base') or arch))
        classifier: Any = state_dict.get(f'{cfg.classifier}.weight')
        first_conv: Any = state_dict.get(f'{cfg.first_conv}.weight', state_dict.get('conv1.0.weight'))  # a deep stem
        kwargs['num_classes'] = len(classifier) if getattr(classifier, 'ndim', 0) >= 2 else 0
        if run_args and ('in_chans' in run_args or 'input_size' in run_args):
            kwargs['in_chans'] = run_args.get('in_chans') or (run_args.get('input_size') or (3,))[0]
        elif getattr(first_conv, 'ndim', 0) == 4:
            kwargs['in_chans'] = first_conv.shape[1]
        model = create_on_meta(run_args['model'] if run_args else name, **kwargs)
    except Exception as e:  # a foreign constructor can raise any
        raise CommandError(f'{arch} cannot be created with {kwargs}: {first_line(e)}{hint}') from e
    is_sepool = any(isinstance(module, SEPoolModule) for module in model.modules())
    if is_sepool and arch != 'adopted' and not any('.se.' in k or '.fc_reduction.' in k for k in state_dict):
        raise CommandError(
            f'{checkpoint} has the weights of a network without a squeeze, not of {arch}. Load them as a donor: '
            'pretrained_cfg_overlay=dict(file=...), or --pretrained-path of train.py.')
    try:
        if is_sepool:
            state_dict = checkpoint_filter_fn(state_dict, model)
        # contiguous: a channels_last training saves its weights in that format, which safetensors refuses
        model.load_state_dict({k: v.contiguous() for k, v in state_dict.items()}, strict=True, assign=True)
    except RuntimeError as e:
        raise CommandError(f'{checkpoint}: {" ".join(str(e).split())[:600]}{hint}') from e
    return TrainedModel(model, kwargs, run_args)


def training_preprocessing(
        model: nn.Module, run_args: Optional[Dict[str, Any]], flags: Dict[str, Any], checkpoint: Union[Path, str],
) -> Dict[str, Any]:
    """Entries PREPROCESSING of a pretrained cfg, as train.py validated with: flags, run's arguments, model's config.

    `model` and `run_args` are those of `load_trained`, `flags` any of PREPROCESSING_FLAGS. Raises CommandError if the
    preprocessing is unknown or invalid.
    """
    if 'interpolation' not in (run_args or {}) and not flags.keys() >= {*PREPROCESSING_FLAGS}:
        raise CommandError(
            f'The preprocessing of {checkpoint} is not known. Put the args.yaml of its training run beside it, name it '
            'by --args, or pass all of --img-size, --interpolation, --crop-pct, --mean and --std.')
    chans: int = model.in_chans  # type: ignore[assignment]
    # train.py validates with the centre crop, whatever the config of the model says
    args = {**(run_args or {}), 'in_chans': chans, 'chans': None, 'crop_mode': 'center', **flags}
    if 'img_size' in flags:
        args['input_size'] = None
    try:
        resolved = resolve_data_config(args, model=model)
        for key in ('mean', 'std'):
            if len(resolved[key]) != chans:  # timm's loader then uses the average for every channel
                resolved[key] = (sum(resolved[key]) / len(resolved[key]),) * chans
        create_transform(**resolved)  # raises for most invalid values
    except Exception as e:  # timm asserts some
        raise CommandError(f'The preprocessing of {checkpoint} is invalid: {first_line(e)}') from e
    if min(resolved['input_size']) < 1 or not 0 < flags.get('crop_pct', resolved['crop_pct']) <= 1:
        raise CommandError(f'The preprocessing of {checkpoint} is invalid: {({**resolved, **flags})}')
    return {k: resolved[k] for k in PREPROCESSING}


def read_results(
        path: Path, arch: str, preprocessing: Dict[str, Any], weights: Optional[Dict[str, torch.Tensor]] = None,
) -> List[Dict[str, Any]]:
    """Read the accuracies of a network from a results file of timm's validate.py.

    A row counts if its model is `arch`, or a folder or repository that holds `arch`. `preprocessing` is the pretrained
    cfg and `weights` the state dict that will be published, None if it is drawn anew each time. Returns img_size (px),
    crop_pct, interpolation, top1 and top5 (%) of every row. Raises CommandError if the file has no row of this network,
    several of one size, one of another preprocessing, or one of a folder that holds other weights.
    """
    types = dict(img_size=int, crop_pct=float, interpolation=str, top1=float, top5=float)
    try:
        with open(path, newline='', encoding='utf-8-sig') as f:
            rows = [row for row in csv.DictReader(f) if _results_arch(row['model']) == arch]
        results = [{k: to_type(row[k]) for k, to_type in types.items()} for row in rows]
    except FileNotFoundError as e:
        raise CommandError(f'The results file {path} does not exist.') from e
    except (OSError, KeyError, TypeError, ValueError) as e:
        reason = f'it has no column {e}' if isinstance(e, KeyError) else first_line(e)
        raise CommandError(
            f'{path} is not a results file of validate.py (CSV with the columns model, {", ".join(types)}): {reason}'
        ) from e
    if not results or not all(math.isfinite(r['top1']) and math.isfinite(r['top5']) for r in results):
        raise CommandError(
            f'{path} has no accuracy of {arch}. A folder that it names (local-dir:) must still be where it was.')
    if len({r['img_size'] for r in results}) < len(results):
        raise CommandError(f'{path} has several rows of {arch} at one image size. Keep only those of these weights.')
    if weights:
        for name in {row['model'] for row in rows}:
            _check_measured(name, path, weights)
    published = [(preprocessing['input_size'][-1], preprocessing['crop_pct'], preprocessing['interpolation'])]
    if preprocessing.get('test_input_size'):  # what validate.py takes by default
        crop_pct = preprocessing.get('test_crop_pct') or preprocessing['crop_pct']
        published.append((preprocessing['test_input_size'][-1], crop_pct, preprocessing['interpolation']))
    as_text = 'img_size {}, crop_pct {}, interpolation {}'.format
    for measured in [(r['img_size'], r['crop_pct'], r['interpolation']) for r in results]:
        if measured not in published:
            raise CommandError(
                f'{path} was measured with {as_text(*measured)}, but the config to publish says '
                f'{" or ".join(as_text(*p) for p in published)}. {HOW_TO_VALIDATE}')
    return results


def _results_arch(name: str) -> str:
    try:
        return _source_config(name)[0]
    except Exception:  # the Hub client, JSON and the file system raise many; the row cannot be used
        return ''


def _check_measured(name: str, results: Path, weights: Dict[str, torch.Tensor]) -> None:
    """Raise CommandError if `name` is a folder (`local-dir:`) of other weights, or newer than the results.

    Only its safetensors file is compared. Raises as `load_checkpoint` too.
    """
    source, _, folder = name.partition(':')
    file = Path(folder, 'model.safetensors')
    if source != 'local-dir' or not file.is_file():
        return
    measured = load_checkpoint(file)
    if measured.keys() != weights.keys() or not all(torch.equal(t, weights[k]) for k, t in measured.items()):
        raise CommandError(
            f'{results} has the accuracy of {name}, whose weights are not those to publish. {HOW_TO_VALIDATE}')
    if file.stat().st_mtime > results.stat().st_mtime:
        raise CommandError(f'{results} is older than {file}, so it is of other weights. Validate {name} again.')
