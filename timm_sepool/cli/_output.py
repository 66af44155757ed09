""" Reading checkpoints and writing outputs for the command line: one clear error, nothing half-written """
import argparse
import atexit
import os
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Dict, Iterator, Optional

from safetensors import SafetensorError


class CommandError(Exception):
    """Bad input to a subcommand. The message names the thing and the mend."""


def check_new(path: Path) -> None:
    """Raise CommandError if `path` exists or can't be written, before any work is done for it."""
    if os.path.lexists(path):
        raise CommandError(f'{path} exists and is left as it is. Choose another output or remove it first.')
    if not os.access(path.parent, os.W_OK | os.X_OK) or not path.parent.is_dir():
        raise CommandError(f'Can not write {path}: {path.parent} is no writable folder. Choose another output.')


@contextmanager
def temporary_folder(parent: Optional[Path] = None) -> Iterator[Path]:
    """Yield a new folder for the body alone and remove it, even if a second Ctrl-C interrupts the removal."""
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
    """Yield a temporary path beside `path` for the body to write, renamed to `path` if the body succeeds.

    Raises:
        CommandError: If `path` exists or can't be written.
    """
    path = Path(path)
    check_new(path)
    try:
        with temporary_folder(path.parent) as folder:
            temporary = folder / path.name
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            for file in [temporary, *temporary.rglob('*')]:
                if file.is_file() and not file.is_symlink():
                    file.chmod(0o666 & ~umask)  # safetensors writes files for their owner only
            _rename(temporary, path)
    except BrokenPipeError:  # of what the body prints
        raise
    except (OSError, SafetensorError) as e:
        check_new(path)  # says it better if the output has appeared or its folder has gone meanwhile
        raise CommandError(f'Can not write {path}: {e}. Choose another output or make room.') from e


def _rename(source: Path, target: Path) -> None:
    """Rename, and fail if another process has written the target meanwhile, which os.rename would replace by a file."""
    if source.is_dir():
        os.rename(source, target)
        return
    try:
        os.link(source, target)  # the source is removed with its folder
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        check_new(target)
        os.rename(source, target)


def first_line(error: BaseException) -> str:
    """First line of an error's message, or the error itself if it has none."""
    return next(iter(str(error).strip().splitlines()), '') or repr(error)


def load_checkpoint(path: Path, use_ema: bool = False) -> Dict[str, Any]:
    """Read the state dict of a safetensors file or of a pickled checkpoint, the latter without running its code.

    Raises:
        CommandError: If the file is missing, damaged, needs code to be run, or has no (EMA) state dict.
    """
    import torch
    from safetensors.torch import load_file

    from timm.models import clean_state_dict

    try:
        if path.suffix == '.safetensors':
            checkpoint = load_file(path)
        else:
            # timm's training checkpoints hold their arguments
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError as e:
        raise CommandError(f'There is no checkpoint {path}.') from e
    except OSError as e:
        raise CommandError(
            f'Can not read the checkpoint {path}: {first_line(e)}. Name a file that can be read.'
        ) from e
    except Exception as e:  # a damaged pickle can end in any
        if 'unsupported global' in str(e).lower():
            raise CommandError(
                f'{path} asks for code to be run, which is refused. Save its state dict alone, by '
                'torch.save(model.state_dict(), ...), where you trust it.'
            ) from e
        raise CommandError(
            f'{path} is damaged or no checkpoint ({type(e).__name__}). Get it again; a safetensors file has to be '
            'named .safetensors.'
        ) from e

    keys = ('state_dict_ema', 'model_ema') if use_ema else ('state_dict', 'model')
    if isinstance(checkpoint, dict):
        found = next((checkpoint[k] for k in keys if isinstance(checkpoint.get(k), dict)), None)
        if use_ema and found is None:
            raise CommandError(f'{path} holds no EMA weights. Leave out --use-ema, or train with --model-ema.')
        checkpoint = checkpoint if found is None else found
    if (
        not isinstance(checkpoint, dict) or not checkpoint
        or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in checkpoint.items())
    ):
        raise CommandError(f'{path} holds no state dict (tensors by name). Save one with torch.save or safetensors.')
    return clean_state_dict(checkpoint)


def check_figure_path(path: Path) -> None:
    """Raise CommandError if `save_figure` could not write `path`, before any work is done for it."""
    check_new(path)
    if path.suffix not in ('.png', '.pdf', '.svg'):
        raise CommandError(f'{path} must be named .png, .pdf or .svg.')
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as e:
        raise CommandError('Drawing needs matplotlib: pip install "timm_sepool[plot]".') from e


def save_figure(figure, path: Path) -> None:
    """Save a `matplotlib.figure.Figure` in the format of the path's suffix. Raises as `new_path`."""
    with new_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])
