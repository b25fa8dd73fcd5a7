"""Is the late fall of gamma learnt, or is it weight decay? From nets trained under three weight decays on gamma alone.

gammas: {layer: [mean gamma of its channels at each time-step]}, as early_exit.json has them.
"""

import itertools
import math
import statistics

from claim_parts import Claim, Page, drawn, interval, mean_and_half, setting, spread, verdict
from make_tables import mean_and_deviation, paired, table

from figures import colours, legend, line, per_layer, time_axis, ylabel
from utill import learning_rate

DECAYS = {"gamma_0": 0.0, "gamma_3.05": 3.05, "gamma_18.3": 18.3}
THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def gamma_of(run):
    return run["exit"]["mean_gamma"]


def decayed(run):
    """What weight decay alone makes of a gamma of 1 in this run: SGD with momentum, step by step."""
    config, gamma, velocity = run["config"], 1.0, 0.0
    steps = run["train_images"] // config["batch_size"]
    schedule = config["lr_schedule"], config.get("warmup_epochs", 0.0)
    for epoch, step in itertools.product(range(config["num_epochs"]), range(steps)):
        lr = learning_rate(config["lr"], epoch, config["num_epochs"], *schedule, step, steps)
        velocity = config["momentum"] * velocity + config["gamma_weight_decay"] * gamma
        gamma -= lr * velocity
    return gamma


def touched(gammas):
    """{step: mean gamma} of the steps that training reached. At the others, gammas keep their first value, exactly 1:
    firing first, nothing has come so far yet, or can still reach the output."""
    return {step: value for step, value in enumerate(gammas, start=1) if value != 1.0}


def thirds(values):
    """(middle, last) third of the steps that training reached; both empty of fewer than three."""
    values = [*touched(values).values()]
    third = len(values) // 3
    return (values[third : len(values) - third], values[len(values) - third :]) if third else ([], [])


def late_over_middle(gammas):
    """{layer: mean gamma of the last third of its steps over that of the middle third}, of layers of three steps on."""
    parts = {layer: thirds(values) for layer, values in gammas.items()}
    return {layer: statistics.mean(late) / statistics.mean(middle) for layer, (middle, late) in parts.items() if late}


def late_over_peak(gammas):
    """{layer: mean gamma of the last third of its steps over the largest of any step}, of layers of three steps on."""
    parts = {layer: (thirds(values)[1], touched(values).values()) for layer, values in gammas.items()}
    return {layer: statistics.mean(late) / max(every) for layer, (late, every) in parts.items() if late}


RATIOS = {"late / middle": late_over_middle, "late / peak": late_over_peak}


def over_layers(found, name, ratio):
    """{seed: mean over layers of a ratio} of a row's runs."""
    ratios = {run["seed"]: ratio(gamma_of(run)).values() for run in found.get(name, [])}
    return {seed: statistics.mean(values) for seed, values in ratios.items() if values}


def claims(found):
    """That gammas fall without decay, and that decay does not deepen their fall."""
    told = []
    if ratios := [*over_layers(found, "gamma_0", late_over_middle).values()]:
        mean, half = mean_and_half(ratios)
        seen = f"[late / middle](claims/gamma.md) without weight decay on gammas: {interval(mean, half, '.3f')}"
        text = "gammas fall late, by training"
        told.append(Claim("3.4, figs. 4, 6", text, seen, len(ratios), verdict(1 - mean, half)))
    with_decay, without = (over_layers(found, name, late_over_peak) for name in ("gamma_18.3", "gamma_0"))
    if pair := paired(with_decay, without):
        mean, half, n = pair
        both = (statistics.mean(row[seed] for seed in row.keys() & other.keys())
                for row, other in ((with_decay, without), (without, with_decay)))  # fmt: skip
        seen = "[late / peak](claims/gamma.md) {:.3f} with it, {:.3f} without: ".format(*both)
        text = "the paper's weight decay on gammas (exponent 18.3) does not deepen their fall"
        told.append(Claim("3.4, figs. 4, 6", text, seen + interval(mean, half, "+.3f"), n, verdict(mean, half)))
    return told


