"""README.md and docs/ say what is so: links, names of files and functions, commands, Python snippets, numbers."""

import argparse
import ast
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import timeit

import pytest
import torch
import yaml
from conftest import ROOT, TINY, call

import data
import early_exit
import model
import nets
import test
import train
import utill
from runs import RUN_FILES
from utill import UserError

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md"]
OURS = (
    "benchmarks",
    "configs",
    "docs",
    "fused",
    "results",
    "scripts",
    "tests",
)  # where a path begins that is ours
SUFFIXES = (".py", ".sh", ".md", ".yaml", ".csv", ".cff", ".cpp")
IN_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page):
    """The text of a page without its fenced blocks."""
    return IN_FENCE.sub("", page.read_text(encoding="utf-8"))


def fences(page, language):
    return [text for kind, text in IN_FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def spans(page):
    """What stands between backticks, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


# ---- Links and names -----------------------------------------------------------------------------


def anchors(page):
    """The #names of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


def is_path(span):
    first, *rest = span.split("/")
    known = rest and first in OURS or span.endswith(SUFFIXES) and not rest
    return known and " " not in span and span not in RUN_FILES


@every_page
def test_files_that_are_named_exist(page):
    for span in filter(is_path, spans(page)):
        pattern = re.sub(r"<\w+>", "*", span.partition(":")[0]).rstrip("/")
        assert list(ROOT.glob(pattern)), span


def names(path):
    """What a Python file defines: functions, classes, their methods and attributes, by dotted name."""

    def of(body, prefix):
        for node in body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            flat = [leaf for target in targets if target for leaf in ast.walk(target)]
            own = [leaf.id for leaf in flat if isinstance(leaf, ast.Name)]
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own = [node.name]
                yield from of(node.body if isinstance(node, ast.ClassDef) else [], f"{prefix}{node.name}.")
            yield from (prefix + name for name in own)

    return set(of(ast.parse(path.read_text(encoding="utf-8")).body, ""))


@every_page
def test_functions_that_are_named_exist(page):
    for span in spans(page):
        if found := re.fullmatch(r"([\w/]+\.py):([\w.]+)", span):
            assert found[2] in names(ROOT / found[1]), span


def test_what_is_named_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("See `model.py:LIF.step`, `docs/`,\n`data/mnist`, `config.yaml` and `configs/*_paper.yaml`.\n")
    assert [*filter(is_path, spans(page))] == ["docs/", "configs/*_paper.yaml"]
    assert {"LIF", "LIF.step", "BN_EPS", "LIF.ORDERS", "SpikingVGG.readout"} <= names(ROOT / "model.py")
    assert not {"step", "LIF.no", "nn"} & names(ROOT / "model.py")


def test_every_equation_has_its_place():
    text = (ROOT / "docs" / "faithful.md").read_text(encoding="utf-8")
    numbers = []
    for cell in re.findall(r"^\| (\d[\d, to]*) \|", text.split("## Algorithms")[0], re.MULTILINE):
        first, *last = map(int, re.findall(r"\d+", cell))
        numbers += range(first, (last or [first])[-1] + 1)
    assert numbers == list(range(1, 17))


# ---- Commands ------------------------------------------------------------------------------------


class Parsed(BaseException):
    """Raised in place of a script's work. unknown: the flags that its parser did not know."""

    def __init__(self, unknown):
        super().__init__()
        self.unknown = unknown


def commands(page):
    """The shell commands of a page: of its bash blocks, and those between backticks."""
    blocks = "\n".join(fences(page, "bash")).replace("\\\n", " ").splitlines()
    indented = re.findall(r"^    (python .*)$", prose(page), re.MULTILINE)
    inline = [span for span in spans(page) if re.match(r"(\w+=\S+ )*(python|bash|pytest|pip) ", span)]
    return [line for line in [*blocks, *indented, *inline] if line.strip()]


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """An empty folder with our configs, where any checkpoint or config that a command names is one of `trained`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    def put(name, source):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if not (tmp_path / name).exists():
            shutil.copy(source, tmp_path / name)

    return put


def parse(script, argv, monkeypatch):
    """Run a script up to where it has read its flags; its unknown ones must be for train.py."""
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def stop(self, args=None, namespace=None):
        raise Parsed(parse_known_args(self, args, namespace)[1])

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    monkeypatch.setattr(sys, "argv", [str(script), *argv])
    with pytest.raises(Parsed) as found:
        runpy.run_path(str(script), run_name="__main__")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    if found.value.unknown:
        assert "go to train.py" in " ".join(script.read_text(encoding="utf-8").split()), found.value.unknown
        train.parse_args(found.value.unknown)


def check_python(script, argv, trained, put, monkeypatch):
    assert (ROOT / script).is_file(), script
    if script == "train.py":
        if "--config" in argv and not (config := argv[argv.index("--config") + 1]).startswith("configs/"):
            put(config, trained.dir / "config.yaml")
        train.parse_args(argv)
    elif script in ("test.py", "early_exit.py"):
        put(argv[0], trained.checkpoint)
        (test if script == "test.py" else early_exit).parse_args(argv)
    else:
        parse(ROOT / script, argv, monkeypatch)


def check(command, trained, put, monkeypatch):
    """AssertionError or UserError where a shell command is none that would run."""
    words = shlex.split(command, comments=True)
    while words and re.match(r"\w+=", words[0]):
        words.pop(0)
    program, *argv = words or [""]
    if program == "python" and argv[:2] == ["-m", "timeit"]:
        timeit.main([*argv[2:-1], "-n", "1", "-r", "1", argv[-1]])
    elif program == "python":
        check_python(argv[0], argv[1:], trained, put, monkeypatch)
    elif program == "bash":
        assert subprocess.run(["bash", "-n", ROOT / argv[0]], check=False).returncode == 0, command
    elif program == "pytest":
        assert all((ROOT / word).is_file() for word in argv if word and not word.startswith("-")), command
    elif program == "pip":
        assert argv[0] == "install", command
        assert (ROOT / argv[argv.index("-r") + 1]).is_file(), command
    else:
        assert program in ("", "git"), command


PAGE_OF_COMMANDS = """
```bash
bash a.sh
python b.py \\
    --c d   # e
```

    python f.py

By `pytest
g.py`, `--h` or `I=j bash k.sh`.
"""


def test_the_commands_of_a_page_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE_OF_COMMANDS)
    found = [shlex.split(command, comments=True) for command in commands(page)]
    expected = ["bash a.sh", "python b.py --c d", "python f.py", "pytest g.py", "I=j bash k.sh"]
    assert found == [command.split() for command in expected]


@every_page
def test_commands_are_understood(page, trained, place, monkeypatch):
    for command in commands(page):
        check(command, trained, place, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "python train.py --no_such_flag 1",
        "python train.py --config configs/none.yaml",
        "python test.py RUN/best.pth.tar --no_such_flag",
        "python scripts/none.py",
        "python scripts/make_tables.py --no_such_flag",
        "python benchmarks/compare_engines.py --no_such_flag",
        "bash scripts/none.sh",
        "pytest tests/test_none.py",
        "pip install -r none.txt",
        "make all",
    ],
)
def test_a_command_that_would_not_run_is_found(command, trained, place, monkeypatch):
    with pytest.raises((AssertionError, UserError, SystemExit)):
        check(command, trained, place, monkeypatch)


# ---- Python snippets ------------------------------------------------------------------------------


@pytest.fixture
def variables(place, tmp_path):
    """What the snippets take as given: images. The tables are as they were afterwards."""
    tables = (nets.NEURONS, nets.NORMS, utill.LOSSES, model.ARCHS, data.DATASETS)
    before = [dict(table) for table in tables]
    (tmp_path / "results").symlink_to(ROOT / "results")
    draw = torch.Generator().manual_seed(0)
    given = {"images": torch.rand(2, 3, 32, 32, generator=draw)}
    for part, count in (("train", 32), ("test", 8)):
        given[f"{part}_images"] = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=draw)
        given[f"{part}_labels"] = torch.arange(count) % 2
    yield given
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


def run_snippets(page, variables):
    for text in fences(page, "python"):
        exec(compile(text, page.name, "exec"), variables)


@pytest.mark.parametrize("page", [p for p in PAGES if fences(p, "python")], ids=lambda page: page.name)
def test_python_snippets_run(page, variables):
    run_snippets(page, variables)


@pytest.mark.parametrize("neuron", ["sigmoid", "hard"])
def test_what_the_readme_adds_is_a_flag_that_trains(neuron, variables):
    run_snippets(README, variables)
    flags = re.findall(r"# (--\w+ \w+)", "".join(fences(README, "python")))
    assert {flag.split()[0] for flag in flags} == {"--neuron", "--norm", "--loss", "--arch", "--dataset"}
    outcome = call(train.main, *flags, "--neuron", neuron, TINY, "--num_epochs 1 --batch_size 8 --run_dir run")
    assert outcome.result["count"] == 8


# ---- Limits and numbers ------------------------------------------------------------------------------


def test_the_readme_is_short():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert max(len(line) for line in lines if not line.startswith("|")) <= 160
    assert max(len(line) for line in lines if line.startswith("|")) <= 250


CONTENDERS = {
    "authors' code": "authors",
    "SpikingJelly 2.0.0, its BNTT layer": "spikingjelly",
    "SpikingJelly 2.0.0, its BNTT layer, its Triton kernels": "spikingjelly",
    "SpikingJelly 2.0.0, bf16": "spikingjelly-bf16",
    "snnTorch 1.0.0, its BNTT layer": "snntorch",
    "ours, plain loop": "ours-plain",
    "ours, plain loop, bf16": "ours-plain-bf16",
    "ours, fused, float32": "ours-fused",
    "ours, fused, bf16": "ours-fused-bf16",
    "ours, fused, bf16, one CUDA graph": "ours-fused-bf16-graph",
}


def rows(page, head, below=""):
    """The cells of the table whose first line begins with `head`, the first one below a text."""
    text = page.read_text(encoding="utf-8")
    lines = text[text.index(below) :].split(f"\n{head}", 1)[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


BENCHMARKS, SPEED = ROOT / "results" / "benchmarks", ROOT / "docs" / "speed.md"


@pytest.mark.parametrize(
    ("page", "below", "file"),
    [
        (README, "## Equal", "cpu_vgg9_T25_B16.json"),
        (SPEED, "### On two CPU cores", "cpu_vgg9_T25_B16.json"),
        (SPEED, "### On a GPU", "h200_second/cuda_vgg9_T25_B256.json"),
    ],
)
def test_the_times_are_those_of_the_record(page, below, file):
    record = json.loads((BENCHMARKS / file).read_text())
    gpu = record["device"] == "cuda"
    found = rows(page, "| | training step, ms an image |", below)
    assert len(found) >= 5
    for title, *cells, memory in found:
        name = CONTENDERS[title]
        used = record["peak_mb"][name] / 1000 if gpu else record["memory"][name]["mb_per_image"]
        assert memory == f"{used:.1f}"
        for mode, time, faster in zip(("train", "infer"), cells[::2], cells[1::2], strict=True):
            ratio = record["speedups"][mode][name]["authors"]
            brackets = f" ({ratio['min']:.2f}-{ratio['max']:.2f})" if "(" in faster else ""
            assert time == f"{record['times'][mode][name]['median']:.{3 if gpu else 1}f}"
            assert faster == ("1" if name == "authors" else f"{ratio['median']:.2f}{brackets}")


def test_the_times_of_a_gpu_in_the_readme_are_those_of_the_records():
    """That of the authors' code is of the machine that had nothing else to do: docs/speed.md says why."""
    before, now = (
        json.loads((BENCHMARKS / name / "cuda_vgg9_T25_B256.json").read_text()) for name in ("h200", "h200_second")
    )
    text, times = " ".join(README.read_text(encoding="utf-8").split()), {}
    for name, record, words in (
        ("authors", before, "the authors' code takes {} ms an image and {} GB"),
        ("ours-fused-bf16-graph", now, "ours {} ms an image and {} GB"),
        ("ours-fused", now, ""),
    ):
        times[name] = record["times"]["train"][name]["median"]
        assert words.format(f"{times[name]:.3f}", f"{record['peak_mb'][name] / 1000:.1f}") in text
    ratios = (f"{times['authors'] / times[name]:.1f}" for name in ("ours-fused-bf16-graph", "ours-fused"))
    assert "{} times as fast; in float32 {} (".format(*ratios) in text


def test_the_passes_on_a_gpu_are_those_of_the_record():
    layers = json.loads((ROOT / "results" / "gpu" / "gpu.json").read_text())["stages"]["profile bf16"]["result"][
        "layers"
    ]
    names = {"convolutions and linear layers, forwards": "synapse", "the same, backwards": "synapse_backward"}
    found = rows(SPEED, "| | measured, ms |")
    assert len(found) == 7
    for title, *cells in found:
        name = names.get(title, title.strip("`"))
        assert cells == [f"{sum(layer[key].get(name, 0) for layer in layers):.1f}" for key in ("ms", "bytes_ms")]


def test_the_net_of_the_readme_is_that_of_its_record():
    folder = ROOT / "results" / "cifar10_vgg9_poisson_T25" / "seed0"
    text = " ".join(README.read_text(encoding="utf-8").split())
    exits, result = (json.loads((folder / name).read_text()) for name in ("early_exit.json", "result.json"))
    sure = exits["policies"]["confidence"]["calibrated"]
    numbers = f"{sure['acc']:.2f} % after {sure['mean_steps']:.1f} steps in", f"{exits['acc_full']:.2f} % in full"
    assert all(words in text for words in (f"{result['test_acc']:.2f} % of {result['count']:,} test", *numbers))
    assert exits["exit_step"] == exits["num_steps"] == 25
    seconds = sum(
        json.loads((ROOT / "results" / name / "seed0" / "result.json").read_text())["seconds"]
        for name in ("cifar10_vgg9_direct_T4", "cifar10_vgg9_poisson_T25")
    )
    assert f"{seconds / 60:.0f} minutes on an H200" in text


def test_the_engines_are_those_of_the_record():
    record, page = json.loads((ROOT / "results" / "engines" / "result.json").read_text()), SPEED
    assert rows(page, "| one training step, against plain float32 |") == [
        [name, f"{step['flipped']:.2e}", f"{step['cosine']:.4f}"] for name, step in record["one_step"].items()
    ]
    assert rows(page, "| engine | test accuracy") == [
        [
            name,
            ", ".join(f"{acc:.2f}" for acc in run["test_acc"]),
            *(f"{run[key]:.2f}" for key in ("mean", "deviation")),
            f"{run['seconds']:.0f}",
        ]
        for name, run in record["engines"].items()
    ]


def test_the_citations_are_those_of_citation_cff():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (bibtex,) = fences(README, "bibtex")
    paper, ours = (" ".join(entry.split()) for entry in bibtex.split("@software"))
    assert f"title = {{{citation['title']}}}" in ours
    assert f"author = {{{{{citation['authors'][0]['name']}}}}}" in ours
    for key in ("title", "year", "volume", "doi"):
        assert f"{key} = {{{citation['preferred-citation'][key]}}}" in paper
