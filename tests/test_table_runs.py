"""scripts/table1.sh ... table5.sh and claims.sh, run from start to end on tiny data."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_datasets import write_idx
from test_events import nmnist_bytes, noise, written
from test_table_scripts import SMALL, TINY, Place, image_tree


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.mark.slow
def test_a_script_that_is_stopped_goes_on_and_a_finished_one_does_nothing(place):
    image_tree(place.folder / "data")
    flags = "--budget", "mini", "--rows", "cifar10_bntt", "cifar10_none"
    first, second = (place.results / f"cifar10jpeg_mini_vgg9{suffix}" / "seed0" for suffix in ("", "_none"))

    stopped = place.run("table1", *flags, tiny=SMALL, STOP="1")
    assert stopped.code == 143
    assert (first / "last.pth.tar").exists()
    assert not (first / "result.json").exists()
    assert not second.exists()

    done = place.run("table1", *flags, tiny=SMALL)
    assert done.code == 0, done.err
    (resumed,) = json.loads((first / "environment.json").read_text())["resumed"]
    assert (resumed["epoch"], resumed["step"]) == (0, 2)
    assert json.loads((first / "early_exit.json").read_text())["num_steps"] == 4
    assert json.loads((second / "result.json").read_text())["norm"] == "none"
    assert not (second / "early_exit.json").exists()
    page = (place.results / "README.md").read_text()
    for run in (first, second):
        assert f"\n| {run.parent.name} | imagefolder, vgg9, " in page

    before, commands = place.files(), len(place.commands())
    assert place.run("table1", *flags).code == 0
    assert place.run("table5", "--budget", "mini", "--rows", "bntt").code == 0  # its row of BNTT is this one
    assert place.files() == before
    assert [argv[0] for argv in place.commands()[commands:]] == ["scripts/make_tables.py"] * 2


@pytest.mark.slow
def test_a_run_in_a_warm_process_is_that_of_a_process_of_its_own(place):
    image_tree(place.folder / "data")
    flags = ["table1", "--budget", "mini", "--rows", "cifar10_none", "--seeds"]
    assert place.run(*flags, "1", tiny=SMALL).code == 0
    run = place.results / "cifar10jpeg_mini_vgg9_none" / "seed1"
    alone = torch.load(run / "best.pth.tar")["state_dict"]
    shutil.rmtree(place.results)
    commands = len(place.commands())
    assert place.run(*flags, "0 1", WARM=1, FLAGS=SMALL).code == 0
    warm = torch.load(run / "best.pth.tar")["state_dict"]
    assert alone.keys() == warm.keys()
    assert all(torch.equal(value, warm[key]) for key, value in alone.items())
    assert [argv[0] for argv in place.commands()[commands:]] == ["scripts/serve.py", "scripts/make_tables.py"]


@pytest.mark.slow
def test_table1_converts_its_ann_and_goes_on_from_there(place):
    image_tree(place.folder / "data")
    flags = "--budget", "mini", "--rows", "cifar10_ann", "cifar10_conversion", "cifar10_hybrid"
    outcome = place.run("table1", *flags, tiny=SMALL)
    assert outcome.code == 0, outcome.err
    for name, neuron in (("ann", "lif"), ("conversion", "if"), ("hybrid", "learnt_lif")):
        config = (place.results / f"cifar10jpeg_mini_vgg9_{name}" / "seed0" / "config.yaml").read_text()
        assert f"\nneuron: {neuron}\n" in config
    assert any("weights from" in line and "lif_conv1.threshold" in line for line in outcome.out)
    page = (place.results / "README.md").read_text()
    assert "| imagefolder, vgg9_ann, none | 1 |" in page
    assert "| imagefolder, vgg9, none, if | 6 |" in page
    assert "\n    python convert.py results/cifar10jpeg_mini_vgg9_ann/seed0/best.pth.tar " in page
    before = place.files()
    assert place.run("table1", *flags, tiny=SMALL).code == 0
    assert place.files() == before


@pytest.mark.slow
def test_table2_trains_its_rows(place):
    for split in ("Train", "Test"):
        for k in range(10):
            written(place.folder / "data" / split / str(k) / "0.bin", nmnist_bytes(noise(50, 34, seed=k)))
    outcome = place.run("table2", "--budget", "mini", "--rows", "bn", tiny=f"{TINY} --num_steps 3")
    assert outcome.code == 0, outcome.err
    result = json.loads((place.results / "nmnist_small_cnn7_bn" / "seed0" / "result.json").read_text())
    assert (result["dataset"], result["norm"], result["num_steps"]) == ("nmnist", "bn", 3)


@pytest.mark.slow
def test_table3_trains_its_rows(place):
    for part in ("train", "t10k"):
        raw, rng = place.folder / "data" / "MNIST" / "raw", np.random.default_rng(0)
        write_idx(raw / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (10, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(10))
    outcome = place.run("table3", "--budget", "mini", "--rows", "bntt", WARM=1, FLAGS=TINY)
    assert outcome.code == 0, outcome.err
    run = place.results / "smnist_mini_fc3_bntt" / "seed0"
    assert json.loads((run / "result.json").read_text())["num_steps"] == 784
    assert json.loads((run / "early_exit.json").read_text())["count"] == 4


def test_claims_run_from_start_to_end(place):
    image_tree(place.folder / "data", suffix="png")
    tiny = f"{SMALL} --num_steps 3 --dataset imagefolder"
    outcome = place.run("claims", "--rows", "gamma_0", "bn", "--seeds", "0", WARM=1, FLAGS=tiny)
    assert outcome.code == 0, outcome.err
    assert "without weight decay on gammas" in (place.results / "claims.md").read_text()
    written = {path.name for path in (place.results / "claims").glob("*.*")}
    assert written >= {"gamma.md", "steps.png"}  # figures of gammas if the net happens to learn
    assert "top1" in json.loads((place.results / "claims" / "bn" / "seed0" / "averaged.json").read_text())
