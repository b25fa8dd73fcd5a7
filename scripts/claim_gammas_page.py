"""The page results/claims/gamma.md: what claim_gammas.py makes of runs, with its tables and figures.

Sentences with numbers hold of whatever runs there are; what they mean is said once, for all that may come.
"""

import itertools
import math
import statistics

from claim_gammas import (
    ROWS,
    RULE,
    decayed,
    exit_at,
    exit_steps,
    exponent,
    gamma_of,
    late_over_middle,
    steps_in_all,
    thirds,
    touched,
    untouched,
)
from claim_parts import Page, drawn, mean_and_half, setting, spread, those_that_learnt, training, unlearnt
from make_tables import filled, interval, mean_and_deviation, table

from figures import colours, legend, line, per_layer, time_axis, ylabel

THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
NARROW = 0.01  # an exit of thresholds that differ by less is not told
HEADS = ["exponent", "epochs x images"]  # what tells rows apart
PAGE = """# Is the late fall of gamma learnt, or is it weight decay?

{short}
Decay alone makes all time-steps alike, so that a fall over time needs the gradient. But where late gammas lie at what
decay alone gives, and without decay near 1, their low level comes from decay, and with it an exit at {rule:g}. Where
stopping at such an exit costs as little without decay, late steps add little in both nets, and no gamma needs to be
below {rule:g} for that.
{lost}
The early exit is read off gammas that fall late (paper, 3.4). Weight decay shrinks every gamma that has no gradient
alike. The exponent is the sum of learning rates times decay over 1 - momentum: 0 below is no decay, 3.05 that of the
published command, 18.3 that of the paper's text. The same exponent is the same total decay, in fewer steps more of it
in each. "Decay alone" follows SGD with momentum step by step on a gamma without gradient, and is the same at each
time-step. For little decay per step it is about exp(-exponent), for much it is lower.

{decays}
{settings}
"""
RESULTS = """
# Gammas

{runs}
late / middle: mean gamma of the last third of the time-steps over that of the middle third; steps whose mean gamma is
exactly 1, as at the start of training, do not count. It is 1 where decay is all there is. "±": standard deviation of
the seeds, no interval.

{layers}
![Mean gamma of each layer against time-steps, and decay alone](gamma.png)

Above: all on one axis; below: each on its own.

What these numbers can and cannot show:

- Without decay only the gradient of the loss moves a gamma: late / middle below 1 is then a fall that was learnt. It
  may still be too small for an exit, and a mean over layers can hide layers that rise; each is above.
- A gamma above "decay alone" is held up by the gradient. How much of a fall each of the two makes cannot be told apart
  within one run, as each changes the other: a gradient that pushes a gamma near 1 down may hold up the same gamma near
  0. The run without decay does not isolate "the learnt part" of a run with decay.
- Means over channels hide channels: one channel may fall while another rises. early_exit.json holds means alone, and
  the rule of the exit knows no more.
- A factor common to all gammas of a layer does not change late / middle, but does change which threshold exits where:
  an exit at {rule:g} that decay brings about is no sign that late steps matter less.
{still}- Few steps of training give gammas little time to move: what short runs show may not hold of the published
  command's 100 epochs.

# Exits

The exit is the smallest t such that at every step after t the mean gamma of every layer is below the threshold; t steps
are run. "none": there is no such t below T, and all T steps are run. The paper's exit (fig. 4) is 20 of 25 at
{rule:g}; how it counts steps is not said there.

Exit steps of the seeds, in order, at some thresholds, and mean accuracy there, %.

{thresholds}
Every exit whose thresholds differ by {narrow:g} and more: accuracy, %, and the thresholds.

{exits}![Accuracy after so many steps, by exponent, with the exits](gamma_exits.png)

Lines: accuracy after so many steps, whatever gammas say, so that stopping at a step can be compared. Marks: exits.
"""


def names(run):
    """The cells below HEADS."""
    return [f"{exponent(run):.3g}", f"{run['config']['num_epochs']} x {run['train_images']:,}"]


def every_mean(runs):
    """Mean gammas of all layers, time-steps and runs."""
    return [value for run in runs for values in gamma_of(run).values() for value in values]


# ---- In short ------------------------------------------------------------------------------------


def above_decay(runs):
    """(mean gamma of the last step over decay alone, in the mean of layers; largest such number of the middle third)"""
    last, middle = [], []
    for run in runs:
        for values in gamma_of(run).values():
            last.append(values[-1] / decayed(run))
            middle += [value / decayed(run) for value in thirds(touched(values).values())[0]]
    return statistics.mean(last), max(middle, default=math.nan)


def what_they_do(runs):
    """'(50.58, 51.35 % accuracy; exits at 0.1: 19, 19 of 25)'"""
    T, accuracies = runs[0]["num_steps"], ", ".join(f"{run['test_acc']:.2f}" for run in runs)
    steps = exit_steps([exit_at(run, RULE) for run in runs], T)
    return f"({accuracies} % accuracy; exits at {RULE:g}: {steps} of {T})"


