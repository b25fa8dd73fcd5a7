"""event_data.py: one claim per test. Recordings are written in the published formats; real N-MNIST where at hand."""

import errno
import os
import shutil
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import cache
import event_data
import train
from data import DATASETS, build_loaders
from event_data import Events, Mended, frames, list_cifar10_dvs, list_nmnist, read_aedat, read_nmnist
from utill import UserError

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "nmnist-small.tar.xz"
HEADER = b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n# created Thu Dec 03 14:47:00 CET 2015\r\n"
NUMBERS = range(9, 21)  # 12 recordings a class; as text, 10 comes before 9


def settings(dataset, root, *more):
    """What train.py makes of its command line."""
    line = f"--dataset {dataset} --num_steps 4 --batch_size 2 --num_workers 0 --data_dir"
    return train.parse_args([*line.split(), str(root), *map(str, more)])


def load(dataset, root, *more, train_too=True):
    return DATASETS[dataset].load(settings(dataset, root, *more), train_too)


def noise(count, sensor, seed=0, span=300_000):
    """A recording of `count` random events, whose first is at 100 us."""
    rng = np.random.default_rng(seed)
    t = 100 + np.sort(np.r_[0, rng.integers(0, span, count - 1)])
    return Events(t, *rng.integers(0, sensor, (2, count)), rng.integers(0, 2, count))


def at(times, x=0, y=0, p=0):
    """Events at one pixel."""
    t = np.array(times)
    return Events(t, np.full_like(t, x), np.full_like(t, y), np.full_like(t, p))


def nmnist_bytes(recording):
    t, x, y, p = recording
    return np.stack([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255], 1).astype(np.uint8).tobytes()


def aedat_bytes(recording, header=HEADER):
    """The file of which `read_aedat` makes `recording`."""
    t, x, y, p = recording
    return header + np.stack([(127 - x) << 8 | (127 - y) << 1 | (1 - p), t], 1).astype(">u4").tobytes()


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def caches(root):
    return sorted((root / ".bntt_cache").iterdir())


