"""Convert a trained ANN to a spiking net of IF neurons, and test it at every number of time-steps.

    python train.py --arch vgg9_ann --dataset digits --run_dir runs/ann
    python convert.py runs/ann/best.pth.tar --out runs/converted --num_steps 1000
    python test.py runs/converted/best.pth.tar --steps 100
    python train.py --init_from runs/converted/best.pth.tar --neuron learnt_lif --leak_mem 0.99 --norm none ...

By default the thresholds are balanced layer by layer (Spike-Norm: Sengupta et al., Front. Neurosci. 2019): each becomes
the largest input current of its layer over images and time-steps, while the layers before it spike. With --weight_norm
the thresholds stay at 1 and the weights are scaled by the ANN's largest activations (Diehl et al., IJCNN 2015). Both on
training images, without augmentation. The output layer is scaled so that its voltage over T, the logits, nears the
ANN's logits, which changes no prediction.

Leaves in the folder --out best.pth.tar, a checkpoint as train.py writes them, with config.yaml, environment.json,
log.jsonl, result.json, and conversion.png: accuracy against time-steps. The last line of stdout is result.json as one
line; "difference" there is the accuracy of the spiking net minus that of the ANN on the same images, in points, with
half its 95 % interval.
"""

import argparse
import functools
import json
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn as nn
import yaml
from tqdm import tqdm

import arguments
import data
import nets
import runs
import training_set
import utill
from arguments import positive_int
from model import each_step
from utill import UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BATCH = 64  # calibration images run at once
SCALES = {"poisson": 2.0, "direct": 1.0}  # of the image over the mean of what an encoder gives
KEEPS = ("data_dir", "num_workers", "seed", "device", "engine", "amp")  # flags that are the ANN's unless they are given

percent = arguments.number(float, lambda x: 0 < x <= 100, "a number in (0, 100]")


def parse_args(argv=None):
    """The flags of the conversion alone: what they do not say, the checkpoint does."""
    parser = arguments.ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=arguments.path, help="best.pth.tar of an ANN that train.py trained")
    add = parser.add_argument_group("conversion").add_argument
    add("--out", required=True, type=arguments.path, metavar="FOLDER", help="folder of the converted net")
    add("--num_steps", default=1000, type=arguments.size, help="time-steps T")
    add("--encoding", default="poisson", choices=list(SCALES), help="input encoding")
    add("--weight_norm", action="store_true", help="scale the weights instead of the thresholds (Diehl et al. 2015)")
    part = "percentile of the currents, of all images and neurons, that counts as the largest"
    add("--percentile", default=100.0, type=percent, help=part)
    add("--calibration_images", default=128, type=positive_int, help="training images to balance on")
    add("--calibration_steps", default=100, type=positive_int, help="time-steps of them, at most T")
    shown = "print the accuracy after so many time-steps (default: 16, 32, ... and T)"
    add("--steps", default=None, nargs="+", type=positive_int, metavar="STEPS", help=shown)
    add("--limit_test", default=None, type=positive_int, help="use this many test images (default: all)")
    add("--overwrite", action="store_true", help="replace the run that the folder holds")
    add = parser.add_argument_group("machine").add_argument
    add("--data_dir", default=None, type=arguments.path, help="where the data lie (default: as the ANN's)")
    add("--num_workers", default=None, type=arguments.processes, help="data loading processes (default: as the ANN's)")
    add("--seed", default=None, type=arguments.seed, help="of the images and Poisson spikes (default: the ANN's)")
    add("--device", default="auto", type=str, help="auto, cpu, cuda, cuda:1, ...")
    add("--engine", default="auto", choices=["auto", "plain", "fused"], help="as in train.py")
    add("--amp", default="off", choices=["off", "auto", "bf16"], help="mixed precision, as in train.py")
    args = parser.parse_args(argv)
    if args.steps and max(args.steps) > args.num_steps:
        raise UserError(f"--steps must be at most --num_steps {args.num_steps}, got {max(args.steps)}")
    return args


def ann_args(args, checkpoint):
    """The flags of the ANN in `checkpoint`; UserError where it holds another net, or one that cannot be balanced."""
    path, anns = args.checkpoint, " or ".join(nets.ANNS)
    arch = checkpoint.get("config", {}).get("arch", "unknown")
    if arch not in nets.ANNS:
        raise UserError(f"{path} holds no ANN (its arch is {str(arch)[:50]}): train one with train.py --arch {anns}")
    for name in checkpoint["state_dict"]:
        if name.split(".")[-1] in ("bias", "running_mean", "running_var"):
            what = "a bias" if name.endswith(".bias") else "a batch norm"
            raise UserError(f"{path} has {what} ({name[:100]}), which no threshold balances: train the ANN without")
    parser = arguments.ArgumentParser()
    nets.add_net_arguments(parser)
    arguments.add_data_arguments(parser, data.DATASETS)
    arguments.add_run_arguments(parser)
    nets.apply_settings(parser, path, checkpoint)
    ann = parser.parse_args([])
    vars(ann).update(training_set.trained_with(path, checkpoint))
    vars(ann).update({key: getattr(args, key) for key in KEEPS if getattr(args, key) is not None})
    ann.checkpoint, ann.limit_test, ann.augment, ann.save_memory = path, args.limit_test, False, None
    nets.check_weights(ann, checkpoint, utill.DataFacts(**checkpoint["data"]))
    return ann


