"""scripts/make_tables.py says what the runs say, and the README's tables are what it writes."""

import importlib.util
import json
import statistics
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, call

import train

path = ROOT / "scripts" / "make_tables.py"
spec = importlib.util.spec_from_file_location("make_tables", path)
make_tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_tables)
Row, Table = make_tables.Row, make_tables.Table

RESULT = {
    "dataset": "cifar10", "arch": "vgg9", "norm": "bntt", "num_steps": 25, "seed": 0, "test_acc": 90.0, "count": 100,
    "epoch": 8, "train_images": 1024,
}  # fmt: skip
EXIT = {"gamma_threshold": 0.1, "exit_step": 20, "num_steps": 25, "acc_exit": 89.0, "count": 100}
PAPER = Row("paper", 25, 90.5, "P", "run", "how", exit=(20, 90.3, "S"), settings="cifar10 vgg9 bntt")
MARKERS = "above\n\n<!-- results: written by scripts/make_tables.py -->\nstale\n<!-- end -->\n\nbelow\n"


def write_run(folder, early_exit=None, config=None, **changes):
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(RESULT | changes))
    if early_exit is not None:
        (folder / "early_exit.json").write_text(json.dumps(EXIT | early_exit))
    if config:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))


class Place:
    """A folder with results/ and a README of one table; `table(*rows)` is what the script writes there."""

    def __init__(self, folder, monkeypatch):
        self.results, self.readme, self.monkeypatch = folder / "results", folder / "README.md", monkeypatch
        self.results.mkdir()
        self.readme.write_text(MARKERS)

    def call(self, *rows, flags="", all_rows=False):
        self.monkeypatch.setattr(make_tables, "TABLES", {"results": Table(make_tables.MAIN, [*rows], all_rows)})
        return call(make_tables.main, "--readme", self.readme, "--results", self.results, flags)

    def table(self, *rows, **options):
        """(cells of each row, footnotes)"""
        outcome = self.call(*rows, **options)
        assert outcome.code == 0, outcome.err
        lines = self.readme.read_text().splitlines()
        cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        return cells[2:], [line for line in lines if line.startswith("[^")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    return Place(tmp_path, monkeypatch)


def test_the_readme_is_up_to_date():
    outcome = call(make_tables.main, "--check")
    assert outcome.code == 0, outcome.out or outcome.err


# ---- Numbers -------------------------------------------------------------------------------------


def test_mean_deviation_and_n_over_seeds(place):
    for seed, accuracy in enumerate([90.0, 91.0, 93.0]):
        write_run(place.results / "run" / f"seed{seed}", seed=seed, test_acc=accuracy)
    ((title, T, paper, here, data, how),), _ = place.table(PAPER)
    assert (title, T, how) == ("paper", "25", "`how`")
    assert here == "[91.33 ± 1.53](results/run)"  # deviation: sqrt((1.33^2 + 0.33^2 + 1.67^2) / 2)
    assert data == "1,024 / 100, epoch 8, n = 3"


@pytest.mark.parametrize("folder", ["run", "run/seed0"])
def test_one_run_has_no_deviation(place, folder):
    write_run(place.results / folder)
    ((_, _, _, here, data, _),), _ = place.table(PAPER)
    assert here == f"[90.00](results/{folder})"
    assert data.endswith("n = 1")


def test_wilson_interval_by_hand(place):
    # p = 0.9, n = 100: centre 0.919208 / 1.038416 = 0.88520, half 1.96 * sqrt(0.00099604) / 1.038416 = 0.05957
    assert make_tables.wilson(90, 100) == pytest.approx((82.563, 94.477), abs=2e-3)
    assert make_tables.wilson(100, 100) == pytest.approx((96.301, 100), abs=2e-3)  # 1 / 1.038416
    assert make_tables.wilson(0, 100)[0] == pytest.approx(0, abs=1e-12)
    write_run(place.results / "run")
    ((_, _, _, here, _, _),), footnotes = place.table(PAPER._replace(wilson=True))
    assert here == "[90.00](results/run) (82.56 to 94.48) [^w]"
    assert any(note.startswith("[^w]: ") for note in footnotes)


def test_the_early_exit(place):
    write_run(place.results / "run" / "seed0", {})
    ((_, _, paper, here, _, _),), _ = place.table(PAPER)
    assert paper == "90.5<br>exit at 20: 90.3 [^s]"
    assert here == "[90.00](results/run/seed0)<br>exit at 20: 89.00"
    write_run(place.results / "run" / "seed1", {"exit_step": 21, "acc_exit": 88.0}, seed=1)
    assert place.table(PAPER)[0][0][3].endswith("<br>exit at 20 to 21: 88.50 ± 0.71")
    write_run(place.results / "run" / "seed2", seed=2)
    assert place.table(PAPER)[0][0][3].endswith("± 0.71 (n = 2)")


def test_an_exit_at_t_is_none_and_another_threshold_is_named(place):
    write_run(place.results / "run", {"exit_step": 25, "gamma_threshold": 0.2})
    assert place.table(PAPER)[0][0][3].endswith("<br>no exit before 25 (gamma threshold 0.2)")


def test_spikes_of_an_image_are_those_logged_for_the_epoch_of_the_result(tmp_path):
    write_run(tmp_path / "run", dataset="digits", num_steps=3)
    log = tmp_path / "run" / "log.jsonl"
    log.write_text('{"epoch": 7, "spikes_per_image": 3.0}\n{"epoch": 8, "spikes_per_image": 12.5}\n')
    assert make_tables.spikes_per_image(make_tables.read_run(tmp_path / "run")) == 12.5
    log.write_text('{"epoch": 7, "spikes_per_image": 3.0}\n')
    assert make_tables.spikes_per_image(make_tables.read_run(tmp_path / "run")) is None


def test_the_digits_table(place):
    for seed, spikes in enumerate([9000.0, 11000.0]):
        folder = place.results / "digits_vgg9_bntt" / f"seed{seed}"
        write_run(folder, {}, dataset="digits", seed=seed, test_acc=98.0 + seed)
        (folder / "log.jsonl").write_text(json.dumps({"epoch": 8, "spikes_per_image": spikes}))
    write_run(place.results / "digits_vgg9_bn" / "seed0", dataset="digits", norm="bn")
    results = place.results.resolve()
    lines = make_tables.render(make_tables.TABLES["digits"], results, make_tables.Page(results.parent)).splitlines()
    spikes = f"10,000 ± {statistics.stdev([9000, 11000]):,.0f}"
    assert lines[2] == f"| BNTT | [98.50 ± 0.71](results/digits_vgg9_bntt) | 98.00, 99.00 | 2 | 25 | 20 | {spikes} |"
    assert lines[3].startswith("| one BN for all steps | [90.00](results/digits_vgg9_bn/seed0) | 90.00 | 1 | 25 | – |")
    assert lines[4].startswith("| no BN | not yet run |")


# ---- Rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paper", "mark", "cell", "notes"),
    [
        (90.5, "P", "90.5", []),
        (90.5, "S", "90.5 [^s]", ["[^s]: As quoted by another publication"]),
        (90.5, "M", "90.5 [^m]", ["[^m]: From memory of the literature, unverified"]),
        (None, "?", "unknown", []),
    ],
)
def test_marks_of_rows_not_yet_run(place, paper, mark, cell, notes):
    (cells,), footnotes = place.table(Row("title", 25, paper, mark, "run", "how"))
    assert cells == ["title", "25", cell, "not yet run", "", "`how`"]
    footnotes = [note for note in footnotes if not note.startswith("[^d]")]
    assert [note[: len(want)] for note, want in zip(footnotes, notes, strict=True)] == notes


