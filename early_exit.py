"""Read the early exit off the learnt gammas of a BNTT checkpoint (paper, section 3.4), and exits of each image.

    python early_exit.py runs/digits_vgg9_T25_bntt_seed0/best.pth.tar --sweep
    python early_exit.py CHECKPOINT --policy confidence --target_drop 0.3 --measure

gamma: the exit step is the smallest t such that at every later step the mean gamma of every layer lies
below --gamma_threshold: from there on, BNTT lets hardly any current through. It is known before
any image is seen. If no such step exists the exit is T, the full run.

confidence, entropy, margin: each image leaves at the first step at which its own output is sure enough. The threshold
costs at most --target_drop points of accuracy on the images that the training held out (--val_fraction of train.py),
never on the test set.

Leaves early_exit.png (mean gammas as in the paper's fig. 4, accuracy as in fig. 7, every policy) and
early_exit.json beside the checkpoint. The last line of stdout is one JSON object.
"""

import itertools
import json
import sys
import time
from pathlib import Path

import matplotlib
import torch

import arguments
import data
import exits
import nets
import runs
import training_set
import utill
from energy import energy
from utill import UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

MOST_COLUMNS = 25  # time-steps printed at most


def draw(path, gammas, evaluation, gamma, policies, answer):
    """Mean gamma per layer and step with the exit (fig. 4); accuracy against steps (fig. 7), of every policy too.

    gamma: an `exits.gamma_report`, or None without gammas; policies: `exits.report` by name; answer: (mean steps run,
    accuracy in %) of the policy asked for.
    """
    figure, panels = plt.subplots(
        1, 1 + bool(gammas), figsize=(6 + 5 * bool(gammas), 4), layout="constrained", squeeze=False
    )
    T = len(evaluation.correct)
    steps, style, right = range(1, T + 1), ".-" if T <= 100 else "-", panels[0, -1]
    if gammas:
        left = panels[0, 0]
        lowest = min(0, *(float(gamma.mean(1).min()) for gamma in gammas.values()))
        colours = plt.get_cmap("viridis")(torch.linspace(0, 0.92, len(gammas)).numpy())
        for (name, values), colour in zip(gammas.items(), colours, strict=True):
            left.plot(steps, values.mean(1).cpu(), style, color=colour, label=name)
        left.axhline(
            gamma["gamma_threshold"], color="black", linestyle=":", label=f"threshold {gamma['gamma_threshold']:g}"
        )
        left.axvline(gamma["step"], color="crimson", label=f"exit at {gamma['step']} of {T}")
        left.set(xlabel="time-step", ylabel="mean gamma", title="Learnt gammas", ylim=(lowest, None))
        left.legend(fontsize=8, ncols=2)
        found = [point["exit_step"] for point in gamma["sweep"]]
        right.plot(found, [evaluation.top1(t) for t in found], "o", mfc="none", label="exits by gamma")
    right.plot(steps, [evaluation.top1(t) for t in steps], style, label="the same exit for all")
    for (name, policy), line in zip(policies.items(), ("--", "-.", ":"), strict=False):
        points = [(mean, acc) for _, mean, acc in policy["curve"]]
        right.plot(*zip(*points, strict=True), line, label=f"each image, by {name}")
    right.plot(*answer, "*", color="crimson", ms=12, label=f"{answer[1]:.2f} % after {answer[0]:.4g} steps")
    right.axhline(evaluation.top1(), color="grey", linewidth=0.8, label=f"{evaluation.top1():.2f} % in full")
    right.set(xlabel="time-steps run, mean", ylabel="test accuracy, %", title="Accuracy against latency")
    right.legend(fontsize=8)
    for panel in panels.flat:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    runs.write_atomically(path, lambda file: figure.savefig(file, dpi=150, format=path.suffix[1:]))
    plt.close(figure)


MEASURED = {1: 32, 64: 256}  # {batch size: images}


