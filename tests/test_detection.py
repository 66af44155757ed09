""" Detectors: structure and numbers against torchvision's own, freezing, training to convergence, launchers """
import argparse
import copy
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import masks_to_boxes

import timm
from helpers.common import FULL, NAMES, TINY, images, serve_donor, tiny
from helpers.hub_server import HubServer
from timm_sepool.cli._output import save_folder
from timm_sepool.detection import faster_rcnn, main, mask_rcnn, register_detectors

register_detectors(), register_detectors()  # twice does no harm
FAMILIES = ('spse_resnet50', 'rgse_resnet50')
# fewer regions of smaller images, for time
SMALL = dict(
    min_size=64, max_size=96, rpn_batch_size_per_image=64, rpn_pre_nms_top_n_train=100, rpn_post_nms_top_n_train=50,
    rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=20, box_batch_size_per_image=16, box_detections_per_img=10)
Data = List[Tuple[torch.Tensor, Dict[str, torch.Tensor]]]


def detector(build: Callable = mask_rcnn, backbone: str = 'rgse_resnet50', **kwargs) -> FasterRCNN:
    return build(backbone, **{'num_classes': 3, 'backbone_kwargs': TINY, **SMALL, **kwargs})


def shapes(num: int) -> Data:
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


def losses(model: FasterRCNN, batch: Data) -> Dict[str, torch.Tensor]:
    return model.train()(*map(list, zip(*batch)))


def average_precision(model: MaskRCNN, data: Data) -> List[float]:
    """AP50 of the boxes and of the masks."""
    metric = MeanAveragePrecision(iou_type=('bbox', 'segm'), iou_thresholds=[0.5])
    with torch.inference_mode():
        predictions = model.eval()([image for image, _ in data])
    targets = [dict(target, masks=target['masks'].bool()) for _, target in data]
    result = metric([dict(p, masks=p['masks'][:, 0] > 0.5) for p in predictions], targets)
    return [result['bbox_map_50'].item(), result['segm_map_50'].item()]


@pytest.mark.parametrize('name', sorted({
    'rgse_resnet50', 'spse_resnext50', 'resnet50', 'convnext_atto', *((*NAMES, 'seresnet50') if FULL else ())}))