@pytest.fixture
def nmnist(tmp_path):
    """A published tree: Train has 2 recordings of a digit, Test 1; recording i of a split is noise(50, 34, seed=i)."""
    for split, count in (("Train", 2), ("Test", 1)):
        for i in range(10 * count):
            path = tmp_path / "nmnist" / split / str(i // count) / f"{i:05}.bin"
            written(path, nmnist_bytes(noise(50, 34, seed=i)))
    return tmp_path / "nmnist"


@pytest.fixture
def cifar10(tmp_path):
    """CIFAR10-DVS with recordings 9 to 20 of each class; the one of number n has n events."""
    root = tmp_path / "dvs"
    for name in event_data.CIFAR10:
        for n in NUMBERS:
            written(root / name / f"cifar10_{name}_{n}.aedat", aedat_bytes(noise(n, 128, seed=n)))
    return root


def zipped(root):
    """The same as the published zips."""
    for name in event_data.CIFAR10:
        with zipfile.ZipFile(root / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in (root / name).iterdir():
                archive.write(path, f"{name}/{path.name}")
                path.unlink()
        (root / name).rmdir()
    return root


@pytest.fixture(scope="module")
def jelly():
    """SpikingJelly's readers and binning, without the rest of its package, which wants more than they need."""
    folder = Path(pytest.importorskip("spikingjelly").__file__).parent / "datasets"
    package = ModuleType("spikingjelly.datasets")
    package.__path__ = [str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, package.__name__, package)
        return pytest.importorskip("spikingjelly.datasets.cifar10_dvs")


# ---- Readers -------------------------------------------------------------------------------------


def test_an_nmnist_event_is_column_row_polarity_and_23_bits_of_time(tmp_path):
    path = written(tmp_path / "1.bin", bytes([3, 5, 0x01, 0x02, 0x03, 33, 0, 0xFF, 0xFF, 0xFF]))
    assert same(read_nmnist(path), ([0x010203, 0x7FFFFF], [3, 33], [5, 0], [0, 1]))


def test_row_240_of_nmnist_moves_time_on_and_is_no_event(tmp_path):
    content = bytes([1, 1, 0, 0, 9, 0, 240, 0, 0, 0, 2, 2, 0, 0, 1, 0, 240, 0, 0, 0, 3, 3, 0, 0, 2])
    assert same(read_nmnist(written(tmp_path / "1.bin", content)), ([9, 8193, 16386], [1, 2, 3], [1, 2, 3], [0] * 3))


def test_an_aedat_event_is_turned_as_spikingjelly_turns_it(tmp_path):
    words = [2 << 8 | 5 << 1 | 1, 7, 127 << 8 | 0 << 1 | 0, 2**32 - 1]
    path = written(tmp_path / "1.aedat", HEADER + np.array(words, ">u4").tobytes())
    assert same(read_aedat(path), ([7, 2**32 - 1], [125, 0], [122, 127], [0, 1]))


def test_a_signal_from_outside_is_no_event(tmp_path):
    words = [1 << 15, 3, 0, 5]
    assert read_aedat(written(tmp_path / "1.aedat", HEADER + np.array(words, ">u4").tobytes())).t.tolist() == [5]


def test_the_readers_agree_with_spikingjellys(tmp_path, jelly):
    aedat = written(tmp_path / "1.aedat", aedat_bytes(noise(1000, 128)))
    nmnist = written(tmp_path / "1.bin", nmnist_bytes(noise(1000, 34)))
    for ours, theirs in (
        (read_aedat(aedat), jelly._load_origin_data(aedat)),
        (read_nmnist(nmnist), jelly.utils.load_ATIS_bin(nmnist)),
    ):
        assert same(ours, (theirs[key] for key in "txyp"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("1.aedat", aedat_bytes(noise(9, 128))[:-3], "buffer size must be a multiple of element size"),
        ("1.aedat", aedat_bytes(noise(9, 128), b""), "#!AER-DAT2.0"),
        ("1.aedat", aedat_bytes(noise(9, 128), b"#!AER-DAT3.1\r\n"), "#!AER-DAT2.0"),
        ("1.aedat", HEADER, "no events"),
        ("1.aedat", HEADER[:-5], "no events"),
        ("1.aedat", aedat_bytes(at([5, 10_009, 8])), "backwards after event 2, by 10001"),
        ("1.aedat", HEADER + np.array([1 << 16, 0], ">u4").tobytes(), "outside the 128x128 sensor"),
        ("1.bin", nmnist_bytes(noise(9, 34))[:-3], "cannot reshape"),
        ("1.bin", b"", "no events"),
        ("1.bin", nmnist_bytes(at([5, 10_009, 8])), "backwards after event 2, by 10001"),
        ("1.bin", nmnist_bytes(at([5], x=34)), "outside the 34x34 sensor"),
        ("1.bin", nmnist_bytes(at([5], y=34)), "outside the 34x34 sensor"),
    ],
)
def test_a_bad_recording_is_one_sentence_that_names_it(tmp_path, name, content, message):
    path = written(tmp_path / name, content)
    with pytest.raises(UserError, match=f"{path}.*{message}"):
        (read_aedat if name == "1.aedat" else read_nmnist)(path)


# ---- Recordings with small faults ----------------------------------------------------------------


def both(times):
    """The recording `at(times)`, once in each format: [(reader, content, suffix)]."""
    return [(read_aedat, aedat_bytes(at(times)), "aedat"), (read_nmnist, nmnist_bytes(at(times)), "bin")]


@pytest.mark.parametrize("kind", [0, 1])
def test_events_that_come_a_little_late_are_sorted_in_with_a_warning(tmp_path, kind):
    read, content, suffix = both([5, 90, 40, 41, 10_000, 100])[kind]
    with pytest.warns(Mended, match=rf"1.{suffix}: mended, with 3 events out of order"):
        assert read(written(tmp_path / f"1.{suffix}", content)).t.tolist() == [5, 40, 41, 90, 100, 10_000]


def test_events_that_are_sorted_in_keep_their_pixels(tmp_path):
    t, x, y, p = noise(200, 128)
    x[50:52] = 7, 8
    swapped = Events(t.copy(), x.copy(), y.copy(), p.copy())
    for column in swapped:
        column[50:52] = column[50:52][::-1].copy()
    with pytest.warns(Mended):
        assert same(read_aedat(written(tmp_path / "1.aedat", aedat_bytes(swapped))), (t, x, y, p))


def test_events_of_the_same_time_stay_in_the_order_of_the_file(tmp_path):
    recording = Events(np.r_[np.full(99, 9), 8], np.arange(100), np.zeros(100, int), np.zeros(100, int))
    with pytest.warns(Mended):
        assert read_aedat(written(tmp_path / "1.aedat", aedat_bytes(recording))).x.tolist() == [99, *range(99)]


def test_a_32_bit_clock_that_wraps_round_goes_on_with_a_warning(tmp_path):
    path = written(tmp_path / "1.aedat", aedat_bytes(at([2**32 - 9, 2**32 - 2, 3, 2**32 - 1, 8])))
    with pytest.warns(Mended, match="1 events out of order in 1, a clock that wrapped round in 1"):
        assert (read_aedat(path).t - (2**32 - 9)).tolist() == [0, 7, 8, 12, 17]


def test_a_sound_recording_is_read_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_aedat(written(tmp_path / "1.aedat", aedat_bytes(at([0, 5, 5, 2**32 - 1]))))


@pytest.mark.parametrize("times", [[20_009, 2**32 - 1, 30_000], [2**31, 0, 9]])
def test_a_clock_that_jumps_is_damage_and_not_a_wrap(tmp_path, times):
    with pytest.raises(UserError, match="time runs backwards"):
        read_aedat(written(tmp_path / "1.aedat", aedat_bytes(at(times))))


@pytest.mark.parametrize("chunk", [100, 3])
def test_what_was_mended_is_counted_over_all_files_each_time(nmnist, capsys, monkeypatch, chunk):
    monkeypatch.setattr(event_data, "CHUNK", chunk)  # 3: in several processes
    for name in ("Train/3/00006.bin", "Train/8/00016.bin"):
        written(nmnist / name, nmnist_bytes(at([5, 9, 8, 7])))
    for _ in range(2):  # the second time from the cache
        record = load("nmnist", nmnist).record
        said = capsys.readouterr().err.splitlines()
        assert [line for line in said if "warning" in line] == [
            "warning: train recordings of nmnist mended: 4 events out of order in 2 of 20"
        ]
    assert record["mended"] == {"train": "4 events out of order in 2"}


# ---- Frames --------------------------------------------------------------------------------------


def test_a_frame_is_indexed_by_step_polarity_row_and_column():
    counts = frames(Events(*np.array([[0, 90, 99], [4, 4, 1], [2, 2, 3], [1, 1, 0]])), 2, 5, 5)
    assert counts.dtype == np.uint8
    assert counts.shape == (2, 2, 5, 5)
    assert np.argwhere(counts).tolist() == [[0, 1, 2, 4], [1, 0, 3, 1], [1, 1, 2, 4]]


@pytest.mark.parametrize(
    ("split_by", "times", "counts"),
    [
        ("time", [100, 109, 110, 119, 120, 131], [2, 2, 2]),  # 31 us are 3 times 10, and 1 left over
        ("time", [100, 101, 130], [2, 0, 1]),
        ("time", [100, 101], [1, 1, 0]),  # shorter than one microsecond a step
        ("number", [1, 2, 3, 4, 5, 90, 91], [2, 2, 3]),
        ("number", [1, 2], [1, 1, 0]),
        ("duration", [1000, 2999, 3000, 6999, 7000, 9000], [2, 1, 1]),  # 2 ms each; 7000 and 9000 are too late
        ("duration", [1000], [1, 0, 0]),
    ],
)
def test_events_fall_into_the_steps_of_each_way_to_split(split_by, times, counts):
    assert frames(at(times), 3, 1, 1, split_by, bin_ms=2.0).ravel()[::2].tolist() == counts


@pytest.mark.parametrize("split_by", ["time", "number"])
@pytest.mark.parametrize("num_steps", [1, 7, 20])
def test_frames_equal_spikingjellys(split_by, num_steps, jelly):
    recording = noise(5003, 34)
    theirs = jelly.utils.integrate_events_by_fixed_frames_number(recording._asdict(), split_by, num_steps, 34, 34)
    assert np.array_equal(frames(recording, num_steps, 34, 34, split_by), theirs)


def test_more_than_255_events_in_a_cell_count_as_255():
    assert frames(at(range(300)), 1, 1, 1).ravel().tolist() == [255, 0]


def test_a_smaller_frame_adds_up_the_pixels_of_each_cell():
    cells = {0: ([41], [0]), 3: ([40], [0]), 4: ([40], [1]), 127: ([0], [41])}
    assert {x: frames(at([0], x=x, y=127 - x), 1, 128, 42)[0, 0].nonzero() for x in cells} == cells


@pytest.mark.parametrize("size", [1, 42, 100, 128])
def test_a_smaller_frame_loses_no_event(size):
    recording = noise(5000, 128)
    whole, small = (frames(recording, 20, 128, s).sum((2, 3), dtype=int) for s in (128, size))
    assert small.sum() == 5000 or size == 1  # one cell saturates
    assert size == 1 or np.array_equal(whole, small)


def test_a_frame_larger_than_the_sensor_is_refused(nmnist):
    with pytest.raises(UserError, match="--img_size 35 is more than the 34x34 pixels"):
        load("nmnist", nmnist, "--img_size", 35)


# ---- N-MNIST -------------------------------------------------------------------------------------


def test_nmnist_is_read_from_the_published_tree(nmnist):
    raw = load("nmnist", nmnist)
    assert raw.train.images.shape == (20, 4, 2, 34, 34)
    assert raw.train.labels.tolist() == [k // 2 for k in range(20)]
    assert raw.test.labels.tolist() == list(range(10))
    assert raw.classes == [str(k) for k in range(10)]
    for i in range(10):
        assert np.array_equal(raw.test.images[i], frames(noise(50, 34, seed=i), 4, 34, 34))


def test_nmnist_is_read_through_its_lists(tmp_path):
    for name, lines in (("train1K.txt", "#sample #class\r\n2\t7\r\n1\t0\r\n"), ("test100.txt", "#\r\n60001\t3\r\n")):
        written(tmp_path / name, lines.encode())
    for i in (1, 2, 60001):
        written(tmp_path / f"{i}.bs2", nmnist_bytes(noise(i % 100, 34)))
    raw = load("nmnist", tmp_path)
    assert raw.train.labels.tolist() == [7, 0]
    assert raw.train.images.sum((1, 2, 3, 4)).tolist() == [2, 1]
    assert raw.test.labels.tolist() == [3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no Train/ and no Train.zip of N-MNIST: get Train.zip and Test.zip of https://"),
        ("#sample #class\n", "names no recording"),
        ("1 5\n2 five\n", "'five' is not in list"),
        ("1 12\n", "'12' is not in list"),
        ("../1 5\n", "invalid literal .*'../1'"),
    ],
)
def test_bad_nmnist_lists_are_one_sentence(tmp_path, content, message):
    written(tmp_path / "1.bs2", nmnist_bytes(noise(5, 34)))
    if content is not None:
        (tmp_path / "train1K.txt").write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path}.*{message}"):
        list_nmnist(tmp_path, "train")


@pytest.mark.parametrize("inside", ["NMNIST", "extract", "download"])
def test_nmnist_is_found_in_the_folders_that_libraries_make(nmnist, inside):
    expected = load("nmnist", nmnist).train.images
    moved = nmnist.parent / "other" / inside
    moved.parent.mkdir()
    nmnist.rename(moved)
    assert torch.equal(load("nmnist", moved.parent).train.images, expected)


def zip_split(root, split):
    """The folder of a split as its published zip."""
    with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
        for path in sorted((root / split).rglob("*.bin")):
            archive.write(path, path.relative_to(root))
    shutil.rmtree(root / split)


def test_the_two_zips_of_nmnist_are_unpacked_on_first_use(nmnist):
    expected = load("nmnist", nmnist).test.images
    zip_split(nmnist, "Train")
    zip_split(nmnist, "Test")
    assert torch.equal(load("nmnist", nmnist).test.images, expected)
    assert sorted(p.name for p in nmnist.iterdir() if p.name[0] != ".") == ["Test", "Test.zip", "Train", "Train.zip"]


def test_testing_unpacks_no_training_part_of_nmnist(nmnist):
    zip_split(nmnist, "Train")
    load("nmnist", nmnist, train_too=False)
    assert not (nmnist / "Train").exists()


def test_a_cut_zip_of_nmnist_is_one_sentence_and_leaves_nothing(nmnist):
    zip_split(nmnist, "Train")
    os.truncate(nmnist / "Train.zip", 2000)
    with pytest.raises(UserError, match="fetch .*Train.zip again"):
        load("nmnist", nmnist)
    assert sorted(p.name for p in nmnist.iterdir()) == ["Test", "Train.zip"]


@pytest.mark.parametrize("name", ["._00001.bin", ".hidden.bin"])
def test_hidden_files_of_nmnist_are_no_recordings(nmnist, name):
    written(nmnist / "Train" / "3" / name, bytes(4096))
    assert len(load("nmnist", nmnist).train.labels) == 20


@pytest.mark.parametrize("suffix", [".npz", ".mat", ".aedat4"])
@pytest.mark.parametrize("dataset", ["nmnist", "dvs_cifar10"])
def test_a_format_that_is_not_read_is_named(tmp_path, dataset, suffix):
    for part in ("events_np/train/0", "airplane"):
        written(tmp_path / part / f"a{suffix}", b"")
    with pytest.raises(UserError, match=rf", only {suffix} files \(.*which are not read: (get|remove|put)"):
        load(dataset, tmp_path)


@pytest.mark.parametrize("inside", ["CIFAR10DVS", "extract", "download"])
def test_cifar10_dvs_is_found_in_the_folders_that_libraries_make(cifar10, inside):
    expected = load("dvs_cifar10", cifar10).test.images
    moved = cifar10.parent / "other" / inside
    moved.parent.mkdir()
    cifar10.rename(moved)
    assert torch.equal(load("dvs_cifar10", moved.parent).test.images, expected)


def test_a_digit_without_recordings_is_named(nmnist):
    (nmnist / "Test" / "8" / "00008.bin").unlink()
    with pytest.raises(UserError, match="Test/8 holds no .bin file: get Test.zip"):
        load("nmnist", nmnist)


def test_testing_nmnist_needs_no_training_part(nmnist):
    (nmnist / "Train").rename(nmnist / "elsewhere")
    raw = load("nmnist", nmnist, train_too=False)
    assert raw.train is None
    assert len(raw.test.labels) == 10


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if not REAL.exists():
        pytest.skip(f"the real N-MNIST recordings are not at {REAL}")
    root = tmp_path_factory.mktemp("real")
    with tarfile.open(REAL) as archive:
        archive.extractall(root, filter="data")
    return root / "nmnist-small"


def test_the_real_nmnist_has_every_event_of_every_class(real):
    raw = load("nmnist", real)
    assert (len(raw.train.labels), len(raw.test.labels)) == (1000, 100)
    for part, split in (("train", raw.train), ("test", raw.test)):
        assert set(split.labels.tolist()) == set(range(10))
        sizes = [path.stat().st_size // 5 for path, _ in list_nmnist(real, part)]
        assert split.images.sum((1, 2, 3, 4)).tolist() == sizes


def test_the_real_nmnist_reads_as_spikingjelly_reads_it(real, jelly):
    for path, _ in list_nmnist(real, "test"):
        theirs = jelly.utils.load_ATIS_bin(path)
        assert same(read_nmnist(path), (theirs[key] for key in "txyp"))
        for split_by in ("time", "number"):
            expected = jelly.utils.integrate_events_by_fixed_frames_number(theirs, split_by, 25, 34, 34)
            assert np.array_equal(frames(read_nmnist(path), 25, 34, 34, split_by), expected)


# ---- CIFAR10-DVS ---------------------------------------------------------------------------------


def test_cifar10_dvs_is_42_pixels_wide_unless_asked_for_more(cifar10):
    raw = load("dvs_cifar10", cifar10, "--dvs_split", "first100")
    assert raw.train.images.shape == (110, 4, 2, 42, 42)
    assert raw.classes == event_data.CIFAR10
    assert np.array_equal(raw.test.images[0], frames(noise(9, 128, seed=9), 4, 128, 42))
    assert load("dvs_cifar10", cifar10, "--img_size", 128).test.images.shape[-2:] == (128, 128)


def test_first100_takes_the_lowest_numbers_for_testing(cifar10):
    raw = load("dvs_cifar10", cifar10, "--dvs_split", "first100")
    assert raw.test.images.sum((1, 2, 3, 4)).tolist() == [9] * 10  # as many events as its number
    assert raw.train.images.sum((1, 2, 3, 4)).tolist() == list(NUMBERS)[1:] * 10
    assert raw.train.labels.tolist() == [k for k in range(10) for _ in range(11)]


def test_first100_is_100_of_1000(tmp_path, monkeypatch):
    numbers = list(range(1000))
    monkeypatch.setattr(event_data, "list_class", lambda root, name: numbers)
    parts = list_cifar10_dvs(tmp_path, "first100", seed=0)
    assert [n for n, _ in parts["test"]] == numbers[:100] * 10
    assert [n for n, _ in parts["train"]] == numbers[100:] * 10


def test_the_random_split_depends_on_the_seed_alone_and_covers_every_class(cifar10):
    first, again, other = (list_cifar10_dvs(cifar10, "random", seed) for seed in (0, 0, 1))
    assert first == again
    assert first["test"] != other["test"]
    assert {label for _, label in first["test"]} == set(range(10))
    assert len({path.stem.split("_")[-1] for path, _ in first["test"]}) > 1  # another draw in each class
    everything = sorted((path, k) for k, name in enumerate(event_data.CIFAR10) for path in (cifar10 / name).iterdir())
    assert sorted(first["train"] + first["test"]) == everything


def test_testing_decodes_no_training_recording(cifar10):
    whole = load("dvs_cifar10", cifar10).test
    for path, _ in list_cifar10_dvs(cifar10, "random", 0)["train"]:
        path.write_bytes(b"damaged")
    raw = load("dvs_cifar10", cifar10, train_too=False)
    assert raw.train is None
    assert torch.equal(raw.test.images, whole.images)


def test_the_published_zips_are_unpacked_on_first_use(cifar10):
    parts = list_cifar10_dvs(cifar10, "random", 0)
    zipped(cifar10)
    assert list_cifar10_dvs(cifar10, "random", 0) == parts
    assert sorted(path.name for path in cifar10.iterdir()) == sorted(
        [*event_data.CIFAR10, *(f"{name}.zip" for name in event_data.CIFAR10)]
    )


def cut(archive):
    os.truncate(archive, archive.stat().st_size // 2)


def damage(archive):
    content = bytearray(archive.read_bytes())
    content[100:120] = bytes(20)
    archive.write_bytes(content)


def swell(archive):
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("airplane/cifar10_airplane_99.aedat", bytes(2 << 20))


@pytest.mark.parametrize("spoil", [cut, damage, swell])
def test_a_bad_zip_is_one_sentence_and_leaves_nothing(cifar10, monkeypatch, spoil):
    monkeypatch.setattr(event_data, "MOST_UNPACKED", 1 << 20)
    spoil(zipped(cifar10) / "airplane.zip")
    before = sorted(cifar10.parent.rglob("*"))
    with pytest.raises(UserError, match="airplane.zip") as caught:
        load("dvs_cifar10", cifar10)
    assert "\n" not in str(caught.value)
    assert sorted(cifar10.parent.rglob("*")) == before


def test_what_is_missing_and_where_it_goes_is_said(cifar10):
    (cifar10 / "truck").rename(cifar10 / "lorry")
    with pytest.raises(UserError, match=f"{cifar10} has no truck/ and no truck.zip: .* CIFAR10-DVS .* https://"):
        load("dvs_cifar10", cifar10)


def test_a_class_with_too_few_recordings_is_named(cifar10):
    for path in list((cifar10 / "cat").iterdir())[1:]:
        path.unlink()
    with pytest.raises(UserError, match="cat holds 1 .aedat files"):
        load("dvs_cifar10", cifar10)


def test_a_recording_without_a_number_is_named(cifar10):
    (cifar10 / "cat" / "cifar10_cat_9.aedat").rename(cifar10 / "cat" / "nine.aedat")
    with pytest.raises(UserError, match="cat/nine.aedat has no number"):
        load("dvs_cifar10", cifar10)


# ---- Cache ---------------------------------------------------------------------------------------


def test_the_second_time_no_recording_is_read(nmnist, monkeypatch):
    first = load("nmnist", nmnist)
    monkeypatch.setattr(cache, "write_cache", None)
    second = load("nmnist", nmnist)
    assert torch.equal(first.train.images, second.train.images)


def test_several_processes_give_the_same_frames(nmnist, monkeypatch):
    alone = load("nmnist", nmnist).train.images.clone()
    for path in caches(nmnist):
        path.unlink()
    monkeypatch.setattr(event_data, "CHUNK", 7)
    assert torch.equal(load("nmnist", nmnist).train.images, alone)


def test_a_cache_of_half_its_length_is_made_anew(nmnist):
    whole = load("nmnist", nmnist).test.images.clone()
    for path in caches(nmnist):
        os.truncate(path, path.stat().st_size // 2)
    assert torch.equal(load("nmnist", nmnist).test.images, whole)


def test_a_recording_that_changed_is_read_again(nmnist):
    load("nmnist", nmnist)
    before = caches(nmnist)
    written(nmnist / "Test" / "0" / "00000.bin", nmnist_bytes(noise(60, 34)))
    assert load("nmnist", nmnist).test.images[0].sum() == 60
    assert len(caches(nmnist)) == len(before) == 2  # the stale one is gone


def test_other_settings_are_another_cache(nmnist):
    recording = noise(50, 34, seed=3)
    bins = [["--split_by", "duration", "--bin_ms", ms] for ms in (20.0, 50.0)]
    for more in ([], ["--num_steps", 3], ["--img_size", 17], ["--split_by", "number"], *bins):
        args = settings("nmnist", nmnist, *more)
        expected = frames(recording, args.num_steps, 34, args.img_size or 34, args.split_by, args.bin_ms)
        assert np.array_equal(DATASETS["nmnist"].load(args, False).test.images[3], expected)


def test_a_cache_of_an_older_version_is_made_anew(nmnist, monkeypatch):
    load("nmnist", nmnist)
    before = caches(nmnist)
    monkeypatch.setattr(event_data, "VERSION", event_data.VERSION + 1)
    load("nmnist", nmnist)
    assert not set(caches(nmnist)) & set(before)


@pytest.mark.parametrize("chunk", [100, 3])
def test_a_bad_recording_leaves_no_cache(nmnist, monkeypatch, chunk):
    monkeypatch.setattr(event_data, "CHUNK", chunk)  # 3: in a worker process
    os.truncate(nmnist / "Test" / "7" / "00007.bin", 99)
    with pytest.raises(UserError, match="cannot read .*00007.bin"):
        load("nmnist", nmnist, train_too=False)
    assert not (nmnist / ".bntt_cache").exists()


def test_a_full_disk_is_one_sentence_and_leaves_nothing(nmnist, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        load("nmnist", nmnist)
    assert not (nmnist / ".bntt_cache").exists()


# ---- Batches -------------------------------------------------------------------------------------


def test_a_batch_holds_the_counts_as_they_are(nmnist):
    loaders = build_loaders(settings("nmnist", nmnist))
    images, labels = next(iter(loaders.test))
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 1, 2, 3]
    assert np.array_equal(images[3], frames(noise(50, 34, seed=3), 4, 34, 34))
    assert next(iter(loaders.train))[0].shape == (2, 4, 2, 34, 34)
