""" Does it matter that inserted attention starts exactly where the pretrained network is?

A plain narrow ResNet-50 is trained on five classes of Fashion-MNIST and fine-tuned on a few images of the other five:
as it is, with attention inserted at random weights, and with attention that starts as the identity (`adopt`). The
protocol and the results are in docs/exact_start.md.

    python docs/exact_start.py --data FOLDER --jobs 2    # trains; writes exact_start.csv and images/exact_start.png
    python docs/exact_start.py --report                  # tables and picture from exact_start.csv, without training

FOLDER holds the four idx files of Fashion-MNIST, as they are or gzipped. Either of these brings them:
the Debian package dataset-fashion-mnist (FOLDER is /usr/share/datasets/fashion-mnist), or
torchvision.datasets.FashionMNIST('data', download=True) (FOLDER is data/FashionMNIST/raw).
"""
import argparse
import csv
import gzip
import multiprocessing
from copy import deepcopy
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import timm
from timm_sepool import adopt
from timm_sepool.adopted import UnitGate
from timm_sepool.cli._comparison import holm
from timm_sepool.squeeze import SEPoolModule

DOCS = Path(__file__).parent
CSV = DOCS / 'exact_start.csv'
BEGIN, END = '<!-- tables of exact_start.py -->', '<!-- end of the tables -->'  # in exact_start.md
Data = Tuple[torch.Tensor, torch.Tensor]  # images (N, 1, 32, 32) and labels (N,)
Rows = List[Dict[str, Any]]  # one per run, as in the CSV file

MODEL_ARGS = dict(layers=(3, 4, 6, 3), channels=(8, 16, 32, 64), in_chans=1, num_classes=5)
GRID_SIZE = (1, 224, 224)  # the paper's: grids of 8, 4, 2 and 1 cells per side, as large as the maps of a 32 px image
DONOR_CLASSES = (0, 1, 3, 5, 8)  # T-shirt, trouser, dress, sandal, bag
TUNING_CLASSES = (2, 4, 6, 7, 9)  # pullover, coat, shirt, sneaker, ankle boot
DONOR_IMAGES, TEST_IMAGES = 2000, 200  # per class
DONOR_EPOCHS, DONOR_BATCH_SIZE, DONOR_LR = 4, 100, 0.1
TUNING_BATCH_SIZE, WEIGHT_DECAY = 25, 1e-4
SCRATCH_LR, TUNING_LR = 0.05, 0.1
REGIMES = {'short': (0, 1, 2, 3, 6, 10), 'long': (0, 1, 3, 6, 10, 20, 40)}  # epochs to test after, the last is the end
SETTINGS = tuple((images, regime) for images in (5, 20) for regime in REGIMES)  # images per class of the new task
EARLY = 3  # epoch of the early measure
ENDS = range(2, 2 * len(SETTINGS) + 1, 2)  # columns of `measures`: the end of each setting

ATTENTIONS = ('se', 'spse', 'rgse', 'cbam')
ARMS = ('scratch', 'plain', *(f'{a} {start}' for a in ATTENTIONS for start in ('random', 'exact')),
        'spse linear', 'rgse linear')
COMPARISONS = {
    'Exact against random': [(f'{a} exact', f'{a} random') for a in ATTENTIONS],
    'Exact, with norm against linear': [(f'{a} exact', f'{a} linear') for a in ('spse', 'rgse')],
    'Exact against plain': [(f'{a} exact', 'plain') for a in ATTENTIONS],
}


def read(folder: Path, split: str) -> List[np.ndarray]:
    """Images (N, 28, 28) of a split, 'train' or 't10k', and their labels (N,)."""
    arrays = []
    for name in (f'{split}-images-idx3-ubyte', f'{split}-labels-idx1-ubyte'):
        path = folder / name
        raw = path.read_bytes() if path.exists() else gzip.decompress(Path(f'{path}.gz').read_bytes())
        # byte 3 is the number of axes, whose sizes follow as big-endian integers
        shape = np.frombuffer(raw, '>i4', count=raw[3], offset=4)
        arrays.append(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape))
    return arrays


def load(folder: Path, split: str) -> Data:
    """Images of a split, padded to 32 px and standardized, with labels."""
    pixels, labels = (torch.from_numpy(array.copy()) for array in read(folder, split))
    images = F.pad(pixels.unsqueeze(1) / 255, (2, 2, 2, 2))
    return (images - 0.286) / 0.353, labels.long()  # mean and deviation of the training images


