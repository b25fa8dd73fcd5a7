"""Use one thread (the same sums in the same order everywhere), and run the scripts."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it

TINY = "--img_size 8 --num_steps 3 --batch_size 16 --num_workers 0 --device cpu"


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that no worker begins a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


class Outcome(NamedTuple):
    """What a script did: its exit code, and the lines of its stdout and stderr."""

    code: int
    out: list[str]
    err: list[str]

    @property
    def result(self):
        """The JSON object in the last line of stdout."""
        assert self.code == 0, self.err
        return json.loads(self.out[-1])


def words(argv):
    """Texts are split at spaces, all else (a path, a number) is one word."""
    return [word for part in argv for word in (part.split() if isinstance(part, str) else [str(part)])]


def call(main, *argv):
    """Run the `main` of a script in this process, on `words(argv)`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words(argv))
        except SystemExit as stop:
            code = stop.code
    return Outcome(code, out.getvalue().splitlines(), err.getvalue().splitlines())


def spawn(script, *argv, cwd):
    """Run a script as its user does, from the folder `cwd`, on `words(argv)`."""
    command = [sys.executable, ROOT / script, *words(argv)]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return Outcome(done.returncode, done.stdout.splitlines(), done.stderr.splitlines())


class Trained(NamedTuple):
    """A short training run on the digits, in which every layer spikes."""

    dir: Path
    outcome: Outcome

    @property
    def checkpoint(self):
        return self.dir / "best.pth.tar"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    import train

    run_dir = tmp_path_factory.mktemp("trained") / "run"
    sizes = "--dataset digits --limit_train 128 --limit_test 100 --num_epochs 3 --lr 0.02 --test_display_freq 1"
    outcome = call(train.main, TINY, sizes, "--run_dir", run_dir)
    assert outcome.code == 0, outcome.err
    return Trained(run_dir, outcome)
