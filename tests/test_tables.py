"""scripts/make_tables.py writes what the runs and results/paper.csv say, and the README's table is what it writes."""

import csv
import json

import make_tables
import pytest
import yaml
from conftest import ROOT, call

RESULT = {"dataset": "cifar10", "arch": "vgg9", "norm": "bntt", "num_steps": 25, "seed": 0}
RESULT |= {"test_acc": 90.0, "count": 10_000, "epoch": 8, "train_images": 1024}
EXIT = {"gamma_threshold": 0.1, "exit_step": 20, "num_steps": 25, "acc_exit": 89.0, "count": 10_000}
COMMAND = "train.py --dataset cifar10 --arch vgg9 --num_steps 25"
PAPER_ROWS = list(csv.DictReader((ROOT / "results" / "paper.csv").read_text(encoding="utf-8").splitlines()))
MARKERS = "above\n\n<!-- results: written by scripts/make_tables.py -->\nstale\n<!-- end -->\n\nbelow\n"
HEAD = "table,row,T,accuracy,source,exit_T,exit_accuracy,exit_source,runs,command\n"
PAPER = f"1,title,25,90.5,paper,20,90.3,quoted,run,python {COMMAND}\n"


class Place:
    """A folder with a README of one table, and results/ with a paper.csv."""

    def __init__(self, folder):
        self.results, self.readme = folder / "results", folder / "README.md"
        self.results.mkdir()
        self.readme.write_text(MARKERS)
        self.paper(PAPER)

    def paper(self, lines, head=HEAD):
        (self.results / "paper.csv").write_text(head + lines)

    def run(self, name="run", seed=0, early_exit=None, command=COMMAND, config=None, **changes):
        folder = self.results / name / f"seed{seed}"
        folder.mkdir(parents=True)
        flags = make_tables.flags_of(command, folder) | {"seed": seed} | (config or {})
        result = RESULT | {k: flags[k] for k in ("dataset", "arch", "norm", "num_steps")} | {"seed": seed} | changes
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "config.yaml").write_text(yaml.safe_dump(flags))
        (folder / "environment.json").write_text(json.dumps({"command": f"{command} --seed {seed}"}))
        if early_exit is not None:
            (folder / "early_exit.json").write_text(json.dumps(EXIT | early_exit))
        return folder

    def call(self, *flags):
        return call(make_tables.main, "--readme", self.readme, "--results", self.results, *flags)

    def cells(self):
        """The cells of the README's first row."""
        outcome = self.call()
        assert outcome.code == 0, outcome.err
        lines = [line for line in self.readme.read_text().splitlines() if line.startswith("|")]
        return [cell.strip() for cell in lines[2].strip("|").split("|")]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_the_readme_and_the_page_of_results_are_up_to_date():
    outcome = call(make_tables.main, "--check")
    assert outcome.code == 0, outcome.out or outcome.err


def test_the_command_of_a_run_that_was_extended_is_the_last_one(place):
    folder = place.run(config={"num_epochs": 200})
    environment = {"command": COMMAND, "resumed": [{"command": f"{COMMAND} --num_epochs 200"}]}
    (folder / "environment.json").write_text(json.dumps(environment))
    place.cells()
    assert f"python {COMMAND} --num_epochs 200\n" in (place.results / "README.md").read_text()


def test_the_page_of_results_has_every_line_of_the_paper_and_every_kept_run():
    page = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    for row in PAPER_ROWS:
        assert f"| {row['row']} (table {row['table']}) |" in page
    for result in (ROOT / "results").glob("*/seed*/result.json"):
        assert f"\n| {result.parts[-3]} |" in page


def test_the_readme_has_the_paper_s_rows_with_bntt_in_five_columns():
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- results: ")[1].split("<!-- end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {5}
    assert [row[0] for row in rows[2:]] == [
        f"{r['row']} (table {r['table']})" for r in PAPER_ROWS if r["command"] and "BNTT" in r["row"]
    ]


def test_a_row_of_another_norm_stands_on_the_page_of_results_alone(place):
    place.paper(PAPER + PAPER.replace("title", "other").replace("--arch", "--norm none --arch"))
    assert place.call().code == 0
    assert "| other (table 1) |" not in place.readme.read_text()
    assert "| other (table 1) |" in (place.results / "README.md").read_text()


