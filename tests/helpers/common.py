""" Names and builders shared by the tests """
import os
import zlib
from pathlib import Path
from typing import Dict, Tuple

import numpy as np
import safetensors.torch
import torch
from torch import nn

from helpers.hub_server import HubServer
from timm import create_model

FULL = bool(os.environ['TIMM_SEPOOL_FULL_TESTS'])  # pytest --full

# exact, from the official code
PARAMS = {
    'rgse_resnet50': 28_212_440, 'rgse_resnet101': 49_555_736, 'rgse_resnet152': 67_167_448,
    'rgse_resnext50': 27_684_312, 'rgse_resnext101': 49_184_280,
    'spse_resnet50': 28_480_728, 'spse_resnet101': 50_172_184, 'spse_resnet152': 68_066_520,
    'spse_resnext50': 27_952_600, 'spse_resnext101': 49_800_728,
}
NAMES = list(PARAMS)
TINY = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128))
GOLDEN = np.load(Path(__file__).parents[1] / 'data' / 'official.npz')


def official_state_dict(name: str) -> Dict[str, torch.Tensor]:
    """The checkpoint whose logits the official code computed for the golden file, by the file's recipe."""
    state_dict = {}
    for key, shape in zip(GOLDEN[f'{name}/keys'].tolist(), GOLDEN[f'{name}/shapes'].tolist()):
        shape = tuple(int(n) for n in shape.split(',') if n)
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        if key.endswith('num_batches_tracked'):
            value = np.zeros(shape, dtype=np.int64)
        elif key.endswith(('running_mean', 'bias')):
            value = 0.1 * rng.standard_normal(shape)
        elif len(shape) == 1:
            value = rng.uniform(0.5, 1.5, shape) * (0.2 if key.endswith('bn_bn3.weight') else 1.)
        else:
            value = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        state_dict[key] = torch.from_numpy(np.asarray(value))
    return state_dict


def tiny(name: str, **kwargs) -> nn.Module:
    """A small network of the same code with nothing at its trivial value, in eval mode."""
    return realistic(create_model(name, **{**TINY, 'num_classes': 10, **kwargs}), bn3=(0.5, 1.5)).eval()


def images(batch: int, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    chans, height, width = size if len(size) == 3 else (3, *size)
    return torch.randn(batch, chans, height, width, dtype=dtype, generator=torch.Generator().manual_seed(1))


def training_step(model: nn.Module, x: torch.Tensor) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
    """Loss and gradients by name of one step on labels 0, 1, ..."""
    loss = nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 10)
    params = dict(model.named_parameters())
    return loss.detach(), dict(zip(params, torch.autograd.grad(loss, list(params.values()))))


def realistic(model: nn.Module, bn3: Tuple[float, float] = (0.1, 0.3)) -> nn.Module:
    """Norms as after training: no statistic and no affine parameter at its initial value."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(*bn3 if name.endswith('bn3') else (0.5, 1.5))
                module.bias.normal_(std=0.1)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.num_batches_tracked.fill_(1000)
    return model


def serve_donor(hub: HubServer, name: str, **kwargs) -> None:
    """A donor of this name with random weights, as the real repositories have it: safetensors and config."""
    model = realistic(create_model(name.split('.')[0], **kwargs))
    hub.add(f'timm/{name}', {'model.safetensors': safetensors.torch.save(model.state_dict())})
