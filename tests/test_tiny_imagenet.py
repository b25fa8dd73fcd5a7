"""tiny_imagenet of image_data.py: one claim per test, on a tree in the published layout and a slice of the real one."""

import errno
import hashlib
import os
import shutil
import tarfile
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from conftest import TINY, call
from PIL import Image
from test_data import pixels, settings

import cache
import data
import image_data
import train
from data import build_loaders

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "tiny-imagenet-mini.tar.xz"
WNIDS = ["n03", "n01", "n02", "n04"]  # not sorted, as published
WORDS = "n01\tcrane, bird\nn02\tcrane\nn03\tEgyptian cat\nn99\tabacus\n"
TRAIN, VAL = 5, 3  # images a class


def write_tiny(root):
    """A tree of 8x8 JPEGs; returns root. Image i of the train part and image 100 + i of val are pixels(seed=i)."""
    jpeg = dict(quality=95, subsampling=0)
    for k, wnid in enumerate(WNIDS):
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t7\t7\n")
        for i in range(TRAIN):
            path = root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            Image.fromarray(pixels(8, 8, 3, seed=TRAIN * k + i)).save(path, **jpeg)
    (root / "val" / "images").mkdir(parents=True)
    with open(root / "val" / "val_annotations.txt", "w") as notes:
        for i in range(VAL * len(WNIDS)):
            Image.fromarray(pixels(8, 8, 3, seed=100 + i)).save(root / "val" / "images" / f"val_{i}.JPEG", **jpeg)
            notes.write(f"val_{i}.JPEG\t{WNIDS[i % len(WNIDS)]}\t0\t0\t7\t7\n")
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "words.txt").write_text(WORDS)
    return root


def tiny(root, **changes):
    return settings("tiny_imagenet", data_dir=str(root), **(dict(batch_size=4) | changes))


def seen(split):
    return split.images.permute(0, 2, 3, 1).numpy()


def as_pillow(paths):
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


@pytest.fixture
def tree(tmp_path):
    return write_tiny(tmp_path / "tiny")


class Quiet(SimpleHTTPRequestHandler):
    """Serves the files of a folder."""

    def log_message(self, *args):
        pass


@pytest.fixture
def archive(tree, tmp_path, monkeypatch):
    """The tree as the published archive, which a server of this process has; its path."""
    path = tmp_path / "published" / "tiny-imagenet-200.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        for member in sorted(p for p in tree.rglob("*") if p.is_file()):
            file.write(member, Path("tiny-imagenet-200") / member.relative_to(tree))
    publish(path, monkeypatch)
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=path.parent)) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{path.name}"
        monkeypatch.setattr(image_data, "TINY_IMAGENET_URL", url)
        yield path
        server.shutdown()


def publish(path, monkeypatch):
    """From now on the file at `path` is the published one."""
    monkeypatch.setattr(image_data, "TINY_IMAGENET_MD5", hashlib.md5(path.read_bytes()).hexdigest())


# ---- What is read ----------------------------------------------------------------------------------


def test_training_images_carry_their_folders_class(tree):
    split = build_loaders(tiny(tree)).train.maker.split
    paths = [tree / "train" / wnid / "images" / f"{wnid}_{i}.JPEG" for wnid in WNIDS for i in range(TRAIN)]
    assert np.array_equal(seen(split), as_pillow(paths))
    assert split.labels.tolist() == [0] * TRAIN + [1] * TRAIN + [2] * TRAIN + [3] * TRAIN


def test_test_images_are_the_val_part_with_the_class_of_its_annotations(tree):
    split = build_loaders(tiny(tree)).test.maker.split
    assert np.array_equal(seen(split), as_pillow(tree / "val" / "images" / f"val_{i}.JPEG" for i in range(4 * VAL)))
    assert split.labels.tolist() == [0, 1, 2, 3] * VAL


def test_classes_are_called_by_their_first_word_and_no_two_alike(tree):
    assert build_loaders(tiny(tree)).facts.classes == ["Egyptian cat", "crane (n01)", "crane (n02)", "n04"]


def test_grey_images_become_rgb(tree):
    path = tree / "train" / "n03" / "images" / "n03_0.JPEG"
    Image.fromarray(pixels(8, 8)).save(path)
    image = seen(build_loaders(tiny(tree)).train.maker.split)[0]
    assert np.array_equal(image, np.stack([np.asarray(Image.open(path))] * 3, axis=-1))


def test_images_are_normalised_by_the_whole_sets_numbers(tree):
    loaders = build_loaders(tiny(tree))
    assert (loaders.facts.mean, loaders.facts.std) == tuple(map(list, image_data.TINY_IMAGENET_STATS))


def test_testing_needs_no_training_images(tree):
    shutil.rmtree(tree / "train")
    assert build_loaders(tiny(tree), train=False).test.num_images == 4 * VAL


def test_img_size_resizes(tree):
    assert build_loaders(tiny(tree, img_size=4)).train.maker.split.images.shape == (4 * TRAIN, 3, 4, 4)


