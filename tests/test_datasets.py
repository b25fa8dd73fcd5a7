"""Every data set in its published format, small, through the three entry points; and the MNIST reader."""

import gzip
import hashlib
import os

import numpy as np
import pytest
import torch
import torchvision
from conftest import call
from PIL import Image
from test_data import cifar  # noqa: F401 (a fixture)
from test_events import cifar10, nmnist  # noqa: F401 (fixtures)
from test_events import settings as event_settings
from test_tiny_imagenet import tree  # noqa: F401 (a fixture)

import data
import early_exit
import event_data
import image_data
import model
import runs
import test
import train
import training_set
from utill import UserError

SMALL = "--batch_size 4 --num_workers 0 --num_epochs 1 --limit_train 8 --limit_test 4 --device cpu"


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = np.array(array.shape, ">u4").tobytes()
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tmp_path):
    """40 + 20 images of 28x28 in the published idx files; image i is the pixels i + 7 x (row + column)."""
    ramp = 7 * np.add.outer(np.arange(28), np.arange(28))
    for part, count in (("train", 40), ("t10k", 20)):
        raw = tmp_path / "mnist" / "MNIST" / "raw"
        write_idx(raw / f"{part}-images-idx3-ubyte", (np.arange(count)[:, None, None] + ramp) % 256)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    return tmp_path / "mnist"


def through_the_entry_points(run_dir, *flags):
    """Train, test and read the exit; returns the three results."""
    trained = call(train.main, SMALL, *flags, "--run_dir", run_dir).result
    tested = call(test.main, run_dir / "best.pth.tar", "--limit_test 4").result
    left = call(early_exit.main, run_dir / "best.pth.tar", "--limit_test 4 --sweep").result
    assert tested["top1"] == trained["test_acc"] == left["acc_full"]
    assert tested["count"] == 4
    return trained, tested, left


@pytest.mark.slow
def test_smnist_trains_tests_and_exits_early(mnist, tmp_path):
    shape = "--dataset smnist --arch fc3 --num_steps 784 --data_dir"
    assert through_the_entry_points(tmp_path / "run", shape, mnist)[2]["num_steps"] == 784


def test_permuted_smnist_trains_tests_and_exits_early(mnist, tmp_path):
    flags = "--dataset smnist --permuted --arch fc3 --img_size 4 --num_steps 16 --data_dir"
    through_the_entry_points(tmp_path / "run", flags, mnist)
    state = torch.load(tmp_path / "run" / "best.pth.tar", weights_only=True)["state_dict"]
    assert sorted(state["encoder.order"].tolist()) == list(range(16))


@pytest.mark.parametrize("engine", ["plain", "fused"])
def test_smnist_trains_on_either_engine(engine, mnist, tmp_path):
    flags = f"--dataset smnist --arch fc3 --img_size 4 --num_steps 16 --engine {engine} --data_dir"
    assert call(train.main, SMALL, flags, mnist, "--run_dir", tmp_path / "run").code == 0


def test_nmnist_trains_tests_and_exits_early(nmnist, tmp_path):  # noqa: F811
    flags = "--dataset nmnist --arch dvs_cnn7 --img_size 8 --num_steps 3 --data_dir"
    through_the_entry_points(tmp_path / "run", flags, nmnist)


@pytest.mark.parametrize("split", ["random", "first100"])
def test_dvs_cifar10_trains_tests_and_exits_early(split, cifar10, tmp_path):  # noqa: F811
    flags = f"--dataset dvs_cifar10 --dvs_split {split} --arch dvs_cnn7 --img_size 8 --num_steps 3 --data_dir"
    through_the_entry_points(tmp_path / "run", flags, cifar10)


def test_tiny_imagenet_trains_tests_and_exits_early(tree, tmp_path):  # noqa: F811
    flags = "--dataset tiny_imagenet --arch vgg11 --img_size 16 --num_steps 2 --data_dir"
    through_the_entry_points(tmp_path / "run", flags, tree)
    state = torch.load(tmp_path / "run" / "best.pth.tar", weights_only=True)
    assert "Egyptian cat" in state["data"]["classes"]


def test_both_cifars_train_test_and_exit_early(cifar, tmp_path):  # noqa: F811
    name, root = cifar
    flags = f"--dataset {name} --arch vgg9 --img_size 8 --num_steps 2 --data_dir"
    through_the_entry_points(tmp_path / "run", flags, root)


