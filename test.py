"""Test a checkpoint on every test image, or classify pictures of your own.

    python test.py runs/digits_vgg9_T25_bntt_seed0/best.pth.tar --repeats 5
    python test.py CHECKPOINT --steps 20
    python test.py CHECKPOINT --image cat.jpg dog.png
    python test.py cifar10vgg9..._bestmodel.pth.tar --arch vgg9 --dataset cifar10 --leak_mem 0.95

The last line of stdout is one JSON object. An authors' checkpoint is read too: it does not hold
its settings, so the flags must name them.
"""

import functools
import json
import statistics
import sys

import torch
from tqdm import tqdm

import arguments
import data
import runfiles
import utill
from model import ENCODERS
from utill import UserError


def parse_args(argv=None):
    parser = arguments.ArgumentParser(__doc__.splitlines()[0])
    arguments.add_net_arguments(parser)
    arguments.add_data_arguments(parser, data.DATASETS)
    arguments.add_run_arguments(parser)
    group = parser.add_argument_group("testing")
    group.add_argument("--steps", default=None, type=arguments.positive_int, help="run only so many time-steps")
    group.add_argument("--repeats", default=1, type=arguments.positive_int,
                       help="test with so many Poisson draws: seeds SEED, SEED + 1, ...")  # fmt: skip
    group.add_argument("--image", default=None, nargs="+", metavar="FILE", help="classify these pictures instead")
    args, checkpoint = arguments.parse_with_checkpoint(parser, argv)
    if args.repeats > 1 and not ENCODERS[args.encoding].random:
        raise UserError(f"--repeats: --encoding {args.encoding} draws nothing at random, so all would be the same")
    if args.steps is not None and args.steps > args.num_steps:
        raise UserError(f"--steps must be at most {args.num_steps}, the time-steps the net was trained for")
    return args, checkpoint


@torch.no_grad()
def classify(net, loaders, args, device):
    """Print the three likeliest classes of each picture; return the likeliest ones."""
    images = data.load_images(args.image, loaders.img_size, loaders.in_channels, loaders.mean, loaders.std)
    net.eval()
    utill.seed_stream(args.seed, 1)
    with utill.autocast(device, args.amp):
        logits = net(images.to(device), args.steps).float()
    probabilities = (args.logit_scale * logits).softmax(-1).cpu()
    answers = []
    for path, p in zip(args.image, probabilities, strict=True):
        order = p.argsort(descending=True)[:3].tolist()
        print(f"{path}: " + ", ".join(f"{loaders.classes[k]} {100 * p[k]:.1f} %" for k in order))
        answers.append({"image": path, "class": loaders.classes[order[0]], "probability": p[order[0]].item()})
    return answers


@utill.entry_point
def main(argv=None):
    args, checkpoint = parse_args(argv)
    device = utill.pick_device(args.device)
    args.amp = utill.pick_amp(device, args.amp)
    if args.image and "data" in checkpoint:  # one's own pictures need no data set
        loaders = data.Loaders(None, None, None, **checkpoint["data"])
    else:
        loaders = data.build_loaders(args, train=False)
    if args.image and (args.encoding == "frames" or loaders.in_channels not in (1, 3)):
        raise UserError("--image: this net takes recordings of an event camera, not pictures")
    net = runfiles.load_net(args, checkpoint, loaders.img_size, len(loaders.classes), loaders.in_channels, device)
    if args.image:
        print(json.dumps({"images": classify(net, loaders, args, device)}))
        return

    steps, runs = args.steps or args.num_steps, []
    for repeat in range(args.repeats):
        progress = functools.partial(tqdm, desc=f"test {repeat + 1}/{args.repeats}", disable=None, leave=False)
        seed = args.seed + repeat
        runs.append(utill.evaluate(net, loaders.test, device, seed, steps, args.amp, progress, args.logit_scale))
    top1, top5 = [run.top1() for run in runs], [run.top5() for run in runs]
    deviation = statistics.stdev(top1) if args.repeats > 1 else None
    for k, (name, total) in enumerate(zip(loaders.classes, runs[0].class_count, strict=True)):
        if total:
            right = statistics.mean(run.class_correct[k] for run in runs)
            print(f"{name:>20}: {100 * right / total:6.2f} % of {total}")
    spread = "" if deviation is None else f" +- {deviation:.2f} over {args.repeats} Poisson draws"
    print(
        f"top-1 {statistics.mean(top1):.2f} %{spread}, {runs[0].count} images, {steps} of {args.num_steps} time-steps"
    )
    result = {
        "top1": statistics.mean(top1), "top1_std": deviation, "top5": statistics.mean(top5),
        "count": runs[0].count, "steps": steps, "num_steps": args.num_steps, "repeats": args.repeats,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
