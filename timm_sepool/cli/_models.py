""" The models and their peers: names, sizes, and figures that others have published """
import argparse
import re
from difflib import get_close_matches
from typing import Any, Dict, List, NamedTuple, Tuple

from ._output import CommandError


class Row(NamedTuple):
    """A model of the paper's table."""
    model: str  # timm's name
    family: str
    params: int
    gmacs: float  # multiply-adds of convolutions and matrix products at 224 px, in 10^9
    claimed_top1_err: float  # ImageNet-1k, single crop, %
    claimed_top5_err: float
    kwargs: Dict[str, Any] = {}


_CBAM = dict(block_args=dict(attn_layer='cbam'))
# Parameters and GMACs are from `model_stats`. The errors are what the paper claims (Jin et al. 2022), not reproduced.
TABLE = (
    Row('resnet50', 'plain', 25_557_032, 4.089, 24.48, 7.49),
    Row('seresnet50', 'SE', 28_088_024, 4.092, 23.21, 6.60),
    Row('resnet50', 'CBAM', 28_073_576, 4.096, 22.65, 6.32, _CBAM),
    Row('spse_resnet50', 'SPSE', 28_480_728, 4.123, 22.40, 6.18),
    Row('rgse_resnet50', 'RGSE', 28_212_440, 4.092, 22.27, 6.15),
    Row('resnet101', 'plain', 44_549_160, 7.801, 23.28, 6.70),
    Row('seresnet101', 'SE', 49_326_872, 7.806, 22.35, 6.13),
    Row('resnet101', 'CBAM', 49_295_628, 7.813, 21.49, 5.68, _CBAM),
    Row('spse_resnet101', 'SPSE', 50_172_184, 7.909, 21.27, 5.66),
    Row('rgse_resnet101', 'RGSE', 49_555_736, 7.806, 21.24, 5.62),
    Row('resnet152', 'plain', 60_192_808, 11.514, 22.44, 6.37),
    Row('seresnet152', 'SE', 66_821_848, 11.520, 21.59, 5.74),
    Row('resnet152', 'CBAM', 66_775_984, 11.529, 21.37, 5.70, _CBAM),
    Row('spse_resnet152', 'SPSE', 68_066_520, 11.678, 21.16, 5.60),
    Row('rgse_resnet152', 'RGSE', 67_167_448, 11.520, 21.09, 5.58),
    Row('resnext50_32x4d', 'plain', 25_028_904, 4.230, 22.72, 6.44),
    Row('seresnext50_32x4d', 'SE', 27_559_896, 4.233, 21.89, 6.02),
    Row('resnext50_32x4d', 'CBAM', 27_545_448, 4.237, 21.91, 5.89, _CBAM),
    Row('spse_resnext50', 'SPSE', 27_952_600, 4.265, 21.42, 5.76),
    Row('rgse_resnext50', 'RGSE', 27_684_312, 4.233, 21.36, 5.72),
    Row('resnext101_32x4d', 'plain', 44_177_704, 7.970, 21.53, 5.77),
    Row('seresnext101_32x4d', 'SE', 48_955_416, 7.975, 21.18, 5.67),
    Row('resnext101_32x4d', 'CBAM', 48_924_172, 7.981, 21.10, 5.58, _CBAM),
    Row('spse_resnext101', 'SPSE', 49_800_728, 8.078, 20.71, 5.45),
    Row('rgse_resnext101', 'RGSE', 49_184_280, 7.975, 20.67, 5.43),
)

# (image size in px, top-1, top-5 accuracy in %) of the donors, as timm publishes them
DONOR_RESULTS = {
    'timm/resnet50.a1_in1k': ((224, 80.382, 94.598), (288, 81.240, 95.112)),
    'timm/resnet101.a1h_in1k': ((224, 81.950, 95.760), (288, 82.796, 96.324)),
    'timm/resnet152.a1h_in1k': ((224, 82.818, 96.124), (288, 83.494, 96.522)),
    'timm/resnext50_32x4d.a1h_in1k': ((224, 81.140, 95.320), (288, 82.016, 95.934)),
    'timm/resnext101_32x4d.gluon_in1k': ((224, 80.336, 94.908),),
}
RESULTS_URL = 'https://github.com/huggingface/pytorch-image-models/blob/main/results/results-imagenet.csv'


