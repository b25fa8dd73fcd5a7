"""Do deeper layers peak later, and because layers fire first? From nets of both orders, at two weight decays."""

import math
import statistics

from claim_gammas import exponent, gamma_of, touched, untouched
from claim_parts import (
    FAILS,
    HOLDS,
    OPEN,
    Page,
    drawn,
    interval,
    judged,
    mean_and_half,
    setting,
    those_that_learnt,
    training,
    unlearnt,
    verdict,
)
from make_tables import filled, paired, table

from figures import legend, per_layer, shades, time_axis, ylabel

ORDERS = {  # rows of one exponent side by side
    "gamma_0": "integrate first",
    "fire_first": "fire first",
    "gamma_3.05": "integrate first",
    "fire_first_3.05": "fire first",
}
LATER = "comes later with depth"
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


def slope(values):
    """Least-squares slope of values over 0, 1, 2, ...; 0 of a single one."""
    if len(values) < 2:
        return 0.0
    middle, mean = (len(values) - 1) / 2, statistics.mean(values)
    return sum((i - middle) * (y - mean) for i, y in enumerate(values)) / sum(
        (i - middle) ** 2 for i in range(len(values))
    )


def halves(values):
    """First and second half; of an odd number both have the one in the middle."""
    half = (len(values) + 1) // 2
    return values[:half], values[len(values) - half :]


def delays(runs):
    """{seed: by how many steps the peak comes later from one layer to the next}"""
    return {run["seed"]: slope([*peaks(run).values()]) for run in runs}


def tell_delay(kept):
    """Peaks come later with depth if their slope is above 0."""
    found = [*delays(kept["gamma_3.05"]).values()]
    mean, half = mean_and_half(found)
    seen = f"[steps that the peak comes later per layer](claims/order.md), integrating first: {interval(mean, half)}"
    return seen, len(found), verdict(mean, half)


def tell_order(kept):
    """Firing first makes the slope larger."""
    if not (pair := paired(delays(kept["fire_first_3.05"]), delays(kept["gamma_3.05"]))):
        return None
    mean, half, n = pair
    seen = "[steps that the peak comes later per layer](claims/order.md), firing first less integrating first: "
    return f"{seen}{interval(mean, half)}; a shift of +1 is there by construction", n, verdict(mean, half)


def claims(found):
    """That peaks come later with depth though layers integrate first, and that firing first delays them."""
    nets = {name: f"that {ORDERS[name]}, exponent 3.05," for name in ("gamma_3.05", "fire_first_3.05")}
    text = "deeper layers' gammas peak later, without firing first (nets that integrate first, exponent 3.05)"
    told = judged(found, {"gamma_3.05": nets["gamma_3.05"]}, "order.md", "figs. 1C, 6", text, tell_delay)
    return told + judged(found, nets, "order.md", "figs. 1C, 6", "they peak later because they fire first", tell_order)


# ---- The page ------------------------------------------------------------------------------------


def later(runs):
    """'comes later with depth', or what these runs say instead."""
    up = [delay > 0 for delay in delays(runs).values()]
    if all(up):
        return LATER
    return f"{LATER} in some nets alone" if any(up) else LATER.replace("comes", "does not come")


def ends(runs):
    """'conv1 at step 1, fc1 at step 12 (seed 0)'; seeds after each other."""
    tops = {run["seed"]: peaks(run) for run in runs}
    told = {seed: [f"{layer} at step {step}" for layer, step in top.items()] for seed, top in tops.items() if top}
    return "; ".join(f"{layers[0]}, {layers[-1]} (seed {seed})" for seed, layers in told.items())


def shift(kept):
    """Sentences on what firing first adds; "" where no two nets tell it."""
    if not (pair := paired(*(delays(kept.get(name, [])) for name in ("fire_first_3.05", "gamma_3.05")))):
        return ""
    mean, half, n = pair
    told = {HOLDS: "the order adds to it", FAILS: "the order takes from it", OPEN: "whether it matters is left open"}
    text = "The order was measured at this exponent: firing first less integrating first, the peak comes"
    text += f" {interval(mean, half)} steps later per layer (n = {n}): {told[verdict(mean, half)]}."
    text += " Firing first, 1 step per layer is the shift by construction"
    if half is None:
        return f"{text}."
    if abs(mean - 1) <= half:
        return f"{text}; the difference is that shift, as far as can be told."
    return f"{text}; the difference is {'more' if mean > 1 else 'less'} than that."


def in_short(kept):
    """Whether peaks come later with depth, and whether the order matters."""
    told = []
    if runs := kept.get("gamma_3.05"):
        told.append(
            f"integrating first at exponent {exponent(runs[0]):.3g}, the peak of gamma {later(runs)}: {ends(runs)}."
        )
        if later(runs) == LATER:
            told.append(
                "Firing first is not needed for that. The reason may be that small gammas make the first spikes of"
            )
            told.append("deeper layers late; this was not measured.")
    not_measured = (
        "Whether the order matters was not measured: there are no nets of both orders that learnt with weight "
    )
    told.append(shift(kept) or f"{not_measured}decay on gammas.")
    return filled(f"In short: {' '.join(told)}")