def stop(without, decaying):
    """[(points that stopping at the decaying net's exit costs it, points that it costs the other)] by seed."""
    others, found = {run["seed"]: run for run in without}, []
    for run in decaying:
        step = exit_at(run, RULE)["exit_step"]
        if step < run["num_steps"] and run["seed"] in others:
            curves = [net["exit"]["acc_by_steps"] for net in (run, others[run["seed"]])]
            found.append([curve[-1] - curve[step - 1] for curve in curves])
    return found


def in_short(kept):
    """The answer to the title in numbers: runs without decay, and with that of the published exponent."""
    told = []
    for name, other in (("gamma_0", "gamma_3.05"), ("published_gamma_0", "published")):
        without, decaying = kept.get(name), kept.get(other)
        if without:
            low, high = min(every_mean(without)), max(every_mean(without))
            told.append(f"without weight decay, {steps_in_all(without[0]):,} steps of training leave mean gammas at "
                        f"{low:.3f} to {high:.3f} {what_they_do(without)}")  # fmt: skip
        if decaying:
            last, middle = above_decay(decaying)
            told.append(f"with that of exponent {exponent(decaying[0]):.3g}, {steps_in_all(decaying[0]):,} steps leave "
                        f"those of the last time-step at {last:.2f} times what decay alone gives, in the mean of "
                        f"layers, and those of the middle third at up to {middle:.1f} times "
                        f"{what_they_do(decaying)}")  # fmt: skip
        if without and decaying and (costs := stop(without, decaying)):
            ours, theirs = (interval(*mean_and_half(cost), ".2f") for cost in zip(*costs, strict=True))
            told.append(f"stopping at that exit costs {ours} points of accuracy with decay, and {theirs} without "
                        f"(n = {len(costs)})")  # fmt: skip
    return filled(f"In short: {'; '.join(told)}.") if told else ""


# ---- Tables --------------------------------------------------------------------------------------


def decay_rows(found):
    """A row a decay: how large it is, and what it makes of a gamma without gradient."""
    rows = []
    for run in (runs[0] for runs in found.values()):
        decay, power = run["config"]["gamma_weight_decay"], exponent(run)
        told = [f"{decay:.3g}", f"{power / steps_in_all(run):.3g}", f"{math.exp(-power):.3g}", f"{decayed(run):.3g}"]
        rows.append([*names(run), *told])
    return table([*HEADS, "gamma_weight_decay", "decay per step", "exp(-exponent)", "decay alone"], rows)


def run_rows(kept):
    """A row a run: what is left of gammas, late / middle, accuracy."""
    rows = []
    for run in itertools.chain(*kept.values()):
        gammas, point = gamma_of(run), exit_at(run, RULE)
        over = [value / decayed(run) for value in every_mean([run])]
        told = [spread([statistics.mean(values) for values in gammas.values()]), spread(over, ".3g")]
        told += [spread(late_over_middle(gammas).values(), ".4f"), f"{run['test_acc']:.2f}"]
        told += [f"{exit_steps([point], run['num_steps'])}: {point['acc']:.2f}"]
        rows.append([*names(run), str(run["seed"]), *told])
    heads = ["seed", "mean gamma, layers", "gamma / decay alone, layers and steps", "late / middle, layers"]
    return table([*HEADS, *heads, "accuracy, %", f"exit at {RULE:g}: %"], rows)


def layer_rows(kept):
    """A row a decay: late / middle of each layer, over seeds."""
    rows, layers = [], gamma_of(next(iter(kept.values()))[0])
    for runs in kept.values():
        found = [late_over_middle(gamma_of(run)) for run in runs]
        cells = [[values[layer] for values in found if layer in values] for layer in layers]
        told = [mean_and_deviation(values, ".4f") if values else "-" for values in cells]
        rows.append([*names(runs[0]), str(len(runs)), *told])
    return table([*HEADS, "n", *layers], rows)


def threshold_rows(kept):
    """A row a decay: at some thresholds the exit steps of its runs, and accuracy there."""
    rows = []
    for runs in kept.values():
        points, T = [[exit_at(run, threshold) for run in runs] for threshold in THRESHOLDS], runs[0]["num_steps"]
        told = [f"{exit_steps(row, T)}: {mean_and_deviation([point['acc'] for point in row])}" for row in points]
        rows.append([*names(runs[0]), *told])
    return table([*HEADS, *(f"at {threshold:g}" for threshold in THRESHOLDS)], rows)


def wide(point):
    """Whether the thresholds that give this exit differ by enough to tell it."""
    return point["threshold_up_to"] is None or point["threshold_up_to"] - point["threshold_above"] >= NARROW


