""" The paper's formulas written out, independent of the package: every pooling and every convolution on its own """
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F

from timm_sepool.squeeze import SPSEModule


def weighted_sum(x: torch.Tensor, weights: List[torch.Tensor]) -> torch.Tensor:
    """What `spatial_weighted_sum` stands for (B, C, 1, 1)."""
    return sum(F.conv2d(F.adaptive_avg_pool2d(x, w.shape[-1]), w, groups=x.shape[1]) for w in weights)


def squeeze_sum(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Fused descriptor (B, C, 1, 1) of an SPSEModule or RGSEModule before its norm, by its parameters."""
    p = dict(module.named_parameters())
    if isinstance(module, SPSEModule):
        bias = p['bias1'] + p['bias2'] + p['bias4']
        return weighted_sum(x, [p['weight1'], p['weight2'], p['weight4']]) + bias.view(1, -1, 1, 1)
    return weighted_sum(x, [p['weight']]) if module.grid > 1 else F.adaptive_avg_pool2d(x, 1)


def squeeze_descriptor(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Fused descriptor (B, C, 1, 1)."""
    s, bn = squeeze_sum(module, x), module.bn
    if isinstance(bn, torch.nn.BatchNorm2d):
        s = F.batch_norm(s, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, bn.momentum, bn.eps)
    return s.relu()


def squeeze_gate(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Gate (B, C, 1, 1)."""
    p = dict(module.named_parameters())
    s = squeeze_descriptor(module, x)
    s = F.conv2d(s, p['fc1.weight'], p['fc1.bias']).relu()
    return F.conv2d(s, p['fc2.weight'], p['fc2.bias']).sigmoid()


def resnet(
        p: Dict[str, torch.Tensor],
        x: torch.Tensor,
        family: str,
        layers: Tuple[int, ...],
        cardinality: int = 1,
) -> torch.Tensor:
    """Logits of an SPSE / RGSE ResNet in train mode (batch statistics), from its parameters by timm's names."""
    def bn(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.batch_norm(x, None, None, p[f'{name}.weight'], p[f'{name}.bias'], training=True)

    def depthwise(x: torch.Tensor, grid: int, weight: str, bias: Optional[str] = None) -> torch.Tensor:
        x = F.adaptive_avg_pool2d(x, grid)
        return F.conv2d(x, p[weight], p[bias] if bias else None, groups=x.shape[1])

    x = F.max_pool2d(bn(F.conv2d(x, p['conv1.weight'], stride=2, padding=3), 'bn1').relu(), 3, 2, 1)
    for stage, (num_blocks, grid) in enumerate(zip(layers, (8, 4, 2, 1)), start=1):
        for block in range(num_blocks):
            name = f'layer{stage}.{block}'
            stride = 2 if stage > 1 and block == 0 else 1
            y = bn(F.conv2d(x, p[f'{name}.conv1.weight']), f'{name}.bn1').relu()
            y = F.conv2d(y, p[f'{name}.conv2.weight'], stride=stride, padding=1, groups=cardinality)
            y = bn(F.conv2d(bn(y, f'{name}.bn2').relu(), p[f'{name}.conv3.weight']), f'{name}.bn3')
            if family == 'spse':
                s = sum(depthwise(y, g, f'{name}.se.weight{g}', f'{name}.se.bias{g}') for g in (1, 2, 4))
                s = bn(s, f'{name}.se.bn')
            elif grid > 1:
                s = bn(depthwise(y, grid, f'{name}.se.weight'), f'{name}.se.bn')
            else:
                s = F.adaptive_avg_pool2d(y, 1)
            s = F.conv2d(s.relu(), p[f'{name}.se.fc1.weight'], p[f'{name}.se.fc1.bias']).relu()
            gate = F.conv2d(s, p[f'{name}.se.fc2.weight'], p[f'{name}.se.fc2.bias']).sigmoid()
            if f'{name}.downsample.0.weight' in p:
                x = bn(F.conv2d(x, p[f'{name}.downsample.0.weight'], stride=stride), f'{name}.downsample.1')
            x = (y * gate + x).relu()
    return F.linear(x.mean((2, 3)), p['fc.weight'], p['fc.bias'])
