"""analysis.json, what analysis.py measured on one net: reading it, and what all who show it need.

Results: such dicts, one a net. What each key holds stands where it is measured: `analysis.py:measure`.
"""

import json
from pathlib import Path

from utill import UserError, reading

VERSION = 1  # of analysis.json
KEYS = [
    "name", "label", "config", "environment", "data", "num_steps", "accuracy", "class_accuracy", "neurons", "spikes",
    "spike_rate", "surrogate", "gamma", "sigma", "norm_input", "exit", "policies", "energy", "noise", "attack",
    "corruptions",
]  # fmt: skip


def load(path):
    """Read an analysis.json, a dict. UserError if it is none, of another version, or lacks what figures need."""
    with reading(path):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(value, dict) or "version" not in value:
        raise UserError(f"{path} is not an analysis: give the analysis.json that analysis.py wrote")
    if value["version"] != VERSION:
        version = f"{value['version']!r:.20}"
        raise UserError(f"{path} is of version {version}, and this program reads {VERSION}: run analysis.py again")
    if lacking := [key for key in KEYS if key not in value]:
        raise UserError(f"{path} is not a whole analysis, it lacks {lacking[0]}: run analysis.py again")
    return value


def labels(results):
    """What to call each net: its label, with the data set if they differ, and its name where that is not enough."""
    several = len(data_sets(results)) > 1
    names = [f"{r['label']}, {r['data']['dataset']}" if several else r["label"] for r in results]
    names = [n if names.count(n) == 1 else f"{n} {r['name']}" for n, r in zip(names, results, strict=True)]
    names = [n if names.count(n) == 1 else f"{n} ({i})" for i, n in enumerate(names, 1)]
    return [f" {n}" if n.startswith("_") else n for n in names]  # matplotlib hides a leading underscore


def data_sets(results):
    return union({r["data"]["dataset"]: None} for r in results)


def union(dicts):
    """All keys of the dicts, in their order."""
    return list(dict.fromkeys(key for d in dicts for key in d))


def picojoules(r):
    """{layer: (SNN, ANN)}, energy of an image: an analog input costs multiply-accumulates, spikes cost accumulates."""
    mac, ac, layers = r["energy"]["mac_pj"], r["energy"]["ac_pj"], r["energy"]["layers"]
    return {x["name"]: (x["operations"] * (mac if x["analog"] else ac), x["multiply_adds"] * mac) for x in layers}
