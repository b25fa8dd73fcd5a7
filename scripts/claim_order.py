"""Do deeper layers peak later, and because layers fire first? From nets of both orders, at two weight decays."""

import math
import statistics

from claim_gammas import exponent, gamma_of, touched, untouched
from claim_parts import (
    OPEN,
    Page,
    drawn,
    judged,
    mean_and_half,
    setting,
    those_that_learnt,
    training,
    unlearnt,
    verdict,
)
from make_tables import filled, interval, paired, table

from figures import legend, per_layer, shades, time_axis, ylabel

ORDERS = {  # rows of one exponent side by side
    "gamma_0": "integrate first",
    "fire_first": "fire first",
    "gamma_3.05": "integrate first",
    "fire_first_3.05": "fire first",
}
FLAT = 1.05  # a row whose peaks stand no higher over the mean of their layer has flat lines


def peaks(run):
    """{layer: step of its largest mean gamma, from 1}, of the layers that training reached."""
    steps = {layer: touched(values) for layer, values in gamma_of(run).items()}
    return {layer: max(found, key=found.get) for layer, found in steps.items() if found}


def height(run):
    """Peak over the mean of its layer's steps, mean over the layers that training reached; nan of none."""
    steps = [touched(values).values() for values in gamma_of(run).values()]
    ratios = [max(values) / statistics.mean(values) for values in steps if values]
    return statistics.mean(ratios) if ratios else math.nan


def slope(steps):
    """Least-squares slope of {depth: step}, of two and more."""
    return statistics.linear_regression([*steps], [*steps.values()]).slope


def halves(steps):
    """First and second half of {depth: step}; of an odd number both have the one in the middle."""
    pairs, half = [*steps.items()], (len(steps) + 1) // 2
    return dict(pairs[:half]), dict(pairs[len(pairs) - half :])


def by_depth(run):
    """`peaks`, by the depth of the layer, from 0."""
    depths = {layer: i for i, layer in enumerate(gamma_of(run))}
    return {depths[layer]: step for layer, step in peaks(run).items()}


def delays(runs):
    """{seed: by how many steps the peak comes later from one layer to the next}"""
    return {run["seed"]: slope(by_depth(run)) for run in runs if len(by_depth(run)) > 1}


def tell_delay(kept):
    """Peaks come later with depth if their slope is above 0."""
    if not (found := [*delays(kept["gamma_3.05"]).values()]):
        return None
    mean, half = mean_and_half(found)
    seen = f"[steps that the peak comes later per layer](claims/order.md), integrating first: {interval(mean, half)}"
    return seen, len(found), OPEN if any(map(flat, kept.values())) else verdict(mean, half)


def tell_order(kept):
    """Firing first makes the slope larger by more than the one step a layer that its answers come later."""
    if not (pair := paired(delays(kept["fire_first_3.05"]), delays(kept["gamma_3.05"]))):
        return None
    mean, half, n = pair
    seen = "[steps that the peak comes later per layer](claims/order.md), firing first less integrating first: "
    return seen + interval(mean, half), n, OPEN if any(map(flat, kept.values())) else verdict(mean - 1, half)


def claims(found):
    """That peaks come later with depth though layers integrate first, and that firing first delays them."""
    nets = {name: f"that {ORDERS[name]}, exponent 3.05," for name in ("gamma_3.05", "fire_first_3.05")}
    text = "deeper layers' gammas peak later, without firing first (nets that integrate first, exponent 3.05)"
    told = judged(found, {"gamma_3.05": nets["gamma_3.05"]}, "order.md", "figs. 1C, 6", text, tell_delay)
    text = "firing first delays the peaks by more than the one step a layer that it has by construction"
    return told + judged(found, nets, "order.md", "figs. 1C, 6", text, tell_order)


# ---- The page ------------------------------------------------------------------------------------

PAGE = """# Do deeper layers peak later, and because layers fire first?

{short}{lost}"""
RESULTS = """
Where a net that integrates first has a number above 0, peaks come later with depth and need no firing first for it. The
reason may be that small gammas make the first spikes of deeper layers late; this was not measured. Of a net that fires
first, 1 step per layer is there by construction.

Step of the largest mean gamma, by layer; then by how many steps it comes later from one layer to the next: the
least-squares slope over all layers, over the first half of them and over the second. Integrating first has no built-in
delay; firing first, a layer answers one step after its input. Steps that nothing moves keep a gamma of 1 and do not
count. Exponent: of weight decay on gammas, as in [gamma.md](gamma.md).

{peaks}
peak / mean: peak over the mean of its layer, mean over layers; about 1.00 is a flat line. Where it is below {flat:g} in
the mean of seeds, peaks are artefacts, as of the last step that moved at all, and have no slope here.

![Mean gamma of each layer against time-steps, by order and exponent, with its peak](order.png)

First / last steps whose gammas kept a mean of exactly 1. There are three kinds of reason: no gradient at all (`None`),
as what the last steps of a net that fires first let through can no longer reach the output; a gradient of exactly 0, as
nothing has come yet or no membrane is near the threshold; or updates below what float32 can tell near 1. Which of the
last two it is, these numbers do not tell. Weight decay moves gammas of gradient 0 too, not those without any. In
brackets, of nets that fire first: how many last steps have no gradient by construction, as many as there are layers
from there to the output.

{at_1}
What this can show: whether peaks move with depth, and, at one exponent, with the order. What it cannot: firing first
moves the steps that training can reach by one a layer, so that a layer whose first such step is its peak comes one step
later by construction; without decay, a step of little gradient stays near 1 and may be the peak.

{setting}"""


