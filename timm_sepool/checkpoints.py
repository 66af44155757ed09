""" Checkpoints -> the state dict of an SPSE / RGSE network

A checkpoint is renamed, converted and checked as a whole before any of it is loaded.
"""
import os
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import Any, Dict, Iterable, List, NoReturn, Union

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn

# The module, not its names: see sepool_resnet.py, which imports this file in the same way.
from . import squeeze

# official name -> timm's, in this order
_OFFICIAL_KEYS = (
    (r'^layer(\d)\.layer\d_block_(\d+)\.', r'layer\1.\2.'),
    (r'\.(?:conv|bn)_((?:conv|bn)\d\.)', r'.\1'),
    (r'\.shortcut\.shortcut_conv\.', '.downsample.0.'),
    (r'\.shortcut\.shortcut_bn\.', '.downsample.1.'),
    (r'\.(?:fc_spatial\.bn_spatial|fc_bn)\.', '.se.bn.'),
    (r'\.fc_spatial\.fc_spatial\.weight$', '.se.weight'),
    (r'\.fc_spatial([124])\.(weight|bias)$', r'.se.\2\1'),
    (r'\.fc_reduction\.', '.se.fc1.'),
    (r'\.fc_extention\.', '.se.fc2.'),
)


class CheckpointError(RuntimeError):
    """The checkpoint does not fit the model. The message names the model; the caller adds the source."""


def _is_weight(key: str, value: Any, max_bytes: int) -> bool:
    """Whether an entry can be loaded unchanged as a parameter or buffer of at most max_bytes.

    Loading would cast integers, complex numbers, 8-bit floats and quantized codes to other values. A view that repeats
    the few numbers of a small file can take any amount of memory.
    """
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return (
        torch.is_tensor(value) and value.layout == torch.strided and not value.is_meta
        and (value.dtype in dtypes or 'num_batches_tracked' in key)
        and value.numel() * value.element_size() <= max(value.untyped_storage().nbytes(), max_bytes)
    )


