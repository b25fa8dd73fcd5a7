"""nets.py: checkpoints as others leave them, nets.load, and training from the weights of another net."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY, call
from PIL import Image

import early_exit
import model
import nets
import precise_bn
import runs
import test as test_script
import train
import training_set
import utill
from baselines import DropoutLIF
from model import SpikingVGG
from utill import UserError

FLAGS = f"{TINY} --dataset digits --limit_train 32 --limit_test 20 --num_epochs 1 --lr 0.05 --seed 5"
FC3 = f"{FLAGS} --arch fc3 --engine plain"


@pytest.fixture(scope="module")
def whole(trained):
    """The checkpoint of a run, as saved."""
    return torch.load(trained.checkpoint, weights_only=True)


def renamed(whole, rename):
    return whole | {"state_dict": {rename(name): tensor for name, tensor in whole["state_dict"].items()}}


def halved(whole):
    state = {k: x.half() if x.is_floating_point() else x for k, x in whole["state_dict"].items()}
    return whole | {"state_dict": state}


# How a checkpoint of ours may come back, and how a state dict may without its settings.
WITH_SETTINGS = {
    "DataParallel": lambda c: renamed(c, "module.{}".format),
    "torch.compile": lambda c: renamed(c, "_orig_mod.{}".format),
    "both": lambda c: renamed(c, "module._orig_mod.{}".format),
    "a compiled layer": lambda c: renamed(c, lambda name: name.replace("conv1.", "conv1._orig_mod.")),
    "an attribute of a wrapper": lambda c: renamed(c, "model.{}".format),
}
WITHOUT = {
    "bare": lambda state: state,
    "bare, DataParallel": lambda state: {f"module.{name}": x for name, x in state.items()},
    "model": lambda state: {"model": state, "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}},
    "net": lambda state: {"net": state, "acc": 0.5},
    "state_dict": lambda state: {"state_dict": state},
    "module": lambda state: {"module": state},
    "with a config of theirs": lambda state: {"model": state, "config": {"lr": [1, 2]}},
}
NAMED = "--arch vgg9 --dataset digits --leak_mem 0.95 --img_size 8 --batch_size 16 --num_workers 0 --device cpu"


# ---- Checkpoints as others leave them ------------------------------------------------------------


@pytest.mark.parametrize("kind", WITH_SETTINGS)
def test_prefixes_of_names_change_no_answer(trained, whole, tmp_path, kind):
    torch.save(WITH_SETTINGS[kind](whole), tmp_path / "c.pth")
    assert (
        call(test_script.main, tmp_path / "c.pth", "--limit_test", 100).result["top1"]
        == (trained.outcome.result["test_acc"])
    )


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_state_dict_alone_or_wrapped_is_tested_with_flags(trained, whole, tmp_path, kind):
    torch.save(WITHOUT[kind](whole["state_dict"]), tmp_path / "c.pth")
    outcome = call(test_script.main, tmp_path / "c.pth", NAMED, "--limit_test", 100)
    assert outcome.result["top1"] == trained.outcome.result["test_acc"]


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_state_dict_without_flags_is_refused_with_those_it_needs(whole, tmp_path, kind):
    torch.save(WITHOUT[kind](whole["state_dict"]), tmp_path / "c.pth")
    outcome = call(test_script.main, tmp_path / "c.pth")
    assert outcome.code == 2
    assert outcome.err[0].endswith("c.pth does not say its settings: pass --arch --dataset --leak_mem")


def test_half_precision_is_read_into_single(whole, tmp_path):
    torch.save(halved(whole), tmp_path / "c.pth")
    weight = nets.load(tmp_path / "c.pth").conv1.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, whole["state_dict"]["conv1.weight"].half().float())


def test_early_exit_reads_a_bare_state_dict_too(whole, tmp_path):
    torch.save(whole["state_dict"], tmp_path / "c.pth")
    assert call(early_exit.main, tmp_path / "c.pth", NAMED, "--limit_test 20").result["num_steps"] == 3


def test_what_a_state_dict_does_not_say_is_printed_as_taken(whole, tmp_path):
    torch.save(whole["state_dict"], tmp_path / "c.pth")
    out = call(test_script.main, tmp_path / "c.pth", NAMED, "--limit_test 20").out
    said = "does not say its settings: taken norm bntt, num_steps 3, encoding poisson, norm_stats own"
    assert out[0].endswith(said)


@pytest.mark.parametrize("norm", ["bn", "none", "tdbn", "ln"])
def test_the_norm_of_a_state_dict_is_read_off_its_names_and_its_time_steps_must_be_said(tmp_path, norm):
    net = SpikingVGG("fc3", 3, 0.9, 8, norm=nets.NORMS[norm], in_channels=1)
    torch.save(net.state_dict(), tmp_path / "c.pth")
    flags = "--arch fc3 --dataset digits --leak_mem 0.9 --img_size 8 --device cpu"
    with pytest.raises(UserError, match=r"does not say its settings: pass --num_steps$"):
        test_script.parse_args([str(tmp_path / "c.pth"), *flags.split()])
    args = test_script.parse_args([str(tmp_path / "c.pth"), *flags.split(), "--num_steps", "4"])[0]
    assert (args.norm, args.num_steps) == (norm, 4)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (dict(norm="tebn"), ("tebn", 3, "lif")),
        (dict(norm="tdbn"), ("tdbn", 4, "lif")),
        (dict(norm="ln"), ("ln", 4, "lif")),
        (dict(norm="none", neuron="if", leak=1.0), ("none", 4, "if")),
        (dict(neuron="plif"), ("bntt", 3, "plif")),
        (dict(neuron="learnt_lif"), ("bntt", 3, "learnt_lif")),
    ],
)
def test_norm_and_neuron_of_a_vgg9_are_read_off_the_names_of_its_weights(tmp_path, flags, found):
    torch.save(old_net(arch="vgg9", **flags), tmp_path / "c.pth")
    said = f"--arch vgg9 --dataset digits --leak_mem {flags.get('leak', 0.9)} --img_size 8 --device cpu"
    said += " --num_steps 4" if found[1] == 4 else ""
    args = test_script.parse_args([str(tmp_path / "c.pth"), *said.split()])[0]
    assert (args.norm, args.num_steps, args.neuron) == found


def test_two_tensors_of_one_name_but_for_a_prefix_are_refused(whole, tmp_path):
    state = whole["state_dict"]
    torch.save(state | {"module.conv1.weight": state["conv1.weight"]}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="two of its tensors have the same name"):
        runs.load_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize("value", [SpikingVGG("fc3", 1), {"model": {}, "args": argparse.Namespace(lr=1)}])
def test_a_pickled_net_or_object_is_refused_and_what_to_save_instead_is_said(tmp_path, value):
    torch.save(value, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"was refused: .* perhaps code; save net.state_dict\(\) alone"):
        runs.load_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (2, ": --steps 2 of test.py runs only the first 2 time-steps"),
        (1, ": --steps 1 of test.py runs only the first 1 time-step"),
        (9, ": leave --num_steps out, or train a net of so many with --init_from"),
    ],
)
@pytest.mark.parametrize("main", [test_script.main, early_exit.main])
def test_a_wrong_number_of_time_steps_names_what_to_do(trained, main, steps, words):
    outcome = call(main, trained.checkpoint, "--num_steps", steps)
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert outcome.err[0].endswith(f"it has 3 time-steps with a norm of their own, not {steps}{words}")


# ---- nets.load -----------------------------------------------------------------------------------


def logits(net):
    torch.manual_seed(0)
    with torch.no_grad():
        return net(torch.randn(4, 1, 8, 8))


def test_load_gives_the_net_of_a_run_in_eval_mode_with_the_facts_of_its_data(trained, whole):
    net = nets.load(trained.checkpoint)
    assert not net.training
    assert net.facts._asdict() == whole["data"]
    assert torch.equal(net.state_dict()["fc1.weight"], whole["state_dict"]["fc1.weight"])


@pytest.mark.parametrize("kind", WITHOUT)
def test_load_of_a_state_dict_takes_settings_as_keywords(trained, whole, tmp_path, kind):
    torch.save(WITHOUT[kind](whole["state_dict"]), tmp_path / "c.pth")
    net = nets.load(tmp_path / "c.pth", arch="vgg9", leak_mem=0.95, img_size=8)
    assert net.facts is None
    assert torch.equal(logits(net), logits(nets.load(trained.checkpoint)))


def test_load_runs_the_engine_asked_for(trained):
    assert type(nets.load(trained.checkpoint, engine="plain")) is SpikingVGG


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(), r"does not say its settings: pass arch=..., leak_mem=...$"),
        (dict(arch="vgg9", leak_mem=0.95), "size mismatch for fc1.weight"),
        (dict(arch="vgg9", leak_mem=0.95, img_size=8, num_cls=7), "size mismatch for fc2.weight"),
        (dict(arch="fc3", leak_mem=0.95, img_size=8), "holds another net than fc3"),
        (dict(arch="vgg9", leak_mem=2), r"nets.load: leak_mem: expected a number in \(0, 1\], got '2'"),
        (dict(arch="vgg9", leek=1), "nets.load: unknown key 'leek'"),
        (dict(arch="vgg9", leak_mem=0.95, img_size=8, engine="cuda"), "engine: expected one of auto, plain, fused"),
        (dict(arch="vgg9", leak_mem=0.95, img_size=8, device="gpu"), "no such device"),
        (dict(arch="vgg9", leak_mem=0.95, img_size=8, num_steps=2), "--steps 2"),
    ],
)
def test_load_says_what_is_wrong_in_one_sentence(whole, tmp_path, settings, words):
    torch.save(whole["state_dict"], tmp_path / "c.pth")
    with pytest.raises(UserError, match=words):
        nets.load(tmp_path / "c.pth", **settings)


def test_load_of_ours_knows_its_sizes_and_takes_none(trained):
    with pytest.raises(UserError, match="nets.load: unknown key 'num_cls'"):
        nets.load(trained.checkpoint, num_cls=10)


def test_load_finds_the_home_folder(trained, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(whole, tmp_path / "c.pth")
    assert nets.load("~/c.pth").num_steps == 3


@pytest.mark.parametrize("norm", ["bntt", "bntt_beta", "bn", "tdbn", "tebn", "ln", "none"])
def test_a_state_dict_says_its_norm_in_a_net_of_convolutions_too(norm, tmp_path):
    torch.save(old_net(3, norm, arch="vgg9", channels=3), tmp_path / "c.pth")
    settings = {"num_steps": 3} if norm in ("bn", "tdbn", "ln", "none") else {}
    net = nets.load(tmp_path / "c.pth", arch="vgg9", leak_mem=0.9, img_size=8, **settings)
    assert type(net.bntt1) is type(nets.NORMS[norm](3, 64, True))


# ---- Averaged statistics -------------------------------------------------------------------------


class Doubled(model.SharedBN):
    def forward(self, x, t0=0):
        return 2 * super().forward(x, t0)


class Hidden(torch.nn.Module):
    def __init__(self, num_steps, features, spatial):
        super().__init__()
        self.bn = torch.nn.BatchNorm1d(features)


def test_statistics_are_averaged_without_dropout():
    torch.manual_seed(0)
    images, found = [torch.rand(16, 1, 8, 8)], []
    for neuron in (model.LIF, DropoutLIF):
        torch.manual_seed(1)
        net = SpikingVGG("fc3", 4, img_size=8, in_channels=1, encoding="direct", neuron=neuron)
        precise_bn.average_statistics(net, images)
        found.append([*net.buffers()])
    assert all(map(torch.equal, *found))
    assert found[0][-2].any()


@pytest.mark.parametrize("norm", [Doubled, Hidden])
def test_statistics_of_a_norm_that_does_not_tell_them_are_not_averaged(norm):
    net = SpikingVGG("fc3", 2, img_size=8, in_channels=1, norm=norm)
    with pytest.raises(UserError, match=f"--precise_bn does not know the statistics of {norm.__name__}"):
        precise_bn.average_statistics(net, [torch.rand(4, 1, 8, 8)])


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("limit_train", "x", "limit_train: expected an integer of at least 1"),
        ("limit_train", -3, "limit_train: expected an integer of at least 1"),
        ("val_fraction", "x", "val_fraction: expected a number in [0, 1)"),
        ("augment", "yes", "augment: expected true or false, got 'yes'"),
    ],
)
def test_what_a_checkpoint_says_of_its_training_is_checked(key, value, said):
    with pytest.raises(UserError, match=re.escape(f"the config in x.tar: {said}")):
        training_set.trained_with("x.tar", {"config": {"arch": "vgg9", key: value}})


def test_a_checkpoint_without_settings_saw_all_training_images():
    told = {"limit_train": None, "val_fraction": 0.0, "augment": None, "crop_padding": 4}
    assert training_set.trained_with("x.tar", {}) == told


ALL = "fc1, bntt_fc1, fc2, bntt_fc2, fc3"


# ---- --init_from ---------------------------------------------------------------------------------


def start(tmp_path, checkpoint, flags="", main_flags=FC3):
    """(the lines printed of the weights, the net before training) of train.py --init_from."""
    torch.save(checkpoint, tmp_path / "from.pth")
    seen = {}

    def keep(run, *_):
        seen.update({name: x.clone() for name, x in run.net.state_dict().items()})
        raise UserError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_epoch", keep)
        outcome = call(
            train.main, main_flags, flags, "--run_dir", tmp_path / "run", "--init_from", tmp_path / "from.pth"
        )
    assert outcome.err[0].endswith("seen"), outcome.err
    return [
        line.replace(str(tmp_path), "") for line in outcome.out if line.startswith(("weights", "new", "left"))
    ], seen


def old_net(T=3, norm="bntt", num_cls=10, encoding="poisson", size=8, neuron="lif", arch="fc3", channels=1, leak=0.9):
    """A net as by training: no two of its tensors are alike."""
    torch.manual_seed(9)
    factory = nets.NORMS[norm]
    parts = dict(norm=factory, encoding=encoding, neuron=nets.NEURONS[neuron])
    net = SpikingVGG(arch, T, leak, size, num_cls, in_channels=channels, **parts)
    return {k: torch.rand_like(x) if x.is_floating_point() else x for k, x in net.state_dict().items()}


def test_all_weights_of_an_equal_net_are_taken(tmp_path):
    old = old_net()
    lines, net = start(tmp_path, old)
    assert lines == [f"weights from /from.pth: {ALL}"]
    assert all(torch.equal(net[name], old[name]) for name in net)


@pytest.mark.parametrize("kind", WITH_SETTINGS)
def test_weights_are_taken_from_a_checkpoint_with_prefixes(tmp_path, whole, kind):
    net = start(tmp_path, WITH_SETTINGS[kind](whole), main_flags=FLAGS)[1]
    assert all(torch.equal(x, whole["state_dict"][name]) for name, x in net.items())


@pytest.mark.parametrize("T", [2, 5])
def test_a_norm_of_another_t_has_at_each_step_the_old_one_of_that_step_or_the_last(tmp_path, T):
    old = old_net(T)
    lines, net = start(tmp_path, old)
    assert lines == [f"weights from /from.pth: {ALL}, a norm's time-step t from the old step t, at most {T}"]
    for t in range(3):
        for field in ("weight", "running_mean", "running_var"):
            assert torch.equal(net[f"bntt_fc2.{t}.{field}"], old[f"bntt_fc2.{min(t, T - 1)}.{field}"])


@pytest.mark.parametrize("T", [2, 5])
def test_a_tebn_of_another_t_has_at_each_step_the_old_scale_of_that_step_or_the_last(tmp_path, T):
    old = old_net(T, norm="tebn")
    lines, net = start(tmp_path, old, "--norm tebn")
    assert lines == [f"weights from /from.pth: {ALL}, a norm's time-step t from the old step t, at most {T}"]
    for t in range(3):
        assert torch.equal(net["bntt_fc2.scale"][t], old["bntt_fc2.scale"][min(t, T - 1)])


@pytest.mark.parametrize("norm", ["bn", "tdbn"])
def test_one_batchnorm_becomes_that_of_every_step(tmp_path, norm):
    old = old_net(norm=norm)
    lines, net = start(tmp_path, old)
    assert lines[0].endswith("fc3, the old BatchNorm at every time-step")
    for t in range(3):
        for field in ("weight", "running_mean", "running_var"):
            assert torch.equal(net[f"bntt_fc1.{t}.{field}"], old[f"bntt_fc1.shared.{field}"])


def test_a_beta_that_has_no_place_is_said_to_be_left_out(tmp_path):
    assert start(tmp_path, old_net(norm="tdbn"))[0][1] == "left out: bntt_fc1.bias, bntt_fc2.bias"


def test_bntt_becomes_one_batchnorm_by_the_mean_of_its_steps(tmp_path):
    old = old_net(T=4)
    lines, net = start(tmp_path, old, "--norm bn")
    assert lines == [
        "weights from /from.pth: fc1, bntt_fc1, fc2, bntt_fc2, fc3, each norm the mean of its old time-steps"
    ]
    for field in ("weight", "running_mean", "running_var"):
        mean = torch.stack([old[f"bntt_fc1.{t}.{field}"] for t in range(4)]).mean(0)
        torch.testing.assert_close(net[f"bntt_fc1.shared.{field}"], mean)


def test_a_net_without_norms_gives_its_weights_and_the_norms_are_new(tmp_path):
    lines, net = start(tmp_path, old_net(norm="none"))
    assert lines == ["weights from /from.pth: fc1, fc2, fc3", "new: bntt_fc1, bntt_fc2"]
    assert (net["bntt_fc1.1.weight"] == 1).all()


def test_norms_that_the_net_has_not_are_left_out(tmp_path):
    lines = start(tmp_path, old_net(), "--norm none")[0]
    assert lines == ["weights from /from.pth: fc1, fc2, fc3", "left out: bntt_fc1, bntt_fc2"]


def test_another_number_of_classes_gets_the_readout_of_its_seed(tmp_path):
    lines, net = start(tmp_path, old_net(num_cls=7))
    assert lines[1] == "new: fc3 (fc3.weight is [10, 256], there [7, 256])"
    torch.manual_seed(5)
    fresh = SpikingVGG("fc3", 3, 0.95, 8, in_channels=1)
    assert torch.equal(net["fc3.weight"], fresh.fc3.weight)


def test_images_of_another_size_get_a_new_first_layer(tmp_path):
    assert start(tmp_path, old_net(size=4))[0][1] == "new: fc1 (fc1.weight is [256, 64], there [256, 16])"


def test_a_state_dict_without_readout_is_taken(tmp_path):
    old = old_net()
    del old["fc3.weight"]
    assert start(tmp_path, old)[0][1] == "new: fc3"


def test_another_encoding_and_neuron_take_the_weights(tmp_path):
    lines, net = start(tmp_path, old_net(encoding="direct"), "--neuron plif")
    assert lines[1] == "new: lif_fc1, lif_fc2"
    assert "lif_fc1.w" in net


def test_an_order_of_pixels_that_the_net_has_not_is_left_out(tmp_path):
    old = old_net(T=64, encoding="pixels_permuted")
    assert start(tmp_path, old)[0][1] == "new: fc1 (fc1.weight is [256, 64], there [256, 1]); left out: encoder"


def refused(tmp_path, checkpoint, *flags):
    torch.save(checkpoint, tmp_path / "from.pth")
    outcome = call(train.main, FC3, *flags, "--init_from", tmp_path / "from.pth", "--run_dir", tmp_path / "run")
    assert (outcome.code, len(outcome.err)) == (2, 1)
    assert not (tmp_path / "run").exists()
    return outcome.err[0]


@pytest.mark.parametrize("arch", ["vgg9", "dvs_cnn7"])
def test_weights_of_another_arch_are_refused(tmp_path, arch):
    assert "holds a net of another arch than fc3" in refused(tmp_path, old_net(arch=arch))


def test_a_checkpoint_that_names_another_arch_is_refused_whatever_its_weights(tmp_path, whole):
    other = whole | {"config": whole["config"] | {"arch": "vgg11"}, "state_dict": old_net()}
    assert "holds a net of another arch than fc3" in refused(tmp_path, other)


def test_weights_of_which_none_fits_are_refused(tmp_path):
    none = {k: torch.ones(2, 2) for k in ("fc1.weight", "fc2.weight", "fc3.weight")}
    assert "none of its weights is of a shape that this fc3 has" in refused(tmp_path, none)


def test_starting_weights_that_are_no_checkpoint_are_refused_before_a_run_is_overwritten(tmp_path):
    assert call(train.main, FC3, "--run_dir", tmp_path / "run").code == 0
    before = (tmp_path / "run" / "last.pth.tar").read_bytes()
    outcome = call(train.main, FC3, "--overwrite --init_from", tmp_path / "none", "--run_dir", tmp_path / "run")
    assert outcome.code == 2
    assert (tmp_path / "run" / "last.pth.tar").read_bytes() == before


def test_a_run_may_start_from_the_weights_that_it_overwrites(tmp_path):
    assert call(train.main, FC3, "--run_dir", tmp_path).code == 0
    last = tmp_path / "last.pth.tar"
    outcome = call(train.main, FC3, "--overwrite --run_dir", tmp_path, "--init_from", last)
    assert any(line.startswith(f"weights from {last}: ") for line in outcome.out)
    assert outcome.code == 0


def test_names_in_a_file_do_not_drive_the_terminal(tmp_path):
    lines = start(tmp_path, old_net() | {"a\x1b[2J": torch.ones(1)})[0]
    assert lines[1] == r"left out: a\x1b[2J"


def test_names_of_absurd_time_steps_are_left_out(tmp_path):
    lines = start(tmp_path, old_net() | {f"bntt_fc1.{'9' * 5000}.weight": torch.ones(256)})[0]
    assert lines[1].startswith("left out: bntt_fc1.999")


def test_starting_weights_are_recorded_and_not_loaded_again_by_resume(tmp_path):
    torch.save(old_net(), tmp_path / "from.pth")
    flags = FC3, "--num_epochs 2 --run_dir", tmp_path / "run", "--init_from", tmp_path / "from.pth"
    assert call(train.main, *flags).code == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["init_from"] == str(tmp_path / "from.pth")
    last = runs.load_checkpoint(tmp_path / "run" / "last.pth.tar")["state_dict"]
    (tmp_path / "from.pth").unlink()
    outcome = call(train.main, *flags, "--resume --num_epochs 3")
    assert outcome.code == 0, outcome.err
    assert not [line for line in outcome.out if line.startswith("weights from")]
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 3
    assert not torch.equal(
        last["fc1.weight"], runs.load_checkpoint(tmp_path / "run" / "last.pth.tar")["state_dict"]["fc1.weight"]
    )


def test_training_from_weights_begins_where_they_are(tmp_path, trained):
    """The first epoch of a net that has learnt already is better than that of one that has not."""
    flags = f"{TINY} --dataset digits --limit_train 128 --limit_test 20 --num_epochs 1 --lr 0.002 --run_dir"
    new = call(train.main, flags, tmp_path / "new")
    on = call(train.main, flags, tmp_path / "on", "--init_from", trained.checkpoint)
    assert (new.code, on.code) == (0, 0)
    losses = [json.loads((tmp_path / name / "log.jsonl").read_text())["train_loss"] for name in ("new", "on")]
    assert losses[1] < losses[0] - 0.1


def test_every_kind_of_net_starts_from_every_other(tmp_path):
    """No pair of norms fails, and what was taken and what is new are always said."""
    for old in nets.NORMS:
        torch.save(old_net(T=2, norm=old), tmp_path / f"{old}.pth")
        for new in nets.NORMS:
            args = train.parse_args([*FC3.split(), "--norm", new, "--init_from", str(tmp_path / f"{old}.pth")])
            net = nets.build_net(args, utill.DataFacts(list("0123456789"), 1, 8, [0.5], [0.5]))
            assert nets.init_from(net, args)[0].startswith(f"weights from {Path(args.init_from)}: fc1")


# ---- Where it is measured, and other settings than those of the training ------------------------------


def test_what_is_measured_of_a_net_of_weights_goes_to_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert nets.beside(nets.SHIPPED / "cifar10_vgg9_T4.pth") == Path("runs/cifar10_vgg9_T4")
    assert Path("runs/cifar10_vgg9_T4").is_dir()
    assert nets.beside("somewhere/best.pth.tar") == Path("somewhere")


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ("", 0, None),
        ("--leak_mem 0.5", 0, "not as trained: --leak_mem 0.5, in place of 0.95"),
        ("--norm bn", 2, "was trained with --norm bntt: test it with the same"),
        ("--arch vgg11", 2, "was trained with --arch vgg9: test it with the same"),
    ],
)
def test_a_setting_that_is_not_that_of_the_training_is_told_or_refused(tmp_path, monkeypatch, flags, code, said):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("black.png")
    outcome = call(test_script.main, "--weights", "cifar10_vgg9_T4", "--image", "black.png", *flags.split())
    assert outcome.code == code
    lines = outcome.err if code else outcome.out[:-2]
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]