def exit_rows(runs):
    """A row an exit step that some threshold yields: by seed the accuracy there, and between which thresholds."""
    sweeps = [{point["exit_step"]: point for point in run["exit"]["sweep"] if wide(point)} for run in runs]

    def told(point):
        up_to = f", up to {point['threshold_up_to']:#.3g}" if point["threshold_up_to"] is not None else ""
        return f"{point['acc']:.2f} (above {point['threshold_above']:#.3g}{up_to})"

    rows = [[exit_steps([{"exit_step": step}], runs[0]["num_steps"]),
             *(told(sweep[step]) if step in sweep else "-" for sweep in sweeps)]
            for step in sorted(set().union(*sweeps))]  # fmt: skip
    return table(["exit step", *(f"seed {run['seed']}" for run in runs)], rows)


# ---- The page ------------------------------------------------------------------------------------


def page(found):
    rows = {name: found[name] for name in ROWS if found.get(name)}
    if not rows:
        return Page("gamma.md", None)
    kept, commands = those_that_learnt(found, ROWS), {}
    for runs in rows.values():
        commands.setdefault(f"{setting(runs[0])}. {training(runs[0])}", runs[0]["command"])
    settings = [filled(f"{what} Command: `{command}`, with `--gamma_weight_decay` as `scripts/claims.sh` has it.")
                for what, command in commands.items()]  # fmt: skip
    lost = unlearnt(found, ROWS, lambda run: f"of exponent {exponent(run):.3g}")
    told = dict(short=in_short(kept), lost=lost, decays=decay_rows(rows), settings="\n".join(settings).rstrip())
    text = PAGE.format(rule=RULE, **told) + (results(kept) if kept else "")
    figures = {"gamma.png": lambda path: draw(kept, path), "gamma_exits.png": lambda path: draw_exits(kept, path)}
    return Page("gamma.md", text, figures if kept else {})


def results(kept):
    """The part of the page that is of nets that learnt."""
    counts = [untouched(values)[1] for run in kept.get("gamma_0", []) for values in gamma_of(run).values()]
    still = (
        f"- Late steps get little gradient: without decay, the last {spread(counts, 'd')} steps of a layer keep a mean "
        "gamma of exactly 1.\n"
    )
    exits = "".join(f"{label(runs[0]).capitalize()}:\n\n{exit_rows(runs)}\n" for runs in kept.values())
    told = dict(runs=run_rows(kept), layers=layer_rows(kept), thresholds=threshold_rows(kept), exits=exits)
    return RESULTS.format(rule=RULE, narrow=NARROW, still=still if counts else "", **told)


def label(run):
    power, length = names(run)
    return f"exponent {power}, {length} images"


def draw(kept, path):
    """Mean gammas of each layer of each decay's first run, and decay alone; below, each on a y axis of its own."""
    with drawn(path, 4.6) as figure:
        axes = figure.subplots(2, len(kept), squeeze=False, sharex="col")
        for column, runs in zip(axes.T, kept.values(), strict=True):
            gammas, alone = gamma_of(runs[0]), decayed(runs[0])
            for axis in column:
                per_layer(axis, gammas, list(gammas))
                axis.axhline(alone, color="black", linestyle="--", label="decay alone")
                time_axis(axis, len(next(iter(gammas.values()))))
                ylabel(axis, "mean gamma")
            column[0].set(xlabel="", ylim=(min(0, column[0].get_ylim()[0]), column[0].get_ylim()[1]))
            title = label(runs[0]).replace(", ", f", seed {runs[0]['seed']}\n", 1)
            column[0].set_title(f"{title}\ndecay alone: {alone:.2g}")
        low, high = zip(*(axis.get_ylim() for axis in axes[0]), strict=True)
        for axis in axes[0]:
            axis.set_ylim(min(low), max(high))
        legend(axes, "right upper" if len(kept) < 4 else "upper center")


def draw_exits(kept, path):
    """Accuracy against steps, a panel a seed, with marks at exits and a line at that of the rule."""
    seeds, palette = sorted({run["seed"] for runs in kept.values() for run in runs}), colours(len(kept))
    with drawn(path, 2.7) as figure:
        axes = figure.subplots(1, len(seeds), squeeze=False, sharey=True)
        for axis, seed in zip(axes[0], seeds, strict=True):
            for k, run in [(k, run) for k, runs in enumerate(kept.values()) for run in runs if run["seed"] == seed]:
                curve = run["exit"]["acc_by_steps"]
                marks = [point["exit_step"] - 1 for point in run["exit"]["sweep"]
                         if wide(point) and point["exit_step"] < len(curve)]  # fmt: skip
                line(axis, range(1, len(curve) + 1), curve, k, palette, markevery=marks, label=label(run))
                time_axis(axis, len(curve), "steps that are run")
                if (step := exit_at(run, RULE)["exit_step"]) < len(curve):
                    axis.axvline(step, color=palette[k], linewidth=0.8, linestyle=":", label=f"exit at {RULE:g}")
            axis.set_title(f"seed {seed}")
            ylabel(axis, "accuracy, %")
        legend(axes, "upper center")
