"""The page results/claims/gamma.md: what claim_gammas.py makes of runs, with its tables and figures."""

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
    thirds,
    touched,
    untouched,
)
from claim_parts import (
    PUBLISHED,
    Page,
    drawn,
    setting,
    spread,
    steps_of,
    those_that_learnt,
    training,
    unlearnt,
)
from make_tables import filled, mean_and_deviation, table

from figures import colours, legend, line, per_layer, time_axis, ylabel
from utill import learning_rate

THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
PAPERS_EXIT = "20 of 25"  # fig. 4, at RULE
NEAR = 2.0  # a gamma is nowhere near the rule's threshold above so many times it
AT = 1.1  # gammas lie at what decay alone gives up to so many times it
LITTLE = 1.0  # points of accuracy
NARROW = 0.01  # an exit of thresholds that differ by less has no mark


def length(run):
    return f"{run['config']['num_epochs']} x {run['train_images']:,}"


def columns(rows):
    """Heads of columns that tell rows apart, and the function of a run that gives the cells below."""
    if len({length(runs[0]) for runs in rows.values()}) > 1:
        return ["exponent", "epochs x images"], lambda run: [f"{exponent(run):.3g}", length(run)]
    return ["exponent"], lambda run: [f"{exponent(run):.3g}"]


def steps_in_all(run):
    return run["config"]["num_epochs"] * steps_of(run)


def mean_decay(config):
    """Mean over epochs of learning rate times the weight decay on gammas, over 1 - momentum."""
    decay, epochs = config["gamma_weight_decay"], range(config["num_epochs"])
    decay = config["weight_decay"] if decay is None else decay
    schedule = config["lr_schedule"], config.get("warmup_epochs", 0.0)
    rates = [learning_rate(config["lr"], epoch, len(epochs), *schedule) for epoch in epochs]
    return statistics.mean(rates) * decay / (1 - config["momentum"])


def means(run):
    """{(layer, step from 1): mean gamma}"""
    gammas = gamma_of(run).items()
    return {(layer, step): value for layer, values in gammas for step, value in enumerate(values, start=1)}


# ---- In short ------------------------------------------------------------------------------------


def accuracies(runs):
    return " and ".join(f"{run['test_acc']:.2f}" for run in runs) + " %"


def exits_of(runs):
    """'exits at 19, 19 of 25'"""
    T, points = runs[0]["num_steps"], [exit_at(run, RULE) for run in runs]
    early = any(point["exit_step"] < T for point in points)
    return f"exits at {exit_steps(points, T)} of {T}" if early else "no exit before T"


def stayed(runs):
    """What gammas without weight decay did, and what the rule makes of it."""
    every = [value for run in runs for value in means(run).values()]
    far = math.ceil(round(1000 * max(abs(value - 1) for value in every), 6)) / 1000
    if min(every) > NEAR * RULE:
        return f"stayed within {far:g} of 1 and never came near {RULE:g}, so that the rule cannot exit before T"
    return f"moved by up to {far:g} from 1, down to {min(every):.3g}; the threshold {RULE:g} gives {exits_of(runs)}"


def without_decay(runs, longer):
    """Sentences on the row without decay; longer: on its longer row, if it is there."""
    short = "short " if runs[0]["config"]["num_epochs"] < PUBLISHED["num_epochs"] else ""
    text = f"in these {short}runs ({steps_in_all(runs[0]):,} steps of training, {accuracies(runs)} accuracy) gammas "
    text += f"without weight decay {stayed(runs)}."
    if longer:
        more = f"In longer training ({steps_in_all(longer[0]):,} steps, {accuracies(longer)} accuracy)"
        return f"{text} {more} they {stayed(longer)}."
    return f"{text} Whether they would fall in longer training is not known." if short else text


def above_decay(runs):
    """(mean gamma of the last step over decay alone, in the mean of layers; largest such number of the middle third)"""
    last, middle = [], []
    for run in runs:
        for values in gamma_of(run).values():
            last.append(values[-1] / decayed(run))
            middle += [value / decayed(run) for value in thirds(touched(values).values())[0]]
    return statistics.mean(last), max(middle, default=math.nan)


