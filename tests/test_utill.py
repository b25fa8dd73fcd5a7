"""utill.py: one claim per test."""

import io
import json
import math
import os
import pickle
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn

import data
import early_exit
import fused
import nets
import runs
import test as test_script
import training_set
import utill
from model import SpikingVGG
from utill import DataFacts, UserError, learning_rate


def small_net(norm="bntt", steps=3, dtype=torch.float32):
    """A net of which every layer spikes."""
    torch.manual_seed(0)
    net = SpikingVGG("vgg9", steps, img_size=8, in_channels=1, norm=norm).to(dtype)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.weight.mul_(4)
    return net.eval()


def digit_loader(batch_size=16, limit_test=50):
    sizes = dict(batch_size=batch_size, limit_test=limit_test, num_workers=0, img_size=None)
    digits = Namespace(dataset="digits", data_dir="", seed=0, norm_stats="own", encoding="poisson", **sizes)
    return data.build_loaders(digits, train=False).test


def one_batch(count=4, dtype=torch.float32):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


# ---- Errors --------------------------------------------------------------------------------------


def test_a_user_error_is_one_line_and_exit_code_2(capsys):
    @utill.entry_point
    def main(argv=None):
        raise UserError("no such file: a\nb")

    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("error: no such file: a b\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "runs/x"), "cannot use runs/x: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_a_file_that_the_system_refuses_is_one_line_that_names_it(capsys, error, words):
    @utill.entry_point
    def main(argv=None):
        raise error

    assert main([]) == 2
    assert capsys.readouterr().err.endswith(f"error: {words}\n")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("x"), r"^cannot read a.bin \('x'\): it is damaged or of another kind, correct or replace it$"),
        (FileNotFoundError(2, "No such file", "a.bin"), "^cannot read a.bin: No such file$"),
        (UserError("a.bin holds no events"), "^a.bin holds no events$"),
    ],
)
def test_whatever_a_damaged_file_raises_is_one_sentence_that_names_it(error, words):
    with pytest.raises(UserError, match=words), utill.reading("a.bin"):
        raise error


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_is_no_damage_passes_while_a_file_is_read(error):
    with pytest.raises(error), utill.reading("a.bin"):
        raise error


def test_a_bug_is_not_taken_for_a_mistake_of_the_user():
    @utill.entry_point
    def main(argv=None):
        raise ValueError("bug")

    with pytest.raises(ValueError, match="bug"):
        main([])


