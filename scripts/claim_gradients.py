"""Are gradients stabler with BNTT? From the norm of each layer's weight gradient, which log.jsonl keeps for each epoch.

A run's `norms`: {layer: [(mean, deviation) of each epoch]} of the L2 norm over that epoch's steps, input to output.
"""

import math
import statistics

from claim_parts import Claim, Page, drawn, log_mean, setting, verdict
from make_tables import interval, mean_and_deviation, paired, table

from figures import PLAIN, colours, line, per_layer, time_axis

NORMS = {"base": "BNTT", "bn": "one BN", "none": "no normalisation"}
OTHERS = {"bn": "with one BN", "none": "without normalisation"}


def norms_of(run):
    """The run's `norms`; {} where its log has none."""
    epochs = [line for line in run["log"] if line.get("gradient_norm")]
    keys = "gradient_norm", "gradient_deviation"
    layers = epochs[0]["gradient_norm"] if epochs else ()
    return {layer: [tuple(epoch[key][layer] for key in keys) for epoch in epochs] for layer in layers}


def counted(run):
    """The run's `norms` without epochs in which a layer had no gradient, or one past counting."""
    usable = lambda pair: all(x is not None and math.isfinite(x) for x in pair) and pair[0] > 0  # noqa: E731
    return {layer: [pair for pair in pairs if usable(pair)] for layer, pairs in norms_of(run).items()}


def unsteadiness(run):
    """{layer: deviation / mean over an epoch's steps, mean over epochs}; layers without a gradient are out."""
    found = {layer: [deviation / mean for mean, deviation in seen] for layer, seen in counted(run).items()}
    return {layer: statistics.mean(values) for layer, values in found.items() if values}


def sizes(run):
    """{layer: mean norm of its weight gradient over all epochs}; layers without a gradient are out."""
    return {layer: statistics.mean(m for m, _ in seen) for layer, seen in counted(run).items() if seen}


def decades(found):
    """log10 of the layer of the largest of `sizes` over that of the smallest; 0 of none."""
    return 0.0 if not found else math.log10(max(found.values()) / min(found.values()))


def measured(found):
    """{row: its runs that kept the norms of their gradients}"""
    kept = {name: [run for run in found.get(name, []) if sizes(run)] for name in NORMS}
    return {name: runs for name, runs in kept.items() if runs}


def log_ratio(run, other):
    """Mean over layers of log(unsteadiness of one over that of the other); None where no layer has one in both."""
    ours, theirs = unsteadiness(run), unsteadiness(other)
    layers = [layer for layer in ours if theirs.get(layer, 0) > 0 and ours[layer] > 0]
    return statistics.mean(math.log(ours[layer] / theirs[layer]) for layer in layers) if layers else None


def factor(log):
    return math.exp(min(log, 700.0))  # what a float can hold


def claims(found):
    """Both claims, of BNTT beside one BN and beside none, paired by seed."""
    kept = {name: {run["seed"]: run for run in runs} for name, runs in measured(found).items()}
    told = []
    for name in [name for name in OTHERS if name in kept and "base" in kept]:
        pairs = {seed: (kept["base"][seed], kept[name][seed]) for seed in kept["base"].keys() & kept[name].keys()}
        logs = {seed: log for seed, pair in pairs.items() if (log := log_ratio(*pair)) is not None}
        if pair := paired(logs, dict.fromkeys(logs, 0.0)):
            mean, half, n = pair
            seen = f"[deviation / mean of a layer's gradient, base / {name}](claims/gradients.md): "
            text = f"gradients vary less from step to step with BNTT than {OTHERS[name]}"
            told.append(Claim("1, 4.2", text, seen + interval(mean, half, ".3g", factor), n, verdict(-mean, half)))
        if pair := paired(*({seed: decades(sizes(pair[i])) for seed, pair in pairs.items()} for i in (0, 1))):
            mean, half, n = pair
            seen = f"[powers of ten from the smallest layer to the largest, base - {name}](claims/gradients.md): "
            text = f"gradients of layers differ less in size with BNTT than {OTHERS[name]}"
            told.append(Claim("1, 4.2", text, seen + interval(mean, half), n, verdict(-mean, half)))
    return told