def with_decay(runs):
    """Sentences on the row with the decay of the published command's exponent."""
    last, middle = above_decay(runs)
    times = mean_decay(runs[0]["config"]) / mean_decay(PUBLISHED)
    text = f"The weight decay of exponent {exponent(runs[0]):.3g} gives a gamma without gradient the same total decay"
    text += f" as the published command's over its whole training, here with {times:.3g} times its decay per step. With"
    text += f" it gammas of the last time-step lie {'at' if last <= AT else 'above'} what decay alone gives"
    text += f" ({last:.2f} times that, in the mean of layers)"
    if not math.isnan(middle):
        text += f", those of the middle third of the steps up to {middle:.1f} times as high"
    return f"{text}. The threshold {RULE:g} gives {exits_of(runs)}."


def what_decay_does(without, decaying):
    """What the two rows tell together of the late fall, as far as it can be told."""
    text = "Decay alone makes all steps alike, so that the shape needs the gradient too."
    low = min(value for run in without for value in means(run).values())
    last, alone = above_decay(decaying)[0], max(map(decayed, decaying))
    if last <= AT and alone < RULE < low / NEAR:
        crossed = all(exit_at(run, RULE)["exit_step"] < run["num_steps"] for run in decaying)
        crossing = f", and with it the crossing of {RULE:g}," if crossed else ""
        return f"{text} The low level of late steps{crossing} comes from decay."
    return text + " Where the low level of late steps comes from cannot be told."


def stop(without, decaying):
    """[(points that stopping at the decaying net's exit costs it, points that it costs the other)] by seed."""
    others, found = {run["seed"]: run for run in without}, []
    for run in decaying:
        step = exit_at(run, RULE)["exit_step"]
        if step < run["num_steps"] and run["seed"] in others:
            pair = run, others[run["seed"]]
            found.append([net["exit"]["acc_by_steps"][-1] - net["exit"]["acc_by_steps"][step - 1] for net in pair])
    return found


def control(without, decaying):
    """Sentences on the same exit in nets without decay; "" where there is no exit to compare."""
    if not (costs := stop(without, decaying)):
        return ""
    ours, theirs = (statistics.mean(cost) for cost in zip(*costs, strict=True))
    far = min(value for run in without for value in means(run).values()) > NEAR * RULE
    text = f"Stopping at that same step costs {ours:.2f} points of accuracy with decay and {theirs:.2f} without"
    text += f", where no gamma is near {RULE:g}" if far else ""
    if ours <= LITTLE and theirs <= LITTLE:
        needed = f", and a gamma below {RULE:g} is not needed for that" if far else ""
        return f"{text}: late steps add little in both nets{needed}."
    if ours <= LITTLE or theirs <= LITTLE:
        return f"{text}: late steps add little {'with decay' if ours <= LITTLE else 'without decay'} alone."
    return f"{text}: late steps add more than a little in both nets."


def in_short(kept):
    """The answer to the title, as far as the rows that are there tell it; "" of none."""
    without, decaying = kept.get("gamma_0"), kept.get("gamma_3.05")
    told = [without_decay(without, kept.get("published_gamma_0"))] if without else []
    told += [with_decay(decaying)] if decaying else []
    if without and decaying:
        told += [what_decay_does(without, decaying), control(without, decaying)]
    return filled(f"In short: {' '.join(filter(None, told))}") if told else ""


# ---- Tables --------------------------------------------------------------------------------------


def decay_rows(found):
    """A row a decay: how large it is, and what it makes of a gamma without gradient."""
    heads, cells = columns(found)
    rows = []
    for run in (runs[0] for runs in found.values()):
        decay, power = run["config"]["gamma_weight_decay"], exponent(run)
        told = [f"{decay:.3g}", f"{power / steps_in_all(run):.3g}", f"{math.exp(-power):.3g}", f"{decayed(run):.3g}"]
        rows.append([*cells(run), *told])
    return table([*heads, "gamma_weight_decay", "decay per step", "exp(-exponent)", "decay alone"], rows)


