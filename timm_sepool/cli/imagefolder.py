""" Turns an image list, as the official code reads it, into a folder of links that timm's scripts read """
import argparse
from pathlib import Path
from typing import List, Tuple

from ._output import CommandError, new_path


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'imagefolder', help="turn an image list of the official code into a folder that timm's scripts read")
    parser.add_argument('list', type=Path, metavar='LIST', help='text file with a line "IMAGE LABEL" per image')
    parser.add_argument('images', type=Path, metavar='IMAGES', help='directory that the image paths are relative to')
    parser.add_argument('output', type=Path, metavar='OUT', help='directory to write, must not exist')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write one folder per label, with a link to each listed image."""
    samples = _read_list(args.list, args.images)
    labels = {label for label, _, _ in samples}
    with new_path(args.output) as temporary:
        for label, name, source in samples:
            folder = temporary / f'{label:06d}'
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(source)
        has_gaps = len(labels) <= max(labels)
        if has_gaps:
            # timm numbers the folders it finds, so labels after a gap would shift without a class map
            class_map = '\n'.join(f'{label:06d}' for label in range(max(labels) + 1))
            (temporary / 'class_map.txt').write_text(class_map + '\n')
    print(f'wrote {args.output}: {len(samples)} links in {len(labels)} classes')
    if has_gaps:
        print(f'Some labels have no image. Pass --class-map {args.output}/class_map.txt to the scripts.')


def _read_list(path: Path, images: Path) -> List[Tuple[int, str, Path]]:
    """Label, name of the link and absolute path of every listed image."""
    try:
        lines = path.read_text(encoding='utf-8-sig').splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise CommandError(f'Cannot read the list {path}: {e}') from e
    samples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        image, label, *rest = line.split() + ['']
        if not label.isdecimal() or len(label) > 6 or any(rest):
            raise CommandError(f'{path}:{number}: expected "IMAGE LABEL" with a label from 0 to 999999, got {line!r}.')
        source = images / image
        if not source.is_file():
            raise CommandError(f'{path}:{number}: the image {source} does not exist. Is {images} the right directory?')
        samples.append((int(label), f'{number:07d}_{Path(image).name}', source.absolute()))
    if not samples:
        raise CommandError(f'{path} lists no images.')
    return samples