def test_the_second_time_nothing_is_decoded(tree, monkeypatch):
    first = seen(build_loaders(tiny(tree)).test.maker.split)
    monkeypatch.setattr(cache, "write_cache", None)
    assert np.array_equal(seen(build_loaders(tiny(tree)).test.maker.split), first)


def test_the_published_folder_is_found_inside_data_dir(tree):
    inside = tree.parent / "data" / "tiny-imagenet-200"
    inside.parent.mkdir()
    tree.rename(inside)
    assert build_loaders(tiny(inside.parent)).train.num_images == 4 * TRAIN


def test_it_is_downloaded_and_unpacked_into_data_dir(tree, archive, tmp_path):
    expected, folder = seen(build_loaders(tiny(tree)).test.maker.split), tmp_path / "new"
    assert np.array_equal(seen(build_loaders(tiny(folder)).test.maker.split), expected)
    assert sorted(p.name for p in folder.iterdir()) == ["tiny-imagenet-200", "tiny-imagenet-200.zip"]


def test_an_archive_in_data_dir_is_used_with_no_network(archive, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", None)
    assert build_loaders(tiny(archive.parent)).test.num_images == 4 * VAL


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason=f"needs {REAL}")
def test_a_slice_of_the_real_images_reads_the_same_way(tmp_path):
    with tarfile.open(REAL) as file:
        file.extractall(tmp_path, filter="data")
    root = tmp_path / "tiny-imagenet-mini"
    loaders = build_loaders(tiny(root))
    split, test = loaders.train.maker.split, loaders.test.maker.split
    wnids = (root / "wnids.txt").read_text().split()
    assert (len(loaders.facts.classes), loaders.facts.classes[0], loaders.facts.img_size) == (20, "Egyptian cat", 64)
    paths = [sorted((root / "train" / wnid / "images").iterdir()) for wnid in wnids]
    assert split.labels.tolist() == [k for k in range(20) for _ in paths[k]]
    assert np.array_equal(seen(split), as_pillow(path for part in paths for path in part))
    notes = [line.split("\t") for line in (root / "val" / "val_annotations.txt").read_text().splitlines()]
    assert test.labels.tolist() == [wnids.index(wnid) for _, wnid, *_ in notes]
    assert np.array_equal(seen(test)[-1], as_pillow([root / "val" / "images" / notes[-1][0]])[0])
    values = seen(split) / 255
    assert np.abs(values.mean((0, 1, 2)) - loaders.facts.mean).max() < 0.02
    assert np.abs(values.std((0, 1, 2)) - loaders.facts.std).max() < 0.005


# ---- Bad input -------------------------------------------------------------------------------------


def sort_val(root, inner=""):
    """val/ as many sort it: the images in folders of their classes."""
    for line in (root / "val" / "val_annotations.txt").read_text().splitlines():
        name, wnid = line.split()[:2]
        (root / "val" / wnid / inner).mkdir(parents=True, exist_ok=True)
        (root / "val" / "images" / name).rename(root / "val" / wnid / inner / name)


@pytest.mark.parametrize("inner", ["", "images"])
def test_val_in_class_folders_gives_the_same_images_in_the_same_order(tree, inner):
    before = build_loaders(tiny(tree)).test.maker.split
    sort_val(tree, inner)
    after = build_loaders(tiny(tree)).test.maker.split
    assert np.array_equal(before.images, after.images)
    assert np.array_equal(before.labels, after.labels)


def test_val_sorted_by_half_is_refused(tree):
    (tree / "val" / "n01").mkdir()
    (tree / "val" / "images" / "val_1.JPEG").rename(tree / "val" / "n01" / "val_1.JPEG")
    refused(tree, "val has files in images/, no class")


def test_a_class_folder_that_no_list_names_is_refused(tree):
    sort_val(tree)
    (tree / "val" / "n77").mkdir()
    (tree / "val" / "n77" / "val_99.JPEG").write_bytes(b"")
    refused(tree, "val has files in n77/, no class of wnids.txt")


def test_a_sorted_val_needs_no_annotations(tree):
    before = build_loaders(tiny(tree)).test.maker.split
    sort_val(tree)
    (tree / "val" / "val_annotations.txt").unlink()
    after = build_loaders(tiny(tree)).test.maker.split
    assert np.array_equal(before.images, after.images)
    assert np.array_equal(before.labels, after.labels)


def test_training_images_right_in_their_class_folder_are_read(tree):
    before = build_loaders(tiny(tree)).train.maker.split.images
    for wnid in WNIDS:
        for path in sorted((tree / "train" / wnid / "images").iterdir()):
            path.rename(tree / "train" / wnid / path.name)
        (tree / "train" / wnid / "images").rmdir()
    assert np.array_equal(build_loaders(tiny(tree)).train.maker.split.images, before)


def test_the_layout_of_val_is_recorded(tree):
    assert build_loaders(tiny(tree)).record["layout"] == "as published"
    sort_val(tree)
    assert build_loaders(tiny(tree)).record["layout"] == "val/<wnid>/"


