"""Claims put to the test on trained nets: what scripts/folding.py and scripts/robustness.sh found."""

import statistics

from claim_parts import FAILS, HOLDS, OPEN, Claim, Page, drawn, interval, verdict
from folding import largest_deviation
from make_tables import read, table

from figures import OKABE_ITO

NETS = {"bntt_T25": "BNTT, 25 Poisson steps,", "bntt_T4": "BNTT, 4 direct steps,"}


def folding_claims(path):
    """Three claims of one net by folding.json; none where it was not run."""
    if not path.exists():
        return []
    result = read(path)
    layers, found = result["layers"], result["accuracy"]["eq. 15"]
    sigmas = {layer["name"]: largest_deviation(layer["sigma"]) for layer in layers}
    most = max(sigmas, key=sigmas.get)
    means = [statistics.mean(layer["mu_over_sigma"]) for layer in layers]
    differ = [layer["differ"]["eq. 15"] for layer in layers]
    lost, half = found["difference"], found["half_interval"]
    link = "(claims/folding.md)"
    told = [
        ("eq. 12 to 14", "sigma is alike over time-steps (within 10 % of its mean)",
         f"[off its mean]{link} by up to {sigmas[most]:.0f} % ({most})", HOLDS if sigmas[most] <= 10 else FAILS),
        ("eq. 12 to 14", "mu is small (below a tenth of sigma)",
         f"[absolute mu over sigma]{link}: {min(means):.2f} to {max(means):.2f}, by layer",
         HOLDS if max(means) < 0.1 else FAILS),
        ("eq. 15", "BNTT folds into thresholds without loss",
         f"[accuracy]{link} {interval(lost, half)}; spikes of a layer that differ: {min(differ):.0f} to "
         f"{max(differ):.0f} %", FAILS if lost + half < 0 else OPEN if lost - half < -1 else HOLDS),
    ]  # fmt: skip
    return [Claim(f"3.3, {where}", text, seen, 1, answer, result["count"]) for where, text, seen, answer in told]


def robust_nets(folder):
    """{net: {what was done to its images: (accuracy in %, number of images)}} of what scripts/robustness.sh measured.

    Of an attack by several surrogates the worst counts.
    """
    found = {}
    for path in sorted(folder.glob("*/analysis.json")):
        result = read(path)
        rows = found[path.parent.name] = {"as they are": (result["accuracy"][-1], result["data"]["count"])}
        for row in result["noise"] or []:
            rows[f"noise, sigma {row['sigma']:g}"] = row["acc"], row["count"]
        for row in result["attack"] or []:  # the worst comes last
            name = {"fgsm": "FGSM", "pgd": f"PGD-{row['steps']}"}[row["kind"]]
            rows[f"{name}, {255 * row['eps']:.0f}/255"] = row["acc"], row["count"]
    return found


def apart(one, other):
    """Difference of two accuracies in % on so many images each, and half its 95 % interval (unpaired)."""
    (p, n), (q, m) = one, other
    return p - q, 1.96 * (p * (100 - p) / n + q * (100 - q) / m) ** 0.5


def robust_claims(nets):
    """A claim for each change of the images that a net with BNTT and the net without spikes were both tested under."""
    claims = []
    for name in [name for name in nets if name != "ann" and "ann" in nets]:
        for what in [what for what in nets[name] if what != "as they are" and what in nets["ann"]]:
            mean, half = apart(nets[name][what], nets["ann"][what])
            text = f"{NETS.get(name, name)} is more robust than no spikes: {what}"
            seen = f"[{name} - ann](claims/robustness.md): {interval(mean, half)}"
            claims.append(Claim("4.7", text, seen, 1, verdict(mean, half), nets[name][what][1]))
    return claims


def changes_of(nets):
    return list(dict.fromkeys(what for rows in nets.values() for what in rows))


def robust_page(nets):
    if not nets:
        return Page("robustness.md", None)
    told = lambda rows, what: f"{rows[what][0]:.1f} (n = {rows[what][1]:,})" if what in rows else "-"  # noqa: E731
    cells = [[what, *(told(rows, what) for rows in nets.values())] for what in changes_of(nets)]
    text = f"""# Robustness

Accuracy in % of trained nets on CIFAR-10, 32x32, VGG9: `bntt_T25` sees Poisson spikes, `bntt_T4` the image itself at
each of four steps, `ann` does not spike. Noise is Gaussian, on images in [0, 1]. An attack knows the net; on a spiking
one its gradient is the mean over two draws of the spikes, and an image counts as right only if it is right under both
of two widths of the surrogate. One net each, unequal in accuracy as they are; attacks on few images; two draws are few
against a net that draws at random, and an attack made for these nets may find more.

{table(["images", *nets], cells)}
![Accuracy of each net by what was done to the images](robustness.png)

Command: `DATA=DIR bash scripts/robustness.sh`
"""
    return Page("robustness.md", text, {"robustness.png": lambda path: draw_robust(nets, path)})


def draw_robust(nets, path):
    whats = changes_of(nets)
    with drawn(path, 2.8) as figure:
        axis = figure.subplots()
        for i, (name, rows) in enumerate(nets.items()):
            at = [x + 0.8 * (i + 0.5) / len(nets) - 0.4 for x, what in enumerate(whats) if what in rows]
            heights = [rows[what][0] for what in whats if what in rows]
            axis.bar(at, heights, 0.8 / len(nets), color=OKABE_ITO[i % len(OKABE_ITO)], label=name)
        axis.axhline(10, color="black", linestyle=":", label="chance")
        axis.set_xticks(range(len(whats)), [what.replace(", ", "\n") for what in whats])
        axis.grid(False, axis="x")
        axis.set(ylabel="accuracy, %", ylim=(0, 100))
        figure.legend(loc="outside upper center", ncols=4)
