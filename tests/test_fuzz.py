"""A few hundred of the inputs of tests/stress/fuzz.py, and that it notices what it is there to notice."""

import sys
import time
from pathlib import Path
from unittest import mock

import pytest

if sys.platform != "linux":
    pytest.skip("the fuzzer reads /proc and sets alarms", allow_module_level=True)

import fuzz

import train
import utill
from utill import UserError


@pytest.fixture(scope="module")
def assets():
    return fuzz.make_assets()


@pytest.fixture(autouse=True)
def _bounds():
    with fuzz.little_memory(), mock.patch("urllib.request.urlopen", fuzz.no_network):
        yield


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), fuzz.shares(250, fuzz.KINDS).items())
def test_every_input_ends_in_a_result_or_in_one_sentence(assets, kind, count):
    report = fuzz.fuzz(kind, count, 7, assets)
    assert [(index, case.argv, wrong) for index, case, wrong in report.failures] == []
    assert report.accepted + report.refused == report.inputs == count


def script(monkeypatch, main):
    """A script whose main is this."""
    monkeypatch.setitem(fuzz.SCRIPTS, "train", mock.Mock(main=utill.entry_point(main), parse_args=train.parse_args))


def refuse(argv):
    raise UserError("no")


def write(name):
    def main(argv):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("half")
        if argv:
            raise UserError("no")

    return main


@pytest.mark.parametrize(
    ("main", "argv", "fault"),
    [
        (refuse, [], None),
        (lambda argv: 0, [], None),
        (lambda argv: 1, [], "exit code 1"),
        (lambda argv: [][0], [], "IndexError"),
        (lambda argv: sys.exit(3), [], "exit code 3"),
        (lambda argv: print("why", file=sys.stderr) or refuse(argv), [], "not one line of error"),
        (lambda argv: time.sleep(9), [], "no end after 1 s"),
        (write("run/log"), [], None),
        (write("run/log"), ["refuse"], "a refusal changed files"),
        (write("run/.log.x"), [], "half-written"),
        (write("run/tmp-x"), [], "half-written"),
        (write("../x"), [], "a file outside"),
        (write("mine"), ["refuse"], "a refusal changed files"),
    ],
)
def test_what_goes_wrong_is_noticed(monkeypatch, tmp_path, main, argv, fault):
    monkeypatch.setattr(fuzz, "LIMIT", 1)
    script(monkeypatch, main)
    (tmp_path / "place").mkdir()
    _, wrong = fuzz.run(fuzz.Case("train", argv, {"mine": b"whole"}), tmp_path / "place")
    assert (wrong is None) if fault is None else fault in wrong


def test_a_failing_input_is_found_again_by_its_index(monkeypatch, assets):
    script(monkeypatch, lambda argv: [][0] if len("".join(argv)) % 2 else 0)  # some
    failures = fuzz.fuzz("flags", 30, 3, assets).failures
    index, case, _ = failures[-1]
    assert index > 0
    ((again, same, _),) = fuzz.fuzz("flags", 30, 3, assets, only=index).failures
    assert (again, same.argv) == (index, case.argv)


def test_a_table_and_the_exit_code_say_how_it_went(monkeypatch, capsys, tmp_path, assets):
    monkeypatch.setattr(fuzz, "make_assets", lambda: assets)
    command = ["--count", "6", "--kinds", "config", "--keep", str(tmp_path)]
    assert fuzz.main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["all", "6"]
    script(monkeypatch, lambda argv: [][0])
    assert fuzz.main(command) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].split() == ["all", "6", "0", "0", "6"]
    assert "repeat: --count 6 --seed 0 --kinds config --only 0" in err
    assert (tmp_path / "config-0" / "my.yaml").exists()
