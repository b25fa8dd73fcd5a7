"""scripts/make_claims.py and its claim_*.py: what they make of runs, against numbers worked out by hand."""

import json
import math
import re

import claim_gammas
import claim_gammas_page
import claim_gradients
import claim_order
import claim_pairs
import claim_parts
import make_claims
import pytest
import torch
import yaml
from conftest import ROOT, call
from make_tables import flags_of, wilson

import exits
import records

NET = "train.py --dataset cifar10 --arch vgg9 --num_steps 4 --num_epochs 2 --batch_size 10"
OPEN = "cannot be told at this scale"
FALLING = {"conv1": [0.9, 0.8, 0.4], "fc1": [0.5, 0.6, 0.6, 0.9, 0.4, 0.5]}  # late / middle 0.5 and 0.45 / 0.75 = 0.6
SWEEP = [  # after steps 1 and 2 no gamma is above 0.9 and 0.4
    {"exit_step": 1, "acc": 10.0, "threshold_above": 0.9, "threshold_up_to": None},
    {"exit_step": 2, "acc": 20.0, "threshold_above": 0.4, "threshold_up_to": 0.9},
    {"exit_step": 4, "acc": 40.0, "threshold_above": 0.0, "threshold_up_to": 0.4},
]

LATER = [SWEEP[2], {"exit_step": 3, "acc": 30.0, "threshold_above": 0.4, "threshold_up_to": None}]


KEYS = "norm", "deviation"
NONE, DECAY = "--gamma_weight_decay 0", "--gamma_weight_decay 0.1"
FIRE = "--spike_order fire_first"
HYBRID = "--norm none --neuron learnt_lif --leak_mem 0.99 --encoding direct --optimizer adam --weight_decay 0.0001"
START = "the runs of hybrid: init_from is"
LENGTH = "exponent | epochs x images"


def early(step, acc):
    """The sweep of a net that exits so, with this accuracy, at each threshold up to 0.4."""
    return [
        {"exit_step": 1, "acc": 10.0, "threshold_above": 0.4, "threshold_up_to": None},
        {"exit_step": step, "acc": acc, "threshold_above": 0.0, "threshold_up_to": 0.4},
    ]


def as_logged(norms):
    """What train.py logs of {layer: [mean, deviation]}."""
    return {f"gradient_{key}": {layer: pair[i] for layer, pair in norms.items()} for i, key in enumerate(KEYS)}


