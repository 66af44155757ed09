""" A stand-in for timm's train.py that imports no torch: its arguments, files and habits, with made-up accuracies

Its habits: Ctrl-C ends it with exit code 0; a resumed run repeats the header of summary.csv; the row of an epoch is
written before its checkpoint. $STAND_IN is a fault, 'fail SEED', or 'wait SEED EPOCH' or 'SIGNAL SEED EPOCH' before the
checkpoint of that epoch.
"""
import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    for option in ('data-dir', 'device', 'model', 'output', 'experiment', 'resume'):
        parser.add_argument(f'--{option}')
    for option in ('epochs', 'seed', 'checkpoint-hist', 'cooldown-epochs', 'img-size'):
        parser.add_argument(f'--{option}', type=int, default=3 if option == 'epochs' else 0)
    parser.add_argument('--sched', default='cosine')
    parser.add_argument('--model-kwargs', nargs='*', default=[])
    args = parser.parse_args()
    fault, *when = (os.environ.get('STAND_IN') or 'no').split()
    folder = Path(args.output, args.experiment)
    if int(os.environ.get('RANK', 0)):
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'args.yaml').write_text(''.join(f'{k}: {v!r}\n' for k, v in vars(args).items() if v is not None))
    print('training with', os.environ['OMP_NUM_THREADS'], 'threads,', sys.argv[1:], flush=True)
    if fault == 'fail' and when == [str(args.seed)]:
        sys.exit('the loss is not finite')
    start, name = int(Path(args.resume).read_text()) + 1 if args.resume else 0, f'{args.model}{args.model_kwargs}'
    generator = random.Random(f'{name} {args.seed} {start}')  # a resumed run has other random numbers
    try:
        for epoch in range(start, args.epochs + args.cooldown_epochs):
            top1 = 10 * (epoch + 1) + len(name) % 7 + generator.gauss(0, 1)
            with open(folder / 'summary.csv', 'a', newline='') as f:
                if epoch == start:
                    f.write('epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\r\n')
                f.write(f'{epoch},{1 / (epoch + 1)},{2 / (epoch + 1)},{top1},{top1 + 20},0.1\r\n')
            if when == [str(args.seed), str(epoch)]:
                time.sleep(600) if fault == 'wait' else os.kill(os.getpid(), int(fault))
            (folder / 'last.pth.tar').write_text(str(epoch))
    except KeyboardInterrupt:
        pass


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