def input_currents(net, images, steps, index):
    """Generate the input current [B, ...] of the spiking layer `index` of a net without norms, step by step.

    The layers before it spike, or rectify in an ANN. images: [B, C, S, S].
    """
    layers, membranes = net.layers()[: index + 1], [None] * index
    for t in range(steps):
        x = net.encoder(images, 1, t)
        for i, layer in enumerate(layers):
            x = each_step(layer.synapse, x.flatten(2) if isinstance(layer.synapse, nn.Linear) else x)
            if i < index:
                x, membranes[i] = layer.lif(x, membranes[i])
                x = each_step(layer.pool, x)
        yield x[0]


@torch.no_grad()
def largest_current(net, batches, steps, index, percentile=100.0):
    """The largest input current of the layer `index` over images and steps; UserError, naming it, if none is positive.

    With a percentile below 100: the largest of the percentiles of all steps, each over a batch and its neurons.
    """
    found = 0.0
    for images in batches:
        for current in input_currents(net, images, steps, index):
            count = current.numel()  # a GPU takes seconds for kthvalue
            above = count - max(1, math.ceil(percentile / 100 * count))
            found = max(found, float(current.flatten().topk(above + 1).values[-1]))
    if not found > 0:
        what = "largest input current" if percentile == 100 else f"{percentile:g} % percentile of its input currents"
        hint = "it never fires" if percentile == 100 else "raise --percentile"
        raise UserError(f"{net.layers()[index].name} cannot be balanced, as its {what} is not above zero: {hint}")
    return found


def balance_thresholds(net, batches, steps, percentile=100.0):
    """Spike-Norm, in place: threshold of each layer = its largest input current, the earlier layers balanced already.

    The output layer's weights are multiplied by all thresholds, by which the rates of the layers before are divided.
    Returns {layer: threshold}.
    """
    product = 1.0
    for index, layer in enumerate(net.layers()):
        layer.lif.threshold = largest_current(net, batches, steps, index, percentile)
        product *= layer.lif.threshold
    net.readout.weight.data *= product
    return {layer.name: layer.lif.threshold for layer in net.layers()}


def normalise_weights(net, ann, batches, percentile=100.0):
    """Diehl et al. 2015, in place: W_l <- W_l lambda_(l-1) / lambda_l.

    lambda_l is the largest activation of the ANN's layer l. lambda_0 is 1; the output layer has no threshold, and gets
    the last lambda. Returns {layer: lambda}.
    """
    found = {layer.name: largest_current(ann, batches, 1, i, percentile) for i, layer in enumerate(ann.layers())}
    before = 1.0
    for layer in net.layers():
        layer.synapse.weight.data *= before / found[layer.name]
        before = found[layer.name]
    net.readout.weight.data *= before
    return found


def calibration_batches(loaders, count, seed, device):
    """Some training images, [B, C, S, S] at a time, chosen by the seed."""
    indices = np.random.default_rng(seed).permutation(loaders.train.keys.indices)[:count]
    parts = np.split(indices, range(BATCH, len(indices), BATCH))
    return [loaders.train.maker[0, np.sort(part)][0].to(device) for part in parts]