def select(data: Data, classes: Sequence[int], per_class: int, seed: int) -> Data:
    """The same number of images of each class, drawn by the seed, labelled by position in classes."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.where(data[1] == c)[0] for c in classes]
    rows = [r[torch.randperm(len(r), generator=generator)[:per_class]] for r in rows]
    return data[0][torch.cat(rows)], torch.arange(len(classes)).repeat_interleave(per_class)


def top1(model: nn.Module, data: Data) -> float:
    """Top-1 accuracy (%)."""
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(x.contiguous(memory_format=torch.channels_last)) for x in data[0].split(250)])
    return 100 * (logits.argmax(1) == data[1]).double().mean().item()


def train(model: nn.Module, data: Data, test: Data, epochs: Sequence[int], batch_size: int, lr: float) -> List[float]:
    """SGD to the last of the epochs with a cosine schedule; top-1 on the test images after each of the epochs."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=WEIGHT_DECAY)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs[-1] * (len(data[0]) // batch_size))
    accuracies = [top1(model, test)] if 0 in epochs else []
    for epoch in range(1, epochs[-1] + 1):
        model.train()
        for batch in torch.randperm(len(data[0])).split(batch_size):
            x = data[0][batch].contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), data[1][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        if epoch in epochs:
            accuracies.append(top1(model, test))
    return accuracies


def insert(model: nn.Module, arm: str) -> None:
    """Insert the arm's attention into a plain network, in place."""
    attention, _, start = arm.partition(' ')
    if not start:
        return
    donor_names = {name for name, _ in model.named_modules()}
    norm = start != 'linear' if attention in ('spse', 'rgse') else None
    adopt(model, attention, input_size=GRID_SIZE, norm=norm)
    if start == 'random':
        # what is usually done: torch's initialization of every layer and the sigmoid, which starts near 1/2
        for module in [module for name, module in model.named_modules() if name not in donor_names]:
            if isinstance(module, SEPoolModule):
                module.init_weights()
            elif isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                module.reset_parameters()
            for name, child in module.named_children():
                if isinstance(child, UnitGate):
                    setattr(module, name, nn.Sigmoid())


def create(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model('resnet50', **MODEL_ARGS).to(memory_format=torch.channels_last)


def run(seed: int, arms: Sequence[str], folder: Path) -> Rows:
    """Train the donor of a seed and fine-tune it in every arm and setting: one row per run."""
    torch.set_num_threads(1)
    train_data, test_data = load(folder, 'train'), load(folder, 't10k')
    donor_test = select(test_data, DONOR_CLASSES, TEST_IMAGES, 0)
    tuning_test = select(test_data, TUNING_CLASSES, TEST_IMAGES, 0)
    donor = create(seed)
    donor_data = select(train_data, DONOR_CLASSES, DONOR_IMAGES, seed)
    train(donor, donor_data, donor_test, [DONOR_EPOCHS], DONOR_BATCH_SIZE, DONOR_LR)
    rows = []
    for arm in arms:
        print(f'seed {seed}: {arm}', flush=True)
        start = create(seed + 1000) if arm == 'scratch' else deepcopy(donor)
        torch.manual_seed(seed)  # of the attention
        insert(start, arm)
        before = top1(start, donor_test)  # with the donor's head
        for images, regime in SETTINGS:
            model = deepcopy(start)
            torch.manual_seed(seed)  # of the head and of the order of the images
            model.reset_classifier(len(TUNING_CLASSES))
            data = select(train_data, TUNING_CLASSES, images, seed)
            lr = SCRATCH_LR if arm == 'scratch' else TUNING_LR
            accuracies = train(model, data, tuning_test, REGIMES[regime], TUNING_BATCH_SIZE, lr)
            row = {'seed': seed, 'arm': arm, 'images': images, 'regime': regime, 'donor': round(before, 1)}
            rows.append({**row, **{f'epoch{e}': round(a, 1) for e, a in zip(REGIMES[regime], accuracies)}})
    return rows


def interval(values: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Mean over the seeds (axis 0) and half the width of its 95 % t interval."""
    return values.mean(0), stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)


def curves(rows: Rows, images: int, regime: str, arm: str) -> np.ndarray:
    """Accuracies (seeds, 1 + tests): the donor's task before the first step, then the new task after each epoch."""
    runs = [r for r in rows if (int(r['images']), r['regime'], r['arm']) == (images, regime, arm)]
    columns = ['donor', *(f'epoch{epoch}' for epoch in REGIMES[regime])]
    return np.array([[float(r[c]) for c in columns] for r in sorted(runs, key=lambda r: int(r['seed']))])


def measures(rows: Rows, arm: str) -> np.ndarray:
    """The donor's task before the first step, then of each setting the new task early and at the end (seeds, 9)."""
    values = [(curves(rows, *setting, arm), REGIMES[setting[1]].index(EARLY) + 1) for setting in SETTINGS]
    return np.stack([values[0][0][:, 0], *(v[:, i] for v, early in values for i in (early, -1))], axis=1)


def tables(rows: Rows) -> str:
    """The tables of docs/exact_start.md."""
    columns = ["donor's task"]
    for images, regime in SETTINGS:
        columns += [f'{images} images, {regime}: epoch {EARLY}', f'epoch {REGIMES[regime][-1]}']
    head = f' | {" | ".join(columns)} |\n|{"---|" * 10}'
    lines = [f'Top-1 (%):\n\n| arm{head}']
    for arm in ARMS:
        lines.append(f'| {arm} | {" | ".join(map("{:.1f} ± {:.1f}".format, *interval(measures(rows, arm))))} |')
    for title, pairs in COMPARISONS.items():
        lines.append(f'\n{title} (points; in brackets p, adjusted):\n\n| difference{head}')
        differences = [measures(rows, a) - measures(rows, b) for a, b in pairs]
        p_values = iter(holm([stats.ttest_1samp(d[:, end], 0).pvalue for d in differences for end in ENDS]))
        for (a, b), difference in zip(pairs, differences):
            cells = list(map('{:+.1f} ± {:.1f}'.format, *interval(difference)))
            for end in ENDS:
                cells[end] += f' ({next(p_values):.3f})'
            lines.append(f'| {a} - {b} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def draw(rows: Rows, path: Path) -> None:
    """Top-1 on the new task, mean and 95 % interval: a row per setting, a column per attention."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(SETTINGS), len(ATTENTIONS), figsize=(11, 10), sharex='row', sharey='row')
    for (images, regime), row in zip(SETTINGS, axes):
        for attention, ax in zip(ATTENTIONS, row):
            for label, arm, color, style in (
                    ('exact start', f'{attention} exact', '#c44e28', '-'),
                    ('random start', f'{attention} random', '#2f6690', '-'),
                    ('plain', 'plain', '#222222', '--'),
                    ('from scratch', 'scratch', '#999999', ':')):
                mean, half = interval(curves(rows, images, regime, arm)[:, 1:])
                ax.plot(REGIMES[regime], mean, style, color=color, label=label, linewidth=1.5)
                ax.fill_between(REGIMES[regime], mean - half, mean + half, color=color, alpha=0.15, linewidth=0)
            ax.set_xscale('function', functions=(np.sqrt, np.square))
            ax.set_xticks(REGIMES[regime])
            ax.set_title(f'{attention.upper()}, {images} images per class, {regime}', fontsize=9)
            ax.grid(alpha=0.25)
        row[0].set_ylabel('top-1 (%)')
    for ax in axes[-1]:
        ax.set_xlabel('epoch')
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc='lower center', ncol=4, frameon=False)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, metavar='FOLDER', help='train on the idx files of FOLDER, then report')
    parser.add_argument('--report', action='store_true', help='report from the runs of --csv')
    parser.add_argument('--jobs', type=int, default=2, metavar='N', help='processes (default: %(default)s)')
    parser.add_argument('--csv', type=Path, default=CSV, metavar='FILE', help='runs (default: %(default)s)')
    parser.add_argument('--seeds', type=int, nargs='+', default=list(range(10)), metavar='N')
    parser.add_argument('--arms', nargs='+', default=list(ARMS), choices=ARMS, metavar='ARM')
    args = parser.parse_args()
    if bool(args.data) == args.report:
        parser.error('Pass --data FOLDER to train, or --report.')
    if args.data:
        tasks = [(seed, args.arms, args.data) for seed in args.seeds]
        with multiprocessing.get_context('spawn').Pool(args.jobs) as pool:
            runs = [row for rows in pool.starmap(run, tasks, chunksize=1) for row in rows]
        with args.csv.open('w', newline='') as f:
            writer = csv.DictWriter(f, list(dict.fromkeys(key for row in runs for key in row)), lineterminator='\n')
            writer.writeheader()
            writer.writerows(runs)
    with args.csv.open(newline='') as f:
        rows = list(csv.DictReader(f))
    if args.csv == CSV:
        print(tables(rows))
        page = DOCS / 'exact_start.md'
        head, _, rest = page.read_text().partition(BEGIN)
        page.write_text(f'{head}{BEGIN}\n\n{tables(rows)}\n\n{END}{rest.partition(END)[2]}')
        draw(rows, DOCS / 'images' / 'exact_start.png')


if __name__ == '__main__':
    main()
