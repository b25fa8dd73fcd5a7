"""scripts/make_claims.py: what it makes of runs, against numbers worked out by hand."""

import json

import make_claims
import pytest
import torch
import yaml
from conftest import ROOT, call
from make_tables import flags_of

NET = "train.py --dataset cifar10 --arch vgg9 --num_steps 4 --num_epochs 2 --batch_size 10"
FALLING = {"conv1": [0.9, 0.8, 0.4], "fc1": [0.5, 0.6, 0.6, 0.9, 0.4, 0.5]}  # late / middle 0.5 and 0.45 / 0.75 = 0.6


class Place:
    def __init__(self, folder):
        self.results = folder / "claims"
        self.results.mkdir()

    def run(self, name, seed, acc=50.0, flags="", gammas=None):
        folder = self.results / name / f"seed{seed}"
        folder.mkdir(parents=True)
        command = f"{NET} {flags}"
        config = flags_of(command, folder) | {"seed": seed}
        result = {k: config[k] for k in ("dataset", "arch", "norm", "num_steps", "seed")}
        result |= {"test_acc": acc, "count": 100, "epoch": 2, "train_images": 50}
        exits = {"gamma_threshold": 0.1, "exit_step": 4, "num_steps": 4, "acc_exit": acc, "count": 100}
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "environment.json").write_text(json.dumps({"command": f"{command} --seed {seed}"}))
        if gammas:
            (folder / "early_exit.json").write_text(json.dumps(exits | {"mean_gamma": gammas}))

    def rows(self, page="claims.md", head="in the paper"):
        outcome = call(make_claims.main, "--results", self.results)
        assert outcome.code == 0, outcome.err
        text = (self.results.parent / page).read_text()
        lines = text.split(f"| {head} |")[1].split("\n\n")[0].splitlines()[2:]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.mark.parametrize(
    ("theirs", "seen", "verdict"),
    [
        ([40.0, 41.0], "+10.00 (+10.00 to +10.00)", "holds"),
        ([60.0, 61.0], "-10.00 (-10.00 to -10.00)", "does not"),
        ([49.0, 52.0], "+0.00 (-12.71 to +12.71)", "cannot be told at this scale"),
    ],
)
def test_a_claim_that_one_is_better_is_judged_by_the_interval_of_the_difference(place, theirs, seen, verdict):
    for seed, (acc, other) in enumerate(zip([50.0, 51.0], theirs, strict=True)):
        place.run("base", seed, acc)
        place.run("bn", seed, other, "--norm bn")
    (row,) = place.rows()
    assert row[1] == "BNTT is better than one BN for all time-steps"
    assert (row[2].split(": ")[1], row[3:]) == (seen, ["2", verdict])


def test_one_seed_tells_nothing(place):
    place.run("base", 0, 90.0)
    place.run("none", 0, 10.0, "--norm none")
    (row,) = place.rows()
    assert row[2:] == ["[base](claims/base) - [none](claims/none): +80.00", "1", "cannot be told at this scale"]


def test_decay_alone_is_what_sgd_makes_of_a_gamma_without_gradient(place):
    place.run(
        "gamma_3.05", 0, flags="--lr 0.2 --gamma_weight_decay 0.05 --momentum 0.8 --lr_schedule cosine", gammas=FALLING
    )
    (run,) = make_claims.read_runs(place.results)["gamma_3.05"]
    gamma = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([gamma], lr=0.2, momentum=0.8, weight_decay=0.05)
    for step in range(10):  # 2 epochs of 5
        optimizer.param_groups[0]["lr"] = 0.2 if step < 5 else 0.1
        gamma.grad = torch.zeros_like(gamma)
        optimizer.step()
    assert make_claims.decayed(run) == pytest.approx(gamma.item(), rel=1e-12)