def test_a_row_that_the_paper_lacks_appears_once_it_has_been_run(place):
    row = Row("title", 25, None, "", "run", "how", "a note")
    assert place.table(row)[0] == []
    assert place.table(row, all_rows=True)[0][0][3] == "not yet run"
    write_run(place.results / "run")
    (cells,), footnotes = place.table(row)
    assert cells[:3] == ["title [^1]", "25", "–"]
    assert footnotes[-1] == "[^1]: a note"


def test_each_folder_of_a_pattern_is_a_row_and_a_footnote_is_written_once(place):
    row = Row("copy, {norm}", None, None, "", "copy_*", "", "a note", settings="* vgg9 *")
    write_run(place.results / "copy_b", num_steps=5, norm="none", config={"lr": 0.1})
    write_run(place.results / "copy_a" / "seed0", num_steps=25, dataset="imagefolder")
    (place.results / "copy_notes.txt").write_text("")
    (place.results / "copy_empty" / "seed0").mkdir(parents=True)
    rows, footnotes = place.table(row)
    assert [cells[:2] for cells in rows] == [["copy, no BN [^1]", "5"], ["copy, BNTT [^1]", "25"]]
    assert sum(note.startswith("[^1]") for note in footnotes) == 1


def test_the_command_is_the_one_that_was_run_without_what_changes_no_number(place):
    write_run(place.results / "run" / "seed0")
    command = "train.py --config c.yaml --data_dir data/x --run_dir results/run/seed0 --resume --lr 0.1 --seed 0"
    (place.results / "run" / "seed0" / "environment.json").write_text(json.dumps({"command": command}))
    assert place.table(PAPER)[0][0][5] == "`python train.py --config c.yaml --lr 0.1`"


