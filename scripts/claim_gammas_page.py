"""The page results/claims/gamma.md: what claim_gammas.py makes of runs, with its tables and figures."""

import itertools
import statistics
import textwrap

from claim_gammas import (
    NETS,
    PUBLISHED,
    RATIOS,
    ROWS,
    RULE,
    decayed,
    exit_at,
    exit_steps,
    exponent,
    gamma_of,
    late_over_middle,
    over_layers,
    steps_of,
)
from claim_parts import Page, did_not_learn, drawn, learnt, setting, spread
from make_tables import mean_and_deviation, table

from figures import colours, legend, line, per_layer, time_axis, ylabel

THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
LEVEL = 0.02  # a late / middle that is no further from 1 is no fall and no rise
HEADS = ["exponent", "epochs x images"]


def trained_on(run):
    """Exponent of decay, and epochs x images: the cells below HEADS."""
    return [f"{exponent(run):.3g}", f"{run['config']['num_epochs']} x {run['train_images']:,}"]


def label(run):
    return "exponent {}, {}".format(*trained_on(run))


def run_rows(kept):
    """A row a run: what is left of gammas, the two ratios, accuracy."""
    rows = []
    for run in itertools.chain(*kept.values()):
        gammas, alone = gamma_of(run), decayed(run)
        means = [statistics.mean(values) for values in gammas.values()]
        every = [value / alone for value in itertools.chain(*gammas.values())]
        told = [f"{alone:.3g}", spread(means), spread(every, ".3g")]
        told += [spread(ratio(gammas).values()) for ratio in RATIOS.values()]
        told += [f"{run['test_acc']:.2f}", f"{run['exit']['exit_step']}: {run['exit']['acc_exit']:.2f}"]
        rows.append([*trained_on(run), str(run["seed"]), *told])
    heads = ["seed", "decay alone", "mean gamma, layers", "gamma / decay alone, layers and steps"]
    return table([*HEADS, *heads, *(f"{ratio}, layers" for ratio in RATIOS), "accuracy, %", "exit at 0.1: %"], rows)


def layer_rows(kept):
    """A row a ratio and decay: the ratio of each layer, over seeds."""
    layers, rows = list(gamma_of(next(iter(kept.values()))[0])), []
    for (head, ratio), runs in itertools.product(RATIOS.items(), kept.values()):
        found = [ratio(gamma_of(run)) for run in runs]
        cells = [[values[layer] for values in found if layer in values] for layer in layers]
        told = [mean_and_deviation(cell, ".3f") if cell else "-" for cell in cells]
        rows.append([head, *trained_on(runs[0]), str(len(runs)), *told])
    return table(["ratio", *HEADS, "n", *layers], rows)


def threshold_rows(kept):
    """A row a decay: at some thresholds the exit steps of its runs, and accuracy there."""
    rows = []
    for runs in kept.values():
        points = [[exit_at(run, threshold) for run in runs] for threshold in THRESHOLDS]
        told = [f"{exit_steps(row)}: {mean_and_deviation([point['acc'] for point in row])}" for row in points]
        rows.append([*trained_on(runs[0]), *told])
    return table([*HEADS, *(f"at {threshold:g}" for threshold in THRESHOLDS)], rows)


def exit_rows(runs):
    """A row an exit step that some threshold yields: by seed the accuracy there, and between which thresholds."""
    sweeps = [{point["exit_step"]: point for point in run["exit"]["sweep"]} for run in runs]

    def told(point):
        ends = point["threshold_above"], point["threshold_up_to"]
        low, high = (f"{x:#.3g}" if x is not None else None for x in ends)
        between = f"about {low}" if low == high else f"above {low}, up to {high}" if high else f"above {low}"
        return f"{point['acc']:.2f} ({between})"

    rows = [[str(step), *(told(sweep[step]) if step in sweep else "-" for sweep in sweeps)]
            for step in sorted(set().union(*sweeps))]  # fmt: skip
    return table(["exit step", *(f"seed {run['seed']}" for run in runs)], rows)


def course(ratio):
    """What gammas of this late / middle do towards the last steps."""
    return "stay level" if abs(ratio - 1) <= LEVEL else "fall" if ratio < 1 else "rise"


def when(steps, T):
    """Whether these exit steps come before T."""
    early = sum(step < T for step in steps)
    return "before T" if early == len(steps) else "in no net before T" if not early else "not in all nets before T"


def filled(text, **more):
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False, **more) + "\n"


def in_short(found):
    """A sentence on the row without decay and one on that with the published decay; "" where neither learnt."""
    told = []
    for name in ("gamma_0", "gamma_3.05"):
        if not (runs := [run for run in found.get(name, []) if learnt(run)]):
            continue
        text, T, points = f"{NETS[name]},", runs[0]["num_steps"], [exit_at(run, RULE) for run in runs]
        if ratios := [*over_layers({name: runs}, name, late_over_middle).values()]:
            ratio = statistics.mean(ratios)
            text = text.replace("on gammas", "on them")
            text += f" gammas {course(ratio)} towards the last steps (late / middle {ratio:.3f});"
        steps, last = [point["exit_step"] for point in points], statistics.mean(run["test_acc"] for run in runs)
        text += f" the exit at a threshold of {RULE:g} comes at steps {exit_steps(points)} of {T}, {when(steps, T)}"
        text += f", with an accuracy of {statistics.mean(point['acc'] for point in points):.2f} %"
        told.append(text + (f" there and {last:.2f} % after all steps" if min(steps) < T else ""))
    return filled(f"In short: {'. '.join(text[0].upper() + text[1:] for text in told)}.") if told else ""