def test_the_fall_of_gamma_is_its_last_third_over_its_middle_third_in_the_mean_of_layers(place):
    for seed in (0, 1):
        place.run("gamma_0", seed, flags="--gamma_weight_decay 0", gammas=FALLING)
    (row,) = place.rows()
    assert row[2].endswith("without weight decay on gammas: 0.550 (0.550 to 0.550)")
    assert row[3:] == ["2", "holds"]
    rows = place.rows("claims/gamma.md", "exponent")
    assert rows[0][:6] == ["0", "0", "1", "0.583 to 0.700", "0.500 to 0.600", "50.00"]
    assert (place.results / "gamma.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("late", "verdict"),
    [([0.9, 0.91], "does not"), ([0.7, 0.9], "cannot be told at this scale"), ([0.6, 0.61], "holds")],
)
def test_gammas_that_rise_late_speak_against_the_exit_and_noise_for_nothing(place, late, verdict):
    for seed, last in enumerate(late):
        place.run("gamma_0", seed, flags="--gamma_weight_decay 0", gammas={"conv1": [1.3, 0.8, last]})
    assert [row[4] for row in place.rows()] == [verdict]


def test_steps_that_training_cannot_reach_do_not_count(place):
    gammas = [1.0, 0.8, 0.8, 0.4, 1.0, 1.0, 1.0]
    assert make_claims.late_over_middle({"conv1": gammas}) == {"conv1": 0.5}
    for seed in (0, 1):
        for name in ("gamma_0", "fire_first"):
            place.run(
                name, seed, flags="--gamma_weight_decay 0", gammas={"conv1": gammas, "conv2": [1.0, 1.0, *gammas]}
            )
    assert [row[2:5] for row in place.rows("claims/order.md", "order")] == 4 * [["2", "4", "+2.00"]]


def test_the_check_of_the_pages_writes_nothing(place):
    place.run("gamma_0", 0, flags="--gamma_weight_decay 0", gammas=FALLING)
    outcome = call(make_claims.main, "--results", place.results, "--check")
    assert (
        outcome.code,
        [path.name for path in place.results.parent.rglob("*.*") if path.suffix in (".md", ".png")],
    ) == (1, [])
    assert "run python scripts/make_claims.py" in outcome.out[0]


@pytest.mark.parametrize(
    ("flags", "gammas", "said"),
    [
        ("--gamma_weight_decay 0", None, "gamma_0: run early_exit.py on its best.pth.tar first"),
        ("", FALLING, "gamma_0: its command must name --gamma_weight_decay"),
    ],
)
def test_runs_that_cannot_be_read_are_named(place, flags, gammas, said):
    place.run("gamma_0", 0, flags=flags, gammas=gammas)
    outcome = call(make_claims.main, "--results", place.results)
    assert outcome.code == 2
    assert said in outcome.err[-1]


def test_averaged_statistics_are_compared_with_averaged_ones(place):
    for seed in (0, 1):
        place.run("base", seed, 50.0)
        place.run("bn", seed, 40.0, "--norm bn")
        (place.results / f"base/seed{seed}/averaged.json").write_text('{"top1": 51.0}')
        (place.results / f"bn/seed{seed}/averaged.json").write_text('{"top1": 49.5}')
    stored, averaged = place.rows()
    assert stored[2].endswith(": +10.00 (+10.00 to +10.00)")
    assert averaged[1] == "the same, both tested with averaged statistics"
    assert averaged[2].endswith(": +1.50 (+1.50 to +1.50)")


def test_the_setting_is_that_of_the_runs(place):
    place.run("base", 0, flags="--img_size 16")
    place.run("bn", 0, flags="--norm bn")
    place.rows()
    words = "base: vgg9, cifar10 at 16x16, poisson, T = 4, 50 training images, 2 epochs, 100 test images."
    assert words in (place.results.parent / "claims.md").read_text()


