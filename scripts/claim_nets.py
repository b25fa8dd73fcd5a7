"""Claims put to the test on trained nets: what scripts/folding.py and scripts/robustness.sh found."""

import math
import statistics

from claim_parts import FAILS, HOLDS, OPEN, Claim, Page, drawn, verdict
from folding import largest_deviation
from make_tables import interval, read, table, wilson

import records
from figures import OKABE_ITO
from utill import reading

# (net with BNTT, the other, what is claimed of them); those whose names end in _16 are rows of scripts/claims.sh
PAIRS = [
    ("bntt_T25", "ann", "BNTT, 25 Poisson steps, is more robust than no spikes"),
    ("bntt_T4", "ann", "BNTT, 4 direct steps, is more robust than no spikes"),
    ("base_16", "ann_16", "BNTT, T = 12, 16x16, is more robust than no spikes"),
    ("base_3_16", "none_16", "BNTT, T = 12, 16x16, is more robust than no normalisation"),
    ("base_3_16", "bn_16", "BNTT, T = 12, 16x16, is more robust than one BN"),
]
CLEAN = "as they are"
UNLIKE = 3.0  # points of accuracy between two nets on images as they are, from which on attacks cannot compare them


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
            rows = found[path.parent.name] = {CLEAN: (result["accuracy"][-1], result["data"]["count"])}
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
    """A claim for each kind of change, as noise of any strength, that both nets of a pair were tested under.

    It holds where it holds at every strength, and is open where the nets differ by more than UNLIKE before any change.
    """
    claims = []
    for one, other, text in [pair for pair in PAIRS if set(pair[:2]) <= nets.keys()]:
        both = [what for what in nets[one] if what in nets[other]]
        apart = nets[one][CLEAN][0] - nets[other][CLEAN][0]
        for kind in dict.fromkeys(what.split(",")[0] for what in both if what != CLEAN):
            whats = [what for what in both if what.startswith(kind)]
            found = [difference(nets[one][what], nets[other][what]) for what in whats]
            told = "; ".join(f"{what.split(', ')[1]}: {mean:+.1f} ({low:+.1f} to {high:+.1f})"
                             for what, (mean, low, high) in zip(whats, found, strict=True))  # fmt: skip
            seen = f"[{one} - {other}](claims/robustness.md) {told}; {CLEAN}: {apart:+.1f}"
            better, worse = (all(low > 0 for _, low, _ in found), all(high < 0 for *_, high in found))
            answer = OPEN if abs(apart) > UNLIKE else HOLDS if better else FAILS if worse else OPEN
            claims.append(Claim("4.7", f"{text}: {kind}", seen, 1, answer, nets[one][whats[0]][1], "one pair of nets"))
    return claims


def by_size(nets):
    """[{net: its rows}], of 32x32 and of 16x16, without those of which there are none."""
    groups = [{name: nets[name] for name in nets if name.endswith("_16") == small} for small in (False, True)]
    return [group for group in groups if group]


def changes_of(nets):
    return list(dict.fromkeys(what for rows in nets.values() for what in rows))


def robust_page(nets):
    if not nets:
        return Page("robustness.md", None)
    told = lambda rows, what: f"{rows[what][0]:.1f} (n = {rows[what][1]:,})" if what in rows else "-"  # noqa: E731
    cells = lambda group: [[what, *(told(r, what) for r in group.values())] for what in changes_of(group)]  # noqa: E731
    tables = "".join(table(["images", *group], cells(group)) + "\n" for group in by_size(nets))
    text = f"""# Robustness

Accuracy in % of trained nets on CIFAR-10, VGG9. At 32x32, `bntt_T25` sees Poisson spikes, `bntt_T4` the image itself at
each of four steps, `ann` does not spike. Those whose names end in `_16` are rows of `scripts/claims.sh` at 16x16, with
twelve Poisson steps: `base` has BNTT, `base_3` is `base` after three epochs in place of five, nearer in accuracy to
those without BNTT; `ann` does not spike, and trained for eight, to be as accurate as `base`. Noise is Gaussian, on
images in [0, 1]. An attack knows the net; on a spiking one its gradient is the mean over two draws of the spikes, and
an image counts as right only if it is right under both of two widths of the surrogate. One net each; nets that differ
by more than {UNLIKE:g} points on images as they are were not compared; attacks on few images; two draws are few against
a net that draws at random, and an attack made for these nets may find more.

{tables}![Accuracy of each net by what was done to the images](robustness.png)

Command: `DATA=DIR bash scripts/robustness.sh`
"""
    return Page("robustness.md", text, {"robustness.png": lambda path: draw_robust(nets, path)})


def draw_robust(nets, path):
    groups = by_size(nets)
    with drawn(path, 2.8 * len(groups)) as figure:
        for axis, group in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups, strict=True):
            whats = changes_of(group)
            for i, (name, rows) in enumerate(group.items()):
                at = [x + 0.8 * (i + 0.5) / len(group) - 0.4 for x, what in enumerate(whats) if what in rows]
                heights = [rows[what][0] for what in whats if what in rows]
                axis.bar(at, heights, 0.8 / len(group), color=OKABE_ITO[i % len(OKABE_ITO)], label=name)
            axis.axhline(10, color="black", linestyle=":", label="chance")
            axis.set_xticks(range(len(whats)), [what.replace(", ", "\n") for what in whats])
            axis.grid(False, axis="x")
            axis.set(ylabel="accuracy, %", ylim=(0, 100))
            axis.legend(loc="upper right", ncols=6)
