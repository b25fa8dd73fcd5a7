"""data.py: one claim per test. Image trees are tiny PNGs, CIFAR files are in the published layout."""

import hashlib
import json
import os
import pickle
import random
import tarfile
import urllib.error
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call
from PIL import Image
from torchvision import datasets as published
from torchvision.transforms import functional as transforms

import cache
import data
import early_exit
import image_data
import test
import train
from data import Row, augment_batch, build_loaders, epoch_draws, load_images
from image_data import Raw, Split
from utill import DataFacts, UserError

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10-jpeg.tar.xz"


def settings(dataset="synthetic", **changes):
    values = dict(
        dataset=dataset,
        data_dir="./data",
        batch_size=64,
        num_workers=0,
        seed=0,
        img_size=None,
        val_fraction=0.0,
        limit_train=None,
        limit_test=None,
        norm_stats="own",
        encoding="poisson",
        augment=None,
        crop_padding=data.CROP_PADDING,
    )
    return Namespace(**(values | changes))


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_tree(root, classes=("cat", "dog"), train=6, test=3, size=8):
    """root/{train,test}/<class>/*.png; returns root. The pixels of image i are pixels(.., seed=i)."""
    i = 0
    for split, count in (("train", train), ("test", test)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                Image.fromarray(pixels(size, size, 3, seed=i)).save(root / split / name / f"{k:03}.png")
                i += 1
    return root


def folder(root, **changes):
    return settings("imagefolder", data_dir=str(root), **(dict(batch_size=2) | changes))


def cache_files(root):
    return sorted((root / ".bntt_cache").iterdir())


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tree")


def same_batches(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    return all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def by_index(loader):
    """{index in the raw training set: finished image} of the loader's epoch."""
    batches = zip(loader.keys, loader, strict=True)
    return {i: image for (_, indices), (images, _) in batches for i, image in zip(indices, images, strict=True)}


# ---- Order and augmentation ----------------------------------------------------------------------


def test_two_workers_give_the_batches_of_none():
    alone, crowd = (build_loaders(settings(num_workers=n, limit_train=300, limit_test=50)) for n in (0, 2))
    for epoch in range(2):
        alone.train.set_epoch(epoch)
        crowd.train.set_epoch(epoch)
        assert same_batches(alone.train, crowd.train)
    assert same_batches(alone.test, crowd.test)


def test_images_on_a_device_give_the_same_batches():
    alone, moved = (build_loaders(settings(num_workers=n, limit_train=300)).train for n in (0, 2))
    assert same_batches(alone, moved.to("cpu"))
    assert moved.num_workers == 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_random_states_alone(num_workers):
    torch.manual_seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    loaders = build_loaders(settings(num_workers=num_workers, limit_train=130, limit_test=20, val_fraction=0.1))
    for loader in (loaders.train, loaders.val, loaders.test, loaders.train):
        list(loader)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


def test_augment_batch_is_torchvisions_crop_and_flip_of_each_image():
    images = torch.from_numpy(pixels(40, 3, 8, 10))
    draws = epoch_draws(seed=3, epoch=1, count=40)
    batch = augment_batch(images, draws.dy, draws.dx, draws.flip)
    assert batch.dtype == torch.uint8
    for i, image in enumerate(images):
        frame = transforms.pad(transforms.to_pil_image(image), 4)
        crop = transforms.crop(frame, int(draws.dy[i]), int(draws.dx[i]), 8, 10)
        crop = transforms.hflip(crop) if draws.flip[i] else crop
        assert torch.equal(batch[i], transforms.pil_to_tensor(crop))


def test_normalisation_is_torchvisions_to_the_bit():
    image, (mean, std) = pixels(8, 8, 3), image_data.CIFAR10_STATS
    reference = transforms.normalize(transforms.to_tensor(Image.fromarray(image)), mean, std)
    assert torch.equal(data.normalize(torch.from_numpy(image).permute(2, 0, 1)[None], mean, std)[0], reference)


def test_draws_cover_every_offset_and_flip_half():
    draws = epoch_draws(seed=0, epoch=0, count=5000)
    for offsets in (draws.dy, draws.dx):
        assert torch.bincount(offsets, minlength=9).min() > 5000 / 9 * 0.8
        assert offsets.max() == 8
    assert abs(draws.flip.float().mean() - 0.5) < 0.03


@pytest.mark.parametrize("padding", [1, 4])
def test_crops_leave_as_many_pixels_out_as_asked(padding):
    loader = build_loaders(settings(batch_size=100, augment=True, crop_padding=padding)).train
    images = loader.maker[0, np.arange(100)][0]
    black = loader.maker.split.images.new_zeros(1, *images.shape[1:])
    black = data.normalize(black, loader.maker.mean, loader.maker.std)
    rows = (images == black).all(dim=(1, 3))  # all of a row of pixels
    empty = torch.stack([rows.int().cumprod(1).sum(1), rows.flip(1).int().cumprod(1).sum(1)])
    assert empty.max() == padding


def test_an_image_is_augmented_alike_with_and_without_the_other_images():
    whole = by_index(build_loaders(settings(batch_size=50)).train)
    part = by_index(build_loaders(settings(batch_size=20, limit_train=100, val_fraction=0.2)).train)
    assert len(whole) == 1000
    assert len(part) == 100
    assert all(torch.equal(image, whole[i]) for i, image in part.items())


def test_epochs_and_seeds_differ_in_order_and_in_augmentation():
    def epoch(seed, number):
        train = build_loaders(settings(seed=seed, batch_size=100)).train
        train.set_epoch(number)
        return by_index(train)

    first = epoch(0, 0)
    for other in (epoch(0, 1), epoch(1, 0)):
        assert list(other) != list(first)
        assert sum(not torch.equal(other[i], first[i]) for i in first) > 900


def test_an_epoch_can_be_repeated():
    train = build_loaders(settings(num_workers=1, limit_train=200)).train
    next(iter(train))  # an epoch that is left early
    assert same_batches(train, train)


def test_digits_are_shifted_and_never_mirrored():
    shifted, plain = (
        next(iter(build_loaders(settings("digits", augment=augment, limit_train=64)).train))[0]
        for augment in (True, False)
    )
    blank = plain.amin()
    padded = torch.nn.functional.pad(plain, (4,) * 4, value=blank.item())
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1).flatten(2, 3)[:, 0]  # [B, 81, 8, 8]: every crop
    assert (windows == shifted).flatten(2).all(2).any(1).all()
    assert (shifted != plain).any()


def test_augmentation_follows_the_data_set_unless_told():
    told = {("synthetic", None): True, ("synthetic", False): False, ("digits", None): False, ("digits", True): True}
    for (dataset, augment), expected in told.items():
        train = build_loaders(settings(dataset, augment=augment)).train
        (epoch, indices), (images, _) = next(zip(train.keys, train, strict=True))
        plain = data.normalize(train.maker.split.images[indices], train.maker.mean, train.maker.std)
        assert torch.equal(images, plain) != expected


# ---- Which images --------------------------------------------------------------------------------


def test_training_drops_the_last_partial_batch_and_repeats_no_image():
    train = build_loaders(settings(limit_train=200)).train
    indices = np.concatenate([i for _, i in train.keys])
    assert [len(labels) for _, labels in train] == [64, 64, 64]
    assert train.num_images == len(np.unique(indices)) == 192
    assert len(train) == 3


def test_testing_sees_every_image_once_in_order():
    loaders = build_loaders(settings("digits", batch_size=50))
    images, labels = (torch.cat(parts) for parts in zip(*loaders.test, strict=True))
    raw = image_data.digits(None, True).test
    assert torch.equal(images, data.normalize(raw.images, loaders.facts.mean, loaders.facts.std))
    assert torch.equal(labels, raw.labels)
    assert loaders.test.num_images == len(labels) == 360
    assert len(loaders.test) == 4


def test_batches_are_contiguous_float32_and_int64():
    images, labels = next(iter(build_loaders(settings()).train))
    assert images.shape == (64, 3, 32, 32)
    assert images.is_contiguous()
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("num_workers", [0, 1])
def test_start_batch_continues_where_a_run_stopped(num_workers):
    train = build_loaders(settings(num_workers=num_workers)).train
    train.set_epoch(4)
    whole = list(train)
    train.set_epoch(4, start_batch=9)
    assert same_batches(train, whole[9:])
    train.set_epoch(5)
    assert len(list(train)) == len(train)


def test_start_batch_does_not_make_the_skipped_batches(monkeypatch):
    train, made = build_loaders(settings()).train, []
    make = data.BatchMaker.__getitem__
    monkeypatch.setattr(data.BatchMaker, "__getitem__", lambda self, key: made.append(key) or make(self, key))
    train.set_epoch(0, start_batch=len(train) - 1)
    list(train)
    assert len(made) == 1


def test_limits_keep_the_classes_in_proportion():
    loaders = build_loaders(settings("digits", batch_size=10, limit_train=100, limit_test=50))
    raw = image_data.digits(None, True)
    for loader, split, limit in ((loaders.train, raw.train, 100), (loaders.test, raw.test, 50)):
        share = torch.bincount(split.labels) / len(split.labels) * limit
        assert len(loader.keys.indices) == limit
        assert (torch.bincount(split.labels[loader.keys.indices]) - share).abs().max() <= 1


def test_limits_are_the_same_for_a_seed_and_others_for_another():
    chosen = [build_loaders(settings(limit_train=100, seed=seed)).train.keys.indices for seed in (0, 0, 1)]
    assert np.array_equal(chosen[0], chosen[1])
    assert not np.array_equal(chosen[0], chosen[2])


def test_a_limit_below_the_number_of_classes_works():
    assert build_loaders(settings(limit_test=3)).test.num_images == 3


def test_validation_images_are_stratified_and_never_trained_on():
    loaders = build_loaders(settings(val_fraction=0.1))
    train, val = loaders.train.keys.indices, loaders.val.keys.indices
    assert sorted([*train, *val]) == list(range(1000))
    assert torch.bincount(loaders.val.maker.split.labels[val]).tolist() == [10] * 10


def test_validation_images_are_not_augmented():
    loaders = build_loaders(settings(val_fraction=0.1))
    plain = data.normalize(loaders.val.maker.split.images, loaders.facts.mean, loaders.facts.std)
    assert all(torch.equal(image, plain[i]) for i, image in by_index(loaders.val).items())


def test_digits_train_and_test_hold_all_1797_and_do_not_follow_the_seed():
    first, second = (build_loaders(settings("digits", seed=seed)) for seed in (0, 1))
    assert torch.equal(first.test.maker.split.images, second.test.maker.split.images)
    assert len(first.train.maker.split.labels) + len(first.test.maker.split.labels) == 1797
    assert (first.facts.in_channels, first.facts.img_size) == (1, 8)


def test_digits_are_the_published_ones():
    """sha256 of the bytes of scikit-learn 1.9's load_digits(): its images (0 to 16), then its labels, in its order."""
    with np.load(ROOT / "digits.npz") as file:
        found = hashlib.sha256(file["images"].tobytes() + file["labels"].tobytes()).hexdigest()
    assert found == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def test_synthetic_classes_can_be_told_apart():
    train, test = (split.images.flatten(1).float() for split in image_data.synthetic(None, True)[:2])
    centres = torch.stack([train[k::10].mean(0) for k in range(10)])
    assert (torch.cdist(test, centres).argmin(1) == torch.arange(200) % 10).float().mean() > 0.95


# ---- Statistics and sizes ------------------------------------------------------------------------


def test_measured_statistics_are_those_of_all_training_pixels(tree):
    loaders = build_loaders(folder(tree))
    values = loaders.train.maker.split.images.double() / 255
    assert loaders.facts.mean == pytest.approx(values.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert loaders.facts.std == pytest.approx(values.std((0, 2, 3), correction=0).tolist(), rel=1e-12)


def test_norm_stats_authors_are_cifar10s():
    loaders = build_loaders(settings(norm_stats="authors"))
    assert (loaders.facts.mean, loaders.facts.std) == ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])