def test_an_interrupt_is_one_line_and_exit_code_130(capsys):
    @utill.entry_point
    def main(argv=None):
        raise KeyboardInterrupt

    assert main([]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# ---- Schedule, meters, seeds ---------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [10, 60, 90, 100, 120, 170, 180, 240])
def test_the_learning_rate_drops_at_50_70_and_90_percent_exactly(epochs):
    drops = [e for e in range(1, epochs) if learning_rate(0.3, e, epochs) != learning_rate(0.3, e - 1, epochs)]
    assert drops == [epochs * 5 // 10, epochs * 7 // 10, epochs * 9 // 10]


def test_each_drop_of_the_learning_rate_is_to_a_tenth():
    rates = [learning_rate(0.3, epoch, 100) for epoch in (0, 49, 50, 69, 70, 89, 90, 99)]
    assert rates == [0.3, 0.3, 0.03, 0.03, 0.003, 0.003, 0.3 / 1000, 0.3 / 1000]


def test_epochs_that_do_not_divide_drop_at_the_next_whole_epoch():
    assert [learning_rate(1.0, epoch, 3) for epoch in range(3)] == [1.0, 1.0, 0.1]  # at 1.5; 2.1 and 2.7 never come


def test_the_cosine_schedule_falls_from_the_base_towards_zero():
    rates = [learning_rate(0.3, epoch, 4, "cosine") for epoch in range(4)]
    assert rates == pytest.approx([0.3, 0.15 * (1 + 0.5**0.5), 0.15, 0.15 * (1 - 0.5**0.5)])


def test_the_cosine_over_steps_falls_at_each_step_and_meets_the_cosine_over_epochs():
    rates = [
        learning_rate(0.3, epoch, 4, "cosine_steps", step=step, steps=5) for epoch in range(4) for step in range(5)
    ]
    assert rates == pytest.approx([0.15 * (1 + math.cos(math.pi * i / 20)) for i in range(20)])
    assert rates[::5] == [learning_rate(0.3, epoch, 4, "cosine") for epoch in range(4)]


@pytest.mark.parametrize("schedule", ["step", "cosine", "cosine_steps"])
def test_the_learning_rate_warms_up_in_a_line_step_by_step(schedule):
    at = [(epoch, step) for epoch in range(3) for step in range(4)]
    warm, cold = (
        [learning_rate(0.3, epoch, 8, schedule, warmup, step, 4) for epoch, step in at] for warmup in (1.5, 0)
    )
    assert [a / b for a, b in zip(warm, cold, strict=True)] == pytest.approx([*(i / 6 for i in range(1, 7)), *[1] * 6])


def test_average_meter_weighs_by_images():
    meter = utill.AverageMeter()
    meter.update(1.0, 3)
    meter.update(5.0, 1)
    assert (meter.avg, meter.count) == (2.0, 4)


def test_parts_of_a_run_have_their_own_random_streams():
    def draw(*stream):
        utill.seed_stream(*stream)
        return torch.rand(1).item()

    assert draw(0, 1) == draw(0, 1)
    assert len({draw(0, 0, 0), draw(0, 0, 1), draw(0, 1), draw(1, 0, 0), draw(1, 1)}) == 5


# ---- Spikes --------------------------------------------------------------------------------------


def count_directly(net, images):
    """{layer: [T] spikes} by a loop over the net's own pieces."""
    spikes, membranes = {"input": []} | {layer.name: [] for layer in net.layers()}, {}
    for t in range(net.num_steps):
        (x,) = net.encoder(images, 1, t)
        spikes["input"].append(float((x != 0).sum()))
        for layer in net.layers():
            x = x.flatten(1) if isinstance(layer.synapse, nn.Linear) else x
            (current,) = layer.norm(layer.synapse(x)[None], t)
            fired, membranes[layer.name] = layer.lif.step(current, membranes.get(layer.name, 0.0 * current))
            spikes[layer.name].append(float(fired.sum()))
            x = layer.pool(fired)
    return spikes


@pytest.mark.parametrize("engine", ["plain", "fused"])
@torch.no_grad()
def test_the_spike_meter_counts_every_spike_on_both_engines(engine):
    net, images = small_net(dtype=torch.float64), one_batch(dtype=torch.float64)
    torch.manual_seed(5)
    expected = count_directly(net, images)
    assert all(sum(counts) > 0 for counts in expected.values())
    if engine == "fused":
        fused.attach(net)
    torch.manual_seed(5)
    with utill.SpikeMeter(net) as meter:
        net(images)
    assert {name: counts.tolist() for name, counts in meter.spikes.items()} == expected
    assert meter.per_image() == sum(sum(n) for name, n in expected.items() if name != "input") / len(images)


@torch.no_grad()
def test_the_spike_meter_stops_counting_when_left():
    net = small_net()
    with utill.SpikeMeter(net) as meter:
        net(one_batch(4))
        net(one_batch(2))
    assert meter.images == 6
    before = meter.spikes["conv1"].clone()
    net(one_batch())
    assert torch.equal(meter.spikes["conv1"], before)


def hand_made_meter():
    """Two images, two steps: 384 input spikes, then 1,024 of conv7 and 2,048 of fc1."""
    meter = utill.SpikeMeter(SpikingVGG("vgg9", 2, img_size=8))
    meter.images = 2
    sizes = [3 * 64, 64 * 64, 64 * 64, 128 * 16, 128 * 16, 256 * 4, 256 * 4, 256 * 4, 1024]
    meter.neurons = dict(zip(meter.spikes, sizes, strict=True))
    meter.spikes["input"] = torch.tensor([384.0, 0], dtype=torch.float64)
    meter.spikes["conv7"] = torch.tensor([1024.0, 0], dtype=torch.float64)
    meter.spikes["fc1"] = torch.tensor([1024.0, 2048], dtype=torch.float64)
    return meter


def test_rates_are_spikes_over_all_steps_per_neuron_and_image():
    assert hand_made_meter().rates() == dict.fromkeys([f"conv{i}" for i in range(1, 7)], 0) | {"conv7": 0.5, "fc1": 1.5}


@pytest.mark.parametrize("engine", ["plain", "fused"])
@pytest.mark.parametrize(("encoding", "inputs"), [("pixels", 1), ("direct", 4)])
def test_an_analog_input_costs_all_its_multiply_adds(encoding, inputs, engine):
    net = SpikingVGG("fc3", 4, in_channels=1, img_size=2, encoding=encoding).eval()
    net = fused.attach(net) if engine == "fused" else net
    with utill.SpikeMeter(net) as meter, torch.no_grad():
        net(torch.full((2, 1, 2, 2), 1e-3))  # too little for a spike
    assert meter.operations().tolist() == [256.0 * inputs] * 4


@pytest.mark.parametrize("engine", ["plain", "fused"])
@torch.no_grad()
def test_operations_are_dense_multiply_adds_times_the_rate_of_the_neurons_before(engine):
    net, images = small_net(dtype=torch.float64), one_batch(dtype=torch.float64)
    torch.manual_seed(5)
    spikes = count_directly(net, images)
    neurons = [images[0].numel(), 64 * 64, 64 * 64, 128 * 16, 128 * 16, 256 * 4, 256 * 4, 256 * 4, 1024]
    expected = torch.zeros(net.num_steps, dtype=torch.float64)
    for i, source in enumerate(spikes):
        weight = [*(layer.synapse.weight for layer in net.layers()), net.readout.weight][i]
        dense = [*neurons[1:], 10][i] * weight[0].numel()
        expected += dense * torch.tensor(spikes[source], dtype=torch.float64) / (neurons[i] * len(images))
    if engine == "fused":
        fused.attach(net)
    torch.manual_seed(5)
    with utill.SpikeMeter(net) as meter:
        net(images)
    torch.testing.assert_close(meter.operations(), expected, rtol=1e-12, atol=0)


# ---- Evaluation ----------------------------------------------------------------------------------


def test_evaluation_sees_every_image_once():
    loader = digit_loader(batch_size=8, limit_test=50)  # 16, 16, 16, 2
    evaluation = utill.evaluate(small_net(), loader, torch.device("cpu"), utill.CrossEntropy())
    expected = torch.bincount(torch.cat([labels for _, labels in loader]), minlength=10)
    assert evaluation.count == 50
    assert evaluation.class_count == expected.tolist()


def test_evaluation_that_misses_images_is_an_error():
    loader = digit_loader()
    loader.num_images += 1
    with pytest.raises(RuntimeError, match="evaluated 50 of 51 images"):
        utill.evaluate(small_net(), loader, torch.device("cpu"), utill.CrossEntropy())


@torch.no_grad()
def test_evaluation_counts_right_answers_of_every_exit_step():
    net, loader = small_net(), digit_loader(batch_size=8)
    evaluation = utill.evaluate(net, loader, torch.device("cpu"), utill.CrossEntropy(), seed=3)
    utill.seed_stream(3, 1)
    voltages, labels = zip(*((net.voltages(images), labels) for images, labels in loader), strict=True)
    voltages, labels = torch.cat(voltages, 1), torch.cat(labels)
    hits = (voltages.argsort(-1, descending=True) == labels[:, None])[..., :5]
    assert evaluation.correct == hits[..., 0].sum(1).tolist()
    assert evaluation.correct5 == hits.any(-1).sum(1).tolist()
    assert evaluation.class_correct == torch.bincount(labels[hits[-1, :, 0]], minlength=10).tolist()
    assert evaluation.loss == pytest.approx(nn.functional.cross_entropy(voltages[-1] / 3, labels).item())
    assert evaluation.top1(2) == 2 * evaluation.correct[1]  # in % of 50
    assert evaluation.top5() == 2 * evaluation.correct5[2]


def test_evaluation_measures_the_loss_that_training_lowers():
    net, loader = small_net(), digit_loader(batch_size=25)
    with torch.no_grad():
        utill.seed_stream(3, 1)
        images, labels = next(iter(loader))
        expected = nn.functional.cross_entropy(10 * net(images), labels).item()
    evaluation = utill.evaluate(net, loader, torch.device("cpu"), utill.CrossEntropy(10), seed=3)
    assert evaluation.loss == pytest.approx(expected)


def test_evaluation_of_fewer_steps_is_the_beginning_of_the_whole():
    # one batch, so that both draw the same spikes
    what = small_net(), digit_loader(batch_size=25), torch.device("cpu"), utill.CrossEntropy()
    whole, part = (utill.evaluate(*what, steps=s) for s in (3, 2))
    assert part.correct == whole.correct[:2]


# ---- Devices and engines -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "meta", "cuda:x", "hpu"])
def test_a_device_that_is_not_there_is_an_error(name):
    with pytest.raises(UserError, match=f"--device {name}: this machine or this PyTorch has no such device"):
        utill.pick_device(name)


def test_the_device_is_the_one_named():
    assert utill.pick_device("cpu") == torch.device("cpu")
    assert utill.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_half_precision_needs_a_gpu():
    with pytest.raises(UserError, match="--amp fp16 needs a GPU"):
        utill.pick_amp(torch.device("cpu"), "fp16")


def test_mixed_precision_picked_for_the_cpu_is_one_that_it_has():
    has_bf16 = torch.cpu._is_avx512_bf16_supported()
    assert utill.pick_amp(torch.device("cpu"), "auto") == ("bf16" if has_bf16 else "off")


def test_the_fused_engine_where_it_cannot_run_is_an_error_and_auto_says_why(monkeypatch):
    monkeypatch.setattr(fused, "why_not", lambda net, save_memory=None: "no compiler")
    with pytest.raises(UserError, match="--engine fused: no compiler"):
        nets.use_engine(small_net(), "fused", save_memory=None)
    with pytest.raises(UserError, match="--save_memory belongs to the fused engine.*no compiler"):
        nets.use_engine(small_net(), "auto", save_memory=2)
    assert nets.use_engine(small_net(), "auto", save_memory=None) == ("plain", "no compiler")


def test_the_plain_engine_does_not_save_memory():
    with pytest.raises(UserError, match="--save_memory belongs to the fused engine"):
        nets.use_engine(small_net(), "plain", save_memory=2)


# ---- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("bug")])
def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "last.pth.tar"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the new")
        raise error

    with pytest.raises(KeyError if isinstance(error, KeyError) else UserError):
        runs.write_atomically(path, write)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("last.pth.tar", b"old")]


def test_a_write_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    path, events = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("rename"), replace(*names)))
    runs.write_text(path, "new")
    assert events == [3, "rename"]
    assert path.read_text() == "new"


