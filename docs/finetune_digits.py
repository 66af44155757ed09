""" Fine-tuning from a donor against training from scratch, on handwritten digits, with equal steps

A small plain ResNet is trained on 800 digits. An SPSE / RGSE network of its size then sees 160 other digits for a few
epochs: once it starts from the donor's weights, once from scratch. `python docs/finetune_digits.py` prints the table of
docs/weights.md.
"""
import statistics
from typing import Dict, List, Tuple

import torch
import torch.nn.functional as F

import timm
from timm.data import create_transform
from timm_sepool.cli.quickstart import DATA_CFG, MODEL_ARGS, load_digits, top1

DONOR_IMAGES, TUNING_IMAGES = 800, 160
DONOR_EPOCHS, TUNING_EPOCHS, BATCH_SIZE, LR = 8, 4, 32, 0.02


def train(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int) -> None:
    """SGD with momentum and a constant learning rate; the seed draws the batches."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def compare(name: str, seeds: List[int], donor_name: str = 'resnet50') -> Dict[str, List[float]]:
    """Top-1 accuracies (%) on the 837 digits that neither training saw, by start, one per seed."""
    transform = create_transform(**{k: v for k, v in DATA_CFG.items() if k not in ('num_classes', 'pool_size')})
    digits, labels = load_digits()
    images = torch.stack([transform(digit) for digit in digits])
    tuning = slice(DONOR_IMAGES, DONOR_IMAGES + TUNING_IMAGES)
    test = slice(DONOR_IMAGES + TUNING_IMAGES, None)
    kwargs = dict(MODEL_ARGS, num_classes=10)
    accuracies = {'donor': [], 'scratch': [], 'donor before fine-tuning': []}
    for seed in seeds:
        torch.manual_seed(seed)
        donor = timm.create_model(donor_name, **kwargs)
        train(donor, images[:DONOR_IMAGES], labels[:DONOR_IMAGES], DONOR_EPOCHS, seed)
        accuracies['donor before fine-tuning'].append(top1(donor, images[test], labels[test]))
        donor_cfg = dict(state_dict=donor.state_dict(), num_classes=10, input_size=(1, 32, 32))
        for start, overlay in (('donor', donor_cfg), ('scratch', None)):
            model = timm.create_model(name, pretrained=start == 'donor', pretrained_cfg_overlay=overlay, **kwargs)
            train(model, images[tuning], labels[tuning], TUNING_EPOCHS, seed)
            accuracies[start].append(top1(model, images[test], labels[test]))
    return accuracies


def summary(values: List[float]) -> Tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values)


if __name__ == '__main__':
    torch.set_num_threads(1)
    for name in ('rgse_resnet50', 'spse_resnet50'):
        for start, values in compare(name, seeds=list(range(5))).items():
            print(f'{name} from {start}: {summary(values)[0]:.1f} +- {summary(values)[1]:.1f} %', values)