def test_poisson_binary_keeps_images_between_0_and_1():
    loaders = build_loaders(settings(encoding="poisson_binary"))
    images, _ = next(iter(loaders.test))
    assert torch.equal(images, loaders.test.maker.split.images[:128] / 255)


def test_img_size_resizes_every_split():
    loaders = build_loaders(settings("digits", img_size=16))
    sizes = {next(iter(loader))[0].shape[-1] for loader in (loaders.train, loaders.test)}
    assert sizes == {loaders.facts.img_size} == {16}


def test_a_checkpoints_settings_need_no_training_images(tree):
    trained = build_loaders(folder(tree))
    for path in sorted((tree / "train").rglob("*.png")):
        path.unlink()
    tested = build_loaders(folder(tree, img_size=trained.facts.img_size), train=False, facts=trained.facts)
    assert tested.facts == trained.facts
    assert tested.train is tested.val is None
    assert same_batches(trained.test, tested.test)


# ---- Image folders and their cache ---------------------------------------------------------------


def test_one_class_alone_is_refused(tmp_path):
    write_tree(tmp_path, ["cat"])
    with pytest.raises(UserError, match="has one class alone"):
        build_loaders(folder(tmp_path))


def test_imagefolder_gives_the_files_pixels_and_their_folders_classes(tree):
    loaders = build_loaders(folder(tree))
    expected = [pixels(8, 8, 3, seed=i).transpose(2, 0, 1) for i in range(18)]
    assert np.array_equal(loaders.train.maker.split.images, expected[:12])
    assert np.array_equal(loaders.test.maker.split.images, expected[12:])
    assert loaders.test.maker.split.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert loaders.facts.classes == ["cat", "dog"]