def test_the_commands_of_the_paper_s_rows_are_theirs():
    for row in PAPER_ROWS:
        assert bool(row["runs"] or row["another_recipe"]) == bool(row["command"])
        if row["command"]:
            flags = {"norm": "none", "dataset": "cifar10"} | make_tables.flags_of(row["command"], row["row"])
            norm = [name for word, name in (("BNTT", "bntt"), ("LayerNorm", "ln"), ("", "none")) if word in row["row"]][
                0
            ]
            assert (str(flags["num_steps"]), flags["norm"]) == (row["T"] or "25", norm)
            assert (
                row["row"]
                .lower()
                .replace("-", "")
                .startswith(flags["dataset"].replace("_", "").replace("smnist", "seq"))
            )


def test_a_row_that_was_not_run(place):
    command = f"`python {COMMAND}`"
    assert place.cells() == ["title (table 1)", "25", "90.5 (paper)<br>exit at 20: 90.3 (quoted)", "-", command]


def test_mean_deviation_and_n_over_seeds(place):
    for seed, accuracy in enumerate([90.0, 91.0, 93.0]):
        place.run(seed=seed, test_acc=accuracy)
    assert place.cells()[3] == "[91.33 ± 1.53](results/run) (n = 3)"  # sqrt((1.33^2 + 0.33^2 + 1.67^2) / 2)