class Place:
    def __init__(self, folder):
        self.results = folder / "claims"
        self.results.mkdir()

    def run(self, name, seed, acc=50.0, flags="", gammas=None, norms=(), sweep=SWEEP):
        folder = self.results / name / f"seed{seed}"
        folder.mkdir(parents=True)
        command = f"{NET} {flags}"
        config = flags_of(command, folder) | {"seed": seed}
        result = {k: config[k] for k in ("dataset", "arch", "norm", "num_steps", "seed")}
        result |= {"test_acc": acc, "count": 100, "epoch": 2, "train_images": 50}
        found = {"gamma_threshold": 0.1, "exit_step": 4, "num_steps": 4, "acc_exit": acc, "count": 100}
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "environment.json").write_text(json.dumps({"command": f"{command} --seed {seed}"}))
        if gammas:
            found |= {"mean_gamma": gammas, "acc_by_steps": [10.0, 20.0, 30.0, 40.0], "sweep": sweep}
            (folder / "early_exit.json").write_text(json.dumps(found))
        lines = [{"epoch": i, **as_logged(norm)} for i, norm in enumerate(norms, 1)]
        (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def rows(self, page="claims.md", head="bears on"):
        outcome = call(make_claims.main, "--results", self.results)
        assert outcome.code == 0, outcome.err
        text = (self.results.parent / page).read_text()
        lines = text.split(f"| {head} |")[1].split("\n\n")[0].splitlines()[2:]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def row_of(place, words):
    return next(row for row in place.rows() if words in row[1])


def page_of(place, name="gamma.md"):
    return (place.results / name).read_text()


def words_of(place, name="gamma.md"):
    """A page's text, as if in one line."""
    return " ".join(page_of(place, name).split())


@pytest.mark.parametrize(
    ("theirs", "seen", "verdict"),
    [
        ([40.0, 41.0], "+10.00 (+10.00 to +10.00)", "holds, in 2 seeds"),
        ([60.0, 61.0], "-10.00 (-10.00 to -10.00)", "does not hold, in 2 seeds"),
        ([49.0, 52.0], "+0.00 (-12.71 to +12.71)", OPEN),
    ],
)
def test_a_claim_that_one_is_better_is_judged_by_the_interval_of_the_difference(place, theirs, seen, verdict):
    for seed, (acc, other) in enumerate(zip([50.0, 51.0], theirs, strict=True)):
        place.run("base", seed, acc)
        place.run("bn", seed, other, "--norm bn")
    (row,) = place.rows()
    assert row[1] == "BNTT is better than one BN for all time-steps"
    assert (row[2].split(": ")[1], row[3:]) == (f"[{seen}](claims/pairs.png)", ["2", verdict])


def test_one_seed_tells_nothing(place):
    place.run("base", 0, 90.0)
    place.run("none", 0, 20.0, "--norm none")
    (row,) = place.rows()
    assert row[2:] == ["[base](claims/base) - [none](claims/none): [+70.00](claims/pairs.png)", "1", OPEN]


def test_decay_alone_is_what_sgd_makes_of_a_gamma_without_gradient(place):
    place.run(
        "gamma_3.05", 0, flags="--lr 0.2 --gamma_weight_decay 0.05 --momentum 0.8 --lr_schedule cosine", gammas=FALLING
    )
    (run,) = make_claims.read_claims(place.results)["gamma_3.05"]
    gamma = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([gamma], lr=0.2, momentum=0.8, weight_decay=0.05)
    for step in range(10):  # 2 epochs of 5
        optimizer.param_groups[0]["lr"] = 0.2 if step < 5 else 0.1
        gamma.grad = torch.zeros_like(gamma)
        optimizer.step()
    assert claim_gammas.decayed(run) == pytest.approx(gamma.item(), rel=1e-12)


def test_the_fall_of_gamma_is_its_last_third_over_its_middle_third_in_the_mean_of_layers(place):
    for seed in (0, 1):
        place.run("gamma_0", seed, flags="--gamma_weight_decay 0", gammas=FALLING)
    row = place.rows()[0]
    assert row[2].endswith("without weight decay on gammas: 0.55000 (0.55000 to 0.55000)")
    assert row[3:] == ["2", "holds, in 2 seeds"]
    rows = place.rows("claims/gamma.md", f"{LENGTH} | seed")  # fc1: mean 3.5 / 6; conv1: 2.1 / 3
    assert rows[0] == ["0", "2 x 50", "0", "0.583 to 0.700", "0.4 to 0.9", "0.5000 to 0.6000", "50.00", "none: 40.00"]


@pytest.mark.parametrize(
    ("late", "verdict"),
    [
        ([0.9, 0.91], "does not hold, in 2 seeds"),
        ([0.7, 0.9], OPEN),
        ([0.6, 0.61], "holds, in 2 seeds"),
        ([0.796, 0.796], "does not hold, in 2 seeds"),  # half a percent is no fall to speak of
    ],
)
def test_gammas_that_rise_late_speak_against_the_exit_and_noise_for_nothing(place, late, verdict):
    for seed, last in enumerate(late):
        place.run("gamma_0", seed, flags="--gamma_weight_decay 0", gammas={"conv1": [1.3, 0.8, last]})
    assert row_of(place, "gammas fall late")[4] == verdict


def test_steps_that_training_cannot_reach_do_not_count(place):
    gammas = [1.0, 0.8, 0.8, 0.4, 1.0, 1.0, 1.0]
    assert claim_gammas.late_over_middle({"conv1": gammas}) == {"conv1": 0.5}
    for seed in (0, 1):
        for name in ("gamma_0", "fire_first"):
            place.run(
                name, seed, flags="--gamma_weight_decay 0", gammas={"conv1": gammas, "conv2": [1.0, 1.0, *gammas]}
            )
    assert [row[3:6] for row in place.rows("claims/order.md", "order")] == 4 * [["2", "4", "+2.00"]]


def test_the_check_of_the_pages_writes_nothing(place):
    place.run("gamma_0", 0, flags="--gamma_weight_decay 0", gammas=FALLING)
    outcome = call(make_claims.main, "--results", place.results, "--check")
    assert (
        outcome.code,
        [path.name for path in place.results.parent.rglob("*.*") if path.suffix in (".md", ".png")],
    ) == (1, [])
    assert "run python scripts/make_claims.py" in outcome.out[0]


@pytest.mark.parametrize(
    ("name", "flags", "gammas", "said"),
    [
        ("gamma_0", NONE, None, "gamma_0: run early_exit.py on its best.pth.tar first"),
        ("gamma_0", "", FALLING, "gamma_0: its command must name --gamma_weight_decay"),
        ("published", "", FALLING, "published: its command must name --gamma_weight_decay"),
        ("fire_first_3.05", FIRE, FALLING, "fire_first_3.05: its command must name --gamma_weight_decay"),
    ],
)
def test_runs_that_cannot_be_read_are_named(place, name, flags, gammas, said):
    place.run(name, 0, flags=flags, gammas=gammas)
    outcome = call(make_claims.main, "--results", place.results)
    assert outcome.code == 2
    assert said in outcome.err[-1]


def test_averaged_statistics_are_compared_with_averaged_ones(place):
    for seed in (0, 1):
        place.run("base", seed, 50.0)
        place.run("bn", seed, 40.0, "--norm bn")
        (place.results / f"base/seed{seed}/averaged.json").write_text('{"top1": 51.0, "count": 100}')
        (place.results / f"bn/seed{seed}/averaged.json").write_text('{"top1": 49.5, "count": 100}')
    stored, averaged = place.rows()
    assert "[+10.00 (+10.00 to +10.00)]" in stored[2]
    assert averaged[1] == "BNTT is better than one BN, both with averaged statistics"
    assert "[+1.50 (+1.50 to +1.50)]" in averaged[2]


def test_the_setting_is_that_of_the_runs(place):
    place.run("base", 0, flags="--img_size 16")
    place.run("bn", 0, flags="--norm bn --img_size 16")
    place.rows()
    words = "- base: vgg9, cifar10 at 16x16, poisson, T = 4, 50 training images, 2 epochs, 100 test images\n"
    assert words in (place.results.parent / "claims.md").read_text()


def test_accuracy_stands_by_norm_input_and_steps(place):
    place.run("T4", 0, 40.0)
    place.run("T4", 1, 42.0)
    place.run("direct_T25", 0, 60.0, "--encoding direct --num_steps 25")
    place.run("bn_T100", 0, 50.0, "--norm bn --num_steps 100")
    (place.results / "bn_T100/seed0/averaged.json").write_text('{"top1": 55.0, "count": 100}')
    assert place.rows(head="norm, input") == [
        ["BNTT, Poisson, ternary", "41.00 ± 1.41 (n = 2)", "-", "-"],
        ["BNTT, direct", "-", "60.00 (n = 1)", "-"],
        ["one BN, stored statistics", "-", "-", "50.00 (n = 1)"],
        ["one BN, averaged statistics", "-", "-", "55.00 (n = 1)"],
    ]
    assert "claims/steps.png" in (place.results.parent / "claims.md").read_text()


def test_the_pages_of_our_own_runs_are_up_to_date():
    if not (ROOT / "results" / "claims").exists():
        pytest.skip("no claim was put to the test yet")
    assert call(make_claims.main, "--check").code == 0


def test_folding_makes_four_lines(place):
    layer = {"name": "conv1", "sigma": [1.0, 1.0, 1.0], "mu_over_sigma": [0.5, 0.7, 0.6]}
    layer["differ"] = {"eq. 15": 40.0, "mean kept": 10.0}
    layers = [layer, layer | {"name": "fc1", "sigma": [4.0, 1.0, 1.0], "mu_over_sigma": [0.05] * 3}]
    ways = {"eq. 15": -3.0, "mean kept": -1.5}
    found = {"count": 1000, "layers": layers}
    found["accuracy"] = {way: {"difference": lost, "half_interval": 1.0} for way, lost in ways.items()}
    (place.results / "folding.json").write_text(json.dumps(found))
    rows = [row for row in place.rows() if row[0].startswith("3.3")]
    assert [row[2].replace("(claims/folding.md)", "") for row in rows] == [
        "[off its mean] by up to 100 % (fc1); over the second half of the steps by up to 0 %",
        "[absolute mu over sigma]: 0.05 to 0.60, by layer",
        "[accuracy] -3.00 (-4.00 to -2.00); spikes of a layer that differ: 40 to 40 %",
        "[accuracy] -1.50 (-2.50 to -0.50); spikes of a layer that differ: 10 to 10 %",
    ]
    images = "one net, 1,000 images"
    fails = "does not hold, in one net"
    assert [row[3:] for row in rows] == [["1", fails], ["1", fails], [images, fails], [images, OPEN]]


def robustness(place, name, clean, noise=(), fgsm=()):
    """What scripts/robustness.sh leaves of a net. fgsm: {eps of 255: accuracies by width, None: right under each}."""
    (place.results / "robustness" / name).mkdir(parents=True)
    attack = [
        {"kind": "fgsm", "eps": eps / 255, "steps": 1, "count": 100, "width": width, "acc": acc}
        for eps, widths in dict(fgsm).items()
        for width, acc in widths.items()
    ]
    result = dict.fromkeys(records.KEYS) | {"version": records.VERSION, "attack": attack}
    result |= {"accuracy": [50.0, clean], "data": {"count": 1000}}
    result["noise"] = [{"sigma": sigma, "acc": acc, "count": 1000} for sigma, acc in dict(noise).items()]
    (place.results / "robustness" / name / "analysis.json").write_text(json.dumps(result))


def test_robustness_is_told_of_the_worst_attack_and_judged_beside_the_net_without_spikes(place):
    robustness(place, "bntt_T25", 90.0, fgsm={8: {1: 45.0, None: 40.0, 2: 48.0}})
    robustness(place, "ann", 90.0, {0.1: 10.0}, {8: {1: 15.0, None: 10.0, 2: 18.0}})
    (row,) = (row for row in place.rows() if row[0] == "4.7")
    low = 30 - math.hypot(40 - wilson(40, 100)[0], wilson(10, 100)[1] - 10)  # Newcombe's
    high = 30 + math.hypot(wilson(40, 100)[1] - 40, 10 - wilson(10, 100)[0])
    assert row[1:3] == [
        "BNTT, 25 Poisson steps, is more robust than no spikes: FGSM",
        f"[bntt_T25 - ann](claims/robustness.md) 8/255: +30.0 ({low:+.1f} to {high:+.1f}); as they are: +0.0",
    ]
    assert row[3:] == ["one pair of nets, 100 images", "holds, in one pair of nets"]
    assert place.rows("claims/robustness.md", "images") == [
        ["as they are", "90.0 (n = 1,000)", "90.0 (n = 1,000)"],
        ["noise, sigma 0.1", "10.0 (n = 1,000)", "-"],
        ["FGSM, 8/255", "10.0 (n = 100)", "40.0 (n = 100)"],
    ]


@pytest.mark.parametrize(
    ("clean", "noise", "answer"),
    [
        (90.0, {0.1: 40.0, 0.2: 30.0}, "holds, in one pair of nets"),
        (90.0, {0.1: 40.0, 0.2: 21.0}, OPEN),  # at one strength it cannot be told
        (90.0, {0.1: 10.0, 0.2: 10.0}, "does not hold, in one pair of nets"),
        (94.0, {0.1: 40.0, 0.2: 30.0}, OPEN),  # more accurate before any noise
    ],
)
def test_robustness_holds_at_every_strength_between_nets_that_are_equally_accurate(clean, noise, answer, place):
    robustness(place, "base_3_16", clean, noise)
    robustness(place, "none_16", 90.0, {0.1: 20.0, 0.2: 20.0})
    (row,) = (row for row in place.rows() if row[0] == "4.7")
    assert row[4] == answer


# ---- Gammas --------------------------------------------------------------------------------------


def test_gammas_are_set_beside_what_decay_alone_makes_of_them(place):
    flags = "--lr 0.1 --gamma_weight_decay 1 --momentum 0 --lr_schedule cosine"
    place.run("gamma_3.05", 0, flags=flags, gammas={"conv1": [0.9, 0.6, 0.3]})
    alone = 0.9**5 * 0.95**5  # 2 epochs of 5 steps
    told = [
        "0.75",
        "2 x 50",
        "1",
        "0.075",
        f"{math.exp(-0.75):.3g}",
        f"{alone:.3g}",
    ]  # 0.1 x 5 + 0.05 x 5, by 10
    assert place.rows("claims/gamma.md", f"{LENGTH} | gamma_weight_decay") == [told]
    (row,) = place.rows("claims/gamma.md", f"{LENGTH} | seed")
    assert row[4] == f"{0.3 / alone:.3g} to {0.9 / alone:.3g}"


def test_the_ratios_of_gamma_stand_by_layer_and_decay(place):
    for seed, last in enumerate((0.4, 0.2)):
        place.run("gamma_0", seed, flags="--gamma_weight_decay 0", gammas={"conv1": [0.8, 0.5, last]})
    assert place.rows("claims/gamma.md", f"{LENGTH} | n") == [["0", "2 x 50", "2", "0.6000 ± 0.2828"]]  # 0.8, 0.4


@pytest.mark.parametrize(
    ("name", "whose"), [("gamma_3.05", "the published command's"), ("gamma_18.3", "the paper's")], ids=["3.05", "18.3"]
)
@pytest.mark.parametrize(
    ("late", "verdict"), [([0.7, 0.71], "does not hold, in 2 seeds"), ([0.1, 0.11], "holds, in 2 seeds")]
)
def test_decay_that_lowers_late_over_middle_makes_gammas_fall(place, name, whose, late, verdict):
    for seed, last in enumerate(late):
        place.run("gamma_0", seed, flags="--gamma_weight_decay 0", gammas={"conv1": [0.9, 0.8, 0.36]})
        place.run(name, seed, flags=DECAY, gammas={"conv1": [0.05, 0.1, last / 10]})
    row = row_of(place, "makes them fall late, or further")
    assert row[1].startswith(f"the weight decay of {whose} exponent ({name.removeprefix('gamma_')}) on gammas makes")
    mean, half = sum(late) / 2 - 0.45, 12.706 * 0.005  # deviation 0.01 / sqrt(2)
    told = f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"
    assert row[2] == f"[late / middle](claims/gamma.md) {mean + 0.45:.3f} with it, 0.450 without: {told}"
    assert row[3:] == ["2", verdict]


def test_exits_stand_by_threshold_and_by_exit_step(place):
    for seed in (0, 1):
        place.run("gamma_0", seed, flags="--gamma_weight_decay 0", gammas=FALLING, sweep=LATER if seed else SWEEP)
    head = f"{LENGTH} | at 0.02 | at 0.05 | at 0.1 | at 0.2 | at 0.3 | at 0.5 | at 0.7 | at 1"
    (row,) = place.rows("claims/gamma.md", head)
    assert row[:2] == ["0", "2 x 50"]
    assert row[6:] == ["none, none: 40.00 ± 0.00", "2, 3: 25.00 ± 7.07", "2, 3: 25.00 ± 7.07", "1, 3: 20.00 ± 14.14"]
    assert place.rows("claims/gamma.md", "exit step") == [
        ["1", "10.00 (above 0.900)", "-"],
        ["2", "20.00 (above 0.400, up to 0.900)", "-"],
        ["3", "-", "30.00 (above 0.400)"],
        ["none", "40.00 (above 0.00, up to 0.400)", "40.00 (above 0.00, up to 0.400)"],
    ]


def test_the_exponent_is_the_sum_of_rates_times_decay_over_one_minus_momentum():
    config = {"lr": 0.2, "lr_schedule": "cosine", "num_epochs": 2, "batch_size": 10, "momentum": 0.8}
    run = {"config": config | {"gamma_weight_decay": 0.05}, "train_images": 50}  # 5 steps at 0.2, 5 at 0.1
    assert claim_gammas.exponent(run) == pytest.approx(1.5 * 0.05 / 0.2)


def test_the_longer_runs_stand_beside_the_others_by_their_epochs_and_images(place):
    place.run("gamma_3.05", 0, flags=f"{DECAY} --lr 0.3 --momentum 0.9 --lr_schedule cosine", gammas=FALLING)
    place.run("published", 0, flags="--num_epochs 100 --lr 0.3 --gamma_weight_decay 0.0001", gammas=FALLING)
    expected = [["2.25", "2 x 50"], ["0.0783", "100 x 50"]]  # 5 x 0.3 x 1.5 and 5 x 0.3 x 52.21, by 0.1 and by 0.0001
    for more in ("gamma_weight_decay", "seed", "n", "at 0.02"):
        assert [row[:2] for row in place.rows("claims/gamma.md", f"{LENGTH} | {more}")] == expected


@pytest.mark.parametrize(
    ("dataset", "acc", "learnt"),
    [("cifar10", 19.9, False), ("cifar10", 20.0, True), ("cifar100", 1.99, False), ("cifar100", 2.0, True),
     ("digits", 20.0, True)],
)  # fmt: skip
def test_a_net_has_learnt_from_twice_chance_on(dataset, acc, learnt):
    assert claim_parts.learnt({"dataset": dataset, "test_acc": acc}) == learnt


def test_nets_that_did_not_learn_give_no_verdict_and_the_page_tells_which(place):
    for seed, acc in ((0, 10.0), (1, 14.71)):
        place.run("gamma_0", seed, flags=NONE, gammas=FALLING)
        place.run("gamma_18.3", seed, acc, DECAY, gammas=FALLING)
    row = row_of(place, "the weight decay of the paper's exponent (18.3)")
    assert "(18.3) on gammas did not learn: 10.00, 14.71 % (chance is 10 %)" in row[2]
    assert row[3:] == ["2", OPEN]
    text = words_of(place)
    assert "2 of 2 nets of exponent 1.65 did not learn: 10.00, 14.71 % (chance is 10 %)." in text
    assert text.count("14.71") == 1
    assert "Equal exponents in few steps are not the paper's condition" in text
    assert len(place.rows("claims/gamma.md", f"{LENGTH} | gamma_weight_decay")) == 2


def test_nets_that_did_not_learn_without_decay_have_no_condition_of_the_paper(place):
    place.run("gamma_0", 0, 12.0, flags=NONE, gammas=FALLING)
    place.rows()
    assert "1 of 1 nets of exponent 0 did not learn: 12.00 %" in words_of(place)
    assert "condition" not in words_of(place)


def test_a_learnt_net_is_on_the_page_without_those_of_its_row_that_did_not(place):
    for seed, acc in ((0, 12.0), (1, 50.0)):
        place.run("gamma_0", seed, acc, NONE, gammas=FALLING)
    assert [row[2] for row in place.rows("claims/gamma.md", f"{LENGTH} | seed")] == ["1"]


def test_exits_of_nets_that_did_not_learn_are_not_listed(place):
    place.run("gamma_0", 0, flags=NONE, gammas=FALLING)
    place.run("gamma_18.3", 0, 19.0, DECAY, gammas=FALLING)
    place.rows()
    assert page_of(place).count("| exit step |") == 1


def test_a_seed_that_did_not_learn_is_left_out_of_its_row(place):
    for seed, acc in ((0, 50.0), (1, 12.0), (2, 50.0)):
        place.run("gamma_0", seed, acc, NONE, gammas={"conv1": [1.3, 0.8, 0.4 if acc > 20 else 1.6]})
    row = row_of(place, "gammas fall late")
    assert row[2].endswith(": 0.50000 (0.50000 to 0.50000); left out, as they did not learn: 12.00 % (chance is 10 %)")
    assert row[3:] == ["2", "holds, in 2 seeds"]


@pytest.mark.parametrize(
    ("steps", "verdict"),
    [((3, 2), "holds, in 2 seeds"), ((4, 4), "does not hold, in 2 seeds"), ((3, 4), OPEN), ((3,), OPEN)],
)
def test_the_rule_exits_if_each_seed_does(place, steps, verdict):
    for seed, step in enumerate(steps):
        place.run("gamma_0", seed, flags=NONE, gammas=FALLING, sweep=early(step, 50.0))
    row = row_of(place, "the gamma rule at 0.1 exits before T, without weight decay on gammas")
    told = ", ".join("none" if step == 4 else str(step) for step in steps)
    assert row[2] == f"[exit steps](claims/gamma.md) {told} of 4"
    assert row[3:] == [str(len(steps)), verdict]


def test_the_exit_of_the_published_decay_is_told_with_what_it_costs(place):
    for seed, lost in enumerate((1.0, 3.0)):
        place.run("gamma_3.05", seed, 50.0, DECAY, FALLING, sweep=early(3, 50.0 - lost))
    row = row_of(place, "the gamma rule at 0.1 exits before T, with the weight decay of the published command's exp")
    cost = f"-2.00 ({-2 - 12.706:.2f} to {-2 + 12.706:+.2f})"  # deviation sqrt(2), over sqrt(2)
    assert row[2] == f"[exit steps](claims/gamma.md) 3, 3 of 4; accuracy there minus that of all steps: {cost}"
    assert row[4] == "holds, in 2 seeds"


def both_nets(place, sweep=None):
    """Two seeds without decay that never come near 0.1, and two with it."""
    decay = "--lr 1 --momentum 0 --gamma_weight_decay 0.4"  # 0.6 ** 5 x 0.96 ** 5 = 0.0634
    for seed in (0, 1):
        place.run("gamma_0", seed, 50.0 + seed, NONE, {"conv1": [0.95, 0.99, 1.01]}, sweep=early(4, 50.0 + seed))
        place.run("gamma_3.05", seed, 40.0, decay, {"conv1": [0.9, 0.5, 0.06]}, sweep=sweep or early(3, 39.0))


def short_of(place, name="gamma.md"):
    place.rows()
    return " ".join(page_of(place, name).split("\n\n")[1].split())


def test_the_page_begins_with_the_answer_to_its_title(place):
    both_nets(place)
    alone = 0.6**5 * 0.96**5
    assert short_of(place) == (
        "In short: without weight decay, 10 steps of training leave mean gammas at 0.950 to 1.010 (50.00, 51.00 % "
        "accuracy; exits at 0.1: none, none of 4); with that of exponent 2.2, 10 steps leave those of the last "
        f"time-step at {0.06 / alone:.2f} times what decay alone gives, in the mean of layers, and those of the middle "
        f"third at up to {0.5 / alone:.1f} times (40.00, 40.00 % accuracy; exits at 0.1: 3, 3 of 4); stopping at that "
        "exit costs 10.00 (10.00 to 10.00) points of accuracy with decay, and 10.00 (10.00 to 10.00) without (n = 2)."
    )


def test_longer_runs_are_told_after_the_others(place):
    both_nets(place)
    place.run("published_gamma_0", 0, flags=f"--num_epochs 100 {NONE}", gammas=FALLING)
    assert short_of(place).endswith(
        "without (n = 2); without weight decay, 500 steps of training leave mean gammas at 0.400 to 0.900 (50.00 % "
        "accuracy; exits at 0.1: none of 4)."
    )


def test_the_page_tells_how_many_last_steps_keep_a_gamma_of_1(place):
    place.run("gamma_0", 0, flags=NONE, gammas={"conv1": [0.9, 0.8, 0.7, 0.6, 1.0, 1.0], "fc1": [0.9] * 6})
    place.rows()
    assert "without decay, the last 0 to 2 steps of a layer keep a mean gamma of exactly 1." in words_of(place)


def test_without_an_exit_there_is_nothing_to_stop_at(place):
    both_nets(place, sweep=early(4, 40.0))
    assert "stopping" not in short_of(place)


def test_both_pages_tell_the_training_beside_that_of_the_published_command(place):
    place.run("gamma_0", 0, flags=f"{NONE} --lr 0.1 --lr_schedule cosine --weight_decay 0.0005", gammas=FALLING)
    place.run(
        "fire_first", 0, flags=f"{FIRE} {NONE} --lr 0.1 --lr_schedule cosine --weight_decay 0.0005", gammas=FALLING
    )
    place.rows()
    for page in ("gamma.md", "order.md"):
        text = words_of(place, page)
        assert (
            "Training: learning rate 0.1 (cosine schedule), batches of 10, momentum 0.9, weight decay 0.0005 of all "
            "weights but gammas, 10 steps. The published command (`configs/cifar10_vgg9.yaml`): learning rate 0.3 "
            "(step schedule), batches of 256, momentum 0.9, weight decay 0.0001 of all weights and gammas, 100 epochs."
        ) in text


def test_the_figure_of_gammas_has_a_row_on_one_axis_and_one_on_their_own(place, monkeypatch):
    both_nets(place)
    found, seen = make_claims.read_claims(place.results), []
    monkeypatch.setattr(claim_gammas_page, "legend", lambda axes, where: seen.append(axes))
    claim_gammas_page.page(found).figures["gamma.png"](place.results / "gamma.png")
    above, below = seen[0]
    assert above[0].get_ylim() == above[1].get_ylim()
    assert above[0].get_ylim()[0] <= 0
    assert below[0].get_ylim()[0] > 0.9


def test_exits_of_a_narrow_range_of_thresholds_are_not_told(place, monkeypatch):
    ends = [(0.0, 0.4, 4), (0.4, 0.405, 3), (0.405, 0.5, 2), (0.5, None, 1)]
    sweep = [{"exit_step": step, "acc": 10.0 * step, "threshold_above": low, "threshold_up_to": high}
             for low, high, step in ends]  # fmt: skip
    place.run("gamma_0", 0, flags=NONE, gammas=FALLING, sweep=sweep)
    place.run("gamma_3.05", 0, 10.0, flags=DECAY, gammas=FALLING)
    found, seen = make_claims.read_claims(place.results), []
    monkeypatch.setattr(claim_gammas_page, "legend", lambda axes, where: seen.append(axes))
    claim_gammas_page.page(found).figures["gamma_exits.png"](place.results / "exits.png")
    (line,) = seen[0][0][0].lines  # no other net learnt
    assert [*line.get_ydata()] == [10.0, 20.0, 30.0, 40.0]
    assert sorted(line.get_markevery()) == [0, 1]
    assert [row[0] for row in place.rows("claims/gamma.md", "exit step")] == ["1", "2", "none"]


def test_what_nets_that_did_not_learn_show_is_not_among_what_was_found(place):
    place.run("gamma_0", 0, 10.0, NONE, FALLING)
    place.rows()
    assert "In short" not in page_of(place)


def test_the_exit_at_a_threshold_is_that_of_the_rule():
    gammas = torch.tensor([[0.9, 0.5, 0.4, 0.2], [0.8, 0.9, 0.3, 0.1]], dtype=torch.float64)
    sweep = [
        {"exit_step": step, "threshold_above": low, "threshold_up_to": None if math.isinf(high) else high}
        for step, (low, high) in exits.sweep_thresholds(gammas).items()
    ]
    thresholds = (0.05, 0.2, 0.3, 0.4, 0.41, 0.9, 1.0)
    found = [claim_gammas.exit_at({"exit": {"sweep": sweep}}, threshold)["exit_step"] for threshold in thresholds]
    assert found == [exits.exit_step(gammas, threshold) for threshold in thresholds]


def test_steps_that_kept_a_gamma_of_one_are_counted_at_both_ends(place):
    gammas = {"conv1": [0.9, 0.8, 1.0, 1.0], "fc1": [1.0, 0.8, 0.7, 1.0], "fc2": [1.0, 1.0, 1.0, 1.0]}
    place.run("fire_first", 0, flags=f"{FIRE} {NONE}", gammas=gammas)
    place.run("gamma_0", 0, flags="--gamma_weight_decay 0", gammas=dict.fromkeys(gammas, [0.9, 1.0, 0.8, 0.7]))
    assert place.rows("claims/order.md", "steps kept at 1")[1:] == [
        ["fire first", "0", "0", "0 / 2 (3)", "1 / 1 (2)", "0 / 4 (1)"]  # layers from there to the output
    ]


def peaking(*steps):
    """Gammas of layers of four steps that peak at these, from 1: each peak is 0.9 where the mean is 0.6."""
    return {f"conv{i}": [0.9 if step == peak else 0.5 for step in range(1, 5)] for i, peak in enumerate(steps, 1)}


def test_peaks_that_come_later_with_depth_need_no_firing_first(place):
    for seed, steps in enumerate([(1, 2, 3), (1, 3, 4)]):  # slopes 1 and 1.5
        place.run("gamma_3.05", seed, flags=DECAY, gammas=peaking(*steps))
    (row,) = (row for row in place.rows() if row[0] == "figs. 1C, 6")
    assert row[1] == "deeper layers' gammas peak later, without firing first (nets that integrate first, exponent 3.05)"
    assert row[2].endswith(f", integrating first: +1.25 ({1.25 - 12.706 / 4:+.2f} to {1.25 + 12.706 / 4:+.2f})")
    assert row[4] == OPEN


@pytest.mark.parametrize(
    ("steps", "verdict"), [((1, 2, 3), "holds, in 2 seeds"), ((3, 2, 1), "does not hold, in 2 seeds")]
)
def test_the_slope_of_peaks_is_judged_by_its_sign(place, steps, verdict):
    for seed in (0, 1):
        place.run("gamma_3.05", seed, flags=DECAY, gammas=peaking(*steps))
    assert row_of(place, "deeper layers' gammas peak later")[4] == verdict


def test_the_delay_of_firing_first_is_that_beyond_integrating_first_under_the_same_decay(place):
    for seed in (0, 1):
        place.run("gamma_0", seed, flags=NONE, gammas=peaking(3, 2, 1))
        place.run("fire_first", seed, flags=f"{FIRE} {NONE}", gammas=peaking(1, 2, 3))
        place.run("gamma_3.05", seed, flags=DECAY, gammas=peaking(1, 1, 2))  # 0.5 steps a layer
        place.run("fire_first_3.05", seed, flags=f"{FIRE} {DECAY}", gammas=peaking(1, 2, 4))  # 1.5
    row = row_of(place, "firing first delays the peaks by more than the one step a layer")
    assert row[2].endswith("firing first less integrating first: +1.00 (+1.00 to +1.00)")
    assert row[3:] == ["2", OPEN]  # no more than by construction


@pytest.mark.parametrize(
    ("fire", "verdict"), [((1, 3, 4), "holds, in 2 seeds"), ((1, 1, 2), "does not hold, in 2 seeds")]
)
def test_firing_first_is_judged_beside_its_own_step_a_layer(place, fire, verdict):
    three_orders(place, (1, 1, 1), (1, 1, 1), fire=[fire, fire])
    assert row_of(place, "firing first delays the peaks")[4] == verdict


def test_flat_lines_have_no_delay_to_judge(place):
    flat = {layer: [0.51 if x == 0.9 else 0.5 for x in values] for layer, values in peaking(1, 2, 3).items()}
    for seed in (0, 1):
        place.run("gamma_3.05", seed, flags=DECAY, gammas=flat)
    assert row_of(place, "deeper layers' gammas peak later")[4] == OPEN


def test_a_layer_that_training_did_not_reach_keeps_its_depth(place):
    gammas = peaking(1, 2, 3)
    place.run("gamma_3.05", 0, flags=DECAY, gammas=gammas | {"conv2": [1.0] * 4})
    (run,) = make_claims.read_claims(place.results)["gamma_3.05"]
    assert claim_order.delays([run]) == {0: 1.0}  # from 1 to 3 over two layers


def test_orders_without_decay_alone_make_no_claim(place):
    for seed in (0, 1):
        place.run("gamma_0", seed, flags=NONE, gammas=peaking(1, 2, 3))
        place.run("fire_first", seed, flags=f"{FIRE} {NONE}", gammas=peaking(1, 2, 4))
    assert not any(row[0] == "figs. 1C, 6" for row in place.rows())


def test_the_table_of_peaks_tells_exponent_slope_and_height(place):
    place.run("gamma_0", 0, flags=NONE, gammas=peaking(1, 1, 1))
    flags = f"{DECAY} --lr 0.1 --momentum 0.9 --lr_schedule cosine"  # 5 steps at 0.1, 5 at 0.05: 0.75 x 0.1 / 0.1
    place.run("gamma_3.05", 0, flags=flags, gammas={**peaking(1, 2), "conv3": [0.2, 0.2, 0.8, 0.4]})
    assert place.rows("claims/order.md", "order") == [
        ["integrate first", "0", "0", "1", "1", "1", "+0.00", "+0.00", "+0.00", "1.50"],
        ["integrate first", "0.75", "0", "1", "2", "3", "+1.00", "+1.00", "+1.00", "1.67"],  # 0.9 / 0.6 and 0.8 / 0.4
    ]


@pytest.mark.parametrize(
    ("steps", "cells"),
    [
        ([1, 2, 4, 4], ["+1.10", "+1.00", "+0.00"]),  # (-1.5 x 1 - 0.5 x 2 + 0.5 x 4 + 1.5 x 4) / 5
        ([1, 3, 4], ["+1.50", "+2.00", "+1.00"]),
        ([2], ["-", "-", "-"]),
    ],
)
def test_slopes_are_those_of_all_layers_and_of_each_half(steps, cells):
    assert claim_order.slopes(dict(enumerate(steps)), is_flat=False) == cells
    assert claim_order.slopes(dict(enumerate(steps)), is_flat=True) == ["-", "-", "-"]


def test_the_height_of_peaks_counts_the_steps_that_something_moved():
    gammas = {"conv1": [1.0, 0.5, 0.9, 0.4, 1.0], "fc1": [1.0] * 5}
    assert claim_order.height({"exit": {"mean_gamma": gammas}}) == pytest.approx(1.5)


def three_orders(place, *steps, fire=None):
    for seed, found in enumerate(steps):
        place.run("gamma_0", seed, flags=NONE, gammas=peaking(1, 1, 1))
        place.run("gamma_3.05", seed, flags=DECAY, gammas=peaking(*found))
    for seed, found in enumerate(fire or ()):
        place.run("fire_first_3.05", seed, flags=f"{FIRE} {DECAY}", gammas=peaking(*found))


def test_the_page_of_orders_begins_with_what_was_found(place):
    three_orders(place, (1, 1, 2), (1, 1, 2), fire=[(1, 3, 4), (1, 3, 4)])
    assert short_of(place, "order.md") == (
        "In short: steps that the peak of gamma comes later from one layer to the next, integrate first at exponent 0: "
        "+0.00 (+0.00 to +0.00) (n = 2); integrate first at exponent 1.65: +0.50 (+0.50 to +0.50) (n = 2); fire first "
        "at exponent 1.65: +1.50 (+1.50 to +1.50) (n = 2); firing first less integrating first: +1.00 (+1.00 to +1.00) "
        "(n = 2)."
    )


@pytest.mark.parametrize(("top", "flat"), [(0.52, True), (0.53, False)])
def test_peaks_of_flat_lines_are_not_told(place, top, flat):
    low = 0.96 if flat else 0.94  # the mean is 0.5; the peak 1.04 and 1.06 times that
    place.run("fire_first", 0, flags=f"{FIRE} {NONE}", gammas=dict.fromkeys(("a", "b"), [top, 0.5, low / 2, 0.5]))
    assert (place.rows("claims/order.md", "order")[0][5:8] == ["-", "-", "-"]) == flat
    assert (short_of(place, "order.md") == "In short: no row has peaks to speak of.") == flat


def test_orders_of_which_one_did_not_learn_are_not_compared(place):
    three_orders(place, (1, 2, 3))
    place.run("fire_first_3.05", 0, 12.0, f"{FIRE} {DECAY}", gammas=peaking(1, 2, 3))
    assert "firing first less" not in short_of(place, "order.md")
    assert "1 of 1 nets that fire first at exponent 1.65 did not learn: 12.00 %" in words_of(place, "order.md")
    assert [row[:2] for row in place.rows("claims/order.md", "order")] == [
        ["integrate first", "0"],
        ["integrate first", "1.65"],
    ]


@pytest.mark.parametrize("learnt", [True, False])
def test_a_page_of_orders_can_be_made_of_nets_with_nothing_to_see(place, learnt):
    place.run("fire_first", 0, 50.0 if learnt else 10.0, f"{FIRE} {NONE}", gammas={"conv1": [1.0, 1.0, 1.0]})
    place.rows()
    assert ("did not learn" in words_of(place, "order.md")) != learnt


@pytest.mark.parametrize("rows", [("gamma_0", "gamma_3.05"), tuple(claim_order.ORDERS)], ids=["2", "4"])
def test_the_figure_of_peaks_has_a_column_a_row_and_one_y_axis_an_exponent(place, rows, monkeypatch):
    for name in rows:
        flags, decay = FIRE if "fire" in name else "", DECAY if "3.05" in name else NONE
        place.run(name, 0, flags=f"{flags} {decay}", gammas=peaking(1, 2) if decay == NONE else peaking(3, 4))
    found, seen = make_claims.read_claims(place.results), []
    monkeypatch.setattr(claim_order, "legend", lambda axes, where: seen.extend(axes.flat))
    claim_order.page(found).figures["order.png"](place.results / "order.png")
    ordered = [name for name in claim_order.ORDERS if name in rows]
    assert [axis.get_title().split(",")[0] for axis in seen] == [claim_order.ORDERS[name] for name in ordered]
    shared = lambda one, other: one.get_shared_y_axes().joined(one, other)  # noqa: E731
    together = [shared(seen[0], axis) for axis in seen[1:]]
    assert together == ["3.05" not in name for name in ordered[1:]]


# ---- Gradients -----------------------------------------------------------------------------------


STEADY = [{"conv1": [1.0, 0.1], "fc1": [10.0, 2.0]}, {"conv1": [3.0, 0.3], "fc1": [10.0, 4.0]}]  # 0.1, 0.3; 2, 10
SHAKY = [{"conv1": [1.0, 0.4], "fc1": [100.0, 30.0]}] * 2  # 0.4, 0.3; 1, 100


def gradients(place, name, seeds=(0, 1), norms=SHAKY):
    for seed in seeds:
        place.run(name, seed, flags="" if name == "base" else f"--norm {name}", norms=norms)


def test_gradients_are_compared_by_the_ratio_of_their_relative_deviations(place):
    gradients(place, "base", norms=STEADY)
    gradients(place, "bn")
    row = row_of(place, "gradients vary less from step to step with BNTT than with one BN")
    assert row[2].endswith(": 0.5 (0.5 to 0.5)")  # of the layers 1/4 and 1
    assert row[3:] == ["2", "holds, in 2 seeds"]


def test_the_interval_of_the_ratio_is_that_of_its_logarithm(place):
    gradients(place, "none")
    for seed, factor in ((0, 1.0), (1, 1.1)):
        norms = {layer: [mean, factor * deviation] for layer, (mean, deviation) in SHAKY[0].items()}
        gradients(place, "base", [seed], [norms])
    row = row_of(place, "from step to step with BNTT than without normalisation")
    mean, half = math.log(1.1) / 2, 12.706 * math.log(1.1) / 2  # logarithms 0 and log 1.1
    told = [f"{math.exp(x):.3g}" for x in (mean, mean - half, mean + half)]
    assert row[2].endswith(": {} ({} to {})".format(*told))
    assert row[4] == OPEN


def test_the_sizes_of_layers_are_compared_in_powers_of_ten(place):
    gradients(place, "base", norms=STEADY)
    gradients(place, "bn")
    row = row_of(place, "gradients of layers differ less in size with BNTT than with one BN")
    expected = f"{math.log10(10 / 2) - 2:+.2f}"
    assert row[2].endswith(f": {expected} ({expected} to {expected})")
    assert row[4] == "holds, in 2 seeds"


def test_the_page_of_gradients_tells_each_layer_in_the_mean_of_epochs(place):
    gradients(place, "base", norms=STEADY)
    gradients(place, "bn")
    assert place.rows("claims/gradients.md", "norm | n | conv1 | fc1 | layers") == [
        ["BNTT", "2", "0.10 ± 0.00", "0.30 ± 0.00", f"{0.03**0.5:.2f} ± 0.00"],
        ["one BN", "2", "0.40 ± 0.00", "0.30 ± 0.00", f"{0.12**0.5:.2f} ± 0.00"],
    ]
    assert place.rows("claims/gradients.md", "norm | n | conv1 | fc1 | decades | without the last") == [
        ["BNTT", "2", "2 ± 0", "10 ± 0", "0.70 ± 0.00", "0.00 ± 0.00"],
        ["one BN", "2", "1 ± 0", "1e+02 ± 0", "2.00 ± 0.00", "0.00 ± 0.00"],
    ]


def test_a_layer_or_epoch_without_a_gradient_does_not_count():
    epochs = [{"conv1": [0.0, 0.0], "fc1": pair} for pair in ([2.0, 1.0], [0.0, 0.0], [math.nan, None])]
    run = {"log": [*map(as_logged, epochs), {"epoch": 4}]}
    assert (claim_gradients.unsteadiness(run), claim_gradients.sizes(run)) == ({"fc1": 0.5}, {"fc1": 2.0})
    whole = {"log": [as_logged({"conv1": [1.0, 1.0], "fc1": [1.0, 0.25]})]}
    assert claim_gradients.log_ratio(whole, run) == pytest.approx(math.log(0.5))


def test_gradients_that_do_not_vary_at_all_tell_no_ratio(place):
    gradients(place, "base", norms=[{"conv1": [1.0, 0.0]}])
    gradients(place, "bn", norms=[{"conv1": [1.0, 0.5]}])
    assert not any("from step to step" in row[1] for row in place.rows())


def test_gammas_of_two_steps_have_no_ratio(place):
    for seed in (0, 1):
        place.run("gamma_0", seed, flags="--gamma_weight_decay 0", gammas={"conv1": [0.9, 0.8]})
    assert place.rows("claims/gamma.md", f"{LENGTH} | n") == [["0", "2 x 50", "2", "-"]]
    assert not any("late" in row[1] for row in place.rows())


def test_without_norms_of_gradients_nothing_is_said_of_them(place):
    place.run("base", 0)
    place.run("bn", 0, flags="--norm bn", norms=SHAKY)
    assert not any("gradients" in row[1] for row in place.rows())
    assert not (place.results / "gradients.md").exists()


# ---- The page ------------------------------------------------------------------------------------


def test_the_page_counts_its_lines_of_few_seeds(place):
    for seed in range(3):
        place.run("base", seed)
        place.run("bn", seed, 40.0, "--norm bn")
    place.run("none", 0, 10.0, "--norm none")
    assert [row[3:] for row in place.rows()] == [["3", "holds"], ["1", OPEN]]
    assert "In 1 of the 2 lines n is below 3" in (place.results.parent / "claims.md").read_text()


def test_the_page_begins_with_what_enough_seeds_told(place):
    place.run("base", 0)
    place.run("bn", 0, 40.0, "--norm bn")
    place.rows()
    assert "**In 3 seeds or more.** Nothing yet.\n" in (place.results.parent / "claims.md").read_text()
    for seed in range(1, 3):
        place.run("base", seed)
        place.run("bn", seed, 40.0, "--norm bn")
    place.rows()
    said = "**In 3 seeds or more.** Holds: BNTT is better than one BN for all time-steps.\n"
    assert said in (place.results.parent / "claims.md").read_text()


def test_the_page_does_not_hide_what_stays_open(place):
    for seed, acc in enumerate((49.0, 50.0, 51.0)):
        place.run("base", seed)
        place.run("none", seed, acc, "--norm none")
    place.rows()
    said = "**In 3 seeds or more.** Cannot be told at this scale: BNTT is better than no normalisation.\n"
    assert said in (place.results.parent / "claims.md").read_text()


def test_a_line_of_a_pair_tells_of_nets_that_did_not_learn(place):
    place.run("base", 0)
    place.run("none", 0, 12.0, "--norm none")
    seen = "[base](claims/base) - [none](claims/none): [+38.00](claims/pairs.png)"
    assert place.rows()[0][2] == f"{seen}; of none 1 did not learn: 12.00 % (chance is 10 %)"


@pytest.mark.parametrize(
    ("differences", "seen", "answer"),
    [
        ([-3.0, -3.0], "-3.00 (-3.00 to -3.00)", "holds, in 2 seeds"),
        ([-0.5, -0.5], "-0.50 (-0.50 to -0.50)", "does not hold, in 2 seeds"),
        ([-4.0, -2.0], "-3.00 (-15.71 to +9.71)", OPEN),
    ],
)
def test_what_a_conversion_loses_is_told_beside_one_point(place, differences, seen, answer):
    for seed, difference in enumerate(differences):
        place.run("conversion", seed, 40.0, "--norm none --encoding direct")
        path = place.results / f"conversion/seed{seed}/result.json"
        lost = {"difference": difference, "half_interval": 1.0}
        path.write_text(json.dumps(json.loads(path.read_text()) | lost))
    text = "a converted net loses more than a point in 4 direct steps"
    told = f"[conversion - ann](claims/conversion/seed0/conversion.png), 100 images: {seen}"
    assert place.rows() == [["table 1", text, told, "2", answer]]


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("none", "--norm none --lr 0.5", "the runs of none: lr is 0.5, where 0.3 goes with base"),
        ("T100", "", "the runs of T100: num_steps is 4, where 100 goes with base"),
        ("tet", "--norm bn --loss tet", "the runs of tet: norm is bn, where bntt goes with base"),
        ("hybrid", f"{HYBRID} --lr 0.0001", f"{START} None, where conversion/seed0/best.pth.tar goes with base"),
        (
            "hybrid",
            f"{HYBRID} --lr 0.0001 --init_from conversion/seed1/best.pth.tar",
            f"{START} conversion/seed1/best.pth.tar, where conversion/seed0/best.pth.tar goes with base",
        ),
        (
            "none",
            "--norm none --init_from a.pth.tar",
            "the runs of none: init_from is a.pth.tar, where None goes with base",
        ),
    ],
)
def test_a_row_that_changes_more_or_less_than_its_name_says_is_refused(place, name, flags, said):
    place.run("base", 0)
    place.run(name, 0, flags=flags)
    outcome = call(make_claims.main, "--results", place.results)
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert outcome.err[0].endswith(f": error: {said}")  # after the program's name, which pytest changes


