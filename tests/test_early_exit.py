"""early_exit.py: the rule against its definition, and the script against test.py."""

import json

import pytest
import torch
from conftest import TINY, call
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import early_exit
import exits
import test as test_script
import train
import training_set
from exits import exit_step, saved, sweep_thresholds

# few different values, so that ties and thresholds equal to a gamma are common
VALUES = st.sampled_from([-0.5, 0.0, 0.05, 0.1, 0.2, 0.5, 1.0]) | st.floats(-1, 2)


@st.composite
def mean_gammas(draw):
    layers, steps = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    rows = st.lists(VALUES, min_size=steps, max_size=steps)
    return torch.tensor(draw(st.lists(rows, min_size=layers, max_size=layers)), dtype=torch.float64)


def brute_force(mean_gamma, threshold):
    """The definition: the smallest t such that at every later step every layer lies below the threshold."""
    layers, T = mean_gamma.shape
    for t in range(1, T + 1):
        if all(mean_gamma[layer][later - 1] < threshold for layer in range(layers) for later in range(t + 1, T + 1)):
            return t
    raise AssertionError("T always fits: there is no later step")


def edited(trained, path, gamma):
    """The checkpoint of the trained run with gamma(layer, step) in place of what it learnt; step counts from 1."""
    checkpoint = torch.load(trained.checkpoint)
    for key, value in checkpoint["state_dict"].items():
        if key.startswith("bntt") and key.endswith("weight"):
            layer, step = key.split(".")[:2]
            checkpoint["state_dict"][key] = torch.full_like(value, gamma(layer, int(step) + 1))
    torch.save(checkpoint, path)
    return path


# ---- The rule ------------------------------------------------------------------------------------


@given(mean_gammas(), VALUES)
def test_the_exit_step_is_as_defined(mean_gamma, threshold):
    assert exit_step(mean_gamma, threshold) == brute_force(mean_gamma, threshold)


def test_the_exit_step_of_a_net_worked_by_hand():
    mean_gamma = torch.tensor([[0.9, 0.05, 0.2, 0.05, 0.05], [0.9, 0.9, 0.05, 0.05, 0.05]])
    assert exit_step(mean_gamma, 0.1) == 3  # step 3 of the first layer is still open
    assert exit_step(mean_gamma, 0.3) == 2
    assert exit_step(mean_gamma, 1.0) == 1
    assert exit_step(mean_gamma, 0.05) == 5  # below means below


@given(mean_gammas(), VALUES.filter(lambda x: x > 0))
def test_the_sweep_gives_for_every_threshold_its_exit(mean_gamma, threshold):
    fitting = [t for t, (low, high) in sweep_thresholds(mean_gamma).items() if low < threshold <= high]
    assert fitting == [exit_step(mean_gamma, threshold)]


@given(mean_gammas())
def test_the_sweep_leaves_no_threshold_out(mean_gamma):
    ranges = sorted(sweep_thresholds(mean_gamma).values())
    assert ranges[0][0] == 0
    assert ranges[-1][1] == float("inf")
    assert [high for _, high in ranges[:-1]] == [low for low, _ in ranges[1:]]


def test_savings_are_the_share_of_what_comes_after_each_images_exit():
    spikes = torch.tensor([[1.0, 4.0], [3.0, 0.0], [6.0, 6.0]], dtype=torch.float64)
    assert saved(spikes, torch.tensor([1, 1])) == pytest.approx(100 * 15 / 20)
    assert saved(spikes, torch.tensor([2, 1])) == pytest.approx(100 * 12 / 20)
    assert saved(spikes, torch.tensor([3, 3])) == 0


def test_a_net_that_never_spikes_saves_nothing():
    assert saved(torch.zeros(3, 2, dtype=torch.float64), torch.tensor([1, 1])) == 0


# ---- The script ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exit_at_2(trained, tmp_path_factory):
    """(checkpoint, outcome) of a net whose gammas fall below 0.1 after step 2; its sweep has two exits."""
    path = tmp_path_factory.mktemp("exit") / "edited.tar"
    edited(trained, path, lambda layer, step: 1.0 if step < 3 else 0.05)
    return path, call(early_exit.main, path, "--sweep", "--limit_test", 50)


