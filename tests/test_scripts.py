"""train.py and test.py as their user runs them, on tiny data; and the bad input of all three scripts."""

import json
import os
import pickle
import shutil
import statistics
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, call, spawn, words
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data
import early_exit
import image_data
import model
import nets
import runs
import test as test_script
import train
import training_set
import utill

MAINS = {"train": train.main, "test": test_script.main, "early_exit": early_exit.main}
LAYERS = [f"conv{i}" for i in range(1, 8)] + ["fc1"]
SYNTHETIC = f"{TINY} --dataset synthetic --limit_train 32 --limit_test 20 --num_epochs 2 --lr 0.1"


def train_synthetic(run_dir, *more):
    return call(train.main, SYNTHETIC, "--run_dir", run_dir, *more)


def read_log(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def weights(path):
    return runs.load_checkpoint(path)["state_dict"]


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- What a run leaves ---------------------------------------------------------------------------


def test_every_layer_of_the_run_of_these_tests_spikes(trained):
    assert all(rate > 0.01 for rate in read_log(trained.dir)[-1]["spike_rate"].values())


def test_training_learns(trained):
    losses = [line["train_loss"] for line in read_log(trained.dir)]
    assert losses[-1] < losses[0]


def test_a_run_leaves_the_promised_files_and_no_other(trained):
    of_other_tests = {"early_exit.png", "early_exit.json", "analysis.json"}
    assert {path.name for path in trained.dir.iterdir()} - of_other_tests == {*runs.RUN_FILES, "tensorboard"}


def test_the_log_has_a_line_an_epoch_with_all_that_was_measured(trained):
    log = read_log(trained.dir)
    assert [line["epoch"] for line in log] == [1, 2, 3]
    for line in log:
        measured = {"lr", "train_loss", "train_acc", "images_per_s", "seconds", "test_loss", "test_acc", "test_acc5"}
        assert measured <= line.keys()
        assert list(line["mean_gamma"]) == list(line["spike_rate"]) == LAYERS


def test_the_log_holds_the_norms_of_gradients_in_mean_and_deviation(tmp_path, monkeypatch):
    step, norms = train.train_step, []
    monkeypatch.setattr(train, "train_step", lambda *a: norms.append((out := step(*a))[3].tolist()) or out)
    assert train_synthetic(tmp_path / "run").code == 0
    log = read_log(tmp_path / "run")
    for line, epoch in zip(log, (norms[: len(norms) // 2], norms[len(norms) // 2 :]), strict=True):
        assert list(line["gradient_norm"]) == [*LAYERS, "fc2"]
        layers = list(zip(*epoch, strict=True))
        assert len(layers[0]) > 1
        assert [*line["gradient_norm"].values()] == pytest.approx([*map(statistics.mean, layers)])
        assert [*line["gradient_deviation"].values()] == pytest.approx([*map(statistics.pstdev, layers)], abs=1e-9)


def test_the_log_holds_the_learning_rate_of_each_epoch(trained):
    assert [line["lr"] for line in read_log(trained.dir)] == [0.02, 0.02, 0.002]


def test_the_last_line_is_the_result_file(trained):
    assert trained.outcome.result == json.loads((trained.dir / "result.json").read_text())


def test_the_result_says_what_was_tested_and_how_it_was_chosen(trained):
    result = trained.outcome.result
    log = read_log(trained.dir)
    assert (result["count"], result["train_images"]) == (100, 128)
    assert (result["epoch"], result["chosen_by"]) == (3, "last epoch")
    assert (result["test_acc"], result["test_acc5"]) == (log[-1]["test_acc"], log[-1]["test_acc5"])


def test_the_environment_names_command_versions_device_and_code(trained):
    facts = json.loads((trained.dir / "environment.json").read_text())
    assert "--limit_train 128" in facts["command"]
    assert facts["torch"] == torch.__version__
    assert {"git", "device", "python", "engine", "amp"} <= facts.keys()


def test_tensorboard_holds_the_curves_and_the_gamma_histograms(trained):
    events = EventAccumulator(str(trained.dir / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    per_layer = {f"{key}/{layer}" for key in ("spike_rate", "mean_gamma") for layer in LAYERS}
    assert {"train_loss", "train_acc", "test_loss", "test_acc", "lr"} | per_layer <= set(tags["scalars"])
    assert {f"gamma/{layer}" for layer in LAYERS} <= set(tags["histograms"])
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3]
    assert events.Scalars("test_acc")[-1].value == pytest.approx(trained.outcome.result["test_acc"])


def test_the_config_of_a_run_repeats_it_bit_for_bit(trained, tmp_path):
    again = call(train.main, "--config", trained.dir / "config.yaml", "--run_dir", tmp_path / "again")
    assert again.result["test_acc"] == trained.outcome.result["test_acc"]
    assert same_weights(tmp_path / "again" / "last.pth.tar", trained.dir / "last.pth.tar")


def test_another_seed_gives_other_weights(tmp_path):
    for seed in (0, 1):
        train_synthetic(tmp_path / str(seed), "--seed", seed, "--num_epochs", 1)
    assert not same_weights(tmp_path / "0" / "last.pth.tar", tmp_path / "1" / "last.pth.tar")


def test_the_number_of_workers_does_not_change_the_weights(tmp_path):
    for workers in (0, 2):
        outcome = train_synthetic(tmp_path / str(workers), "--num_workers", workers)
        assert outcome.code == 0
    assert same_weights(tmp_path / "0" / "last.pth.tar", tmp_path / "2" / "last.pth.tar")


def test_data_on_the_device_does_not_change_the_weights(tmp_path):
    for name, flag in (("loaded", ""), ("kept", "--data_on_device")):
        assert train_synthetic(tmp_path / name, flag).code == 0
    assert same_weights(tmp_path / "loaded" / "last.pth.tar", tmp_path / "kept" / "last.pth.tar")


def test_the_default_run_folder_is_named_after_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = call(train.main, SYNTHETIC, "--num_epochs", 1, "--norm", "none", "--seed", 4)
    assert outcome.result["run_dir"] == "runs/synthetic_vgg9_T3_none_seed4"
    assert (tmp_path / outcome.result["run_dir"] / "best.pth.tar").exists()


def test_losses_are_printed_as_often_as_asked(tmp_path):
    outcome = train_synthetic(tmp_path, "--num_epochs 4 --train_display_freq 2 --test_display_freq 3")
    lines = [line.split() for line in outcome.out if line.startswith("epoch ")]
    shown = {words[1]: {"train_loss" in words, "test_acc" in words} for words in lines}
    assert shown == {"2/4": {True, False}, "3/4": {True}, "4/4": {True}}
    assert ["test_acc" in line for line in read_log(tmp_path)] == [False, False, True, True]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_optimizer_is_the_one_asked_for(optimizer):
    momentum = ["--momentum", "0.8"] if optimizer == "sgd" else []
    args = train.parse_args(["--optimizer", optimizer, "--weight_decay", "0.01", "--lr", "0.2", *momentum])
    built = train.build_optimizer(torch.nn.Linear(1, 1), args)
    group = built.param_groups[0]
    assert type(built).__name__.lower() == optimizer
    assert (group["lr"], group["weight_decay"], group.get("momentum")) == (
        0.2,
        0.01,
        0.8 if optimizer == "sgd" else None,
    )


def after_a_step(*flags):
    """A net of one BNTT layer before and after a step of SGD that follows weight decay alone: the gradients are 0."""
    args = train.parse_args(["--lr", "0.5", "--momentum", "0", "--weight_decay", "0.1", *flags])
    net = model.SpikingVGG("fc3", 2, img_size=2, num_cls=2, in_channels=1, norm=args.norm)
    old = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = train.build_optimizer(net, args)
    sum(p.sum() * 0 for p in net.parameters()).backward()
    optimizer.step()
    return {name: p.detach() / old[name] for name, p in net.named_parameters()}


@pytest.mark.parametrize("norm", ["bntt", "bn"])
@pytest.mark.parametrize(
    ("flags", "gamma"), [([], 0.95), (["--gamma_weight_decay", "0"], 1), (["--gamma_weight_decay", "0.4"], 0.8)]
)
def test_gammas_have_a_weight_decay_of_their_own(norm, flags, gamma):
    for name, factor in after_a_step("--norm", norm, *flags).items():
        torch.testing.assert_close(factor, torch.full_like(factor, gamma if "bntt" in name else 0.95), msg=name)


@pytest.mark.parametrize("smoothing", ["0", "0.3"])
def test_labels_are_smoothed_in_training_and_never_in_tests(tmp_path, smoothing):
    flags = (
        f"--num_epochs 1 --test_display_freq 1 --lr 1e-12 --label_smoothing {smoothing} --batch_size 8 --limit_train 8"
    )
    train_synthetic(tmp_path, flags)
    train_synthetic(tmp_path / "plain", flags.replace(f"--label_smoothing {smoothing}", ""))
    (log,), (plain,) = read_log(tmp_path), read_log(tmp_path / "plain")
    assert (log["train_loss"] != plain["train_loss"]) is (smoothing != "0")
    assert log["test_loss"] == plain["test_loss"]


# ---- Choosing the best epoch ---------------------------------------------------------------------


def test_with_a_validation_part_the_best_epoch_on_it_is_kept_and_tested(tmp_path, monkeypatch):
    hits, evaluate = iter([3, 6, 4, 5]), utill.evaluate

    def evaluate_with_a_peak(net, loader, *args, **options):
        evaluation = evaluate(net, loader, *args, **options)
        if loader.num_images == 10:  # the validation part: right at the last step, in turn
            return evaluation._replace(correct=[0, 0, next(hits)])
        return evaluation

    monkeypatch.setattr(utill, "evaluate", evaluate_with_a_peak)
    outcome = train_synthetic(tmp_path, "--val_fraction 0.01 --num_epochs 4")
    assert [line["val_acc"] for line in read_log(tmp_path)] == [30, 60, 40, 50]
    assert (outcome.result["epoch"], outcome.result["chosen_by"]) == (2, "validation accuracy")
    assert torch.load(tmp_path / "best.pth.tar")["global_step"] == 2
    assert torch.load(tmp_path / "last.pth.tar")["global_step"] == 4
    tested = call(test_script.main, tmp_path / "best.pth.tar", "--limit_test", 20)
    assert tested.result["top1"] == outcome.result["test_acc"]


@pytest.mark.parametrize("flags", ["", "--val_fraction 0.01 --best_by last"])
def test_the_last_epoch_is_reported_whatever_the_test_set_says(tmp_path, monkeypatch, flags):
    hits, evaluate = {20: iter([20, 1]), 10: iter([9, 3])}, utill.evaluate

    def fall(net, loader, *args, **options):
        return evaluate(net, loader, *args, **options)._replace(correct=[0, 0, next(hits[loader.num_images])])

    monkeypatch.setattr(utill, "evaluate", fall)
    outcome = train_synthetic(tmp_path, f"--test_display_freq 1 {flags}")
    assert [line["test_acc"] for line in read_log(tmp_path)] == [100, 5]
    assert (outcome.result["epoch"], outcome.result["test_acc"]) == (2, 5)
    assert outcome.result["chosen_by"] == "last epoch"
    assert same_weights(tmp_path / "best.pth.tar", tmp_path / "last.pth.tar")


# ---- A run folder in use -------------------------------------------------------------------------


def snapshot(folder):
    """{path: what would change if it were written to} of all that the folder holds."""
    files = {path: path.stat() for path in folder.rglob("*") if path.name != ".bntt_cache"}  # itself, not its files
    return {path: (path.is_dir(), path.is_file() and (stat.st_mtime_ns, stat.st_size)) for path, stat in files.items()}


def test_a_run_folder_that_holds_a_run_is_refused_untouched(tmp_path, monkeypatch):
    monkeypatch.setattr(train.data, "build_loaders", None)  # data may take minutes
    (tmp_path / "result.json").write_text("precious")
    before = snapshot(tmp_path)
    outcome = train_synthetic(tmp_path)
    assert outcome.code == 2
    assert "already holds a run" in outcome.err[0]
    assert snapshot(tmp_path) == before


def test_overwrite_replaces_the_run_and_keeps_what_is_not_of_it(tmp_path):
    train_synthetic(tmp_path, "--num_epochs", 2)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "early_exit.json").write_text("{}")
    assert train_synthetic(tmp_path, "--num_epochs", 1, "--overwrite").code == 0
    assert not (tmp_path / "early_exit.json").exists()  # it was of the net that is gone
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(read_log(tmp_path)) == 1
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1  # the curves of one run alone


# ---- A run that fails ----------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_names_epoch_and_step(tmp_path):
    outcome = train_synthetic(tmp_path, "--lr", 1e30, "--batch_size", 8)
    assert outcome.code == 2
    assert outcome.err == [
        next(line for line in outcome.err if "holds inf or nan at epoch 1, step 3: lower --lr" in line)
    ]
    assert not (tmp_path / "result.json").exists()


def test_weights_that_are_not_finite_stop_the_run_though_the_loss_is(tmp_path):
    outcome = train_synthetic(tmp_path, "--lr", 1e10)
    assert outcome.code == 2
    assert len(outcome.err) == 1
    assert "running_var holds inf or nan at epoch 2" in outcome.err[0]


# ---- test.py -------------------------------------------------------------------------------------


def test_testing_a_run_again_gives_its_accuracy(trained):
    outcome = call(test_script.main, trained.checkpoint, "--limit_test", 100)
    assert outcome.result["top1"] == trained.outcome.result["test_acc"]
    assert outcome.result["top5"] == trained.outcome.result["test_acc5"]


def test_every_test_image_is_tested_though_training_looked_at_fewer(trained):
    outcome = call(test_script.main, trained.checkpoint)
    assert outcome.result["count"] == 360
    assert (outcome.result["steps"], outcome.result["num_steps"], outcome.result["repeats"]) == (3, 3, 1)


def test_accuracy_is_given_per_class_and_adds_up(trained):
    outcome = call(test_script.main, trained.checkpoint, "--limit_test", 100)
    rows = [line.split() for line in outcome.out if " % of " in line]
    assert [row[0] for row in rows] == [f"{k}:" for k in range(10)]
    assert sum(int(row[-1]) for row in rows) == 100
    right = sum(float(row[1]) / 100 * int(row[-1]) for row in rows)
    assert right == pytest.approx(outcome.result["top1"], abs=0.1)


def test_fewer_steps_are_run_where_asked(trained):
    outcome = call(test_script.main, trained.checkpoint, "--limit_test", 100, "--steps", 1)
    assert outcome.result["steps"] == 1
    assert "1 of 3 time-steps" in outcome.out[-2]


def test_repeats_are_other_draws_and_give_mean_and_deviation(trained):
    repeated = call(test_script.main, trained.checkpoint, "--limit_test", 100, "--repeats", 3)
    assert repeated.result["repeats"] == 3
    assert repeated.result["top1_std"] > 0
    assert f"+- {repeated.result['top1_std']:.2f} over 3 Poisson draws" in repeated.out[-2]


def test_the_last_line_of_a_test_goes_to_a_file_too(trained, tmp_path):
    outcome = call(test_script.main, trained.checkpoint, "--steps 1 --out", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == outcome.result


@pytest.mark.parametrize("name", ["", "missing/out.json"])
def test_a_file_that_cannot_be_is_refused_before_the_test(trained, tmp_path, name):
    outcome = call(test_script.main, trained.checkpoint, "--out", tmp_path / name)
    assert (outcome.code, outcome.out, len(outcome.err)) == (2, [], 1)
    assert "name a file in a folder that is there" in outcome.err[0]


def test_repeats_of_what_draws_nothing_are_refused(tmp_path):
    flags = "--dataset digits --encoding direct --limit_train 32 --num_epochs 1 --run_dir"
    assert call(train.main, TINY, flags, tmp_path / "run").code == 0
    outcome = call(test_script.main, tmp_path / "run" / "best.pth.tar", "--repeats", 2)
    assert outcome.code == 2
    assert "--encoding direct draws nothing at random" in outcome.err[0]


def test_a_checkpoint_is_tested_with_the_statistics_it_was_trained_with(trained):
    outcome = call(test_script.main, trained.checkpoint, "--norm_stats", "authors")
    assert outcome.code == 2
    assert "was trained with --norm_stats own" in outcome.err[0]


def test_the_deviation_over_draws_is_that_of_the_sample(trained, monkeypatch):
    evaluate, seeds = utill.evaluate, []

    def evaluate_as_told(net, loader, device, loss, seed, *args):
        seeds.append(seed)
        return evaluate(net, loader, device, loss, seed, *args)._replace(correct=[0, 0, [50, 60, 64][len(seeds) - 1]])

    monkeypatch.setattr(utill, "evaluate", evaluate_as_told)
    result = call(test_script.main, trained.checkpoint, "--limit_test 100 --repeats 3 --seed 7").result
    assert seeds == [7, 8, 9]
    assert (result["top1"], result["top1_std"]) == (58, statistics.stdev([50, 60, 64]))


@pytest.mark.parametrize(
    "flags",
    [
        "--norm bn --threshold 0.5 --encoding direct --leak_mem 0.7",
        "--norm none --spike_order fire_first --encoding poisson_binary --num_steps 9",
        "--arch vgg11 --img_size 16 --num_steps 2",
    ],
)
def test_a_checkpoint_alone_rebuilds_its_net_in_any_folder(tmp_path, monkeypatch, flags):
    outcome = train_synthetic(tmp_path / "run", "--num_epochs", 1, flags)
    shutil.move(tmp_path / "run" / "last.pth.tar", tmp_path / "alone.pth.tar")
    shutil.rmtree(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    args = vars(test_script.parse_args(["alone.pth.tar"])[0])
    words = flags.replace("--", "").split()
    assert {key: str(args[key]) for key in words[::2]} == dict(zip(words[::2], words[1::2], strict=True))
    assert call(test_script.main, "alone.pth.tar", "--limit_test", 20).result["top1"] == outcome.result["test_acc"]


def test_the_device_of_the_training_does_not_bind_the_test(trained, tmp_path):
    checkpoint = torch.load(trained.checkpoint)
    checkpoint["config"] |= {"device": "cuda:7", "save_memory": None}
    torch.save(checkpoint, tmp_path / "moved.pth.tar")
    assert test_script.parse_args([str(tmp_path / "moved.pth.tar")])[0].device == "auto"


def test_pictures_of_ones_own_are_classified_without_the_data_set(tmp_path, monkeypatch):
    train_synthetic(tmp_path / "run", "--num_epochs", 1)
    monkeypatch.setitem(data.DATASETS, "synthetic", None)  # gone
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    checkpoint, pictures = tmp_path / "run" / "last.pth.tar", [tmp_path / "rgba.png", tmp_path / "grey.png"]
    outcome = call(test_script.main, checkpoint, "--image", *pictures)
    answers = outcome.result["images"]
    assert [Path(answer["image"]).name for answer in answers] == ["rgba.png", "grey.png"]
    assert all(answer["class"] in [f"class{k}" for k in range(10)] for answer in answers)
    assert all(0.1 <= answer["probability"] <= 1 for answer in answers)  # the likeliest of ten


@torch.no_grad()
def test_pictures_of_the_test_set_are_classified_as_its_images(trained, tmp_path):
    raw = image_data.digits(None, train_too=False).test
    paths = [tmp_path / f"{k}.png" for k in range(32)]
    for path, image in zip(paths, raw.images, strict=False):
        Image.fromarray(image[0].numpy()).save(path)
    answers = call(test_script.main, trained.checkpoint, "--image", *paths).result["images"]

    args, checkpoint = test_script.parse_args([str(trained.checkpoint)])
    loaders = data.build_loaders(args, train=False, **training_set.known_data(checkpoint))
    images, _ = next(iter(loaders.test))  # the first 32
    net = nets.load_net(args, checkpoint, loaders.facts, torch.device("cpu")).eval()
    utill.seed_stream(0, 1)
    assert [int(answer["class"]) for answer in answers] == net(images).argmax(1).tolist()


def test_logit_scale_sharpens_the_probabilities_of_pictures(trained, tmp_path):
    picture = tmp_path / "picture.png"
    Image.fromarray(image_data.digits(None, train_too=False).test.images[0, 0].numpy()).save(picture)
    plain, sharp = (
        call(test_script.main, trained.checkpoint, "--logit_scale", scale, "--image", picture).result["images"][0]
        for scale in (1, 30)
    )
    assert plain["class"] == sharp["class"]
    assert plain["probability"] < sharp["probability"]


# ---- Checkpoints of the authors' code ------------------------------------------------------------


@pytest.fixture
def authors_checkpoint(tmp_path):
    """A net of ours in a file as the authors' code saves it; (path, test accuracy)."""
    outcome = train_synthetic(tmp_path / "run", "--norm_stats", "authors", "--leak_mem", 0.8)
    path = tmp_path / "synthetic_bestmodel.pth.tar"
    state = {"global_step": 2, "state_dict": weights(tmp_path / "run" / "last.pth.tar"), "accuracy": np.float64(42.5)}
    torch.save(state, path)
    return path, outcome.result["test_acc"]


def test_an_authors_checkpoint_is_read_with_flags(authors_checkpoint):
    path, accuracy = authors_checkpoint
    flags = "--arch vgg9 --dataset synthetic --leak_mem 0.8 --img_size 8 --batch_size 16 --limit_test 20"
    result = call(test_script.main, path, flags, "--num_workers", 0, "--device", "cpu").result
    assert (result["top1"], result["num_steps"]) == (accuracy, 3)


def test_an_authors_checkpoint_means_images_normalised_as_the_authors_do(authors_checkpoint):
    flags = ["--arch", "vgg9", "--dataset", "cifar100", "--leak_mem", "0.8"]
    assert test_script.parse_args([str(authors_checkpoint[0]), *flags])[0].norm_stats == "authors"


def test_an_authors_checkpoint_is_refused_without_flags(authors_checkpoint):
    for main in (test_script.main, early_exit.main):
        outcome = call(main, authors_checkpoint[0], "--dataset", "synthetic")
        assert outcome.code == 2
        assert outcome.err[0].endswith("does not say its settings: pass --arch --leak_mem")


def test_an_authors_checkpoint_of_the_first_upload_is_refused_with_its_reason(authors_checkpoint):
    path, _ = authors_checkpoint
    checkpoint = runs.load_checkpoint(path)
    checkpoint["state_dict"] |= {f"bntt_fc.{t}.bias": torch.zeros(1024) for t in range(3)}
    torch.save(checkpoint, path)
    outcome = call(test_script.main, path, "--arch vgg9 --dataset synthetic --leak_mem 0.8 --img_size 8")
    assert outcome.code == 2
    assert "first upload" in outcome.err[0]
    assert len(outcome.err) == 1


# ---- As subprocesses -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_three_commands_one_after_the_other_from_another_folder(tmp_path):
    trained = spawn("train.py", SYNTHETIC, "--num_epochs", 1, cwd=tmp_path)
    run_dir = Path(trained.result["run_dir"])
    assert (tmp_path / run_dir / "result.json").exists()
    tested = spawn("test.py", run_dir / "best.pth.tar", "--limit_test", 20, cwd=tmp_path)
    assert tested.result["top1"] == trained.result["test_acc"]
    read = spawn("early_exit.py", run_dir / "best.pth.tar", "--limit_test", 20, "--sweep", cwd=tmp_path)
    assert read.result["acc_full"] == tested.result["top1"]
    assert trained.err == tested.err == read.err == []


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "test.py", "early_exit.py"])
def test_a_mistake_is_one_line_of_stderr_and_nothing_else(script, tmp_path):
    (tmp_path / "notes.txt").write_bytes(pickle.dumps({"a": os.getcwd}, protocol=4))
    outcome = spawn(script, "--config notes.txt" if script == "train.py" else "notes.txt", cwd=tmp_path)
    assert (outcome.code, outcome.out, len(outcome.err)) == (2, [], 1)
    assert outcome.err[0].startswith(f"{script}: error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# ---- Bad input -----------------------------------------------------------------------------------


def image_tree(root, truncate=False, empty_class=False):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for k in range(8 if not (empty_class and (split, name) == ("train", "dog")) else 0):
                Image.fromarray(np.full((8, 8, 3), 9 * k, dtype=np.uint8)).save(root / split / name / f"{k}.png")
    if truncate:
        path = root / "train" / "dog" / "3.png"
        path.write_bytes(path.read_bytes()[:50])


def edit(checkpoint, path, **changes):
    """Save the checkpoint with entries of its `config` and `data` changed, or removed where None."""
    checkpoint = torch.load(checkpoint)
    for part, values in changes.items():
        checkpoint[part] = {k: v for k, v in (checkpoint[part] | values).items() if v is not None}
    torch.save(checkpoint, path)


class Code:
    """Unpickling this makes the folder `it-ran`."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


@pytest.fixture(scope="module")
def users_files(tmp_path_factory, trained):
    """A folder with a user's files, good and bad."""
    folder = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_users_files(trained)
    return folder


def write_users_files(trained):
    Path("file").write_text("mine")
    Path("empty").mkdir()
    Path("typo.yaml").write_text("learning_rate: 0.3\n")
    Path("type.yaml").write_text("num_steps: many\n")
    image_tree(Path("tree"))
    image_tree(Path("tree-truncated"), truncate=True)
    image_tree(Path("tree-empty-class"), empty_class=True)
    whole = trained.checkpoint.read_bytes()
    Path("good.tar").write_bytes(whole)
    Path("half.tar").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": Code()}, "code.tar")
    state = weights(trained.checkpoint)
    other_shape = state | {"fc2.weight": torch.ones(7, 1024)}
    torch.save(torch.load(trained.checkpoint) | {"state_dict": other_shape}, "shape.tar")
    edit(trained.checkpoint, "type.tar", config={"num_steps": "three"})
    edit(trained.checkpoint, "lacks.tar", config={"leak_mem": None})
    edit(trained.checkpoint, "lacks-data.tar", data={"mean": None})
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save("image.png")
    Path("image-half.png").write_bytes(Path("image.png").read_bytes()[:40])


@pytest.fixture
def place(users_files, monkeypatch):
    """That folder as the working directory, without a network. No test may change it."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.chdir(users_files)
    return users_files


FOLDER = "train --dataset imagefolder --num_steps 2 --batch_size 4 --num_epochs 1 --num_workers 0 --data_dir"
SYNTH = "train --dataset synthetic --img_size 8 --num_steps 2 --batch_size 8 --num_epochs 1 --num_workers 0"
BAD_INPUT = [
    ("train --arch vgg7", "invalid choice: 'vgg7'"),
    ("train --dataset imagenet", "invalid choice: 'imagenet'"),
    ("train --config typo.yaml", "typo.yaml: unknown key 'learning_rate'"),
    ("train --config type.yaml", "type.yaml: num_steps: expected an integer"),
    ("train --config missing.yaml", "cannot read missing.yaml: No such file"),
    ("train --num_steps 0", "expected an integer of at least 1"),
    ("train --leak_mem 0", "expected a number in (0, 1]"),
    ("train --leak_mem 1.5", "expected a number in (0, 1]"),
    ("train --leak_mem nan", "expected a number in (0, 1]"),
    (f"{FOLDER} missing", "data folder missing has no"),
    (f"{FOLDER} empty", "data folder empty has no train/"),
    (f"{FOLDER} tree-empty-class", "has no image in it"),
    (f"{FOLDER} tree-truncated", "cannot read image tree-truncated/train/dog/3.png"),
    ("train --dataset cifar10 --data_dir empty", "cannot make empty/cifar-10-batches-py"),
    ("train --dataset cifar100 --data_dir empty", "cannot make empty/cifar-100-python"),
    (f"{SYNTH} --device gpu", "--device gpu: this machine or this PyTorch has no such device"),
    (f"{SYNTH} --device cuda:99", "has no such device; try --device cpu"),
    (f"{SYNTH} --run_dir file", "file is no folder, where a run could be kept"),
    (f"{SYNTH} --run_dir file/run", "cannot use file/run: Not a directory"),
    (f"{SYNTH} --img_size 7", "img_size of vgg9 must be at least 8, got 7"),
    (f"{SYNTH} --arch vgg11 --img_size 15", "img_size of vgg11 must be at least 16, got 15"),
    (f"{SYNTH} --batch_size 1001", "lower --batch_size"),
    (f"{SYNTH} --batch_size 1", "--batch_size 1: batch norm cannot train"),
    (f"{SYNTH} --norm none --gamma_weight_decay 0", "--gamma_weight_decay: a net with --norm none has no gamma"),
    (f"{SYNTH} --engine plain --save_memory 2", "--save_memory belongs to the fused engine"),
    (f"{SYNTH} --amp fp16 --device cpu", "--amp fp16 needs a GPU"),
    ("CHECKPOINT missing.tar", "cannot read missing.tar: No such file or directory"),
    ("CHECKPOINT empty", "empty is a folder: name the checkpoint in it, as empty/best.pth.tar"),
    ("CHECKPOINT half.tar", "cannot read half.tar ("),
    ("CHECKPOINT file", "cannot read file ("),
    ("CHECKPOINT image.png", "cannot read image.png ("),
    ("CHECKPOINT code.tar", "code.tar was refused"),
    ("CHECKPOINT shape.tar", "holds another net than vgg9 as asked for: size mismatch for fc2.weight"),
    ("CHECKPOINT good.tar --num_steps 4", "good.tar holds another net"),
    ("CHECKPOINT good.tar --arch vgg11", "good.tar was trained with --arch vgg9: test it with the same"),
    ("CHECKPOINT type.tar", "num_steps: expected an integer of at least 1 and at most 10000, got 'three'"),
    ("CHECKPOINT lacks.tar", "lacks.tar cannot be rebuilt: its config lacks leak_mem"),
    ("CHECKPOINT lacks-data.tar", "missing 1 required positional argument: 'mean'"),
    ("CHECKPOINT good.tar --dataset imagefolder --data_dir missing", "data folder missing has no"),
    ("CHECKPOINT good.tar --dataset synthetic", "classes"),
    ("CHECKPOINT good.tar --device gpu", "has no such device"),
    ("test good.tar --steps 4", "--steps must be at most 3"),
    ("test good.tar --precise_bn 2 --image image.png", "--precise_bn takes the data set that the net was trained on"),
    ("test good.tar --precise_bn 2 --batch_size 1", "--precise_bn: there are no statistics of a batch of one image"),
    ("test good.tar --image image.png --repeats 2", "leave it out, or --image"),
    (f"{SYNTH} --arch fc3 --spike_order fire_first", "firing first, this net answers after 2 steps: use more"),
    (f"{SYNTH} --label_smoothing 1", "expected a number in [0, 1)"),
    (f"{SYNTH} --warmup_epochs 1.5", "--warmup_epochs 1.5 is more than the --num_epochs 1"),
    ("test good.tar --image missing.png", "cannot read image missing.png"),
    ("test good.tar --image image.png image-half.png", "cannot read image image-half.png"),
    ("early_exit good.tar --figure empty/figure.xyz", "must end in one of"),
    ("early_exit good.tar --figure missing/figure.png", "there is no such folder"),
    ("early_exit good.tar --figure analysis.png", "its .json would replace one of a run"),
    ("early_exit good.tar --gamma_threshold 0", "expected a positive number"),
]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (command.replace("CHECKPOINT", script), message)
        for command, message in BAD_INPUT
        for script in (["test", "early_exit"] if "CHECKPOINT" in command else [""])
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(place, command, message):
    before = snapshot(place)
    script, flags = command.split(" ", 1)
    outcome = call(MAINS[script], flags)
    assert (outcome.code, len(outcome.err)) == (2, 1), outcome.err
    assert message in outcome.err[0]
    assert ": error: " in outcome.err[0]
    assert snapshot(place) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_cuda_without_a_gpu_is_a_mistake():
    outcome = call(train.main, "--dataset synthetic --device cuda")
    assert outcome.code == 2
    assert outcome.err[0].endswith("--device cuda: this machine or this PyTorch has no such device; try --device cpu")


def test_cuda_graph_without_a_gpu_is_a_mistake(tmp_path):
    outcome = train_synthetic(tmp_path / "run", "--cuda_graph")
    assert outcome.code == 2
    assert "--cuda_graph needs a GPU" in outcome.err[0]
    assert not (tmp_path / "run").exists()


def test_the_good_files_beside_the_bad_ones_are_good(place, tmp_path):
    shutil.copytree("tree", tmp_path / "tree")
    trained = call(train.main, FOLDER.removeprefix("train "), tmp_path / "tree", "--run_dir", tmp_path / "run")
    assert trained.result["count"] == 16
    assert call(test_script.main, "good.tar", "--limit_test", 10).code == 0
    assert call(test_script.main, "good.tar", "--image", "image.png").code == 0


# ---- --precise_bn ----------------------------------------------------------------------------------


def weights_of(run_dir):
    state = torch.load(run_dir / "last.pth.tar", weights_only=True)["state_dict"]
    return {name: tensor for name, tensor in state.items() if "running" not in name}


def test_precise_bn_changes_no_weight(tmp_path):
    flags = "--num_epochs 2 --limit_train 64"
    assert train_synthetic(tmp_path / "plain", flags).code == 0
    assert train_synthetic(tmp_path / "precise", flags, "--precise_bn 2").code == 0
    plain, precise = weights_of(tmp_path / "plain"), weights_of(tmp_path / "precise")
    assert all(torch.equal(precise[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("engine", ["plain", "fused"])
def test_precise_bn_is_the_average_over_so_many_batches(engine, tmp_path):
    flags = f"--num_epochs 1 --limit_train 64 --encoding direct --precise_bn 3 --engine {engine}"
    assert train_synthetic(tmp_path / "run", flags).code == 0
    state = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=True)
    args = train.parse_args(words([SYNTHETIC, flags]))
    loader = data.build_loaders(args).train
    means = [F.conv2d(images, state["state_dict"]["conv1.weight"], padding=1).mean((0, 2, 3)) for images, _ in loader]
    torch.testing.assert_close(state["state_dict"]["bntt1.1.running_mean"], torch.stack(means[:3]).mean(0))


@pytest.mark.parametrize("engine", ["plain", "fused"])
def test_precise_bn_of_one_batch_norm_is_the_average_over_all_time_steps_too(engine, tmp_path):
    flags = f"--num_epochs 1 --limit_train 64 --encoding direct --precise_bn 3 --norm bn --engine {engine}"
    assert train_synthetic(tmp_path, flags).code == 0
    net, found = nets.load(tmp_path / "last.pth.tar", engine="plain"), []
    shared = net.bntt2.shared
    saved, moments = [shared.running_mean.clone(), shared.running_var.clone()], []
    net.conv2.register_forward_hook(lambda m, x, y: found.append([y.mean((0, 2, 3)), y.var((0, 2, 3))]))
    loader = data.build_loaders(train.parse_args(words([SYNTHETIC, flags]))).train
    for images, _ in list(loader)[:3]:
        net.train()(images)
    assert len(found) == 3 * net.num_steps
    moments = [torch.stack(values).mean(0) for values in zip(*found, strict=True)]
    torch.testing.assert_close(saved, moments, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["bntt", "bn", "tdbn"])
def test_statistics_can_be_averaged_at_the_test_as_at_the_end_of_training(norm, tmp_path, monkeypatch):
    flags = f"--num_epochs 1 --limit_train 64 --val_fraction 0.1 --encoding direct --norm {norm}"
    assert train_synthetic(tmp_path / "later", flags).code == 0
    assert train_synthetic(tmp_path / "trained", flags, "--precise_bn 3").code == 0
    tested, evaluate = [], utill.evaluate
    monkeypatch.setattr(
        utill, "evaluate", lambda net, *args, **options: tested.append(net) or evaluate(net, *args, **options)
    )
    outcome = call(test_script.main, tmp_path / "later" / "best.pth.tar", "--precise_bn 3")
    assert outcome.result["precise_bn"] == 3
    expected = runs.load_checkpoint(tmp_path / "trained" / "best.pth.tar")["state_dict"]
    before = runs.load_checkpoint(tmp_path / "later" / "best.pth.tar")["state_dict"]
    for name, tensor in tested[0].state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
        assert torch.equal(tensor, before[name]) is not name.endswith(("running_mean", "running_var")), name


def test_precise_bn_leaves_counts_and_momentum_alone(tmp_path):
    for name, flags in (("plain", ""), ("precise", "--precise_bn 2")):
        assert train_synthetic(tmp_path / name, "--norm bn", flags).code == 0
    plain, precise = (torch.load(tmp_path / name / "last.pth.tar", weights_only=True) for name in ("plain", "precise"))
    for name, tensor in plain["state_dict"].items():
        assert torch.equal(precise["state_dict"][name], tensor) is not name.endswith(("running_mean", "running_var"))
