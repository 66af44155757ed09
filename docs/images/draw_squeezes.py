""" Draws squeezes.svg: which averages SE, SPSE and RGSE take of one channel. Needs nothing but Python.

`python docs/images/draw_squeezes.py` writes the picture beside this file. The channel is made up: two bumps on 32 x 32
positions. A cell's grey is its average.
"""
from math import exp
from pathlib import Path
from typing import List

SIZE = 32
CHANNEL = [
    [exp(-((y - 9) ** 2 + (x - 8.5) ** 2) / 30) + 0.7 * exp(-((y - 22) ** 2 + (x - 24) ** 2) / 20) for x in range(SIZE)]
    for y in range(SIZE)]
SIDE, GAP, TOP = 76, 16, 58  # of a square, between squares, of the row of squares (px)


def square(left: float, grid: int, label: str) -> List[str]:
    """SVG of the channel, averaged over grid x grid cells, with a label below."""
    out, step, cell = ['<g shape-rendering="crispEdges">'], SIZE // grid, SIDE / grid
    for i in range(grid):
        for j in range(grid):
            values = [CHANNEL[y][x] for y in range(i * step, (i + 1) * step) for x in range(j * step, (j + 1) * step)]
            grey = round(245 - 205 * min(1., 1.25 * sum(values) / len(values)))
            line = '' if grid == SIZE else ' stroke="#fff" stroke-width="1"'
            out.append(
                f'<rect x="{left + j * cell:.2f}" y="{TOP + i * cell:.2f}" width="{cell:.2f}" height="{cell:.2f}" '
                f'fill="rgb({grey},{min(255, grey + 6)},{min(255, grey + 22)})"{line}/>')
    out.append(
        f'</g><rect x="{left}" y="{TOP}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#345" stroke-width="1.2"/>'
        f'<text x="{left + SIDE / 2}" y="{TOP + SIDE + 17}" text-anchor="middle">{label}</text>')
    return out


def panel(left: float, title: str, grids: List[int], labels: List[str], sign: str) -> List[str]:
    """SVG of one family: a title over its squares, which `sign` joins."""
    width = len(grids) * SIDE + (len(grids) - 1) * GAP
    out = [f'<text x="{left + width / 2}" y="{TOP - 32}" text-anchor="middle" class="title">{title}</text>']
    for i, (grid, label) in enumerate(zip(grids, labels)):
        x = left + i * (SIDE + GAP)
        out += square(x, grid, label)
        if i and sign:
            out.append(f'<text x="{x - GAP / 2}" y="{TOP + SIDE / 2 + 5}" text-anchor="middle">{sign}</text>')
    return out


def draw() -> str:
    """The whole picture."""
    panels = [
        ('one channel', [SIZE], ['every position'], ''),
        ('SE', [1], ['1 average'], ''),
        ('SPSE: every stage', [1, 2, 4], ['1 x 1', '2 x 2', '4 x 4'], '+'),
        ('RGSE: stages 1 to 4', [8, 4, 2, 1], ['8 x 8', '4 x 4', '2 x 2', '1 x 1'], ''),
    ]
    body, left = [], 28.
    for title, grids, labels, sign in panels:
        body += panel(left, title, grids, labels, sign)
        left += len(grids) * (SIDE + GAP) - GAP + 40
    width, height = round(left - 12), TOP + SIDE + 30
    return '\n'.join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        '<style>text { font: 13px sans-serif; fill: #223; } .title { font-size: 15px; font-weight: bold; }</style>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>', *body, '</svg>']) + '\n'


if __name__ == '__main__':
    path = Path(__file__).with_name('squeezes.svg')
    path.write_text(draw())
    print(f'wrote {path}')
