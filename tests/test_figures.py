"""figures.py: what is drawn is what the analyses say, what cannot be drawn is refused, and the page loads nothing."""

import base64
import itertools
import json
import math
import re
import xml.etree.ElementTree
from html.parser import HTMLParser

import matplotlib.style
import matplotlib.text
import numpy as np
import pytest
from PIL import Image

import energy
import figures
import pages
from utill import UserError

LAYERS = {"conv1": 65536, "conv2": 65536, "conv3": 32768, "conv4": 32768, "conv5": 16384, "fc1": 1024}


def analysis(label="bntt", T=25, gamma=True, dataset="cifar10", seed=0, exit_at=0.8, classes=10, layers=LAYERS):
    """An analysis.json as a dict, with numbers of the sizes that real ones have."""
    rng, t = np.random.default_rng(seed), np.arange(1, T + 1)
    rise, top = 1 - np.exp(-t / max(1, T / 8)), 60 + 30 * rng.random()

    def numbers(array):
        return [float(f"{x:.6g}") for x in np.ravel(array)]

    curve = 10 + (top - 10) * rise
    peak = {name: np.exp(-(((t - T * (0.15 + 0.09 * i)) / (0.3 * T)) ** 2)) for i, name in enumerate(layers)}
    spikes = {name: numbers(0.1 * n * peak[name] * rng.random()) for name, n in layers.items()}
    rate = {name: sum(spikes[name]) / n for name, n in layers.items()}
    names, step = [f"class {i}" for i in range(classes)], max(1, round(exit_at * T))
    bins, chosen = np.linspace(-0.2, 2, 41), sorted({1, max(1, T // 5), max(1, T // 2), T})
    means = {name: 0.03 + 0.9 * peak[name] for name in layers}
    sweep = [
        {
            "exit_step": s, "acc": numbers(curve)[s - 1], "threshold_above": 0.9 * (1 - i / 6), "threshold_up_to": None,
            "spikes_saved": 100 * (1 - s / T), "operations_saved": 90 * (1 - s / T),
        }
        for i, s in enumerate(sorted({step, *(max(1, T * k // 6) for k in range(1, 7))}))
    ]  # fmt: skip
    sweep[-1]["threshold_above"] = 0.0
    policies = {}
    for k, name in enumerate(("confidence", "entropy", "margin")):
        steps = np.linspace(1 + (T - 1) / 5, T, 12)
        histogram = rng.multinomial(1000, rise / rise.sum())
        policies[name] = {
            "curve": [
                [1 - i / 11 if i else None, x, top - 2 - k + (2 + k) * i / 11] for i, x in enumerate(numbers(steps))
            ],
            "calibrated": {
                "threshold": 0.9, "target_drop": 0.5, "held_out": 5000, "mean_steps": float(t @ histogram / 1000),
                "acc": top - 0.5, "spikes_saved": 50.5, "operations_saved": 48.25, "histogram": histogram.tolist(),
                "mean_steps_by_class": dict.fromkeys(names, T / 2),
            },
        }  # fmt: skip
    adds = {name: 1.7e6 * (i % 3 + 1) * (100 if "conv" in name else 1) for i, name in enumerate(layers)}
    before = [0.5 * T, *rate.values()]
    costs = [
        {"name": name, "multiply_adds": a, "rate": b, "operations": a * b, "analog": False}
        for (name, a), b in zip(adds.items(), before, strict=False)
    ]
    drop, v = 0.5 + 0.5 * rng.random(), np.linspace(-2, 2, 81)
    return {
        "version": 1, "name": f"{dataset}_vgg9_T{T}_{label}_seed{seed}", "label": label,
        "config": {"norm": label, "num_steps": T, "seed": seed, "lr": 0.3}, "environment": {"torch": "2.14.0"},
        "data": {"dataset": dataset, "count": 10000, "classes": names},
        "num_steps": T, "logit_scale": 1.0, "accuracy": numbers(curve),
        "class_accuracy": {name: float(top - i) for i, name in enumerate(names)},
        "neurons": dict(layers), "spikes": spikes, "input_spikes": numbers(1500 * np.ones(T)), "spike_rate": rate,
        "surrogate": {"v": numbers(v), "derivative": numbers(0.3 * np.maximum(0, 1 - abs(v)))},
        "gamma": {
            name: {
                "mean": numbers(means[name]), "max": numbers(1.9 * means[name]), "edges": numbers(bins),
                "counts": {
                    str(s): np.histogram(rng.normal(means[name][s - 1], 0.15, 256), bins)[0].tolist() for s in chosen
                },
            }
            for name in layers
        } if gamma else None,
        "sigma": {name: numbers((i + 1) * (0.5 + rise)) for i, name in enumerate(layers)},
        "norm_input": {
            "layer": "conv3", "steps": chosen, "edges": numbers(4 * v),
            "frequency": {
                str(s): numbers(np.histogram(rng.normal(0, 1 + s / T, 5000), 4 * v)[0] / 5000) for s in chosen
            },
            "batch_mean": numbers(-rise + 0.05 * rng.normal(size=T)), "stored_mean": numbers(-rise),
            "batch_std": numbers(1 + rise + 0.05 * rng.normal(size=T)), "stored_std": numbers(1 + rise),
        },
        "exit": {"gamma_threshold": 0.1, "step": step, "sweep": sweep} if gamma else None,
        "policies": policies,
        "energy": {
            "layers": costs, "snn_pj": sum(0.9 * c["operations"] for c in costs),
            "ann_pj": sum(4.6 * c["multiply_adds"] for c in costs), "mac_pj": 4.6, "ac_pj": 0.9,
        },
        "noise": [{"sigma": s, "acc": top - 60 * drop * s, "count": 10000} for s in (0.0, 0.1, 0.2, 0.4)],
        "attack": [
            {
                "kind": kind, "eps": float(f"{k / 255:.6g}"), "draws": 1, "width": width, "steps": steps,
                "acc": top * math.exp(-drop * k * steps ** (0.3 if width else 0.4) / 8), "count": 1000,
            }
            for kind, width, steps in (("fgsm", 1.0, 1), ("pgd", 1.0, 10), ("pgd", None, 10)) for k in (2, 4, 8, 16)
        ],
        "corruptions": {"fog": [top - 2 * k for k in range(5)], "snow": [top - 3 * k for k in range(5)]},
    }  # fmt: skip


def built(number, results):
    with matplotlib.style.context(["default", figures.STYLE]):
        return figures.build(number, results)


def panels(number, results):
    """The axes that show something, in rows."""
    return [ax for ax in built(number, results).axes if ax.get_label() != "<colorbar>"]


def data_of(ax):
    """{label: y} of the lines of an axes, of one line a label."""
    return {line.get_label(): line.get_ydata() for line in ax.lines if not line.get_label().startswith("_")}


NETS = {
    "one net": [analysis()],
    "three nets": [analysis("bntt"), analysis("tebn", seed=1, exit_at=1), analysis("tdbn", seed=2)],
    "T = 1": [analysis(T=1), analysis("tebn", T=1, seed=1)],
    "T = 784": [analysis(T=784, layers={"fc1": 256, "fc2": 256}, dataset="smnist")],
}


# ---- Every figure --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", figures.FIGURES)
@pytest.mark.parametrize("nets", NETS)
def test_every_figure_can_be_drawn(number, nets, tmp_path):
    png, svg = figures.draw(NETS[nets], tmp_path, [number])
    with Image.open(png) as image:
        image.load()
        assert image.width == round(figures.WIDTH * figures.DPI)
    assert xml.etree.ElementTree.fromstring(svg.read_bytes()).tag.endswith("svg")


@pytest.mark.parametrize("number", [n for n, row in figures.FIGURES.items() if not {"gamma", "exit"} & {*row.needs}])
def test_a_net_without_gamma_has_all_other_figures(number, tmp_path):
    assert len(figures.draw([analysis("bn", gamma=False)], tmp_path, [number])) == 2


@pytest.mark.parametrize("number", figures.FIGURES)
def test_no_letter_is_smaller_than_eight_points(number):
    texts = built(number, NETS["three nets"]).findobj(matplotlib.text.Text)
    assert min(text.get_fontsize() for text in texts) >= 8


@pytest.mark.parametrize("number", figures.FIGURES)
def test_below_every_figure_stand_its_data_set_and_number_of_images(number):
    words = " ".join(built(number, NETS["one net"]).get_supxlabel().split())
    assert "cifar10, n = 10,000 test images, T = 25" in words


@pytest.mark.parametrize("number", ["1", "2", "4", "7", "exits"])
def test_lines_that_coincide_can_be_told_apart(number):
    first = analysis(layers={"fc1": 100, "fc2": 100})
    first["spikes"]["fc2"], first["gamma"]["fc2"] = first["spikes"]["fc1"], first["gamma"]["fc1"]
    for policy in first["policies"].values():
        policy["curve"] = first["policies"]["margin"]["curve"]
    lines = [line for line in panels(number, [first, first | {"label": "twin"}])[0].lines if len(line.get_xdata()) > 2]
    assert len(lines) > 1
    assert len({line.get_marker() for line in lines}) == len(lines)  # in grey too
    assert (
        len({(line.get_color() if isinstance(line.get_color(), str) else tuple(line.get_color())) for line in lines})
        > 1
    )


def test_marks_of_lines_that_coincide_lie_beside_each_other():
    lines = panels("2", NETS["three nets"])[0].lines
    places = [set(range(*line.get_markevery()[:1], 81, line.get_markevery()[1])) for line in lines]
    assert not set.intersection(*places)
    assert all(places)


@pytest.mark.parametrize("number", ["4", "maps"])
def test_the_svg_is_the_same_each_time(number):
    first = figures.render(number, NETS["one net"], "svg")
    assert first == figures.render(number, NETS["one net"], "svg")
    assert b"dc:date" not in first


def test_a_name_is_drawn_as_it_is():
    nets = [analysis(r"_$\frac$"), analysis("b", seed=1)]
    legend = built("5", nets).legends[0]
    assert [text.get_text().strip() for text in legend.get_texts()] == [r"_$\frac$", "b"]
    assert figures.render("5", nets, "png")


def test_nets_of_one_label_go_by_their_names_too():
    nets = [analysis(seed=0), analysis(seed=1), analysis("bn")]
    assert [ax.get_title().replace("\n", " ") for ax in panels("1", nets)] == [
        "bntt cifar10_vgg9_T25_bntt_seed0",
        "bntt cifar10_vgg9_T25_bntt_seed1",
        "bn",
    ]


# ---- What each of them shows ----------------------------------------------------------------------


def test_figure_1_shows_the_spikes_of_each_layer_a_panel_a_net():
    nets = NETS["three nets"]
    axes = panels("1", nets)
    assert [ax.get_title() for ax in axes] == ["bntt", "tebn", "tdbn"]
    for ax, r in zip(axes, nets, strict=True):
        assert {name: list(y) for name, y in data_of(ax).items()} == r["spikes"]
        assert list(ax.lines[0].get_xdata()) == list(range(1, 26))
        low, high = ax.get_ylim()
        assert low == 0
        assert high > max(map(max, r["spikes"].values()))


def test_figure_2_shows_the_surrogate():
    r = analysis()
    (line,) = panels("2", [r])[0].lines
    assert list(line.get_xdata()) == r["surrogate"]["v"]
    assert list(line.get_ydata()) == r["surrogate"]["derivative"]


def test_figure_3_shows_the_input_of_a_norm_and_its_statistics():
    r = analysis()
    distribution, mean, deviation = panels("3", [r])
    drawn = {patch.get_label(): list(patch.get_data().values) for patch in distribution.patches}
    assert drawn == {f"step {step}": values for step, values in r["norm_input"]["frequency"].items()}
    for ax, kind in ((mean, "mean"), (deviation, "std")):
        assert [list(y) for y in data_of(ax).values()] == [
            r["norm_input"][f"{key}_{kind}"] for key in ("batch", "stored")
        ]


def test_figure_3_does_without_stored_statistics():
    r = analysis()
    r["norm_input"] |= {"stored_mean": None, "stored_std": None}
    assert [len(ax.lines) for ax in panels("3", [r])[1:]] == [1, 1]


def test_figure_3_lets_the_zeros_of_a_silent_step_leave_the_axes():
    r = analysis()
    highest = max(max(values) for values in r["norm_input"]["frequency"].values())
    r["norm_input"]["frequency"]["1"] = [0.0] * 39 + [1.0] + [0.0] * 40
    ax = panels("3", [r])[0]
    assert highest < ax.get_ylim()[1] < 1
    assert ax.get_ylabel() == "frequency, cut at the top"
    assert panels("3", [analysis()])[0].get_ylabel() == "frequency"


def test_figure_4_shows_mean_and_largest_gamma():
    nets = NETS["three nets"]
    axes = panels("4", nets)
    for kind, row in (("mean", axes[:3]), ("max", axes[3:])):
        for ax, r in zip(row, nets, strict=True):
            drawn = {name: list(y) for name, y in data_of(ax).items() if name in LAYERS}
            assert drawn == {name: gamma[kind] for name, gamma in r["gamma"].items()}
    assert list(data_of(axes[0])["threshold"]) == [0.1, 0.1]


@pytest.mark.parametrize(("exit_at", "step"), [(0.8, 20), (0.2, 5)])
def test_figure_4_shades_what_comes_after_the_exit(exit_at, step):
    for ax in panels("4", [analysis(exit_at=exit_at)]):
        (shade,) = ax.patches
        assert shade.get_x() == step
        assert shade.get_x() + shade.get_width() >= 25


def test_figure_4_shades_nothing_without_an_exit():
    axes = panels("4", [analysis(exit_at=1)])
    assert [len(ax.patches) for ax in axes] == [0, 0]
    assert axes[0].get_title() == "bntt: no exit before 25"


def test_figure_5_sets_the_spike_rates_of_the_nets_side_by_side():
    nets = NETS["three nets"]
    (ax,) = panels("5", nets)
    assert ax.get_yscale() == "log"
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    assert heights == [list(r["spike_rate"].values()) for r in nets]
    places = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches)
    assert all(end <= start + 1e-9 for (_, end), (start, _) in itertools.pairwise(places))


def test_a_layer_without_spikes_has_a_zero_and_no_bar():
    r = analysis()
    r["spike_rate"]["conv2"] = 0.0
    (ax,) = panels("5", [r])
    (zero,) = ax.texts
    assert (zero.get_text(), zero.get_position()[0]) == ("0", 1)
    assert min(ax.get_ylim()) > 0


def test_figure_6_shows_shares_of_channels_in_three_layers():
    r = analysis()
    axes = panels("6", [r])
    assert [ax.get_title() for ax in axes] == ["bntt: conv1", "bntt: conv4", "bntt: fc1"]
    for ax, name in zip(axes, ("conv1", "conv4", "fc1"), strict=True):
        counts = r["gamma"][name]["counts"]
        assert [patch.get_label() for patch in ax.patches] == [f"step {step}" for step in sorted(counts, key=int)]
        for patch, step in zip(ax.patches, sorted(counts, key=int), strict=True):
            shares = patch.get_data().values
            assert shares.sum() == pytest.approx(1)
            assert list(shares * sum(counts[step])) == pytest.approx(counts[step])


def test_figure_6_gives_a_step_one_look_in_all_nets():
    axes = panels("6", [analysis(T=25), analysis("tebn", T=50)])
    looks = {}
    for patch in (patch for ax in axes for patch in ax.patches):
        looks.setdefault(patch.get_label(), set()).add((tuple(patch.get_edgecolor()), str(patch.get_linestyle())))
    assert len(looks) > 4
    assert all(len(look) == 1 for look in looks.values())
    assert len(set.union(*looks.values())) == len(looks)


def test_figure_7_steps_where_the_threshold_changes_the_exit():
    r = analysis()
    above, below = panels("7", [r])
    points = sorted(r["exit"]["sweep"], key=lambda point: point["threshold_above"])
    for ax, key in ((above, "acc"), (below, "exit_step")):
        line = ax.lines[0]
        assert line.get_drawstyle() == "steps-post"
        assert list(line.get_xdata()[:-1]) == [point["threshold_above"] for point in points]
        assert list(line.get_ydata()) == [point[key] for point in (*points, points[-1])]
        assert ax.lines[-1].get_xdata()[0] == 0.1


def test_figure_7_has_a_panel_for_each_data_set():
    axes = panels("7", [analysis(), analysis("tebn"), analysis(dataset="cifar100")])
    assert [ax.get_title() for ax in axes[:2]] == ["cifar10", "cifar100"]
    assert [len([line for line in ax.lines if line.get_drawstyle() == "steps-post"]) for ax in axes] == [2, 1, 2, 1]


def test_figure_8_shows_noise_and_attacks():
    nets = NETS["three nets"]
    noise, attack = panels("8", nets)
    for r in nets:
        assert list(data_of(noise)[r["label"]]) == [point["acc"] for point in r["noise"]]
    lines = [line for line in attack.lines if line.get_label() == "tebn"]
    by_kind = [[p["acc"] for p in nets[1]["attack"]][i : i + 4] for i in (0, 4, 8)]
    assert [list(line.get_ydata()) for line in lines] == by_kind
    assert all(list(line.get_xdata()) == pytest.approx([2, 4, 8, 16], rel=1e-5) for line in lines)
    assert len({line.get_marker() for line in lines}) == 3
    words = [text.get_text() for text in attack.figure.legends[0].get_texts()]
    assert words == ["bntt", "tebn", "tdbn", "chance", "FGSM", "PGD, 10 steps", "PGD, 10 steps, worst width"]
    assert list(data_of(attack)["chance"]) == [10, 10]


def test_below_figure_8_stands_how_many_images_were_attacked():
    r = analysis()
    for row in r["attack"]:
        row["count"] = 1234
    assert "attacks on 1,234 of them" in figures.caption("8", [r])


@pytest.mark.parametrize("key", ["noise", "attack"])
def test_figure_8_has_one_panel_if_only_one_was_measured(key):
    r = analysis() | {"noise": None, "attack": None, key: analysis()[key]}
    assert len(panels("8", [r])) == 1
    assert ("8", [r]) in figures.drawable([r])


def test_figure_exits_shows_every_exit():
    r = analysis()
    above, below = panels("exits", [r])
    lines = {line.get_label(): line for line in above.lines}
    assert list(lines["fixed steps"].get_ydata()) == r["accuracy"]
    steps = sorted({point["exit_step"] for point in r["exit"]["sweep"]})
    assert list(lines["gamma threshold"].get_xdata()) == steps
    assert list(lines["gamma threshold"].get_ydata()) == [r["accuracy"][t - 1] for t in steps]
    for name, policy in r["policies"].items():
        assert list(zip(*lines[name].get_data(), strict=True)) == [(x, y) for _, x, y in policy["curve"]]
        best = lines[f"{name}, calibrated"]
        assert (best.get_xdata()[0], best.get_ydata()[0]) == (
            policy["calibrated"]["mean_steps"],
            policy["calibrated"]["acc"],
        )
    shares = [list(patch.get_data().values) for patch in below.patches]
    assert shares == [[n / 10 for n in policy["calibrated"]["histogram"]] for policy in r["policies"].values()]


def test_many_exit_steps_are_put_together():
    below = panels("exits", NETS["T = 784"])[1]
    for patch in below.patches:
        values, edges, _ = patch.get_data()
        assert len(values) <= 50
        assert sum(values) == pytest.approx(100)
        assert (edges[0], edges[-1]) == (0.5, 784.5)


def test_exit_steps_are_put_together_alike_in_all_nets():
    columns = panels("exits", [analysis(T=4), analysis(T=110)])
    shown = [panel.get_ylabel() for panel in columns if "share" in panel.get_ylabel()]
    assert shown[0] == "share of images in 3 steps, %"


def test_figure_exits_has_no_histogram_without_calibration():
    r = analysis()
    for policy in r["policies"].values():
        policy["calibrated"] = None
    assert len(panels("exits", [r])) == 1
    assert len(panels("exits", [r | {"policies": None}])) == 1
    assert panels("exits", [analysis("tebn"), r])[-1].texts[0].get_text() == "nothing calibrated"


def test_figure_maps_shows_gamma_sigma_and_spikes_of_a_neuron():
    r = analysis()
    images = [ax.images[0].get_array() for ax in panels("maps", [r])]
    expected = [
        [gamma["mean"] for gamma in r["gamma"].values()],
        list(r["sigma"].values()),
        [[x / r["neurons"][name] for x in y] for name, y in r["spikes"].items()],
    ]
    for image, values in zip(images, expected, strict=True):
        np.testing.assert_allclose(image, values)
    assert len(panels("maps", [r | {"sigma": None}])) == 2


def test_figure_energy_counts_an_analog_input_in_full():
    r = analysis()
    layers = r["energy"]["layers"]
    layers[0]["analog"] = True
    (ax,) = panels("energy", [r])
    snn, ann = ([bar.get_height() for bar in bars] for bars in ax.containers)
    assert snn == pytest.approx([1e-6 * x["operations"] * (4.6 if x["analog"] else 0.9) for x in layers])
    assert ann == pytest.approx([1e-6 * x["multiply_adds"] * 4.6 for x in layers])


# ---- What can be drawn, and what is refused ---------------------------------------------------------


def test_all_that_can_be_drawn_is_and_of_the_nets_that_can(tmp_path):
    nets = [analysis(), analysis("bn", gamma=False, seed=1)]
    paths = figures.draw(nets, tmp_path / "new")
    names = [f"fig{number}.{kind}" for number in figures.FIGURES for kind in ("png", "svg")]
    assert [path.name for path in paths] == names
    assert sorted(names) == sorted(path.name for path in (tmp_path / "new").iterdir())
    chosen = dict(figures.drawable(nets))
    assert [r["label"] for r in chosen["4"]] == ["bntt"]
    assert [r["label"] for r in chosen["5"]] == ["bntt", "bn"]


WITHOUT = {"norm_input": None, "noise": None, "attack": None, "corruptions": None}


@pytest.mark.parametrize(
    ("number", "nets", "words"),
    [
        *(
            (n, [analysis(), analysis("bn", gamma=False)], f"figure {n} .* and bn has none")
            for n in ("4", "6", "7", "maps")
        ),
        *(
            (n, [analysis(), analysis("bn", dataset="cifar100")], f"figure {n} .* cifar10 and cifar100")
            for n in ("1", "5", "8", "exits")
        ),
        ("2", [analysis() | {"surrogate": None}], "figure 2 needs a surrogate derivative, and bntt has none"),
        ("3", [analysis() | WITHOUT], "figure 3 needs the input of a norm, and bntt has none"),
        ("8", [analysis() | {"noise": None}], "figure 8 needs accuracies under noise, and bntt has none"),
        ("8", [analysis() | {"attack": []}], "figure 8 needs accuracies under attack, and bntt has none"),
        ("9", [analysis()], "no figure 9: choose among 1 2 3"),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_refused_before_anything_is_written(number, nets, words, tmp_path):
    with pytest.raises(UserError, match=words):
        figures.draw(nets, tmp_path / "new", ["energy", number])
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the folder"):
        figures.draw([analysis()], tmp_path / "file" / "new", ["2"])


# ---- Reading -----------------------------------------------------------------------------------------


def saved(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize("r", [analysis(), analysis("bn", gamma=False) | WITHOUT | {"policies": None, "sigma": None}])
def test_an_analysis_is_read_as_it_was_written(r, tmp_path):
    assert figures.load(saved(tmp_path / "analysis.json", r)) == r


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{", "it is damaged"),
        ("[" * 100_000, "it is damaged"),
        ("[]", "is not an analysis"),
        ({"acc_full": 90.0}, "is not an analysis"),
        (analysis() | {"version": 2}, "is of version 2, and this program reads 1: run analysis.py again"),
        ({key: value for key, value in analysis().items() if key != "energy"}, "it lacks energy"),
    ],
)
def test_what_is_no_whole_analysis_is_refused_in_one_sentence(value, words, tmp_path):
    with pytest.raises(UserError, match=words) as refusal:
        figures.load(saved(tmp_path / "analysis.json", value))
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        figures.load(tmp_path / "analysis.json")


# ---- The page -----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page says and loads."""

    def __init__(self, text):
        super().__init__()
        self.text, self.loads, self.tags, self.alts, self.cells = "", [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.loads += [attrs[name] for name in ("src", "href", "srcset", "data", "action") if name in attrs]
        self.alts += [attrs["alt"]] if "alt" in attrs else []

    def handle_data(self, data):
        self.text += data
        if self.tags[-1:] in (["td"], ["th"]):
            self.cells.append(data.strip())


def page_of(nets, folder):
    figures.page(nets, folder / "page.html")
    assert [path.name for path in folder.iterdir()] == ["page.html"]
    text = (folder / "page.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_loads_nothing(tmp_path):
    text, page = page_of(NETS["one net"], tmp_path)
    assert page.loads
    assert all(load.startswith("data:image/svg+xml;base64,") for load in page.loads)
    assert not {"script", "link", "iframe", "object"} & {*page.tags}
    assert not re.search(r"https?://|@import|url\(", text)
    assert page.alts == [figures.caption(number, NETS["one net"]) for number in figures.FIGURES]
    for load in page.loads:
        svg = base64.b64decode(load.split(",")[1])
        assert xml.etree.ElementTree.fromstring(svg).tag.endswith("svg")


def test_the_page_holds_the_numbers_and_their_conventions():
    r = analysis()
    r["accuracy"][-1], r["noise"][1]["acc"], r["attack"][2]["acc"] = 12.34, 23.45, 34.56
    r["energy"]["layers"][2]["operations"], r["corruptions"]["fog"][4] = 7654321.0, 45.67
    page = Page(pages.page([r], ["bntt"], []))
    assert {"12.34", "23.45", "34.56", "45.67", "7,654,321", "the worst", "8/255", "2.14.0", "0.3"} <= {*page.cells}
    words = " ".join(page.text.split())
    for part in (
        energy.CONVENTION,
        "multiply-accumulate (MAC) takes 4.6 pJ and an accumulate (AC) 0.9 pJ, 32 bits at 45 nm (Horowitz 2014)",
        energy.CAVEAT,
    ):
        assert part in words


def test_the_page_is_light_and_dark():
    text = pages.page([analysis()], ["bntt"], [])
    assert "color-scheme: light dark" in text
    assert "prefers-color-scheme: dark" in text


def test_all_text_of_an_analysis_is_escaped(tmp_path):
    r = analysis()
    for policy in r["policies"].values():
        policy["calibrated"]["mean_steps_by_class"] = {"<b>": 3.0}
    evil = '"><script>x</script>'
    r |= {
        "label": evil,
        "class_accuracy": {"<b>": 50.0},
        "config": {evil: evil},
        "environment": {"k": {evil: ["\ud800"]}},
    }
    r["data"]["dataset"] = evil
    r["energy"]["layers"][0]["name"] = r["attack"][0]["kind"] = evil
    text, page = page_of([r], tmp_path)
    assert not {"script", "b"} & {*page.tags}
    assert "<b>" in page.cells
    assert evil in page.cells


def test_the_page_shows_nets_of_two_data_sets_apart(tmp_path):
    nets = [analysis(), analysis(dataset="cifar100")]
    _, page = page_of(nets, tmp_path)
    shown = [alt for alt in page.alts if alt.startswith("Figure 5")]
    assert [("cifar10," in alt, "cifar100," in alt) for alt in shown] == [(True, False), (False, True)]


def test_a_net_with_little_to_show_has_a_page(tmp_path):
    _, page = page_of([analysis("bn", gamma=False) | WITHOUT | {"policies": None, "sigma": None}], tmp_path)
    assert len(page.alts) == len(["1", "2", "5", "exits", "energy"])