def test_many_images_are_decoded_by_several_processes_alike(tree, monkeypatch):
    monkeypatch.setattr(image_data, "CHUNK", 4)
    loaders = build_loaders(folder(tree))
    assert np.array_equal(loaders.train.maker.split.images[11], pixels(8, 8, 3, seed=11).transpose(2, 0, 1))


def test_the_second_time_nothing_is_decoded(tree, monkeypatch):
    first = build_loaders(folder(tree))
    times = [path.stat().st_mtime_ns for path in cache_files(tree)]
    monkeypatch.setattr(cache, "write_cache", None)
    second = build_loaders(folder(tree))
    assert same_batches(first.train, second.train)
    assert first.facts == second.facts
    assert times == [path.stat().st_mtime_ns for path in cache_files(tree)]


def test_a_changed_image_makes_a_new_cache_and_drops_the_old(tree):
    build_loaders(folder(tree))
    before = cache_files(tree)
    Image.fromarray(pixels(8, 8, 3, seed=99)).save(tree / "train" / "cat" / "000.png")
    images = build_loaders(folder(tree)).train.maker.split.images
    assert np.array_equal(images[0], pixels(8, 8, 3, seed=99).transpose(2, 0, 1))
    assert len(cache_files(tree)) == len(before) == 2
    assert cache_files(tree) != before


def test_an_added_image_is_seen(tree):
    build_loaders(folder(tree))
    Image.fromarray(pixels(8, 8, 3)).save(tree / "test" / "dog" / "new.png")
    assert build_loaders(folder(tree)).test.num_images == 7


@pytest.mark.parametrize("left", [0, 10, 700])
def test_a_half_written_cache_is_made_anew(tree, left):
    first = list(build_loaders(folder(tree)).train)
    for path in cache_files(tree):
        os.truncate(path, left)
    assert same_batches(first, build_loaders(folder(tree)).train)


def test_a_cache_of_another_shape_is_made_anew(tree):
    first = list(build_loaders(folder(tree)).train)
    for path in cache_files(tree):
        np.save(path, pixels(5, 3, 8, 8))
    assert same_batches(first, build_loaders(folder(tree)).train)


def test_a_read_only_data_folder_uses_the_users_cache_folder(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(os, "access", lambda path, mode: tree not in Path(path).parents)
    build_loaders(folder(tree))
    assert cache_files(tree) == []
    assert len(list((tmp_path / "user").rglob("*.npy"))) == 2


def over_white(rgba):
    """uint8 [H, W, 3] of what [H, W, 4] shows in front of white."""
    picture = Image.fromarray(rgba)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))


def test_grey_and_transparent_images_become_rgb(tree):
    Image.fromarray(pixels(8, 8)).save(tree / "train" / "cat" / "000.png")
    Image.fromarray(pixels(8, 8, 4)).save(tree / "train" / "cat" / "001.png")
    images = build_loaders(folder(tree)).train.maker.split.images
    assert np.array_equal(images[0], np.stack([pixels(8, 8)] * 3))
    assert np.array_equal(images[1], over_white(pixels(8, 8, 4)).transpose(2, 0, 1))


def test_images_of_mixed_sizes_are_brought_to_img_size(tree):
    Image.fromarray(pixels(20, 11, 3)).save(tree / "train" / "dog" / "003.png")
    assert build_loaders(folder(tree, img_size=8)).train.maker.split.images.shape == (12, 3, 8, 8)


@pytest.mark.parametrize(("in_channels", "mode"), [(3, "RGB"), (1, "L")])
def test_load_images_prepares_pictures_as_testing_does(tmp_path, in_channels, mode):
    files = {
        "RGB": pixels(8, 8, 3),
        "RGBA": pixels(8, 8, 4) | np.uint8([0, 0, 0, 255]),
        "L": pixels(8, 8),
        "big": pixels(30, 20, 3),
    }
    for name, array in files.items():
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    mean, std = [0.5] * in_channels, [0.25] * in_channels
    images = load_images([tmp_path / f"{name}.png" for name in files], DataFacts(["a"], in_channels, 8, mean, std))
    assert images.shape == (4, in_channels, 8, 8)
    for image, array in zip(images[:3], files.values(), strict=False):
        reference = transforms.to_tensor(Image.fromarray(array).convert(mode))
        assert torch.equal(image, transforms.normalize(reference, mean, std))