def convert(args, checkpoint, flags, snn_flags, loaders, device):
    """(The ANN of a checkpoint, the net converted from it), in eval mode; prints what it was balanced by."""
    ann, net = (nets.build_net(each, loaders.facts).to(device).eval() for each in (flags, snn_flags))
    ann.load_state_dict(checkpoint["state_dict"])
    net.load_state_dict(net.state_dict() | checkpoint["state_dict"])
    batches = calibration_batches(loaders, args.calibration_images, flags.seed, device)
    utill.seed_stream(flags.seed, 3)
    net.layers()[0].synapse.weight.data *= SCALES[args.encoding]
    if args.weight_norm:
        found, what = normalise_weights(net, ann, batches, args.percentile), "weights over the largest activation"
    else:
        steps = min(args.num_steps, args.calibration_steps)
        found, what = balance_thresholds(net, batches, steps, args.percentile), "threshold"
    print(f"{what} of each layer: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    return ann, net


def draw(path, evaluation, ann_acc):
    """Accuracy against time-steps, of a converted net whose ANN has an accuracy of ann_acc in %."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    steps = range(1, len(evaluation.correct) + 1)
    marker = "." if len(steps) < 20 else ""
    axis.plot(
        steps, [evaluation.top1(t) for t in steps], marker=marker, label=f"converted: {evaluation.top1():.2f} % in full"
    )
    axis.axhline(ann_acc, color="black", linestyle="--", label=f"without spikes: {ann_acc:.2f} %")
    axis.set(xlabel="time-steps", ylabel="test accuracy, %", xscale="log", title=f"{evaluation.count:,} test images")
    axis.legend(frameon=False)
    runs.write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png"))
    plt.close(figure)


def result_of(evaluation, meter, flags, loaders, epoch, shown):
    """What result.json and the line of the log say. shown: numbers of time-steps."""
    log = {"epoch": epoch, "test_loss": evaluation.loss, "test_acc": evaluation.top1(), "test_acc5": evaluation.top5()}
    log |= {"spike_rate": meter.rates(), "spikes_per_image": meter.per_image()}
    result = {key: getattr(flags, key) for key in ("dataset", "arch", "norm", "num_steps", "seed")}
    result |= {"test_acc": evaluation.top1(), "test_acc5": evaluation.top5(), "count": evaluation.count, "epoch": epoch}
    result |= {"train_images": len(loaders.train.keys.indices), "spikes_per_image": meter.per_image()}
    return result | {"acc_by_steps": {str(t): evaluation.top1(t) for t in shown}}, log


@utill.entry_point
def main(argv=None):
    args = parse_args(argv)
    if not args.overwrite and any(Path(args.out, name).exists() for name in runs.RUN_FILES):
        raise UserError(f"{args.out} already holds a run: pass --overwrite, or --out for another folder")
    checkpoint = runs.load_checkpoint(args.checkpoint)
    flags = ann_args(args, checkpoint)
    snn_flags = argparse.Namespace(**vars(flags))
    snn_flags.arch, snn_flags.neuron, snn_flags.dropout = nets.ANNS[flags.arch], "if", 0.0
    snn_flags.num_steps, snn_flags.leak_mem, snn_flags.encoding = args.num_steps, 1.0, args.encoding
    device = utill.pick_device(args.device)
    flags.amp = snn_flags.amp = utill.pick_amp(device, args.amp)
    known = training_set.known_data(checkpoint)
    loaders = data.build_loaders(flags, **known)
    ann, net = convert(args, checkpoint, flags, snn_flags, loaders, device)
    state = {name: tensor.cpu() for name, tensor in net.state_dict().items()}
    engine, reason = nets.use_engine(net, args.engine)
    print(f"engine: {engine}, mixed precision {flags.amp}" + (f" (not fused: {reason})" if reason else ""))

    progress, rights = functools.partial(tqdm, desc="test", disable=None, leave=False), {"ann": [], "snn": []}
    loss = utill.CrossEntropy(snn_flags.logit_scale)

    def evaluate(net, name):
        how = dict(device=device, loss=loss, seed=flags.seed, amp=flags.amp, progress=progress)

        def see(voltages, labels):
            rights[name].append((utill.likeliest(voltages)[-1, :, 0] == labels).cpu())

        return utill.evaluate(net, loaders.test, see=see, **how)

    ann_acc = evaluate(ann, "ann").top1()
    with utill.SpikeMeter(net) as meter:
        evaluation = evaluate(net, "snn")
    lost = utill.paired_difference(*(torch.cat(rights[name]) for name in ("snn", "ann")))
    T, epoch = args.num_steps, checkpoint.get("global_step")
    shown = args.steps or sorted({*(2**k for k in range(4, 14) if 2**k < T), T})
    print("time-steps   accuracy %", *(f"{t:10}{evaluation.top1(t):13.2f}" for t in shown), sep="\n")
    epoch = epoch if type(epoch) is int and epoch > 0 else 1
    result, log = result_of(evaluation, meter, snn_flags, loaders, epoch, shown)
    result |= {"ann_acc": ann_acc} | lost
    half = "" if lost["half_interval"] is None else f" +- {lost['half_interval']:.2f}"
    print(f"ANN {ann_acc:.2f} %, difference {lost['difference']:+.2f}{half}")
    told = ("weight_norm", "percentile", "calibration_images", "calibration_steps")
    config = checkpoint["config"] | vars(snn_flags) | {key: getattr(args, key) for key in told}
    config |= {"converted_from": config.pop("checkpoint"), "split_seed": known["split_seed"]}
    environment = runs.environment(device, argv, engine=engine, amp=flags.amp, data=loaders.record)
    made = {"state_dict": state, "config": config, "data": known["facts"]._asdict(), "held_out": loaders.held}
    with runs.run_folder(args.out, args.overwrite) as (folder, _):
        runs.save_checkpoint(folder / "best.pth.tar", made | {"global_step": epoch, "accuracy": result["test_acc"]})
        runs.write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        runs.write_json(folder / "environment.json", environment)
        runs.write_text(folder / "log.jsonl", json.dumps(log) + "\n")
        draw(folder / "conversion.png", evaluation, ann_acc)
        runs.write_json(folder / "result.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
