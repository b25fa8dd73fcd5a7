"""A run that is stopped, killed or fails: what is kept, what is said, and that --resume ends as if nothing had been."""

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, call, spawn, words
from kill_test import difference, what_a_run_left
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.record_writer import RecordWriter

import data
import runs
import test as test_script
import train
import utill
from model import SpikingVGG

# Curves are read in the order of their files' names: those of one second and process end in a number, and 10 < 9 there.
event_file_writer._global_uid = event_file_writer.AtomicCounter(1_000_000)

FLAGS = f"{TINY} --dataset digits --limit_train 64 --limit_test 20 --num_epochs 3 --lr 0.05 --augment --save_every 3"
FC3 = f"{FLAGS} --arch fc3 --engine plain"  # the fastest
VARIANTS = {
    "plain": "--engine plain --num_steps 2",
    "fused": "--engine fused --val_fraction 0.01",
    "workers": "--engine fused --val_fraction 0.01 --num_workers 2",
    "adam": "--arch fc3 --engine plain --optimizer adam --lr 0.001 --lr_schedule cosine --val_fraction 0.01",
    "warm": "--arch fc3 --engine plain --lr_schedule cosine_steps --warmup_epochs 1.5 --gamma_weight_decay 0",
    "precise": "--arch fc3 --engine plain --precise_bn 2 --val_fraction 0.01 --num_workers 1",
    "bf16": "--arch fc3 --engine plain --amp bf16 --deterministic",
}


class Killed(BaseException):
    """Stands for SIGKILL where the moment must be exact."""


def go(run_dir, *flags):
    return call(train.main, *(flags or [FC3]), "--run_dir", run_dir)


def resume(run_dir, *flags):
    return go(run_dir, *(flags or [FC3]), "--resume")


def saved(run_dir):
    """(epochs, steps) of last.pth.tar, which must load."""
    checkpoint = runs.load_checkpoint(run_dir / "last.pth.tar")
    return checkpoint["global_step"], checkpoint["progress"]["step"]


def assert_same(a, b):
    assert difference(what_a_run_left(a), what_a_run_left(b), "run") is None


@contextlib.contextmanager
def before(module, name, act):
    """Call act(*args) before each call of module.name."""
    original = getattr(module, name)

    def patched(*args, **options):
        act(*args)
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, patched)
        yield


def at(module, name, count, act):
    """Call act(*args) before the `count`-th call of module.name."""
    calls = itertools.count(1)
    return before(module, name, lambda *args: next(calls) == count and act(*args))


def at_write(name, count, act):
    """Call act() before the `count`-th write of the run's file `name`."""
    writes = itertools.count(1)
    return before(runs, "write_atomically", lambda path, _: path.name == name and next(writes) == count and act())


def send(number):
    return lambda *_: os.kill(os.getpid(), number)


def die(*_):
    raise Killed


