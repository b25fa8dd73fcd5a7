"""benchmarks/benchmark.py runs, finds its contenders to be one net, and writes what it says. No clock is judged."""

import contextlib
import json

import benchmark
import contenders
import numpy as np
import pytest
import torch

from model import SpikingVGG

TINY = ["--batch_size", "2", "--num_steps", "2", "--img_size", "8", "--threads", "1", "--repeats", "1", "--warmup", "1"]


@pytest.mark.slow
def test_ours_plain_and_fused(tmp_path, capsys):
    names = ["ours-plain", "ours-fused"]
    assert benchmark.main([*TINY, "--contenders", *names, "--no_memory", "--out", str(tmp_path)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((tmp_path / "cpu_vgg9_T2_B2.json").read_text())
    assert last["left_out"] == [] == list(report["left_out"])
    assert last["same_net"] == {"ours-plain": True, "ours-fused": True}
    assert last["baseline"] == "ours-plain"
    assert report["check"]["ours-fused"]["gradients, float64"]["cosine"] == pytest.approx(1)
    for mode in ("train", "infer"):
        assert report["speedups"][mode]["ours-plain"]["ours-plain"]["median"] == 1
        for name in names:
            (seconds,) = report["seconds"][name][mode]
            assert report["times"][mode][name]["median"] == pytest.approx(1000 * seconds / 2)
            ratio = report["seconds"]["ours-plain"][mode][0] / seconds
            assert report["speedups"][mode][name]["ours-plain"]["median"] == pytest.approx(ratio)
    assert report["machine"]["versions"]["torch"]


def test_memory(tmp_path, monkeypatch):
    class Worker(contextlib.nullcontext):
        """In this process: 100 MB and 7 MB an image, once it has trained."""

        def __init__(self, name, args, batch_size):
            super().__init__(self)
            self.size, self.trained = batch_size, False

        def ask(self, do, **options):
            if do == "time":
                self.trained = options["mode"] == "train"
            return 100 + 7 * self.size if self.trained else 0

    args = benchmark.parse(["--memory_batches", "8", "4", "--out", str(tmp_path)])
    report = {"memory": {}, "left_out": {}}
    monkeypatch.setattr(benchmark, "Worker", Worker)
    benchmark.measure_memory(["ours-plain"], args, report)
    assert report["memory"]["ours-plain"] == {"batch_sizes": [4, 8], "peak_mb": [128, 156], "mb_per_image": 7}
    spec = {"contender": "ours-plain", "device": "cpu", "threads": 1}
    assert 50 < benchmark.Process(spec).memory() < 1e5


def test_contenders_of_one_code_are_checked_once():
    assert [*map(contenders.whose, ("ours-fused", "ours-fused-bf16-graph"))] == ["ours-fused", "ours-fused"]
    assert contenders.whose("ours-plain-bf16") == "ours-plain"


def test_a_new_row_gets_our_weights(monkeypatch):
    spec = {"arch": "vgg9", "num_steps": 2, "img_size": 8, "device": "cpu"}

    def built(ours, spec):
        torch.manual_seed(99)
        return SpikingVGG(spec["arch"], spec["num_steps"], contenders.LEAK, spec["img_size"], contenders.NUM_CLS)

    monkeypatch.setitem(contenders.CONTENDERS, "new", contenders.Contender(built))
    ours, new = (contenders.build(name, spec) for name in ("ours-plain", "new"))
    assert new is not ours
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), new.parameters(), strict=True))


def test_off_a_line():
    def off(seconds):
        return benchmark.off_a_line({n: {"train": s} for n, s in seconds.items()}, "train")

    assert off({5: 2.0, 10: 3.0, 25: 6.0, 100: 21.0}) == pytest.approx(0, abs=1e-12)
    assert 0.03 < off({5: 2.0, 10: 3.3, 25: 6.0, 100: 21.0}) < 0.1
    assert off({5: 2.0, 10: 3.0}) is None
    assert np.isfinite(off({1: 1.0, 2: 1.0, 4: 9.0}))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--authors", "nowhere"], "no model.py in nowhere"),
        (["--contenders", "nobody"], "invalid choice: 'nobody'"),
        (["--batch_size", "1"], "expected an integer of at least 2, got '1'"),
        (["--batch_size", "many"], "many"),
        (["--img_size", "4"], "img_size of vgg9 must be at least 8"),
        (["--device", "abacus"], "--device must be cpu, cuda or cuda:N"),
        (["--memory_batches", "4", "4"], "two different batch sizes"),
        (["--contenders", "authors"], "no contender is left"),
    ],
)
def test_mistakes_are_one_sentence(flags, words, tmp_path, capsys):
    assert benchmark.main([*flags, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
