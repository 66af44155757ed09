""" Detectors: structure and numbers against torchvision's own, freezing, training to convergence, launchers """
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN, MaskRCNN, fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator

import timm
from helpers.common import NAMES, TINY, images, serve_donor, tiny
from helpers.hub_server import HubServer
from timm_sepool.cli.hub import save_folder
from timm_sepool.detection import faster_rcnn, main, mask_rcnn, register_detectors

DETECTORS = {'faster_rcnn': faster_rcnn, 'mask_rcnn': mask_rcnn}
FAMILIES = ('spse_resnet50', 'rgse_resnet50')
# fewer regions of smaller images, for time
SMALL = dict(
    min_size=64, max_size=96, rpn_batch_size_per_image=64, rpn_pre_nms_top_n_train=100, rpn_post_nms_top_n_train=50,
    rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=20, box_batch_size_per_image=16, box_detections_per_img=10)
SHAPES_ANCHORS = AnchorGenerator(tuple((size,) for size in (8, 16, 32, 64, 128)), ((1.,),) * 5)


def detector(build: Callable = mask_rcnn, backbone: str = 'rgse_resnet50', **kwargs) -> FasterRCNN:
    return build(backbone, **{'num_classes': 3, 'backbone_kwargs': TINY, **SMALL, **kwargs})


