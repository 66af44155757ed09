""" `timm-sepool bench`: speed and memory of the networks beside their peers, as a table, JSON or a bar chart """
import argparse
import json
from pathlib import Path
from typing import Any, Dict

from ._arguments import add_model_kwargs
from ._output import CommandError, check_figure_path, save_figure

DEFAULT_MODELS = (
    'resnet50', 'seresnet50', 'resnet50+cbam', 'resnet50+eca', 'rgse_resnet50+reference', 'spse_resnet50+reference',
    'rgse_resnet50', 'spse_resnet50')
MODES = {'infer': 'inference', 'train': 'training step'}


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser('bench', help='time networks and their peers, interleaved in one run')
    parser.add_argument(
        'models', nargs='*', default=DEFAULT_MODELS, metavar='MODEL[+ATTN]',
        help='any models of timm; NAME+cbam has that attention layer of timm, NAME+reference computes the block as the '
        'paper writes it (default: both ResNet-50 and their peers)')
    parser.add_argument(
        '--peer', default='seresnet50', metavar='MODEL[+ATTN]', help='compare with this one (default: %(default)s)')
    parser.add_argument('--mode', choices=list(MODES), help='time inference or training steps (default: both)')
    parser.add_argument('-b', '--batch-size', type=int, default=8, metavar='N', help='images (default: %(default)s)')
    parser.add_argument('--img-size', type=int, nargs='+', default=[224], metavar='N', help='side, or height and width')
    parser.add_argument('--device', default='cpu', help='cpu or cuda (default: %(default)s)')
    parser.add_argument('--compile', action='store_true', help='compile the networks with torch.compile')
    parser.add_argument('--channels-last', action='store_true', help='use the channels_last memory format')
    parser.add_argument('--amp', action='store_true', help='autocast to bfloat16')
    parser.add_argument('--rounds', type=int, default=7, metavar='N', help='measurements of each network (default: 7)')
    parser.add_argument('--repeats', type=int, default=1, metavar='N', help='steps in one measurement (default: 1)')
    parser.add_argument('--threads', type=int, metavar='N', help='CPU threads')
    parser.add_argument('--blocks', action='store_true', help='also time everything after bn3 of one block per stage')
    add_model_kwargs(parser, 'arguments of all models')
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.add_argument('--plot', type=Path, metavar='FILE', help='write a bar chart to a new .png, .pdf or .svg file')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Time the networks, print the results and, with --plot, save the chart.

    Raises:
        CommandError: If an option is invalid, a network cannot be timed or the chart cannot be written.
    """
    if len(args.img_size) > 2:
        raise CommandError(f'--img-size takes one side or height and width, got {len(args.img_size)} numbers.')
    if min(args.batch_size, args.rounds, args.repeats, *args.img_size, args.threads or 1) < 1 or args.threads == 0:
        raise CommandError('--batch-size, --img-size, --rounds, --repeats and --threads must be at least 1.')
    if args.blocks and args.compile:
        raise CommandError('--blocks times the blocks without compiling them. Leave out --blocks or --compile.')
    if args.plot:
        check_figure_path(args.plot)

    from ._timing import measure

    report = measure(args)
    print(json.dumps(report, indent=2) if args.json else table(report))
    if args.plot:
        save_figure(chart(report), args.plot)


def conditions(settings: Dict[str, Any]) -> str:
    """Device and options of a report in one line."""
    flags = ''.join(f', {name}' for name in ('compile', 'channels_last', 'amp') if settings[name])
    return f'{settings["device"]}, batch {settings["batch_size"]}, {" x ".join(map(str, settings["size"]))}{flags}'


def table(report: Dict[str, Any]) -> str:
    """What `measure` returns as text, with every column explained below."""
    s, peer = report['settings'], report['settings']['peer']
    lines = [
        f'{conditions(s)}, {s["threads"]} threads, torch {s["torch"]}, {s["rounds"]} rounds',
        f'{"model":<28}{"mode":<7}{"ms":>9}{"+-%":>6}{"images/s":>10}{"ratio":>7}  {"(quartiles)":<13}{"MB":>7}']
    for r in report['results']:
        memory = r.get('peak_mb', r.get('saved_mb'))
        lines.append(
            f'{r["model"]:<28}{r["mode"]:<7}{r["ms"]:>9.1f}{50 * r["spread"]:>6.1f}{r["images_per_s"]:>10.1f}'
            f'{r["ratio"]:>7.3f}  ({r["ratio_low"]:.3f}-{r["ratio_high"]:.3f}){f"{memory:.0f}" if memory else "-":>7}')
    lines.append(f"""
mode         infer: a forward; train: forward, backward and an SGD step
ms           median time of a step over the rounds
+-%          half the interquartile range of these times, in percent of ms
images/s     batch size over ms
ratio        throughput relative to {peer}, above 1 is faster: in each round the time of {peer} over
             that of the model, of which this is the median
(quartiles)  lower and upper quartile of the rounds' ratios
MB           memory: on CUDA the peak that a step allocates, on a CPU what the forward keeps for the backward""")
    if 'blocks' in report:
        lines.append(f'\n{"after bn3":<28}{"mode":<7}{"stage":>6}{"x (MB)":>8}{"ms":>9}{"ratio":>7}{"roofline":>10}')
        lines += [
            f'{r["model"]:<28}{r["mode"]:<7}{r["stage"]:>6}{r["mb"]:>8.1f}{r["ms"]:>9.2f}{r["ratio"]:>7.2f}'
            f'{100 * r["roofline"]:>9.0f}%' for r in report['blocks']]
        lines.append("""
x (MB)    size of the output of bn3
roofline  time of the least memory traffic, at the bandwidth of a copy, in percent of ms: a map
          in the cache can exceed 100 %
mode, ms and ratio as above, for the last block of the stage, from the output of bn3 on""")
    return '\n'.join(lines)


def chart(report: Dict[str, Any]):
    """Bar chart (`matplotlib.figure.Figure`) of the throughputs relative to the peer's, whiskers at their quartiles."""
    from ..plot import new_figure
    modes = list(dict.fromkeys(r['mode'] for r in report['results']))
    num_models = len(report['results']) // len(modes)
    figure = new_figure(10, 1.1 + 0.6 * num_models)
    axes = figure.subplots()
    height = 0.8 / len(modes)
    for i, mode in enumerate(modes):
        rows = [r for r in report['results'] if r['mode'] == mode][::-1]  # the first model on top
        positions = [k + ((len(modes) - 1) / 2 - i) * height for k in range(num_models)]
        whiskers = [[r['ratio'] - r['ratio_low'] for r in rows], [r['ratio_high'] - r['ratio'] for r in rows]]
        bars = axes.barh(positions, [r['ratio'] for r in rows], height, xerr=whiskers, capsize=2, label=MODES[mode])
        axes.bar_label(bars, fmt='%.2f', label_type='center', color='white')
    axes.set_yticks(range(num_models), [r['model'] for r in rows])
    axes.axvline(1., color='black', linewidth=0.8)
    axes.set_xlabel(f'throughput relative to {report["settings"]["peer"]}: median and quartiles of the rounds')
    axes.set_title(conditions(report['settings']))
    figure.legend(loc='outside lower center', ncols=2)
    return figure