def run_rows(kept):
    """A row a run: what is left of gammas, late / middle, accuracy."""
    heads, cells = columns(kept)
    rows = []
    for run in itertools.chain(*kept.values()):
        gammas, point = gamma_of(run), {"exit_step": run["exit"]["exit_step"]}
        by_layer = [statistics.mean(values) for values in gammas.values()]
        every = [value / decayed(run) for value in means(run).values()]
        told = [spread(by_layer), spread(every, ".3g"), spread(late_over_middle(gammas).values(), ".4f")]
        told += [f"{run['test_acc']:.2f}", f"{exit_steps([point], run['num_steps'])}: {run['exit']['acc_exit']:.2f}"]
        rows.append([*cells(run), str(run["seed"]), *told])
    heads += ["seed", "mean gamma, layers", "gamma / decay alone, layers and steps", "late / middle, layers"]
    return table([*heads, "accuracy, %", f"exit at {RULE:g}: %"], rows)


def by_layer(runs):
    """{layer: late / middle of each run}"""
    found = [late_over_middle(gamma_of(run)) for run in runs]
    return {layer: [values[layer] for values in found if layer in values] for layer in gamma_of(runs[0])}


def layer_rows(kept):
    """A row a decay: late / middle of each layer, over seeds."""
    heads, cells = columns(kept)
    rows = []
    for runs in kept.values():
        told = [mean_and_deviation(values, ".4f") if values else "-" for values in by_layer(runs).values()]
        rows.append([*cells(runs[0]), str(len(runs)), *told])
    return table([*heads, "n", *gamma_of(next(iter(kept.values()))[0])], rows)


def directions(runs):
    """How many layers fall without decay and how many rise, by how much at most; "" of too few steps."""
    ratios, told = {layer: statistics.mean(values) for layer, values in by_layer(runs).items() if values}, []
    if not ratios:
        return ""
    for verb, sign in (("fall", -1), ("rise", 1)):
        moved = {layer: sign * (ratio - 1) for layer, ratio in ratios.items() if sign * (ratio - 1) > 0}
        most = max(moved, key=moved.get, default=None)
        told.append(f"{len(moved)} {verb}" + (f", by {moved[most]:.4f} at most ({most})" if moved else ""))
    text = f"Without decay, of {len(ratios)} layers {told[0]}, and {told[1]} (late / middle, mean of seeds)."
    return filled(text)


def threshold_rows(kept):
    """A row a decay: at some thresholds the exit steps of its runs, and accuracy there."""
    heads, cells = columns(kept)
    rows = []
    for runs in kept.values():
        points, T = [[exit_at(run, threshold) for run in runs] for threshold in THRESHOLDS], runs[0]["num_steps"]
        told = [f"{exit_steps(row, T)}: {mean_and_deviation([point['acc'] for point in row])}" for row in points]
        rows.append([*cells(runs[0]), *told])
    return table([*heads, *(f"at {threshold:g}" for threshold in THRESHOLDS)], rows)


def exit_rows(runs):
    """A row an exit step that some threshold yields: by seed the accuracy there, and between which thresholds."""
    sweeps = [{point["exit_step"]: point for point in run["exit"]["sweep"]} for run in runs]

    def told(point):
        ends = point["threshold_above"], point["threshold_up_to"]
        low, high = (f"{x:#.3g}" if x is not None else None for x in ends)
        between = f"about {low}" if low == high else f"above {low}, up to {high}" if high else f"above {low}"
        return f"{point['acc']:.2f} ({between})"

    rows = [[exit_steps([{"exit_step": step}], runs[0]["num_steps"]),
             *(told(sweep[step]) if step in sweep else "-" for sweep in sweeps)]
            for step in sorted(set().union(*sweeps))]  # fmt: skip
    return table(["exit step", *(f"seed {run['seed']}" for run in runs)], rows)


# ---- What the numbers can and cannot show --------------------------------------------------------


def which_thirds(kept):
    """Which steps the middle and the last third are, of the layers with the most steps that count and the fewest."""
    steps = [[*touched(values)] for runs in kept.values() for run in runs for values in gamma_of(run).values()]
    steps, told = sorted((row for row in steps if len(row) > 2), key=len), []
    for row in {len(row): row for row in (steps[-1:] + steps[:1])}.values():
        middle, late = thirds(row)
        told.append(f"of {len(row)} steps, {middle[0]} to {middle[-1]} and {late[0]} to {late[-1]}")
    return f"The middle and the last third are, {', or '.join(told)}." if told else ""


