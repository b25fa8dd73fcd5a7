"""scripts/make_claims.py: what it makes of runs, against numbers worked out by hand."""

import json

import make_claims
import pytest
import torch
import yaml
from conftest import ROOT, call
from make_tables import flags_of

NET = "train.py --dataset cifar10 --arch vgg9 --num_steps 4 --num_epochs 2 --batch_size 10"
FALLING = {"conv1": [1.0, 0.8, 0.6, 0.4], "fc1": [0.5, 1.0, 1.0, 0.8]}  # late / peak 0.4 and 0.8


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


def test_the_fall_of_gamma_is_the_last_over_the_largest_in_the_mean_of_layers(place):
    for seed in (0, 1):
        place.run("gamma_0", seed, flags="--gamma_weight_decay 0", gammas=FALLING)
    (row,) = place.rows()
    assert row[2:] == [
        "[late / peak](claims/gamma.md) without weight decay on gammas: 0.600 (0.600 to 0.600)",
        "2",
        "holds",
    ]
    rows = place.rows("claims/gamma.md", "exponent")
    assert rows[0][:6] == ["0", "0", "1", "0.700 to 0.825", "0.400 to 0.800", "50.00"]
    assert (place.results / "gamma.png").stat().st_size > 1000


def test_gammas_that_do_not_fall_speak_against_the_exit(place):
    for seed in (0, 1):
        place.run("gamma_0", seed, flags="--gamma_weight_decay 0", gammas={"conv1": [0.5, 0.7, 0.9, 1.0]})
    (row,) = place.rows()
    assert row[4] == "cannot be told at this scale"  # 1.000: as large as the largest


def test_the_delay_of_peaks_is_compared_between_the_orders(place):
    later = {"conv1": [1.0, 0.5, 0.5, 0.5], "conv2": [0.5, 1.0, 0.5, 0.5], "fc1": [0.5, 0.5, 1.0, 0.5]}
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