def test_extra_files_do_no_harm(place):
    write_run(place.results / "run" / "seed0")
    write_run(place.results / "run" / "seed0_old", test_acc=1.0)
    (place.results / "run" / "seed1").write_text("")
    (place.results / "run" / "seed2").mkdir()
    (place.results / "run" / "notes.json").write_text("{")
    (place.results / "other").mkdir()
    (place.results / "other" / "result.json").write_text("{")
    assert place.table(PAPER)[0][0][3:5] == ["[90.00](results/run/seed0)", "1,024 / 100, epoch 8, n = 1"]


def test_a_run_of_a_config_that_has_changed_since_is_refused(place, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("leak_mem: 0.99\nlr: 0.1\n")
    write_run(place.results / "run" / "seed0", config={"leak_mem": 0.99, "lr": 0.1, "num_workers": 0, "amp": "bf16"})
    command = f"train.py --config {config} --amp auto --seed 0"
    (place.results / "run" / "seed0" / "environment.json").write_text(json.dumps({"command": command}))
    assert place.call(PAPER).code == 0
    config.write_text("leak_mem: 0.95\nlr: 0.1\n")
    outcome = place.call(PAPER)
    assert outcome.code == 2
    assert "was trained with --leak_mem 0.99, its command would now take 0.95" in outcome.err[0]


def test_precise_statistics_are_a_footnote_of_the_runs_that_had_them(place):
    write_run(place.results / "run" / "seed0", config={"precise_bn": 50})
    write_run(place.results / "other" / "seed0", config={"precise_bn": None})
    _, notes = place.table(PAPER, PAPER._replace(runs="other"))
    assert [note for note in notes if "--precise_bn" in note] == [
        "[^1]: Tested with the statistics of 50 training batches (`--precise_bn`, not in the paper)."
    ]


def test_the_commands_are_those_of_their_rows(monkeypatch):
    monkeypatch.chdir(ROOT)
    for row in (row for table in make_tables.TABLES.values() for row in table.rows if row.how):
        python, script, *flags = row.how.split()
        assert (python, script) == ("python", "train.py")
        args = train.parse_args(flags)
        assert [args.dataset, args.arch, args.norm, args.num_steps] == [*row.settings.split(), row.T], row.title


def test_the_declared_rows_have_a_mark_where_they_have_a_value():
    for table in make_tables.TABLES.values():
        for row in table.rows:
            assert (row.mark in ("P", "S", "M")) == (row.paper is not None)
            assert len(row.settings.split()) == 3
            assert row.exit is None or row.exit[2] in ("P", "S", "M")


# ---- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("result.json", "{", "result.json is damaged"),
        ("result.json", "[" * 100_000, "result.json is damaged"),
        ("result.json", "[]", "result.json holds no JSON object"),
        ("result.json", b"\xff", "result.json is damaged"),
        ("result.json", {"test_acc": None}, "result.json lacks test_acc"),
        ("result.json", {"test_acc": float("nan")}, "test_acc must be a percentage, got 'nan'"),
        ("result.json", {"test_acc": 101}, "test_acc must be a percentage, got '101'"),
        ("result.json", {"count": "many"}, "count must be an integer of at least 1, got 'many'"),
        ("result.json", {"num_steps": 30}, "is a run of T = 30, the row 'paper' wants 25"),
        ("result.json", {"norm": "none"}, "is a run of cifar10 vgg9 none, the row 'paper' wants cifar10 vgg9 bntt"),
        ("result.json", {"seed": 0}, "holds two runs of one seed"),
        ("result.json", {"train_images": 64}, "train_images is 64 in one and 1024 in the other"),
        ("config.yaml", "a: [", "config.yaml is damaged"),
        ("config.yaml", "- a\n", "config.yaml holds no list of flags"),
        ("early_exit.json", "{}", "early_exit.json lacks exit_step"),
        ("early_exit.json", json.dumps(EXIT | {"count": 10}), "is not of the run beside it: its count is 10, not 100"),
    ],
)
def test_damage_is_one_sentence_and_changes_nothing(place, file, text, message):
    write_run(place.results / "run" / "seed0")
    write_run(place.results / "run" / "seed1", seed=1)
    if isinstance(text, dict):
        text = json.dumps({k: v for k, v in (RESULT | {"seed": 1} | text).items() if v is not None})
    target = place.results / "run" / "seed1" / file
    target.write_bytes(text if isinstance(text, bytes) else text.encode())
    outcome = place.call(PAPER)
    assert (outcome.code, outcome.out, len(outcome.err)) == (2, [], 1)
    assert message in outcome.err[0]
    assert place.readme.read_text() == MARKERS