def pushed_down(kept):
    """What moves without decay; "" where nothing goes below 1."""
    if not (runs := kept.get("gamma_0")):
        return ""
    value, (layer, step), seed = min((value, at, run["seed"]) for run in runs for at, value in means(run).items())
    if value >= 1:
        return ""
    text = (
        f"- Without decay, too, the gradient pushes gammas down, to {value:.3f} at the lowest ({layer}, step {step}, "
    )
    text += f"seed {seed})."
    if decaying := kept.get("gamma_3.05"):
        over = statistics.mean(means(run)[layer, step] / decayed(run) for run in decaying)
        if over > 1:
            text += f" At exponent 3.05 it holds the same gamma up, at {over:.3g} times what decay alone gives. The"
            text += " gradient's sign is thus not the same at all levels of gamma, and the run without decay does not"
            text += ' isolate "the learnt part" of a run with decay.'
    return filled(text, subsequent_indent="  ")


def unmoved(kept, others):
    """How many last steps do not move at all without decay; "" where all do. others: whether order.md is there."""
    counts = [untouched(values)[1] for run in kept.get("gamma_0", []) for values in gamma_of(run).values()]
    if not any(counts):
        return ""
    text = "- Late steps get so little gradient that some do not move at all: without decay, the last"
    text += f" {spread(counts, 'd')} steps of a layer keep a mean gamma of exactly 1"
    text += ", as [order.md](order.md) tells by layer." if others else "."
    return filled(text, subsequent_indent="  ")


def short_training(kept):
    """What runs shorter than the published command cannot show; "" where none is."""
    runs = {name: row[0] for name, row in kept.items() if row[0]["config"]["num_epochs"] < PUBLISHED["num_epochs"]}
    if not runs:
        return ""
    counts = sorted({steps_in_all(run) for run in runs.values()})
    text = (
        f"- Training is short: {' or '.join(f'{count:,}' for count in counts)} steps. Without decay gammas had little"
    )
    text += " time to move"
    if "published_gamma_0" not in kept:
        text += f", and what {PUBLISHED['num_epochs']} epochs do without decay is not seen"
    return filled(f"{text}.", subsequent_indent="  ")


def deviations(kept):
    """What "±" is; "" where every row has one seed."""
    counts = sorted({len(runs) for runs in kept.values()} - {1})
    n = " and ".join(map(str, counts))
    return f'"±": standard deviation of the seeds, no interval (n = {n}).' if counts else ""


def page(found):
    rows = {name: found[name] for name in ROWS if found.get(name)}
    if not rows:
        return Page("gamma.md", None)
    kept = those_that_learnt(found, ROWS)
    commands = {}
    for runs in rows.values():
        commands.setdefault(f"{setting(runs[0])}. {training(runs[0])}", runs[0]["command"])
    settings = [filled(f"{what} Command: `{command}`, with `--gamma_weight_decay` as `scripts/claims.sh` has it.")
                for what, command in commands.items()]  # fmt: skip
    lost = unlearnt(found, ROWS, lambda run: f"of exponent {exponent(run):.3g}")
    text = f"""# Is the late fall of gamma learnt, or is it weight decay?

{in_short(kept)}{lost}
The early exit is read off gammas that fall late (paper, 3.4). Weight decay shrinks every gamma that has no gradient
alike. The exponent is the sum of learning rates times decay over 1 - momentum: 0 below is no decay, 3.05 that of the
published command, 18.3 that of the paper's text. The same exponent is the same total decay; decay per step is the
exponent over the steps of training. "Decay alone" follows SGD with momentum step by step on a gamma without gradient,
and is the same at each time-step. For little decay per step it is about exp(-exponent), for much it is lower.

{decay_rows(rows)}
{chr(10).join(settings)}"""
    if kept:
        text += results(kept, any(found.get(name) for name in ("fire_first", "gamma_3.05", "fire_first_3.05")))
    figures = {"gamma.png": lambda path: draw(kept, path), "gamma_exits.png": lambda path: draw_exits(kept, path)}
    return Page("gamma.md", text, figures if kept else {})