def test_hidden_files_beside_the_images_are_no_samples(tree):
    (tree / "train" / "n01" / "images" / "._n01_0.JPEG").write_bytes(b"no image")
    assert len(build_loaders(tiny(tree)).train.maker.split.labels) == TRAIN * len(WNIDS)


def refused(root, message):
    """train.py refuses the folder in one sentence with exit code 2, and leaves it as it was."""
    before = sorted(root.rglob("*")) if root.exists() else None
    flags = "--dataset tiny_imagenet --batch_size 4 --num_epochs 1 --data_dir"
    outcome = call(train.main, TINY, flags, root, "--run_dir", root.parent / "run")
    assert outcome.code == 2
    assert message in outcome.err[-1]
    assert not [line for line in outcome.err[:-1] if line and "B/s" not in line]  # the progress of a download
    after = sorted(root.rglob("*")) if root.exists() else None
    caches = [path for path in after or [] if path.name.startswith("train-8-") or path.name == ".bntt_cache"]
    assert [path for path in after or [] if path not in caches] == (before or [])  # a whole cache may stay
    assert not (root.parent / "run").exists()


def add(path, text):
    path.write_text(path.read_text() + text)


BAD = {
    "wnids.txt": (lambda root: (root / "wnids.txt").unlink(), "wnids.txt: No such file"),
    "empty wnids.txt": (lambda root: (root / "wnids.txt").write_text("\n"), "must name every class once"),
    "double wnid": (lambda root: add(root / "wnids.txt", "n03\n"), "must name every class once"),
    "words.txt": (lambda root: (root / "words.txt").unlink(), "words.txt: No such file"),
    "words no text": (lambda root: (root / "words.txt").write_bytes(b"\xff\xfe\x00"), "cannot read"),
    "train folder": (lambda root: shutil.rmtree(root / "train" / "n02"), "train/n02/images is missing or has no .JPEG"),
    "val folder": (lambda root: shutil.rmtree(root / "val" / "images"), "val/images is missing or has no .JPEG"),
    "annotations": (lambda root: (root / "val" / "val_annotations.txt").unlink(), "val_annotations.txt: No such file"),
    "unnamed image": (
        lambda root: shutil.copy(root / "val/images/val_0.JPEG", root / "val/images/val_99.JPEG"),
        "do not agree on val_99.JPEG",
    ),
    "missing image": (lambda root: (root / "val/images/val_3.JPEG").unlink(), "do not agree on val_3.JPEG"),
    "unknown wnid": (lambda root: add(root / "val/val_annotations.txt", "val_1.JPEG\tn77\t0\t0\t7\t7\n"), "'n77'"),
    "no wnid": (lambda root: add(root / "val/val_annotations.txt", "val_1.JPEG\n"), "has length 1; 2 is required"),
    "named twice": (lambda root: add(root / "val/val_annotations.txt", "val_1.JPEG\tn03\n"), "names an image twice"),
    "outside": (lambda root: add(root / "val/val_annotations.txt", "../a.JPEG\tn03\n"), "do not agree on ../a.JPEG"),
    "cut JPEG": (lambda root: os.truncate(root / "val/images/val_2.JPEG", 300), "cannot read image"),
    "no JPEG": (lambda root: (root / "train/n01/images/n01_1.JPEG").write_text("no"), "n01_1.JPEG"),
}


@pytest.mark.parametrize("damage", BAD)
def test_a_bad_folder_is_refused(tree, damage):
    break_it, message = BAD[damage]
    break_it(tree)
    refused(tree, message)


def test_images_of_two_sizes_ask_for_img_size(tree):
    Image.fromarray(pixels(9, 8, 3)).save(tree / "train" / "n02" / "images" / "n02_1.JPEG")
    with pytest.raises(data.UserError, match="n02_1.JPEG .* --img_size"):
        build_loaders(tiny(tree))


def test_no_internet_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(image_data, "TINY_IMAGENET_URL", "http://nowhere.invalid/tiny-imagenet-200.zip")
    refused(tmp_path / "new", f"put tiny-imagenet-200.zip into {tmp_path / 'new'}")


def test_a_download_with_another_md5_is_refused(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(image_data, "TINY_IMAGENET_MD5", "0" * 32)
    refused(tmp_path / "new", "tiny-imagenet-200.zip (File not found or corrupted.)")


def test_a_download_that_breaks_off_is_refused(archive, tmp_path):
    os.truncate(archive, 1000)
    refused(tmp_path / "new", "tiny-imagenet-200.zip (File not found or corrupted.)")


def test_a_cut_archive_in_data_dir_is_refused_and_left_alone(archive):
    os.truncate(archive, 1000)
    refused(archive.parent, "tiny-imagenet-200.zip is incomplete or damaged: remove it")


def test_an_archive_of_something_else_is_refused(archive, monkeypatch):
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("other/a.txt", "x")
    publish(archive, monkeypatch)
    refused(archive.parent, "it must hold tiny-imagenet-200/")


def test_a_disk_full_while_caching_is_refused(tree, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(tree, "No space left on device")
