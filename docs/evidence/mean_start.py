""" timm-sepool and timm's train.py with three more models: rgse_mean and spse_mean start as a mean, se_norm stays one

    python docs/evidence/mean_start.py compare --train-script docs/evidence/mean_start.py ...

is `timm-sepool compare` with them. Its runs call this file, which starts the train.py in the folder $TIMM_SCRIPTS. The
models are rgse_resnet50 and spse_resnet50 with every kernel of the fusion at 1 / g^2 instead of random. All other
weights are drawn as before. se_norm is rgse_mean whose kernels are not trained: an SE network with the norm of RGSE.
"""
import os
import runpy
import sys

from torch import nn

import timm
from timm.models import register_model
from timm_sepool.cli.main import main
from timm_sepool.squeeze import SEPoolModule


def _create(name: str, pretrained: bool, kwargs) -> nn.Module:
    model = timm.model_entrypoint(name)(pretrained, **kwargs)
    for module in model.modules():
        if isinstance(module, SEPoolModule):
            for key, param in module.named_parameters(recurse=False):
                if key.startswith('weight'):
                    nn.init.constant_(param, 1 / param[0].numel())
    return model


@register_model
def rgse_mean(pretrained: bool = False, **kwargs) -> nn.Module:
    return _create('rgse_resnet50', pretrained, kwargs)


@register_model
def se_norm(pretrained: bool = False, **kwargs) -> nn.Module:
    model = rgse_mean(pretrained, **kwargs)
    for name, param in model.named_parameters():
        param.requires_grad = not name.endswith('.se.weight')
    return model


@register_model
def spse_mean(pretrained: bool = False, **kwargs) -> nn.Module:
    return _create('spse_resnet50', pretrained, kwargs)


if __name__ == '__main__':
    if sys.argv[1] == 'compare':
        sys.exit(main())
    runpy.run_path(os.path.join(os.environ['TIMM_SCRIPTS'], 'train.py'), run_name='__main__')
