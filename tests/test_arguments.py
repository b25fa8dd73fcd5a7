"""arguments.py: flags, config files and errors, through the parsers of the three scripts."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import TINY, call

import early_exit
import test as test_script
import train
from utill import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PUBLISHED_CIFAR10 = (
    "python train.py --num_steps 25 --lr 0.3 --arch 'vgg9' --dataset 'cifar10' --batch_size 256 --leak_mem 0.95 "
    "--num_workers 4 --num_epochs 100"
)
PUBLISHED_CIFAR100 = (
    "python train.py --num_steps 30 --lr 0.3 --arch 'vgg11' --dataset 'cifar100' --batch_size 128 --leak_mem 0.99 "
    "--num_workers 4 --num_epochs 100"
)


def published(command):
    return train.parse_args(shlex.split(command)[2:])


def config_file(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


# ---- The authors' commands -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "values"),
    [
        (PUBLISHED_CIFAR10, dict(num_steps=25, arch="vgg9", dataset="cifar10", batch_size=256, leak_mem=0.95)),
        (PUBLISHED_CIFAR100, dict(num_steps=30, arch="vgg11", dataset="cifar100", batch_size=128, leak_mem=0.99)),
    ],
)
def test_a_published_command_means_what_it_says(command, values):
    args = vars(published(command))
    assert {key: args[key] for key in values} == values
    assert (args["lr"], args["num_workers"], args["num_epochs"]) == (0.3, 4, 100)


@pytest.mark.parametrize("command", [PUBLISHED_CIFAR10, PUBLISHED_CIFAR100])
def test_what_a_published_command_leaves_out_is_as_in_the_authors_code(command):
    args = published(command)
    assert (args.optimizer, args.momentum, args.weight_decay, args.lr_schedule) == ("sgd", 0.9, 1e-4, "step")
    assert (args.norm, args.encoding, args.spike_order, args.threshold) == ("bntt", "poisson", "integrate_first", 1.0)
    assert (args.val_fraction, args.limit_train, args.limit_test, args.augment) == (0.0, None, None, None)
    assert (args.amp, args.seed, args.train_display_freq, args.test_display_freq) == ("off", 0, 10, 10)


def test_the_authors_other_flags_are_there():
    args = train.parse_args(["--seed", "3", "--train_display_freq", "1", "--test_display_freq", "2"])
    assert (args.seed, args.train_display_freq, args.test_display_freq) == (3, 1, 2)


# ---- Configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_parses_to_what_it_holds(path):
    args = vars(train.parse_args(["--config", str(path)]))
    values = yaml.safe_load(path.read_text())
    assert {key: args[key] for key in values} == values


@pytest.mark.parametrize(
    ("name", "command"), [("cifar10_vgg9", PUBLISHED_CIFAR10), ("cifar100_vgg11", PUBLISHED_CIFAR100)]
)
def test_the_config_as_published_is_the_published_command(name, command):
    by_config = vars(train.parse_args(["--config", str(CONFIGS / f"{name}.yaml")]))
    by_command = vars(published(command))
    differing = {key for key in by_config if by_config[key] != by_command[key]}
    assert differing <= {"config", "norm_stats"}  # the authors' code normalises both sets alike, without a flag


@pytest.mark.parametrize(("name", "epochs", "steps"), [("cifar10_vgg9", 120, 25), ("cifar100_vgg11", 240, 50)])
def test_the_papers_own_recipe_is_a_config(name, epochs, steps):
    args = train.parse_args(["--config", str(CONFIGS / f"{name}_paper.yaml")])
    assert (args.weight_decay, args.num_epochs, args.num_steps) == (5e-4, epochs, steps)


def test_the_command_line_wins_over_the_config(tmp_path):
    config = config_file(tmp_path, "lr: 0.1\nnum_steps: 7\n")
    args = train.parse_args(["--lr", "0.3", "--config", config])  # 0.3 is also the default
    assert (args.lr, args.num_steps) == (0.3, 7)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("lr: 1", "lr", 1.0),
        ("limit_train: null", "limit_train", None),
        ("lr: null", "lr", 0.3),
        ("lr: 5e-4", "lr", 5e-4),  # text to YAML
        ("amp: off", "amp", "off"),  # false to YAML
        ("augment: false", "augment", False),
        ("overwrite: true", "overwrite", True),
    ],
)
def test_config_values_as_people_write_them(tmp_path, text, key, value):
    parsed = getattr(train.parse_args(["--config", config_file(tmp_path, text)]), key)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("flags", "without"),
    [
        ("--optimizer adam --momentum 0.8", "--optimizer sgd"),
        ("--best_by val", "images held out"),
        ("--split_by number", "event data"),
        ("--dataset nmnist --bin_ms=2", "--split_by duration"),
        ("--dataset nmnist --dvs_split first100", "--dataset dvs_cifar10"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused_but_not_in_a_config(flags, without, tmp_path):
    *others, flag = re.split(" (?=--)", flags)
    with pytest.raises(UserError, match=f"{re.split('[ =]', flag)[0]} does nothing without {without}"):
        train.parse_args(flags.split())
    config = config_file(tmp_path, flag.removeprefix("--").replace("=", " ").replace(" ", ": ") + "\n")
    train.parse_args([*" ".join(others).split(), "--config", config])


def test_averaged_statistics_of_a_norm_without_any_are_asked_for_by_a_config_alone(tmp_path):
    config = config_file(tmp_path, "precise_bn: 50\n")
    assert train.parse_args(["--config", config, "--norm", "none"]).precise_bn is None
    with pytest.raises(UserError, match="--precise_bn does nothing without a norm that has running statistics"):
        train.parse_args(["--norm", "none", "--precise_bn", "50"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 0.1", "unknown key 'learning_rate'"),
        ("help: true", "unknown key 'help'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("num_steps: 2.5", "num_steps: expected an integer of at least 1 and at most 10000, got '2.5'"),
        ("num_steps: true", "num_steps: expected an integer of at least 1 and at most 10000, got 'True'"),
        ("num_steps: 0", "num_steps: expected an integer of at least 1 and at most 10000, got '0'"),
        ("leak_mem: 1.5", r"leak_mem: expected a number in \(0, 1\], got '1.5'"),
        ("leak_mem: .nan", r"leak_mem: expected a number in \(0, 1\], got 'nan'"),
        ("lr: [0.3]", r"lr: expected one value, got \[0.3\]"),
        ("lr: 1" + "0" * 400, "lr: expected a positive number"),
        ("lr: 0x" + "f" * 5000, "lr: Exceeds the limit"),
        ("arch: vgg7", "arch: expected one of vgg9, vgg11, dvs_cnn7, fc3, vgg9_ann, vgg11_ann, got 'vgg7'"),
        ("arch: 9", "arch: expected one of vgg9, vgg11, dvs_cnn7, fc3, vgg9_ann, vgg11_ann, got '9'"),
        ("amp: on", "amp: expected one of off, auto, bf16, fp16, got 'True'"),
        ("overwrite: 1", "overwrite: expected true or false, got 1"),
        ("- lr\n- 0.1", "list of `flag: value` lines"),
        ("lr 0.1", "list of `flag: value` lines"),
        ("1: 2", "list of `flag: value` lines"),
        ("", "list of `flag: value` lines"),
        ("lr: 0.1\nnum_steps: 4\nlr: 0.2", "lr stands there twice"),
        ("lr: [0.1", "cannot read .*config.yaml"),
        ("lr: !!python/object/apply:os.getcwd []", "cannot read .*config.yaml"),
    ],
)
def test_a_config_that_is_wrong_is_an_error(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        train.parse_args(["--config", config_file(tmp_path, text)])


def test_a_config_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00lr")
    for name in ("missing.yaml", "", "binary.yaml"):
        with pytest.raises(UserError, match="cannot read"):
            train.parse_args(["--config", str(tmp_path / name)])


# ---- Flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--arch vgg7", "invalid choice: 'vgg7'"),
        ("--dataset imagenet", "invalid choice: 'imagenet'"),
        ("--num_steps 0", "--num_steps: expected an integer of at least 1 and at most 10000, got '0'"),
        ("--num_steps many", "--num_steps: expected an integer of at least 1 and at most 10000, got 'many'"),
        ("--leak_mem 0", r"--leak_mem: expected a number in \(0, 1\], got '0'"),
        ("--leak_mem 1.5", r"--leak_mem: expected a number in \(0, 1\], got '1.5'"),
        ("--leak_mem nan", r"--leak_mem: expected a number in \(0, 1\], got 'nan'"),
        ("--lr inf", "--lr: expected a positive number"),
        ("--lr -1", "--lr: expected a positive number"),
        ("--momentum 1", "--momentum: expected a number in"),
        ("--val_fraction 1", "--val_fraction: expected a number in"),
        ("--weight_decay nan", "--weight_decay: expected a number of at least 0"),
        ("--num_workers -1", "--num_workers: expected an integer of at least 0"),
        ("--seed 99999999999999999999", "--seed: expected an integer"),
        ("--epochs 3", "unrecognized arguments: --epochs 3"),
        ("--num_ep 3", "unrecognized arguments: --num_ep 3"),
        ("--conf digits.yaml", "unrecognized arguments: --conf digits.yaml"),
        ("--config", "--config: expected one argument"),
    ],
)
def test_a_wrong_flag_is_an_error(flags, message):
    with pytest.raises(UserError, match=message):
        train.parse_args(flags.split())


@pytest.mark.parametrize("script", [train, test_script, early_exit], ids=["train", "test", "early_exit"])
def test_help_shows_the_defaults_and_exits_with_0(script):
    outcome = call(script.main, "--help")
    assert (outcome.code, outcome.err) == (0, [])
    text = " ".join(" ".join(outcome.out).split())
    assert "time-steps T (default: 25)" in text
    assert "default: None" not in text


@pytest.mark.parametrize("flags", [["--steps", "0", "x"], ["x", "--steps", "1.5"], ["--repeats", "0", "x"], []])
def test_wrong_flags_of_testing_are_errors_before_the_checkpoint_is_read(flags):
    with pytest.raises(UserError, match=r"--steps|--repeats|required: checkpoint"):
        test_script.parse_args(flags)


# ---- The home folder -----------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("flag", ["data_dir", "run_dir", "init_from"])
@pytest.mark.parametrize("form", ["--{}=~/x", "--{} ~/x"])
def test_a_tilde_is_the_home_folder_in_a_flag_that_names_a_path(home, flag, form):
    assert getattr(train.parse_args(form.format(flag).split()), flag) == str(home / "x")


@pytest.mark.parametrize("flag", ["data_dir", "run_dir", "init_from"])
def test_a_tilde_is_the_home_folder_in_a_config(home, flag):
    (home / "config.yaml").write_text(f"{flag}: ~/x\n")
    assert getattr(train.parse_args(["--config=~/config.yaml"]), flag) == str(home / "x")


def test_a_tilde_is_the_home_folder_of_checkpoint_picture_and_figure(home, trained):
    shutil.copy(trained.checkpoint, home / "c.pth")
    args, _ = test_script.parse_args(["~/c.pth", "--image", "~/a.png", "b~.png", "--data_dir=~/data"])
    assert (args.checkpoint, args.data_dir) == (str(home / "c.pth"), str(home / "data"))
    assert args.image == [str(home / "a.png"), "b~.png"]
    args, _ = early_exit.parse_args(["~/c.pth", "--figure=~/x.png"])
    assert args.figure == str(home / "x.png")


def test_a_tilde_of_nobody_or_within_a_name_stays(home):
    for text in ("~no-such-user/x", "x~", "a/~/b"):
        assert train.parse_args(["--data_dir", text]).data_dir == text


def test_a_run_folder_in_the_home_folder_is_made_there(home, monkeypatch):
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    flags = "--dataset synthetic --arch fc3 --limit_train 16 --limit_test 8 --num_epochs 1 --run_dir=~/run"
    assert call(train.main, TINY, flags).code == 0
    assert (home / "run" / "result.json").exists()
    assert list((home / "elsewhere").iterdir()) == []
