"""The trained nets in weights/: what is shipped, and how a run becomes one of them."""

import hashlib
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, call
from PIL import Image

import nets
import runs
import test as test_script
import train

sys.path.insert(0, str(ROOT / "scripts"))
import publish_weights

import training_set

MOST_BYTES = 13 * 2**20
REAL = [Path(__file__).resolve().parents[2] / "shared" / "data" / f"cifar10-{part}.tar" for part in (1, 2)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run on digits with 20 % of the images held out."""
    folder = tmp_path_factory.mktemp("run")
    flags = "--dataset digits --limit_train 64 --limit_test 20 --num_epochs 1 --lr 0.05 --val_fraction 0.2 --amp bf16"
    assert (
        call(train.main, f"{TINY} {flags} --arch fc3 --num_steps 2 --data_dir /nowhere", "--run_dir", folder).code == 0
    )
    return folder


@pytest.fixture(scope="module")
def published(run, tmp_path_factory):
    """(Folder, outcome): that run published as `tiny` into an empty folder in place of weights/."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nets, "SHIPPED", folder)
        patch.setattr(nets, "WEIGHTS", {})
        return folder, call(publish_weights.main, run / "best.pth.tar", "tiny")


@pytest.fixture
def shipped(published, monkeypatch, tmp_path):
    """A copy of that folder in place of weights/."""
    folder = shutil.copytree(published[0], tmp_path / "weights")
    monkeypatch.setattr(nets, "SHIPPED", folder)
    monkeypatch.setattr(nets, "WEIGHTS", json.loads((folder / "index.json").read_text()))
    return folder


# ---- What is shipped -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", nets.WEIGHTS)
def test_a_shipped_file_is_the_one_that_was_measured_and_small(name):
    assert nets.weights_file(name).stat().st_size == nets.WEIGHTS[name]["bytes"] <= MOST_BYTES


@pytest.mark.parametrize("name", nets.WEIGHTS)
def test_a_shipped_net_says_which_images_were_held_out(name):
    checkpoint = nets.read(nets.weights_file(name))
    assert training_set.known_data(checkpoint)["held"].shape == (
        round(50_000 * checkpoint["config"]["val_fraction"]),
        8,
    )


@pytest.mark.parametrize("name", nets.WEIGHTS)
def test_a_shipped_net_answers_a_picture_with_its_classes(name, tmp_path):
    Image.new("RGB", (40, 50), "red").save(tmp_path / "red.png")
    outcome = call(test_script.main, "--weights", name, "--image", tmp_path / "red.png")
    assert outcome.result["images"][0]["class"] in nets.load(name).facts.classes


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """The test images of CIFAR-10 as a tree of PNG files, from strips of all images of a class."""
    if not all(path.exists() for path in REAL):
        pytest.skip(f"{REAL[0].parent} holds no CIFAR-10")
    root = tmp_path_factory.mktemp("cifar10")
    for path in REAL:
        with tarfile.open(path) as archive:
            for member in archive:
                *_, split, name, file = ("", "", *member.name.split("/"))
                if split == "test" and file.endswith(".webp"):
                    strip = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB")
                    folder = root / "test" / name
                    folder.mkdir(parents=True, exist_ok=True)
                    for top in range(0, strip.height, 32):
                        number = len(list(folder.iterdir()))
                        strip.crop((0, top, 32, top + 32)).save(folder / f"{number:04}.png", compress_level=0)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", nets.WEIGHTS)
def test_a_shipped_net_is_as_accurate_as_its_row_says(name, cifar10):
    outcome = call(test_script.main, "--weights", name, "--data_dir", cifar10, "--limit_test 500 --amp auto")
    assert outcome.result["count"] == 500
    assert abs(outcome.result["top1"] - nets.WEIGHTS[name]["test_acc_500"]) <= 0.4  # two images: rounding


def test_each_file_of_weights_has_its_row_and_each_row_its_file():
    assert {path.stem for path in nets.SHIPPED.glob("*.pth")} == nets.WEIGHTS.keys()


def test_the_page_of_weights_is_what_the_index_says():
    text = (ROOT / "weights" / "README.md").read_text(encoding="utf-8")
    assert publish_weights.page(text, nets.WEIGHTS) == text


# ---- How a run becomes one -----------------------------------------------------------------------


def test_a_run_is_published_with_the_accuracy_of_the_very_file(published, shipped):
    outcome = published[1]
    assert outcome.code == 0
    row = nets.WEIGHTS["tiny"]
    assert row == outcome.result
    assert row["sha256"] == hashlib.sha256((shipped / "tiny.pth").read_bytes()).hexdigest()
    assert row["test_acc"] == call(test_script.main, "--weights", "tiny").result["top1"]


def test_a_published_file_has_half_precision_in_its_synapses_alone(run, shipped):
    old, new = (runs.load_checkpoint(path)["state_dict"] for path in (run / "best.pth.tar", shipped / "tiny.pth"))
    for name, tensor in old.items():
        half = name.startswith(("conv", "fc"))
        assert torch.equal(new[name], tensor.half() if half else tensor), name


def test_a_published_file_names_no_folder(shipped):
    config = runs.load_checkpoint(shipped / "tiny.pth")["config"]
    assert [key for key, value in config.items() if "/" in str(value)] == ["data_dir"]
    assert config["data_dir"] == "./data"


def test_a_published_net_is_loaded_by_its_name(shipped):
    images = torch.rand(2, 1, 8, 8)
    torch.manual_seed(0)
    expected = nets.load(shipped / "tiny.pth")(images)
    torch.manual_seed(0)
    assert torch.equal(nets.load("tiny")(images), expected)


def test_a_second_file_of_a_name_is_refused_and_the_first_kept(run, shipped):
    before = (shipped / "tiny.pth").read_bytes()
    outcome = call(publish_weights.main, run / "best.pth.tar", "tiny")
    assert (outcome.code, (shipped / "tiny.pth").read_bytes()) == (2, before)
    assert "a file of weights is made once" in outcome.err[-1]


def test_what_cannot_be_tested_leaves_no_file(run, shipped, monkeypatch):
    monkeypatch.setattr(publish_weights, "tested", lambda *_: 1 / 0)
    before = sorted(shipped.iterdir())
    with pytest.raises(ZeroDivisionError):
        publish_weights.main([str(run / "best.pth.tar"), "other"])
    assert sorted(shipped.iterdir()) == before


def test_a_damaged_file_is_refused(shipped):
    (shipped / "tiny.pth").write_bytes((shipped / "tiny.pth").read_bytes()[:-1])
    outcome = call(test_script.main, "--weights", "tiny")
    assert outcome.code == 2
    assert "tiny.pth is damaged" in outcome.err[-1]


def test_an_unknown_name_is_refused_with_those_there_are(shipped):
    outcome = call(test_script.main, "--weights", "huge")
    assert outcome.code == 2
    assert "'huge' (choose from" in outcome.err[-1]


def test_either_a_checkpoint_or_a_shipped_net_is_tested(run, shipped):
    outcome = call(test_script.main, run / "best.pth.tar", "--weights", "tiny")
    assert outcome.code == 2
    assert "--weights tiny stands in place of CHECKPOINT: leave out" in outcome.err[-1]