def _convert_donor(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Make a model compute exactly what its donor does: every gate is sigmoid(0) = 1/2, and a doubled bn3 undoes it.

    fc2 is zero and learns from the first step on, the squeeze and fc1 keep the model's initialization and learn from
    the second. Tensors of attention other than SE, SPSE and RGSE, or of a gate that is not 1/2 at zero, stay missing.
    """
    out = dict(state_dict)
    for name, module in model.named_modules():
        weight, bias = (f'{name.rpartition(".")[0]}.bn3.{key}' for key in ('weight', 'bias'))
        is_half = isinstance(module, squeeze.SEPoolModule) and module.gate(torch.zeros(1, device='cpu')).item() == 0.5
        if is_half and weight in out and bias in out:
            out.update({weight: 2 * out[weight], bias: 2 * out[bias]})
            for key, value in module.state_dict().items():
                out[f'{name}.{key}'] = torch.zeros_like(value) if key.startswith('fc2.') else value
    return out


def _listed(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return shorten(', '.join(keys[:2]), 120) + (f' and {len(keys) - 2} more' if len(keys) > 2 else '')


def _find_faults(state_dict: Dict[str, torch.Tensor], names: List[str], model: nn.Module, strict: bool) -> List[str]:
    """Compare a converted state dict with the model's own.

    With features_only or another num_classes, timm itself would load a part of another architecture's weights.
    """
    # the shapes, without the classifier and the input channels, which timm adapts after this
    theirs, ours = (
        {k: v.shape[:1] + v.shape[2:] if k in ('conv1.weight', 'conv1.0.weight') else v.shape
         for k, v in tensors.items() if not k.startswith('fc.')}
        for tensors in (state_dict, model.state_dict())
    )
    faults = {
        'missing tensors': ours.keys() - theirs.keys() if strict else (),
        'unexpected tensors': theirs.keys() - ours.keys(),
        'tensors of another shape': [k for k in ours.keys() & theirs.keys() if ours[k] != theirs[k]],
        'tensors with NaN or infinity': [k for k, v in state_dict.items() if not v.is_meta and not v.isfinite().all()],
        'tensors named twice': [k for k, count in Counter(names).items() if count > 1 and k in state_dict],
    }
    found = [f'{fault}: {_listed(keys)}' for fault, keys in faults.items() if keys]
    # timm replaces the classifier if num_classes is not the config's, so it must have the size of either. A negative
    # number in the config (train.py's --pretrained-path) means that any classifier is replaced.
    classes = next(iter(state_dict['fc.weight'].shape), 0) if 'fc.weight' in state_dict else None
    expected = getattr(model, 'pretrained_cfg', {}).get('num_classes', model.num_classes)
    if classes not in (None, model.num_classes, expected) and (expected or 0) >= 0:
        found.append(f'a classifier of {classes} classes instead of {expected}')
    return found


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module, strict: bool = True) -> Dict[str, torch.Tensor]:
    """Convert a checkpoint to the model's own state dict for `model.load_state_dict`, and check it.

    Args:
        state_dict: State dict of this package (its tensors are returned unchanged), of the paper's official code, or of
            the plain timm ResNet with the same layers (a donor: the network will compute exactly what it computes). It
            may be inside `{'state_dict': ...}`, have DataParallel's `module.` prefixes and lack `num_batches_tracked`.
        model: The model to load it into. Only the classifier and the first conv's input channels may differ.
        strict: Refuse missing and unexpected tensors. Otherwise they are left to `load_state_dict(strict=False)`.

    Raises:
        CheckpointError: A RuntimeError, if the checkpoint is damaged, not finite, or of another architecture or number
            of classes.
    """
    if isinstance(state_dict.get('state_dict', None), dict):
        state_dict = state_dict['state_dict']
    name = getattr(model, 'pretrained_cfg', {}).get('architecture') or type(model).__name__
    own = model.state_dict()
    is_official = any('.fc_reduction.' in str(k) for k in state_dict)
    names = [str(k).removeprefix('module.') for k in state_dict]
    for pattern, repl in _OFFICIAL_KEYS if is_official else ():
        names = [re.sub(pattern, repl, n) for n in names]
    out = dict(zip(names, state_dict.values()))
    ignored = {} if strict else {k: out.pop(k) for k in list(out) if k not in own}

    max_bytes = max(8 * v.numel() for v in own.values())
    if unfit := [k for k, v in out.items() if not _is_weight(k, v, max_bytes)]:
        raise CheckpointError(
            f'The checkpoint is not a state dict of {name} (not dense tensors of 16, 32 or 64-bit floats: '
            f'{_listed(unfit)}). Use a checkpoint that holds weights by name, as model.state_dict() does.'
        )
    for k in out if is_official else ():  # its fc1 and fc2 are linear layers, ours 1x1 convolutions
        if re.search(r'\.se\.fc[12]\.weight$', k) and out[k].ndim == 2:
            out[k] = out[k][:, :, None, None]
    if not any('.se.' in k for k in out):
        out = _convert_donor(out, model)
    for k in own:
        if k.endswith('.num_batches_tracked'):
            out.setdefault(k, torch.zeros((), dtype=torch.long, device='cpu'))
    if faults := _find_faults(out, names, model, strict):
        raise CheckpointError(
            f'The checkpoint does not fit {name} ({"; ".join(faults)}). Use an undamaged checkpoint of {name} with '
            'the same model arguments, or of the plain backbone with the same layers.'
        )
    return {**out, **ignored}


def raise_loading_error(error: Exception, model: nn.Module, cache_dir: Union[None, str, Path] = None) -> NoReturn:
    """Raise a RuntimeError that says why timm could not load a model's weights and what to do, from timm's error.

    If the model's config names no weights, that error is raised unchanged.
    """
    cfg: Dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    source = 'the given state dict' if cfg.get('state_dict') else cfg.get('file') or cfg.get('hf_hub_id')
    if not source:
        raise error
    advice, hint = 'Check the path, use an undamaged checkpoint, or pretrained=False.', ''
    if source == cfg.get('hf_hub_id'):
        advice = (
            'Check the name and the network connection (and your access to the repository), name a file on disk with '
            "pretrained_cfg_overlay=dict(file='...'), or use pretrained=False.")
        # the Hub client does not verify downloads and reuses damaged cached files
        repo_id, _, revision = source.partition('@')
        file = cfg.get('hf_hub_filename') or 'model.safetensors'
        with suppress(HFValidationError):  # the reason is then that repo_id is not a repository's name
            path = try_to_load_from_cache(repo_id, file, cache_dir=cache_dir, revision=revision or None)
            hint = f' If the download is damaged, remove {os.path.realpath(path)}.' if isinstance(path, str) else ''
    reason = f'{error}'  # of a CheckpointError, which says what to do
    if not isinstance(error, CheckpointError):
        reason = shorten(f'{type(error).__name__}: {error}', 300).rstrip('.: ') + f'. {advice}'
    raise RuntimeError(
        f'The pretrained weights of {cfg["architecture"]} cannot be loaded from {source}: {reason}{hint}') from error
