""" The main job on an embedded data set: train, validate, save, load back and predict

A small network of the same code on scikit-learn's bundled handwritten digits (1797 images of 8 x 8 pixels, from the UCI
ML repository), all through timm's public API.
"""
import time
from itertools import count
from pathlib import Path
from typing import Any, Dict, Optional

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from timm.data import create_transform, resolve_data_config
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import accuracy, random_seed

from ._output import CommandError, new_path
from .hub import save_folder

MODEL_ARGS: Dict[str, Any] = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), in_chans=1)
DATA_CFG = dict(
    num_classes=10, input_size=(1, 32, 32), pool_size=(1, 1), mean=(0.5,), std=(0.5,), crop_pct=1.0,
    interpolation='bicubic')
BATCH_SIZE = 64
LR = 0.05


def load_digits():
    """The digits as PIL images and labels (N,), shuffled, a fifth of them last for validation.

    Raises:
        CommandError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise CommandError('The digits come with scikit-learn: pip install "timm_sepool[quickstart]".') from e
    from PIL import Image

    digits = load_digits()
    images = [Image.fromarray((image * (255 / 16)).astype('uint8')) for image in digits.images]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    return [images[i] for i in order], torch.from_numpy(digits.target[order])


@torch.inference_mode()
def top1(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 accuracy (%) of the model in eval mode on images (N, C, H, W)."""
    model.eval()
    logits = torch.cat([model(batch) for batch in images.split(256)])
    return accuracy(logits, labels)[0].item()


def quickstart(model_name: str, out: Optional[Path] = None, epochs: int = 12, seed: int = 0) -> float:
    """Run the whole job and print what it does.

    Args:
        model_name: Architecture, built with MODEL_ARGS.
        out: Folder to write, must not exist. By default the first free `sepool_quickstart[-N]`.
        epochs: Passes over the 1437 training images.
        seed: Seed of the initialization and of the batches, the split of the data is fixed.

    Returns:
        Top-1 accuracy (%) on the 360 validation images, of the network loaded back from the folder.

    Raises:
        CommandError: If out exists or can't be written, scikit-learn or tqdm is missing, or an argument makes no sense.
    """
    try:
        from tqdm import tqdm
    except ImportError as e:
        raise CommandError('The progress bar needs tqdm: pip install "timm_sepool[quickstart]".') from e
    if epochs < 1:
        raise CommandError(f'--epochs must be at least 1, got {epochs}.')
    if not 0 <= seed < 2 ** 32:
        raise CommandError(f'--seed must be from 0 to 2**32 - 1, got {seed}.')
    if out is None:
        names = (f'sepool_quickstart{f"-{i}" if i > 1 else ""}' for i in count(1))
        out = next(path for path in map(Path, names) if not path.exists())

    # The layers are too small to share: one thread is about as fast as two on an idle machine, does not stall on a busy
    # one, and gives the same result whatever the number of cores.
    torch.set_num_threads(1)
    start = time.perf_counter()
    with new_path(out) as folder:
        random_seed(seed)
        model = create_model(model_name, pretrained_cfg_overlay=DATA_CFG, **MODEL_ARGS)
        data_config = resolve_data_config(model=model)
        pil_images, labels = load_digits()
        transform = create_transform(**data_config)
        images = torch.stack([transform(image) for image in pil_images])
        num_train = len(images) * 4 // 5
        loader = DataLoader(
            TensorDataset(images[:num_train], labels[:num_train]), batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
        print(
            f'{model_name}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters: {epochs} epochs on '
            f'{num_train} handwritten digits'
        )

        optimizer = create_optimizer_v2(model, opt='sgd', lr=LR, momentum=0.9, weight_decay=5e-4)
        scheduler, epochs = create_scheduler_v2(optimizer, sched='cosine', num_epochs=epochs, warmup_epochs=0)
        with tqdm(total=epochs * len(loader), unit='step', disable=None) as progress:  # None: only on a terminal
            for epoch in range(epochs):
                model.train()
                for x, y in loader:
                    loss = F.cross_entropy(model(x), y)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    progress.update()
                scheduler.step(epoch + 1)
                acc = top1(model, images[num_train:], labels[num_train:])
                progress.write(f'epoch {epoch + 1:2d}  loss {loss.item():.3f}  validation top-1 {acc:.2f} %')

        save_folder(model, folder, MODEL_ARGS, resolve_data_config(model=model), [str(i) for i in range(10)])
    seconds = time.perf_counter() - start

    model = create_model(f'local-dir:{out}', pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=model))
    images = torch.stack([transform(image) for image in pil_images[num_train:]])
    acc = top1(model, images, labels[num_train:])
    with torch.inference_mode():
        probabilities = model(images[:1]).softmax(1)[0]
    prediction = int(probabilities.argmax())
    print(f"""
top-1 {acc:.2f} % on {len(images)} held-out digits, {seconds:.1f} s
wrote {out}/ (model.safetensors, config.json), loaded back by
  timm.create_model('local-dir:{out}', pretrained=True)
predicts a {prediction} ({100 * probabilities[prediction]:.1f} %) where a {int(labels[num_train])} was written

The same on ImageNet, with timm's own scripts:
  python train.py --data-dir /data/imagenet --model {model_name} --opt momentum --momentum 0.9 --lr 0.1 -b 256 \\
      --epochs 100 --sched step --decay-epochs 30 --decay-rate 0.1 --warmup-epochs 0 --weight-decay 1e-4 \\
      --opt-kwargs filter_bias_and_bn=False --smoothing 0 --color-jitter 0 --train-interpolation bilinear \\
      --interpolation bilinear --crop-pct 0.875
  python validate.py --data-dir /data/imagenet --model {model_name} --checkpoint output/train/RUN/model_best.pth.tar \\
      --img-size 224 --interpolation bilinear --crop-pct 0.875""")
    return acc