@pytest.mark.skipif(not REAL.exists(), reason=f"needs {REAL}")
def test_real_jpegs_are_decoded_as_pillow_does(tmp_path):
    paths = []
    with tarfile.open(REAL, "r|xz") as archive:
        for member in archive:
            if member.isfile() and len(paths) < 40:
                split, name = "train" if len(paths) < 30 else "test", "two" if len(paths) in (29, 39) else "one"
                paths.append(tmp_path / split / name / f"{len(paths):03}.jpg")
                paths[-1].parent.mkdir(parents=True, exist_ok=True)
                paths[-1].write_bytes(archive.extractfile(member).read())
            elif len(paths) == 40:
                break
    loaders = build_loaders(folder(tmp_path))
    decoded = torch.cat([loaders.train.maker.split.images, loaders.test.maker.split.images])
    for image, path in zip(decoded, paths, strict=True):
        assert np.array_equal(image.permute(1, 2, 0), np.asarray(Image.open(path).convert("RGB")))


# ---- Images as they are --------------------------------------------------------------------------


def as_read(path, array):
    """Grey [H, W] of `array` saved at `path` and read back."""
    Image.fromarray(array).save(path)
    return image_data.read_image(path, in_channels=1)[0].tolist()


def test_what_is_transparent_shows_white(tmp_path):
    assert as_read(tmp_path / "a.png", np.uint8([[[9, 9, 9, 0], [9, 9, 9, 255]]])) == [[255, 9]]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_grey_of_16_bits_is_scaled_by_its_range(tmp_path, name):
    assert as_read(tmp_path / name, np.uint16([[0, 257, 32896, 65535]])) == [[0, 1, 128, 255]]


def test_a_float_image_of_0_to_1_is_scaled(tmp_path):
    assert as_read(tmp_path / "a.tif", np.float32([[0, 0.5, 1]])) == [[0, 128, 255]]


@pytest.mark.parametrize(
    "array",
    [
        np.float32([[0, 300]]),
        np.float32([[0, np.nan]]),
        np.int32([[-1, 9]]),
        np.int32([[0, 70000]]),
        np.int32([[0, 200]]),
    ],
    ids=["large float", "nan", "negative", "large", "8 bits in 32"],
)
def test_an_image_of_unclear_range_is_refused_by_name(tmp_path, array):
    with pytest.raises(UserError, match=r"cannot read image .*a.tif \(its "):
        as_read(tmp_path / "a.tif", array)


def test_an_image_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    Image.fromarray(pixels(4, 6)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(image_data.read_image(tmp_path / "a.png", 1)[0], np.rot90(pixels(4, 6), -1))


TURNED = [
    [[1, 2, 3], [4, 5, 6]],
    [[3, 2, 1], [6, 5, 4]],
    [[6, 5, 4], [3, 2, 1]],
    [[4, 5, 6], [1, 2, 3]],
    [[1, 4], [2, 5], [3, 6]],
    [[4, 1], [5, 2], [6, 3]],
    [[6, 3], [5, 2], [4, 1]],
    [[3, 6], [2, 5], [1, 4]],
]


@pytest.mark.parametrize(("dtype", "one"), [(np.uint8, 1), (np.uint16, 257), (np.float32, 1 / 255)])
@pytest.mark.parametrize("more", [{}, {"compression": "tiff_lzw"}])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_in_all_eight_ways(tmp_path, orientation, more, dtype, one):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray((np.array(TURNED[0]) * one).astype(dtype)).save(tmp_path / "a.tif", exif=exif, **more)
    assert image_data.read_image(tmp_path / "a.tif", 1)[0].tolist() == TURNED[orientation - 1]


@pytest.mark.parametrize("exif", [b"no such thing", b"II*\0"])
def test_exif_that_cannot_be_read_turns_nothing(tmp_path, exif):
    Image.fromarray(pixels(8, 8)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(image_data.read_image(tmp_path / "a.png", 1)[0], pixels(8, 8))


def test_a_picture_cut_short_is_refused_though_it_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(80, 80, 3)).save(tmp_path / "a.jpg", exif=exif)
    os.truncate(tmp_path / "a.jpg", 3000)
    with pytest.raises(UserError, match="cannot read image .*a.jpg"):
        image_data.read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("name", "mode", "clear", "seen"),
    [
        ("a.png", "L", 2, [1, 255, 3]),
        ("a.png", "P", 2, [1, 255, 3]),
        ("a.gif", "P", 2, [1, 255, 3]),
        ("a.png", "P", bytes([255, 255, 0, 128]), [1, 255, 129]),
        ("a.png", "RGB", (2, 2, 2), [1, 255, 3]),
    ],
)
def test_a_colour_that_stands_for_nothing_shows_white(tmp_path, name, mode, clear, seen):
    picture = Image.fromarray(np.uint8([[1, 2, 3]]))
    if mode == "P":
        picture = Image.frombytes("P", (3, 1), bytes([1, 2, 3]))
        picture.putpalette([value for grey in range(256) for value in (grey, grey, grey)])
    picture.convert(mode).save(tmp_path / name, transparency=clear)
    assert image_data.read_image(tmp_path / name, 1)[0].tolist() == [seen]


def test_grey_with_alpha_shows_white_where_it_is_clear(tmp_path):
    assert as_read(tmp_path / "a.png", np.uint8([[[9, 0], [9, 255]]])) == [[255, 9]]


def test_16_bit_grey_that_stands_for_nothing_shows_white(tmp_path):
    Image.fromarray(np.uint16([[257, 514]])).save(tmp_path / "a.png", transparency=514)
    assert image_data.read_image(tmp_path / "a.png", 1)[0].tolist() == [[1, 255]]