# ---- The page ------------------------------------------------------------------------------------


def run_rows(kept):
    """A row a run: what is left of gammas, the two ratios, accuracy."""
    rows = []
    for name, runs in kept.items():
        for run in runs:
            gammas, alone = gamma_of(run), decayed(run)
            means = [statistics.mean(values) for values in gammas.values()]
            every = [value / alone for value in itertools.chain(*gammas.values())]
            told = [f"{alone:.3g}", spread(means), spread(every, ".3g")]
            told += [spread(ratio(gammas).values()) for ratio in RATIOS.values()]
            told += [f"{run['test_acc']:.2f}", f"{run['exit']['exit_step']}: {run['exit']['acc_exit']:.2f}"]
            rows.append([f"{DECAYS[name]:g}", str(run["seed"]), *told])
    heads = ["exponent", "seed", "decay alone", "mean gamma, layers", "gamma / decay alone, layers and steps"]
    return table([*heads, *(f"{ratio}, layers" for ratio in RATIOS), "accuracy, %", "exit at 0.1: %"], rows)


def layer_rows(kept):
    """A row a ratio and decay: the ratio of each layer, over seeds."""
    layers, rows = list(gamma_of(next(iter(kept.values()))[0])), []
    for (head, ratio), (name, runs) in itertools.product(RATIOS.items(), kept.items()):
        found = [ratio(gamma_of(run)) for run in runs]
        cells = [[values[layer] for values in found if layer in values] for layer in layers]
        told = [mean_and_deviation(cell, ".3f") if cell else "-" for cell in cells]
        rows.append([head, f"{DECAYS[name]:g}", str(len(runs)), *told])
    return table(["ratio", "exponent of decay", "n", *layers], rows)


def exit_at(run, threshold):
    """The point of the run's sweep that is the exit at this threshold."""
    return next(
        point
        for point in run["exit"]["sweep"]
        if point["threshold_above"] < threshold and threshold <= (point["threshold_up_to"] or math.inf)
    )


def threshold_rows(kept):
    """A row a threshold: the exit steps of each decay's runs, and accuracy there."""
    rows = []
    for threshold in THRESHOLDS:
        points = [[exit_at(run, threshold) for run in runs] for runs in kept.values()]
        steps = [", ".join(str(point["exit_step"]) for point in row) for row in points]
        accuracies = [mean_and_deviation([point["acc"] for point in row]) for row in points]
        rows.append([f"{threshold:g}", *(f"{step}: {acc}" for step, acc in zip(steps, accuracies, strict=True))])
    return table(["threshold", *(f"exit steps: accuracy, exponent {DECAYS[name]:g}" for name in kept)], rows)


def exit_rows(runs):
    """A row an exit step that some threshold yields: by seed the accuracy there, and between which thresholds."""
    sweeps = [{point["exit_step"]: point for point in run["exit"]["sweep"]} for run in runs]

    def told(point):
        high = f"up to {point['threshold_up_to']:.4f}" if point["threshold_up_to"] is not None else ""
        return f"{point['acc']:.2f} (above {point['threshold_above']:.4f}{f', {high}' if high else ''})"

    rows = [[str(step), *(told(sweep[step]) if step in sweep else "-" for sweep in sweeps)]
            for step in sorted(set().union(*sweeps))]  # fmt: skip
    return table(["exit step", *(f"seed {run['seed']}" for run in runs)], rows)