def test_the_delay_of_peaks_is_compared_between_the_orders(place):
    later = {"conv1": [0.9, 0.5, 0.5, 0.5], "conv2": [0.5, 0.9, 0.5, 0.5], "fc1": [0.5, 0.5, 0.9, 0.5]}
    same = dict.fromkeys(later, later["conv1"])
    for seed in (0, 1):
        place.run("gamma_0", seed, flags="--gamma_weight_decay 0", gammas=same)
        place.run("fire_first", seed, flags="--gamma_weight_decay 0 --spike_order fire_first", gammas=later)
    row = next(row for row in place.rows() if row[0] == "figs. 1C, 6")
    assert row[2].endswith("firing first less integrating first: +1.00 (+1.00 to +1.00)")
    assert [r[1:] for r in place.rows("claims/order.md", "order")][::2] == [
        ["0", "1", "1", "1", "+0.00"],
        ["0", "1", "2", "3", "+1.00"],
    ]


def test_accuracy_stands_by_encoding_and_steps(place):
    place.run("T4", 0, 40.0)
    place.run("T4", 1, 42.0)
    place.run("direct_T6", 0, 60.0, "--encoding direct --num_steps 6")
    rows = place.rows(head="encoding")
    assert rows[0] == ["Poisson, ternary", "41.00 ± 1.41", "-", "-", "-"]
    assert rows[2] == ["direct", "-", "60.00", "-", "-"]


def test_the_pages_of_our_own_runs_are_up_to_date():
    if not (ROOT / "results" / "claims").exists():
        pytest.skip("no claim was put to the test yet")
    assert call(make_claims.main, "--check").code == 0


def test_folding_makes_three_lines(place):
    layer = {"name": "conv1", "sigma": [1.0, 1.0, 1.0], "mu_over_sigma": [0.5, 0.7, 0.6], "differ": {"eq. 15": 40.0}}
    layers = [layer, layer | {"name": "fc1", "sigma": [1.0, 1.0, 4.0], "mu_over_sigma": [0.05] * 3}]
    found = {"count": 1000, "layers": layers, "accuracy": {"eq. 15": {"difference": -3.0, "half_interval": 1.0}}}
    (place.results / "folding.json").write_text(json.dumps(found))
    rows = [row for row in place.rows() if row[0].startswith("3.3")]
    assert [row[2].replace("(claims/folding.md)", "") for row in rows] == [
        "[off its mean] by up to 100 % (fc1)",
        "[absolute mu over sigma]: 0.05 to 0.60, by layer",
        "[accuracy] -3.00 (-4.00 to -2.00); spikes of a layer that differ: 40 to 40 %",
    ]
    assert [row[3:] for row in rows] == [["1 net, 1,000 images", "does not"]] * 3


def test_robustness_is_told_of_the_worst_attack_and_judged_beside_the_net_without_spikes(place):
    for name, acc in (("bntt_T25", 40.0), ("ann", 10.0)):
        (place.results / "robustness" / name).mkdir(parents=True)
        attack = {"kind": "fgsm", "eps": 8 / 255, "steps": 1, "count": 100}
        attack = [attack | {"acc": acc + more} for more in (5.0, 8.0, 0.0)]  # two widths, and right under both
        result = {"accuracy": [50.0, 90.0], "data": {"count": 1000}, "attack": attack}
        result["noise"] = [{"sigma": 0.1, "acc": acc, "count": 1000}] if name == "ann" else None
        (place.results / "robustness" / name / "analysis.json").write_text(json.dumps(result))
    (row,) = (row for row in place.rows() if row[0] == "4.7")
    half = 1.96 * (40 * 60 / 100 + 10 * 90 / 100) ** 0.5
    assert row[1:3] == [
        "BNTT, 25 Poisson steps, is more robust than no spikes: FGSM, 8/255",
        f"[bntt_T25 - ann](claims/robustness.md): +30.00 ({30 - half:+.2f} to {30 + half:+.2f})",
    ]
    assert row[3:] == ["1 net, 100 images", "holds"]
    assert place.rows("claims/robustness.md", "images") == [
        ["as they are", "90.0 (n = 1,000)", "90.0 (n = 1,000)"],
        ["noise, sigma 0.1", "10.0 (n = 1,000)", "-"],
        ["FGSM, 8/255", "10.0 (n = 100)", "40.0 (n = 100)"],
    ]