def test_the_exit_of_a_checkpoint_is_read_off_its_gammas(exit_at_2):
    _, outcome = exit_at_2
    assert (outcome.result["exit_step"], outcome.result["num_steps"], outcome.result["gamma_threshold"]) == (2, 3, 0.1)
    assert any(line.startswith("exit at step 2 of 3") for line in outcome.out)


def test_one_layer_that_stays_open_holds_up_the_exit(trained, tmp_path):
    path = edited(trained, tmp_path / "x.tar", lambda layer, step: 0.5 if (layer, step) == ("bntt_fc", 2) else 0.01)
    assert call(early_exit.main, path, "--limit_test", 10).result["exit_step"] == 2


def test_no_early_exit_is_said_plainly_and_is_no_error(trained, tmp_path):
    outcome = call(early_exit.main, trained.checkpoint, "--limit_test", 10, "--figure", tmp_path / "x.png")
    assert outcome.code == 0
    assert outcome.result["exit_step"] == 3
    assert outcome.result["acc_exit"] == outcome.result["acc_full"]
    assert any(line.startswith("no early exit: no step before 3 leaves") for line in outcome.out)


def test_accuracy_at_the_exit_is_that_of_testing_so_many_steps(exit_at_2, tmp_path):
    path, _ = exit_at_2
    # one batch of test images, so that the seed draws the same spikes for the first steps
    flags = ["--limit_test", 32, "--seed", 3]
    read = call(early_exit.main, path, *flags, "--figure", tmp_path / "x.png").result
    assert read["acc_exit"] == call(test_script.main, path, *flags, "--steps", 2).result["top1"]
    assert read["acc_full"] == call(test_script.main, path, *flags).result["top1"]


def test_the_figure_is_a_picture_beside_the_checkpoint(exit_at_2):
    with Image.open(exit_at_2[0].parent / "early_exit.png") as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 400


def test_the_file_of_numbers_holds_the_result_the_curve_and_the_gammas(exit_at_2):
    path, outcome = exit_at_2
    numbers = json.loads((path.parent / "early_exit.json").read_text())
    assert {key: numbers[key] for key in outcome.result} == outcome.result
    assert numbers["acc_by_steps"][1:] == [outcome.result["acc_exit"], outcome.result["acc_full"]]
    assert len(numbers["mean_gamma"]) == 8
    assert numbers["mean_gamma"]["conv1"] == pytest.approx([1.0, 1.0, 0.05])


def test_the_sweep_lists_every_exit_with_its_accuracy_and_savings(exit_at_2):
    path, outcome = exit_at_2
    numbers = json.loads((path.parent / "early_exit.json").read_text())
    assert [point["exit_step"] for point in numbers["sweep"]] == [1, 2, 3]
    at_2 = numbers["sweep"][1]
    assert at_2["acc"] == outcome.result["acc_exit"]
    assert at_2["spikes_saved"] == outcome.result["spikes_saved"]
    assert (at_2["threshold_above"], at_2["threshold_up_to"]) == pytest.approx((0.05, 1.0))


def test_the_counts_are_over_all_test_images(exit_at_2):
    _, outcome = exit_at_2
    assert outcome.result["count"] == 50
    assert all(rate > 0 for rate in outcome.result["spike_rate"].values())


@pytest.mark.parametrize("kind", ["pdf", "svg"])
def test_the_figure_may_have_another_name_and_kind(exit_at_2, tmp_path, kind):
    figure = tmp_path / f"gammas.{kind}"
    call(early_exit.main, exit_at_2[0], "--limit_test", 10, "--figure", figure)
    assert {"pdf": b"%PDF", "svg": b"<?xml"}[kind] == figure.read_bytes()[:5].rstrip(b"-")
    assert figure.with_suffix(".json").exists()


@pytest.mark.parametrize("norm", ["bn", "none"])
def test_a_net_without_gammas_over_time_has_no_exit_to_read(tmp_path, norm):
    sizes = "--dataset synthetic --limit_train 16 --limit_test 10 --num_epochs 1"
    assert call(train.main, TINY, sizes, "--norm", norm, "--run_dir", tmp_path).code == 0
    outcome = call(early_exit.main, tmp_path / "last.pth.tar")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert f"a net with --norm {norm} has no gamma per time-step: choose --policy confidence" in outcome.err[0]
    assert not (tmp_path / "early_exit.png").exists()