def test_hybrid_training_is_compared_with_its_net_from_scratch(place):
    place.run("base", 0)
    place.run("hybrid", 0, 60.0, f"{HYBRID} --lr 0.0001 --init_from conversion/seed0/best.pth.tar")
    place.run("hybrid_scratch", 0, 40.0, HYBRID)
    assert [row[2] for row in place.rows()] == [
        "[hybrid](claims/hybrid) - [hybrid_scratch](claims/hybrid_scratch): [+20.00](claims/pairs.png)"
    ]


def test_a_folder_without_runs_is_refused(tmp_path):
    outcome = call(make_claims.main, "--results", tmp_path / "none")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert not [*tmp_path.iterdir()]


def test_a_page_whose_runs_are_gone_is_stale(place, tmp_path):
    place.run("base", 0)
    place.run("bn", 0, flags="--norm bn")
    place.rows()
    (place.results / "gamma.md").write_text("old")
    outcome = call(make_claims.main, "--results", place.results, "--check")
    assert (outcome.code, "gamma.md has no runs any more: delete it" in outcome.out[0]) == (1, True)


def test_a_record_that_lacks_a_number_is_one_sentence(place):
    place.run("gamma_0", 0, flags=NONE, gammas=FALLING, sweep=[])
    outcome = call(make_claims.main, "--results", place.results)
    assert (outcome.code, len(outcome.err)) == (2, 1)