def test_an_opaque_picture_with_alpha_keeps_every_bit(tmp_path):
    array = np.dstack([pixels(64, 64, 3), np.full((64, 64), 255, np.uint8)])
    Image.fromarray(array).save(tmp_path / "a.png")
    assert np.array_equal(image_data.read_image(tmp_path / "a.png"), array[..., :3].transpose(2, 0, 1))


def test_big_endian_16_bits_are_scaled_alike(tmp_path):
    values = np.array([[0, 257, 65535]], ">u2")
    Image.frombytes("I;16B", (3, 1), values.tobytes()).save(tmp_path / "a.tif")
    assert image_data.read_image(tmp_path / "a.tif", 1)[0].tolist() == [[0, 1, 255]]


def test_a_grey_map_is_scaled_by_the_maximum_it_names(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5\n3 1\n4095\n" + np.array([0, 2048, 4095], ">u2").tobytes())
    assert image_data.read_image(tmp_path / "a.pgm", 1)[0].tolist() == [[0, 128, 255]]


def test_16_bits_in_32_are_scaled_as_16(tmp_path):
    assert as_read(tmp_path / "a.tif", np.int32([[0, 257, 65535]])) == [[0, 1, 255]]


def test_a_dark_16_bit_image_stays_dark(tmp_path):
    assert as_read(tmp_path / "a.png", np.uint16([[0, 100, 200]])) == [[0, 0, 1]]


def test_16_bit_grey_becomes_three_equal_channels(tmp_path):
    Image.fromarray(np.uint16([[257, 514]])).save(tmp_path / "a.png")
    assert image_data.read_image(tmp_path / "a.png").tolist() == [[[1, 2]]] * 3


# ---- Folders as they are -------------------------------------------------------------------------


def test_files_that_are_no_samples_are_left_out_and_counted(tree, capsys):
    cat = tree / "train" / "cat"
    for name in ("._000.png", "@eaDir/000.png", ".thumbs/a/000.png", "Thumbs.db", "../dog.png"):
        (cat / name).parent.mkdir(parents=True, exist_ok=True)
        (cat / name).write_bytes(b"no image")
    loaders = build_loaders(folder(tree))
    assert len(loaders.train.maker.split.labels) == 12
    said = capsys.readouterr().out
    assert said.startswith(f"data: {tree}: train/ 12 images, test/ 6 images; left out: ")
    kinds = {"2 hidden", "1 .png beside the class folders", "1 .db", "1 @eaDir/"}
    assert set(said.strip().split("left out: ")[1].split(", ")) == kinds


def test_linked_folders_count_once_each(tree):
    (tree / "train" / "cat").rename(tree / "cats")
    (tree / "train" / "cat").symlink_to(tree / "cats")
    (tree / "cats" / "circle").symlink_to(tree / "cats")
    (tree / "cats" / "above").symlink_to(tree)
    assert build_loaders(folder(tree)).train.maker.split.labels.tolist() == [0] * 6 + [1] * 6


def test_a_link_in_a_hidden_folder_takes_no_image_away(tree):
    cat = tree / "train" / "cat"
    (cat / "more").mkdir()
    (cat / "000.png").rename(cat / "more" / "000.png")
    (cat / ".last").mkdir()
    (cat / ".last" / "link").symlink_to(cat / "more")
    assert len(build_loaders(folder(tree)).train.maker.split.labels) == 12


@pytest.mark.parametrize(
    "name", ["@eaDir", "__MACOSX", ".git", "#recycle", ".ipynb_checkpoints", "System Volume Information"]
)
def test_a_folder_that_is_left_behind_is_no_class(tree, name):
    for split in ("train", "test"):
        (tree / split / name).mkdir()
        Image.fromarray(pixels(8, 8, 3)).save(tree / split / name / "a.png")
    assert build_loaders(folder(tree)).facts.classes == ["cat", "dog"]


@pytest.mark.parametrize("name", [".000.png", "._000.png", "000.png~", "Thumbs.db", "desktop.ini", "notes", "000.txt"])
def test_a_file_that_is_no_sample_is_left_out(tree, name):
    (tree / "test" / "cat" / name).write_bytes(b"no image")
    loaders = build_loaders(folder(tree))
    assert (loaders.test.num_images, sum(loaders.record["left_out"].values())) == (6, 1)


def test_an_image_of_every_suffix_is_read(tree):
    source = tree / "train" / "cat" / "000.png"
    for suffix in (".jfif", ".avif", ".JPG", ".webp"):
        source.with_suffix(suffix).write_bytes(source.read_bytes())  # Pillow looks at what is in it
    assert len(build_loaders(folder(tree)).train.maker.split.labels) == 12 + 4


def test_a_linked_folder_in_a_class_counts(tree):
    (tree / "test" / "dog").rename(tree / "dogs")
    (tree / "test" / "dog").mkdir()
    (tree / "test" / "dog" / "more").symlink_to(tree / "dogs")
    assert build_loaders(folder(tree)).test.maker.split.labels.tolist() == [0] * 3 + [1] * 3


def test_a_folder_linked_into_two_classes_counts_in_both(tree):
    for name in ("cat", "dog"):
        (tree / "train" / name / "both").symlink_to(tree / "test" / "cat")
    assert build_loaders(folder(tree)).train.maker.split.labels.tolist() == [0] * 9 + [1] * 9


def test_a_folder_that_cannot_be_listed_is_named(tree, monkeypatch):
    (tree / "train" / "cat" / "more").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="more"):
        build_loaders(folder(tree))


def test_test_is_read_where_there_is_val_too(tree):
    (tree / "val").mkdir()
    assert build_loaders(folder(tree)).test.num_images == 6


def test_val_serves_for_test(tree):
    first = build_loaders(folder(tree))
    (tree / "test").rename(tree / "val")
    assert same_batches(first.test, build_loaders(folder(tree)).test)


