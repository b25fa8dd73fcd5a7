"""The HTML page of an analysis: its figures and its numbers in one file that loads nothing from elsewhere.

Results: analysis.json as dicts, one a net. Whatever text they hold is escaped.
"""

import base64
import json
from html import escape

from energy import CAVEAT, CONVENTION
from records import picojoules, union
from utill import one_line

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --faint: #5c5c5c; --rule: #d5d5d5; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #16181c; --ink: #e6e6e6; --faint: #a3a9b1; --rule: #3a3f47; }}
}}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }}
h1, h2 {{ line-height: 1.2; margin: 2.5rem 0 1rem; }}
figure {{ margin: 2rem 0; }}
figure img {{ width: 100%; padding: 0.5rem; box-sizing: border-box; background: #fff; border-radius: 4px; }}
figcaption, caption, .note {{ color: var(--faint); font-size: 0.9rem; text-align: left; }}
.scroll {{ overflow-x: auto; margin: 1.5rem 0; overflow-wrap: normal; }}
table {{ border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.2rem 1rem 0.2rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }}
th {{ vertical-align: bottom; }}
caption, td:first-child {{ white-space: nowrap; }}
.number {{ text-align: right; }}
summary {{ cursor: pointer; margin: 1rem 0; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
PRICES = (
    "A multiply-accumulate (MAC) takes {mac_pj:g} pJ and an accumulate (AC) {ac_pj:g} pJ, 32 bits at 45 nm (Horowitz "
    "2014). The ANN is the same net without spikes: one pass, a MAC for each multiply-add."
)


def shown(value):
    """Numbers to four digits, nothing as a dash, else text."""
    if type(value) is float:
        return format(value, ",.0f" if abs(value) >= 1000 else ".4g")
    return "–" if value is None else value if isinstance(value, str) else format(value, ",")


def table(title, head, rows):
    """HTML of a table with a head and rows of texts, numbers and None; "" without rows."""
    if not rows:
        return ""
    numbers = [any(type(row[i]) in (int, float) for row in rows) for i in range(len(head))]

    def line(tag, values):
        cells = zip(values, numbers, strict=True)
        return "".join(f"<{tag}{' class=number' * number}>{escape(shown(v))}</{tag}>" for v, number in cells)

    body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    top = f"<caption>{escape(title)}</caption>\n<thead><tr>{line('th', head)}</tr></thead>"
    return f'<div class="scroll"><table>{top}\n<tbody>{body}</tbody></table></div>'


def beside(title, first, names, dicts):
    """A table with a row for each key and a column for each of the dicts."""
    return table(title, [first, *names], [[key, *(d.get(key) for d in dicts)] for key in union(dicts)])


def summary(results, names):
    head = ["net", "data set", "images", "T", "accuracy, %", "exit by gamma", "accuracy there, %", "spikes saved, %"]
    head += ["operations saved, %", "spikes of an image", "ANN / SNN energy"]
    rows = []
    for r, name in zip(results, names, strict=True):
        rule, spikes, snn = r["exit"], sum(map(sum, r["spikes"].values())), r["energy"]["snn_pj"]
        saved = {}
        if rule:
            at = [point for point in rule["sweep"] if point["exit_step"] == rule["step"]]
            saved = {"step": rule["step"], "acc": r["accuracy"][rule["step"] - 1]} | (at[0] if at else {})
        exits = [saved.get(key) for key in ("step", "acc", "spikes_saved", "operations_saved")]
        data = [r["data"]["dataset"], r["data"]["count"], r["num_steps"], r["accuracy"][-1]]
        rows.append([name, *data, *exits, float(spikes), r["energy"]["ann_pj"] / snn if snn > 0 else None])
    return table("Accuracy after all T time-steps, and the exit that the gammas give", head, rows)


def calibrated(results, names):
    """[(net, policy, what was calibrated)] of all there is."""
    policies = [
        (n, p, values) for r, n in zip(results, names, strict=True) for p, values in (r["policies"] or {}).items()
    ]
    return [(n, p, values["calibrated"]) for n, p, values in policies if values["calibrated"]]


def exits(results, names):
    keys = {
        "threshold": "threshold", "target_drop": "target drop, points", "held_out": "images held out",
        "mean_steps": "mean steps", "acc": "accuracy, %", "spikes_saved": "spikes saved, %",
        "operations_saved": "operations saved, %",
    }  # fmt: skip
    rows = [[name, policy, *(best[key] for key in keys)] for name, policy, best in calibrated(results, names)]
    title = "Thresholds calibrated on images held out; – is a policy that never exits before T"
    return table(title, ["net", "exit by", *keys.values()], rows)


def exits_of_classes(results, names):
    found = calibrated(results, names)
    steps = [best["mean_steps_by_class"] for *_, best in found]
    return beside("Mean time-steps of the images of a class", "class", [f"{n}, {p}" for n, p, _ in found], steps)


def energy(results, names):
    head = ["layer", "multiply-adds", "|input|, sum over steps", "operations", "kind", "SNN, µJ", "ANN, µJ"]
    parts = []
    for r, name in zip(results, names, strict=True):
        costs, layers = picojoules(r), r["energy"]["layers"]
        rows = [
            [x["name"], x["multiply_adds"], x["rate"], x["operations"], "MAC" if x["analog"] else "AC"]
            + [1e-6 * cost for cost in costs[x["name"]]]
            for x in layers
        ]
        sums = {key: sum(x[key] for x in layers) for key in ("multiply_adds", "operations")}
        total = [1e-6 * r["energy"]["snn_pj"], 1e-6 * r["energy"]["ann_pj"]]
        rows.append(["all layers", sums["multiply_adds"], None, sums["operations"], None, *total])
        parts.append(table(f"{name}: energy of an image", head, rows))
    notes = (CONVENTION, PRICES.format(**results[0]["energy"]), CAVEAT)
    return "".join(parts) + "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def robustness(results, names):
    pairs = list(zip(results, names, strict=True))
    noise = [[name, p["sigma"], p["acc"], p["count"]] for r, name in pairs for p in r["noise"] or []]
    attack = []
    for r, name in pairs:
        for p in r["attack"] or []:
            width = "the worst" if p["width"] is None else p["width"]
            strength = f"{round(255 * p['eps'], 2):g}/255"
            attack.append([name, p["kind"], strength, p["steps"], p["draws"], width, p["acc"], p["count"]])
    corruptions = [[name, c, *accs] for r, name in pairs for c, accs in (r["corruptions"] or {}).items()]
    severities = [f"severity {k}" for k in range(1, 1 + max(map(len, corruptions), default=2) - 2)]
    corruptions = [row + [None] * (len(severities) + 2 - len(row)) for row in corruptions]
    head = ["net", "kind", "eps", "steps", "draws", "width of the surrogate", "accuracy, %", "images"]
    return (
        table("Gaussian noise on images in [0, 1]", ["net", "deviation", "accuracy, %", "images"], noise)
        + table("Attacks; the worst: an image counts if it is right under every width", head, attack)
        + table("Accuracy under corruptions, %", ["net", "corruption", *severities], corruptions)
    )


def folded(text):
    return text and f"<details><summary>Show</summary>{text}</details>"


def page(results, names, images):
    """The page, HTML as a str. results: at least one; names: what to call each; images: [(caption, SVG as bytes)]."""
    title = f"Analysis: {', '.join(names)}"
    figures = "".join(
        f'<figure><img alt="{escape(caption)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
        for caption, svg in images
    )

    def compare(title, first, key):
        return beside(title, first, names, [r[key] for r in results])

    def exact(title, first, key):
        texts = [
            {one_line(k): one_line(v if isinstance(v, str) else json.dumps(v)) for k, v in r[key].items()}
            for r in results
        ]
        return beside(title, first, names, texts)

    sections = {
        "Figures": figures,
        "Exits of each image": exits(results, names),
        "Energy": energy(results, names),
        "Noise, attacks and corruptions": robustness(results, names),
        "Layers": compare("Spikes of a neuron over all time-steps", "layer", "spike_rate"),
        "Classes": folded(
            compare("Accuracy of each class, %", "class", "class_accuracy") + exits_of_classes(results, names)
        ),
        "How it was made": folded(exact("Flags", "flag", "config") + exact("Environment", "key", "environment")),
    }
    body = f"<h1>{escape(title)}</h1>\n{summary(results, names)}\n" + "\n".join(
        f"<h2>{heading}</h2>\n{text}" for heading, text in sections.items() if text
    )
    return PAGE.format(title=escape(title), body=body)
