""" Other libraries build, train and run the networks by their timm names, with nothing imported but themselves

Install the real libraries with `pip install '.[test,ecosystem]'`. A test is skipped if its library is missing.
"""
import sys
from pathlib import Path
from typing import List, Tuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_autoload import run
from torchvision.models.feature_extraction import create_feature_extractor

from helpers.common import FULL, TINY, images, tiny
from timm import create_model
from timm_sepool.cli.quickstart import MODEL_ARGS, load_digits

both_families = pytest.mark.parametrize('family', ['rgse', pytest.param('spse', marks=pytest.mark.full)])


def printed(folder: Path, code: str) -> List[str]:
    """Lines that a program prints."""
    return run([sys.executable, '-c', code], folder).stdout.splitlines()


def train(model: torch.nn.Module, criterion, batches, optimizer, lr: float, **kwargs) -> List[float]:
    """Loss of each step, with a learning rate that warms up to `lr` and decays."""
    optimizer = optimizer(model.parameters(), lr=lr, **kwargs)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches))
    losses = []
    for x, y in batches:
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def digits() -> Tuple[torch.Tensor, torch.Tensor]:
    """Digits (N, 1, 32, 32) in [-1, 1] and their labels."""
    pil_images, labels = load_digits()
    x = torch.stack([torch.from_numpy(np.array(i.resize((32, 32)))).float()[None] / 127.5 - 1 for i in pil_images])
    return x, labels


@both_families
def test_segmentation_models_pytorch(family: str, tmp_path: Path) -> None:
    """A Unet is built, an FPN learns to find squares."""
    smp = pytest.importorskip('segmentation_models_pytorch')
    assert printed(tmp_path, f"""
import segmentation_models_pytorch as smp, torch
model = smp.Unet('tu-{family}_resnet50', encoder_weights=None, classes=3)
print(tuple(model(torch.zeros(2, 3, 64, 96)).shape), type(model.encoder.model.layer1[0].se).__name__)
""") == [f'(2, 3, 64, 96) {family.upper()}Module']
    model = smp.FPN(f'tu-{family}_resnet50', encoder_weights=None, classes=1, **TINY)
    mask = torch.zeros(8, 1, 64, 64)
    for i in range(8):
        mask[i, :, 8 * (i % 4):8 * (i % 4) + 24, 16:48] = 1.
    x = torch.randn(8, 3, 64, 64) * 0.3 + mask * 2.
    losses = train(model, F.binary_cross_entropy_with_logits, [(x, mask)] * 60, torch.optim.AdamW, lr=3e-3)
    assert losses[-1] < 0.3 * losses[0], losses


@both_families
def test_fastai(family: str, tmp_path: Path) -> None:
    """A learner trains on 240 digits and is tested on 60."""
    pytest.importorskip('fastai')
    for i, (image, label) in enumerate(list(zip(*load_digits()))[:300]):
        folder = tmp_path / str(int(label))
        folder.mkdir(exist_ok=True)
        image.resize((32, 32)).save(folder / f'{i}.png')
    name, before, after = printed(tmp_path, f"""
from fastai.vision.all import ImageDataLoaders, Resize, accuracy, set_seed, vision_learner
set_seed(0)
dls = ImageDataLoaders.from_folder(
    {str(tmp_path)!r}, valid_pct=0.2, seed=0, bs=32, num_workers=0, item_tfms=Resize(32), device='cpu')
learner = vision_learner(dls, '{family}_resnet50', pretrained=False, metrics=accuracy, **{TINY})
with learner.no_bar(), learner.no_logging():
    before = learner.validate()
    learner.fit_one_cycle(8, 1e-2)
    print(type(learner.model[0].model.layer1[0].se).__name__, before[1], learner.validate()[1])
""")[-1].split()
    assert name == f'{family.upper()}Module'
    assert float(after) > max(0.5, float(before) + 0.2)