def results(kept, others):
    """The part of the page that is of nets that learnt. others: whether order.md is there."""
    _, cells = columns(kept)
    exits = [f"{label(cells, runs[0]).capitalize()}:\n\n{exit_rows(runs)}\n" for runs in kept.values()]
    told = "late / middle: mean gamma of the last third of the steps over that of the middle third; steps whose mean "
    told += "gamma is exactly 1, as at the start of training, do not count."
    told = [told, which_thirds(kept), "It is 1 where decay is all there is.", deviations(kept)]
    above = filled(" ".join(filter(None, told)))
    directed = directions(kept["gamma_0"]) if "gamma_0" in kept else ""
    return f"""
# Gammas

{run_rows(kept)}
{above}
{layer_rows(kept)}
{directed}
![Mean gamma of each layer against time-steps, and decay alone](gamma.png)

Above: all on one axis; below: each on its own.

What these numbers can and cannot show:

- Without decay only the gradient of the loss moves a gamma: late / middle below 1 is then a fall that was learnt. It
  may still be too small for an exit, and a mean over layers can hide layers that rise; each is above.
- Means over channels hide channels: one channel may fall while another rises. early_exit.json holds means alone, and
  the rule of the exit knows no more.
{pushed_down(kept)}{unmoved(kept, others)}- A gamma above "decay alone" is held up by the gradient of the loss; how much
  of a fall each of the two makes cannot be told apart within one run, as each changes the other.
- A factor common to all gammas of a layer does not change late / middle, but does change which threshold exits where:
  an exit at {RULE:g} that decay brings about is no sign that late steps matter less.
{short_training(kept)}
# Exits

The exit is the smallest t such that at every step after t the mean gamma of every layer is below the threshold; t steps
are run. "none": there is no such t below T, and all T steps are run. The paper's exit (fig. 4) is {PAPERS_EXIT} at
{RULE:g}; how it counts steps is not said there.

Exit steps of the seeds, in order, at some thresholds, and mean accuracy there, %.

{threshold_rows(kept)}
Every exit that some threshold gives: accuracy, %, and the thresholds to 3 digits, "about" one where both look the same.

{"".join(exits)}![Accuracy after so many steps, by exponent, with the exits](gamma_exits.png)

Lines: accuracy after so many steps, whatever gammas say, so that stopping at a step can be compared. Marks: exits, but
for those whose thresholds differ by less than {NARROW:g}.
"""


def label(cells, run):
    return "exponent " + ", ".join(cells(run))


# ---- Figures -------------------------------------------------------------------------------------


def draw(kept, path):
    """Mean gammas of each layer of each decay's first run, and decay alone; below, each on a y axis of its own."""
    _, cells = columns(kept)
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
            power, *more = cells(runs[0])
            title = "".join(f"\n{size} images" for size in more)
            column[0].set_title(f"exponent {power}, seed {runs[0]['seed']}{title}\ndecay alone: {alone:.2g}")
        low, high = zip(*(axis.get_ylim() for axis in axes[0]), strict=True)
        for axis in axes[0]:
            axis.set_ylim(min(low), max(high))
        legend(axes, "right upper" if len(kept) < 4 else "upper center")


def wide(point):
    """Whether the thresholds that give this exit differ by enough for a mark."""
    return point["threshold_up_to"] is None or point["threshold_up_to"] - point["threshold_above"] >= NARROW


def draw_exits(kept, path):
    """Accuracy against steps, a panel a seed, with marks at exits and a line at that of the rule."""
    seeds, palette = sorted({run["seed"] for runs in kept.values() for run in runs}), colours(len(kept))
    _, cells = columns(kept)
    with drawn(path, 2.7) as figure:
        axes = figure.subplots(1, len(seeds), squeeze=False, sharey=True)
        for axis, seed in zip(axes[0], seeds, strict=True):
            for k, run in [(k, run) for k, runs in enumerate(kept.values()) for run in runs if run["seed"] == seed]:
                curve = run["exit"]["acc_by_steps"]
                marks = [
                    point["exit_step"] - 1
                    for point in run["exit"]["sweep"]
                    if wide(point) and point["exit_step"] < len(curve)
                ]
                line(axis, range(1, len(curve) + 1), curve, k, palette, markevery=marks, label=label(cells, run))
                time_axis(axis, len(curve), "steps that are run")
                if (step := exit_at(run, RULE)["exit_step"]) < len(curve):
                    axis.axvline(step, color=palette[k], linewidth=0.8, linestyle=":", label=f"exit at {RULE:g}")
            axis.set_title(f"seed {seed}")
            ylabel(axis, "accuracy, %")
        legend(axes, "upper center")
