"""Claims put to the test on trained nets: what scripts/folding.py and scripts/robustness.sh found."""

import math
import statistics

from claim_parts import FAILS, HOLDS, OPEN, Claim, Page, drawn, verdict
from folding import largest_deviation
from make_tables import interval, read, table, wilson

import records
from figures import OKABE_ITO
from utill import reading

NETS = {"bntt_T25": "BNTT, 25 Poisson steps,", "bntt_T4": "BNTT, 4 direct steps,"}


def folding_claims(path):
    """Claims of one net by folding.json; none where it was not run."""
    if not path.exists():
        return []
    with reading(path):
        result = read(path)
        layers = result["layers"]
        sigmas = {layer["name"]: largest_deviation(layer["sigma"]) for layer in layers}
        later = max(largest_deviation(layer["sigma"][len(layer["sigma"]) // 2 :]) for layer in layers)
        most = max(sigmas, key=sigmas.get)
        means = [statistics.mean(layer["mu_over_sigma"]) for layer in layers]
        link = "(claims/folding.md)"
        told = [
            ("eq. 12 to 14", "sigma is alike over time-steps (within 10 % of its mean)",
             f"[off its mean]{link} by up to {sigmas[most]:.0f} % ({most}); over the second half of the steps by up to "
             f"{later:.0f} %", None, HOLDS if sigmas[most] <= 10 else FAILS),
            ("eq. 12 to 14", "mu is small (below a tenth of sigma)",
             f"[absolute mu over sigma]{link}: {min(means):.2f} to {max(means):.2f}, by layer", None,
             HOLDS if max(means) < 0.1 else FAILS),
        ]  # fmt: skip
        for way, what in (("eq. 15", ""), ("mean kept", ", mu kept")):
            found, differ = result["accuracy"][way], [layer["differ"][way] for layer in layers]
            lost, half = found["difference"], found["half_interval"]
            told.append(("eq. 15", f"BNTT folds into thresholds{what}, at a loss of less than a point",
                         f"[accuracy]{link} {interval(lost, half)}; spikes of a layer that differ: {min(differ):.0f} "
                         f"to {max(differ):.0f} %", result["count"], verdict(1 + lost, half)))  # fmt: skip
        return [Claim(f"3.3, {where}", text, seen, 1, answer, count) for where, text, seen, count, answer in told]


def robust_nets(folder):
    """{net: {what was done to its images: (accuracy in %, number of images)}} of what scripts/robustness.sh measured.

    Of an attack by several surrogates the worst counts.
    """
    found = {}
    for path in sorted(folder.glob("*/analysis.json")):
        result = records.load(path)
        with reading(path):
            rows = found[path.parent.name] = {"as they are": (result["accuracy"][-1], result["data"]["count"])}
            for row in result["noise"] or []:
                rows[f"noise, sigma {row['sigma']:g}"] = row["acc"], row["count"]
            for row in sorted(result["attack"] or [], key=lambda row: row["width"] is None):  # the worst of several
                name = {"fgsm": "FGSM", "pgd": f"PGD-{row['steps']}"}[row["kind"]]
                rows[f"{name}, {round(255 * row['eps'], 2):g}/255"] = row["acc"], row["count"]
    return found


def difference(one, other):
    """(p - q, lowest, highest) of two accuracies in % on so many images each: the 95 % interval of Newcombe (1998) for
    independent samples. On the same images, as here, it is rather too wide."""
    (p, _), (q, _) = one, other
    (low, high), (other_low, other_high) = wilson(*one), wilson(*other)
    return p - q, p - q - math.hypot(p - low, other_high - q), p - q + math.hypot(high - p, q - other_low)


def robust_claims(nets):
    """A claim for each change of the images that a net with BNTT and the net without spikes were both tested under."""
    claims = []
    for name in [name for name in nets if name != "ann" and "ann" in nets]:
        for what in [what for what in nets[name] if what != "as they are" and what in nets["ann"]]:
            mean, low, high = difference(nets[name][what], nets["ann"][what])
            text = f"{NETS.get(name, name)} is more robust than no spikes: {what}"
            seen = f"[{name} - ann](claims/robustness.md): {mean:+.2f} ({low:+.2f} to {high:+.2f})"
            answer = HOLDS if low > 0 else FAILS if high < 0 else OPEN
            claims.append(Claim("4.7", text, seen, 1, answer, nets[name][what][1], "one pair of nets"))
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
