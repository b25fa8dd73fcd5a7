"""Do deeper layers peak later because layers fire first? From nets of both orders, without weight decay on gammas."""

import math
import statistics

from claim_gammas import gamma_of, touched
from claim_parts import Claim, Page, drawn, interval, setting, verdict
from make_tables import paired, table

from figures import legend, per_layer, shades, time_axis, ylabel

ORDERS = {"gamma_0": "integrate first", "fire_first": "fire first"}


def peaks(run):
    """{layer: step of its largest mean gamma, from 1}, of the layers that training reached."""
    steps = {layer: touched(values) for layer, values in gamma_of(run).items()}
    return {layer: max(found, key=found.get) for layer, found in steps.items() if found}


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


def claims(found):
    delays = {name: {run["seed"]: slope([*peaks(run).values()]) for run in found.get(name, [])} for name in ORDERS}
    if not (pair := paired(delays["fire_first"], delays["gamma_0"])):
        return []
    mean, half, n = pair
    seen = "[steps that the peak comes later a layer](claims/order.md), firing first less integrating first: "
    text = "deeper layers peak later because they fire first"
    return [Claim("figs. 1C, 6", text, seen + interval(mean, half), n, verdict(mean, half))]


def page(found):
    kept = {name: found[name] for name in ORDERS if found.get(name)}
    if len(kept) < 2:
        return Page("order.md", None)
    rows, kept_at_1, layers = [], [], list(gamma_of(kept["gamma_0"][0]))
    for name, runs in kept.items():
        for run in runs:
            steps, who = peaks(run), [ORDERS[name], str(run["seed"])]
            told = [str(steps.get(layer, "-")) for layer in layers]
            rows.append([*who, *told, f"{slope([*steps.values()]):+.2f}"])
            kept_at_1.append([*who, *("{} / {}".format(*untouched(gamma_of(run)[layer])) for layer in layers)])
    commands = ",\n".join(f"`{runs[0]['command']}`" for runs in kept.values())
    text = f"""# Do deeper layers peak later because layers fire first?

Step of the largest mean gamma, by layer, in nets trained without weight decay on gammas; last, by how many steps it
comes later from one layer to the next. Firing first, a layer answers one step after its input. Steps that training
cannot reach keep a gamma of 1 and do not count.

{table(["order", "seed", *layers, "a layer"], rows)}
![Mean gamma of each layer against time-steps, in both orders, with its peak](order.png)

First / last steps whose gammas kept a mean of exactly 1. Firing first, nothing has come yet at the first ones, and the
gradient is 0; what the last ones let through can no longer reach the output, and there is no gradient at all (`None`).

{table(["steps kept at 1", "seed", *layers], kept_at_1)}
What this can show: whether peaks move with the order. What it cannot: firing first moves the steps that training can
reach by one a layer, so that a layer whose first such step is its peak comes one step later by construction; a step
of little gradient stays near 1 and may be the peak; peaks of a flat line are chance.

{setting(kept["gamma_0"][0])}. Commands: {commands}.
"""
    return Page("order.md", text, {"order.png": lambda path: draw(kept, path)})


def draw(kept, path):
    """A column an order: mean gammas of its first run, steps that training reached, with the peaks."""
    with drawn(path, 3.0) as figure:
        axes = figure.subplots(1, len(kept), squeeze=False, sharey=True)
        for axis, (name, runs) in zip(axes[0], kept.items(), strict=True):
            gammas, top = gamma_of(runs[0]), peaks(runs[0])
            shown = {layer: [math.nan if x == 1.0 else x for x in values] for layer, values in gammas.items()}
            per_layer(axis, shown, list(gammas))
            for i, (layer, step) in enumerate(top.items()):
                look = {"color": shades(len(gammas))[[*gammas].index(layer)], "markeredgecolor": "black"}
                axis.plot([step], [gammas[layer][step - 1]], "*", markersize=10, zorder=3, linestyle="", **look,
                          label=None if i else "peak")  # fmt: skip
            time_axis(axis, len(next(iter(gammas.values()))))
            axis.set_title(f"{ORDERS[name]}, seed {runs[0]['seed']}")
            ylabel(axis, "mean gamma")
        legend(axes)