def test_training_and_testing_say_what_was_read(tree):
    flags = "--dataset imagefolder --batch_size 4 --num_epochs 1 --data_dir"
    run = call(train.main, TINY, flags, tree, "--run_dir", tree.parent / "run")
    tested = call(test.main, tree.parent / "run" / "last.pth.tar", "--device cpu")
    assert f"data: {tree}: train/ 12 images, test/ 6 images" in run.out
    left = call(early_exit.main, tree.parent / "run" / "last.pth.tar", "--device cpu")
    for outcome in (tested, left):
        assert [line for line in outcome.out if line.startswith("data:")] == [f"data: {tree}: test/ 6 images"]
        assert outcome.result["count"] == 6  # the last line is the JSON


def test_data_that_is_no_tree_says_nothing(capsys):
    build_loaders(settings("digits"))
    assert capsys.readouterr().out == ""


# ---- CIFAR as a tree of images -------------------------------------------------------------------


@pytest.fixture
def cifar_tree(tmp_path):
    return write_tree(tmp_path / "cifar10", image_data.CIFAR_CLASSES["CIFAR10"].split(), 2, 1, size=32)


@pytest.mark.parametrize("up", [0, 1])
def test_a_cifar_tree_is_read_with_the_statistics_of_the_set(cifar_tree, up):
    loaders = build_loaders(settings("cifar10", data_dir=str([cifar_tree, cifar_tree.parent][up]), batch_size=4))
    assert loaders.facts.mean == list(image_data.CIFAR10_STATS[0])
    assert loaders.facts.classes[1] == "automobile"
    assert np.array_equal(loaders.test.maker.split.images[3], pixels(32, 32, 3, seed=23).transpose(2, 0, 1))


def test_a_cifar_trees_layout_and_hash_reach_the_environment_of_the_run(cifar_tree):
    run_dir = cifar_tree.parent / "run"
    flags = "--dataset cifar10 --batch_size 4 --num_epochs 1 --data_dir"
    assert call(train.main, TINY, flags, cifar_tree, "--run_dir", run_dir).code == 0
    record = json.loads((run_dir / "environment.json").read_text())["data"]
    assert record["layout"] == "train/<class>/, test/<class>/"
    assert all(len(record["sha256"][split]) == 64 for split in ("train", "test"))


def test_the_hash_follows_pixels_and_labels_and_not_the_order(cifar_tree):
    def found():
        return build_loaders(settings("cifar10", data_dir=str(cifar_tree), batch_size=4)).record["sha256"]

    first, cat = found(), cifar_tree / "train" / "cat"
    (cat / "000.png").rename(cat / "zzz.png")
    assert found() == first
    (cat / "zzz.png").rename(cifar_tree / "train" / "dog" / "zzz.png")
    assert found()["train"] != first["train"]
    Image.fromarray(pixels(32, 32, 3, seed=99)).save(cifar_tree / "test" / "cat" / "000.png")
    assert found()["test"] != first["test"]


def test_a_cifar_tree_has_the_hash_of_the_published_files(cifar, tmp_path):
    name, root = cifar
    loaders, classes = build_loaders(settings(name, data_dir=str(root), batch_size=4)), image_data.CIFAR_CLASSES
    for part in ("train", "test"):
        split = getattr(loaders, part).maker.split
        for i, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            path = tmp_path / "tree" / part / classes[name.upper()].split()[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    tree = build_loaders(settings(name, data_dir=str(tmp_path / "tree"), batch_size=4))
    assert tree.record["sha256"] == loaders.record["sha256"]


def test_published_files_come_before_a_tree(cifar):
    name, root = cifar
    write_tree(root, image_data.CIFAR_CLASSES[name.upper()].split(), 1, 1, size=32)
    assert build_loaders(settings(name, data_dir=str(root), batch_size=4)).record["layout"] == "as published"


def test_img_size_resizes_a_cifar_tree_and_leaves_the_hash(cifar_tree):
    small, own = (
        build_loaders(settings("cifar10", data_dir=str(cifar_tree), batch_size=4, img_size=size)) for size in (8, None)
    )
    assert small.facts.img_size == 8
    assert small.record == own.record


def test_cifar_classes_are_as_many_as_they_should_be():
    counts = {name: len(set(names.split())) for name, names in image_data.CIFAR_CLASSES.items()}
    assert counts == {"CIFAR10": 10, "CIFAR100": 100}
    assert all(names.split() == sorted(names.split()) for names in image_data.CIFAR_CLASSES.values())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda cat: Image.fromarray(pixels(32, 32, 3)).save(cat / "a.jpg"), "a.jpg is a JPEG file"),
        (lambda cat: cat.rename(cat.with_name("kitten")), "classes of CIFAR10.* see cat, kitten"),
        (lambda cat: Image.fromarray(pixels(9, 9, 3)).save(cat / "a.png"), "a.png is not 32x32"),
    ],
)
def test_a_cifar_tree_that_is_not_the_set_is_refused(cifar_tree, spoil, message):
    spoil(cifar_tree / "train" / "cat")
    with pytest.raises(UserError, match=message):
        build_loaders(settings("cifar10", data_dir=str(cifar_tree), batch_size=4))


# ---- CIFAR in the published layout ---------------------------------------------------------------

CIFAR = {
    "cifar10": (published.CIFAR10, "labels", 10),
    "cifar100": (published.CIFAR100, "fine_labels", 100),
}


@pytest.fixture(params=CIFAR)
def cifar(request, tmp_path, monkeypatch):
    """(name, data_dir): two images a class and file as published; torchvision is told their md5 sums."""
    dataset, label_key, classes = CIFAR[request.param]
    root = tmp_path / dataset.base_folder
    root.mkdir()

    def write(name, content):
        (root / name).write_bytes(pickle.dumps(content, protocol=2))
        return [name, hashlib.md5((root / name).read_bytes()).hexdigest()]

    lists = {}
    for attribute in ("train_list", "test_list"):
        lists[attribute] = [
            write(name, {"data": pixels(2 * classes, 3072, seed=i), label_key: [*range(classes)] * 2})
            for i, (name, _) in enumerate(getattr(dataset, attribute))
        ]
        monkeypatch.setattr(dataset, attribute, lists[attribute])
    name, md5 = write(dataset.meta["filename"], {dataset.meta["key"]: [f"c{k}" for k in range(classes)]})
    monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": md5})
    return request.param, tmp_path


