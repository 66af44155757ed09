""" `timm-sepool compare`: networks trained on your own images by timm's train.py, with the noise of a seed

One process of the unmodified train.py trains one model with one seed (`_comparison_runs`). The results become tables,
intervals and pictures (`_comparison`). compare.json keeps what a repeated command has to agree with.
"""
import argparse
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

from ._arguments import ModelKwargs
from ._comparison import check_libraries, differing_conditions, write_report
from ._comparison_runs import Plan, Run, describe, locked, train
from ._models import TABLE, create_on_meta, parse_spec
from ._output import CommandError, first_line, replaced_path

DEFAULT_MODELS = ('resnet50', 'seresnet50', 'resnet50+cbam', 'spse_resnet50', 'rgse_resnet50')
# all five start from one donor; seresnet50 has weights of its own
DEFAULT_PRETRAINED = ('resnet50', 'resnet50+se', 'resnet50+cbam', 'spse_resnet50', 'rgse_resnet50')
# as in docs/training.md; the batch is divided by the number of processes
PAPER_BATCH = 256
PAPER_RECIPE = (
    '--opt momentum --momentum 0.9 --lr 0.1 -b 256 --epochs 100 --sched step --decay-epochs 30 --decay-rate 0.1 '
    '--warmup-epochs 0 --weight-decay 1e-4 --opt-kwargs filter_bias_and_bn=False --smoothing 0 --color-jitter 0 '
    '--train-interpolation bilinear --interpolation bilinear --crop-pct 0.875')
