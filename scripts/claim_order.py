"""Do deeper layers peak later, and because layers fire first? From nets of both orders, at two weight decays."""

import math
import statistics

from claim_gammas import exponent, gamma_of, touched
from claim_parts import Page, drawn, interval, judged, mean_and_half, setting, verdict
from make_tables import paired, table

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


def untouched(values):
    """(how many first steps, how many last steps) kept a mean gamma of exactly 1; (0, all) if all did."""
    steps = [*touched(values)] or [1, 0]
    return steps[0] - 1, len(values) - steps[-1]


def slope(values):
    """Least-squares slope of values over 0, 1, 2, ...; 0 of a single one."""
    if len(values) < 2:
        return 0.0
    middle, mean = (len(values) - 1) / 2, statistics.mean(values)
    return sum((i - middle) * (y - mean) for i, y in enumerate(values)) / sum(
        (i - middle) ** 2 for i in range(len(values))
    )


def delays(runs):
    """{seed: by how many steps the peak comes later from one layer to the next}"""
    return {run["seed"]: slope([*peaks(run).values()]) for run in runs}


def tell_delay(kept):
    """Peaks come later with depth if their slope is above 0."""
    found = [*delays(kept["gamma_3.05"]).values()]
    mean, half = mean_and_half(found)
    seen = f"[steps that the peak comes later a layer](claims/order.md), integrating first: {interval(mean, half)}"
    return seen, len(found), verdict(mean, half)


def tell_order(kept):
    """Firing first makes the slope larger."""
    if not (pair := paired(delays(kept["fire_first_3.05"]), delays(kept["gamma_3.05"]))):
        return None
    mean, half, n = pair
    seen = "[steps that the peak comes later a layer](claims/order.md), firing first less integrating first: "
    return f"{seen}{interval(mean, half)}; a shift of +1 is there by construction", n, verdict(mean, half)


def claims(found):
    """That peaks come later with depth though layers integrate first, and that firing first delays them."""
    nets = {name: f"that {ORDERS[name]}, exponent 3.05," for name in ("gamma_3.05", "fire_first_3.05")}
    text = "deeper layers' gammas peak later, without firing first (nets that integrate first, exponent 3.05)"
    told = judged(found, {"gamma_3.05": nets["gamma_3.05"]}, "order.md", "figs. 1C, 6", text, tell_delay)
    return told + judged(found, nets, "order.md", "figs. 1C, 6", "they peak later because they fire first", tell_order)


def flat_rows(kept):
    """A sentence on the rows whose lines are flat."""
    highs = {name: statistics.mean(map(height, runs)) for name, runs in kept.items()}
    flat = [f"{ORDERS[name]} at exponent {exponent(kept[name][0]):.3g} ({high:.2f})" for name, high in highs.items()
            if not high > FLAT]  # fmt: skip
    if not flat:
        return f"Here the peaks of each row stand more than {FLAT:g} times as high as the mean."
    return f"There is nothing to see where it is below {FLAT:g}, as such peaks are chance: {', '.join(flat)}."


def page(found):
    kept = {name: found[name] for name in ORDERS if found.get(name)}
    if not kept.keys() - {"gamma_0"}:
        return Page("order.md", None)
    first = next(iter(kept.values()))[0]
    rows, kept_at_1, layers = [], [], list(gamma_of(first))
    for name, runs in kept.items():
        for run in runs:
            steps, who = peaks(run), [ORDERS[name], f"{exponent(run):.3g}", str(run["seed"])]
            told = [str(steps.get(layer, "-")) for layer in layers]
            rows.append([*who, *told, f"{slope([*steps.values()]):+.2f}", f"{height(run):.2f}"])
            kept_at_1.append([*who, *("{} / {}".format(*untouched(gamma_of(run)[layer])) for layer in layers)])
    commands = ",\n".join(f"`{runs[0]['command']}`" for runs in kept.values())
    text = f"""# Do deeper layers peak later, and because layers fire first?

Step of the largest mean gamma, by layer; then by how many steps it comes later from one layer to the next. Integrating
first, each layer answers in the same step as its input: where its peaks come later with depth, this needs no firing
first. Firing first, a layer answers one step after its input, and 1 step a layer is the shift by construction: where
firing first adds about 1, it is that shift and no more. Steps that nothing moves keep a gamma of 1 and do not count.
Exponent: of weight decay on gammas, as in [gamma.md](gamma.md).

{table(["order", "exponent", "seed", *layers, "a layer", "peak / mean"], rows)}
peak / mean: peak over the mean of its layer, mean over layers; about 1.00 is a flat line. {flat_rows(kept)}

![Mean gamma of each layer against time-steps, by order and exponent, with its peak](order.png)

First / last steps whose gammas kept a mean of exactly 1. Firing first, nothing has come yet at the first ones, and the
gradient is 0; what the last ones let through can no longer reach the output, and there is no gradient at all (`None`).
Weight decay moves gammas of gradient 0 too, not those without any.

{table(["steps kept at 1", "exponent", "seed", *layers], kept_at_1)}
What this can show: whether peaks move with depth, and with the order. What it cannot: firing first moves the steps that
training can reach by one a layer, so that a layer whose first such step is its peak comes one step later by
construction; without decay, a step of little gradient stays near 1 and may be the peak; peaks of a flat line are
chance.

{setting(first)}. Commands: {commands}.
"""
    return Page("order.md", text, {"order.png": lambda path: draw(kept, path)})


def draw(kept, path):
    """A column a row: mean gammas of its first run, steps that training reached, with the peaks. Columns of one
    exponent have one y axis."""
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
            for i, (layer, step) in enumerate(top.items()):
                look = {"color": shades(len(gammas))[[*gammas].index(layer)], "markeredgecolor": "black"}
                axis.plot([step], [gammas[layer][step - 1]], "*", markersize=10, zorder=3, linestyle="", **look,
                          label=None if i else "peak")  # fmt: skip
            time_axis(axis, len(next(iter(gammas.values()))))
            axis.set_title(f"{ORDERS[name]},\nexponent {power}, seed {runs[0]['seed']}")
            ylabel(axis, "mean gamma")
        legend(axes, "upper center")
