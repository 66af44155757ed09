""" The results of `timm-sepool compare`: results.csv, statistics, report.md and pictures

Runs are independent samples, not pairs: at one seed train.py gives two networks neither common initial weights nor a
common order of the images. So the intervals are Welch's, and p is that of the permutation test of two samples.
"""
import csv
import itertools
import json
import math
import shlex
import statistics
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from ._comparison_runs import CHECKPOINT, Run, read_progress
from ._models import TABLE, check_model
from ._output import CommandError, replaced_path

COLUMNS = (
    'model', 'seed', 'params', 'gmacs', 'epochs', 'last_top1', 'last_top5', 'last_loss', 'best_top1', 'seconds',
    'resumed')
MAX_EXACT = 100_000  # permutations: all of them up to 9 seeds a model
LEVEL = 0.05
EXPLANATIONS = (
    'top-1 and sd: mean and standard deviation over the seeds, at the last epoch. To choose the best epoch by the '
    'validation images would flatter.',
    "difference: to the peer, in points, with Welch's 95 % t interval of this difference alone.",
    "p: permutation test of two independent samples, corrected by Holm's method for all differences.")


class Difference(NamedTuple):
    """A model against its peer, in points of top-1 accuracy; NaN where there are too few seeds."""
    mean: float
    low: float  # 95 % interval
    high: float
    p: float
    seeds: Tuple[int, int]  # of the model and of its peer


def check_libraries() -> None:
    try:
        import matplotlib.figure  # noqa: F401
        import scipy.stats  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as e:
        raise CommandError(f'compare needs {e.name}: pip install "timm_sepool[compare]".') from e


def difference(values: Sequence[float], peer: Sequence[float]) -> Difference:
    """Compare the accuracies (%) of two models over their seeds."""
    from scipy import stats

    nan, seeds = math.nan, (len(values), len(peer))
    if not values or not peer:
        return Difference(nan, nan, nan, nan, seeds)
    mean = statistics.fmean(values) - statistics.fmean(peer)
    if min(len(values), len(peer)) < 2:
        return Difference(mean, nan, nan, nan, seeds)
    low = high = mean
    if len({*values}) > 1 or len({*peer}) > 1:
        low, high = stats.ttest_ind(values, peer, equal_var=False).confidence_interval(0.95)
    p = stats.permutation_test(
        (values, peer), lambda a, b, axis: (a.mean(axis=axis) - b.mean(axis=axis)).round(9),  # so that ties are ties
        vectorized=True, n_resamples=MAX_EXACT, batch=10_000, random_state=0).pvalue
    return Difference(mean, float(low), float(high), float(p), seeds)


def smallest_p(n: int, n_peer: int) -> float:
    """The least p-value that the permutation test can give with this many seeds."""
    return min(1., 2 / math.comb(n + n_peer, n))


def holm(p_values: Sequence[float]) -> List[float]:
    """Correct p-values for their number (Holm 1979). NaN stays and does not count."""
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected, largest = [math.nan] * len(p_values), 0.
    for rank, (p, i) in enumerate(order):
        largest = corrected[i] = max(largest, min(1., (len(order) - rank) * p))
    return corrected


def differing_conditions(settings: Dict[str, Any]) -> List[str]:
    """Notes if the models, by the defaults of their names, have different preprocessing or initial weights."""
    models = settings['models'].values()
    entries = [model['data'] for model in models]
    keys = [k for k in entries[0] if len({json.dumps(entry[k]) for entry in entries}) > 1]
    notes = [
        f'The models differ in {", ".join(keys)}, by the defaults of their names. To compare the networks alone, pass '
        f'{", ".join("--" + k.replace("input_size", "img-size").replace("_", "-") for k in keys)} to train.py.'
    ] if keys else []
    unset = [m for m in models if 'resne' in m['spec'] and 'zero_init_last' not in ' '.join(m['model_kwargs'])]
    pretrained = '--pretrained' in settings['train_args'] or (settings['config'] or {}).get('pretrained')
    if len({m['model'].startswith(('rgse_', 'spse_')) for m in unset}) > 1 and not pretrained:
        notes.append(
            "The last norm of each block starts with ones in the paper's networks and with zeros in timm's. To compare "
            'the networks alone, pass --model-kwargs zero_init_last=False to train.py.')
    return notes


def collect(out: Path, settings: Dict[str, Any]) -> Tuple[List[Dict[str, Any]], Dict[str, list], List[str]]:
    """Rows of results.csv; by model the validation accuracies (%) of each seed by epoch; notes on runs left out."""
    rows, notes = [], []
    curves: Dict[str, List[Dict[int, float]]] = {label: [] for label in settings['models']}
    for label, model in settings['models'].items():
        seeds = sorted(int(p.name) for p in (out / 'runs' / label).glob('*') if p.name.isdigit())
        for run in [Run(out, label, seed) for seed in seeds]:
            progress, starts = read_progress(run), run.starts()
            if not progress.finished:
                why = f'line {progress.damaged} of its summary.csv is cut off' if progress.damaged else 'not finished'
                notes.append(f'{run.folder} does not count: {why}. Repeat the command to finish the run.')
                continue
            last, curve = progress.rows[progress.epochs - 1], {k: r['eval_top1'] for k, r in progress.rows.items()}
            curves[label].append(curve)
            rows.append(dict(zip(COLUMNS, (
                label, run.seed, model['params'], model['gmacs'], progress.epochs, last['eval_top1'], last['eval_top5'],
                last['eval_loss'], max(curve.values()), round(sum(s['seconds'] for s in starts), 1),
                sum(s['resumed'] for s in starts)))))
    return rows, curves, notes


