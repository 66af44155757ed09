""" Object detection and instance segmentation: torchvision's Faster R-CNN and Mask R-CNN on a timm backbone with FPN

The detector, FPN and heads are torchvision's and the backbone is any timm network of sequential stages. So two networks
differ in nothing but the backbone, as in the paper's COCO experiments. Parameters have torchvision's names: its COCO
checkpoints load into a detector on timm's `resnet50`.

torchvision's reference scripts run unmodified on `fasterrcnn_` or `maskrcnn_` followed by a timm model name:

    python -m timm_sepool.detection train.py --model fasterrcnn_rgse_resnet50 --weights-backbone DEFAULT ...
    torchrun --nproc_per_node 8 -m timm_sepool.detection train.py ...

Papers / References:
- `Delving deep into spatial pooling for squeeze-and-excitation networks`
    (Jin et al., Pattern Recognition 121, 2022) - https://doi.org/10.1016/j.patcog.2021.108159
- `Feature Pyramid Networks for Object Detection` - https://arxiv.org/abs/1612.03144
- `Mask R-CNN` - https://arxiv.org/abs/1703.06870
"""
import argparse
import runpy
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any, Dict, Optional, Type

import torch
from torch import nn
from torchvision import models
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from timm import create_model, list_models
from timm.layers import freeze_batch_norm_2d
from timm.utils import freeze

from . import _private

__all__ = ['faster_rcnn', 'mask_rcnn', 'register_detectors']