def layer_rows(kept, what, form):
    """A row a norm: what(run) of each layer, mean ± deviation over seeds, then its layers in one number or two."""
    layers, rows = list(norms_of(kept["base"][0])), []
    for name, runs in kept.items():
        found = [what(run) for run in runs]
        cells = [[values[layer] for values in found if layer in values] for layer in layers]
        told = [mean_and_deviation(values, form) if values else "-" for values in cells]
        if what is unsteadiness:
            over = [[log_mean(values.values()) for values in found]]
        else:
            hidden = [{layer: size for layer, size in values.items() if layer != layers[-1]} for values in found]
            over = [[decades(values) for values in part] for part in (found, hidden)]
        rows.append([NORMS[name], str(len(runs)), *told, *map(mean_and_deviation, over)])
    return layers, rows


def page(found):
    kept = measured(found)
    if "base" not in kept or len(kept) < 2:
        return Page("gradients.md", None)
    layers, steady = layer_rows(kept, unsteadiness, ".2f")
    _, large = layer_rows(kept, sizes, ".2g")
    text = f"""# Are gradients stabler with BNTT?

At each step of training: the L2 norm of the gradient of a layer's weights. Over the steps of an epoch it has a mean and
a standard deviation. Rows differ in their norm alone: data and learning rate are the same. Mean ± deviation over n
seeds.

From step to step: deviation / mean in an epoch, mean over epochs. Last, the geometric mean of the layers.

{table(["norm", "n", *layers, "layers"], steady)}
From layer to layer: mean norm over all epochs. Last, log10 of the largest layer over the smallest, which claims.md
tells, and the same without the output layer, which no norm stands behind.

{table(["norm", "n", *layers, "decades", "without the last"], large)}
![Norm of the gradient by epoch and layer, its relative deviation, and the decades between layers](gradients.png)

What this can show: whether the size of a gradient is steadier, and more alike over layers, in nets trained alike. What
it cannot: the deviation holds the noise of batches and the trend within an epoch as one; the direction of a gradient is
not seen; a norm makes the size of weights matter less, so that sizes of gradients say nothing of sizes of updates
between rows; each norm might have another best learning rate. Epochs in which a layer has no gradient are left out,
which favours the row that has them.

{setting(kept["base"][0])}. Commands: {", ".join(f"`{runs[0]['command']}`" for runs in kept.values())}.
"""
    return Page("gradients.md", text, {"gradients.png": lambda path: draw(kept, path)})


def draw(kept, path):
    """Above, norm against epoch, a panel a row; below, relative deviation by layer, and the decades between layers."""
    layers, palette = list(norms_of(kept["base"][0])), colours(len(kept))
    with drawn(path, 4.8) as figure:
        above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
        axes = above.subplots(1, len(kept), squeeze=False, sharey=True)
        for axis, (name, runs) in zip(axes[0], kept.items(), strict=True):
            curves = {layer: [mean for mean, _ in seen] for layer, seen in norms_of(runs[0]).items()}
            per_layer(axis, curves, layers)
            time_axis(axis, max(map(len, curves.values())), "epoch")
            axis.set(yscale="log", title=f"{NORMS[name]}, seed {runs[0]['seed']}")
        axes[0][0].yaxis.set_major_formatter(PLAIN)
        axes[0][0].set_ylabel("norm of the weight gradient")
        above.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")
        left, right = below.subplots(1, 2, width_ratios=(3, 1))
        for k, (name, runs) in enumerate(kept.items()):
            for run in runs:
                values = unsteadiness(run)
                at = [layers.index(layer) for layer in values]
                line(left, at, list(values.values()), k, palette, label=NORMS[name] if run is runs[0] else None)
            line(right, [k] * len(runs), [decades(sizes(run)) for run in runs], k, palette, linestyle="")
        left.set_xticks(range(len(layers)), layers)
        left.set(title="deviation / mean over an epoch's steps, a line a seed", ylim=(0, 1.1 * left.dataLim.y1))
        below.legend(loc="outside upper center", ncols=len(kept))
        right.set_xticks(range(len(kept)), kept)
        right.set(title="log10 largest / smallest layer", xlim=(-0.6, len(kept) - 0.4))
        right.set_ylim(0, max(0.1, 1.1 * right.dataLim.y1))