def test_cifar_is_read_from_the_published_folder(cifar, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", None)  # and from nowhere else
    name, root = cifar
    dataset, _, classes = CIFAR[name]
    loaders = build_loaders(settings(name, data_dir=str(root), batch_size=10))
    train, test = loaders.train.maker.split, loaders.test.maker.split
    assert train.images.shape == (2 * classes * len(dataset.train_list), 3, 32, 32)
    assert np.array_equal(test.images, pixels(2 * classes, 3072).reshape(-1, 3, 32, 32))
    assert test.labels.tolist() == [*range(classes)] * 2
    assert loaders.facts.classes == [f"c{k}" for k in range(classes)]
    assert loaders.facts.mean == list(data.DATASETS[name].stats[0])


def test_cifar100_takes_its_own_statistics_or_the_authors(cifar):
    name, root = cifar
    own, authors = (build_loaders(settings(name, data_dir=str(root), norm_stats=s)) for s in ("own", "authors"))
    assert authors.facts.mean == list(image_data.CIFAR10_STATS[0])
    assert (own.facts.mean == authors.facts.mean) == (name == "cifar10")


def test_a_published_archive_in_data_dir_is_unpacked(cifar, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", None)
    name, root = cifar
    dataset = CIFAR[name][0]
    with tarfile.open(root / dataset.filename, "w:gz") as archive:
        archive.add(root / dataset.base_folder, dataset.base_folder)
    (root / dataset.base_folder).rename(root / "elsewhere")
    monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5((root / dataset.filename).read_bytes()).hexdigest())
    assert build_loaders(settings(name, data_dir=str(root)), train=False).test.num_images == 2 * CIFAR[name][2]
    assert sorted(p.name for p in root.iterdir()) == sorted([dataset.filename, dataset.base_folder, "elsewhere"])


def test_a_damaged_cifar_file_is_named_and_left_alone(cifar):
    name, root = cifar
    dataset = CIFAR[name][0]
    path = root / dataset.base_folder / dataset.test_list[0][0]
    os.truncate(path, 1000)
    with pytest.raises(UserError, match=f"{path.name} is missing or damaged"):
        build_loaders(settings(name, data_dir=str(root)))
    assert path.stat().st_size == 1000


class Hostile:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("part", ["train_list", "test_list", "meta"])
def test_no_cifar_pickle_is_loaded_that_is_not_the_published_one(cifar, part):
    name, root = cifar
    dataset = CIFAR[name][0]
    file = dataset.meta["filename"] if part == "meta" else getattr(dataset, part)[-1][0]
    for path in (root / dataset.base_folder).iterdir():  # all are hostile, one of them of another md5 sum
        path.write_bytes(pickle.dumps(Hostile(root / "was-here"), protocol=2))
    md5 = hashlib.md5((root / dataset.base_folder / file).read_bytes()).hexdigest()
    for entry in [*dataset.train_list, *dataset.test_list]:
        entry[1] = md5 if entry[0] != file else "0" * 32
    dataset.meta["md5"] = md5 if part != "meta" else "0" * 32
    with pytest.raises(UserError, match=f"{file} is missing or damaged"):
        build_loaders(settings(name, data_dir=str(root)))
    assert not (root / "was-here").exists()


def test_cifar_is_trained_and_tested_on_by_the_scripts(cifar):
    name, root = cifar
    flags = f"--dataset {name} --limit_train 32 --limit_test 20 --num_epochs 1 --data_dir"
    run = call(train.main, TINY, flags, root, "--run_dir", root / "run")
    tested = call(test.main, root / "run" / "last.pth.tar", "--limit_test 20 --device cpu")
    assert run.result["count"] == tested.result["count"] == 20


def test_a_damaged_cifar_archive_is_named_and_left_alone(tmp_path):
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"half a download")
    with pytest.raises(UserError, match="cifar-10-python.tar.gz is incomplete or damaged"):
        build_loaders(settings("cifar10", data_dir=str(tmp_path)))
    assert archive.read_bytes() == b"half a download"


def test_no_network_says_what_to_put_where_and_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UserError, match=r"https://.*cifar-100-python.tar.gz.* into " + str(tmp_path)):
        build_loaders(settings("cifar100", data_dir=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


# ---- Data sets of one's own ----------------------------------------------------------------------


def own(monkeypatch, images, labels, classes=("a", "b"), encoding="poisson", test_split=None):
    """Loaders of a data set whose function returns this, for training and, unless told otherwise, for testing."""
    split = Split(images, labels)
    row = Row(lambda args, train_too: Raw(split, test_split or split, list(classes)), encoding, augment=False)
    monkeypatch.setitem(data.DATASETS, "mine", row)
    return build_loaders(settings("mine", batch_size=2, encoding=encoding))


OWN = pixels(4, 3, 8, 8)


@pytest.mark.parametrize("images", [OWN, list(OWN), torch.from_numpy(OWN), np.asfortranarray(OWN)])
@pytest.mark.parametrize(
    "labels", [[0, 1, 1, 0], np.int32([0, 1, 1, 0]), torch.tensor([0, 1, 1, 0], dtype=torch.uint8)]
)
def test_arrays_and_lists_become_tensors_and_labels_int64(monkeypatch, images, labels):
    split = own(monkeypatch, images, labels).train.maker.split
    assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
    assert np.array_equal(split.images, OWN)
    assert split.labels.tolist() == [0, 1, 1, 0]


def test_a_read_only_array_is_taken_without_a_warning(monkeypatch):
    images = OWN.copy()
    images.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own(monkeypatch, images, [0, 1, 1, 0])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (OWN / 255, [0, 1, 1, 0], r"images .* of mine are torch.float64 \[4, 3, 8, 8\]: they must be uint8"),
        (OWN > 9, [0, 1, 1, 0], "images .* of mine are torch.bool"),
        (OWN[:, 0], [0, 1, 1, 0], r"uint8 \[4, 8, 8\]: they must be uint8 \[N, C, H, W\]"),
        (OWN.transpose(0, 2, 3, 1), [0, 1, 1, 0], r"uint8 \[4, 8, 8, 3\]: they must be"),
        (OWN[:0], [], r"uint8 \[0, 3, 8, 8\]: they must be"),
        (OWN, [1, 2, 2, 1], "labels .* of mine go from 1 to 2, but must lie in 0 to 1"),
        (OWN, [-1, 0, 0, 1], "labels .* of mine go from -1 to 1, but"),
        (OWN, [0.0, 1.0, 1.0, 0.0], "labels .* of mine are torch.float64"),
        (OWN, [True, False, True, False], "labels .* of mine are torch.bool"),
        (OWN, [0, 1, 1], r"labels .* of mine are torch.int64 \[3\], not an integer an image"),
    ],
)
def test_own_data_that_cannot_be_trained_on_is_one_sentence(monkeypatch, images, labels, message):
    with pytest.raises(UserError, match=message) as caught:
        own(monkeypatch, images, labels)
    assert "\n" not in str(caught.value)