def rows_of(place, head):
    """Cells of the rows of a table of the page of results, by its first head."""
    assert place.call().code == 0
    page = (place.results / "README.md").read_text()
    lines = page.split(f"| {head} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_bntt_and_another_are_compared_by_the_runs_of_one_seed(place):
    for seed, ours, theirs in ((0, 90.0, 80.0), (1, 91.0, 82.0), (2, 93.0, 85.0), (3, 50.0, None)):
        place.run(seed=seed, test_acc=ours)
        trained = {"train_acc": 70.0 + seed}
        if theirs:
            rival = place.run("rival", seed, command=f"{COMMAND} --norm bn", test_acc=theirs)
            (rival / "log.jsonl").write_text(json.dumps({"epoch": 8, "train_acc": 72.0}))
        (place.results / "run" / f"seed{seed}" / "log.jsonl").write_text(json.dumps({"epoch": 8, **trained}))
    # differences 10, 9, 8: deviation 1, and t of 2 degrees of freedom is 4.303
    cells = ["[run](run)", "[rival](rival)", "+9.00", "+6.52 to +11.48", "3", "better", "-1.00"]
    assert rows_of(place, "BNTT") == [cells]


def test_an_interval_around_zero_and_one_seed_do_not_say_which_is_better(place):
    for seed, ours, theirs in ((0, 90.0, 91.0), (1, 91.0, 89.0)):
        place.run(seed=seed, test_acc=ours)
        place.run("close", seed, command=f"{COMMAND} --norm bn", test_acc=theirs)
    place.run("single", 0, command=f"{COMMAND} --norm none", test_acc=10.0)
    assert [row[2:] for row in rows_of(place, "BNTT")] == [
        ["+0.50", "-18.56 to +19.56", "2", "-", "-"],
        ["+80.00", "-", "1", "-", "-"],
    ]


OTHERS = [
    "--num_steps 10",
    "--limit_train 500",
    "--num_epochs 3",
    "--loss tet",
    "--leak_mem 0.5",
    "--norm bntt --lr 0.2",
]


@pytest.mark.parametrize("flags", OTHERS)
def test_runs_of_another_protocol_and_of_bntt_itself_are_not_compared(place, flags):
    place.run()
    place.run("other", command=f"{COMMAND} --norm bn {flags}")
    assert rows_of(place, "BNTT") == []


METHODS = ["--neuron plif", "--norm none --lr 0.2", "--spike_order fire_first", "--norm bn --num_workers 0"]
METHODS += ["--norm bn --precise_bn 50"]


@pytest.mark.parametrize("flags", METHODS)
def test_another_norm_neuron_or_order_is_another_method_with_a_learning_rate_of_its_own(place, flags):
    place.run()
    place.run("other", command=f"{COMMAND} {flags}")
    assert [row[:2] for row in rows_of(place, "BNTT")] == [["[run](run)", "[other](other)"]]


def test_a_converted_net_is_set_beside_its_ann(place):
    place.run(ann_acc=91.0, difference=-1.0, half_interval=0.25, count=5000)
    assert place.cells()[3].endswith("<br>minus its ANN (5,000): -1.00 (-1.25 to -0.75)")


@pytest.mark.parametrize("changes", [{"difference": None}, {"half_interval": "much"}])
def test_a_difference_that_is_no_number_is_refused(place, changes):
    place.run(**{"difference": -1.0, "half_interval": 0.25} | changes)
    outcome = place.call()
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert f"{next(iter(changes))} cannot be" in outcome.err[0]


def test_conversions_of_which_one_is_without_its_ann_are_not_set_beside_it(place):
    place.run(difference=-1.0, half_interval=0.25)
    place.run(seed=1)
    assert "minus" not in place.cells()[3]


@pytest.mark.parametrize("out", ["--out 'my runs/seed1'", "--out=r/seed1", "--out r/seed1"])
def test_the_folder_of_a_conversion_is_no_part_of_its_command(out):
    command = make_tables.plain(f"convert.py results/ann/seed1/best.pth.tar {out} --num_steps 9 --seed 1")
    assert command == "python convert.py results/ann/seed0/best.pth.tar --out runs/converted --num_steps 9"


def test_bntt_with_averaged_statistics_is_not_compared_with_stored_ones(place):
    place.run(command=f"{COMMAND} --precise_bn 50")
    place.run("stored", command=f"{COMMAND} --norm bn")
    for name, flags in (("averaged", "--norm bn --precise_bn 50"), ("none", "--norm none")):
        place.run(name, command=f"{COMMAND} {flags}")
    assert {row[1] for row in rows_of(place, "BNTT")} == {"[averaged](averaged)", "[none](none)"}


@pytest.mark.parametrize("bntt_too", [True, False])
def test_a_hybrid_start_is_compared_with_training_from_scratch(place, bntt_too):
    for seed, hybrid, scratch in ((0, 60.0, 50.0), (1, 62.0, 51.0)):  # a difference of 10.5, deviation sqrt(0.5)
        if bntt_too:
            place.run("cifar10_mini_vgg9", seed)
        for name, accuracy in (("hybrid", hybrid), ("hybrid_scratch", scratch)):
            command = f"{COMMAND} --norm none --neuron learnt_lif"
            place.run(f"cifar10_mini_vgg9_{name}", seed, command=command, test_acc=accuracy)
    assert place.call().code == 0
    told = "that net from scratch, on as many images: +10.50 (+4.15 to +16.85, n = 2)."
    assert told in " ".join((place.results / "README.md").read_text().split())


def test_few_images_have_the_interval_of_wilson(place):
    # Brown, Cai & DasGupta (2001): 96 of 100 by (x + z^2/2)/(n + z^2) -+ z sqrt(n)/(n + z^2) sqrt(pq + z^2/(4n))
    place.run(test_acc=96.0, count=100)
    assert place.cells()[3] == "[96.00](results/run) (n = 1)<br>100 images: 90.2 to 98.4"


@pytest.mark.parametrize(("percent", "low", "high"), [(0.0, 0.0, 27.75), (50.0, 23.66, 76.34), (100.0, 72.25, 100.0)])
def test_the_interval_of_wilson_of_ten_images(percent, low, high):
    assert make_tables.wilson(percent, 10) == pytest.approx((low, high), abs=0.01)


def test_the_early_exit(place):
    place.run(early_exit={})
    assert place.cells()[3] == "[90.00](results/run) (n = 1)<br>exit at 20: 89.00"
    place.run(seed=1, early_exit={"exit_step": 21, "acc_exit": 88.0})
    place.run(seed=2)
    assert place.cells()[3].endswith("<br>exit at 20.5 ± 0.7071: 88.50 ± 0.71 (n = 2)")


def test_an_exit_at_t_is_none_and_another_threshold_is_named(place):
    place.run(early_exit={"exit_step": 25, "gamma_threshold": 0.2})
    assert place.cells()[3].endswith("<br>no exit before 25 (gamma threshold 0.2)")


def test_spikes_of_an_image_are_those_logged_for_the_epoch_of_the_result(place):
    folder = place.run()
    log = '{"epoch": 7, "spikes_per_image": 3.0}\n{"epoch": 8, "spikes_per_image": 12.5}\n'
    (folder / "log.jsonl").write_text(log)
    assert make_tables.read_run(folder)["spikes"] == 12.5
    (folder / "log.jsonl").write_text(log.splitlines()[0])
    assert make_tables.read_run(folder)["spikes"] is None


@pytest.mark.parametrize(
    ("line", "cell"),
    [
        (PAPER, "90.5 (paper)<br>exit at 20: 90.3 (quoted)"),
        ("1,title,25,90.5,quoted,,,,run,", "90.5 (quoted)"),
        ("1,title,25,90.5,memory,20,90.3,memory,run,", "90.5 (memory)<br>exit at 20: 90.3 (memory)"),
        ("1,title,25,,unknown,,,,run,", "unknown"),
        ("1,title,,does not converge,paper,,,,run,", "does not converge (paper)"),
    ],
)
def test_the_source_stands_beside_every_value_of_the_paper(place, line, cell):
    place.paper(line)
    assert place.call().code == 0
    assert f"| {cell} | - |" in (place.results / "README.md").read_text()


def test_a_value_without_a_source_is_refused(place):
    for line in (PAPER.replace("paper", ""), PAPER.replace("quoted", ""), PAPER.replace("90.5", "")):
        place.paper(line)
        assert "each value needs a source" in place.call().err[0]


def test_runs_of_the_row_by_another_recipe_are_told_apart_from_it(place):
    place.run("other", command=f"{COMMAND} --lr 0.01", test_acc=80.25)
    place.paper(PAPER.replace("run,", "run,other,"), HEAD.replace("runs,", "runs,another_recipe,"))
    assert place.cells()[3] == "another recipe: [80.25](results/other) (n = 1)"
    place.run(test_acc=90.0)
    assert place.cells()[3].endswith("(n = 1)<br>another recipe: [80.25](results/other) (n = 1)")


def test_runs_of_another_net_are_no_recipe_of_the_row(place):
    place.run("other", command=COMMAND.replace("25", "30"))
    place.paper(PAPER.replace("run,", "run,other,"), HEAD.replace("runs,", "runs,another_recipe,"))
    assert "num_steps is 30" in place.call().err[0]


def test_the_sentence_of_a_table_says_against_whom_its_order_holds(place):
    accuracies = {"": (60.0, 61.0), "_bn": (50.0, 51.1), "_tdbn": (62.0, 63.1), "_tebn": (59.0, 62.0)}
    for name, pair in accuracies.items():
        log = json.dumps({"epoch": 8, "train_acc": {"_bn": 70.0}.get(name, 60.0)})
        for seed, accuracy in enumerate(pair):
            norm = f"--norm {name[1:] or 'bntt'}"
            folder = place.run(f"cifar10_mini_vgg9{name}", seed, command=f"{COMMAND} {norm}", test_acc=accuracy)
            (folder / "log.jsonl").write_text(log)
    assert place.call().code == 0
    paragraphs = (place.results / "README.md").read_text().split("\n\n")
    (line,) = (" ".join(text.split()) for text in paragraphs if text.startswith("Table 4, CIFAR-10, BNTT ahead"))
    assert line == (
        "Table 4, CIFAR-10, BNTT ahead: "
        "BNTT minus bn +9.95 (+9.31 to +10.59, n = 2), tdbn -2.05 (-2.69 to -1.41, n = 2), "
        "tebn +0.00 (-12.71 to +12.71, n = 2): it holds in tests alone, as BNTT is behind in training, against bn; "
        "it does not against tdbn; it cannot be told against tebn."
    )


def test_a_run_of_something_else_than_its_row_is_refused(place):
    place.run(command=COMMAND.replace("25", "30"))
    outcome = place.call()
    assert (outcome.code, "num_steps is 30" in outcome.err[0]) == (2, True)


def test_a_run_whose_command_would_now_train_something_else_is_refused(place):
    place.run(config={"leak_mem": 0.5})
    assert "leak_mem is 0.5 in config.yaml" in place.call().err[0]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("result.json", "{", "Expecting property name"),
        ("result.json", "[" * 100_000, "maximum recursion depth"),
        ("result.json", "[]", "result.json: dataset cannot be None"),
        ("result.json", json.dumps(RESULT | {"test_acc": None}), "test_acc cannot be None"),
        ("result.json", json.dumps(RESULT | {"test_acc": float("nan")}), "it says NaN where a number is due"),
        ("result.json", json.dumps(RESULT | {"count": 1.5}), "count cannot be 1.5"),
        ("result.json", json.dumps(RESULT | {"seed": 1}), "seed is 1 in result.json and 0 in config.yaml"),
        ("log.jsonl", '{"epoch": 2, "train_loss": 1.0}', "log.jsonl must have a line for each epoch of the run once"),
        ("log.jsonl", "[1]", "log.jsonl"),
        ("config.yaml", "a: [", "while parsing"),
        ("config.yaml", "- a\n", "config.yaml: dataset cannot be None"),
        ("environment.json", "{}", "environment.json: command cannot be None"),
        ("environment.json", '{"command": "test.py"}', "the command must be one of train.py"),
        ("early_exit.json", "{}", "early_exit.json: num_steps cannot be None"),
        (
            "early_exit.json",
            json.dumps(EXIT | {"count": 10}),
            "count is 10000 in result.json and 10 in early_exit.json",
        ),
    ],
)
def test_damage_is_one_sentence_and_changes_nothing(place, file, text, message):
    (place.run() / file).write_text(text)
    outcome = place.call()
    assert (outcome.code, outcome.out, len(outcome.err)) == (2, [], 1)
    assert message in outcome.err[0]
    assert place.readme.read_text() == MARKERS


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"command": f"{COMMAND} --lr 0.1"}, "command is python"),
        ({"config": {"amp": "bf16"}}, "amp is off in seed 0 and bf16 in seed 1"),
        ({"train_images": 64}, "train_images is 1024 in seed 0 and 64 in seed 1"),
    ],
)
def test_runs_of_one_folder_may_differ_in_their_seeds_alone(place, second, message):
    command = f"{COMMAND} --amp auto"
    place.run(command=command, config={"amp": "off"})
    place.run(**({"seed": 1, "command": command, "config": {"amp": "off"}} | second))
    outcome = place.call()
    assert outcome.code == 2
    assert message in outcome.err[0]