def fail(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Folder of an unbroken run with FC3, or with FLAGS and a variant."""
    runs = {}

    def folder(variant=None):
        if variant not in runs:
            runs[variant] = tmp_path_factory.mktemp("unbroken") / "run"
            assert go(runs[variant], *([FLAGS, VARIANTS[variant]] if variant else [FC3])).code == 0
        return runs[variant]

    return folder


@pytest.fixture
def half(tmp_path):
    """A run with FC3 that was stopped in its second epoch."""
    with at(train, "train_step", 6, send(signal.SIGTERM)):
        go(tmp_path / "half")
    return tmp_path / "half"


# ---- The same end --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", [*(v for v in VARIANTS if v != "workers"), pytest.param("workers", marks=pytest.mark.slow)]
)
def test_a_run_stopped_within_an_epoch_and_resumed_ends_as_if_it_had_not_been(unbroken, tmp_path, variant):
    flags = FLAGS, VARIANTS[variant]
    with at(train, "train_step", 6, send(signal.SIGTERM)):
        assert go(tmp_path / "run", *flags).code == 143
    assert saved(tmp_path / "run") == (1, 2)
    assert resume(tmp_path / "run", *flags).code == 0
    assert_same(tmp_path / "run", unbroken(variant))


def test_a_resumed_run_may_have_another_number_of_workers(unbroken, half):
    assert resume(half, FC3, "--num_workers", 2).code == 0
    a, b = (runs.load_checkpoint(folder / "last.pth.tar") for folder in (half, unbroken()))
    assert difference(a["state_dict"], b["state_dict"], "") is None
    assert difference(a["optimizer"], b["optimizer"], "") is None


@pytest.mark.parametrize("name", runs.RUN_FILES)
def test_a_run_killed_before_each_write_of_a_file_ends_as_if_it_had_not_been(unbroken, tmp_path, name):
    with at_write(name, 1, die), pytest.raises(Killed):
        go(tmp_path / "run")
    for _ in range(20):  # each resumed run comes past the write before which the last one was killed
        with contextlib.suppress(Killed), at_write(name, 2, die):
            assert resume(tmp_path / "run").code == 0
            break
    assert_same(tmp_path / "run", unbroken())


def test_those_are_all_the_files_that_a_run_writes(tmp_path):
    names = set()
    with before(runs, "write_atomically", lambda path, _: names.add(path.name)):
        assert go(tmp_path / "run").code == 0
    assert names == set(runs.RUN_FILES)


@pytest.mark.parametrize("evaluation", range(1, 5))
def test_a_run_killed_before_an_evaluation_ends_as_if_it_had_not_been(unbroken, tmp_path, evaluation):
    flags = FLAGS, VARIANTS["adam"]
    with at(utill, "evaluate", evaluation, die), pytest.raises(Killed):
        go(tmp_path / "run", *flags)
    assert resume(tmp_path / "run", *flags).code == 0
    assert_same(tmp_path / "run", unbroken("adam"))


def test_the_curves_of_an_epoch_whose_save_failed_are_written_once(tmp_path, unbroken):
    def die_at_the_end_of_an_epoch(_, checkpoint):
        if checkpoint["progress"]["step"] == 0:
            raise Killed

    with before(runs, "save_checkpoint", die_at_the_end_of_an_epoch), pytest.raises(Killed):
        go(tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
    resume(tmp_path)
    curves = what_a_run_left(tmp_path)["curves"]
    assert [step for step, _ in curves["train_loss"]] == curves["gamma/fc1"] == [1, 2, 3]


def test_the_best_checkpoint_is_that_of_the_best_epoch_though_killed_before_it_was_written(tmp_path):
    with at_write("best.pth.tar", 1, die), pytest.raises(Killed):
        go(tmp_path)
    assert not (tmp_path / "best.pth.tar").exists()
    with at(train, "train_step", 1, die), pytest.raises(Killed):
        resume(tmp_path)
    assert runs.load_checkpoint(tmp_path / "best.pth.tar")["global_step"] == 1


def test_the_same_seed_gives_the_same_log_twice(unbroken, tmp_path):
    go(tmp_path / "again")
    assert_same(tmp_path / "again", unbroken())


@pytest.mark.slow
def test_killed_many_times_for_real(tmp_path):
    flags = "--arch fc3 --num_steps 2 --limit_train 64 --num_epochs 2"
    outcome = spawn("tests/stress/kill_test.py", "--kills 2 --in_write 1 --kinds 1", flags, cwd=tmp_path)
    assert outcome.out[-1] == "2 of 2 kills survived, 1 inside a checkpoint write; end bit-identical: yes"
    assert outcome.code == 0


# ---- Signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_saves_and_says_so_in_one_line(tmp_path, number, code):
    with at(train, "train_step", 6, send(number)):
        outcome = go(tmp_path)
    assert outcome.code == code
    assert outcome.err == [f"stopped by {number.name} after 1 epochs and 2 steps; go on with --resume"]
    assert saved(tmp_path) == (1, 2)


def test_sigusr1_saves_and_the_run_goes_on(unbroken, tmp_path):
    seen = []
    with (
        at(train, "train_step", 6, send(signal.SIGUSR1)),
        at(train, "train_step", 7, lambda *_: seen.append(saved(tmp_path))),
    ):
        assert go(tmp_path).code == 0
    assert seen == [(1, 2)]
    assert_same(tmp_path, unbroken())


@pytest.mark.parametrize(("variant", "epoch"), [("fused", 2), ("fused", 3), ("precise", 2)])  # after 3 no step is left
def test_a_stop_in_an_evaluation_loses_no_step(unbroken, tmp_path, variant, epoch):
    flags = FLAGS, VARIANTS[variant]
    with at(utill, "evaluate", epoch, send(signal.SIGTERM)):
        outcome = go(tmp_path, *flags)
    assert (outcome.code, saved(tmp_path)) == (143, (epoch - 1, 4))  # the end of that epoch
    resume(tmp_path, *flags)
    assert_same(tmp_path, unbroken(variant))


def test_a_second_sigint_stops_at_once_and_leaves_the_last_checkpoint(half):
    before = (half / "last.pth.tar").read_bytes()
    with at(train, "train_step", 1, send(signal.SIGINT)), at(torch, "save", 1, send(signal.SIGINT)):
        outcome = resume(half)
    assert (outcome.code, outcome.err) == (130, ["interrupted"])
    assert (half / "last.pth.tar").read_bytes() == before
    assert not list(half.glob(".last*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_training_leaves_no_run_folder(tmp_path, number):
    with at(data, "build_loaders", 1, send(number)):
        outcome = go(tmp_path / "run")
    assert outcome.code == 128 + number
    assert outcome.err == [f"stopped by {number.name} outside of training"]
    assert not (tmp_path / "run").exists()


def test_sigusr1_before_training_does_no_harm(tmp_path):
    with at(data, "build_loaders", 1, send(signal.SIGUSR1)):
        assert go(tmp_path).code == 0


def test_the_handlers_are_as_they_were_after_a_run(tmp_path):
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    before = [signal.getsignal(number) for number in numbers]
    with at(train, "train_step", 2, send(signal.SIGTERM)):
        go(tmp_path)
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_run_in_another_thread_than_the_main_one(unbroken, tmp_path):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train.main(words([FC3, "--run_dir", tmp_path]))))
    thread.start()
    thread.join()
    assert codes == [0]
    assert_same(tmp_path, unbroken())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_whole_process_group_is_for_the_main_process(tmp_path, number, code):
    flags = words([FC3, "--num_epochs 1000 --num_workers 2 --run_dir", tmp_path])
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *flags],
        start_new_session=True,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        for _ in range(600):
            if (tmp_path / "log.jsonl").exists():
                break
            time.sleep(0.1)
        os.killpg(process.pid, number)
        err = process.communicate(timeout=60)[1].splitlines()
    finally:
        process.kill()
    assert process.returncode == code
    assert len(err) == 1
    assert err[0].startswith(f"stopped by {number.name} after ")


@pytest.mark.slow
def test_an_error_ends_the_loading_processes_too(tmp_path):
    script = "import train; train.end_epoch = None; train.main()"
    flags = words([FC3, "--num_workers 2 --run_dir", tmp_path / "run"])
    done = subprocess.run(
        [sys.executable, "-c", script, *flags], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.splitlines()[-1] == "TypeError: 'NoneType' object is not callable"


def test_a_loading_process_that_is_killed_is_one_sentence(tmp_path):
    def kill(*_):
        for process in multiprocessing.active_children():
            process.kill()

    with at(train, "train_step", 1, kill):
        outcome = go(tmp_path / "run", FC3, "--num_workers 1 --limit_train 1000 --batch_size 4")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert "a data loading process was killed" in outcome.err[0]


# ---- What can be resumed -------------------------------------------------------------------------


def test_another_config_is_refused_and_the_flags_named(half):
    before = {path: path.read_bytes() for path in half.glob("*.*")}
    outcome = resume(half, FC3, "--lr 0.1 --leak_mem 0.9")
    assert outcome.code == 2
    assert len(outcome.err) == 1
    assert "--leak_mem was 0.95 and is now 0.9, --lr was 0.05 and is now 0.1" in outcome.err[0]
    assert {path: path.read_bytes() for path in half.glob("*.*")} == before


def test_other_data_are_refused(half, monkeypatch):
    digits = data.DATASETS["digits"].load

    def changed(*args, **options):
        raw = digits(*args, **options)
        return raw._replace(train=raw.train._replace(images=raw.train.images.flip(0).clamp(max=200)))

    monkeypatch.setitem(data.DATASETS, "digits", data.Row(changed, augment=False))
    outcome = resume(half)
    assert outcome.code == 2
    assert outcome.err[0].endswith("cannot be resumed: the data have another mean, the data have another std")


def test_a_finished_run_resumed_says_its_result_again(tmp_path):
    first, before = go(tmp_path).result, what_a_run_left(tmp_path)
    assert difference(first, resume(tmp_path).result, "") is None
    assert difference(before, what_a_run_left(tmp_path), "run") is None


def test_a_finished_run_resumed_says_that_there_is_nothing_to_do(tmp_path):
    go(tmp_path)
    outcome = resume(tmp_path)
    assert "nothing to do: 3 epochs are done; a larger --num_epochs would train on" in outcome.out


def test_a_finished_run_asked_for_fewer_epochs_stays_what_it_is(tmp_path):
    first = go(tmp_path).result
    outcome = resume(tmp_path, FC3, "--num_epochs 2")
    assert difference(first, outcome.result, "") is None
    assert "num_epochs: 3\n" in (tmp_path / "config.yaml").read_text()


def test_an_unfinished_run_asked_for_fewer_epochs_is_refused(half):
    outcome = resume(half, FC3, "--num_epochs 2")
    assert outcome.code == 2
    assert outcome.err[0].endswith("cannot be resumed: --num_epochs was 3 and is now 2")


# ---- More epochs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "fused", "adam", "bf16"])
def test_a_finished_run_extended_has_the_weights_of_one_run(unbroken, tmp_path, variant):
    """Where the schedules of both totals agree on the epochs that are done: step does on the first of 2, of 3."""
    flags = FLAGS, VARIANTS[variant].replace("cosine", "step")
    go(tmp_path / "one", *flags)
    go(tmp_path / "two", *flags, "--num_epochs 1")
    assert resume(tmp_path / "two", *flags).code == 0
    a, b = (runs.load_checkpoint(tmp_path / name / "last.pth.tar") for name in ("one", "two"))
    for part in ("state_dict", "optimizer", "random_state"):
        assert difference(a[part], b[part], part) is None


def test_the_schedule_of_a_run_extended_is_that_of_the_new_total_and_said_in_one_line(tmp_path):
    go(tmp_path, FC3, "--lr_schedule cosine --num_epochs 2")
    outcome = resume(tmp_path, FC3, "--lr_schedule cosine --num_epochs 4")
    said = "4 epochs instead of 2: the learning rate goes on by the cosine schedule of all 4, from epoch 3 with 0.025"
    assert [line for line in outcome.out if "epochs instead of" in line] == [said]
    rates = [json.loads(line)["lr"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0.05, 0.025, 0.025, 0.05 * (1 - 2**-0.5) / 2])


def test_a_run_extended_ends_with_the_result_and_config_of_all_its_epochs(tmp_path):
    go(tmp_path, FC3, "--num_epochs 1")
    (tmp_path / "early_exit.json").write_text("{}")
    result = resume(tmp_path, FC3, "--num_epochs 2").result
    assert result["epoch"] == 2
    assert not (tmp_path / "early_exit.json").exists()  # it was of the shorter run
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert "num_epochs: 2\n" in (tmp_path / "config.yaml").read_text()


def test_a_run_stopped_while_it_is_extended_has_no_result_and_ends_as_if_it_had_not_been(tmp_path):
    for name in ("one", "two"):
        go(tmp_path / name, FC3, "--num_epochs 1")
    resume(tmp_path / "one")
    with at(train, "train_step", 6, send(signal.SIGTERM)):
        assert resume(tmp_path / "two").code == 143
    assert not (tmp_path / "two" / "result.json").exists()
    assert resume(tmp_path / "two").code == 0
    assert_same(tmp_path / "one", tmp_path / "two")


def test_a_run_stopped_within_an_epoch_can_be_extended(half):
    assert resume(half, FC3, "--num_epochs 4").code == 0
    assert saved(half) == (4, 0)


def test_a_run_extended_keeps_its_best_epoch(tmp_path, monkeypatch):
    hits, evaluate = iter([9, 3, 3]), utill.evaluate

    def evaluate_with_a_peak(net, loader, *args, **options):
        evaluation = evaluate(net, loader, *args, **options)
        return evaluation._replace(correct=[0, 0, next(hits)]) if loader.num_images == 14 else evaluation

    monkeypatch.setattr(utill, "evaluate", evaluate_with_a_peak)
    go(tmp_path, FC3, "--val_fraction 0.01 --num_epochs 1")
    assert resume(tmp_path, FC3, "--val_fraction 0.01 --num_epochs 3").result["epoch"] == 1
    assert runs.load_checkpoint(tmp_path / "best.pth.tar")["global_step"] == 1


# ---- Flags that change nothing learnt ------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        "test_display_freq 1",
        "train_display_freq 1",
        "save_every 2",
        "data_dir elsewhere",
        "data_on_device",
        "device auto",
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is then another device")
def test_a_flag_that_changes_nothing_learnt_does_not_stop_a_resume(unbroken, half, flags):
    assert resume(half, FC3, f"--{flags}").code == 0
    a, b = (runs.load_checkpoint(folder / "last.pth.tar") for folder in (half, unbroken()))
    for part in ("state_dict", "optimizer"):
        assert difference(a[part], b[part], part) is None


@pytest.mark.parametrize(("first", "then"), [("auto", "fused"), ("fused", "auto"), ("plain", "plain")])
def test_another_name_of_the_engine_that_ran_does_not_stop_a_resume(tmp_path, first, then):
    flags = f"{FLAGS} --num_epochs 1 --engine"
    assert go(tmp_path, flags, first).code == 0
    assert resume(tmp_path, flags, then).code == 0


def test_another_engine_is_refused(tmp_path):
    flags = f"{FLAGS} --num_epochs 1 --engine"
    go(tmp_path, flags, "auto")
    outcome = resume(tmp_path, flags, "plain")
    assert outcome.code == 2
    assert outcome.err[0].endswith("cannot be resumed: --engine was auto and is now plain")


def test_another_device_is_refused(half):
    environment = json.loads((half / "environment.json").read_text())
    (half / "environment.json").write_text(json.dumps(environment | {"device": "cuda (a card)"}))
    outcome = resume(half, FC3, "--device auto")
    assert outcome.code == 2
    assert "--device was cpu and is now auto" in outcome.err[0]


def test_without_a_record_of_what_ran_another_name_is_refused(half):
    (half / "environment.json").unlink()
    assert "--device was cpu and is now auto" in resume(half, FC3, "--device auto").err[0]


@pytest.mark.parametrize("flag", ["--limit_test 10", "--seed 1", "--batch_size 8", "--val_fraction 0.1", "--augment"])
def test_a_flag_that_changes_what_is_learnt_or_what_the_log_says_is_refused(half, flag):
    flags = FC3.replace(" --augment", "") if flag == "--augment" else FC3
    outcome = resume(half, flags, flag if flags == FC3 else "")
    assert outcome.code == 2
    assert f"{flag.split()[0]} was " in outcome.err[0]


@pytest.mark.parametrize("new", [["logit_scale"], ["loss", "neuron"], ["init_from"]])
def test_a_run_from_before_a_flag_was_new_is_resumed_and_tested_with_its_default(half, new):
    checkpoint = runs.load_checkpoint(half / "last.pth.tar")
    for flag in new:
        del checkpoint["config"][flag]
    torch.save(checkpoint, half / "last.pth.tar")
    assert call(test_script.main, half / "last.pth.tar").code == 0
    assert resume(half).code == 0


def test_resume_with_nothing_there_starts_anew(unbroken, tmp_path):
    assert resume(tmp_path / "run").code == 0
    assert_same(tmp_path / "run", unbroken())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda whole: whole[: len(whole) // 2], "/last.pth.tar ("),
        (lambda whole: whole[:5000] + bytes(3000) + whole[8000:], "/last.pth.tar ("),
        (lambda whole: b"", "/last.pth.tar ("),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(half, damage, words):
    last = half / "last.pth.tar"
    last.write_bytes(damage(last.read_bytes()))
    outcome = resume(half)
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert words in outcome.err[0]


def test_a_checkpoint_without_progress_is_refused_in_one_sentence(half):
    checkpoint = torch.load(half / "last.pth.tar")
    del checkpoint["progress"]
    torch.save(checkpoint, half / "last.pth.tar")
    outcome = resume(half)
    assert outcome.code == 2
    assert "last.pth.tar ('progress')" in outcome.err[0]


def test_a_finished_run_without_its_last_checkpoint_is_not_deleted(unbroken, tmp_path):
    shutil.copytree(unbroken(), tmp_path / "run")
    (tmp_path / "run" / "last.pth.tar").unlink()
    outcome = resume(tmp_path / "run")
    assert outcome.code == 2
    assert "holds a finished run without its last.pth.tar" in outcome.err[0]
    assert (tmp_path / "run" / "best.pth.tar").exists()


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    outcome = go(tmp_path, FC3, "--resume --overwrite")
    assert outcome.code == 2
    assert outcome.err[0].endswith("--resume and --overwrite exclude each other")


def test_a_half_written_file_of_a_killed_run_is_removed(half):
    (half / ".last.pth.tar.abc123").write_bytes(b"half")
    resume(half)
    assert {path.name for path in half.iterdir()} == {*runs.RUN_FILES, "tensorboard"}


def test_the_environment_says_when_a_run_was_resumed(half):
    before = json.loads((half / "environment.json").read_text())
    (half / "environment.json").write_text(json.dumps(before | {"numpy": "1.0"}))
    outcome = resume(half)
    after = json.loads((half / "environment.json").read_text())
    (resumed,) = after.pop("resumed")
    assert after == before | {"numpy": "1.0"}
    assert (resumed["epoch"], resumed["step"]) == (1, 2)
    assert resumed["changed"].startswith("numpy 1.0 (now ")
    assert f"not as in {half}, so numbers may differ: {resumed['changed']}" in outcome.out


def test_the_config_of_a_run_repeats_it_and_names_changed_versions(unbroken, tmp_path):
    shutil.copytree(unbroken(), tmp_path / "old")
    environment = json.loads((tmp_path / "old" / "environment.json").read_text())
    (tmp_path / "old" / "environment.json").write_text(json.dumps(environment | {"torch": "1.0", "threads": 64}))
    outcome = go(tmp_path / "new", "--config", tmp_path / "old" / "config.yaml")
    assert f"not as in {tmp_path / 'old'}, so numbers may differ: threads 64 (now 1), torch 1.0 (now " in outcome.out[0]
    assert_same(tmp_path / "new", tmp_path / "old")


def test_the_config_of_a_run_with_the_same_versions_says_nothing(unbroken, tmp_path):
    outcome = go(tmp_path, "--config", unbroken() / "config.yaml")
    assert not [line for line in outcome.out if line.startswith("not as in")]


# ---- A disk that fails ---------------------------------------------------------------------------


class FullFile:
    """A file on a disk with room for `room` bytes more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, some):
        self.room -= len(some)
        if self.room < 0:
            fail()
        return self.file.write(some)


