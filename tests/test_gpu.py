"""benchmarks/gpu.sh and gpu.py: what they count, and how they stop, go on and sum up. All of it: TOY=1, by hand."""

import json
import os
import subprocess
import sys

import gpu
import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

import fused.engine
from model import SpikingVGG


@pytest.fixture
def folders(monkeypatch, tmp_path):
    for name in ("WORK", "OUT"):
        monkeypatch.setattr(gpu, name, tmp_path / name)
        (tmp_path / name).mkdir()
    gpu.BEGUN.clear()
    return tmp_path


def python(code):
    return [sys.executable, "-c", code]


def of(*every):
    """Stands for `gpu.stages`."""
    return lambda recipe: every


def states():
    report = json.loads((gpu.OUT / "gpu.json").read_text())
    return {name: record["state"] for name, record in report["stages"].items()}, report["waiting"]


def test_operations_are_those_that_pytorch_counts():
    net, T, B = SpikingVGG("vgg9", 2, img_size=16), 2, 3
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(B, 3, 16, 16)).sum().backward()
    readout = 3 * 2 * T * B * net.readout.weight.numel()
    operations, inputs = [], T * B * 3 * 16 * 16
    for i, (shape, layer) in enumerate(zip(fused.engine.shapes(net, B, T), net.layers(), strict=True)):
        operations.append(gpu.traffic(shape, layer.synapse.weight[0].numel(), inputs, 2, i == 0)[1])
    assert sum(operations) + readout == counter.get_total_flops()


def test_bytes_of_a_layer_are_those_of_its_tensors():
    shape = fused.Shape(2, 3, 4, 4, 8, 2, False, False, 0.9, 1.0, 0.3)
    x, spikes, seen = (
        torch.empty(shape.full).half(),
        torch.empty(shape.pooled).half(),
        torch.empty(2, 3, 5, 4, 4).half(),
    )
    packed, tensors = spikes.byte(), lambda *all_: sum(v.nbytes for v in all_)
    moved, _ = gpu.traffic(shape, 45, seen.numel(), 2, first=False)
    assert moved["synapse"] == tensors(seen, x)
    assert moved["statistics"] == tensors(x)
    assert moved["lif_forward"] == tensors(x, spikes, packed)
    assert moved["lif_backward"] == tensors(x, spikes, x)
    assert moved["affine"] == tensors(x, x, x)
    assert moved["unpack"] == tensors(seen.byte(), seen)
    assert moved["synapse_backward"] == tensors(x, seen, x, seen)
    first, _ = gpu.traffic(shape, 45, seen.numel(), 2, first=True)
    assert first["unpack"] == 0
    assert first["synapse_backward"] == tensors(x, seen)


def test_a_stage_that_is_done_is_not_run_again(folders, monkeypatch):
    count = f"import pathlib; p = pathlib.Path({str(folders / 'runs')!r}); p.open('a').write('.'); print('{{}}')"
    monkeypatch.setattr(gpu, "stages", of(gpu.Stage("one", python(count), 0)))
    assert gpu.run_all([]) == gpu.run_all([]) == 0
    assert (folders / "runs").read_text() == "."
    assert states() == ({"one": "done"}, [])
    assert "| one | done |" in (gpu.OUT / "gpu.md").read_text()


def test_a_stage_that_fails_stops_no_other_and_is_told(folders, monkeypatch):
    breaks = gpu.Stage("breaks", python("import sys; print('no GPU', file=sys.stderr); sys.exit(3)"), 0)
    differs = gpu.Stage("differs", python("print('[1]')"), 0, lambda result: f"failed: {result}")
    monkeypatch.setattr(gpu, "stages", of(breaks, differs, gpu.Stage("last", python("print('{}')"), 0)))
    assert gpu.run_all([]) == 1
    found, waiting = states()
    assert found == {"breaks": "failed: exit code 3, no GPU", "differs": "failed: [1]", "last": "done"}
    assert waiting == []


def test_a_stage_that_outlasts_calls_is_given_up(folders, monkeypatch):
    monkeypatch.setenv("BUDGET_S", str(gpu.STOP_S + 2))
    monkeypatch.setattr(gpu, "stages", of(gpu.Stage("sleeps", python("import time; time.sleep(600)"), 600)))
    for _ in range(gpu.FRUITLESS):
        gpu.BEGUN.clear()  # as a new call does
        gpu.run_all([])
        found, waiting = states()
    assert found["sleeps"].startswith("failed: it does not end within")
    assert waiting == []


def test_a_traceback_is_told_by_its_last_line():
    assert gpu.short(gpu.passed("Traceback (most recent call last):\n  ...\nAssertionError: 3 | 4")) == (
        "failed: AssertionError: 3 / 4"
    )
    assert gpu.short("left out: it is not here: really") == "left out: it is not here: really"


@pytest.mark.slow
def test_a_stage_that_goes_on_is_stopped_and_never_given_up(folders, monkeypatch):
    monkeypatch.setenv("BUDGET_S", str(gpu.STOP_S + 2))
    saves = f"""
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path({str(folders / "saved")!r}).open("a").write(".")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
time.sleep(600)
"""
    monkeypatch.setattr(gpu, "stages", of(gpu.Stage("trains", python(saves), 0, goes_on=True)))
    for _ in range(gpu.FRUITLESS + 1):
        gpu.BEGUN.clear()
        assert gpu.run_all([]) == 0
        assert states() == ({}, ["trains"])
    assert (folders / "saved").read_text() == "." * (gpu.FRUITLESS + 1)


def test_a_checkpoint_travels_in_parts(folders, monkeypatch):
    monkeypatch.setattr(gpu, "stages", of())
    monkeypatch.setenv("PARTS", "0.001")
    last = gpu.WORK / "run" / "seed0" / "last.pth.tar"
    last.parent.mkdir(parents=True)
    content = bytes(range(256)) * 10
    last.write_bytes(content)
    gpu.run_all(["run"])
    last.unlink()
    (gpu.WORK / "parts").mkdir()
    parts = list(gpu.OUT.glob("last.pth.tar.*"))
    assert len(parts) == 3
    for part in parts:
        part.rename(gpu.WORK / "parts" / part.name)
    gpu.run_all(["run"])
    assert last.read_bytes() == content


@pytest.mark.slow
def test_gpu_sh_trains_the_recipe(tmp_path):
    """The stages before it count as done."""
    work = tmp_path / "work"
    work.mkdir()
    names = ("TOY", "WORK", "OUT", "PYTHON", "BUDGET_S", "PARTS")
    toy = dict(zip(names, ("1", work, tmp_path / "out", sys.executable, "500", "15"), strict=True))
    environment = os.environ | {name: str(value) for name, value in toy.items()}
    for stage in gpu.stages([]):
        (work / stage.file.name).write_text('{"state": "done", "seconds": 1}')
    done = subprocess.run(["bash", ROOT / "benchmarks" / "gpu.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all stages are done"
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert report["stages"]["recipe"]["result"]["epoch"] == 4
    assert [line["epoch"] for line in report["recipe_log"]] == [1, 2, 3, 4]
    assert (work / "cifar10_vgg9" / "seed0" / "config.yaml").exists()