class Spec(NamedTuple):
    """A model as users of `bench` and `compare` name it: [LABEL=]NAME[+ATTN][,KEY=VALUE...]."""
    label: str  # can be a file name
    name: str  # timm's, with or without tag
    attention: str
    kwargs: Dict[str, Any]  # model arguments


def parse_spec(text: str) -> Spec:
    """Parse the name of a model with its attention and arguments. Raises CommandError if timm has no such model."""
    from timm.models import is_model, list_models
    from timm.utils import ParseKwargs

    parts, depth = [''], 0
    for char in text:
        depth += (char in '([{') - (char in ')]}')
        if char == ',' and depth == 0:
            parts.append('')
        else:
            parts[-1] += char
    label, _, name = parts[0].rpartition('=')
    name, _, attention = name.partition('+')
    if not is_model(name):
        raise unknown_model(name, list_models())
    namespace = argparse.Namespace()
    try:
        ParseKwargs([], 'kwargs')(None, namespace, parts[1:])
    except ValueError as e:
        raise CommandError(f'{text!r} is not [LABEL=]NAME[+ATTN][,KEY=VALUE...].') from e
    label = re.sub(r'[^\w.+-]+', '-', label or text, flags=re.ASCII).strip('.-')
    if not label:
        raise CommandError(f'The label of {text!r} needs letters or digits, because it names a folder.')
    return Spec(label, name, attention, namespace.kwargs)


def unknown_model(name: str, known: List[str]) -> CommandError:
    """Error for a model name that does not exist, which names the closest one that does."""
    closest = get_close_matches(name.replace('_32x4d', ''), known, n=1, cutoff=0.8)
    if closest:
        return CommandError(f'Unknown model {name!r}. Did you mean {closest[0]!r}?')
    choice = f'Choose one of: {", ".join(known)}.' if len(known) <= 30 else 'timm.list_models() lists all names.'
    return CommandError(f'Unknown model {name!r}. {choice}')


def check_model(name: str) -> str:
    """Architecture of a model name, with or without a tag. Raises CommandError if this package does not have it."""
    from timm.models import get_arch_name, list_models

    arch = get_arch_name(name)
    models = list_models(module='sepool_resnet') + ['adopted']
    tags = list_models(f'{arch}.*', module='sepool_resnet', include_tags=True)
    if name not in models + tags:
        raise unknown_model(name, tags or models)
    return arch


def create_on_meta(name: str, **kwargs) -> Any:
    """Create a model of timm on the meta device, without memory or weights."""
    from timm.models import create_model

    # timm 1.0.26 cannot build RegNets inside `with torch.device('meta')`
    return create_model(name, device='meta', **kwargs)


def model_stats(name: str, input_size: Tuple[int, int, int] = (3, 224, 224), **kwargs) -> Dict[str, Any]:
    """Sizes of any timm model for one image (C, H, W), counted without allocating memory or loading weights.

    Returns:
        params; gmacs, multiply-adds of convolutions and matrix products in 10^9; activations, number of elements that
        convolutions and linear layers put out; feature_shapes, (B, C, H, W) of every stage; unpooled_shape, of
        forward_features; num_features, size of an embedding.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    activations = 0

    def count(module, args, output) -> None:
        nonlocal activations
        activations += output.numel()

    model = create_on_meta(name, in_chans=input_size[0], **kwargs).eval()
    with torch.device('meta'), torch.no_grad():
        x = torch.empty(1, *input_size)
        hooks = [
            module.register_forward_hook(count) for module in model.modules()
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
        with FlopCounterMode(display=False) as flops:
            features = model.forward_features(x)
            model.forward_head(features)
        for hook in hooks:
            hook.remove()
        num_features = model.forward_head(features, pre_logits=True).shape[-1]
        intermediates = model.forward_intermediates(x, intermediates_only=True)
    return dict(
        params=sum(p.numel() for p in model.parameters()),
        gmacs=flops.get_total_flops() / 2e9,
        activations=activations,
        feature_shapes=[list(f.shape) for f in intermediates],
        unpooled_shape=list(features.shape),
        num_features=num_features,
    )
