""" Train, validate, save, load back and predict, in less than a minute and without a download

A small network of the same code learns scikit-learn's handwritten digits, all through timm's public API.
"""
import argparse
import shlex
from copy import deepcopy
from itertools import count
from pathlib import Path
from timeit import default_timer, repeat
from typing import Any, Dict

from ._digits import NUM_HELD_OUT, load_digits
from ._models import check_model
from ._output import CommandError, new_path, save_folder

MODEL_ARGS: Dict[str, Any] = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), in_chans=1)
DATA_CFG = dict(
    num_classes=10, input_size=(1, 32, 32), pool_size=(1, 1), mean=(0.5,), std=(0.5,), crop_pct=1.0,
    interpolation='bicubic')
BATCH_SIZE = 64


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'quickstart', help='train a small network on handwritten digits, then save it, load it and predict with it')
    parser.add_argument(
        '--model', default='rgse_resnet50', metavar='NAME',
        help='an rgse_ or spse_ model, built with fewer layers and channels (default: %(default)s)')
    parser.add_argument('--epochs', type=int, default=12, metavar='N', help='number of epochs (default: %(default)s)')
    parser.add_argument(
        '--seed', type=int, default=0, metavar='N', help='seed of the weights and batches (default: %(default)s)')
    parser.add_argument(
        '--out', type=Path, metavar='DIR',
        help='directory to write, must not exist (default: sepool_quickstart, or sepool_quickstart-2, -3, ...)')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Train, save, load and predict, then print what to do next."""
    arch = check_model(args.model)
    if arch == 'adopted':
        raise CommandError('The quickstart cannot train adopted networks. Choose an rgse_ or spse_ model.')
    if args.epochs < 1:
        raise CommandError(f'--epochs must be at least 1, got {args.epochs}.')
    if not 0 <= args.seed < 2 ** 32:
        raise CommandError(f'--seed must be from 0 to 2**32 - 1, got {args.seed}.')
    names = (f'sepool_quickstart{f"-{i}" if i > 1 else ""}' for i in count(1))
    out = args.out or next(path for path in map(Path, names) if not path.exists())
    try:
        from tqdm import tqdm
    except ImportError as e:
        raise CommandError('The progress bar needs tqdm: pip install "timm_sepool[quickstart]".') from e
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader, TensorDataset

    from timm.data import create_transform, resolve_model_data_config
    from timm.models import create_model
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import random_seed

    # the layers are too small to share, and the result does not depend on the number of cores
    torch.set_num_threads(1)
    start = default_timer()
    with new_path(out) as folder:
        random_seed(args.seed)
        model = create_model(arch, pretrained_cfg_overlay=DATA_CFG, **MODEL_ARGS)
        pil_images, labels = load_digits()
        transform = create_transform(**resolve_model_data_config(model))
        images = torch.stack([transform(image) for image in pil_images])
        num_train = len(images) - NUM_HELD_OUT
        loader = DataLoader(
            TensorDataset(images[:num_train], labels[:num_train]), batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
        # the validation after each epoch takes about as long as two steps
        estimate = args.epochs * (len(loader) + 2) * _seconds_per_step(model, images[:BATCH_SIZE], labels[:BATCH_SIZE])
        params = sum(p.numel() for p in model.parameters())
        print(
            f'Training a small {arch} ({params / 1e6:.2f} M parameters) for {args.epochs} epochs on {num_train} '
            f'handwritten digits. This takes about {max(estimate, 1):.0f} s.', flush=True)

        optimizer = create_optimizer_v2(model, opt='sgd', lr=0.05, momentum=0.9, weight_decay=5e-4)
        scheduler, epochs = create_scheduler_v2(optimizer, sched='cosine', num_epochs=args.epochs, warmup_epochs=0)
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

        save_folder(model, folder, MODEL_ARGS, resolve_model_data_config(model), [str(i) for i in range(10)])
        pil_images[num_train].save(folder / 'digit.png')
    seconds = default_timer() - start

    model = create_model(f'local-dir:{out}', pretrained=True)
    transform = create_transform(**resolve_model_data_config(model))
    acc = top1(model, torch.stack([transform(image) for image in pil_images[num_train:]]), labels[num_train:])
    print(f'\ntop-1 {acc:.2f} % on {NUM_HELD_OUT} held-out digits, {seconds:.1f} s\n'
          f'wrote {out}/ (model.safetensors, config.json, and digit.png, a held-out {int(labels[num_train])})')
    print(_next_steps(arch, out))


def top1(model: Any, images: Any, labels: Any) -> float:
    """Top-1 accuracy (%) of the model in eval mode on images (N, C, H, W)."""
    import torch

    from timm.utils import accuracy

    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(batch) for batch in images.split(256)])
    return accuracy(logits, labels)[0].item()


def _seconds_per_step(model: Any, images: Any, labels: Any) -> float:
    """Time (s) of a training step on one batch, measured on a copy of the model."""
    import torch.nn.functional as F

    model = deepcopy(model).train()
    times = repeat(lambda: F.cross_entropy(model(images), labels).backward(), number=1, repeat=4)
    return sum(times[1:]) / 3  # the first step also allocates memory


def _next_steps(arch: str, out: Path) -> str:
    """Commands that run on this machine, then those of ImageNet."""
    import torch

    device = '' if torch.cuda.is_available() else ' --device cpu'
    return f"""
Predict an image with it, digit.png or a digit of your own (white on black):
  python -c "
import sys, timm
from PIL import Image
folder, image = sys.argv[1:]
model = timm.create_model(f'local-dir:{{folder}}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
probability, label = model(transform(Image.open(image).convert('L'))[None]).softmax(1)[0].max(0)
print(f'{{label}} with probability {{probability:.3f}}')" {shlex.quote(str(out))} {shlex.quote(str(out / 'digit.png'))}

Fine-tune on your own images (DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, N classes), in a clone of
https://github.com/huggingface/pytorch-image-models:
  python train.py --data-dir DIR --model {arch} --pretrained --num-classes N --opt momentum --lr 0.01 -b 32 \\
      --epochs 20 --warmup-epochs 1 --weight-decay 1e-4 --smoothing 0.1{device}

Train on ImageNet with the paper's recipe, on a GPU:
  python train.py --data-dir /data/imagenet --model {arch} --opt momentum --momentum 0.9 --lr 0.1 -b 256 \\
      --epochs 100 --sched step --decay-epochs 30 --decay-rate 0.1 --warmup-epochs 0 --weight-decay 1e-4 \\
      --opt-kwargs filter_bias_and_bn=False --smoothing 0 --color-jitter 0 --train-interpolation bilinear \\
      --interpolation bilinear --crop-pct 0.875
  python validate.py --data-dir /data/imagenet --model {arch} --checkpoint output/train/RUN/model_best.pth.tar \\
      --img-size 224 --interpolation bilinear --crop-pct 0.875"""