def test_a_folder_that_is_not_there_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot write .*No such file or directory"):
        runs.write_text(tmp_path / "missing" / "file", "text")


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    net = small_net()
    facts = {"classes": ["a", "b"], "in_channels": 1, "img_size": 8, "mean": [0.5], "std": [0.25]}
    saved = {"global_step": 7, "state_dict": net.state_dict(), "accuracy": None}
    saved |= {"config": {"lr": 0.3, "amp": "off"}, "data": facts}
    runs.save_checkpoint(tmp_path / "x.pth.tar", saved)
    loaded = runs.load_checkpoint(tmp_path / "x.pth.tar")
    tensors = loaded.pop("state_dict")
    assert loaded == {k: v for k, v in saved.items() if k != "state_dict"}
    assert tensors.keys() == net.state_dict().keys()
    assert all(torch.equal(tensors[k], v) for k, v in net.state_dict().items())


def rename_in_zip(path, old, new):
    """Replace bytes inside the pickle of a torch file, as another version of numpy would have written them."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    assert any(old in content for name, content in entries if name.endswith("data.pkl"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries:
            archive.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_an_authors_checkpoint_may_hold_a_numpy_scalar_of_any_numpy(tmp_path, module, kind):
    path = tmp_path / "cifar10_bestmodel.pth.tar"
    torch.save({"global_step": 9, "state_dict": small_net().state_dict(), "accuracy": kind(0.5)}, path)
    rename_in_zip(path, kind(0).__reduce__()[0].__module__.encode(), module)
    assert runs.load_checkpoint(path)["accuracy"] == 0.5


class Code:
    """Unpickling this makes the file `it-ran`."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


