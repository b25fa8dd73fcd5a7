"""scripts/table1.sh ... table5.sh and digits.sh: what their rows train, and the real scripts on tiny data."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
from conftest import ROOT, Outcome
from make_tables import flags_of, plain
from PIL import Image

SCRIPTS = ("table1", "table2", "table3", "table4", "table5", "digits")
BUDGETS = ("full", "mini")
# May differ within one row of the paper.
SAME_ROW = ("run_dir", "out", "data_dir", "seed", "resume", "overwrite", "save_every", "checkpoint", "init_from")
PAPER = list(csv.DictReader((ROOT / "results" / "paper.csv").read_text(encoding="utf-8").splitlines()))

# In place of the environment's python: it notes its arguments, and runs train.py on what is tiny.
PYTHON = """#!{python}
import json, os, sys
argv, tiny = sys.argv[1:], os.environ["TINY"].split()
with open({log!r}, "a") as log:
    log.write(json.dumps(argv) + "\\n")
if not tiny:
    sys.exit()
if argv[0] == "train.py":
    argv += tiny
if argv[0] == "convert.py":
    argv += "--num_steps 6 --steps 6 --calibration_images 4 --limit_test 4 --device cpu".split()
if argv[0] == "train.py" and "STOP" in os.environ:  # in the second step
    sys.path.insert(0, "")
    import signal, train
    step, count = train.train_step, iter(range(9))
    train.train_step = lambda *a: (next(count) == 1 and os.kill(os.getpid(), signal.SIGTERM), step(*a))[1]
    sys.argv = argv
    sys.exit(train.main(argv[1:]))