def page(found):
    kept = {name: found[name] for name in DECAYS if name in found}
    if not kept:
        return Page("gamma.md", None)
    exits = [f"Exponent {DECAYS[name]:g}:\n\n{exit_rows(runs)}\n" for name, runs in kept.items()]
    first = next(iter(kept.values()))[0]
    text = f"""# Is the late fall of gamma learnt, or is it weight decay?

The early exit is read off gammas that fall late (paper, 3.4). Weight decay shrinks every gamma that has no gradient
alike, by about exp(-exponent); the exponent is the sum of learning rates times decay over 1 - momentum: 0 below is no
decay, 3.05 that of the published command, 18.3 that of the paper's text. "Decay alone" is what the run's own steps of
SGD make of such a gamma, the same at each time-step.

{run_rows(kept)}
late / middle: mean gamma of the last third of the steps over that of the middle third; late / peak: over the largest
mean gamma of any step. Each is 1 where decay is all there is.

{layer_rows(kept)}
![Mean gamma of each layer against time-steps, and decay alone](gamma.png)

What these numbers can and cannot show:

- Without decay only the gradient of the loss moves a gamma: late / middle below 1 is then a fall that was learnt. It
  may still be too small for an exit, and a mean over layers can hide layers that rise; each is above.
- late / peak is never above 1, and below 1 for any gammas that are not all alike, those that fall early too. By itself
  it shows no late fall; what can be read is how it differs between exponents.
- Without decay, a step of little gradient stays near 1 and may be the peak. Decay takes that peak away, and late / peak
  rises for this reason too. Where it falls instead, decay deepens the fall, by steps that have less gradient.
- A gamma above "decay alone" is held up by the gradient of the loss; how much of a fall each of the two makes cannot be
  told apart within one run, as each changes the other.
- A factor common to all gammas of a layer changes neither ratio, but does change which threshold exits where: an exit
  at 0.1 that decay brings about is no sign that late steps matter less.
- Training is short: gammas that need longer to fall are not seen.

# Exits

Exit steps of the seeds, in order, at some thresholds, and mean accuracy there, %.

{threshold_rows(kept)}
Every exit that some threshold gives: accuracy, %, and the thresholds.

{"".join(exits)}![Accuracy at each exit, by exponent](gamma_exits.png)

Lines: accuracy after so many steps, whatever gammas say; marks: the exits that some threshold gives.

{setting(first)}. Command: `{first["command"]}`, with `--gamma_weight_decay` as `scripts/claims.sh` has it.
"""
    figures = {"gamma.png": lambda path: draw(kept, path), "gamma_exits.png": lambda path: draw_exits(kept, path)}
    return Page("gamma.md", text, figures)


def draw(kept, path):
    """Mean gammas of each layer of each decay's first run, and decay alone."""
    with drawn(path, 2.9) as figure:
        axes = figure.subplots(1, len(kept), squeeze=False, sharey=True)
        for axis, (name, runs) in zip(axes[0], kept.items(), strict=True):
            gammas, alone = gamma_of(runs[0]), decayed(runs[0])
            per_layer(axis, gammas, list(gammas))
            axis.axhline(alone, color="black", linestyle="--", label="decay alone")
            axis.set_title(f"exponent {DECAYS[name]:g}, seed {runs[0]['seed']}\ndecay alone: {alone:.2g}")
            time_axis(axis, len(next(iter(gammas.values()))))
            ylabel(axis, "mean gamma")
        axes[0][0].set_ylim(min(0, axes[0][0].get_ylim()[0]))
        legend(axes)


def draw_exits(kept, path):
    """Accuracy against exit step, a panel a seed."""
    seeds = sorted({run["seed"] for runs in kept.values() for run in runs})
    with drawn(path, 2.7) as figure:
        axes = figure.subplots(1, len(seeds), squeeze=False, sharey=True)
        for axis, seed in zip(axes[0], seeds, strict=True):
            for k, (name, runs) in enumerate(kept.items()):
                for run in [run for run in runs if run["seed"] == seed]:
                    curve, palette = run["exit"]["acc_by_steps"], colours(len(kept))
                    axis.plot(range(1, len(curve) + 1), curve, color=palette[k], linewidth=0.8)
                    at = {point["exit_step"]: point["acc"] for point in run["exit"]["sweep"]}
                    line(axis, [*at], [*at.values()], k, palette, linestyle="", markevery=1,
                         label=f"exponent {DECAYS[name]:g}")  # fmt: skip
                    time_axis(axis, len(curve), "exit step")
            axis.set_title(f"seed {seed}")
            ylabel(axis, "accuracy, %")
        legend(axes, "upper center")
