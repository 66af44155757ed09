""" The images of docs/evidence.md, as image folders SPLIT/CLASS/NUMBER.png of 32 px and one channel

    python docs/evidence_data.py --fashion /usr/share/datasets/fashion-mnist --out data

The first folder holds the four idx files of Fashion-MNIST, as they are or gzipped. Written are
- fashion: 6,000 of the 60,000 training images, and as validation the 10,000 test images
- held_out: the same training images, and as validation 6,000 others of them
- place, marked: the same generated images with two labellings (`draw`)
"""
import argparse
from pathlib import Path
from typing import Dict, Tuple

import numpy as np
from exact_start import read
from PIL import Image

NUM_TRAIN = 6_000  # of Fashion-MNIST
NUM_DRAWN = {'train': 3_000, 'validation': 2_000}
GLYPHS = np.array([[[row[i] == '#' for i in range(7)] for row in glyph.split()] for glyph in (
    '####### #.....# #.....# #.....# #.....# #.....# #######',
    '#.....# .#...#. ..#.#.. ...#... ..#.#.. .#...#. #.....#',
    '...#... ...#... ...#... ####### ...#... ...#... ...#...',
    '...#... ..#.#.. .#...#. #.....# .#...#. ..#.#.. ...#...')])


def draw(rng: np.random.Generator) -> Tuple[np.ndarray, Dict[str, int]]:
    """A noisy image (32, 32) with all four glyphs, one in each quadrant, in random order; one of them is brighter.

    Returns the image and its labels: 'place' is the glyph in the upper left quadrant, 'marked' the brighter one. Every
    image has both, so the two tasks differ in nothing but the label.
    """
    image, order, marked = rng.normal(60, 30, (32, 32)), rng.permutation(4), int(rng.integers(4))
    for quadrant, glyph in enumerate(order):
        y, x = (16 * np.array(divmod(quadrant, 2)) + rng.integers(1, 9, 2)).tolist()
        image[y:y + 7, x:x + 7] += (150 if glyph == marked else 75) * GLYPHS[glyph]
    return image.clip(0, 255).astype(np.uint8), {'place': int(order[0]), 'marked': marked}


def save(image: np.ndarray, folder: Path, label: int, number: int) -> None:
    path = folder / str(label) / f'{number:05}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--fashion', type=Path, required=True, metavar='FOLDER', help='idx files of Fashion-MNIST')
    parser.add_argument('--out', type=Path, required=True, metavar='FOLDER')
    args = parser.parse_args()
    (images, labels), test = read(args.fashion, 'train'), read(args.fashion, 't10k')
    order = np.random.default_rng(0).permutation(len(images))
    used, held_out = order[:NUM_TRAIN], order[NUM_TRAIN:2 * NUM_TRAIN]
    for folder, x, y in (
            ('fashion/train', images[used], labels[used]), ('fashion/validation', *test),
            ('held_out/train', images[used], labels[used]),
            ('held_out/validation', images[held_out], labels[held_out])):
        for i, (image, label) in enumerate(zip(np.pad(x, ((0, 0), (2, 2), (2, 2))), y)):
            save(image, args.out / folder, int(label), i)
    rng = np.random.default_rng(0)
    for split, count in NUM_DRAWN.items():
        for i in range(count):
            drawn, drawn_labels = draw(rng)
            for task, label in drawn_labels.items():
                save(drawn, args.out / task / split, label, i)


if __name__ == '__main__':
    main()