def test_a_random_split_is_that_of_the_training_whatever_the_seed_of_the_test(cifar10, tmp_path):  # noqa: F811
    flags = "--dataset dvs_cifar10 --arch dvs_cnn7 --img_size 8 --num_steps 2 --seed 3 --data_dir"
    assert call(train.main, SMALL, flags, cifar10, "--run_dir", tmp_path / "run").code == 0
    parse = [str(tmp_path / "run" / "best.pth.tar"), "--seed", "4"]
    args, checkpoint = test.parse_args(parse)
    tested = data.build_loaders(args, train=False, **training_set.known_data(checkpoint))
    trained = event_data.dvs_cifar10(
        event_settings("dvs_cifar10", cifar10, "--seed", 3, "--img_size", 8, "--num_steps", 2), 1
    )
    assert torch.equal(tested.test.maker.split.images, trained.test.images)


def test_another_split_than_that_of_the_training_is_refused(cifar10, tmp_path):  # noqa: F811
    flags = "--dataset dvs_cifar10 --arch dvs_cnn7 --img_size 8 --num_steps 2 --data_dir"
    assert call(train.main, SMALL, flags, cifar10, "--run_dir", tmp_path / "run").code == 0
    outcome = call(test.main, tmp_path / "run" / "best.pth.tar", "--dvs_split first100")
    assert outcome.code == 2
    assert "was trained with --dvs_split random" in outcome.err[0]


# ---- Images held out of training ------------------------------------------------------------------

HELD = "--dataset imagefolder --arch fc3 --img_size 4 --num_steps 2 --val_fraction 0.25 --batch_size 4 --num_workers 0"


