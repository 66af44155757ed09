""" Detectors: structure and numbers against torchvision's own, freezing, training to convergence, launchers """
import argparse
import copy
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import pytest
import torch
from torch import nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models import ResNet50_Weights, detection, get_model
from torchvision.models._api import BUILTIN_MODELS
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import masks_to_boxes

import timm
from helpers.common import TINY, images, serve_donor, tiny
from helpers.hub_server import HubServer
from timm_sepool.cli._output import save_folder
from timm_sepool.detection import faster_rcnn, mask_rcnn, register_detectors

register_detectors(), register_detectors()  # twice does no harm
SMALL = dict(  # fewer regions of smaller images, for time
    min_size=64, max_size=96, rpn_batch_size_per_image=64, rpn_pre_nms_top_n_train=100, rpn_post_nms_top_n_train=50,
    rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=20, box_batch_size_per_image=16, box_detections_per_img=10)


def detector(build: Callable = mask_rcnn, backbone: str = 'rgse_resnet50', **kwargs) -> detection.FasterRCNN:
    return build(backbone, **{'num_classes': 3, 'backbone_kwargs': TINY, **SMALL, **kwargs})


def shapes(num: int) -> List[Tuple[torch.Tensor, Dict[str, torch.Tensor]]]:
    """Images of several sizes on noise, each with a reddish rectangle (class 1) and a bluish ellipse (class 2)."""
    data = []
    for i in range(num):
        height, width = ((64, 80), (80, 64), (72, 72), (64, 96))[i % 4]
        image, masks = 0.3 * torch.rand(3, height, width), []
        rows, cols = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
        for label, color in ((1, (0.9, 0.2, 0.1)), (2, (0.1, 0.3, 0.9))):
            h, w = torch.randint(20, 29, (2,)).tolist()
            top = int(torch.randint(height - h + 1, ()))
            left = int(torch.randint(width // 2 - w + 1, ())) + width // 2 * ((label + i) % 2)
            y, x = (rows - top - h / 2) / (h / 2), (cols - left - w / 2) / (w / 2)  # -1 .. 1 inside
            masks.append((y.abs() <= 1) & (x.abs() <= 1) if label == 1 else y ** 2 + x ** 2 <= 1)
            image[:, masks[-1]] = torch.tensor(color)[:, None] + 0.1 * torch.rand(3, 1)
        boxes = masks_to_boxes(torch.stack(masks)) + torch.tensor([0., 0., 1., 1.])
        data.append((image, dict(boxes=boxes, labels=torch.tensor([1, 2]), masks=torch.stack(masks).to(torch.uint8))))
    return data


def losses(model: nn.Module, batch: List[Tuple]) -> Dict[str, torch.Tensor]:
    return model.train()(*map(list, zip(*batch)))


@pytest.mark.parametrize('kind', ['fasterrcnn', 'maskrcnn'])
@pytest.mark.parametrize('name', ['spse_resnext50', 'ese_vovnet19b_dw', 'convnext_atto'])
def test_from_scratch(kind: str, name: str) -> None:
    """All but the backbone has torchvision's names, every parameter trains, norms too, and the strides are its own."""
    with torch.device('meta'):
        model, reference = (
            get_model(f'{kind}_{backbone}', weights=None, weights_backbone=None, num_classes=None)
            for backbone in (name, 'resnet50_fpn'))
        features = model.backbone(torch.empty(2, 3, 128, 192))
    ours, expected = ({n for n, _ in m.named_parameters() if '.body.' not in n} for m in (model, reference))
    assert type(model) is type(reference) and ours == expected and all(p.requires_grad for p in model.parameters())
    assert name == 'convnext_atto' or any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert {k: tuple(v.shape) for k, v in features.items()} == {
        k: (2, 256, 128 // s, 192 // s) for k, s in zip(('0', '1', '2', '3', 'pool'), (4, 8, 16, 32, 64))}


def test_equals_torchvision() -> None:
    """On timm's resnet50 a state dict of torchvision's loads as it is and gives the same losses and predictions."""
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]  # by default those of the pretrained cfg
    theirs = detection.MaskRCNN(
        resnet_fpn_backbone(backbone_name='resnet50', weights=None), 3, image_mean=mean, image_std=std, **SMALL)
    cfg = dict(pretrained_cfg_overlay=dict(mean=tuple(mean), std=tuple(std)))
    ours = mask_rcnn('resnet50', num_classes=3, backbone_kwargs=cfg, **SMALL)
    ours.load_state_dict(theirs.state_dict())
    data, results = shapes(2), []
    for model in (ours, theirs):
        torch.manual_seed(0)  # the sampling of regions
        results.append([losses(model, data)])
        with torch.inference_mode():
            results[-1] += model.eval()([x for x, _ in data])
    assert all(len(v) for prediction in results[0][1:] for v in prediction.values())
    torch.testing.assert_close(*results)
    # one value per channel
    model, x = detector(backbone_kwargs=dict(TINY, in_chans=1), image_mean=[0.], image_std=[1.]), images(1, 1, 64, 64)
    torch.testing.assert_close(model.transform([x[0]])[0].tensors, x)


@pytest.mark.parametrize('layers, freeze_bn', [*((n, True) for n in range(6)), (3, False)])
def test_trainable_layers(layers: int, freeze_bn: bool) -> None:
    """Frozen parts stay as they are in a training step, by default all norms among them, and the others move.

    No other parameter is left out, for which DistributedDataParallel would raise."""
    with torch.device('meta'):
        reference = resnet_fpn_backbone(backbone_name='resnet50', weights=None, trainable_layers=layers)
        model = faster_rcnn('resnet50', trainable_layers=layers)
    trained, expected = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (model.backbone, reference))
    assert trained == expected and model.roi_heads.box_predictor.cls_score.out_features == 91
    parts = ('layer4', 'layer3', 'layer2', 'layer1', 'conv1')[:layers]
    name, args = ('rgse_resnet50', 'spse_resnet50', 'seresnet50')[layers % 3], dict(TINY, zero_init_last=False)
    model = detector(faster_rcnn, name, trainable_layers=layers, freeze_bn=freeze_bn, backbone_kwargs=args)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == (not freeze_bn)
    before = copy.deepcopy(model.backbone.body.state_dict())
    sum(losses(model, shapes(1 if freeze_bn else 2)).values()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    frozen = r'running_|bn|downsample\.1' if freeze_bn else '^$'
    for n, v in model.backbone.body.state_dict().items():
        assert torch.equal(before[n], v) == (not n.startswith(parts) or bool(re.search(frozen, n))), n
    if not freeze_bn:
        pytest.raises(ValueError, losses, model, shapes(1)).match('more than one image per device')


@pytest.mark.parametrize('name, build', [('rgse_resnet50', mask_rcnn), ('spse_resnet50', faster_rcnn)])
def test_torchscript(name: str, build: Callable) -> None:
    """The same predictions for two images of different sizes."""
    model, x = detector(build, name).eval(), [images(1, *size)[0].sigmoid() for size in ((60, 90), (70, 64))]
    with torch.inference_mode():
        expected, got = model(x), torch.jit.script(model)(x)[1]
    assert all(len(p['boxes']) and ('masks' in p) == (build is mask_rcnn) for p in expected)
    torch.testing.assert_close([dict(p) for p in got], expected)


def test_pretrained(hub: HubServer, tmp_path: Path) -> None:
    """By tag, hf-hub:, local-dir: and file, with the stages that fine-tuning freezes."""
    build = partial(get_model, 'fasterrcnn_rgse_resnet50', weights=None, **SMALL)
    for weights, donor, layers, frozen in (
            ('DEFAULT', 'a1_in1k', None, {'conv1', 'layer1'}), ('from_resnet50_tv_in1k', 'tv_in1k', 4, {'conv1'})):
        serve_donor(hub, f'resnet50.{donor}', **TINY)
        body = build(weights_backbone=weights, trainable_backbone_layers=layers, backbone_kwargs=TINY).backbone.body
        expected = timm.create_model(f'rgse_resnet50.from_resnet50_{donor}', pretrained=True, **TINY).state_dict()
        assert all(torch.equal(v, expected[n]) for n, v in body.state_dict().items() if '.se.' not in n)
        assert {n.split('.')[0] for n, p in body.named_parameters() if not p.requires_grad} == frozen
    trained = tiny('rgse_resnet50')
    save_folder(trained, tmp_path / 'rgse', TINY)
    hub.add('user/rgse', {p.name: p.read_bytes() for p in (tmp_path / 'rgse').iterdir()})
    torch.save(trained.state_dict(), tmp_path / 'trained.pth')  # its classifier is left out
    models = [build(weights_backbone=f'{tmp_path}/trained.pth', backbone_kwargs=TINY)]
    for name in (f'local-dir:{tmp_path}/rgse', 'hf-hub:user/rgse'):
        models += [faster_rcnn(name, pretrained=True, **SMALL), build(weights_backbone=name)]
        with pytest.raises(ValueError, match='holds rgse_resnet50, not resnet50. Choose the detector of its name'):
            get_model('fasterrcnn_resnet50', weights_backbone=name)
    x = images(1, 64, 96)
    expected = trained.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)
    for model in models:
        torch.testing.assert_close(model.backbone.body(x), expected)


@pytest.mark.parametrize('name, num, steps', [
    ('rgse_resnet50', 2, 20), pytest.param('spse_resnet50', 4, 50, marks=pytest.mark.full)])
def test_trains(name: str, num: int, steps: int) -> None:
    """Boxes and masks of a few images are learnt from scratch, the squeeze takes part."""
    frcnn, mrcnn = detection.faster_rcnn, detection.mask_rcnn
    model = detector(  # with small heads, for time
        mask_rcnn, name, trainable_layers=5, num_classes=None, box_batch_size_per_image=32,
        box_head=frcnn.TwoMLPHead(256 * 49, 64), box_predictor=frcnn.FastRCNNPredictor(64, 3),
        mask_head=mrcnn.MaskRCNNHeads(256, (64,), 1), mask_predictor=mrcnn.MaskRCNNPredictor(64, 64, 3),
        rpn_anchor_generator=frcnn.AnchorGenerator(tuple((size,) for size in (8, 16, 32, 64, 128)), ((1.,),) * 5))
    data = shapes(num)
    squeeze = {n: p.detach().clone() for n, p in model.named_parameters() if '.se.' in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1., 0.05, steps)
    for step in range(steps):
        optimizer.zero_grad()
        sum(losses(model, data[step * 2 % num:][:2]).values()).backward()
        optimizer.step()
        scheduler.step()
    with torch.inference_mode():
        predictions = [dict(p, masks=p['masks'][:, 0] > 0.5) for p in model.eval()([image for image, _ in data])]
    targets = [dict(target, masks=target['masks'].bool()) for _, target in data]
    precision = MeanAveragePrecision(iou_type=('bbox', 'segm'), iou_thresholds=[0.5])(predictions, targets)
    assert precision['bbox_map_50'] > 0.8 and precision['segm_map_50'] > 0.8
    assert squeeze and all((model.get_parameter(n) - p).abs().max() > 1e-3 for n, p in squeeze.items())


SCRIPT = f"""
import sys, torch, torchvision
torch.distributed.init_process_group('gloo')
rank = torch.distributed.get_rank()
model = torch.nn.parallel.DistributedDataParallel(torchvision.models.get_model(
    sys.argv[1], weights_backbone=None, num_classes=3, min_size=64, max_size=96, backbone_kwargs={TINY}))
for num in (1 - rank, rank):  # an image without objects among them
    boxes, masks = torch.tensor([[8., 8., 40., 40.]])[:num], torch.ones(num, 64, 90).byte()
    target = dict(boxes=boxes, labels=masks[:, 0, 0].long(), masks=masks)
    sum(model([torch.rand(3, 64, 90)] * 2, [target] * 2).values()).backward()  # a squeeze needs more than one image
print(rank, type(model.module.backbone.body.layer1[0].se).__name__)
"""


@pytest.mark.full
def test_launcher_and_ddp(tmp_path: Path) -> None:
    """A script for torchvision, on two processes: every parameter takes part in each step, else DDP raises."""
    (tmp_path / 'train.py').write_text(SCRIPT)
    launch = '-m torch.distributed.run --standalone --nproc_per_node 2 -m timm_sepool.detection train.py'
    argv = [sys.executable, *launch.split(), 'maskrcnn_rgse_resnet50']
    out = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert sorted(out.stdout.splitlines()) == ['0 RGSEModule', '1 RGSEModule'], out.stderr[-3000:]


@pytest.mark.filterwarnings('ignore:.*found in sys.modules')  # python -m starts without it
def test_run_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """argv, __name__, sys.path[0] and the exit code are those of `python SCRIPT`, and the detectors are registered."""
    script, safe = tmp_path / 'probe.py', []
    script.write_text('import sys, torchvision; sys.exit((sys.argv, __name__, sys.path, torchvision.models))')
    monkeypatch.delitem(BUILTIN_MODELS, 'maskrcnn_rgse_resnet50')  # it was registered above
    monkeypatch.setattr(sys, 'path', ['cwd', *sys.path])
    monkeypatch.setattr(torch.serialization, 'add_safe_globals', safe.extend)
    for args in ([], [str(tmp_path / 'nosuch.py')], [str(script), '--flag', 'x']):
        monkeypatch.setattr(sys, 'argv', ['detection.py', *args])
        with pytest.raises(SystemExit) as e:
            runpy.run_module('timm_sepool.detection', run_name='__main__')
        usage = capsys.readouterr().err.startswith('usage: python -m timm_sepool.detection SCRIPT')
        assert usage == (e.value.code == 2) == (len(args) < 3)
    argv, name, path, models = e.value.code
    assert (argv, name, path[0]) == (args, '__main__', str(tmp_path)) and 'cwd' not in path
    assert 'maskrcnn_rgse_resnet50' in models.list_models()
    assert safe == [argparse.Namespace]  # what the reference script's checkpoints hold


@pytest.mark.parametrize('build, message', [
    (partial(get_model, 'maskrcnn_rgse_resnet50', weights='DEFAULT'), "Unknown weights 'DEFAULT': no trained"),
    (partial(get_model, 'maskrcnn_rgse_resnet50', weights_backbone='no.pth'), 'no.pth is neither a file nor a tag of'),
    (partial(get_model, 'maskrcnn_rgse_resnet50', weights_backbone=ResNet50_Weights.IMAGENET1K_V1),
     'ResNet50_Weights.IMAGENET1K_V1 is neither a file nor a tag of'),
    (partial(detector, backbone_kwargs=dict(in_chans=1)), 'takes images of 1 channels. Pass image_mean and image_std'),
    *((partial(faster_rcnn, 'rgse_resnet50', trainable_layers=value), f'integer from 0 to 5, got {value!r}')
      for value in (-1, 6, 3.0, '3', None, True)),
    (partial(mask_rcnn, 'rgse_resnet50', backbone_kwargs=dict(output_stride=16)), r'strides \[4, 8, 16, 16\]'),
    *((partial(mask_rcnn, name), f'{name} has .*{reason}.* Choose a backbone of four sequential NCHW stages')
      for name, reason in (
        ('vit_tiny_patch16_224', r'strides \[16, 16, 16, 16\]'), ('levit_128s', 'fewer than four stages'),
        ('shvit_s1', 'fewer than four stages'), ('efficientnet_b0', 'stages with branches .EfficientNetFeatures'),
        ('mambaout_femto', 'NHWC features'))),
])
def test_bad_arguments(build: Callable, message: str) -> None:
    with torch.device('meta'), pytest.raises(ValueError, match=message):
        build()
