"""analysis.py: what it measures, on tiny nets; the figures themselves are in test_figures.py."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, call
from test_data import write_tree

import analysis
import attacks
import test as test_script
import train
from image_data import CIFAR_CLASSES
from model import LIF


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory):
    """(analysis.json of the trained run, what analysis.py printed), with noise and attacks."""
    folder = tmp_path_factory.mktemp("figures")
    flags = (
        "--noise 0 0.2 --fgsm 0 8 --pgd 8 --attack_images 20 --surrogate_width 0.5 1 --draws 2 --html --limit_test 100"
    )
    outcome = call(analysis.main, trained.checkpoint, flags, "--out", folder)
    assert outcome.code == 0, outcome.err
    return json.loads((trained.dir / "analysis.json").read_text()), outcome, folder


def test_it_measures_what_testing_does(measured, trained):
    result = call(test_script.main, trained.checkpoint, "--limit_test", 100).result
    assert measured[0]["accuracy"][-1] == pytest.approx(result["top1"], abs=1e-3)
    assert (measured[0]["num_steps"], measured[0]["data"]["count"]) == (3, 100)


def test_it_says_what_net_it_measured_and_how(measured):
    told = {"arch": "vgg9", "norm": "bntt", "leak_mem": 0.95, "encoding": "poisson", "limit_test": 100, "draws": 2}
    assert told.items() <= measured[0]["config"].items()
    assert not {"data_dir", "checkpoint", "out"} & measured[0]["config"].keys()


def test_neurons_without_the_surrogate_are_attacked_by_their_own_gradient_alone(tmp_path):
    flags = (
        "--dataset digits --arch vgg9_ann --img_size 8 --batch_size 16 --num_workers 0 --limit_train 32 --num_epochs 1"
    )
    assert call(train.main, flags, "--limit_test 10 --run_dir", tmp_path / "run").code == 0
    wide = "--fgsm 8 --surrogate_width 1 2 --limit_test 10"
    outcome = call(analysis.main, tmp_path / "run" / "best.pth.tar", wide)
    assert outcome.code == 0, outcome.err
    assert any(line.startswith("--surrogate_width does nothing") for line in outcome.out)
    rows = json.loads((tmp_path / "run" / "analysis.json").read_text())["attack"]
    assert [row["width"] for row in rows] == [1.0]


def test_noise_of_zero_changes_no_answer(measured):
    clean, noisy = measured[0]["noise"]
    assert clean["acc"] == pytest.approx(measured[0]["accuracy"][-1], abs=1e-3)
    assert noisy["acc"] < clean["acc"]


def test_each_attack_has_a_row_for_each_width_and_the_worst(measured):
    rows = [(row["kind"], round(255 * row["eps"]), row["width"]) for row in measured[0]["attack"]]
    kinds = [("fgsm", 0), ("fgsm", 8), ("pgd", 8)]
    assert rows == [(*kind, width) for kind in kinds for width in (0.5, 1.0, None)]
    assert all(row["count"] == 20 for row in measured[0]["attack"])


def test_the_worst_of_all_widths_is_no_better_than_any(measured):
    rows = measured[0]["attack"]
    for at in range(0, len(rows), 3):
        assert rows[at + 2]["acc"] <= min(rows[at]["acc"], rows[at + 1]["acc"])


def test_figures_and_a_page_are_written(measured):
    _, outcome, folder = measured
    paths = outcome.result["figures"]
    assert {"fig1.png", "fig4.svg", "fig8.png", "analysis.html"} <= {path.rsplit("/", 1)[1] for path in paths}
    assert all((folder / path.rsplit("/", 1)[1]).stat().st_size > 1000 for path in paths)


def test_figures_are_drawn_again_without_a_net(measured, trained, tmp_path):
    outcome = call(analysis.main, "--from", trained.dir / "analysis.json", "--out", tmp_path, "--figures", 4)
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fig4.png", "fig4.svg"]


def test_the_file_is_small(measured, trained):
    assert (trained.dir / "analysis.json").stat().st_size < 300 * 1024


def test_the_input_of_a_norm_is_that_of_its_synapse(measured):
    found = measured[0]["norm_input"]
    assert all(sum(frequency) == pytest.approx(1, abs=1e-3) for frequency in found["frequency"].values())
    assert len(found["batch_mean"]) == len(found["stored_std"]) == 3


def test_the_surrogate_is_shown_as_it_is_in_use(monkeypatch):
    monkeypatch.setattr("model.SURROGATE_ALPHA", 0.7)
    found = analysis.surrogate(LIF(0.9, threshold=2.0))
    v = torch.tensor(found["v"])
    torch.testing.assert_close(torch.tensor(found["derivative"]), 0.7 * (1 - v.abs()).clamp(min=0))


@pytest.mark.parametrize("norm", ["bn", "none"])
def test_a_net_without_gammas_has_no_figure_of_them(tmp_path, norm):
    sizes = "--dataset synthetic --limit_train 32 --limit_test 20 --num_epochs 1 --norm"
    assert call(train.main, TINY, sizes, norm, "--run_dir", tmp_path / "run").code == 0
    path = tmp_path / "run" / "last.pth.tar"
    assert call(analysis.main, path, "--figures", 5, "--out", tmp_path).code == 0
    found = json.loads((tmp_path / "run" / "analysis.json").read_text())
    assert (found["gamma"], found["exit"], found["sigma"] is None) == (None, None, norm == "none")
    refused = call(analysis.main, path, "--figures", 4, "--out", tmp_path)
    assert (refused.code, len(refused.err)) == (2, 1)


def test_a_net_with_layer_norm_is_measured(tmp_path):
    sizes = "--dataset synthetic --limit_train 32 --limit_test 20 --num_epochs 1 --norm ln"
    assert call(train.main, TINY, sizes, "--run_dir", tmp_path / "run").code == 0
    assert call(analysis.main, tmp_path / "run" / "last.pth.tar", "--figures", 5, "--out", tmp_path).code == 0
    assert json.loads((tmp_path / "run" / "analysis.json").read_text())["norm_input"] is None


def test_a_net_without_spikes_is_attacked_and_costs_multiplications(tmp_path):
    sizes = "--dataset synthetic --limit_train 32 --limit_test 20 --num_epochs 1 --arch vgg9_ann --img_size 8"
    sizes += " --batch_size 16 --num_workers 0 --device cpu"
    assert call(train.main, sizes, "--run_dir", tmp_path / "run").code == 0
    outcome = call(analysis.main, tmp_path / "run" / "last.pth.tar", "--fgsm 8 --html --out", tmp_path)
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "run" / "analysis.json").read_text())
    assert (found["label"], found["spikes"], found["attack"][0]["kind"]) == ("ann", {}, "fgsm")
    assert found["energy"]["snn_pj"] == pytest.approx(found["energy"]["ann_pj"])
    assert "figures" in outcome.result


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--noise -0.1", "at least 0"),
        ("--fgsm 256", "from 0 to 255"),
        ("--figures 99", "99"),
        ("--norm_layer conv9", "--norm_layer conv9"),
        ("--corruptions .", "CIFAR-10-C"),
        ("--out analysis.json", "--out analysis.json: it is a file, name a folder"),
    ],
)
def test_bad_input_is_one_sentence(trained, tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(analysis.exits, "watch", None)  # nothing is tested before
    (tmp_path / "analysis.json").touch()
    outcome = call(analysis.main, trained.checkpoint, "--limit_test", 10, "--out", tmp_path, flags)
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert said in outcome.err[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["gamma"]["conv3"].pop("max"),
        lambda r: r["spikes"].update(conv1="x"),
        lambda r: r.update(data=[]),
        lambda r: r["norm_input"].update(edges=[]),
    ],
)
def test_a_damaged_analysis_is_named_in_one_sentence(measured, tmp_path, change):
    damaged = json.loads(json.dumps(measured[0]))
    change(damaged)
    (tmp_path / "x.json").write_text(json.dumps(damaged))
    outcome = call(analysis.main, "--from", tmp_path / "x.json", "--out", tmp_path / "out", "--html")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert "x.json" in outcome.err[0]


def test_nothing_to_measure_or_draw_is_refused():
    outcome = call(analysis.main)
    assert outcome.code == 2
    assert "name a CHECKPOINT to measure, or --from an analysis.json" in outcome.err[0]


def test_corruptions_are_tested_by_severity(tmp_path, monkeypatch, capsys):
    write_tree(tmp_path / "data", CIFAR_CLASSES["CIFAR10"].split(), train=4, test=2, size=32)
    sizes = f"--dataset cifar10 --data_dir {tmp_path}/data --img_size 16 --num_epochs 1"
    outcome = call(train.main, TINY, sizes, "--run_dir", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    monkeypatch.setattr(attacks, "PER_SEVERITY", 6)
    images = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", np.tile(np.arange(6, dtype=np.uint8) % 10, 5))
    path = tmp_path / "run" / "last.pth.tar"
    assert call(analysis.main, path, "--corruptions", tmp_path, "--out", tmp_path, "--figures", 1).code == 0
    found = json.loads((tmp_path / "run" / "analysis.json").read_text())["corruptions"]
    assert len(found["fog"]) == 5
