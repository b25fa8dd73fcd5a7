"""Test a checkpoint on every test image, or classify pictures of your own.

    python test.py runs/digits_vgg9_T25_bntt_seed0/best.pth.tar --repeats 5
    python test.py CHECKPOINT --steps 20
    python test.py CHECKPOINT --image cat.jpg dog.png
    python test.py --weights cifar10_vgg9_T4 --image cat.jpg
    python test.py cifar10vgg9..._bestmodel.pth.tar --arch vgg9 --dataset cifar10 --leak_mem 0.95

The last line of stdout is one JSON object. An authors' checkpoint is read too: it does not hold
its settings, so the flags must name them.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import arguments
import data
import nets
import precise_bn
import runs
import training_set
import utill
from utill import UserError


def parse_args(argv=None):
    parser = arguments.ArgumentParser(__doc__.splitlines()[0])
    nets.add_net_arguments(parser)
    arguments.add_data_arguments(parser, data.DATASETS)
    arguments.add_run_arguments(parser)
    add = parser.add_argument_group("testing").add_argument
    add("--steps", default=None, type=arguments.positive_int, help="run only this many time-steps")
    draws = "test with this many Poisson draws: seeds SEED, SEED + 1, ..."
    add("--repeats", default=1, type=arguments.positive_int, help=draws)
    precise = "first average running statistics over so many training batches"
    add("--precise_bn", default=None, type=arguments.positive_int, metavar="BATCHES", help=precise)
    add("--image", default=None, nargs="+", type=arguments.path, metavar="FILE", help="classify these pictures instead")
    add("--out", default=None, type=arguments.path, metavar="FILE", help="write the last line of stdout there too")
    shipped = "a trained net that comes with the code, in place of CHECKPOINT"
    add("--weights", default=None, choices=list(nets.WEIGHTS), help=shipped)
    first = arguments.ArgumentParser(add_help=False)
    first.add_argument("--weights", choices=list(nets.WEIGHTS))
    name = first.parse_known_args(argv)[0].weights
    path = nets.weights_file(name) if name else None
    if name:
        parser.add_argument("checkpoint", nargs="?", help=argparse.SUPPRESS)
    args, checkpoint = nets.parse_with_checkpoint(parser, argv, path)
    if name and args.checkpoint != path:
        raise UserError(f"--weights {name} stands in place of CHECKPOINT: leave out {args.checkpoint}")
    if args.repeats > 1 and not nets.ENCODERS[args.encoding].random:
        raise UserError(f"--repeats: --encoding {args.encoding} draws nothing at random, so all would be the same")
    if args.repeats > 1 and args.image:
        raise UserError("--repeats draws a whole test set again: leave it out, or --image")
    if args.precise_bn and args.image:
        raise UserError("--precise_bn takes the data set that the net was trained on, not pictures: leave out --image")
    if args.precise_bn and args.norm in nets.WITHOUT_STATISTICS:
        raise UserError(f"--precise_bn: a net with --norm {args.norm} has no running statistics: leave it out")
    if args.precise_bn and args.batch_size == 1:
        raise UserError("--precise_bn: there are no statistics of a batch of one image: choose a larger --batch_size")
    if args.steps is not None and args.steps > args.num_steps:
        raise UserError(f"--steps must be at most {args.num_steps}, the time-steps the net was trained for")
    if args.out and (not Path(args.out).absolute().parent.is_dir() or Path(args.out).is_dir()):
        raise UserError(f"--out {args.out}: name a file in a folder that is there")
    return args, checkpoint


@torch.no_grad()
def classify(net, loss, facts, args, device):
    """Print the three likeliest classes of each picture; return the likeliest ones."""
    images = data.load_images(args.image, facts)
    net.eval()
    utill.seed_stream(args.seed, 1)
    with utill.autocast(device, args.amp):
        voltages = net.voltages(images.to(device), args.steps).float()
    probabilities = loss.logits(voltages).softmax(-1).cpu()
    answers = []
    for path, p in zip(args.image, probabilities, strict=True):
        order = p.argsort(descending=True)[:3].tolist()
        print(f"{path}: " + ", ".join(f"{facts.classes[k]} {100 * p[k]:.1f} %" for k in order))
        answers.append({"image": path, "class": facts.classes[order[0]], "probability": p[order[0]].item()})
    return answers


def tell(result, path):
    """Print the last line, and write it to `path` unless that is None."""
    print(json.dumps(result))
    if path:
        runs.write_text(path, json.dumps(result) + "\n")


@utill.entry_point
def main(argv=None):
    args, checkpoint = parse_args(argv)
    device = utill.pick_device(args.device)
    args.amp = utill.pick_amp(device, args.amp)
    known = training_set.known_data(checkpoint)
    if args.image and known:  # one's own pictures need no data set
        facts = known["facts"]
    else:
        loaders = data.build_loaders(args, train=False, **known)
        facts = loaders.facts
    if args.image and (args.encoding == "frames" or facts.in_channels not in (1, 3)):
        raise UserError("--image: this net takes recordings of an event camera, not pictures")
    net = nets.load_net(args, checkpoint, facts, device)
    loss = utill.CrossEntropy(args.logit_scale)  # it prints no loss: for the probabilities all are alike
    if args.image:
        tell({"images": classify(net, loss, facts, args, device)}, args.out)
        return

    if args.precise_bn:
        loader = training_set.trained_on(args, training_set.trained_with(args.checkpoint, checkpoint), **known)
        utill.seed_stream(args.seed, 2)
        batches = itertools.islice(loader, args.precise_bn)
        precise_bn.average_statistics(net, (images.to(device) for images, _ in batches), args.amp)
    steps, found = args.steps or args.num_steps, []
    for repeat in range(args.repeats):
        progress = functools.partial(tqdm, desc=f"test {repeat + 1}/{args.repeats}", disable=None, leave=False)
        seed = args.seed + repeat
        found.append(utill.evaluate(net, loaders.test, device, loss, seed, steps, args.amp, progress))
    top1, top5 = [run.top1() for run in found], [run.top5() for run in found]
    deviation = statistics.stdev(top1) if args.repeats > 1 else None
    for k, (name, total) in enumerate(zip(facts.classes, found[0].class_count, strict=True)):
        if total:
            right = statistics.mean(run.class_correct[k] for run in found)
            print(f"{name:>20}: {100 * right / total:6.2f} % of {total}")
    spread = "" if deviation is None else f" +- {deviation:.2f} over {args.repeats} Poisson draws"
    print(
        f"top-1 {statistics.mean(top1):.2f} %{spread}, {found[0].count} images, {steps} of {args.num_steps} time-steps"
    )
    result = {
        "top1": statistics.mean(top1), "top1_std": deviation, "top5": statistics.mean(top5),
        "count": found[0].count, "steps": steps, "num_steps": args.num_steps, "repeats": args.repeats,
        "precise_bn": args.precise_bn,
    }  # fmt: skip
    tell(result, args.out)


if __name__ == "__main__":
    sys.exit(main())