def test_structure(name: str) -> None:
    """The backbone is timm's, without its classifier, the rest torchvision's; from scratch all trains, norms too."""
    kind, cls = ('fasterrcnn', FasterRCNN) if name == 'resnet50' else ('maskrcnn', MaskRCNN)
    with torch.device('meta'):
        model, reference = (
            get_model(f'{kind}_{backbone}', weights=None, weights_backbone=None, num_classes=None)
            for backbone in (name, 'resnet50_fpn'))
        network = timm.create_model(name).state_dict()
        features = model.backbone(torch.empty(2, 3, 128, 192))
    ours, expected = (
        {n: p.shape for n, p in m.named_parameters() if not n.startswith('backbone.body.')} for m in (model, reference))
    assert type(model) is cls and all(p.requires_grad for p in model.parameters()) and ours.keys() == expected.keys()
    # convnext_atto has fewer channels than a ResNet
    assert all('resne' not in name and 'inner_blocks' in n for n in ours if ours[n] != expected[n])
    if 'resne' in name:
        assert any(isinstance(m, nn.BatchNorm2d) for m in model.backbone.body.modules())
        assert {n: v.shape for n, v in model.backbone.body.state_dict().items()} == {
            n: v.shape for n, v in network.items() if not n.startswith('fc.')}
    assert {k: tuple(v.shape) for k, v in features.items()} == {
        k: (2, 256, 128 // s, 192 // s) for k, s in zip(('0', '1', '2', '3', 'pool'), (4, 8, 16, 32, 64))}


def test_equals_torchvision() -> None:
    """On timm's resnet50 a state dict of torchvision's loads as it is and gives the same losses and predictions."""
    theirs = MaskRCNN(resnet_fpn_backbone(backbone_name='resnet50', weights=None), 3, **SMALL)
    ours = mask_rcnn('resnet50', num_classes=3, **SMALL)
    ours.load_state_dict(theirs.state_dict())
    data, results = shapes(2), []
    for model in (ours, theirs):
        torch.manual_seed(0)  # the sampling of regions
        results.append([losses(model, data)])
        with torch.inference_mode():
            results[-1] += model.eval()([x for x, _ in data])
    assert all(len(v) for prediction in results[0][1:] for v in prediction.values())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize('trainable_layers, freeze_bn', [*((layers, True) for layers in range(6)), (3, False)])
def test_trainable_layers(trainable_layers: int, freeze_bn: bool) -> None:
    """Frozen parts stay as they are in a training step, by default all norms among them, and the others move."""
    with torch.device('meta'):
        reference = resnet_fpn_backbone(backbone_name='resnet50', weights=None, trainable_layers=trainable_layers)
        model = faster_rcnn('resnet50', trainable_layers=trainable_layers)
    trained, expected = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (model.backbone, reference))
    assert trained == expected and model.roi_heads.box_predictor.cls_score.out_features == 91
    parts = ('layer4', 'layer3', 'layer2', 'layer1', 'conv1')[:trainable_layers]
    args = dict(trainable_layers=trainable_layers, freeze_bn=freeze_bn)
    for name in (*FAMILIES, 'seresnet50') if FULL else FAMILIES[trainable_layers % 2:][:1]:
        model = detector(faster_rcnn, name, backbone_kwargs=dict(TINY, zero_init_last=False), **args)
        assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == (not freeze_bn)
        before = copy.deepcopy(model.backbone.body.state_dict())
        sum(losses(model, shapes(1 if freeze_bn else 2)).values()).backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
        frozen = r'running_|bn|downsample\.1' if freeze_bn else '^$'
        for n, v in model.backbone.body.state_dict().items():
            assert torch.equal(before[n], v) == (not n.startswith(parts) or bool(re.search(frozen, n))), n
    if not freeze_bn:
        pytest.raises(ValueError, losses, model, shapes(1)).match('more than one image per device')


@pytest.mark.parametrize('name, build', [('rgse_resnet50', mask_rcnn), ('spse_resnet50', faster_rcnn)])
def test_predictions_state_dict_and_torchscript(name: str, build: Callable) -> None:
    """Two images of different sizes, from a detector, a restored and a scripted one."""
    model, restored = (detector(build, name).eval() for _ in range(2))
    x = [images(1, 60, 90)[0].sigmoid(), images(1, 70, 64)[0].sigmoid()]
    with torch.inference_mode():
        expected = model(x)
        for p, image in zip(expected, x, strict=True):
            assert p.keys() == {'boxes', 'labels', 'scores', *(['masks'] if build is mask_rcnn else [])}
            assert len(p['boxes']) and p['boxes'].min() >= 0 and set(p['labels'].tolist()) <= {1, 2}
            assert (p['boxes'].amax(0)[2:] <= torch.tensor(image.shape[:0:-1])).all()
            assert build is faster_rcnn or p['masks'].shape == (len(p['boxes']), 1, *image.shape[1:])
        restored.load_state_dict(model.state_dict())
        for got in (restored(x), torch.jit.script(model)(x)[1]):
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(dict(a), b)


def test_normalization() -> None:
    """Mean and std are the pretrained cfg's, unless given; one value per channel."""
    x, cfg = images(1, 64, 64)[0], dict(mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    model = detector(backbone_kwargs=dict(TINY, pretrained_cfg_overlay=cfg))
    expected = 2 * x - torch.tensor([0.2, 0.4, 0.6])[:, None, None]
    torch.testing.assert_close(model.transform([x])[0].tensors[0], expected)
    model = detector(backbone_kwargs=dict(TINY, in_chans=1), image_mean=[0.], image_std=[1.])
    torch.testing.assert_close(model.transform([x[:1]])[0].tensors[0], x[:1])


def test_pretrained(hub: HubServer, tmp_path: Path) -> None:
    """By tag, hf-hub:, local-dir: and file; from a plain donor the features are the donor's."""
    serve_donor(hub, 'resnet50.a1_in1k', **TINY)
    serve_donor(hub, 'resnet50.tv_in1k', **TINY)
    x = images(1, 64, 96)
    bodies = [detector(faster_rcnn, name, pretrained=True).backbone.body for name in ('resnet50', 'rgse_resnet50')]
    assert all(map(torch.equal, *(body(x) for body in bodies)))
    build = partial(get_model, 'fasterrcnn_rgse_resnet50', weights=None, **SMALL)
    for weights, tag in (('DEFAULT', 'from_resnet50_a1_in1k'), ('from_resnet50_tv_in1k', 'from_resnet50_tv_in1k')):
        body = build(weights_backbone=weights, backbone_kwargs=TINY).backbone.body
        expected = timm.create_model(f'rgse_resnet50.{tag}', pretrained=True, **TINY).state_dict()
        assert all(torch.equal(v, expected[n]) for n, v in body.state_dict().items() if '.se.' not in n)
        assert {n.split('.')[0] for n, p in body.named_parameters() if not p.requires_grad} == {'conv1', 'layer1'}
    trained = tiny('rgse_resnet50')
    save_folder(trained, tmp_path / 'rgse', TINY)
    hub.add('user/rgse', {p.name: p.read_bytes() for p in (tmp_path / 'rgse').iterdir()})
    file = f'{tmp_path}/trained.safetensors'  # its classifier is left out
    save_file(trained.state_dict(), file)
    models = [build(weights_backbone=file, backbone_kwargs=TINY)]
    for name in (f'local-dir:{tmp_path}/rgse', 'hf-hub:user/rgse'):
        models += [faster_rcnn(name, pretrained=True, **SMALL), build(weights_backbone=name)]
        error = pytest.raises(ValueError, get_model, 'fasterrcnn_resnet50', weights_backbone=name)
        error.match('holds rgse_resnet50, not resnet50. Choose the detector of its name')
    expected = trained.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)
    for model in models:
        torch.testing.assert_close(model.backbone.body(x), expected)


@pytest.mark.parametrize('name, num, steps', [
    ('rgse_resnet50', 2, 20), pytest.param('spse_resnet50', 4, 50, marks=pytest.mark.full)])
def test_trains(name: str, num: int, steps: int) -> None:
    """Boxes and masks of a few images are learnt from scratch, the squeeze takes part."""
    model = detector(  # with small heads, for time
        mask_rcnn, name, trainable_layers=5, num_classes=None, box_batch_size_per_image=32,
        box_head=TwoMLPHead(256 * 49, 64), box_predictor=FastRCNNPredictor(64, 3),
        mask_head=MaskRCNNHeads(256, (64,), 1), mask_predictor=MaskRCNNPredictor(64, 64, 3),
        rpn_anchor_generator=AnchorGenerator(tuple((size,) for size in (8, 16, 32, 64, 128)), ((1.,),) * 5))
    data = shapes(num)
    assert max(average_precision(model, data)) < 0.5
    squeeze = {n: p.detach().clone() for n, p in model.named_parameters() if '.se.' in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1., 0.05, steps)
    for step in range(steps):
        optimizer.zero_grad()
        sum(losses(model, data[step * 2 % num:][:2]).values()).backward()
        optimizer.step()
        scheduler.step()
    assert min(average_precision(model, data)) > 0.8
    assert squeeze and all((model.get_parameter(n) - p).abs().max() > 1e-3 for n, p in squeeze.items())


SCRIPT = f"""
import sys, torch, torchvision
torch.distributed.init_process_group('gloo')
rank = torch.distributed.get_rank()
model = torchvision.models.get_model(
    sys.argv[1], weights_backbone='weights.safetensors', num_classes=3, trainable_backbone_layers=4,
    rpn_score_thresh=0., min_size=64, max_size=96, box_batch_size_per_image=16, backbone_kwargs={TINY})
body, params = model.backbone.body, [p for p in model.parameters() if p.requires_grad]
ddp = torch.nn.parallel.DistributedDataParallel(model)
for step in range(2):
    num, size = 1 - rank * step, (64 + 8 * rank, 90 - 16 * step)  # an image without objects among them
    boxes, masks = torch.tensor([[8., 8., 40., 40.]])[:num], torch.ones(num, *size).byte()
    target = dict(boxes=boxes, labels=torch.ones(num).long(), masks=masks)
    sum(ddp([torch.rand(3, *size)], [target]).values()).backward()
    assert all(p.grad.isfinite().all() for p in params)
print(rank, type(body.layer1[0].se).__name__, *[next(m.parameters()).requires_grad for m in (body.layer1, body.conv1)])
"""


def test_launcher_and_ddp(tmp_path: Path) -> None:
    """A script for torchvision, on two processes: every parameter takes part in each step, else DDP raises."""
    (tmp_path / 'train.py').write_text(SCRIPT)
    save_file(tiny('rgse_resnet50').state_dict(), tmp_path / 'weights.safetensors')
    argv = '-m torch.distributed.run --standalone --nproc_per_node 2 -m timm_sepool.detection train.py'.split()
    out = subprocess.run(
        [sys.executable, *argv, 'maskrcnn_rgse_resnet50'], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    assert sorted(out.stdout.splitlines()) == [f'{rank} RGSEModule True False' for rank in range(2)]


def test_run_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """argv, __name__, sys.path[0] and the exit code are those of `python SCRIPT`."""
    script, safe = tmp_path / 'probe.py', []
    script.write_text('import json, sys; print(json.dumps([sys.argv, __name__, sys.path])); sys.exit(3)')
    monkeypatch.setattr(sys, 'path', ['cwd', *sys.path])
    monkeypatch.setattr(torch.serialization, 'add_safe_globals', safe.extend)
    for args, code in (([str(script), '--flag', 'x'], 3), ([], 2), ([str(tmp_path / 'nosuch.py')], 2)):
        monkeypatch.setattr(sys, 'argv', ['detection.py', *args])
        pytest.raises(SystemExit, main).match(f'^{code}$')
        out, err = capsys.readouterr()
        assert err.startswith('usage: python -m timm_sepool.detection SCRIPT') == (code == 2)
        if code == 3:
            argv, name, path = json.loads(out)
            assert (argv, name, path[0]) == (args, '__main__', str(tmp_path)) and 'cwd' not in path
            assert safe == [argparse.Namespace]  # what the reference script's checkpoints hold


@pytest.mark.parametrize('build, message', [
    (partial(get_model, 'maskrcnn_rgse_resnet50', weights='DEFAULT'), "Unknown weights 'DEFAULT': no trained"),
    (partial(get_model, 'maskrcnn_rgse_resnet50', weights_backbone='no.pth'), 'no.pth is neither a file nor a tag of'),
    (partial(get_model, 'fasterrcnn_rgse_resnet51'), 'Unknown model fasterrcnn_rgse_resnet51'),
    (partial(detector, backbone_kwargs=dict(in_chans=1)), 'takes images of 1 channels. Pass image_mean and image_std'),
    (partial(mask_rcnn, 'rgse_resnet51'), r'Unknown model \(rgse_resnet51\)'),
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
    with torch.device('meta'), pytest.raises(RuntimeError if r'\(' in message else ValueError, match=message):
        build()