def flat(runs):
    """Whether the lines of a row's runs are flat."""
    return not statistics.mean(map(height, runs)) > FLAT


def in_short(kept):
    """By how many steps peaks come later per layer in each row that has peaks, and how much the order adds."""
    told = [f"{ORDERS[name]} at exponent {exponent(runs[0]):.3g}: {interval(*mean_and_half([*delays(runs).values()]))} "
            f"(n = {len(runs)})" for name, runs in kept.items() if delays(runs) and not flat(runs)]  # fmt: skip
    if pair := paired(*(delays(kept.get(name, [])) for name in ("fire_first_3.05", "gamma_3.05"))):
        mean, half, n = pair
        told.append(f"firing first less integrating first: {interval(mean, half)} (n = {n})")
    return filled(f"In short: steps that the peak of gamma comes later from one layer to the next, {'; '.join(told)}."
                  if told else "In short: no row has peaks to speak of.")  # fmt: skip


def slopes(steps, is_flat):
    """Cells: slope over all layers, over the first half and over the second; "-" of flat lines, or of one layer."""
    parts = [] if is_flat else [steps, *halves(steps)]
    return [f"{slope(part):+.2f}" if len(part) > 1 else "-" for part in parts] or ["-"] * 3


def kept_at_1(name, layer, values, below):
    """Cell: first / last steps that kept a gamma of exactly 1; firing first, (how many of the last have no gradient by
    construction). below: layers from this one to the output, with it."""
    told = "{} / {}".format(*untouched(values))
    return f"{told} ({min(below, len(values))})" if ORDERS[name] == "fire first" else told


def page(found):
    if not any(found.get(name) for name in ORDERS if name != "gamma_0"):
        return Page("order.md", None)
    kept = those_that_learnt(found, ORDERS)
    told = lambda run: f"that {'fire' if run['config']['spike_order'] == 'fire_first' else 'integrate'} first"  # noqa: E731
    lost = unlearnt(found, ORDERS, lambda run: f"{told(run)} at exponent {exponent(run):.3g}")
    figures = {"order.png": lambda path: draw(kept, path)} if kept else {}
    text = PAGE.format(short=in_short(kept), lost=lost) + (results(kept) if kept else "")
    return Page("order.md", text, figures)


def results(kept):
    """The part of the page that is of nets that learnt."""
    first = next(iter(kept.values()))[0]
    rows, at_1, layers = [], [], list(gamma_of(first))
    for name, runs in kept.items():
        for run in runs:
            steps, who = peaks(run), [ORDERS[name], f"{exponent(run):.3g}", str(run["seed"])]
            told = [str(steps.get(layer, "-")) for layer in layers]
            rows.append([*who, *told, *slopes(by_depth(run), flat(runs)), f"{height(run):.2f}"])
            cells = [kept_at_1(name, layer, values, len(layers) - i)
                     for i, (layer, values) in enumerate(gamma_of(run).items())]  # fmt: skip
            at_1.append([*who, *cells])
    commands = ", ".join(f"`{runs[0]['command']}`" for runs in kept.values())
    heads = ["steps later per layer", "first half", "second half", "peak / mean"]
    return RESULTS.format(
        peaks=table(["order", "exponent", "seed", *layers, *heads], rows), flat=FLAT,
        at_1=table(["steps kept at 1", "exponent", "seed", *layers], at_1),
        setting=filled(f"{setting(first)}. {training(first)} Commands: {commands}."),
    )  # fmt: skip


def draw(kept, path):
    """A column a row: mean gammas of its first run, steps that training reached, with the peaks where they
    are not flat. Columns of one exponent have one y axis."""
    with drawn(path, 3.4) as figure:
        axes, shared = figure.subplots(1, len(kept), squeeze=False), {}
        for axis, (name, runs) in zip(axes[0], kept.items(), strict=True):
            gammas, top, power = gamma_of(runs[0]), peaks(runs[0]), f"{exponent(runs[0]):.3g}"
            if power in shared:
                axis.sharey(shared[power])
                axis.tick_params(labelleft=False)
            shared.setdefault(power, axis)
            shown = {layer: [math.nan if x == 1.0 else x for x in values] for layer, values in gammas.items()}
            per_layer(axis, shown, list(gammas))
            for i, (layer, step) in enumerate(() if flat(runs) else top.items()):
                look = {"color": shades(len(gammas))[[*gammas].index(layer)], "markeredgecolor": "black"}
                axis.plot([step], [gammas[layer][step - 1]], "*", markersize=10, zorder=3, linestyle="", **look,
                          label=None if i else "peak")  # fmt: skip
            time_axis(axis, len(next(iter(gammas.values()))))
            axis.set_title(f"{ORDERS[name]},\nexponent {power}, seed {runs[0]['seed']}")
            ylabel(axis, "mean gamma")
        legend(axes, "upper center")
