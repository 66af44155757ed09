""" Outputs of the commands: written whole or not at all, and one clear error otherwise """
import atexit
import json
import os
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Dict, Iterator, List, Optional

from safetensors import SafetensorError

# what a pretrained cfg says of the source of its weights
SOURCE_FIELDS = ('tag', 'url', 'file', 'hf_hub_id', 'source', 'origin_url', 'description', 'paper_ids', 'paper_name')
TEST_FIELDS = ('test_input_size', 'test_crop_pct', 'pool_size', 'test_pool_size')
LABEL_FIELDS = ('label_names', 'label_descriptions', 'label_offset')


class CommandError(Exception):
    """Bad input to a command. The message says what is wrong, then what to do."""


def first_line(error: BaseException) -> str:
    """First line of an error's message, or the error itself if it has none."""
    return next(iter(str(error).strip().splitlines()), '') or repr(error)


def check_new(path: Path) -> None:
    """Raise CommandError, before any work is done, if `path` exists or its directory is missing or not writable."""
    if os.path.lexists(path):
        raise CommandError(f'{path} already exists. Choose another output path or remove it first.')
    folder = path.parent
    if not os.path.lexists(folder):
        raise CommandError(
            f'Cannot write {path}: the directory {folder} does not exist. Create it first: mkdir -p {folder}')
    if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
        raise CommandError(f'Cannot write {path}: {folder} is not a writable directory. Choose another output path.')


@contextmanager
def temporary_folder(parent: Optional[Path] = None) -> Iterator[Path]:
    """Yield a new folder and remove it after the body, even if a second Ctrl-C interrupts the removal."""
    folder = Path(mkdtemp(prefix='.timm-sepool-', dir=parent))
    remove = partial(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(remove)
    try:
        yield folder
    finally:
        remove()
        atexit.unregister(remove)


@contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path for the body to write, and rename it to `path` once the body has succeeded.

    Raises CommandError if `path` exists or cannot be written.
    """
    check_new(path)
    try:
        with temporary_folder(path.parent) as folder:
            temporary = folder / path.name
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            for file in [temporary, *temporary.rglob('*')]:
                if file.is_file() and not file.is_symlink():
                    file.chmod(0o666 & ~umask)  # safetensors makes files that only their owner can read
            _rename(temporary, path)
    except BrokenPipeError:  # the body printed, and nobody reads it
        raise
    except (OSError, SafetensorError) as e:
        check_new(path)  # has a better message if the output has appeared or its directory has gone meanwhile
        raise CommandError(f'Cannot write {path}: {e}. Free some disk space or choose another output path.') from e


@contextmanager
def replaced_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path for the body to write, and replace `path` by it once the body has succeeded.

    Raises CommandError if `path` cannot be written. It is as before then.
    """
    temporary = path.with_name(f'.{os.getpid()}-{path.name}')  # the suffix tells matplotlib the format
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        raise CommandError(f'Cannot write {path}: {e}. Free some disk space or choose another output path.') from e
    finally:
        temporary.unlink(missing_ok=True)


def _rename(source: Path, target: Path) -> None:
    """Rename, or fail if another process has written the target meanwhile: os.rename would replace a file."""
    try:
        if not source.is_dir():
            os.link(source, target)  # the source is removed with its folder
            return
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        check_new(target)
    os.rename(source, target)


def save_folder(
        model: Any, folder: Path, model_args: Dict[str, Any], preprocessing: Optional[Dict[str, Any]] = None,
        label_names: Optional[List[str]] = None,
) -> None:
    """Write model.safetensors and config.json, for `hf-hub:`, `local-dir:` and transformers' timm wrapper.

    The network was created with `model_args`. `preprocessing` has the entries for the config of trained weights, which
    replace those of their source. Trained weights do not inherit the `label_names` (of the classes) either.
    """
    from timm.models import save_for_hf

    save_for_hf(
        model, str(folder), safe_serialization=True, model_args=model_args,
        model_config=dict(label_names=label_names) if label_names else None)
    config = json.loads((folder / 'config.json').read_text())
    # num_classes stays at the config's top level: transformers' wrapper passes it beside model_args
    config.setdefault('model_args', {}).pop('num_classes', None)
    for key in SOURCE_FIELDS + (TEST_FIELDS + LABEL_FIELDS if preprocessing else ()):
        config['pretrained_cfg'].pop(key, None)
    config['pretrained_cfg'].update(preprocessing or {})
    (folder / 'config.json').write_text(json.dumps(config, indent=2))


def check_figure_path(path: Path) -> None:
    """Raise CommandError if `save_figure` could not write `path`, before any work is done for it."""
    check_new(path)
    if path.suffix not in ('.png', '.pdf', '.svg'):
        raise CommandError(f'The name of {path} must end in .png, .pdf or .svg.')
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as e:
        raise CommandError('Drawing needs matplotlib: pip install "timm_sepool[plot]".') from e


def save_figure(figure: Any, path: Path) -> None:
    """Save a `matplotlib.figure.Figure` in the format of the path's suffix. Raises as `new_path`."""
    with new_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])