def write_report(out: Path, settings: Dict[str, Any]) -> str:
    """Write results.csv, report.md, curves.png and differences.png anew, and return the report for the terminal.

    Raises CommandError if no run is finished or a file cannot be written.
    """
    rows, curves, notes = collect(out, settings)
    if not rows:
        raise CommandError(f'No run in {out} is finished. {" ".join(notes[:1])}')
    models = settings['models']
    values = {label: [r['last_top1'] for r in rows if r['model'] == label] for label in models}
    differences = {k: difference(values[k], values[m['peer']]) for k, m in models.items() if k != m['peer']}
    corrected = dict(zip(differences, holm([d.p for d in differences.values()])))
    num_resumed = sum(r['resumed'] > 0 for r in rows)
    if num_resumed:
        notes.insert(0, (
            f'{num_resumed} of {len(rows)} runs were resumed. train.py does not restore its random state, so they '
            'differ from undisturbed runs. To replace them, delete their folders and repeat the command.'))
    text = '\n'.join([
        '# Accuracy by model', '', f'`train.py {shlex.join(settings["train_args"])}`', '',
        *table(settings, values, differences, corrected), '', conclusion(models, differences, corrected), '', *(
            f'- {note}' for note in [*EXPLANATIONS, *differing_conditions(settings), *notes])])
    with replaced_path(out / 'results.csv') as path, open(path, 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    with replaced_path(out / 'report.md') as path:
        path.write_text(f'{text}\n', encoding='utf-8')
    pictures = {'curves.png': draw_curves(models, curves), 'differences.png': draw_differences(models, differences)}
    for name, figure in pictures.items():
        with replaced_path(out / name) as path:
            figure.savefig(path)
    return f'{text}\n\nwrote results.csv, report.md, {", ".join(pictures)} in {out}\n{next_step(out, models, rows)}'


def table(
        settings: Dict[str, Any], values: Dict[str, List[float]], differences: Dict[str, Difference],
        corrected: Dict[str, float]) -> List[str]:
    """Lines of the table, aligned Markdown."""
    rows = [['model', 'params (M)', 'GMACs', 'top-1 (%)', 'sd', 'difference', '95 % interval', 'p', 'seeds']]
    for label, model in settings['models'].items():
        v, d = values[label], differences.get(label)
        row = [label, f'{model["params"] / 1e6:.2f}', f'{model["gmacs"]:.3f}']
        row += [f'{statistics.fmean(v):.2f}' if v else '-']
        row += [f'{statistics.stdev(v):.2f}' if len(v) > 1 else '-']
        row += ['-' if math.isnan(d.mean) else f'{d.mean:+.2f}'] if d else ['peer']
        known = d is not None and not math.isnan(d.p)
        row += [f'{d.low:+.2f} to {d.high:+.2f}', f'{corrected[label]:.4f}'] if d and known else ['-', '-']
        rows.append([*row, str(len(v))])
    if settings['imagenet']:
        rows[0].append('paper claims')
        for row, model in zip(rows[1:], settings['models'].values()):
            own = model['model'], model['model_kwargs']
            claims = [r for r in TABLE if (r.model, [f'{k}={v}' for k, v in r.kwargs.items()]) == own]
            row.append(f'{100 - claims[0].claimed_top1_err:.2f}' if claims else '-')
    widths = [max(2, *map(len, column)) for column in zip(*rows)]  # a delimiter row of Markdown needs `-:` at least
    rows.insert(1, ['-' * widths[0], *('-' * (w - 1) + ':' for w in widths[1:])])
    return [f'| {r[0]:<{widths[0]}} | {" | ".join(c.rjust(w) for c, w in zip(r[1:], widths[1:]))} |' for r in rows]


def conclusion(models: Dict[str, Any], differences: Dict[str, Difference], corrected: Dict[str, float]) -> str:
    """One sentence: what can be concluded, and what cannot."""
    tested = {k: d for k, d in differences.items() if not math.isnan(d.p)}
    if not tested:
        return 'Nothing can be concluded: differences need at least two finished seeds of a model and of its peer.'
    parts = []
    for word, sign in (('better', 1), ('worse', -1)):
        for peer in dict.fromkeys(m['peer'] for m in models.values()):
            names = [
                f'{k} ({d.low:+.2f} to {d.high:+.2f})' for k, d in tested.items()
                if corrected[k] < LEVEL and sign * d.mean > 0 and models[k]['peer'] == peer]
            if names:
                parts.append(f'{", ".join(names)} {"are" if len(names) > 1 else "is"} {word} than {peer}')
    unclear = {k: f'{k} ({d.low:+.2f} to {d.high:+.2f})' for k, d in tested.items() if corrected[k] >= LEVEL}
    beside_zero = [unclear.pop(k) for k in [*unclear] if tested[k].low > 0 or tested[k].high < 0]
    if beside_zero:
        parts.append(
            f'{", ".join(beside_zero)} may differ: zero is outside the interval, but the corrected p is not below '
            f'{LEVEL}')
    if unclear:
        parts.append(
            f'no difference is shown for {", ".join(unclear.values())}, but they need not be equal: any difference in '
            'the brackets (points) remains possible')
    text = 'With these images and these arguments of train.py, ' + '; '.join(parts) + '.'
    seeds = max(d.seeds for d in tested.values())
    enough = next(n for n in itertools.count(2) if smallest_p(n, n) * len(tested) < LEVEL)
    if min(smallest_p(*d.seeds) for d in tested.values()) * len(tested) >= LEVEL:
        text += (
            f' With {seeds[0]} seeds and {len(tested)} comparisons no corrected p can be below {LEVEL}, whatever the '
            f'accuracies are: at least {enough} seeds are needed.')
    return text


def next_step(out: Path, models: Dict[str, Any], rows: List[Dict[str, Any]]) -> str:
    """How to publish the network with the best mean. Not its best seed: choosing that by these images would flatter."""
    label = max((r['model'] for r in rows), key=lambda k: statistics.fmean(
        r['last_top1'] for r in rows if r['model'] == k))
    paths = [Run(out, label, r['seed']).folder / CHECKPOINT for r in rows if r['model'] == label]
    checkpoints = [path for path in paths if path.is_file()]
    try:
        check_model(models[label]['model'])
    except CommandError:
        return f'{label} has the highest mean, which may be noise. To publish it, call timm.models.push_to_hf_hub.'
    if not checkpoints:
        return f'{label} has the highest mean, which may be noise. Its checkpoints were deleted.'
    command = f'timm-sepool push {models[label]["model"]} --repo-id USER/NAME --checkpoint'
    command += f' {shlex.quote(str(checkpoints[0]))}'
    return f'{label} has the highest mean, which may be noise. To publish its first seed:\n  {command}'


def _axes_of_peers(models: Dict[str, Any], height: float) -> Tuple[Any, Dict[str, Any]]:
    """A figure, and its axes by peer: one below the other."""
    from ..plot import new_figure

    peers = list(dict.fromkeys(model['peer'] for model in models.values()))
    figure = new_figure(8, height * len(peers))
    return figure, dict(zip(peers, figure.subplots(len(peers), squeeze=False)[:, 0]))


def draw_curves(models: Dict[str, Any], curves: Dict[str, List[Dict[int, float]]]) -> Any:
    """Figure of the accuracy by epoch: mean of the seeds, and a band of one standard deviation."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes_of_peers(models, 4)
    for i, (label, seeds) in enumerate(curves.items()):
        epochs = sorted(set.intersection(*map(set, seeds))) if seeds else []
        columns = [[seed[epoch] for seed in seeds] for epoch in epochs]
        means = [statistics.fmean(c) for c in columns]
        x, ax = [epoch + 1 for epoch in epochs], axes[models[label]['peer']]
        ax.plot(x, means, f'C{i % 10}', label=label, marker='.' if len(epochs) < 30 else '')
        if len(seeds) > 1:
            sds = [statistics.stdev(c) for c in columns]
            low, high = ([m + sign * s for m, s in zip(means, sds)] for sign in (-1, 1))
            ax.fill_between(x, low, high, color=f'C{i % 10}', alpha=0.15, linewidth=0)
    for ax in axes.values():
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel('epochs trained')
        ax.set_ylabel('validation top-1 (%), mean and sd')
        ax.legend(loc='center left', bbox_to_anchor=(1, 0.5))
    return figure


def draw_differences(models: Dict[str, Any], differences: Dict[str, Difference]) -> Any:
    """Figure of the differences to the peer, which is the line at zero, with their 95 % intervals."""
    num_peers = len({model['peer'] for model in models.values()})
    figure, axes = _axes_of_peers(models, 1.2 + 0.35 * len(models) / num_peers)
    for peer, ax in axes.items():
        found = {k: d for k, d in differences.items() if models[k]['peer'] == peer and not math.isnan(d.mean)}
        for y, (label, d) in enumerate(found.items()):
            color = f'C{list(models).index(label) % 10}'  # as of its curve
            ax.plot(d.mean, y, 'o', color=color)
            ax.plot([d.low, d.high], [y, y], color=color)
        ax.axvline(0., color='black', linewidth=0.8)
        ax.set_yticks(range(len(found)), list(found))
        ax.set_ylim(max(1, len(found)) - 0.5, -0.5)  # the first model on top
        ax.set_xlabel(f'top-1 minus that of {peer} (points), 95 % interval')
    return figure
