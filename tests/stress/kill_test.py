"""Kill training runs at random moments, resume each until it is done, and compare with runs never killed.

    python tests/stress/kill_test.py --kills 50 --in_write 10

Real training of VGG9 on digits by train.py, with loading processes and augmentation, in both engines. A run is a
process group of its own, and each kill a SIGKILL of the whole group: `--in_write` of them while a checkpoint is
being written, at a random byte or right before it takes the place of the old one (the run waits there for its
death, so none is a near miss), some while it starts, the others at random moments of steps, saves and tests.

After each kill the checkpoints must load; at the end both of them, log.jsonl, result.json and the TensorBoard
curves must be those of the unbroken run bit for bit, times aside. Prints a line a kill and a summary, and exits
with 1 if anything differed. Flags it does not know go to train.py. Linux and macOS.
"""

import argparse
import contextlib
import itertools
import json
import logging
import math
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repo root

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import runs
import utill

FLAGS = (
    "--dataset digits --num_steps 5 --limit_train 320 --limit_test 100 --num_epochs 3 --batch_size 32 --lr 0.05 "
    "--device cpu --amp off"
)
RUNS = [
    "--engine fused --augment --num_workers 2 --save_every 1",
    "--engine plain --augment --num_workers 2 --save_every 2 --val_fraction 0.05",
    "--engine fused --augment --num_workers 0 --save_every 3 --val_fraction 0.05 --optimizer adam --lr 0.001",
]
TIMES = ("seconds", "epoch_seconds", "images_per_s", "run_dir")  # may differ
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of curves that a resumed run writes again
PATIENCE = 300  # seconds until the next word of a run


class Kill(NamedTuple):
    """When to kill. kind: start, event or write; after: its seconds, events or checkpoint writes."""

    kind: str
    after: float
    place: float  # event: more seconds to wait; write: part of the bytes already written, 1: all


# ---- In the run that is to be killed -------------------------------------------------------------


class Stopping:
    """A file that takes `most` bytes and then calls halt(bytes written)."""

    def __init__(self, file, most, halt):
        self.file, self.most, self.halt, self.written = file, most, halt, 0

    def write(self, data):
        data = memoryview(data).cast("B")
        part = data[: self.most - self.written]
        self.file.write(part)
        self.written += len(part)
        if len(part) < len(data):
            self.file.flush()
            self.halt(self.written)
        return len(data)

    def flush(self):
        self.file.flush()


def child(pipe, nth, most, argv):
    """train.py that tells on `pipe` what it does, and waits at byte `most` of its `nth` checkpoint write."""
    import train

    made, count = [], itertools.count(1)

    def tell(*words):
        os.write(pipe, (" ".join(map(str, words)) + "\n").encode())

    def halt(*words):
        tell("halt", *words)
        signal.pause()

    def patch(module, name, before=None, after=None):
        original = getattr(module, name)

        def patched(*args, **options):
            if before:
                before(*args)
            result = original(*args, **options)
            if after:
                after(*args)
            return result

        setattr(module, name, patched)

    write_atomically = runs.write_atomically

    def write(path, put):
        if path.suffix == ".tar" and next(count) == nth:
            patch(os, "replace", before=lambda *_: halt(f"in the write of {path.name}, all bytes but not in place"))
            stop_at = lambda n: halt(f"in the write of {path.name} at byte {n:,}")  # noqa: E731
            write_atomically(path, lambda file: put(Stopping(file, most, stop_at)))
        write_atomically(path, put)
        tell("the write of", path.name)

    runs.write_atomically = write
    patch(runs.Run, "__init__", after=lambda run, *_: made.append(run))
    patch(train, "train_step", after=lambda *_: tell(f"step {made[0].step + 1} of epoch {made[0].epoch + 1}"))
    patch(utill, "evaluate", before=lambda *_: tell("the begin of an evaluation"), after=lambda *_: tell("its end"))
    return train.main(argv)


# ---- Around it -----------------------------------------------------------------------------------