def test_seeds_on_other_machines_share_a_row(place):
    place.run(command=f"{COMMAND} --num_workers=0 --run_dir 'a b'")
    place.run(seed=1, command=f"{COMMAND} --device cpu --resume --data_on_device")
    assert place.cells()[3:] == ["[90.00 ± 0.00](results/run) (n = 2)", f"`python {COMMAND}`"]


def test_a_short_run_does_not_stand_beside_the_paper(place):
    place.run(command=f"{COMMAND} --limit_train 1024")
    assert "limit_train is 1024 in config.yaml and None in the row 'title'" in place.call().err[0]


def test_precise_statistics_are_named(place):
    place.run(command=f"{COMMAND} --precise_bn 50")
    assert place.cells()[3] == "[90.00](results/run) (n = 1, `--precise_bn 50`)"


def test_what_is_no_run_does_no_harm(place):
    place.run()
    for name in ("run/seed1", "run/seed0_old", "engines"):
        (place.results / name).mkdir()
    for name in ("run/seed0_old/result.json", "engines/result.json", "run/seed2"):
        (place.results / name).write_text("{")
    assert place.cells()[3] == "[90.00](results/run) (n = 1)"


@pytest.mark.parametrize("text", ["nothing", MARKERS * 2, MARKERS.replace("<!-- end -->", "")])
def test_markers_that_are_not_there_once(place, text):
    place.readme.write_text(text)
    assert place.call().code == 2
    assert place.readme.read_text() == text