@pytest.mark.parametrize("make", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    make({"state_dict": Code()}, tmp_path / "evil.pth.tar")
    with pytest.raises(UserError, match=r"evil.pth.tar (was refused: it holds more than|.*it is not a checkpoint)"):
        runs.load_checkpoint(tmp_path / "evil.pth.tar")
    assert not Path("it-ran").exists()


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a checkpoint",
        b"\x80\x02",
        saved({"state_dict": {"w": torch.ones(9)}})[:-200],
        saved([1, 2]),
        saved({}),
        saved({"state_dict": {}}),
        saved({"state_dict": [1]}),
        saved({"state_dict": {"w": 1}}),
        saved({"state_dict": {1: torch.ones(1)}}),
        saved({"state_dict": {"w": torch.ones(1)}, "config": {}}),
        saved({"state_dict": {"w": torch.ones(1)}, "config": [], "data": {}}),
        saved({"state_dict": {"w": torch.ones(1)}, "config": {}, "data": {"classes": ["a"]}}),
    ],
)
def test_a_file_that_is_no_whole_checkpoint_is_a_user_error(tmp_path, content):
    path = tmp_path / "x.pth.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*x.pth.tar \(.*correct or replace it"):
        runs.load_checkpoint(path)


def test_a_checkpoint_that_cannot_be_opened_is_a_user_error(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match="cannot read .*: No such file|is a folder: name the checkpoint in it, as "):
            runs.load_checkpoint(path)