def run(argv, output, kill=None, size=0):
    """Run train.py on argv, its output to the file `output`, up to its end or until killed.

    size: bytes of a checkpoint. Returns (exit code or None if killed, where it was killed). UserError if it hangs.
    """
    ours, theirs = os.pipe()
    nth, most = (kill.after, round(kill.place * size)) if kill and kill.kind == "write" else (0, 0)
    most = most if not kill or kill.place < 1 else 1 << 60
    command = [sys.executable, __file__, "--child", *map(str, (theirs, nth, most)), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(output, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, pass_fds=[theirs], start_new_session=True, env=environment
        )
    os.close(theirs)
    try:
        with open(ours, "rb", buffering=0) as pipe:
            where, seen, text, begun = "its start", 0, b"", time.monotonic()
            while True:
                wait = kill.after - (time.monotonic() - begun) if kill and kill.kind == "start" else PATIENCE
                ready = select.select([pipe], [], [], max(wait, 0))[0]
                if not ready and kill and kill.kind == "start":
                    return None, f"{time.monotonic() - begun:.1f} s after its start"
                if not ready:
                    raise utill.UserError(f"a run does nothing for {PATIENCE} s after {where}")
                data = pipe.read(1 << 16)
                if not data:
                    return process.wait(), "at the end"
                *lines, text = (text + data).split(b"\n")
                for line in lines:
                    where, seen = line.decode(), seen + 1
                    if where.startswith("halt "):
                        return None, where.removeprefix("halt ")
                    if kill and kill.kind == "event" and seen == kill.after:
                        time.sleep(kill.place)
                        if process.poll() is not None:
                            return process.wait(), "at the end"
                        return None, f"{1000 * kill.place:.0f} ms after {where}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def difference(a, b, name):
    """The name of the first thing in which a and b differ, times aside; None if they are the same bit for bit."""
    if type(a) is not type(b):
        return name
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        found = (difference(a[k], b[k], f"{name}.{k}") for k in a if k not in TIMES)
        return name if a.keys() != b.keys() else next(filter(None, found), None)
    if isinstance(a, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else name
    return None if a == b else name


def what_a_run_left(folder):
    """All that is to be the same, by name."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})  # 0: all
    events.Reload()
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    curves |= {tag: [e.step for e in events.Histograms(tag)] for tag in events.Tags()["histograms"]}
    return {
        "files": sorted(path.name for path in folder.iterdir()),
        **{name: runs.load_checkpoint(folder / name) for name in ("last.pth.tar", "best.pth.tar")},
        "log.jsonl": [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()],
        "result.json": json.loads((folder / "result.json").read_text()),
        "config.yaml": (folder / "config.yaml").read_text(),
        "curves": {tag: points for tag, points in curves.items() if tag not in TIMES},
    }


def plan(kills, in_write, rng):
    """So many `Kill`s, in random order."""
    starts = (kills - in_write) // 8
    drawn = [Kill("write", rng.randint(1, 4), rng.choice([rng.random(), rng.random(), 1])) for _ in range(in_write)]
    drawn += [Kill("start", rng.uniform(0, 5), 0) for _ in range(starts)]
    drawn += [Kill("event", rng.randint(1, 8), rng.uniform(0, 0.2)) for _ in range(kills - in_write - starts)]
    return rng.sample(drawn, len(drawn))


def complete(code, output):
    if code != 0:
        raise utill.UserError(f"a run failed with {code}: {' '.join(output.read_text().splitlines()[-3:])}")


def kill_and_resume(folder, kills, in_write, kinds, seed, more):
    """Kill and resume runs in `folder`, of so many kinds of RUNS, until there were so many kills; the exit code."""
    left, done, written, same = plan(kills, in_write, random.Random(seed)), 0, 0, True
    unbroken, number, output = {}, 0, folder / "output.txt"
    while left:
        flags, whole = RUNS[number % kinds], folder / f"unbroken{number % kinds}"
        argv, broken, killed = [*FLAGS.split(), *flags.split(), *more], folder / f"broken{number}", 0
        if flags not in unbroken:
            complete(run([*argv, "--run_dir", str(whole)], output)[0], output)
            unbroken[flags] = what_a_run_left(whole)
        size, number = (whole / "last.pth.tar").stat().st_size, number + 1
        print(f"run {number}: {flags}", flush=True)
        while True:
            kill = left.pop() if left and killed < math.ceil(kills / kinds) else None  # each kind has its share
            code, where = run([*argv, "--run_dir", str(broken), "--resume"], output, kill, size)
            if code is not None:
                complete(code, output)
                left += [kill] if kill else []  # it was done before its time
                break
            saved = "nothing saved"
            for path in filter(Path.exists, (broken / "best.pth.tar", broken / "last.pth.tar")):
                checkpoint = runs.load_checkpoint(path)
                saved = f"saved are {checkpoint['global_step']} epochs and {checkpoint['progress']['step']} steps"
            done, killed, written = done + 1, killed + 1, written + where.startswith("in the write")
            print(f"kill {done}: {where}; {saved}", flush=True)
        fault = difference(unbroken[flags], what_a_run_left(broken), "run")
        same = same and not fault
        end = f"the end differs in {fault}" if fault else "end bit-identical"
        print(f"run {number}: killed {killed} times; {end}", flush=True)
    summary = f"{done} of {kills} kills survived, {written} inside a checkpoint write"
    print(f"{summary}; end bit-identical: {'yes' if same else 'no'}")
    return 0 if same else 1


@utill.entry_point
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how many")
    parser.add_argument("--in_write", type=int, default=10, help="how many of them inside a checkpoint write")
    parser.add_argument("--kinds", type=int, default=len(RUNS), choices=range(1, len(RUNS) + 1), help="of runs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    args, more = parser.parse_known_args(argv)
    if not 0 <= args.in_write <= args.kills or args.kills < 1:
        raise utill.UserError("--kills must be at least 1, and --in_write between 0 and --kills")
    if args.keep:
        args.keep.mkdir(parents=True)
    with contextlib.nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as folder:
        return kill_and_resume(Path(folder), args.kills, args.in_write, args.kinds, args.seed, more)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(*map(int, sys.argv[2:5]), sys.argv[5:]))
    sys.exit(main())