def test_own_test_images_are_checked_as_well(monkeypatch):
    with pytest.raises(UserError, match="labels of the test split of mine go from 0 to 5"):
        own(monkeypatch, OWN, [0, 1, 1, 0], test_split=Split(OWN, [0, 1, 5, 0]))


def test_own_splits_of_other_channels_are_refused(monkeypatch):
    with pytest.raises(UserError, match="images of mine are not all square and of one shape"):
        own(monkeypatch, OWN, [0, 1, 1, 0], test_split=Split(OWN[:, :1], [0, 1, 1, 0]))


def test_own_frames_have_five_dimensions(monkeypatch):
    assert own(monkeypatch, pixels(4, 3, 2, 8, 8), [0, 1, 1, 0], encoding="frames").facts.in_channels == 2
    with pytest.raises(UserError, match=r"must be uint8 \[N, T, C, H, W\]"):
        own(monkeypatch, OWN, [0, 1, 1, 0], encoding="frames")


# ---- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch_size=1001), "lower --batch_size"),
        (dict(limit_train=63), "lower --batch_size"),
        (dict(dataset="digits", norm_stats="authors"), "3 channels"),
    ],
)
def test_values_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        build_loaders(settings(**changes))


def test_other_classes_than_those_of_the_training_are_refused():
    with pytest.raises(UserError, match="are not those that the net was trained on"):
        build_loaders(settings(), facts=DataFacts(["a", "b"], 3, 32, [0.5] * 3, [0.25] * 3))


def break_nothing_there(root):
    root.rename(root.with_name("moved"))


def break_empty(root):
    break_nothing_there(root)
    root.mkdir()


def break_no_test(root):
    (root / "test").rename(root / "exam")


def break_no_class(root):
    (root / "train").rename(root / "old")
    (root / "train").mkdir()


def break_class_without_image(root):
    (root / "train" / "eel").mkdir()
    (root / "train" / "eel" / "notes.txt").write_text("later")


def break_classes_differ(root):
    (root / "test" / "dog").rename(root / "test" / "eel")


def break_truncated(root):
    os.truncate(root / "train" / "dog" / "004.png", 150)


def break_not_an_image(root):
    (root / "test" / "dog" / "002.png").write_text("not an image")


def break_dangling_link(root):
    (root / "test" / "dog" / "link.png").symlink_to(root / "nowhere.png")


def break_mixed_sizes(root):
    Image.fromarray(pixels(9, 8, 3)).save(root / "train" / "dog" / "002.png")


def break_other_test_size(root):
    for path in (root / "test").rglob("*.png"):
        Image.fromarray(pixels(9, 9, 3)).save(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_nothing_there, "has no train/"),
        (break_empty, "has no train/"),
        (break_no_test, "has no test/ or val/"),
        (break_no_class, "train is empty"),
        (break_class_without_image, "train/eel has no image"),
        (break_classes_differ, "the same classes as .*test.* see dog, eel"),
        (break_truncated, "cannot read image .*train/dog/004.png"),
        (break_not_an_image, "cannot read image .*test/dog/002.png"),
        (break_dangling_link, "link.png"),
        (break_mixed_sizes, "train/dog/002.png .* --img_size"),
        (break_other_test_size, "--img_size"),
    ],
)
def test_a_bad_image_folder_is_one_sentence_and_nothing_is_deleted(tree, damage, message):
    damage(tree)
    before = {path: path.stat().st_size for path in sorted(tree.rglob("*")) if path.is_file()}
    with pytest.raises((UserError, FileNotFoundError), match=message) as caught:
        build_loaders(folder(tree))
    assert "\n" not in str(caught.value)
    after = {path: path.stat().st_size for path in sorted(tree.rglob("*")) if path.is_file()}
    caches = [path for path in after if ".bntt_cache" in path.parts]
    assert {path: size for path, size in after.items() if path not in caches} == before
    assert all(cache.read_cache(path, np.load(path).shape) for path in caches)  # whole ones only


def test_a_bad_image_met_by_a_worker_process_is_named(tree, monkeypatch):
    monkeypatch.setattr(image_data, "CHUNK", 4)
    break_truncated(tree)
    with pytest.raises(UserError, match=r"train/dog/004.png"):
        build_loaders(folder(tree))


def test_an_interrupted_decode_leaves_no_cache(tree, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_data, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_loaders(folder(tree))
    assert not (tree / ".bntt_cache").exists()


@pytest.mark.parametrize("name", ["absent.png", "text.png", "cut.jpg"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / "text.png").write_text("hello")
    Image.fromarray(pixels(32, 32, 3)).save(tmp_path / "cut.jpg")
    os.truncate(tmp_path / "cut.jpg", 900)
    with pytest.raises(UserError, match=name):
        load_images([tmp_path / name], DataFacts(["a"], 3, 32, [0.5] * 3, [0.5] * 3))
