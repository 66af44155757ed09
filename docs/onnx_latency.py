""" Latency of one image in onnxruntime, relative to seresnet50 (docs/speed.md, "One image")

    python docs/onnx_latency.py [--threads N] [--img-size N] [--rounds N]

The networks are exported at one size and run in turns, as `timm-sepool bench` does. This needs onnx, onnxscript and
onnxruntime.
"""
import argparse
import tempfile
from pathlib import Path
from typing import Any, Callable

import onnxruntime
import torch

from timm_sepool.cli._timing import Clock, create_network, interleave, summarize

PEER = 'seresnet50'
NETWORKS = (PEER, 'resnet50', 'rgse_resnet50', 'spse_resnet50')


def inference(name: str, x: torch.Tensor, threads: int, directory: Path) -> Callable[[], Any]:
    """Export a network for images like x (1, 3, H, W) and return a function that runs it on x."""
    path = directory / f'{name}.onnx'
    torch.onnx.export(create_network(name).eval(), (x,), path, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def main() -> None:
    parser = argparse.ArgumentParser(description='Latency of one image in onnxruntime')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--rounds', type=int, default=40)
    args = parser.parse_args()
    x = torch.randn(1, 3, args.img_size, args.img_size)
    with tempfile.TemporaryDirectory() as directory:
        steps = {name: inference(name, x, args.threads, Path(directory)) for name in NETWORKS}
        rows = summarize(interleave(steps, Clock(x.device), args.rounds, 1), PEER)
    print(f'{args.img_size} px, {args.threads} threads, onnxruntime {onnxruntime.__version__}')
    for name, row in rows.items():
        print(f'{name:<16}{row["ms"]:>8.1f} ms{row["ratio"]:>7.3f}  ({row["ratio_low"]:.3f}-{row["ratio_high"]:.3f})')


if __name__ == '__main__':
    main()