@pytest.mark.parametrize("engine", ["plain", "fused"])
def test_the_exit_is_read_with_either_engine(exit_at_2, tmp_path, engine):
    flags = ["--limit_test", 50, "--engine", engine, "--figure", tmp_path / "x.png"]
    outcome = call(early_exit.main, exit_at_2[0], *flags)
    assert outcome.result["exit_step"] == 2
    assert outcome.result["spike_rate"] == pytest.approx(exit_at_2[1].result["spike_rate"], rel=1e-3)


def test_reading_twice_gives_the_same(exit_at_2, tmp_path):
    again = call(early_exit.main, exit_at_2[0], "--limit_test", 50, "--figure", tmp_path / "x.png")
    assert again.result == exit_at_2[1].result


# ---- Exits of each image ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A run that held images out, with one BatchNorm for all steps: no gammas to read an exit off."""
    run = tmp_path_factory.mktemp("held_out") / "run"
    sizes = "--dataset digits --limit_train 128 --limit_test 100 --num_epochs 2 --lr 0.02 --val_fraction 0.1 --norm bn"
    assert call(train.main, TINY, sizes, "--run_dir", run).code == 0
    return run / "last.pth.tar"


@pytest.mark.parametrize("policy", ["confidence", "entropy", "margin"])
def test_a_policy_is_calibrated_on_the_images_held_out(held_out, policy):
    result = call(early_exit.main, held_out, "--policy", policy, "--target_drop", 5).result
    assert result["held_out"] == 144  # a tenth of 1,437
    assert result["acc_full"] - result["acc_exit"] < 10
    assert 1 <= result["mean_steps"] <= 3
    numbers = json.loads((held_out.parent / f"early_exit_{policy}.json").read_text())
    assert sum(numbers["policies"][policy]["calibrated"]["histogram"]) == result["count"]


def test_images_held_out_come_in_batches_as_those_of_the_test(held_out, monkeypatch):
    loaders, found = [], training_set.held_out
    monkeypatch.setattr(
        training_set, "held_out", lambda *args, **known: loaders.append(found(*args, **known)) or loaders[0]
    )
    assert call(early_exit.main, held_out, "--policy", "margin", "--batch_size", 25).code == 0
    assert [len(labels) for _, labels in loaders[0]] == [50, 50, 44]


def test_a_target_that_no_threshold_reaches_means_all_steps_and_is_no_error(held_out, monkeypatch):
    monkeypatch.setattr(exits, "calibrate", lambda points, drop: float("inf"))
    outcome = call(early_exit.main, held_out, "--policy", "margin")
    assert (outcome.result["mean_steps"], outcome.result["threshold"]) == (3, None)
    assert any(line.startswith("no early exit: no threshold costs at most 0.3 points") for line in outcome.out)


def test_a_policy_without_images_held_out_is_refused(trained):
    outcome = call(early_exit.main, trained.checkpoint, "--policy", "margin")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert "train with --val_fraction" in outcome.err[0]


@pytest.mark.parametrize("policy", ["gamma", "margin"])
def test_the_loop_that_stops_is_measured_on_batches_of_1_and_64(exit_at_2, held_out, tmp_path, policy):
    path = exit_at_2[0] if policy == "gamma" else held_out
    flags = ["--policy", policy, "--measure", "--figure", tmp_path / "x.png"]
    rows = call(early_exit.main, path, *flags, "--limit_test", 100).result["measured"]
    assert [(row["batch"], row["images"]) for row in rows] == [(1, 32), (64, 100)]
    assert all(row["ms_full"] > 0 < row["ms_exit"] for row in rows)


def test_operations_and_their_energy_are_given_as_numbers(exit_at_2):
    result = exit_at_2[1].result
    assert 0 < result["energy_exit_uj"] < result["energy_uj"] == pytest.approx(result["operations"] * 0.9e-6)