@both_families
def test_transformers(family: str, tmp_path: Path) -> None:
    """A backbone and a classifier are built and run."""
    pytest.importorskip('transformers')
    assert printed(tmp_path, f"""
import torch
from transformers import AutoBackbone, TimmBackboneConfig, TimmWrapperConfig, TimmWrapperForImageClassification
config = TimmBackboneConfig(backbone='{family}_resnet50', use_pretrained_backbone=False, out_indices=(1, 4))
backbone = AutoBackbone.from_config(config).eval()
print([tuple(f.shape) for f in backbone(torch.zeros(1, 3, 64, 96)).feature_maps])
config = TimmWrapperConfig(architecture='{family}_resnet50', num_labels=7)
model = TimmWrapperForImageClassification(config).eval()
print(tuple(model(torch.zeros(1, 3, 64, 96)).logits.shape), type(model.timm_model.layer1[0].se).__name__)
""")[-2:] == ['[(1, 256, 16, 24), (1, 2048, 2, 3)]', f'(1, 7) {family.upper()}Module']


@both_families
def test_lightning(family: str, tmp_path: Path) -> None:
    """A LightningModule trains, its checkpoint loads back."""
    lightning = pytest.importorskip('lightning')

    class Classifier(lightning.LightningModule):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = create_model(name, num_classes=10, **MODEL_ARGS)

        def training_step(self, batch, _):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    x, y = digits()
    lightning.seed_everything(0, verbose=False)
    module = Classifier(f'{family}_resnet50')
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:1280], y[:1280]), 64, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / 'last.ckpt')
    loaded = Classifier.load_from_checkpoint(tmp_path / 'last.ckpt', weights_only=False).eval()
    logits = loaded.model(x[1280:])
    assert torch.equal(logits, module.eval().model(x[1280:]))
    assert (logits.argmax(1) == y[1280:]).float().mean() > 0.5


def test_torchvision_feature_extractor() -> None:
    model, x = tiny('rgse_resnet50'), images(2, 72, 96)
    out = create_feature_extractor(model.train(), {'layer1.0.se.gate': 'gate', 'layer4': 'map'}).eval()(x)
    gates = []
    model.eval().layer1[0].se.gate.register_forward_hook(lambda module, args, output: gates.append(output))
    torch.testing.assert_close(out, {'map': model.forward_features(x), 'gate': gates[0]})


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')
@both_families
def test_onnxruntime_int8(family: str, tmp_path: Path) -> None:
    """Accuracy on held-out digits in onnxruntime: float32, then int8 by its own tools (static, per channel)."""
    ort = pytest.importorskip('onnxruntime')
    from onnxruntime import quantization

    x, y = digits()
    model = create_model(f'{family}_resnet50', num_classes=10, **MODEL_ARGS)
    batches = [(x[b], y[b]) for _ in range(5 if FULL else 3) for b in torch.randperm(1437)[:1408].split(64)]
    train(model, F.cross_entropy, batches, torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
    x, y, calibration = x[1437:], y[1437:], iter([{'x': b.numpy()} for b in x[:256].split(64)])
    fp32, prepared, int8 = (tmp_path / f'{name}.onnx' for name in ('fp32', 'prepared', 'int8'))
    torch.onnx.export(
        model.eval(), (x[:2],), fp32, dynamo=False, input_names=['x'], opset_version=17, dynamic_axes={'x': {0: 'n'}})
    quantization.shape_inference.quant_pre_process(fp32, prepared)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self):
            return next(calibration, None)

    # weights of 7 bits: with 8, CPUs without VNNI saturate the sums of two products
    quantization.quantize_static(prepared, int8, Reader(), per_channel=True, reduce_range=True)
    logits = [
        torch.from_numpy(ort.InferenceSession(path, providers=['CPUExecutionProvider']).run(None, {'x': x.numpy()})[0])
        for path in (fp32, int8)]
    torch.testing.assert_close(logits[0], model(x).detach(), rtol=1e-3, atol=1e-3)
    accuracies = [(out.argmax(1) == y).float().mean().item() for out in logits]
    sizes = [path.stat().st_size for path in (fp32, int8)]
    print(f'\n{family}: accuracy {accuracies}, bytes {sizes}')
    assert accuracies[0] > 0.9 and accuracies[1] > accuracies[0] - 0.03
    assert sizes[1] < 0.5 * sizes[0]
