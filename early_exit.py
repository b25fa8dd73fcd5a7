"""Read the early exit off the learnt gammas of a BNTT checkpoint (paper, section 3.4).

    python early_exit.py runs/digits_vgg9_T25_bntt_seed0/best.pth.tar --sweep

The exit step is the smallest t such that at every later step the mean gamma of every layer lies
below --gamma_threshold: from there on, BNTT lets hardly any current through. It is known before
any image is seen. If no such step exists the exit is T, the full run.

Leaves early_exit.png (mean gammas as in the paper's fig. 4, accuracy as in fig. 7) and
early_exit.json beside the checkpoint. The last line of stdout is one JSON object.
"""

import functools
import json
import sys
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm

import arguments
import data
import nets
import runs
import utill
from utill import UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

MOST_COLUMNS = 25  # time-steps printed at most


def exit_step(mean_gamma, threshold):
    """Smallest number of time-steps after which every layer's mean gamma stays below `threshold`.

    mean_gamma: [layers, T]. Returns an int in 1..T; T means that there is no early exit.
    """
    open_steps = (mean_gamma >= threshold).any(dim=0).nonzero()
    return int(open_steps.max()) + 1 if len(open_steps) else 1


def sweep_thresholds(mean_gamma):
    """{exit step: (lowest, highest) gamma threshold that gives it}: every exit that some threshold yields.

    The exit can only change where the threshold crosses the largest mean gamma of all later steps.
    """
    largest = mean_gamma.max(dim=0).values
    ahead = largest.flip(0).cummax(0).values.flip(0)  # over this and all later steps
    exits, low = {}, 0.0
    for value in [*ahead[1:].unique().tolist(), float("inf")]:  # ascending
        if value > 0:
            exits[exit_step(mean_gamma, value)] = (low, value)
            low = value
    return exits


def savings(meter, step):
    """Share of the spikes and of the accumulate operations that an exit after `step` steps saves, in %."""
    spikes = sum(s for name, s in meter.spikes.items() if name != "input")
    saved = [100.0 * float(x[step:].sum() / x.sum().clamp(min=1e-300)) for x in (spikes, meter.operations())]
    return {"spikes_saved": saved[0], "operations_saved": saved[1]}