os.execv(sys.executable, [sys.executable, *argv])
"""
TINY = "--num_epochs 1 --limit_train 9 --limit_test 4 --batch_size 3 --device cpu"
SMALL = f"{TINY} --img_size 8"


class Row(NamedTuple):
    """A row of a script: what it trains."""

    script: str
    budget: str
    name: str  # of the folder of its runs
    command: str
    flags: dict


class Place:
    """A folder with an environment whose python is PYTHON, data, and runs."""

    def __init__(self, folder):
        self.folder, self.results, self.log = folder, folder / "results", folder / "log"
        bin = folder / "venv" / "bin"
        bin.mkdir(parents=True)
        (bin / "activate").write_text(f"PATH={bin}:$PATH\n")
        (bin / "python").write_text(PYTHON.format(python=sys.executable, log=str(self.log)))
        (bin / "pip").write_text("#!/bin/sh\n")
        for name in ("python", "pip"):
            (bin / name).chmod(0o755)

    def run(self, script, *flags, data="data", tiny=TINY, **more):
        """Run scripts/<script>.sh on these flags."""
        changes = dict(VENV=self.folder / "venv", DATA=self.folder / data, RESULTS=self.results, TINY=tiny, **more)
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in changes.items()}
        command = ["bash", ROOT / "scripts" / f"{script}.sh", *flags]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        return Outcome(done.returncode, done.stdout.splitlines(), done.stderr.splitlines())

    def commands(self):
        """The arguments of every python so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def files(self):
        """{path: when it was written} of all runs."""
        return {path: path.stat().st_mtime_ns for path in self.results.glob("*/seed*/*") if path.is_file()}


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Every row of every script at both budgets, none of them run."""
    found = []
    for script in SCRIPTS:
        for budget in BUDGETS:
            place = Place(tmp_path_factory.mktemp("rows"))
            assert place.run(script, "--budget", budget, "--seeds", "3", tiny="").code == 0
            *trained, last = place.commands()
            assert last[0] == "scripts/make_tables.py"
            for argv in trained:
                flags = flags_of(" ".join(argv), script)
                flags["run_dir"] = flags.get("run_dir") or flags.pop("out")
                name, seed = flags["run_dir"].split("/")[-2:]
                assert (seed, flags["seed"]) == ("seed3", 3)
                found.append(Row(script, budget, name, plain(" ".join(argv)), flags))
    return found


def image_tree(root, classes=10, suffix="jpg", size=32):
    """A tree of two training and one test images a class."""
    for split, count in (("train", 2), ("test", 1)):
        for k in range(classes):
            folder = root / split / f"class{k:02}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng([k, i]).integers(0, 256, (size, size, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.{suffix}")


# ---- What the rows are -----------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_row_that_is_named_trains_its_technique(rows, place, script):
    technique = {("bntt", "lif"): "bntt", ("bn", "lif"): "bn", ("none", "lif"): "none", ("tdbn", "lif"): "tdbn"}
    technique |= {("bn", "plif"): "plif_bn", ("tebn", "lif"): "tebn", ("ln", "lif"): "ln", (None, None): "conversion"}
    technique |= {("none", "learnt_lif"): "hybrid"}
    named = place.run(script, "--help").out
    named = next(line for line in named if "--rows ROW" in line).split("of: ")[1].split()
    for budget in BUDGETS:
        flags = [row.flags for row in rows if (row.script, row.budget) == (script, budget)]
        assert len(flags) == len(named)
        for name, row in zip(named, flags, strict=True):
            told = technique[row.get("norm"), row.get("neuron")] if row.get("arch") != "vgg9_ann" else "ann"
            if told == "hybrid" and not row["init_from"]:
                told = "hybrid_scratch"
            if told == "bn" and row["precise_bn"] and row["dataset"] != "smnist":  # where all rows are tested so
                told = "bn_averaged"
            assert name.endswith(told)
            assert name.startswith((row.get("dataset", "cifar10"), told))


@pytest.mark.parametrize("paper", [row for row in PAPER if row["runs"]], ids=lambda row: row["runs"])
def test_a_row_of_the_paper_is_what_paper_csv_says(rows, paper):
    wanted = flags_of(paper["command"], "paper.csv")
    found = [row for row in rows if row.name == paper["runs"]]
    assert {(row.script, row.budget) for row in found} >= {(f"table{paper['table']}", "full")}
    for row in found:
        assert row.budget == "full"
        assert {k: v for k, v in row.flags.items() if k not in SAME_ROW} == {
            k: v for k, v in wanted.items() if k not in SAME_ROW
        }


def test_no_folder_is_shared_by_rows_that_are_not_the_same(rows):
    commands, budgets = {}, {}
    for row in rows:
        assert commands.setdefault(row.name, row.command) == row.command
        if row.script != "digits":
            assert budgets.setdefault(row.name, row.budget) == row.budget


def test_the_kept_runs_are_what_the_scripts_would_train(rows):
    commands = {row.name: row.command for row in rows}
    kept = {path.parts[-3] for path in (ROOT / "results").glob("*/seed0/result.json")} & commands.keys()
    assert len(kept) >= 20
    for name in kept:
        trained = plain(json.loads((ROOT / "results" / name / "seed0" / "environment.json").read_text())["command"])
        now, then = (flags_of(command, name) for command in (commands[name], trained))
        assert now == then


def test_the_mini_rows_take_the_best_learning_rate_of_the_search(rows):
    accuracies = {}
    for log in (ROOT / "results" / "rates").glob("*/seed0/log.jsonl"):
        technique, rate = log.parts[-3].rsplit("_", 1)
        held_out = json.loads(log.read_text().splitlines()[-1])["val_acc"]
        accuracies.setdefault(technique, {})[held_out] = float(rate)
    best = {technique: found[max(found)] for technique, found in accuracies.items()}
    assert len(best) == 7
    for row in rows:
        technique = re.sub("cifar10_mini_vgg9_?", "", row.name) or "bntt"
        if row.name.startswith("cifar10_mini_vgg9") and technique in best:
            assert row.flags["lr"] == best.pop(technique, row.flags["lr"])
    assert not best


def test_the_mini_rows_of_cifar_are_one_protocol(rows):
    rows = [row.flags for row in rows if row.budget == "mini" and row.flags.get("dataset", "").startswith("cifar")]
    for flags in rows:
        told = [flags[k] for k in ("encoding", "num_steps", "num_epochs", "limit_train", "limit_test", "augment")]
        steps = 1 if flags["arch"] == "vgg9_ann" else 16 if flags["neuron"] == "learnt_lif" else 4
        assert told == ["direct", steps, 10, 10_000, None, True]
    assert len(rows) == 10 + 11 + 2


# ---- Mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rows cifar10_bntt nonsense", "there is no row nonsense: choose from cifar10_bntt cifar10_bn"),
        ("--rows", "--rows needs a value"),
        ("--rows --seeds 1", "--rows needs a value"),
        ("--budget huge", "--budget is full or mini, got huge"),
        ("--seeds one", "--seeds takes numbers"),
        ("cifar10_bntt", "there is no flag cifar10_bntt"),
    ],
)
def test_a_mistake_is_one_sentence_and_runs_nothing(place, flags, message):
    outcome = place.run("table1", *flags.split())
    assert (outcome.code, outcome.out, len(outcome.err)) == (2, [], 1)
    assert outcome.err[0].startswith(f"table1.sh: error: {message}")
    assert place.commands() == []


def test_an_environment_that_was_not_made_to_the_end_is_made_again(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)  # `python -m venv` writes it first
    (tmp_path / "python3").write_text(f'#!/bin/sh\n[ "$1" != -m ] || touch {venv}/bin/activate\n')
    (tmp_path / "pip").write_text("#!/bin/sh\n")
    for name in ("python3", "pip"):
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"VENV": str(venv), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "-euc", f". {ROOT}/scripts/venv.sh; echo activated"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "activated\n", done.stderr


def test_another_data_set_s_images_are_refused_before_the_first_row_is_trained(place):
    image_tree(place.folder / "data")
    outcome = place.run("table4", "--rows", "cifar10_bn", "cifar100_bn")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert outcome.err[0].endswith("data holds 10 classes: it is no cifar100 (--rows chooses rows)")
    assert place.commands() == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_rows_and_runs_nothing(place, script):
    outcome = place.run(script, "--help")
    assert (outcome.code, outcome.err) == (0, [])
    assert "bntt" in next(line for line in outcome.out if "--rows ROW" in line)
    assert place.commands() == []


# ---- Data ------------------------------------------------------------------------------------------


def test_jpeg_images_are_no_run_of_the_paper_s_row(place):
    image_tree(place.folder / "data")
    assert place.run("table5", tiny="").code == 0
    flags = flags_of(" ".join(place.commands()[0]), "table5")
    assert (flags["dataset"], flags["data_dir"]) == ("imagefolder", str(place.folder / "data"))
    assert flags["run_dir"].endswith("/cifar10jpeg_vgg9/seed0")


def test_lossless_images_are(place):
    image_tree(place.folder / "data", suffix="png")
    assert place.run("table5", tiny="").code == 0
    flags = flags_of(" ".join(place.commands()[0]), "table5")
    assert (flags["dataset"], flags["run_dir"].split("/")[-2]) == ("cifar10", "cifar10_vgg9")


def test_the_data_set_s_own_folder_comes_before_the_folder_of_all(place):
    image_tree(place.folder / "data" / "cifar100", classes=100, size=8)
    assert place.run("table4", "--rows", "cifar10_bn", "cifar100_bn", tiny="").code == 0
    ten, hundred = (flags_of(" ".join(argv), "table4") for argv in place.commands()[:2])
    assert (ten["dataset"], ten["data_dir"]) == ("cifar10", str(place.folder / "data"))
    assert (hundred["dataset"], hundred["data_dir"]) == ("imagefolder", str(place.folder / "data" / "cifar100"))


@pytest.mark.parametrize("inside", ["", "a-folder"])
def test_an_archive_is_unpacked_once(place, inside):
    image_tree(place.folder / "images" / inside)
    shutil.make_archive(place.folder / "data", "xztar", place.folder / "images")
    for _ in range(2):
        assert place.run("table5", "--rows", "bntt", data="data.tar.xz", tiny="").code == 0
    trained = [flags_of(" ".join(argv), "table5") for argv in place.commands() if argv[0] == "train.py"]
    assert [flags["data_dir"] for flags in trained] == [str(place.folder / "data")] * 2
    assert len(list((place.folder / "data").glob("train/*/*.jpg"))) == 20


@pytest.mark.parametrize(("name", "message"), [("data.tar", "is no archive that tar can unpack"), ("data", "must be")])
def test_a_file_that_is_no_archive_is_refused_and_leaves_nothing(place, name, message):
    (place.folder / name).write_text("none")
    before = sorted(place.folder.iterdir())
    outcome = place.run("table5", data=name)
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert message in outcome.err[0]
    assert sorted(place.folder.iterdir()) == before


def test_flags_for_all_runs_come_last(place):
    flags = ["table5", "--budget", "mini"]
    assert place.run(*flags, tiny="", FLAGS="--data_on_device --cuda_graph --amp bf16").code == 0
    trained = [argv[-5:] for argv in place.commands() if argv[0] == "train.py"]
    assert trained == 2 * [["--data_on_device", "--cuda_graph", "--amp", "bf16", "--resume"]]


# ---- For real, on tiny data ------------------------------------------------------------------------


def test_a_mistake_in_a_warm_process_ends_the_script(place):
    image_tree(place.folder / "data")
    outcome = place.run("table5", "--budget", "mini", WARM=1, FLAGS="--lr -1")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert "expected a positive number" in outcome.err[0]


# ---- Several at a time -----------------------------------------------------------------------------


def test_several_workers_train_what_one_does_each_run_once(place):
    flags = "--budget", "mini", "--seeds", "0 1"
    assert place.run("table1", *flags, tiny="").code == 0
    *alone, last = map(tuple, place.commands())
    place.log.unlink()
    assert place.run("table1", *flags, tiny="", JOBS=3).code == 0
    *together, last_together = map(tuple, place.commands())
    assert sorted(together) == sorted(alone)
    assert last_together == last


@pytest.mark.parametrize("script", ["table1", "claims", "nets", "cpu_nets"])
def test_what_begins_with_another_run_waits_for_it(place, script):
    assert place.run(script, "--budget", "mini", "--seeds", "0 1", tiny="", JOBS=3).code == 0
    left, started = [], 0
    for argv in place.commands():
        begins = (
            argv[1] if argv[0] == "convert.py" else argv[argv.index("--init_from") + 1] if "--init_from" in argv else ""
        )
        started += bool(begins)
        assert begins.removesuffix("/best.pth.tar") in ["", *left]
        left += [argv[argv.index(flag) + 1] for flag in ("--run_dir", "--out") if flag in argv]
    assert started >= 2


def test_what_a_worker_could_not_do_is_said_and_no_page_is_made(place):
    (place.folder / "venv" / "bin" / "python").write_text(f"#!/bin/sh\necho $1 >> {place.log}\nexit 2\n")
    outcome = place.run("table5", "--budget", "mini", JOBS=2)
    assert (outcome.code, place.log.read_text()) == (2, "train.py\ntrain.py\n")
    assert {line[2:] for line in outcome.err} == {" stopped at bntt, seed 0", " stopped at ln, seed 0"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_workers_that_are_stopped_leave_nothing_running(place, number):
    (place.folder / "venv" / "bin" / "python").write_text("#!/bin/sh\necho began\nsleep 60\necho ended\n")
    environment = os.environ | {"VENV": str(place.folder / "venv"), "RESULTS": str(place.results), "JOBS": "2"}
    command = ["bash", ROOT / "scripts" / "digits.sh"]
    heard = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731 (not so below nohup)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=heard) as script:
        seen = [script.stdout.readline() for _ in range(2)]
        script.send_signal(number)
        assert script.stdout.read() == ""  # nobody is left who could write
    assert (sorted(seen), script.returncode) == (["1: began\n", "2: began\n"], 128 + signal.SIGTERM)


def test_a_conversion_without_its_ann_is_one_sentence(place):
    image_tree(place.folder / "data")
    outcome = place.run("table1", "--budget", "mini", "--rows", "cifar10_conversion")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert "cifar10jpeg_mini_vgg9_ann/seed0/best.pth.tar: No such file" in outcome.err[0]


@pytest.mark.parametrize("script", ["recipes", "rates", "claims", "cpu_nets", "nets"])
def test_each_row_of_a_study_is_its_own_command(script, place):
    assert place.run(script, "--seeds", "1", tiny="").code == 0
    *trained, last = place.commands()
    assert last[0] in ("scripts/make_tables.py", "scripts/make_claims.py")
    named = next(line for line in place.run(script, "--help").out if "--rows ROW" in line).split("of: ")[1].split()
    flags = [flags_of(" ".join(argv), script) for argv in trained]
    folders = [(found.get("run_dir") or found["out"]).split("/")[-2] for found in flags]
    assert [re.sub("cifar10_(cpu_)?vgg9_", "", name) for name in folders] == named
    assert len({plain(" ".join(argv)) for argv in trained}) == len(named)


def test_robustness_measures_the_nets_that_are_there_and_not_again(place):
    (place.results / "claims" / "robustness" / "bntt_T4").mkdir(parents=True)
    (place.results / "claims" / "robustness" / "bntt_T4" / "analysis.json").write_text("{}")
    ann = place.results / "cifar10_vgg9_ann" / "seed0" / "best.pth.tar"
    ann.parent.mkdir(parents=True)
    ann.write_text("weights")
    for seed in (1, 2):
        base = place.results / "claims" / "base" / f"seed{seed}" / "best.pth.tar"
        base.parent.mkdir(parents=True)
        base.write_text("weights")
    assert place.run("robustness", tiny="").code == 0
    measured = [argv[1].split("/")[-2] for argv in place.commands() if argv[0] == "analysis.py"]
    shipped = ["bntt_T25"] if (ROOT / "weights" / "cifar10_vgg9_T25.pth").exists() else []
    assert measured == [*shipped, "ann", "base_16"]
    assert not list(place.results.glob("claims/robustness/*/*.pth"))
    assert place.run("robustness", "--budget", "mini").code == 2