def test_runs_of_different_settings_do_not_share_a_row(place):
    for seed, lr in enumerate([0.1, 0.1, 0.3]):
        write_run(
            place.results / "run" / f"seed{seed}", seed=seed, config={"lr": lr, "seed": seed, "device": str(seed)}
        )
        outcome = place.call(PAPER)
        assert outcome.code == (2 if seed == 2 else 0)
    assert outcome.err[0].endswith("cannot share a row: lr is 0.3 in one and 0.1 in the other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "has it 0 times"),
        (MARKERS * 2, "has it 2 times"),
        (MARKERS.replace("<!-- end -->", ""), "has no <!-- end -->"),
        (MARKERS.replace("stale", "<!-- other: written by scripts/make_tables.py -->"), "has no <!-- end -->"),
    ],
)
def test_markers_that_are_not_there_once(place, text, message):
    place.readme.write_text(text)
    outcome = place.call(PAPER)
    assert outcome.code == 2
    assert message in outcome.err[0]
    assert place.readme.read_text() == text


def test_no_readme(place):
    Path(place.readme).unlink()
    outcome = place.call(PAPER)
    assert outcome.code == 2
    assert "cannot read" in outcome.err[0]


# ---- Writing -------------------------------------------------------------------------------------


def test_check_finds_what_is_stale_and_writing_twice_changes_nothing(place):
    write_run(place.results / "run")
    stale = place.call(PAPER, flags="--check")
    assert (stale.code, stale.out) == (1, ["README.md is not up to date: run python scripts/make_tables.py"])
    assert place.readme.read_text() == MARKERS
    assert place.call(PAPER).code == 0
    written = place.readme.read_text()
    assert written.startswith("above\n\n<!-- results")
    assert written.endswith("\n<!-- end -->\n\nbelow\n")
    assert "stale" not in written
    assert place.call(PAPER, flags="--check").code == 0
    assert place.call(PAPER).code == 0
    assert place.readme.read_text() == written
    place.readme.write_text(written.replace("90.00", "91.00"))  # typed by hand
    assert place.call(PAPER, flags="--check").code == 1
    place.readme.write_text(written)
    (place.results / "run" / "result.json").write_text(json.dumps(RESULT | {"test_acc": 12.0}))
    assert place.call(PAPER, flags="--check").code == 1