@pytest.mark.parametrize("room", [0, 1000, 100_000])
def test_a_disk_that_fills_up_in_a_checkpoint_leaves_the_one_before(half, monkeypatch, room):
    before = (half / "last.pth.tar").read_bytes()
    write = runs.write_atomically
    full = lambda path, put: write(path, (lambda file: put(FullFile(file, room))) if path.suffix == ".tar" else put)  # noqa: E731
    monkeypatch.setattr(runs, "write_atomically", full)
    outcome = resume(half)
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert outcome.err[0].endswith(f"cannot write {half}/last.pth.tar: No space left on device")
    assert (half / "last.pth.tar").read_bytes() == before
    assert not list(half.glob(".*"))


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("name", runs.RUN_FILES)
def test_a_disk_that_takes_no_more_is_one_sentence_and_the_run_can_be_resumed(unbroken, half, where, name):
    with pytest.MonkeyPatch.context() as patch, at_write(name, 1, lambda: patch.setattr(os, where, fail)):
        outcome = resume(half)
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert outcome.err[0].endswith(f"cannot write {half / name}: No space left on device")
    assert resume(half).code == 0
    assert_same(half, unbroken())


def test_a_disk_that_takes_no_curves_is_one_sentence(half):
    with at(RecordWriter, "write", 3, fail):
        outcome = resume(half)
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert outcome.err[0].endswith(f"cannot write {half}/tensorboard: No space left on device")