def draw(path, gammas, evaluation, threshold, step, points):
    """Two panels: mean gamma per layer and step with the exit (fig. 4); accuracy against steps (fig. 7)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps = range(1, len(evaluation.correct) + 1)
    style = ".-" if len(steps) <= 100 else "-"
    lowest = min(0, *(float(gamma.mean(1).min()) for gamma in gammas.values()))
    colours = plt.get_cmap("viridis")(torch.linspace(0, 0.92, len(gammas)).numpy())
    for (name, gamma), colour in zip(gammas.items(), colours, strict=True):
        left.plot(steps, gamma.mean(1), style, color=colour, label=name)
    left.axhline(threshold, color="black", linestyle=":", label=f"threshold {threshold:g}")
    left.axvline(step, color="crimson", label=f"exit at {step} of {len(steps)}")
    left.set(xlabel="time-step", ylabel="mean gamma", title="Learnt gammas", ylim=(lowest, None))
    left.legend(fontsize=8, ncols=2)
    right.plot(steps, [evaluation.top1(t) for t in steps], style, label="every possible exit")
    if points:
        exits = [p["exit_step"] for p in points]
        right.plot(exits, [evaluation.top1(t) for t in exits], "o", mfc="none", label="exits of the threshold sweep")
    right.axvline(step, color="crimson", label=f"{evaluation.top1(step):.2f} % at {step}")
    right.axhline(evaluation.top1(), color="grey", linestyle=":", label=f"{evaluation.top1():.2f} % in full")
    right.set(xlabel="time-steps run", ylabel="test accuracy, %", title="Accuracy against latency")
    right.legend(fontsize=8)
    runs.write_atomically(path, lambda file: figure.savefig(file, dpi=150, format=path.suffix[1:]))
    plt.close(figure)


def parse_args(argv=None):
    parser = arguments.ArgumentParser(__doc__.splitlines()[0])
    nets.add_net_arguments(parser)
    arguments.add_data_arguments(parser, data.DATASETS)
    arguments.add_run_arguments(parser)
    add = parser.add_argument_group("early exit").add_argument
    add("--gamma_threshold", default=0.1, type=arguments.positive_float, help="on a layer's mean gamma")
    add("--sweep", action="store_true", help="list every exit that some threshold yields")
    add("--figure", default=None, type=arguments.path, help="figure file (default: early_exit.png by CHECKPOINT)")
    args, checkpoint = nets.parse_with_checkpoint(parser, argv)
    suffixes = [f".{kind}" for kind in plt.FigureCanvasBase.get_supported_filetypes()]
    if args.figure and Path(args.figure).suffix not in suffixes:
        raise UserError(f"--figure {args.figure}: the name must end in one of {' '.join(suffixes)}")
    if args.figure and not Path(args.figure).parent.is_dir():
        raise UserError(f"--figure {args.figure}: there is no such folder")
    if args.figure and Path(args.figure).with_suffix(".json").name in runs.RUN_FILES:
        raise UserError(f"--figure {args.figure}: its .json would replace one of a run: choose another name")
    return args, checkpoint


@utill.entry_point
def main(argv=None):
    args, checkpoint = parse_args(argv)
    device = utill.pick_device(args.device)
    args.amp = utill.pick_amp(device, args.amp)
    if args.norm != "bntt":
        raise UserError(f"a net with --norm {args.norm} has no gamma per time-step: early exit needs bntt")
    loaders = data.build_loaders(args, train=False, **nets.known_data(checkpoint))
    net = nets.load_net(args, checkpoint, loaders.facts, device)

    gammas, T = net.gammas(), args.num_steps
    mean_gamma = torch.stack([gamma.mean(1) for gamma in gammas.values()]).double()
    step = exit_step(mean_gamma, args.gamma_threshold)
    shown = range(0, T, -(-T // MOST_COLUMNS))
    print("mean gamma" + "".join(f"{f't={t + 1}':>7}" for t in shown))
    for name, row in zip(gammas, mean_gamma.tolist(), strict=True):
        print(f"{name:>10}" + "".join(f"{row[t]:7.3f}" for t in shown))
    if step < T:
        print(f"exit at step {step} of {T}: afterwards every layer's mean gamma is below {args.gamma_threshold:g}")
    else:
        print(f"no early exit: no step before {T} leaves every later mean gamma below {args.gamma_threshold:g}")

    progress = functools.partial(tqdm, desc="test", disable=None, leave=False)
    with utill.SpikeMeter(net) as meter:
        loss = utill.CrossEntropy(args.logit_scale)
        evaluation = utill.evaluate(net, loaders.test, device, loss, args.seed, amp=args.amp, progress=progress)
    points = []
    if args.sweep:
        print(" exit   accuracy %   spikes saved %   operations saved %   for thresholds")
        for t, (low, high) in sorted(sweep_thresholds(mean_gamma).items()):
            point = {"exit_step": t, "acc": evaluation.top1(t), **savings(meter, t), "threshold_above": low}
            points.append(point | {"threshold_up_to": high if high < float("inf") else None})
            shown = f"{point['acc']:10.2f}{point['spikes_saved']:15.1f}{point['operations_saved']:20.1f}"
            print(f"{t:5}{shown}          {low:.4f} to {high:.4f}")
    result = {
        "gamma_threshold": args.gamma_threshold, "exit_step": step, "num_steps": T,
        "acc_full": evaluation.top1(), "acc_exit": evaluation.top1(step), "count": evaluation.count,
        **savings(meter, step), "spike_rate": meter.rates(),
    }  # fmt: skip
    folder = Path(args.checkpoint).parent
    figure = Path(args.figure) if args.figure else folder / "early_exit.png"
    draw(figure, gammas, evaluation, args.gamma_threshold, step, points)
    curve = [evaluation.top1(t) for t in range(1, T + 1)]
    details = {"acc_by_steps": curve, "mean_gamma": dict(zip(gammas, mean_gamma.tolist(), strict=True))}
    runs.write_json(figure.with_suffix(".json"), {**result, **details, "sweep": points})
    print(
        f"accuracy {result['acc_full']:.2f} % in full, {result['acc_exit']:.2f} % at the exit, which saves "
        f"{result['spikes_saved']:.1f} % of the spikes and {result['operations_saved']:.1f} % of the operations"
    )
    print(f"figure: {figure}")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
