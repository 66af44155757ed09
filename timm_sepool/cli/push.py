""" Weights, config and model card to the Hugging Face Hub """
import argparse
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Type

from safetensors import SafetensorError

from ._arguments import add_checkpoint, add_preprocessing, preprocessing
from ._models import check_model
from ._output import CommandError, first_line, new_path, save_folder, temporary_folder


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser('push', help='weights, config and model card to the Hugging Face Hub')
    parser.add_argument('model', metavar='MODEL[.TAG]', help='architecture, with the tag whose weights to push')
    parser.add_argument('--repo-id', required=True, metavar='USER/NAME', help='repository, created if missing')
    add_checkpoint(parser)
    parser.add_argument('--args', type=Path, metavar='FILE', help='args.yaml of the training run, if it is elsewhere')
    add_preprocessing(parser)
    parser.add_argument('--labels', type=Path, metavar='FILE', help='class names, one a line')
    parser.add_argument('--metrics', type=Path, metavar='FILE', help='results file (CSV) of validate.py, for the card')
    parser.add_argument('--license', default='apache-2.0', help='license of trained weights (default: %(default)s)')
    parser.add_argument('--private', action='store_true', help='create the repository private')
    parser.add_argument('--force', action='store_true', help='replace a network of another architecture')
    parser.add_argument('--dry-run', type=Path, metavar='DIR', help='write this folder instead of uploading')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Export the network, then upload it or keep the folder."""
    from huggingface_hub import get_token

    check_model(args.model)
    _check_repo_id(args.repo_id)
    if args.checkpoint is None and (preprocessing(args) or args.model_kwargs or args.args or args.use_ema):
        raise CommandError(
            'Preprocessing, model arguments and --use-ema need --checkpoint: the weights of a tag have a config of '
            'their own. Add --checkpoint or leave them out.')
    if args.checkpoint is None and args.model == 'adopted':
        raise CommandError('adopted has no weights of its own. Name trained ones by --checkpoint.')
    if args.dry_run:
        with new_path(args.dry_run) as temporary:
            export(args, temporary)
        print(f'wrote {args.dry_run}, nothing was uploaded')
        return
    if get_token() is None:
        raise CommandError('No Hugging Face token was found. Set HF_TOKEN or run `hf auth login`.')
    with temporary_folder() as folder:
        try:
            export(args, folder)
        except (OSError, SafetensorError) as e:
            raise CommandError(
                f'Cannot write temporary files: {e}. Free some disk space or set TMPDIR to another folder.') from e
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f'uploading {size / 1e6:.1f} MB to {args.repo_id}')  # the Hub client shows progress bars
        url = upload(folder, args.repo_id, args.private, args.force)
    print(f"pushed {url}\n\n  timm.create_model('hf-hub:{args.repo_id}', pretrained=True)")


def export(args: argparse.Namespace, folder: Path) -> None:
    """Write what `push` uploads: model.safetensors, config.json and README.md (the card).

    Raises:
        CommandError: If an input is missing, damaged or does not fit the others.
    """
    from timm.models import create_model, get_arch_name

    from ._training_run import load_trained, read_results, training_preprocessing
    from .cards import model_card

    kwargs: Dict[str, Any] = {}
    cfg: Optional[Dict[str, Any]] = None
    if args.checkpoint is None:
        try:
            model: Any = create_model(args.model, pretrained=True)
        except RuntimeError as e:
            raise CommandError(first_line(e)) from e
    else:
        model, kwargs, run_args = load_trained(
            args.model, args.checkpoint, args.use_ema, args.args, args.model_kwargs)
        cfg = training_preprocessing(model, run_args, preprocessing(args), args.checkpoint)
        cfg['license'] = args.license
    label_names = _read_labels(args.labels, model.num_classes) if args.labels else None
    card_cfg = dict(cfg, num_classes=model.num_classes) if cfg else model.pretrained_cfg
    results = None
    if args.metrics:
        weights = model.state_dict() if args.checkpoint else None  # the squeeze of a tag is drawn at random
        results = read_results(args.metrics, get_arch_name(args.model), card_cfg, weights)
    save_folder(model, folder, kwargs, cfg, label_names)
    card = model_card(
        args.model, f'hf-hub:{args.repo_id}', card_cfg, kwargs, results, args.checkpoint is not None, args.license)
    card.save(folder / 'README.md')


def _read_labels(path: Path, num_classes: int) -> List[str]:
    try:
        names = path.read_text(encoding='utf-8-sig').splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise CommandError(f'Cannot read the labels {path}: {e}') from e
    if len(names) != num_classes:
        raise CommandError(
            f'{path} names {len(names)} classes, but the network has {num_classes}. Write one name a line.')
    return names


def _check_repo_id(repo_id: str) -> None:
    """Raise CommandError if a repository cannot be called so, before any work is done."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        if repo_id.count('/') != 1:
            raise HFValidationError('expected USER/NAME')
    except HFValidationError as e:
        raise CommandError(f'{repo_id!r} is not a repository id: {first_line(e)}') from e


def hub_errors() -> Tuple[Type[BaseException], ...]:
    """Errors of the Hub client. While it transfers, they are those of its HTTP library, which its version decides."""
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, ValueError, SafetensorError, *(base for base in HfHubHTTPError.__bases__ if base is not Exception)


def upload(folder: Path, repo_id: str, private: bool = False, force: bool = False) -> str:
    """Upload an exported folder to USER/NAME and return the URL of the commit, or of the last one if nothing changed.

    `private` creates the repository private, `force` replaces whatever it holds.

    Raises:
        CommandError: If the Hub refuses, or the repository holds something else or is public against `private`.
    """
    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi(library_name='timm_sepool')
    ours = json.loads((folder / 'config.json').read_text())['architecture']
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)  # None: the default of an organization
        info = api.model_info(repo_id)
        if private and not info.private:
            raise CommandError(f'{repo_id} exists and is public. Make it private on the Hub or leave out --private.')
        files = {sibling.rfilename for sibling in info.siblings or ()} - {'.gitattributes'}
        theirs = None
        if 'config.json' in files:
            try:
                config = hf_hub_download(repo_id, 'config.json', revision=info.sha)  # the cache may have an older one
                theirs = f"a {json.loads(Path(config).read_text())['architecture']}"
            except (ValueError, KeyError, TypeError):
                theirs = "a config.json that is not timm's"
        elif files:
            theirs = f'{min(files)} without a config.json'
        if theirs not in (None, f'a {ours}') and not force:
            raise CommandError(f'{repo_id} holds {theirs}, not a {ours}. Choose another repository or use --force.')
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f'Add {ours}'))
    except hub_errors() as e:
        raise CommandError(f'The Hub refused {repo_id}: {first_line(e)}') from e