def shapes(num: int) -> List[Tuple[torch.Tensor, Dict[str, torch.Tensor]]]:
    """Images of several sizes on noise, each with a reddish rectangle (class 1) and a bluish ellipse (class 2)."""
    data = []
    for i in range(num):
        height, width = ((64, 80), (80, 64), (72, 72), (64, 96))[i % 4]
        image = 0.3 * torch.rand(3, height, width)
        rows, cols = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
        boxes, masks = [], []
        for label, color in ((1, (0.9, 0.2, 0.1)), (2, (0.1, 0.3, 0.9))):
            h, w = torch.randint(20, 29, (2,)).tolist()
            top = int(torch.randint(height - h + 1, ()))
            left = int(torch.randint(width // 2 - w + 1, ())) + width // 2 * ((label + i) % 2)
            y, x = (rows - top - h / 2) / (h / 2), (cols - left - w / 2) / (w / 2)  # -1 .. 1 inside
            mask = (y.abs() <= 1) & (x.abs() <= 1) if label == 1 else y ** 2 + x ** 2 <= 1
            image[:, mask] = torch.tensor(color)[:, None] + 0.1 * torch.rand(3, 1)
            boxes.append([left, top, left + w, top + h])
            masks.append(mask)
        data.append((image, dict(
            boxes=torch.tensor(boxes, dtype=torch.float32),
            labels=torch.tensor([1, 2]),
            masks=torch.stack(masks).to(torch.uint8),
        )))
    return data


def losses(model: FasterRCNN, batch: List[Tuple[torch.Tensor, Dict[str, torch.Tensor]]]) -> Dict[str, torch.Tensor]:
    """The losses of a batch in train mode, the sampling of regions seeded."""
    torch.manual_seed(0)
    return model.train()([image for image, _ in batch], [target for _, target in batch])


def average_precision(model: FasterRCNN, data: List[Tuple[torch.Tensor, Dict[str, torch.Tensor]]]) -> List[float]:
    """AP50 of the boxes and, for Mask R-CNN, of the masks."""
    types = ('bbox', 'segm') if isinstance(model, MaskRCNN) else ('bbox',)
    metric = MeanAveragePrecision(iou_type=types, iou_thresholds=[0.5])
    model.eval()
    with torch.inference_mode():
        for image, target in data:
            prediction, = model([image])
            if 'masks' in prediction:
                prediction['masks'] = prediction['masks'][:, 0] > 0.5
            metric.update([prediction], [dict(target, masks=target['masks'].bool())])
    result = metric.compute()
    return [result[f'{t}_map_50' if len(types) > 1 else 'map_50'].item() for t in types]


def parameters_but_body(model: nn.Module) -> Dict[str, torch.Size]:
    return {n: p.shape for n, p in model.named_parameters() if not n.startswith('backbone.body.')}


@pytest.mark.parametrize('name', [*NAMES, 'seresnet50', 'resnet50', 'convnext_atto'])
def test_structure(name: str) -> None:
    """The backbone is timm's, without its classifier, and everything else is torchvision's."""
    build, reference = (
        (faster_rcnn, fasterrcnn_resnet50_fpn) if name == 'resnet50' else (mask_rcnn, maskrcnn_resnet50_fpn))
    with torch.device('meta'):
        model = build(name)
        expected = parameters_but_body(reference(weights=None, weights_backbone=None))
        ours = parameters_but_body(model)
        assert ours.keys() == expected.keys()
        # it has fewer channels than a ResNet
        narrower = () if 'resne' in name else {f'backbone.fpn.inner_blocks.{i}.0.weight' for i in range(4)}
        assert {n for n in ours if ours[n] != expected[n]} == set(narrower)
        body = {n: v.shape for n, v in model.backbone.body.state_dict().items()}
        network = {n: v.shape for n, v in timm.create_model(name).state_dict().items()}
    if 'resne' in name:
        assert body == {
            n: s for n, s in network.items() if not n.startswith('fc.') and not n.endswith('num_batches_tracked')}


def test_strides() -> None:
    for name in (*FAMILIES, 'resnet50'):
        model = detector(faster_rcnn, name)
        features = model.backbone(images(2, 128, 192))
        assert {k: tuple(v.shape) for k, v in features.items()} == {
            k: (2, 256, 128 // s, 192 // s) for k, s in zip(('0', '1', '2', '3', 'pool'), (4, 8, 16, 32, 64))}


def test_equals_torchvision() -> None:
    """On timm's resnet50 a state dict of torchvision's loads as it is and gives the same losses and predictions."""
    theirs = MaskRCNN(resnet_fpn_backbone(backbone_name='resnet50', weights=None), 3, **SMALL)
    ours = mask_rcnn('resnet50', num_classes=3, **SMALL)
    ours.load_state_dict(theirs.state_dict())
    data = shapes(2)
    expected, got = losses(theirs, data), losses(ours, data)
    assert got.keys() == expected.keys()
    for k in expected:
        torch.testing.assert_close(got[k], expected[k])
    with torch.inference_mode():
        for a, b in zip(ours.eval()([x for x, _ in data]), theirs.eval()([x for x, _ in data])):
            assert a.keys() == b.keys() and len(a['boxes'])
            for k in b:
                torch.testing.assert_close(a[k], b[k])


@pytest.mark.parametrize('trainable_layers', range(6))
def test_trainable_layers(trainable_layers: int) -> None:
    """Frozen parts, all norms among them, stay as they are in a training step on one image and the others move."""
    with torch.device('meta'):
        reference = resnet_fpn_backbone(backbone_name='resnet50', weights=None, trainable_layers=trainable_layers)
        model = faster_rcnn('resnet50', trainable_layers=trainable_layers)
    assert {n for n, p in model.backbone.named_parameters() if p.requires_grad} == {
        n for n, p in reference.named_parameters() if p.requires_grad}

    parts = ('layer4', 'layer3', 'layer2', 'layer1', 'conv1')[:trainable_layers]
    for name in (*FAMILIES, 'seresnet50'):
        model = detector(faster_rcnn, name, trainable_layers=trainable_layers, backbone_kwargs=dict(
            TINY, zero_init_last=False))
        before = {n: v.clone() for n, v in model.backbone.body.state_dict().items()}
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        sum(losses(model, shapes(1)).values()).backward()
        optimizer.step()
        norms = ('running_mean', 'running_var', 'bn1', 'bn2', 'bn3', '.se.bn', 'downsample.1')
        trained = {n for n in before if n.startswith(parts) and not any(k in n for k in norms)} if parts else set()
        after = model.backbone.body.state_dict()
        assert {n for n in before if not torch.equal(before[n], after[n])} == trained


def test_norms_that_train() -> None:
    """With freeze_bn=False the norms of the trained stages train, the frozen stages' don't."""
    model = detector(faster_rcnn, freeze_bn=False, trainable_layers=3)
    body = model.backbone.body
    before = {n: v.clone() for n, v in body.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    sum(losses(model, shapes(2)).values()).backward()
    optimizer.step()
    moved = {n for n, v in body.state_dict().items() if not torch.equal(before[n], v)}
    assert {n.split('.')[0] for n in moved} == {'layer2', 'layer3', 'layer4'}
    assert {'layer2.0.se.bn.weight', 'layer2.0.se.bn.running_mean', 'layer4.0.bn1.running_var'} <= moved
    with pytest.raises(ValueError, match='more than one image per device'):
        losses(model, shapes(1))


@pytest.mark.parametrize('build', DETECTORS.values(), ids=DETECTORS)
@pytest.mark.parametrize('name', FAMILIES)
def test_predictions_state_dict_and_torchscript(build: Callable, name: str) -> None:
    """Two images of different sizes, alone and together, from a restored and a scripted detector."""
    model = detector(build, name).eval()
    x = [images(1, 60, 90)[0].sigmoid(), images(1, 70, 64)[0].sigmoid()]
    restored = detector(build, name).eval()
    with torch.inference_mode():
        expected = model(x)
        assert [sorted(p) for p in expected] == 2 * [
            ['boxes', 'labels', *(['masks'] if build is mask_rcnn else []), 'scores']]
        for p, image in zip(expected, x):
            height, width = image.shape[-2:]
            assert len(p['boxes']) and p['boxes'].min() >= 0 and (p['boxes'].amax(0)[2:] <= torch.tensor(
                [width, height])).all()
            assert set(p['labels'].tolist()) <= {1, 2}
            if build is mask_rcnn:
                assert p['masks'].shape == (len(p['boxes']), 1, height, width)
        assert any(not torch.equal(a['boxes'], b['boxes']) for a, b in zip(restored(x), expected))
        restored.load_state_dict(model.state_dict())
        scripted = torch.jit.script(model)
        for got in (restored(x), scripted(x)[1]):
            for a, b in zip(got, expected):
                for k in b:
                    torch.testing.assert_close(a[k], b[k])


def test_normalization() -> None:
    """Mean and std are the pretrained cfg's, unless given."""
    model = detector(backbone_kwargs=dict(TINY, pretrained_cfg_overlay=dict(mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))))
    x = images(1, 64, 64)[0]
    expected = (x - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / 0.5
    torch.testing.assert_close(model.transform([x])[0].tensors[0], expected)
    model = detector(image_mean=[0., 0., 0.], image_std=[1., 1., 1.])
    torch.testing.assert_close(model.transform([x])[0].tensors[0], x)


def test_pretrained(hub: HubServer, tmp_path: Path) -> None:
    """By tag, hf-hub:, local-dir: and file; from a plain donor the features are the donor's."""
    serve_donor(hub, 'resnet50.a1_in1k', **TINY)
    x = images(1, 64, 96)
    donor, ours = (
        detector(faster_rcnn, name, pretrained=True).backbone.body(x) for name in ('resnet50', 'rgse_resnet50'))
    assert all(torch.equal(a, b) for a, b in zip(donor, ours))

    trained = tiny('rgse_resnet50')
    save_folder(trained, tmp_path / 'rgse', TINY)
    hub.add('user/rgse', {p.name: p.read_bytes() for p in (tmp_path / 'rgse').iterdir()})
    expected = trained.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)
    register_detectors()
    for name in (f'local-dir:{tmp_path}/rgse', 'hf-hub:user/rgse'):
        direct = faster_rcnn(name, pretrained=True, **SMALL)
        through_registry = get_model('fasterrcnn_rgse_resnet50', weights_backbone=name)
        assert sum(p.requires_grad for p in direct.parameters()) == sum(
            p.requires_grad for p in through_registry.parameters())
        for model in (direct, through_registry):
            for a, b in zip(model.backbone.body(x), expected):
                torch.testing.assert_close(a, b)
        with pytest.raises(ValueError, match='holds rgse_resnet50, not resnet50'):
            get_model('fasterrcnn_resnet50', weights_backbone=name)

    file = str(tmp_path / 'trained.safetensors')
    save_file(trained.state_dict(), file)  # its classifier, of as many classes as it was trained on, is left out
    model = get_model('maskrcnn_rgse_resnet50', weights_backbone=file, backbone_kwargs=TINY)
    for a, b in zip(model.backbone.body(x), expected):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match='nofile.pth is neither a file nor a tag of rgse_resnet50'):
        get_model('fasterrcnn_rgse_resnet50', weights_backbone='nofile.pth')


@pytest.mark.parametrize('name,build', [('spse_resnet50', faster_rcnn), ('rgse_resnet50', mask_rcnn)])
def test_trains(name: str, build: Callable) -> None:
    """Boxes (and masks) of a few images are learnt from scratch, the squeeze takes part."""
    heads = dict(  # small ones, for time
        num_classes=None, box_head=TwoMLPHead(256 * 49, 64), box_predictor=FastRCNNPredictor(64, 3),
        rpn_anchor_generator=SHAPES_ANCHORS, box_batch_size_per_image=32)
    if build is mask_rcnn:
        heads.update(mask_head=MaskRCNNHeads(256, (64,), 1), mask_predictor=MaskRCNNPredictor(64, 64, 3))
    model = detector(build, name, trainable_layers=5, **heads)
    data = shapes(4)
    assert max(average_precision(model, data)) < 0.5
    squeeze = {n: p.detach().clone() for n, p in model.named_parameters() if '.se.' in n}

    steps = 50
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1., 0.05, steps)
    model.train()
    for step in range(steps):
        batch = data[step % 2 * 2:][:2]
        loss = sum(model([image for image, _ in batch], [target for _, target in batch]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert min(average_precision(model, data)) > 0.9
    params = dict(model.named_parameters())
    assert squeeze and all((params[n] - p).abs().max() > 1e-3 for n, p in squeeze.items())


SCRIPT = """
import argparse
import sys

import torch
import torchvision
from helper import TINY  # beside the script


def main(args):
    torch.distributed.init_process_group('gloo')
    rank = torch.distributed.get_rank()
    for name in args.model:
        torch.manual_seed(rank)
        model = torchvision.models.get_model(
            name, weights=None, weights_backbone=f'{name}.safetensors', num_classes=3, trainable_backbone_layers=4,
            rpn_score_thresh=0.0, min_size=64, max_size=96, box_batch_size_per_image=16, backbone_kwargs=TINY)
        params = [p for p in model.parameters() if p.requires_grad]
        model = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(params, lr=1e-3)
        for step, (height, width) in enumerate([((64, 80), (90, 64)), ((70, 70), (64, 96))][rank]):
            boxes = torch.tensor([[8., 8., 40., 40.]])[:1 - rank * step]  # an image without objects among them
            masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
            masks[:, 8:40, 8:40] = 1
            targets = [dict(boxes=boxes, labels=torch.ones(len(boxes), dtype=torch.int64), masks=masks)]
            loss = sum(model([torch.rand(3, height, width)], targets).values())
            optimizer.zero_grad()
            loss.backward()
            grads = torch.cat([p.grad.flatten() for p in params])
            gathered = [torch.empty_like(grads) for _ in range(2)]
            torch.distributed.all_gather(gathered, grads)
            assert torch.equal(*gathered) and grads.isfinite().all() and grads.abs().sum() > 0
            losses = [torch.empty(()) for _ in range(2)]
            torch.distributed.all_gather(losses, loss.detach())
            assert losses[0] != losses[1]
            optimizer.step()
        body = model.module.backbone.body
        frozen = sorted({n.split('.')[0] for n, p in body.named_parameters() if not p.requires_grad})
        sys.stdout.write(f'rank {rank} {type(body.layer1[0].se).__name__} {frozen}\\n')
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--model', nargs='+')
    main(parser.parse_args())
"""


def test_launcher_and_ddp(tmp_path: Path) -> None:
    """A script that knows torchvision only, as its references/detection/train.py, on two processes with one image each
    of different sizes: every parameter takes part in every step (else DDP raises) and the gradients are equal."""
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'train.py').write_text(SCRIPT)
    (tmp_path / 'folder' / 'helper.py').write_text(f'TINY = {TINY}\n')
    models = {f'maskrcnn_{name}': tiny(name) for name in FAMILIES}
    for name, model in models.items():
        weights = {k: v for k, v in model.state_dict().items() if not k.startswith('fc.')}
        save_file(weights, tmp_path / f'{name}.safetensors')
    out = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
         '-m', 'timm_sepool.detection', 'folder/train.py', '--model', *models],
        cwd=tmp_path, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    assert sorted(out.stdout.splitlines()) == [
        f"rank {rank} {module} ['conv1']" for rank in range(2) for module in ('RGSEModule', 'SPSEModule')]


def test_run_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """argv, __name__, sys.path[0] and the exit code are those of `python SCRIPT`."""
    script = tmp_path / 'probe.py'
    script.write_text('import json, sys; print(json.dumps([sys.argv, __name__, sys.path])); sys.exit(3)')
    monkeypatch.setattr(sys, 'path', ['cwd', *sys.path])
    monkeypatch.setattr(sys, 'argv', ['detection.py', str(script), '--flag', 'x'])
    monkeypatch.setattr(torch.serialization, 'add_safe_globals', lambda classes: safe.extend(classes))
    safe = []
    with pytest.raises(SystemExit) as e:
        main()
    assert e.value.code == 3 and safe == [argparse.Namespace]  # what its checkpoints hold
    argv, name, path = json.loads(capsys.readouterr().out)
    assert (argv, name, path[0]) == ([str(script), '--flag', 'x'], '__main__', str(tmp_path))
    assert 'cwd' not in path
    for args in ([], [str(tmp_path / 'nosuch.py')]):
        monkeypatch.setattr(sys, 'argv', ['detection.py', *args])
        with pytest.raises(SystemExit) as e:
            main()
        assert e.value.code == 2
        assert capsys.readouterr().err.startswith('usage: python -m timm_sepool.detection SCRIPT')


def test_registered_builders() -> None:
    """torchvision's arguments and defaults: from scratch everything trains, from weights three stages do."""
    register_detectors()
    register_detectors()
    with torch.device('meta'):
        for kind, cls in (('fasterrcnn', FasterRCNN), ('maskrcnn', MaskRCNN)):
            for name in FAMILIES:
                model = get_model(f'{kind}_{name}', weights=None, weights_backbone=None, num_classes=None)
                assert type(model) is cls and all(p.requires_grad for p in model.parameters())
                assert any(isinstance(m, nn.BatchNorm2d) for m in model.backbone.body.modules())
                assert model.roi_heads.box_predictor.cls_score.out_features == 91
    with pytest.raises(ValueError, match="no weights 'DEFAULT'"):
        get_model('maskrcnn_rgse_resnet50', weights='DEFAULT')
    with pytest.raises(ValueError, match='nosuch is neither a file nor a tag of rgse_resnet50'):
        get_model('maskrcnn_rgse_resnet50', weights_backbone='nosuch')


def test_registered_pretrained(hub: HubServer) -> None:
    serve_donor(hub, 'resnet50.a1_in1k', **TINY)
    serve_donor(hub, 'resnet50.tv_in1k', **TINY)
    register_detectors()
    kwargs: Dict[str, Any] = dict(backbone_kwargs=TINY, **SMALL)
    for weights, tag in (('DEFAULT', 'from_resnet50_a1_in1k'), ('from_resnet50_tv_in1k', 'from_resnet50_tv_in1k')):
        model = get_model('fasterrcnn_spse_resnet50', weights=None, weights_backbone=weights, **kwargs)
        body = model.backbone.body
        expected = timm.create_model(f'spse_resnet50.{tag}', pretrained=True, **TINY).state_dict()
        assert all(torch.equal(v, expected[n]) for n, v in body.state_dict().items() if '.se.' not in n)
        assert {n.split('.')[0] for n, p in body.named_parameters() if not p.requires_grad} == {'conv1', 'layer1'}
        assert not any(isinstance(m, nn.BatchNorm2d) for m in body.modules())


@pytest.mark.parametrize('trainable_layers', [-1, 6, 2.5, 3.0, '3', None, True])
def test_bad_trainable_layers(trainable_layers) -> None:
    with pytest.raises(ValueError, match='trainable_layers must be an integer from 0 to 5'):
        faster_rcnn('rgse_resnet50', trainable_layers=trainable_layers)


@pytest.mark.parametrize('name,kwargs,reason', [
    ('vit_tiny_patch16_224', {}, r'strides \[16, 16, 16, 16\]'),
    ('rgse_resnet50', dict(output_stride=16), r'strides \[4, 8, 16, 16\]'),
    ('levit_128s', {}, 'gives none: .*out of range'),
    ('shvit_s1', {}, 'gives none: .*out of range'),
    ('efficientnet_b0', {}, 'branches .EfficientNetFeatures'),
    ('mambaout_femto', {}, 'NHWC features .FeatureListNet'),
])
def test_bad_backbone(name: str, kwargs: Dict[str, Any], reason: str) -> None:
    with torch.device('meta'), pytest.raises(ValueError, match=f'Detection needs .*, {name} .*{reason}'):
        mask_rcnn(name, backbone_kwargs=kwargs)


def test_bad_normalization() -> None:
    with pytest.raises(ValueError, match='takes images of 1 channels. Give image_mean and image_std'):
        mask_rcnn('rgse_resnet50', backbone_kwargs=dict(TINY, in_chans=1))
    mask_rcnn('rgse_resnet50', backbone_kwargs=dict(TINY, in_chans=1), image_mean=[0.5], image_std=[0.5])


def test_unknown_backbone() -> None:
    with pytest.raises(RuntimeError, match=r'Unknown model \(rgse_resnet51\)'):
        faster_rcnn('rgse_resnet51')
    with pytest.raises(ValueError, match='Unknown model fasterrcnn_rgse_resnet51'):
        register_detectors()
        get_model('fasterrcnn_rgse_resnet51')