class _FPNBackbone(nn.Module):
    """Features at strides 4, 8, 16 and 32 and an FPN over them, named as in torchvision's detectors."""

    out_channels = 256  # torchvision's detectors read it

    def __init__(self, body: Any):
        super().__init__()
        self.body = body
        channels = body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork(channels, self.out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Map x (B, C, H, W) to '0', '1', '2', '3' at strides 4 to 32 and 'pool' at 64, 256 channels each."""
        features: Dict[str, torch.Tensor] = OrderedDict()  # filled by a loop, the form that TorchScript takes
        for i, feature in enumerate(self.body(x)):
            features[str(i)] = feature
        return self.fpn(features)


def _build(
        detector: Type[FasterRCNN], backbone: str, num_classes: int, pretrained: bool, trainable_layers: int,
        freeze_bn: bool, backbone_kwargs: Optional[Dict[str, Any]], **kwargs,
) -> FasterRCNN:
    """A detector on a backbone with frozen norms and stages. Arguments and errors as of `faster_rcnn`."""
    if type(trainable_layers) is not int or trainable_layers not in range(6):
        raise ValueError(f'trainable_layers must be an integer from 0 to 5, got {trainable_layers!r}.')
    backbone_kwargs = backbone_kwargs or {}
    needed = 'Choose a backbone of four sequential NCHW stages at strides 4, 8, 16 and 32.'
    try:
        body: Any = create_model(
            backbone, pretrained, features_only=True, out_indices=(-4, -3, -2, -1), **backbone_kwargs)
    except (AssertionError, IndexError) as e:  # what timm raises for an index that is out of range
        raise ValueError(f'{backbone} has fewer than four stages ({e}). {needed}') from e
    if (strides := body.feature_info.reduction()) != [4, 8, 16, 32]:
        raise ValueError(f'{backbone} has its last four stages at strides {strides}. {needed}')
    output_fmt = getattr(body, 'output_fmt', 'NCHW')
    if not hasattr(body, 'return_layers') or output_fmt != 'NCHW':
        layout = 'stages with branches' if output_fmt == 'NCHW' else f'{output_fmt} features'
        raise ValueError(f'{backbone} has {layout} ({type(body).__name__}). {needed}')
    kwargs = {'image_mean': list(body.pretrained_cfg['mean']), 'image_std': list(body.pretrained_cfg['std']), **kwargs}
    chans = backbone_kwargs.get('in_chans', body.pretrained_cfg['input_size'][0])
    if {len(kwargs['image_mean']), len(kwargs['image_std'])} != {chans}:
        raise ValueError(f'{backbone} takes images of {chans} channels. Pass image_mean and image_std of this length.')

    if freeze_bn:
        body = freeze_batch_norm_2d(body)
    if trainable_layers < 5:
        # children are in the order of use: the stem, then four stages that end at the child that returns their features
        children = [name for name, _ in body.named_children()]
        ends = [children.index(name) + 1 for name in body.return_layers]
        freeze(body, children[:[ends[0] - 1, *ends][4 - trainable_layers]])
    return detector(_FPNBackbone(body), num_classes, **kwargs)


def faster_rcnn(
        backbone: str, num_classes: int = 91, pretrained: bool = False, trainable_layers: int = 3,
        freeze_bn: bool = True, backbone_kwargs: Optional[Dict[str, Any]] = None, **kwargs,
) -> FasterRCNN:
    """Constructs torchvision's Faster R-CNN with FPN on a timm backbone.

    Images are normalized with the mean and std of the backbone's pretrained cfg. The defaults suit the fine-tuning of
    pretrained weights and work with one image per device. To train from scratch pass `trainable_layers=5` and
    `freeze_bn=False`: the frozen norms of an untrained network are identities, or zero a branch.

    Args:
        backbone: Model name as in timm.create_model, with or without tag, also `hf-hub:` and `local-dir:`.
        num_classes: Number of classes, background included.
        pretrained: Load the backbone's pretrained weights.
        trainable_layers: Stages to train, from the last on; 5 adds the stem. Others are frozen, norm statistics too.
        freeze_bn: Freeze the affine parameters and statistics of all batch norms of the backbone.
        backbone_kwargs: Further arguments of the backbone.
        **kwargs: Arguments of torchvision's FasterRCNN, such as min_size and max_size (px).

    Raises:
        ValueError: If trainable_layers is out of range, the backbone does not have four sequential stages at strides 4
            to 32, or image_mean or image_std does not have one value per input channel.
    """
    return _build(FasterRCNN, backbone, num_classes, pretrained, trainable_layers, freeze_bn, backbone_kwargs, **kwargs)


def mask_rcnn(
        backbone: str, num_classes: int = 91, pretrained: bool = False, trainable_layers: int = 3,
        freeze_bn: bool = True, backbone_kwargs: Optional[Dict[str, Any]] = None, **kwargs,
) -> MaskRCNN:
    """Constructs torchvision's Mask R-CNN with FPN on a timm backbone, with the arguments of `faster_rcnn`."""
    return _build(MaskRCNN, backbone, num_classes, pretrained, trainable_layers, freeze_bn, backbone_kwargs, **kwargs)


def _torchvision_builder(
        detector: Type[FasterRCNN], model_name: str, *, weights: Optional[str] = None,
        weights_backbone: Optional[str] = None, trainable_backbone_layers: Optional[int] = None,
        num_classes: Optional[int] = None, backbone_kwargs: Optional[Dict[str, Any]] = None, **kwargs,
) -> FasterRCNN:
    """Builder with the arguments of torchvision's own, see `register_detectors`."""
    if weights is not None:
        raise ValueError(f'Unknown weights {weights!r}: no trained detectors on timm backbones exist. Pass None.')
    backbone, trained = model_name, weights_backbone is not None
    if weights_backbone is not None and weights_backbone != 'DEFAULT':
        weights_backbone = str(weights_backbone)  # may be an enum of torchvision, whose weights fit no timm backbone
        if weights_backbone.startswith(('hf-hub:', 'local-dir:')):
            backbone = weights_backbone
        elif Path(weights_backbone).is_file():
            # with this number timm drops the file's classifier, whatever its size
            overlay = dict(file=weights_backbone, num_classes=-1)
            backbone_kwargs = dict(backbone_kwargs or {}, pretrained_cfg_overlay=overlay)
        elif f'{model_name}.{weights_backbone}' in list_models(f'{model_name}.*', include_tags=True):
            backbone = f'{model_name}.{weights_backbone}'
        else:
            raise ValueError(
                f'{weights_backbone} is neither a file nor a tag of {model_name}. Pass DEFAULT for its default tag.')
    if trainable_backbone_layers is None:
        trainable_backbone_layers = 3 if trained else 5
    model = _build(
        detector, backbone, num_classes or 91, trained, trainable_backbone_layers, trained, backbone_kwargs, **kwargs)
    architecture = model.backbone.body.pretrained_cfg['architecture']
    if architecture != model_name:
        raise ValueError(f'{weights_backbone} holds {architecture}, not {model_name}. Choose the detector of its name.')
    return model


def register_detectors() -> None:
    """Register `fasterrcnn_NAME` and `maskrcnn_NAME` for every timm model NAME, for `torchvision.models.get_model`.

    The builders take torchvision's arguments. `weights_backbone` is None, 'DEFAULT' for the default pretrained tag of
    the model, another of its tags, a checkpoint file, or the `hf-hub:` or `local-dir:` name of such a model. With None
    everything trains from scratch, norms included, as in torchvision's builders. A second call changes nothing.
    """
    known = set(models.list_models())
    for name in list_models():
        for prefix, detector in (('fasterrcnn', FasterRCNN), ('maskrcnn', MaskRCNN)):
            if f'{prefix}_{name}' not in known:
                _private.register_detector(f'{prefix}_{name}')(partial(_torchvision_builder, detector, name))


def main() -> None:
    """Register the detectors and run a script, as `python SCRIPT ARGUMENTS` does."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        print(
            'usage: python -m timm_sepool.detection SCRIPT [ARGUMENT ...]\n'
            "SCRIPT must be a file, for example torchvision's references/detection/train.py.", file=sys.stderr)
        sys.exit(2)
    register_detectors()
    # the reference script saves its arguments in its checkpoints, which torch.load refuses otherwise
    torch.serialization.add_safe_globals([argparse.Namespace])
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