# the default tags of some peers have others, and timm's networks another start
PAPER_INPUT = '--img-size 224 --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 --model-kwargs zero_init_last=False'
OWN_OPTIONS = ('--model', '--seed', '--output', '--experiment', '--resume')
TIMM_ATTENTIONS = ('se', 'eca', 'cbam', 'coord')
# the arguments of train.py that matter here
TRAIN_OPTIONS: Dict[str, Dict[str, Any]] = {
    '--data-dir': {}, '--dataset': dict(default=''), '--val-split': dict(default='validation'),
    '--pretrained': dict(action='store_true'), '--pretrained-path': {}, '--device': dict(default='cuda'),
    '--num-classes': dict(type=int), '--in-chans': dict(type=int), '--img-size': dict(type=int),
    '--input-size': dict(type=int, nargs=3), '--mean': dict(type=float, nargs='+'),
    '--std': dict(type=float, nargs='+'), '--crop-pct': dict(type=float), '--interpolation': {}, '--gp': {},
    '--model-kwargs': dict(nargs='*', default={}, action=ModelKwargs)}


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        'compare', help="train networks by timm's train.py with several seeds each, and compare their accuracy",
        description="Trains every model with every seed by timm's train.py, and reports the differences of their "
        'accuracies with confidence intervals. Repeat the command to continue what was interrupted.')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder of the comparison')
    parser.add_argument(
        '--models', nargs='+', metavar='MODEL',
        help='[LABEL=]NAME[+ATTN][,KEY=VALUE...]: models of timm, with added attention (se, eca, cbam, coord, spse, '
        'rgse) and model arguments of their own (default: plain, SE, CBAM, SPSE and RGSE ResNet-50)')
    parser.add_argument(
        '--peer', metavar='MODEL', help='compare the others with this one (default: the first with SE, else the first)')
    parser.add_argument(
        '--paper', action='store_true', help="the paper's 25 models and recipe; only --data-dir has to follow")
    parser.add_argument('--seeds', type=int, default=5, metavar='N', help='train with the seeds 0 to N-1 (default: 5)')
    parser.add_argument(
        '--train-script', type=Path, metavar='FILE',
        help="timm's train.py (default: in $TIMM_SCRIPTS, here, or in ./pytorch-image-models)")
    parser.add_argument('--nproc', type=int, default=1, metavar='N', help='processes of one run, by torchrun')
    parser.add_argument('--jobs', type=int, default=1, metavar='N', help='runs at a time, each on its GPUs or cores')
    parser.add_argument('--shard', metavar='I/N', help='take the runs I, I+N, I+2N, ..., with I from 1 to N')
    parser.add_argument('--restart', action='store_true', help='start broken runs anew instead of resuming them')
    parser.add_argument('--report', action='store_true', help='train nothing, report what is there')
    parser.add_argument('--dry-run', action='store_true', help='print the commands of the runs and change nothing')
    parser.add_argument(
        'train_args', nargs='*', metavar='-- ARGUMENT', help="train.py's own arguments, for example --data-dir DIR")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train what is missing and report. Returns 1 if a run has failed, else 0.

    Raises:
        CommandError: If an argument is invalid, a model cannot be created, or another process trains one of the runs.
    """
    check_libraries()
    if args.report:
        settings = read_settings(args.out)
        if settings is None:
            raise CommandError(f'{args.out} has no compare.json. Run the comparison first.')
        if args.peer:
            _set_peer(settings['models'], args.peer)
        print(write_report(args.out, settings))
        return 0
    match = re.fullmatch(r'(\d+)/(\d+)', args.shard or '1/1')
    shard, num_shards = map(int, match.groups()) if match else (0, 0)
    if not 1 <= shard <= num_shards:
        raise CommandError(f'--shard takes I/N with I from 1 to N, for example 1/4, got {args.shard!r}.')
    plan = make_plan(args)
    wanted = [Run(plan.out, label, seed) for seed in range(args.seeds) for label in plan.labels][shard - 1::num_shards]
    for note in differing_conditions(plan.settings):
        print(f'timm-sepool compare: {note}', file=sys.stderr)
    if args.dry_run:
        print(describe(plan, wanted, args.restart))
        return 0
    _write_settings(plan)
    failed = train(plan, wanted, args.restart)
    if args.shard:
        print(f'shard {args.shard} has ended; --report makes the results from the runs of all shards')
    elif failed < len(wanted):
        print(write_report(plan.out, read_settings(plan.out) or plan.settings))  # another compare may have added models
    return int(failed > 0)


def make_plan(args: argparse.Namespace) -> Plan:
    """Check the arguments, create every model on the meta device, and compare both with compare.json.

    Writes nothing. Raises CommandError for bad input.
    """
    if min(args.seeds, args.nproc, args.jobs) < 1:
        raise CommandError('--seeds, --nproc and --jobs must be at least 1.')
    if args.paper and (args.models or args.peer):
        raise CommandError('--paper has its own models and peers. Leave out --models and --peer.')
    script, train_args = _find_script(args.train_script), list(args.train_args)
    if args.paper:
        if PAPER_BATCH % args.nproc:
            raise CommandError(f"--nproc {args.nproc} does not divide the paper's batch of {PAPER_BATCH}. Change it.")
        recipe = PAPER_RECIPE.replace(f'-b {PAPER_BATCH}', f'-b {PAPER_BATCH // args.nproc}')
        train_args = [*recipe.split(), *PAPER_INPUT.split(), *train_args]
    options = parse_train_args(train_args)
    if not args.dry_run:
        _check_device(options.device, args.jobs * args.nproc)
    default = [f'{r.model}+cbam' if r.kwargs else r.model for r in TABLE] if args.paper else (
        DEFAULT_PRETRAINED if options.pretrained else DEFAULT_MODELS)
    known = read_settings(args.out)
    entries = [make_model(text, options) for text in args.models or default]
    if args.peer and args.peer not in [*(known['models'] if known else ()), *(e[k] for e in entries for k in (
            'label', 'spec'))]:
        entries.insert(0, make_model(args.peer, options))
    labels = [e.pop('label') for e in entries]
    if len({*map(str.lower, labels)}) < len(labels):
        twice = next(label for i, label in enumerate(labels) if label.lower() in map(str.lower, labels[:i]))
        raise CommandError(f'Two models have the same label, {twice}. Give one of them another: LABEL=NAME.')
    models = dict(zip(labels, entries))
    if args.paper:
        for i, label in enumerate(labels):
            models[label]['peer'] = labels[i // 5 * 5 + 1]  # the second row of each backbone is its SE network
    per_level = (os.environ.get('OMP_NUM_THREADS') or '0').split(',')
    if not per_level[0].strip().isdecimal():
        raise CommandError(f'OMP_NUM_THREADS must be a whole number, got {per_level[0]!r}. Set it to one or unset it.')
    threads = int(per_level[0]) or max(1, (os.cpu_count() or 1) // args.nproc)
    settings = dict(
        train_args=train_args, config=options.config_values, nproc=args.nproc, threads=threads,
        imagenet=_is_imagenet(options), models=models)
    _merge(args.out, settings, known)
    if not args.paper:
        peers = [m['peer'] for m in settings['models'].values() if m['peer']]
        with_se = [k for k, m in models.items() if m['has_se']]
        _set_peer(settings['models'], args.peer or (peers + with_se + labels)[0])
    start = [sys.executable] if args.nproc == 1 else [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(args.nproc)]
    # first, so that the user's own value counts
    hist = [] if 'checkpoint_hist' in (options.config_values or {}) else ['--checkpoint-hist', '1']
    command = [*start, str(script), *hist, *_without_model_kwargs(train_args)]
    return Plan(args.out, settings, labels, command, options.device, args.jobs, options.batch_size)


def _find_script(path: Optional[Path]) -> Path:
    folders = [*filter(None, [os.environ.get('TIMM_SCRIPTS')]), '', 'pytorch-image-models']
    places = [path] if path else [Path(folder, 'train.py') for folder in folders]
    for place in places:
        if place.is_file():
            return place.resolve()
    raise CommandError(
        f"timm's train.py does not exist at {', '.join(map(str, places))}. Correct --train-script, or clone timm's "
        'repository here: git clone https://github.com/huggingface/pytorch-image-models')


def parse_train_args(argv: List[str]) -> argparse.Namespace:
    """The arguments TRAIN_OPTIONS of train.py. Raises CommandError if one is invalid or is set by `compare`."""
    import yaml

    def fail(message: str) -> None:
        raise CommandError(f"train.py's arguments are invalid: {message}. Correct them after `--`.")

    for option in [arg.split('=')[0] for arg in argv]:
        if option.startswith('--') and any(name.startswith(option) for name in OWN_OPTIONS):  # or an abbreviation
            raise CommandError(f'{option}: compare sets {", ".join(OWN_OPTIONS)}. Leave out {option}.')
        if option.startswith('--model-k') and option != '--model-kwargs':
            raise CommandError(f'{option}: write --model-kwargs in full.')
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = fail  # type: ignore[assignment,method-assign]
    parser.add_argument('-c', '--config')
    parser.add_argument('-b', '--batch-size', type=int, default=128)
    for option, kwargs in TRAIN_OPTIONS.items():
        parser.add_argument(option, **kwargs)
    options = parser.parse_known_args(argv)[0]
    config: Optional[Dict[str, Any]] = None
    if options.config:
        try:
            config = yaml.safe_load(Path(options.config).read_text(encoding='utf-8')) or {}
            parser.set_defaults(**config)
            for key, kind in (('model_kwargs', dict), ('data_dir', str)):
                if not isinstance(config.get(key), (kind, type(None))):
                    raise CommandError(f'{options.config}: {key} is {config[key]!r}. It must be a {kind.__name__}.')
        except (OSError, ValueError, TypeError, yaml.YAMLError) as e:
            raise CommandError(f'Cannot read {options.config}. Correct --config of train.py: {first_line(e)}') from e
        if config.get('resume'):
            raise CommandError(f'{options.config} sets resume, which compare sets itself. Remove it there.')
        options = parser.parse_known_args(argv)[0]
    options.config_values = config
    if not options.data_dir and not options.dataset:
        raise CommandError('No data folder is given. Pass --data-dir DIR to train.py, after `--`.')
    if options.data_dir and not options.dataset and not Path(options.data_dir).exists():
        raise CommandError(f'The data folder {options.data_dir} does not exist. Correct --data-dir.')
    if not options.val_split:
        raise CommandError('compare needs the accuracy on a validation split. Leave out the empty --val-split.')
    if options.pretrained_path and not Path(options.pretrained_path).is_file():
        raise CommandError(f'The file {options.pretrained_path} does not exist. Correct --pretrained-path.')
    return options


def make_model(text: str, options: argparse.Namespace) -> Dict[str, Any]:
    """Entry of compare.json for a model: what train.py creates, its sizes and its preprocessing.

    Raises CommandError if it cannot be created, or would have to start from weights that do not exist.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from timm.data import resolve_data_config
    from timm.models import ResNet, get_pretrained_cfg

    label, name, attention, own_kwargs = parse_spec(text)
    kwargs = {**options.model_kwargs, **own_kwargs}
    if options.pretrained and not options.pretrained_path:
        try:
            cfg = get_pretrained_cfg(kwargs.get('base', name))
        except RuntimeError as e:  # an unknown tag
            raise CommandError(f'Cannot create {text}: {first_line(e)}') from e
        if cfg is None or not cfg.has_weights:
            raise CommandError(f'{name} has no pretrained weights. Leave out --pretrained or choose another model.')
    in_chans = options.in_chans or (options.input_size or [3])[0]
    head = dict(num_classes=options.num_classes, global_pool=options.gp, in_chans=in_chans)
    model: Any = None
    try:
        if attention in TIMM_ATTENTIONS and not options.pretrained and 'modules' not in kwargs:
            model = create_on_meta(name, **head, **kwargs)
        if isinstance(model, ResNet) and all(getattr(m, 'se', None) is None for m in model.modules()):
            kwargs['block_args'] = {**kwargs.get('block_args', {}), 'attn_layer': attention}
        elif attention:
            name, kwargs = 'adopted', {'base': name, 'attention': attention, **kwargs}
        model = create_on_meta(name, **head, **kwargs).eval()
        data = resolve_data_config(vars(options), model=model)
        with torch.device('meta'), torch.no_grad(), FlopCounterMode(display=False) as flops:
            model(torch.empty(1, *data['input_size']))
    except Exception as e:  # timm's own, of any type
        raise CommandError(f'Cannot create {text}: {first_line(e)}') from e
    classes = {type(module).__name__ for module in model.modules()}
    return dict(
        spec=text, label=label, model=name, model_kwargs=[f'{k}={v}' for k, v in kwargs.items()], peer=None,
        has_se=attention in ('', 'se') and not classes.isdisjoint({'SEModule', 'SqueezeExcite'}),
        params=sum(p.numel() for p in model.parameters()), gmacs=round(flops.get_total_flops() / 2e9, 6),
        data={k: data[k] for k in ('input_size', 'interpolation', 'crop_pct', 'mean', 'std')})