def test_check_finds_what_is_stale_and_writing_twice_changes_nothing(place):
    folder = place.run()
    assert place.call("--check").code == 1
    assert place.readme.read_text() == MARKERS
    assert place.call().code == 0
    written = place.readme.read_text()
    assert written.startswith("above\n\n<!-- results")
    assert written.endswith("\n<!-- end -->\n\nbelow\n")
    assert place.call("--check").code == 0
    place.readme.write_text(written.replace("90.00", "91.00"))  # typed by hand
    assert place.call("--check").code == 1
    place.readme.write_text(written)
    (folder / "result.json").write_text(json.dumps(RESULT | {"test_acc": 12.0}))
    assert place.call("--check").code == 1


# ---- Recipes -------------------------------------------------------------------------------------


def recipe(place, name, val_acc, *flags):
    folder = place.run(name, command=" ".join([COMMAND, "--val_fraction 0.02", *flags]))
    line = {"epoch": 8, "train_acc": val_acc + 1, "val_acc": val_acc}
    (folder / "log.jsonl").write_text(json.dumps({k: v for k, v in line.items() if v is not None}) + "\n")


def test_the_page_of_recipes_is_up_to_date():
    outcome = call(make_tables.main, "--results", ROOT / "results" / "recipes", "--held_out", "--check")
    assert outcome.code == 0, outcome.out or outcome.err


def test_recipes_stand_by_their_accuracy_on_images_held_out(place):
    recipe(place, "base", 51.0)
    recipe(place, "faster", 53.5, "--lr 0.5")
    assert call(make_tables.main, "--results", place.results, "--held_out").code == 0
    page = (place.results / "README.md").read_text()
    rows = [line.split(" | ")[:4] for line in page.splitlines() if line.startswith("| ")][2:]
    assert rows == [["| faster", "[53.50](faster)", "1", "54.50"], ["| base", "[51.00](base)", "1", "52.00"]]
    assert "Held out: 0.02 of the training images" in page


def test_a_recipe_that_held_no_images_out_is_refused(place):
    recipe(place, "base", 51.0)
    place.run("without")
    outcome = call(make_tables.main, "--results", place.results, "--held_out")
    assert (outcome.code, (place.results / "README.md").exists()) == (2, False)
    assert "without: its runs held no images out" in outcome.err[-1]
