"""analysis.json, what analysis.py measured on one net: its form, reading it, and what all who show it need.

Results: such dicts, one a net.
"""

import json
from pathlib import Path

from utill import UserError, reason_of

VERSION = 1  # of analysis.json
# What an analysis must hold, by example: 0.0 is a number, None one or null, [x] a list of such x, (x,) a list with one
# for each time-step, (x, y) a list of two; "*" stands for all keys, and the value of a key that ends in ? may be null.
FORM = {
    "name": "", "label": "", "config": {}, "environment": {}, "num_steps": 0,
    "data": {"dataset": "", "count": 0, "classes": [""]},
    "accuracy": (0.0,), "class_accuracy": {"*": None}, "surrogate?": {"v": [0.0], "derivative": [0.0]},
    "neurons": {"*": 0}, "spikes": {"*": (0.0,)}, "spike_rate": {"*": 0.0}, "sigma?": {"*": (0.0,)},
    "gamma?": {"*": {"mean": (0.0,), "max": (0.0,), "edges": [0.0], "counts": {"*": [0]}}},
    "norm_input?": {
        "layer": "", "edges": [0.0], "frequency": {"*": [0.0]},
        "batch_mean": (0.0,), "stored_mean?": (0.0,), "batch_std": (0.0,), "stored_std?": (0.0,),
    },
    "exit?": {
        "gamma_threshold": 0.0, "step": 0,
        "sweep": [{"exit_step": 0, "acc": 0.0, "threshold_above": 0.0, "spikes_saved": 0.0, "operations_saved": 0.0}],
    },
    "policies?": {"*": {
        "curve": [(None, 0.0, 0.0)],
        "calibrated?": {
            "threshold": None, "target_drop": 0.0, "held_out": 0, "mean_steps": 0.0, "acc": 0.0, "spikes_saved": 0.0,
            "operations_saved": 0.0, "histogram": (0,), "mean_steps_by_class": {"*": None},
        },
    }},
    "energy": {
        "layers": [{"name": "", "multiply_adds": 0.0, "rate": 0.0, "operations": 0.0, "analog": True}],
        "snn_pj": 0.0, "ann_pj": 0.0, "mac_pj": 0.0, "ac_pj": 0.0,
    },
    "noise?": [{"sigma": 0.0, "acc": 0.0, "count": 0}],
    "attack?": [{"kind": "", "eps": 0.0, "draws": 0, "width": None, "steps": 0, "acc": 0.0, "count": 0}],
    "corruptions?": {"*": [0.0]},
}  # fmt: skip


def mismatch(value, form, T, where="it"):
    """In words, where `value` first differs from `form`; "" if nowhere."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{where} is not an object"
        parts = []
        for key in value if "*" in form else form:
            inner, name = form.get("*", form.get(key)), key if "*" in form else key.rstrip("?")
            if name not in value:
                return f"{where} lacks {name}"
            if not name.isprintable():
                return f"{where} has a key with control characters"
            if key == name or value[name] is not None:
                parts.append((value[name], inner, name))
    elif isinstance(form, (list, tuple)):
        if not isinstance(value, list):
            return f"{where} is not a list"
        length = len(value) if isinstance(form, list) else T if len(form) == 1 else len(form)
        if len(value) != length:
            return f"{where} has {len(value)} entries, not {length}"
        parts = [(value[i], form[i % len(form)], i) for i in range(length)]
    elif form is None or type(form) is float:
        number = type(value) in (int, float) and abs(value) < 1e300  # neither inf nor nan
        return "" if number or value is form is None else f"{where} is not a number"
    else:
        fits = type(value) is type(form) and (value.isprintable() if form == "" else abs(value) < 2**53)
        return "" if fits else f"{where} is not of type {type(form).__name__}, too large, or holds control characters"
    return next(filter(None, (mismatch(v, inner, T, f"{where}.{name}") for v, inner, name in parts)), "")


def contradiction(r):
    """In words, what does not fit together in a result that has the FORM; "" if all does."""
    bins = [(f"gamma.{name}", gamma["edges"], gamma["counts"]) for name, gamma in (r["gamma"] or {}).items()]
    if r["norm_input"]:
        bins.append(("norm_input", r["norm_input"]["edges"], r["norm_input"]["frequency"]))
    for where, edges, steps in bins:
        if not all(step.isdecimal() and len(values) == len(edges) - 1 for step, values in steps.items()):
            return f"the bins of {where} do not fit its edges"
    if r["num_steps"] < 1:
        return "num_steps is not positive"
    if r["surrogate"] and len(r["surrogate"]["v"]) != len(r["surrogate"]["derivative"]):
        return "the lists of surrogate differ in length"
    if not r["spikes"] or r["spikes"].keys() != r["neurons"].keys() or min(r["neurons"].values()) < 1:
        return "spikes and neurons are not of the same layers"
    if r["exit"] and not r["exit"]["sweep"]:
        return "exit.sweep is empty"
    exits = [r["exit"]["step"], *(point["exit_step"] for point in r["exit"]["sweep"])] if r["exit"] else []
    return "" if all(1 <= t <= r["num_steps"] for t in exits) else "an exit is not at a time-step"


def load(path):
    """Read an analysis.json, a dict. UserError if it is not JSON, of another version, or lacks what figures need."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON: give the analysis.json that analysis.py wrote") from None
    if not isinstance(value, dict) or "version" not in value:
        raise UserError(f"{path} is not an analysis: give the analysis.json that analysis.py wrote")
    if value["version"] != VERSION:
        raise UserError(
            f"{path} is of version {value['version']}, and this program reads {VERSION}: run analysis.py again"
        )
    if wrong := mismatch(value, FORM, value.get("num_steps")) or contradiction(value):
        raise UserError(f"{path} is not a whole analysis ({wrong}): run analysis.py again")
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