def measure(net, loader, device, amp, run):
    """Wall time of a full run and of run(images) -> exit steps, in turns, on batches of 1 and 64 images in memory."""
    batches = itertools.islice(loader, -(-max(MEASURED.values()) // loader.keys.batch_size))
    images, rows = torch.cat([x for x, _ in batches])[: max(MEASURED.values())].to(device), []

    def timed(work, batch):
        start = time.perf_counter()
        with torch.no_grad(), utill.autocast(device, amp):
            found = work(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return found, 1000 * (time.perf_counter() - start)

    for size, count in MEASURED.items():
        batches, full, stopped, steps = images[:count].split(size), [], [], []
        for work in (net.voltages, run):
            timed(work, batches[0])  # warms up
        for batch in batches:
            full.append(timed(net.voltages, batch)[1])
            found, duration = timed(run, batch)
            stopped.append(duration)
            steps.append(found.double())
        n = sum(map(len, batches))
        row = {"batch": size, "images": n, "ms_full": sum(full) / n, "ms_exit": sum(stopped) / n}
        rows.append(row | {"mean_steps": torch.cat(steps).mean().item()})
    return rows


def parse_args(argv=None):
    parser = arguments.ArgumentParser(__doc__.splitlines()[0])
    nets.add_net_arguments(parser)
    arguments.add_data_arguments(parser, data.DATASETS)
    arguments.add_run_arguments(parser)
    add = parser.add_argument_group("early exit").add_argument
    add("--gamma_threshold", default=0.1, type=arguments.positive_float, help="on a layer's mean gamma")
    add("--sweep", action="store_true", help="list every exit that some threshold yields")
    add(
        "--policy", default="gamma", choices=["gamma", *exits.POLICIES], help="one exit for all images, or each its own"
    )
    add("--target_drop", default=0.3, type=arguments.nonnegative_float, help="points of accuracy that its own may cost")
    add("--measure", action="store_true", help="wall time with and without the exit, on batches that really stop")
    beside = "figure file (default: early_exit.png, or early_exit_POLICY.png, by CHECKPOINT)"
    add("--figure", default=None, type=arguments.path, help=beside)
    args, checkpoint = nets.parse_with_checkpoint(parser, argv)
    suffixes = [f".{kind}" for kind in plt.FigureCanvasBase.get_supported_filetypes()]
    if args.figure and Path(args.figure).suffix not in suffixes:
        raise UserError(f"--figure {args.figure}: the name must end in one of {' '.join(suffixes)}")
    if args.figure and not Path(args.figure).parent.is_dir():
        raise UserError(f"--figure {args.figure}: there is no such folder")
    if args.figure and Path(args.figure).with_suffix(".json").name in (*runs.RUN_FILES, "analysis.json"):
        raise UserError(f"--figure {args.figure}: its .json would replace one of a run: choose another name")
    return args, checkpoint


@utill.entry_point
def main(argv=None):
    args, checkpoint = parse_args(argv)
    device = utill.pick_device(args.device)
    args.amp = utill.pick_amp(device, args.amp)
    known, settings = training_set.known_data(checkpoint), training_set.trained_with(args.checkpoint, checkpoint)
    if args.policy == "gamma" and args.norm not in nets.OF_STEPS:
        own = " or ".join(exits.POLICIES)
        raise UserError(f"a net with --norm {args.norm} has no gamma per time-step: choose --policy {own}")
    if args.policy != "gamma" and not settings["val_fraction"]:
        need = "a threshold is chosen on images held out of training: train with --val_fraction"
        raise UserError(f"--policy {args.policy}: {need}")
    loaders = data.build_loaders(args, train=False, **known)
    held_loader = training_set.held_out(args, settings, **known)
    if args.policy != "gamma" and held_loader is None:
        raise UserError(f"--policy {args.policy} needs the images held out of training: --data_dir must name its data")
    net = nets.load_net(args, checkpoint, loaders.facts, device)
    if args.policy == "gamma" and not net.gammas():
        raise UserError(f"{type(net).__name__} lists no layers() with a gamma per time-step: choose another --policy")
    gammas, T = net.gammas(), args.num_steps
    mean_gamma = torch.stack([gamma.mean(1) for gamma in gammas.values()]).double() if gammas else None
    if gammas:
        print_gammas(gammas, mean_gamma)

    with utill.SpikeMeter(net, by_image=True) as meter:
        evaluation, seen = exits.watch(net, loaders.test, device, args, meter)
    held = exits.watch(net, held_loader, device, args, what="held out")[1] if held_loader else None
    gamma = exits.gamma_report(mean_gamma, args.gamma_threshold, evaluation, meter) if gammas else None
    policies = {
        name: exits.report(name, seen, held, args.target_drop, loaders.facts.classes) for name in exits.POLICIES
    }
    result = {"policy": args.policy, "num_steps": T, "acc_full": evaluation.top1(), "count": evaluation.count}
    if args.policy == "gamma":
        step = gamma["step"]
        result |= {"gamma_threshold": args.gamma_threshold, "exit_step": step, "acc_exit": evaluation.top1(step)}
        result |= {key: gamma[key] for key in ("spikes_saved", "operations_saved")}
        answer, run = (step, evaluation.top1(step)), lambda x: len(net.voltages(x, step)) * torch.ones(len(x))
        result["energy_exit_uj"] = energy(meter, step)["snn_pj"] / 1e6
    else:
        found, rule = policies[args.policy]["calibrated"], exits.POLICIES[args.policy]
        result |= {
            key: found[key]
            for key in ("threshold", "target_drop", "held_out", "mean_steps", "spikes_saved", "operations_saved")
        }
        result["acc_exit"], answer = found["acc"], (found["mean_steps"], found["acc"])
        threshold = float("inf") if found["threshold"] is None else found["threshold"]
        run = lambda x: exits.run_with_exits(net, x, rule, threshold, args.logit_scale)[0]  # noqa: E731
    result |= {"operations": float(meter.operations().sum()), "energy_uj": energy(meter)["snn_pj"] / 1e6}
    result |= {"energy_without_spikes_uj": energy(meter)["ann_pj"] / 1e6, "spike_rate": meter.rates()}
    print_answer(result, gamma, args)
    if args.measure:
        result["measured"] = measure(net, loaders.test, device, args.amp, run)
        for row in result["measured"]:
            times = f"{row['ms_full']:.2f} ms an image in full, {row['ms_exit']:.2f} ms with exits"
            print(f"batch {row['batch']}: {times}, {row['mean_steps']:.2f} steps in the mean, {row['images']} images")
    name = "early_exit.png" if args.policy == "gamma" else f"early_exit_{args.policy}.png"
    figure = Path(args.figure) if args.figure else nets.beside(args.checkpoint) / name
    draw(figure, gammas, evaluation, gamma, policies, answer)
    curve = [evaluation.top1(t) for t in range(1, T + 1)]
    details = {"acc_by_steps": curve, "policies": policies, "sweep": gamma["sweep"] if gamma else []}
    details["mean_gamma"] = dict(zip(gammas, mean_gamma.tolist(), strict=True)) if gammas else {}
    runs.write_json(figure.with_suffix(".json"), {**result, **details})
    print(f"figure: {figure}")
    print(json.dumps(result))


def print_gammas(gammas, mean_gamma):
    T = mean_gamma.shape[1]
    shown = range(0, T, -(-T // MOST_COLUMNS))
    print("mean gamma" + "".join(f"{f't={t + 1}':>7}" for t in shown))
    for name, row in zip(gammas, mean_gamma.tolist(), strict=True):
        print(f"{name:>10}" + "".join(f"{row[t]:7.3f}" for t in shown))


def print_answer(result, gamma, args):
    T = result["num_steps"]
    if args.policy != "gamma":
        chosen = f"on {result['held_out']} images held out"
        if result["threshold"] is None:
            print(f"no early exit: no threshold costs at most {args.target_drop:g} points {chosen}")
        else:
            rule = f"at a {args.policy} of {result['threshold']:.4f}, chosen {chosen}"
            print(f"each image leaves {rule}: after {result['mean_steps']:.2f} of {T} steps in the mean")
    elif (step := result["exit_step"]) < T:
        print(f"exit at step {step} of {T}: afterwards every layer's mean gamma is below {args.gamma_threshold:g}")
    else:
        print(f"no early exit: no step before {T} leaves every later mean gamma below {args.gamma_threshold:g}")
    if args.sweep and gamma:
        print(" exit   accuracy %   spikes saved %   operations saved %   for thresholds")
        for point in gamma["sweep"]:
            numbers = f"{point['acc']:10.2f}{point['spikes_saved']:15.1f}{point['operations_saved']:20.1f}"
            high = float("inf") if point["threshold_up_to"] is None else point["threshold_up_to"]
            print(f"{point['exit_step']:5}{numbers}          {point['threshold_above']:.4f} to {high:.4f}")
    print(
        f"accuracy {result['acc_full']:.2f} % in full, {result['acc_exit']:.2f} % at the exit, which saves "
        f"{result['spikes_saved']:.1f} % of the spikes and {result['operations_saved']:.1f} % of the operations"
    )
    print(
        f"operations of an image {result['operations']:.4g}, their energy {result['energy_uj']:.3f} uJ; "
        f"one pass without spikes {result['energy_without_spikes_uj']:.3f} uJ (arithmetic alone, see energy.py)"
    )


if __name__ == "__main__":
    sys.exit(main())