def test_a_run_folder_that_is_deleted_meanwhile_is_one_sentence(tmp_path):
    with at(train, "train_step", 6, lambda *_: shutil.rmtree(tmp_path / "run")):
        outcome = go(tmp_path / "run")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert outcome.err[0].endswith(f"cannot write {tmp_path}/run/last.pth.tar: No such file or directory")


def test_a_run_folder_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Path, "mkdir", lambda *_, **options: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    outcome = go(tmp_path / "run")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert outcome.err[0].endswith("error: Permission denied")


# ---- Numbers that fail ---------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["fc1", "fc3"])
def test_a_gradient_that_is_not_finite_names_layer_epoch_and_step_and_is_not_saved(half, layer):
    before = (half / "last.pth.tar").read_bytes()

    def spoil(net, *_):
        getattr(net, layer).weight.register_hook(lambda gradient: gradient.fill_(float("nan")))

    with at(train, "train_step", 1, spoil):
        outcome = resume(half)
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert f"the gradient of {layer}.weight is inf or nan at epoch 2, step 3" in outcome.err[0]
    assert (half / "last.pth.tar").read_bytes() == before


def test_deterministic_runs_on_a_cpu(tmp_path):
    try:
        assert go(tmp_path, FC3, "--deterministic --num_epochs 1").code == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