def _check_device(device: str, num_gpus: int) -> None:
    import torch

    if device.startswith('cuda') and torch.cuda.device_count() < num_gpus:
        raise CommandError(
            f'--jobs times --nproc needs {num_gpus} GPUs, and {torch.cuda.device_count()} were found. Choose smaller '
            'numbers, or pass --device cpu to train.py, after `--`.')


def _set_peer(models: Dict[str, Dict[str, Any]], peer: str) -> None:
    label = next((k for k, m in models.items() if peer in (k, m['spec'])), None)
    if label is None:
        raise CommandError(f'The peer {peer!r} was not trained. Choose one of: {", ".join(models)}.')
    for model in models.values():
        model['peer'] = label


def _is_imagenet(options: argparse.Namespace) -> bool:
    """Whether the paper's claims can stand beside the accuracies: ImageNet's 1000 folders, trained from scratch."""
    folder = Path(options.data_dir or '', 'train')
    if options.pretrained or options.num_classes not in (None, 1000) or not folder.is_dir():
        return False
    return sum(bool(re.fullmatch(r'n\d{8}', name)) for name in os.listdir(folder)) == 1000


def _without_model_kwargs(argv: List[str]) -> List[str]:
    """Leave out --model-kwargs: each run has its own, merged with those of its model."""
    kept, leave_out = [], False
    for arg in argv:
        leave_out = arg.split('=')[0] == '--model-kwargs' if arg.startswith('-') else leave_out
        kept += [arg] * (not leave_out)
    return kept