def unlearnt(kept):
    """A paragraph on each row with nets that did not learn."""
    bad = {name: [run for run in runs if not learnt(run)] for name, runs in kept.items()}
    told = [f"Of exponent {exponent(runs[0]):.3g}, {len(runs)} of {len(kept[name])} nets {did_not_learn(runs)}. An "
            "accuracy below twice chance counts as not learnt: gammas and exits of such nets show nothing."
            for name, runs in bad.items() if runs]  # fmt: skip
    return "".join(f"\n{filled(text)}" for text in told)


def short_training(kept):
    """What runs shorter than the published command cannot show; "" where none is."""
    runs = {name: row[0] for name, row in kept.items() if row[0]["config"]["num_epochs"] < PUBLISHED["num_epochs"]}
    if not runs:
        return ""
    counts = sorted({run["config"]["num_epochs"] * steps_of(run) for run in runs.values()})
    text = f"- Training is short: {' or '.join(f'{count:,}' for count in counts)} steps."
    if run := runs.get("gamma_3.05"):
        times = run["config"]["gamma_weight_decay"] / PUBLISHED["weight_decay"]
        text += " For as large an exponent as the published command's in so few steps, the weight decay on gammas is"
        text += f" {times:.3g} times the command's."
    text += " Without decay gammas had little time to move"
    if "published_gamma_0" not in kept:
        text += f", and what {PUBLISHED['num_epochs']} epochs do without decay is not seen"
    return filled(f"{text}.", subsequent_indent="  ")


def page(found):
    kept = {name: found[name] for name in ROWS if found.get(name)}
    if not kept:
        return Page("gamma.md", None)
    trained = {name: runs for name, runs in kept.items() if any(map(learnt, runs))}
    exits = [f"{label(runs[0]).capitalize()}:\n\n{exit_rows(runs)}\n" for runs in trained.values()]
    commands = {}
    for runs in kept.values():
        commands.setdefault(setting(runs[0]), runs[0]["command"])
    settings = [f"{what}. Command: `{command}`, with `--gamma_weight_decay` as `scripts/claims.sh` has it.\n"
                for what, command in commands.items()]  # fmt: skip
    text = f"""# Is the late fall of gamma learnt, or is it weight decay?

{in_short(found)}{unlearnt(kept)}
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
{short_training(kept)}
# Exits

Exit steps of the seeds, in order, at some thresholds, and mean accuracy there, %.

{threshold_rows(kept)}
Every exit that some threshold gives: accuracy, %, and the thresholds to 3 digits, "about" one where both look the same.

{"".join(exits)}![Accuracy at each exit, by exponent](gamma_exits.png)

Lines: accuracy after so many steps, whatever gammas say; marks: the exits that some threshold gives.

{chr(10).join(settings)}"""
    figures = {"gamma.png": lambda path: draw(kept, path), "gamma_exits.png": lambda path: draw_exits(kept, path)}
    return Page("gamma.md", text, figures)


def draw(kept, path):
    """Mean gammas of each layer of each decay's first run, and decay alone."""
    with drawn(path, 2.9 if len(kept) < 4 else 3.4) as figure:
        axes = figure.subplots(1, len(kept), squeeze=False, sharey=True)
        for axis, runs in zip(axes[0], kept.values(), strict=True):
            gammas, alone = gamma_of(runs[0]), decayed(runs[0])
            per_layer(axis, gammas, list(gammas))
            axis.axhline(alone, color="black", linestyle="--", label="decay alone")
            power, length = trained_on(runs[0])
            axis.set_title(f"exponent {power}, seed {runs[0]['seed']}\n{length} images\ndecay alone: {alone:.2g}")
            time_axis(axis, len(next(iter(gammas.values()))))
            ylabel(axis, "mean gamma")
        axes[0][0].set_ylim(min(0, axes[0][0].get_ylim()[0]))
        legend(axes, "right upper" if len(kept) < 4 else "upper center")


def draw_exits(kept, path):
    """Accuracy against exit step, a panel a seed."""
    seeds = sorted({run["seed"] for runs in kept.values() for run in runs})
    with drawn(path, 2.7) as figure:
        axes = figure.subplots(1, len(seeds), squeeze=False, sharey=True)
        for axis, seed in zip(axes[0], seeds, strict=True):
            for k, runs in enumerate(kept.values()):
                for run in [run for run in runs if run["seed"] == seed]:
                    curve, palette = run["exit"]["acc_by_steps"], colours(len(kept))
                    axis.plot(range(1, len(curve) + 1), curve, color=palette[k], linewidth=0.8)
                    at = {point["exit_step"]: point["acc"] for point in run["exit"]["sweep"]}
                    line(axis, [*at], [*at.values()], k, palette, linestyle="", markevery=1, label=label(run))
                    time_axis(axis, len(curve), "exit step")
            axis.set_title(f"seed {seed}")
            ylabel(axis, "accuracy, %")
        legend(axes, "upper center")
