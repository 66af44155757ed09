""" The paper's formulas written out, independent of the package: every pooling and every convolution on its own """
from typing import List

import torch
import torch.nn.functional as F

from timm_sepool.squeeze import SPSEModule


def weighted_sum(x: torch.Tensor, weights: List[torch.Tensor]) -> torch.Tensor:
    """What `spatial_weighted_sum` computes (B, C, 1, 1)."""
    return sum(F.conv2d(F.adaptive_avg_pool2d(x, w.shape[-1]), w, groups=x.shape[1]) for w in weights)


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """An SPSEModule or RGSEModule with nothing at its trivial value."""
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn_like(p)
        if isinstance(module.bn, torch.nn.BatchNorm2d):
            module.bn.running_mean.normal_(std=0.1)
            module.bn.running_var.uniform_(0.05, 0.2)
    return module


def squeeze_gate(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Gate (B, C, 1, 1) of an SPSEModule or RGSEModule by its parameters."""
    p, bn = dict(module.named_parameters()), module.bn
    if isinstance(module, SPSEModule):
        s = weighted_sum(x, [p['weight1'], p['weight2'], p['weight4']])
        s = s + (p['bias1'] + p['bias2'] + p['bias4']).view(1, -1, 1, 1)
    else:
        s = weighted_sum(x, [p['weight']]) if module.grid > 1 else F.adaptive_avg_pool2d(x, 1)
    if isinstance(bn, torch.nn.BatchNorm2d):
        s = F.batch_norm(s, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, bn.momentum, bn.eps)
    s = F.conv2d(s.relu(), p['fc1.weight'], p['fc1.bias']).relu()
    return F.conv2d(s, p['fc2.weight'], p['fc2.bias']).sigmoid()