# ---- The learning rate of a CUDA graph ------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_learning_rate_that_a_graph_reads_is_a_tensor_and_goes_on_from_a_checkpoint(optimizer, tmp_path):
    args = train.parse_args(["--optimizer", optimizer, "--gamma_weight_decay", "0", "--cuda_graph"])
    images, rates = torch.randn(2, 3, 8, 8), (0.3, 0.2, 0.1)

    def fresh():
        torch.manual_seed(0)
        net = SpikingVGG("vgg9", 2, img_size=8, encoding="direct")
        return net, train.build_optimizer(net, args)

    def steps(net, optimizer, rates):
        for rate in rates:
            held = [group["lr"] for group in optimizer.param_groups]
            train.set_learning_rate(optimizer, rate)
            assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(rate)] * 2
            assert all(now["lr"] is before for now, before in zip(optimizer.param_groups, held, strict=True))
            optimizer.zero_grad()
            net(images).square().sum().backward()
            optimizer.step()
        return [p.detach().clone() for p in net.parameters()]

    whole = steps(*fresh(), rates)
    net, first = fresh()
    steps(net, first, rates[:2])
    torch.save({"net": net.state_dict(), "state": first.state_dict()["state"]}, tmp_path / "last")
    kept = torch.load(tmp_path / "last", weights_only=True)
    net, second = fresh()
    net.load_state_dict(kept["net"])
    groups = second.state_dict()["param_groups"]  # as `Run.restore` does
    second.load_state_dict({"state": kept["state"], "param_groups": groups})
    assert all(torch.equal(a, b) for a, b in zip(steps(net, second, rates[2:]), whole, strict=True))