@pytest.fixture
def folders(tmp_path):
    """Two image trees of the same 2 x 12 training images, their files in opposite orders."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 2)):
        for label in ("a", "b"):
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
                for root, name in (("there", i), ("here", count - 1 - i)):
                    (tmp_path / root / split / label).mkdir(parents=True, exist_ok=True)
                    image.save(tmp_path / root / split / label / f"{name:02}.png")
    return tmp_path


def run_on(folder, data_dir, *flags):
    """The checkpoint of a run of one epoch in folder/run, on the tree folder/data_dir."""
    where = "--data_dir", folder / data_dir, "--run_dir", folder / "run"
    outcome = call(train.main, HELD, "--num_epochs 1 --device cpu", *flags, *where)
    assert outcome.code == 0, outcome.err
    return runs.load_checkpoint(folder / "run" / "last.pth.tar")


def pictures(checkpoint):
    """The fingerprints of the images held out, as a set."""
    return {*map(tuple, checkpoint["held_out"].tolist())}


def held_again(folder, checkpoint, data_dir):
    """Fingerprints of the images that training_set.held_out takes for those held out."""
    args = train.parse_args([*HELD.split(), "--data_dir", str(folder / data_dir), "--seed", "9"])
    loader = training_set.held_out(args, {"val_fraction": 0.25}, **training_set.known_data(checkpoint))
    images = loader.maker.split.images
    return {*map(tuple, data.fingerprints(images, loader.keys.indices).tolist())}


def test_images_held_out_are_found_again_among_files_in_another_order(folders):
    checkpoint = run_on(folders, "there")
    assert held_again(folders, checkpoint, "here") == held_again(folders, checkpoint, "there") == pictures(checkpoint)
    old = dict(checkpoint, held_out=None)  # as files of older versions are
    assert held_again(folders, old, "here") != pictures(checkpoint)


def test_a_run_that_goes_on_with_files_in_another_order_holds_out_the_same_images(folders):
    before = run_on(folders, "there")
    assert pictures(run_on(folders, "here", "--resume --num_epochs 2")) == pictures(before)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_images_held_out_that_are_not_there_are_asked_for(folders, count):
    run_on(folders, "there")
    for label in ("a", "b"):
        for i in range(count):
            (folders / "here" / "train" / label / f"{i:02}.png").unlink()
    outcome = call(
        early_exit.main, folders / "run" / "best.pth.tar", "--policy confidence --data_dir", folders / "here"
    )
    assert outcome.code == 2
    assert "--policy confidence needs the images held out of training" in outcome.err[0]
    assert call(early_exit.main, folders / "run" / "best.pth.tar", "--data_dir", folders / "here").code == 0


def test_some_images_held_out_may_have_other_pixels(folders, monkeypatch):
    monkeypatch.setattr(data, "MOST", 0.8)
    checkpoint = run_on(folders, "there")
    for path in (folders / "here" / "train").rglob("*.png"):
        pixels = np.asarray(Image.open(path))
        if tuple(data.fingerprints([pixels.transpose(2, 0, 1)], [0])[0].tolist()) in pictures(checkpoint):
            Image.fromarray(255 - pixels).save(path)  # one of the six
            break
    assert held_again(folders, checkpoint, "here") < pictures(checkpoint)
    assert len(held_again(folders, checkpoint, "here")) == 5


def test_weights_of_other_images_leave_the_split_free(folders):
    run_on(folders, "there")
    os.rename(folders / "run", folders / "first")
    for path in (folders / "here").rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    second = run_on(folders, "here", "--init_from", folders / "first" / "best.pth.tar")
    assert len(pictures(second)) == 6


@pytest.mark.parametrize("seed", [0, 5])
def test_a_run_that_starts_from_weights_holds_out_what_they_were_not_trained_on(seed, folders):
    first = run_on(folders, "there")
    os.rename(folders / "run", folders / "first")
    start = f"--seed {seed} --init_from", folders / "first" / "best.pth.tar"
    second = run_on(folders, "here", *start)
    assert pictures(second) == pictures(first)
    assert training_set.known_data(second)["split_seed"] == 0
    again = run_on(folders, "here", "--overwrite --config", folders / "run" / "config.yaml")
    assert pictures(again) == pictures(first)
    assert pictures(run_on(folders, "here", "--resume --num_epochs 2", *start)) == pictures(first)


def test_a_run_cannot_hold_out_what_the_weights_it_starts_from_were_trained_on(folders):
    run_on(folders, "there", "--val_fraction 0")
    os.rename(folders / "run", folders / "first")
    start = "--init_from", folders / "first" / "best.pth.tar", "--data_dir", folders / "there"
    outcome = call(train.main, HELD, "--device cpu --run_dir", folders / "run", *start)
    assert outcome.code == 2
    assert "the earlier training held out no images" in outcome.err[0]
    assert not (folders / "run").exists()


def test_recordings_that_weights_were_trained_on_are_not_tested(cifar10, tmp_path):  # noqa: F811
    flags = "--dataset dvs_cifar10 --arch dvs_cnn7 --img_size 8 --num_steps 2 --data_dir"
    assert call(train.main, SMALL, flags, cifar10, "--seed 3 --run_dir", tmp_path / "a").code == 0
    start = "--seed 4 --init_from", tmp_path / "a" / "best.pth.tar"
    assert call(train.main, SMALL, flags, cifar10, *start, "--run_dir", tmp_path / "b").code == 0
    tested = []
    for run in ("a", "b"):
        args, checkpoint = test.parse_args([str(tmp_path / run / "best.pth.tar")])
        tested.append(
            data.build_loaders(args, train=False, **training_set.known_data(checkpoint)).test.maker.split.images
        )
    assert torch.equal(*tested)
    outcome = call(train.main, SMALL, flags, cifar10, *start, "--dvs_split first100 --run_dir", tmp_path / "c")
    assert outcome.code == 2
    assert "was trained with random" in outcome.err[0]


# ---- Testing as trained ----------------------------------------------------------------------------


def test_images_of_another_size_than_that_of_the_training_are_refused_but_where_it_is_asked_for(folders, monkeypatch):
    monkeypatch.setitem(model.ARCHS, "tiny", ((4, "G"), (4,)))  # takes images of any size
    flags = HELD.replace("fc3", "tiny").replace("--img_size 4", ""), "--num_epochs 1 --device cpu"
    where = "--data_dir", folders / "there", "--run_dir", folders / "run"
    assert call(train.main, *flags, *where).code == 0
    for path in (folders / "there").rglob("*.png"):
        Image.open(path).resize((8, 8)).save(path)
    outcome = call(test.main, folders / "run" / "best.pth.tar")
    assert outcome.code == 2
    assert "are 8x8, the net was trained on 4x4: pass --img_size 4" in outcome.err[0]
    assert call(test.main, folders / "run" / "best.pth.tar", "--img_size 8").code == 0


def test_a_binary_encoder_never_gets_the_images_of_another(folders):
    run_on(folders, "there", "--encoding poisson")
    outcome = call(test.main, folders / "run" / "best.pth.tar", "--encoding poisson_binary")
    assert outcome.code == 2
    assert "was trained with --encoding poisson" in outcome.err[0]


# ---- Encodings and data sets -------------------------------------------------------------------------


def test_each_data_set_brings_its_encoding():
    chosen = {name: train.parse_args(["--dataset", name]).encoding for name in data.DATASETS}
    assert {name for name, encoding in chosen.items() if encoding == "frames"} == {"nmnist", "dvs_cifar10"}
    assert chosen["smnist"] == "pixels"
    assert chosen["cifar10"] == chosen["tiny_imagenet"] == "poisson"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dataset nmnist --encoding poisson", "event data takes frames"),
        ("--dataset digits --encoding frames", "event data takes frames"),
        ("--dataset digits --permuted", "--permuted belongs to --dataset smnist"),
        ("--dataset smnist --permuted --encoding poisson", "--permuted belongs to --dataset smnist"),
        ("--dataset smnist --arch fc3 --num_steps 25", "28x28 pixels, one a time-step, need num_steps 784"),
        ("--dataset smnist --arch vgg9 --num_steps 784", "img_size of vgg9 must be at least 8, got 1"),
    ],
)
def test_an_encoding_that_does_not_suit_is_one_sentence(flags, message, mnist, nmnist, tmp_path):  # noqa: F811
    where = {"smnist": mnist, "nmnist": nmnist}.get(flags.split()[1], tmp_path)
    outcome = call(train.main, "--batch_size 4", flags, "--data_dir", where, "--run_dir", tmp_path / "run")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert message in outcome.err[0]
    assert not (tmp_path / "run").exists()


# ---- MNIST -------------------------------------------------------------------------------------------


def load(root, train_too=True):
    return image_data.mnist(train.parse_args(["--dataset", "smnist", "--data_dir", str(root)]), train_too)


def test_mnist_images_are_those_of_the_idx_files(mnist):
    raw = load(mnist)
    assert raw.train.images.shape == (40, 1, 28, 28)
    assert raw.test.images[5, 0, 2, 3] == 5 + 7 * (2 + 3)
    assert raw.train.labels.tolist() == [k % 10 for k in range(40)]
    assert raw.classes == [str(k) for k in range(10)]


def pack(mnist, where, monkeypatch):
    """Make .gz files of the idx files, whose md5 sums are then the published ones. Returns their paths."""
    packed = []
    for path in sorted((mnist / "MNIST" / "raw").iterdir()):
        packed.append(mnist / where / f"{path.name}.gz")
        packed[-1].write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    sums = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in packed]
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", sums)
    return packed


@pytest.mark.parametrize("where", [".", "MNIST", "MNIST/raw"])
def test_mnist_is_unpacked_from_its_gz_files(mnist, where, monkeypatch):
    expected = load(mnist).train.images
    pack(mnist, where, monkeypatch)
    assert torch.equal(load(mnist).train.images, expected)


def test_a_gz_of_mnist_that_is_not_the_published_one_is_not_unpacked(mnist, monkeypatch):
    packed = pack(mnist, "MNIST/raw", monkeypatch)
    packed[0].write_bytes(gzip.compress(bytes(1000)))
    before = packed[0].read_bytes()
    monkeypatch.setattr("urllib.request.urlopen", None)
    with pytest.raises(UserError, match="put the four files of MNIST"):
        load(mnist)
    assert packed[0].read_bytes() == before
    assert not packed[0].with_suffix("").exists()


def test_testing_mnist_needs_no_training_part(mnist):
    assert load(mnist, train_too=False).train is None


def test_smnist_pixels_enter_between_0_and_1(mnist):
    args = train.parse_args(
        ["--dataset", "smnist", "--data_dir", str(mnist), "--batch_size", "4", "--num_workers", "0"]
    )
    images, _ = next(iter(data.build_loaders(args).test))
    assert torch.equal(images, image_data.mnist(args, False).test.images[:8] / 255)


def spoil_cut(raw):
    path = raw / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:500])


def spoil_empty(raw):
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"")


def spoil_header(raw):
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(b"PK" + path.read_bytes()[2:])


def spoil_counts(raw):
    write_idx(raw / "train-labels-idx1-ubyte", np.arange(39) % 10)


def spoil_labels(raw):
    write_idx(raw / "t10k-labels-idx1-ubyte", np.arange(20))


@pytest.mark.parametrize("spoil", [spoil_cut, spoil_empty, spoil_header, spoil_counts, spoil_labels])
def test_damaged_idx_files_are_one_sentence(spoil, mnist):
    spoil(mnist / "MNIST" / "raw")
    with pytest.raises(UserError, match="MNIST"):
        load(mnist)


def test_no_mnist_and_no_internet_says_what_to_put_where(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UserError, match=r"put the four files of MNIST \(train-images-idx3-ubyte"):
        load(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_crops_of_a_training_are_those_of_its_checkpoint():
    assert training_set.trained_with("a file", {"config": {"crop_padding": 2}})["crop_padding"] == 2