def test_a_run_folder_that_holds_a_run_is_refused(tmp_path):
    for name in ("config.yaml", "log.jsonl", "best.pth.tar", "tensorboard/events.out.tfevents.1.host.2.0"):
        path = tmp_path / name.replace("/", "-") / name
        path.parent.mkdir(parents=True)
        path.write_text("old")
        with pytest.raises(UserError, match="already holds a run"):
            runs.run_folder(tmp_path / name.replace("/", "-"), overwrite=False).__enter__()
        assert path.read_text() == "old"


def test_overwriting_removes_the_old_run_and_nothing_else(tmp_path):
    theirs = ["notes.txt", "tensorboard/mine.txt", "sub/config.yaml"]
    for name in [*runs.RUN_FILES, "tensorboard/events.out.tfevents.1.host.2.0", *theirs]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    with runs.run_folder(tmp_path, overwrite=True):
        pass
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == set(theirs)


def test_a_run_folder_with_other_files_is_taken(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with runs.run_folder(tmp_path) as made:
        assert made == (tmp_path, None)


@pytest.mark.slow
def test_a_run_folder_is_one_process_only(tmp_path):
    take = f"import runs\nwith runs.run_folder({str(tmp_path)!r}, resume=True): print('taken')"
    command = [sys.executable, "-c", take]
    options = dict(cwd=Path(runs.__file__).parent, capture_output=True, text=True)
    with runs.run_folder(tmp_path, resume=True):
        refused = subprocess.run(command, **options)
    taken = subprocess.run(command, **options)
    assert "is in use by another training run" in refused.stderr
    assert taken.stdout == "taken\n"
    assert not list(tmp_path.iterdir())


def test_the_environment_names_what_a_number_depends_on(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py"])
    facts = json.loads(json.dumps(runs.environment(torch.device("cpu"), ["--run_dir", "a b"], engine="plain")))
    assert facts["command"] == "train.py --run_dir 'a b'"
    assert facts["torch"] == torch.__version__
    assert facts["engine"] == "plain"
    assert {"git", "git_dirty", "device", "threads", "python", "torchvision", "numpy", "platform"} <= facts.keys()


def test_the_environment_does_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert runs.environment(torch.device("cpu"), [])["git"] is None


# ---- Checkpoints from strangers ---------------------------------------------------------


def ours(**changes):
    """A checkpoint of ours, whole but for `changes` {part or name of a weight: value, None to leave it out}."""
    net = SpikingVGG("fc3", 4, img_size=2, in_channels=1, encoding="pixels_permuted")
    config = dict(arch="fc3", num_steps=4, leak_mem=0.9, threshold=1.0, norm="bntt", encoding="pixels_permuted")
    config |= dict(spike_order="integrate_first", dataset="smnist", img_size=2)
    known = dict(classes=[str(k) for k in range(10)], in_channels=1, img_size=2, mean=[0.5], std=[0.25])
    checkpoint = {"state_dict": dict(net.state_dict()), "config": config, "data": known, "progress": {"step": 1}}
    for name, value in changes.items():
        part, _, key = name.partition("__")
        where = checkpoint[part] if key else checkpoint
        where[key.replace("__", ".") or part] = value
        if value is None:
            del where[key.replace("__", ".") or part]
    return checkpoint


def load(tmp_path, checkpoint, **options):
    """(args, checkpoint) as test.py and early_exit.py read it."""
    torch.save(checkpoint, tmp_path / "x.tar", **options)
    return test_script.parse_args([str(tmp_path / "x.tar")])


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_whole_checkpoint_loads_in_either_format_of_torch_whatever_else_it_holds(tmp_path, as_zip):
    args, checkpoint = load(tmp_path, ours(optimizer={"state": {}}), _use_new_zipfile_serialization=as_zip)
    assert checkpoint["progress"] == {"step": 1}
    nets.load_net(args, checkpoint, DataFacts(**checkpoint["data"]), torch.device("cpu"))


W = torch.zeros(256, 1)
HUGE = torch.zeros(1).expand(2**20, 2**20)  # 4 TB, of one number
BAD_CHECKPOINTS = [
    (dict(state_dict__fc1__weight=W / 0), "its fc1.weight is not finite"),
    (dict(state_dict__fc1__weight=W.double() + 1e300), "its fc1.weight is not finite"),
    (dict(state_dict__fc1__weight=HUGE), "its fc1.weight is larger than the file"),
    (dict(state_dict__a=HUGE[0, : 2**16], state_dict__b=HUGE[0, : 2**16]), "its [ab] is larger than the file"),
    (dict(state_dict__fc1__weight=W.to_sparse()), "its fc1.weight is no plain tensor"),
    (dict(state_dict__fc1__weight=W.to("meta")), "its fc1.weight is of torch.float32 on meta"),
    (dict(state_dict__fc1__weight=W.cfloat()), "its fc1.weight is of torch.complex64"),
    (dict(state_dict__fc1__weight=W.bool()), "its fc1.weight is of torch.bool"),
    (dict(state_dict__fc1__weight=W.long()), "size mismatch for fc1.weight: .* of torch.int64, not"),
    (dict(state_dict__fc1__weight=W.T), r"size mismatch for fc1.weight: it is \[1, 256\] .* not \[256, 1\]"),
    (dict(state_dict__fc1__weight=None), "holds another net than fc3 as asked for: it has no fc1.weight"),
    (dict(state_dict__fc9__weight=W), "holds another net than fc3 as asked for: that has no fc9.weight"),
    (dict(state_dict__encoder__order=torch.tensor([0, 1, 2, 2])), "its encoder.order is not an order of the pixels"),
    (dict(state_dict__encoder__order=torch.tensor([1, 2, 3, 4])), "its encoder.order is not an order of the pixels"),
    (dict(state_dict__encoder__order=torch.arange(9)), "size mismatch for encoder.order"),
    (dict(config__num_steps=10**9), "num_steps: expected an integer .* at most 10000, got '1000000000'"),
    (dict(config__num_steps=10**4), "it has 4 time-steps with a norm of their own, not 10000"),
    (dict(config__num_steps=10**9, config__norm="none"), "num_steps: expected an integer .* at most 10000"),
    (dict(config__img_size=10**6, data__img_size=10**6), "img_size: expected an integer .* at most 10000"),
    (dict(config__img_size=None, data__img_size=10**6), "need num_steps 1000000000000"),
    (dict(config__img_size=8), "its config and data differ in img_size"),
    (dict(config__num_workers=10**6), "num_workers: expected an integer .* at most 256"),
    (dict(config__lr=[1]), "its config holds more than flags"),
    (dict(config__x={}), "its config holds more than flags"),
    (dict(config=torch.zeros(3)), "its config lacks arch"),
    (dict(data__classes=["a", "b"]), r"size mismatch for fc3.weight: it is \[10, 256\] .* not \[2, 256\]"),
    (dict(data__classes=["a"] * 9 + ["\x1b[2J"]), "its class names are wrong"),
    (dict(data__classes=["a"] * 9 + ["x" * 10**6]), "its class names are wrong"),
    (dict(data__classes=["a"] * 9 + ["\ud800"]), "its class names are wrong"),
    (dict(data__mean=[float("nan")]), "its mean or std is wrong"),
    (dict(data__std=[0.0]), "its mean or std is wrong"),
    (dict(data__std=[float("inf")]), "its mean or std is wrong"),
    (dict(data__mean=[0.5] * 2, data__std=[0.5] * 2), "its mean or std is wrong"),
    (dict(data__in_channels=True), "its in_channels or img_size is wrong"),
    (dict(data__img_size=0, config__img_size=0), "its in_channels or img_size is wrong"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_CHECKPOINTS)
def test_a_checkpoint_with_one_thing_wrong_is_refused_with_that_reason(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, ours(**changes))


def test_event_data_has_two_channels_and_their_mean_and_std(tmp_path):
    net = SpikingVGG("dvs_cnn7", 2, img_size=4, in_channels=2, encoding="frames")
    known = dict(classes=[str(k) for k in range(10)], in_channels=2, img_size=4, mean=[0.0] * 2, std=[1.0] * 2)
    config = dict(arch="dvs_cnn7", num_steps=2, encoding="frames", dataset="nmnist", img_size=None)
    events = ours(state_dict=net.state_dict(), data=known, config=ours()["config"] | config)
    assert training_set.known_data(load(tmp_path, events)[1])["facts"].mean == [0, 0]
    with pytest.raises(UserError, match="expected sequence of length 1"):
        load(tmp_path, events | {"data": known | {"mean": [0.0]}})


def test_a_net_for_event_data_classifies_no_pictures(tmp_path, capsys):
    net = SpikingVGG("fc3", 2, img_size=4, in_channels=2, encoding="frames")
    known = dict(classes=[str(k) for k in range(10)], in_channels=2, img_size=4, mean=[0.0] * 2, std=[1.0] * 2)
    config = ours()["config"] | dict(num_steps=2, encoding="frames", dataset="nmnist", img_size=None)
    torch.save(ours(state_dict=net.state_dict(), data=known, config=config), tmp_path / "x.tar")
    assert test_script.main([str(tmp_path / "x.tar"), "--image", "cat.png", "--device", "cpu"]) == 2
    assert "this net takes recordings of an event camera, not pictures" in capsys.readouterr().err


def test_a_checkpoint_does_not_name_the_files_that_a_script_writes(tmp_path):
    torch.save(ours(config__figure="mine.png", config__image="secret.png", config__repeats=99), tmp_path / "x.tar")
    assert early_exit.parse_args([str(tmp_path / "x.tar")])[0].figure is None
    args = test_script.parse_args([str(tmp_path / "x.tar")])[0]
    assert (args.image, args.repeats) == (None, 1)


class Attributes:
    """Unpickles as an OrderedDict on which a file has put attributes over its methods."""

    def __reduce__(self):
        return OrderedDict, ([("fc1.weight", W)],), {"items": 5, "keys": 5, "_metadata": 5}


def test_a_state_dict_whose_methods_were_replaced_is_read_as_the_plain_dict_it_is(tmp_path):
    torch.save({"state_dict": Attributes()}, tmp_path / "x.tar")
    state = runs.load_checkpoint(tmp_path / "x.tar")["state_dict"]
    assert type(state) is dict
    assert torch.equal(state["fc1.weight"], W)


def test_a_compressed_checkpoint_is_refused_before_it_unfolds(tmp_path):
    path, bomb = tmp_path / "x.tar", torch.zeros(25_000_000)
    torch.save({"state_dict": {"w": bomb}}, path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert path.stat().st_size < 1e6
    with mock.patch("torch.load") as loading, pytest.raises(UserError, match="unpacks to more than its size"):
        runs.load_checkpoint(path)
    loading.assert_not_called()


def test_numbers_that_are_not_in_the_older_format_are_not_waited_for(tmp_path):
    path, few = tmp_path / "x.tar", torch.zeros(5)
    torch.save({"state_dict": {"w": few}}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"K\x05" in content
    path.write_bytes(content.replace(b"K\x05", b"J\xff\xff\xff\x7f"))  # 8 GB
    with pytest.raises(UserError, match="correct or replace it"):
        runs.load_checkpoint(path)


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("bug"), False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
    ],
)
def test_a_lack_of_memory_is_one_line_and_exit_code_2(capsys, error, refused):
    @utill.entry_point
    def main(argv=None):
        raise error

    if not refused:
        with pytest.raises(RuntimeError, match="bug"):
            main([])
        return
    assert main([]) == 2
    assert capsys.readouterr().err.endswith("error: out of memory: lower --batch_size, --img_size or --num_steps\n")


def test_an_error_does_not_drive_the_terminal(capsys):
    @utill.entry_point
    def main(argv=None):
        raise UserError("no key \x1b[2J" + "x" * 10**6)

    assert main([]) == 2
    err = capsys.readouterr().err
    assert r"no key \x1b[2J" in err
    assert len(err) < 2200


def test_of_equal_voltages_the_lowest_class_is_the_likeliest():
    assert utill.likeliest(torch.zeros(1, 2, 10)).tolist() == [[[0, 1, 2, 3, 4]] * 2]
    assert utill.likeliest(torch.tensor([[[1.0, 3.0, 3.0]]])).tolist() == [[[1, 2, 0]]]
