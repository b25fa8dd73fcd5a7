"""The net without spikes, its conversion, and training that goes on from there: the real scripts on digits."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from conftest import call

import convert
import early_exit
import fused
import model
import nets
import runs
import test as test_script
import train
import training_set
import utill
from baselines import ANN, IF
from model import NoNorm, SpikingVGG
from utill import UserError

DOUBLE = dict(dtype=torch.float64)
DATA = "--dataset digits --batch_size 16 --num_workers 0 --device cpu"
RECIPE = f"{DATA} --arch tiny_ann --dropout 0.2 --optimizer adamw --lr 1e-3 --weight_decay 0.05 --lr_schedule cosine"


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A small net, so that the scripts take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.ARCHS, "tiny", ((16, "A", 16), (32,)))
        patch.setitem(nets.ANNS, "tiny_ann", "tiny")
        yield


@pytest.fixture(scope="module")
def ann(tmp_path_factory):
    """The folder of an ANN that has learnt something."""
    folder = tmp_path_factory.mktemp("ann") / "run"
    sizes = "--limit_test 100 --num_epochs 3"
    assert call(train.main, RECIPE, sizes, "--run_dir", folder).result["test_acc"] > 85
    return folder


def converted(ann, folder, *flags):
    return call(convert.main, ann / "best.pth.tar", "--out", folder, "--limit_test 100 --device cpu", *flags)


@pytest.fixture(scope="module")
def snn(ann, tmp_path_factory):
    folder = tmp_path_factory.mktemp("snn") / "run"
    outcome = converted(ann, folder, "--num_steps 120 --calibration_images 64")
    assert outcome.code == 0, outcome.err
    return folder


def net_of(path, **settings):
    return nets.load(path / "best.pth.tar", engine="plain", **settings)


def test_a_net_converted_by_another_seed_keeps_the_split_of_its_ann(ann, tmp_path):
    assert converted(ann, tmp_path / "snn", "--num_steps 60 --calibration_images 32 --seed 3").code == 0
    checkpoint = runs.load_checkpoint(tmp_path / "snn" / "best.pth.tar")
    assert (checkpoint["config"]["seed"], training_set.known_data(checkpoint)["split_seed"]) == (3, 0)


# ---- The net without spikes ----------------------------------------------------------------------


def test_an_ann_is_tested_as_it_was_trained(ann):
    result = json.loads((ann / "result.json").read_text())
    assert (result["arch"], result["num_steps"], result["norm"]) == ("tiny_ann", 1, "none")
    tested = call(test_script.main, ann / "best.pth.tar", "--limit_test 100").result
    assert (tested["top1"], tested["num_steps"]) == (result["test_acc"], 1)


def test_an_ann_has_no_spikes_and_no_early_exit(ann):
    line = json.loads((ann / "log.jsonl").read_text().splitlines()[-1])
    assert (line["spike_rate"], line["spikes_per_image"], line["mean_gamma"]) == ({}, 0, {})
    outcome = call(early_exit.main, ann / "best.pth.tar")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert "has no gamma per time-step" in outcome.err[0]


def test_a_bare_state_dict_of_an_ann_needs_no_more_than_its_name(ann, tmp_path):
    torch.save(torch.load(ann / "best.pth.tar", weights_only=True)["state_dict"], tmp_path / "c.pth")
    tested = call(test_script.main, tmp_path / "c.pth", DATA, "--arch tiny_ann --limit_test 100").result
    assert tested["top1"] == json.loads((ann / "result.json").read_text())["test_acc"]


def test_a_stopped_ann_goes_on_with_the_same_bits(tmp_path):
    flags = RECIPE, "--limit_train 64 --limit_test 20 --num_epochs 2 --save_every 1 --run_dir"
    assert call(train.main, *flags, tmp_path / "whole").code == 0

    step, count = train.train_step, iter(range(9))

    def stop(*args):
        if next(count) == 2:
            raise UserError("stopped")
        return step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", stop)
        assert call(train.main, *flags, tmp_path / "parts").code == 2
    assert runs.load_checkpoint(tmp_path / "parts" / "last.pth.tar")["progress"]["step"] == 2
    assert call(train.main, *flags, tmp_path / "parts", "--resume").code == 0
    states = [runs.load_checkpoint(tmp_path / name / "last.pth.tar")["state_dict"] for name in ("whole", "parts")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--norm bntt", "takes none alone: leave out --norm bntt"),
        ("--num_steps 25", "takes 1 alone: leave out --num_steps 25"),
        ("--encoding poisson", "takes direct alone: leave out --encoding poisson"),
        ("--neuron plif", "has neither time-steps nor spiking neurons: leave out --neuron plif"),
        ("--threshold 2", "has neither time-steps nor spiking neurons: leave out --threshold 2.0"),
        ("--arch tiny --dropout 0.2", "--dropout belongs to a net without spikes: choose --arch vgg9_ann or vgg11_ann"),
        ("--arch tiny --dropout 0 --neuron if", "as it has no leak, got 0.95: pass --leak_mem 1"),
    ],
)
def test_what_does_not_go_with_an_ann_is_one_sentence(tmp_path, flags, words):
    outcome = call(train.main, RECIPE, flags, "--run_dir", tmp_path / "run")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert words in outcome.err[0]
    assert not (tmp_path / "run").exists()


# ---- Balancing -----------------------------------------------------------------------------------


def tiny_pair(weight=1.0):
    """An ANN and a spiking net of the same weights, in float64, and batches of images."""
    torch.manual_seed(0)
    ann = ANN("tiny", 8, 5).double().eval()
    snn = SpikingVGG("tiny", 400, 1.0, 8, 5, norm=NoNorm, encoding="direct", neuron=IF).double().eval()
    snn.load_state_dict(snn.state_dict() | ann.state_dict())
    return ann, snn, [torch.randn(2, 3, 8, 8, **DOUBLE), torch.randn(1, 3, 8, 8, **DOUBLE)]


def test_a_threshold_is_the_largest_current_that_its_layer_sees_while_the_earlier_layers_spike():
    _, net, batches = tiny_pair()
    found = convert.balance_thresholds(net, batches, 30)
    seen = {}  # of the balanced net, run as it will be tested
    for layer in net.layers():

        def look(module, inputs, output, name=layer.name):
            seen[name] = max(seen.get(name, 0), float(output.max()))

        layer.synapse.register_forward_hook(look)
    with torch.no_grad():
        for images in batches:
            net.voltages(images, 30)
    assert found == {layer.name: layer.lif.threshold for layer in net.layers()}
    assert found == pytest.approx(seen, rel=1e-12)


def test_the_logits_of_a_balanced_net_near_those_of_the_ann():
    ann, net, batches = tiny_pair()
    convert.balance_thresholds(net, batches, 50)
    with torch.no_grad():
        wanted, voltages = ann(batches[0]), net.voltages(batches[0])
    errors = [float((voltages[t - 1] / t - wanted).abs().max() / wanted.abs().max()) for t in (100, 400)]
    assert errors[1] < min(0.15, 0.5 * errors[0])


def test_normalised_weights_make_the_largest_activation_of_each_layer_1_and_keep_the_logits():
    ann, net, batches = tiny_pair()
    wanted = [ann(images).detach() for images in batches]
    convert.normalise_weights(net, ann, batches)
    ann.load_state_dict({name: tensor for name, tensor in net.state_dict().items() if name in ann.state_dict()})
    largest = [convert.largest_current(ann, batches, 1, i) for i in range(len(ann.layers()))]
    assert largest == pytest.approx([1.0] * len(largest), rel=1e-12)
    for images, logits in zip(batches, wanted, strict=True):
        torch.testing.assert_close(ann(images), logits, rtol=1e-10, atol=0)


def test_a_percentile_is_that_of_all_neurons_and_images_of_a_batch():
    ann, _, (images, _) = tiny_pair()
    currents = ann.conv1(images).flatten().sort().values
    found = convert.largest_current(ann, [images], 1, 0, 99.0)
    assert found == currents[math.ceil(0.99 * len(currents)) - 1].item()


def test_a_layer_that_never_fires_is_named():
    _, net, batches = tiny_pair()
    net.conv2.weight.data.zero_()
    with pytest.raises(UserError, match=r"^conv2 cannot be balanced, as its largest input current is not above zero"):
        convert.balance_thresholds(net, batches, 5)


# ---- The script ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["", "--weight_norm", "--encoding direct", "--percentile 99.9"])
def test_a_converted_net_answers_as_the_ann(ann, tmp_path, flags):
    outcome = converted(ann, tmp_path / "run", "--num_steps 150 --calibration_images 64 --steps 1 150", flags)
    before = json.loads((ann / "result.json").read_text())["test_acc"]
    accuracies = outcome.result["acc_by_steps"]
    assert list(accuracies) == ["1", "150"]
    assert accuracies["1"] < 30 < before - 3 <= accuracies["150"] == outcome.result["test_acc"]
    assert outcome.result["spikes_per_image"] > 0
    assert outcome.result["ann_acc"] == before
    assert outcome.result["difference"] == pytest.approx(accuracies["150"] - before)


def test_the_difference_of_two_nets_is_paired_by_image():
    ours, theirs = (torch.tensor([*map(bool, rights)]) for rights in ([1, 1, 0, 0, 1], [1, 0, 1, 1, 1]))
    # 0, 100, -100, -100, 0: mean -20, variance 7000
    found = utill.paired_difference(ours, theirs)
    assert found["difference"] == pytest.approx(-20)
    assert found["half_interval"] == pytest.approx(1.96 * (7000 / 5) ** 0.5)


def test_a_conversion_leaves_its_curve(snn):
    assert (snn / "conversion.png").read_bytes()[:4] == b"\x89PNG"


def test_one_pass_gives_the_accuracy_at_every_number_of_steps(ann, tmp_path):
    flags = "--num_steps 40 --calibration_images 32 --encoding direct --steps 7 20"
    accuracies = converted(ann, tmp_path / "run", flags).result["acc_by_steps"]
    checkpoint = tmp_path / "run" / "best.pth.tar"
    for steps, accuracy in accuracies.items():
        assert call(test_script.main, checkpoint, "--limit_test 100 --steps", int(steps)).result["top1"] == accuracy
    assert accuracies["7"] != accuracies["20"]


def test_a_converted_net_is_an_ordinary_checkpoint(snn):
    result = json.loads((snn / "result.json").read_text())
    assert call(test_script.main, snn / "best.pth.tar", "--limit_test 100").result["top1"] == result["test_acc"]
    thresholds = {layer.lif.threshold for layer in net_of(snn).layers()}
    assert len(thresholds) == 3
    assert fused.why_not(net_of(snn)) is None
    config = yaml.safe_load((snn / "config.yaml").read_text())
    told = [config[key] for key in ("arch", "neuron", "norm", "num_steps", "leak_mem", "dropout", "encoding")]
    assert told == ["tiny", "if", "none", 120, 1.0, 0.0, "poisson"]


def test_a_converted_net_has_no_early_exit(snn):
    outcome = call(early_exit.main, snn / "best.pth.tar")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert "a net with --norm none has no gamma per time-step" in outcome.err[0]


def test_a_converted_net_of_which_only_weights_are_left_keeps_its_thresholds(snn, tmp_path):
    torch.save(torch.load(snn / "best.pth.tar", weights_only=True)["state_dict"], tmp_path / "c.pth")
    flags = "--arch tiny --leak_mem 1 --num_steps 120 --limit_test 100"
    tested = call(test_script.main, tmp_path / "c.pth", DATA, flags).result
    assert tested["top1"] == json.loads((snn / "result.json").read_text())["test_acc"]


def test_a_threshold_of_zero_in_a_file_is_refused(snn, tmp_path):
    whole = torch.load(snn / "best.pth.tar", weights_only=True)
    whole["state_dict"]["lif_conv2._extra_state"] = torch.tensor(0.0, **DOUBLE)
    torch.save(whole, tmp_path / "c.pth")
    outcome = call(test_script.main, tmp_path / "c.pth", "--limit_test 20")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert outcome.err[0].endswith("a threshold must be a positive number, got 0.0")


def refused(path, folder, *flags):
    outcome = call(convert.main, path, "--out", folder, *flags)
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert not Path(folder).exists()
    return outcome.err[0]


def changed(ann, tmp_path, **tensors):
    """The checkpoint of the ANN with other tensors."""
    whole = torch.load(ann / "best.pth.tar", weights_only=True)
    whole["state_dict"] |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    torch.save(whole, tmp_path / "c.pth")
    return tmp_path / "c.pth"


def test_a_spiking_net_is_not_converted(trained, tmp_path):
    assert "holds no ANN (its arch is vgg9)" in refused(trained.checkpoint, tmp_path / "run")


def test_a_state_dict_alone_is_not_converted(ann, tmp_path):
    torch.save(torch.load(ann / "best.pth.tar", weights_only=True)["state_dict"], tmp_path / "c.pth")
    assert "holds no ANN (its arch is unknown)" in refused(tmp_path / "c.pth", tmp_path / "run")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"conv1__bias": torch.zeros(16)}, "has a bias (conv1.bias), which no threshold balances"),
        ({"bntt1__shared__running_mean": torch.zeros(64)}, "has a batch norm (bntt1.shared.running_mean), which no"),
        ({"conv2__weight": torch.zeros(16, 16, 3, 3)}, "conv2 cannot be balanced, as its largest input current is not"),
        ({"conv2__weight": torch.zeros(16, 16, 5, 5)}, "size mismatch for conv2.weight"),
    ],
)
def test_what_cannot_be_balanced_is_one_sentence_and_leaves_nothing(ann, tmp_path, tensors, words):
    assert words in refused(changed(ann, tmp_path, **tensors), tmp_path / "run")


def test_more_steps_than_there_are_cannot_be_shown(ann, tmp_path):
    words = refused(ann / "best.pth.tar", tmp_path / "run", "--num_steps 10 --steps 5 20")
    assert words.endswith("--steps must be at most --num_steps 10, got 20")


def test_a_run_is_not_overwritten_unasked(ann, snn):
    before = (snn / "best.pth.tar").read_bytes()
    outcome = converted(ann, snn, "--num_steps 20")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert "already holds a run: pass --overwrite" in outcome.err[0]
    assert (snn / "best.pth.tar").read_bytes() == before


# ---- From there by surrogate gradients -----------------------------------------------------------

HYBRID = f"{DATA} --arch tiny --norm none --neuron learnt_lif --leak_mem 0.99 --num_steps 20 --limit_test 100"


def test_hybrid_training_starts_from_the_converted_thresholds_and_learns_them(snn, tmp_path):
    flags = "--limit_train 64 --num_epochs 1 --optimizer adamw --lr 1e-3 --init_from"
    outcome = call(train.main, HYBRID, flags, snn / "best.pth.tar", "--run_dir", tmp_path)
    assert outcome.code == 0, outcome.err
    assert any(line.startswith("weights from") and "lif_conv1.threshold" in line for line in outcome.out)
    assert any(line.startswith("engine: fused") for line in outcome.out)
    start = [layer.lif.threshold for layer in net_of(snn).layers()]
    neurons = [layer.lif for layer in net_of(tmp_path).layers()]
    assert [neuron.start for neuron in neurons] == start
    assert all(0 < abs(neuron.v.item()) < 0.1 for neuron in neurons)
    assert all(0 < abs(neuron.leak.item() - 0.99) < 0.01 for neuron in neurons)
    tested = call(test_script.main, tmp_path / "best.pth.tar", "--limit_test 100").result
    assert tested["top1"] == outcome.result["test_acc"]


def test_an_ann_must_be_converted_before_it_starts_a_hybrid_training(ann, tmp_path):
    outcome = call(train.main, HYBRID, "--run_dir", tmp_path / "run", "--init_from", ann / "best.pth.tar")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert outcome.err[0].endswith("it holds a net of another arch than tiny: convert it with convert.py first")
    assert not (tmp_path / "run").exists()