def test_each_line_leads_to_a_figure_or_to_a_page_that_has_one(place):
    for seed in (0, 1):
        place.run("gamma_0", seed, flags="--gamma_weight_decay 0", gammas=FALLING)
        place.run("gamma_3.05", seed, flags=DECAY, gammas=FALLING)
        place.run("gamma_18.3", seed, 10.0, flags=DECAY, gammas=FALLING)
        place.run("fire_first", seed, flags=f"{FIRE} {NONE}", gammas=FALLING)
        place.run("fire_first_3.05", seed, flags=f"{FIRE} {DECAY}", gammas=FALLING)
    gradients(place, "base")
    gradients(place, "bn")
    rows = place.rows()
    assert len(rows) == 11
    for row in rows:
        found = [place.results.parent / link for link in re.findall(r"\]\(([^)]+)\)", row[2])]
        for path in [path for path in found if path.suffix == ".md"]:
            found += [path.parent / link for link in re.findall(r"!\[.*?\]\((.*?)\)", path.read_text())]
        assert any(path.suffix == ".png" and path.stat().st_size > 1000 for path in found), row


def test_no_two_pairs_are_the_same_or_have_the_same_words():
    for part in ([pair[2:] for pair in claim_pairs.PAIRS], [pair.text for pair in claim_pairs.PAIRS]):
        assert len(part) == len({*part})