def read_settings(out: Path) -> Optional[Dict[str, Any]]:
    """Contents of compare.json, None if there is none. Raises CommandError if it is damaged."""
    try:
        settings = json.loads((out / 'compare.json').read_text(encoding='utf-8'))
        if isinstance(settings, dict) and isinstance(settings.get('models'), dict):
            return settings
        raise CommandError(f'{out / "compare.json"} has no models. Restore it or choose another --out.')
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise CommandError(
            f'Cannot read {out / "compare.json"}: {first_line(e)}. Restore it or choose another --out.') from e


def _merge(out: Path, settings: Dict[str, Any], known: Optional[Dict[str, Any]]) -> None:
    """Add the models and threads of compare.json. Raises CommandError if their runs could not be compared."""
    if known is None:
        return
    for key, name in (('train_args', "train.py's arguments"), ('config', "train.py's config"), ('nproc', '--nproc')):
        if known.get(key) != settings[key]:
            before, now = (shlex.join(v) if isinstance(v, list) else v for v in (known.get(key), settings[key]))
            raise CommandError(
                f'{out} was made with {name} {before}, not {now}. Pass the former or another --out, or delete {out}.')
    settings['threads'], models = known['threads'], {**known['models']}
    for label, model in json.loads(json.dumps(settings['models'])).items():
        before = models.get(label, model)
        if any(before[k] != model[k] for k in ('model', 'model_kwargs')):
            raise CommandError(f'{label} is {before["spec"]} in {out}. Give the new model another label: LABEL=NAME.')
        models[label] = {**model, 'peer': model['peer'] or before['peer']}
    settings['models'] = models


def _write_settings(plan: Plan) -> None:
    """Write compare.json, with the models that another process has added meanwhile."""
    with locked(plan.out / '.locks' / 'compare.json', seconds=60):
        _merge(plan.out, plan.settings, read_settings(plan.out))
        with replaced_path(plan.out / 'compare.json') as temporary:
            temporary.write_text(json.dumps(plan.settings, indent=2), encoding='utf-8')