def flat_names(kept):
    """{row: height} of the rows of flat lines."""
    highs = {name: statistics.mean(map(height, runs)) for name, runs in kept.items()}
    return {name: high for name, high in highs.items() if not high > FLAT}


def flat_rows(kept):
    """Sentences on the rows whose lines are flat."""
    if not (flat := flat_names(kept)):
        return f"Here the peaks of each row stand more than {FLAT:g} times as high as the mean."
    named = [f"{ORDERS[name]} at exponent {exponent(kept[name][0]):.3g} ({high:.2f})" for name, high in flat.items()]
    runs = [run for name in flat for run in kept[name]]
    last = [step == max(touched(gamma_of(run)[layer])) for run in runs for layer, step in peaks(run).items()]
    text = f"Lines are flat where it is below {FLAT:g}: {', '.join(named)}. Peaks of flat lines are artefacts, and have"
    text += f" no slope here: {sum(last)} of these {len(last)} are the last step of their layer that moved at all"
    near = []
    for name in flat:
        steps = [peaks(run) for run in kept[name]]
        seen = [[found[layer] for found in steps if layer in found] for layer in gamma_of(kept[name][0])]
        near += [max(at) - min(at) <= 1 for at in seen if len(at) > 1]
    again = f", and in {sum(near)} of {len(near)} layers the peaks of all seeds lie within one step" if near else ""
    return f"{text}{again}."


def slopes(steps, flat):
    """Cells: slope over all layers, over the first half and over the second; "-" of flat lines, or of one layer."""
    parts = [] if flat else [steps, *halves(steps)]
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
    text = f"# Do deeper layers peak later, and because layers fire first?\n\n{in_short(kept)}{lost}"
    figures = {"order.png": lambda path: draw(kept, path)} if kept else {}
    return Page("order.md", text + (results(kept) if kept else ""), figures)


def results(kept):
    """The part of the page that is of nets that learnt."""
    first = next(iter(kept.values()))[0]
    rows, at_1, layers, flat = [], [], list(gamma_of(first)), flat_names(kept)
    for name, runs in kept.items():
        for run in runs:
            steps, who = peaks(run), [ORDERS[name], f"{exponent(run):.3g}", str(run["seed"])]
            told = [str(steps.get(layer, "-")) for layer in layers]
            rows.append([*who, *told, *slopes([*steps.values()], name in flat), f"{height(run):.2f}"])
            cells = [kept_at_1(name, layer, values, len(layers) - i)
                     for i, (layer, values) in enumerate(gamma_of(run).items())]  # fmt: skip
            at_1.append([*who, *cells])
    commands = ", ".join(f"`{runs[0]['command']}`" for runs in kept.values())
    heads = ["steps later per layer", "first half", "second half", "peak / mean"]
    high = filled("peak / mean: peak over the mean of its layer, mean over layers; about 1.00 is a flat line. "
                  f"{flat_rows(kept)}")  # fmt: skip
    brackets = ""
    if any(ORDERS[name] == "fire first" for name in kept):
        brackets = filled("In brackets, for nets that fire first: how many last steps have no gradient by construction,"
                          " as many as there are layers from there to the output.")  # fmt: skip
    return f"""
Step of the largest mean gamma, by layer; then by how many steps it comes later from one layer to the next: the
least-squares slope over all layers, over the first half of them and over the second. Integrating first has no built-in
delay; firing first, a layer answers one step after its input. Steps that nothing moves keep a gamma of 1 and do not
count. Exponent: of weight decay on gammas, as in [gamma.md](gamma.md).

{table(["order", "exponent", "seed", *layers, *heads], rows)}
{high}
![Mean gamma of each layer against time-steps, by order and exponent, with its peak](order.png)

First / last steps whose gammas kept a mean of exactly 1. There are three kinds of reason: no gradient at all (`None`),
as what the last steps of a net that fires first let through can no longer reach the output; a gradient of exactly 0, as
nothing has come yet or no membrane is near the threshold; or updates below what float32 can tell near 1. Which of the
last two it is, these numbers do not tell. Weight decay moves gammas of gradient 0 too, not those without any.
{brackets}
{table(["steps kept at 1", "exponent", "seed", *layers], at_1)}
What this can show: whether peaks move with depth, and, at one exponent, with the order. What it cannot: firing first
moves the steps that training can reach by one a layer, so that a layer whose first such step is its peak comes one step
later by construction; without decay, a step of little gradient stays near 1 and may be the peak.

{filled(f"{setting(first)}. {training(first)} Commands: {commands}.")}"""


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
            for i, (layer, step) in enumerate(top.items() if name not in flat_names(kept) else ()):
                look = {"color": shades(len(gammas))[[*gammas].index(layer)], "markeredgecolor": "black"}
                axis.plot([step], [gammas[layer][step - 1]], "*", markersize=10, zorder=3, linestyle="", **look,
                          label=None if i else "peak")  # fmt: skip
            time_axis(axis, len(next(iter(gammas.values()))))
            axis.set_title(f"{ORDERS[name]},\nexponent {power}, seed {runs[0]['seed']}")
            ylabel(axis, "mean gamma")
        legend(axes, "upper center")
