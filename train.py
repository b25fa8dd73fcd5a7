"""Train a spiking VGG with BNTT by surrogate-gradient backpropagation through time.

The authors' published commands, and the paper's own recipe as a config:

    python train.py --num_steps 25 --lr 0.3 --arch vgg9 --dataset cifar10 --batch_size 256 \
        --leak_mem 0.95 --num_workers 4 --num_epochs 100
    python train.py --num_steps 30 --lr 0.3 --arch vgg11 --dataset cifar100 --batch_size 128 \
        --leak_mem 0.99 --num_workers 4 --num_epochs 100
    python train.py --config configs/cifar10_vgg9_paper.yaml

A run that was stopped (Ctrl-C, SIGTERM, SIGKILL, a crash) goes on where it was last saved with the
same command and --resume; SIGUSR1 saves at once, --save_every N every N steps.

A run leaves in its folder: config.yaml, environment.json, log.jsonl (a line an epoch),
TensorBoard events, last.pth.tar, best.pth.tar and result.json. The last line of stdout is
result.json as one line.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import sys
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

import arguments
import data
import fused
import nets
import precise_bn
import runs
import training_set
import utill
from arguments import fraction, nonnegative_float, positive_float, positive_int
from utill import UserError


def parse_args(argv=None):
    parser = arguments.ArgumentParser(__doc__.splitlines()[0])
    nets.add_net_arguments(parser)
    add = arguments.add_data_arguments(parser, data.DATASETS).add_argument
    add("--limit_train", default=None, type=positive_int, help="use this many training images (default: all)")
    add("--val_fraction", default=0.0, type=fraction, help="part of the training set that is held out of training")
    best = "best.pth.tar: of the best epoch on the images held out, if any, or of the last"
    add("--best_by", default="val", choices=["val", "last"], help=best)
    crop = "random crop and, except for digits, flip (default: as suits the data set)"
    add("--augment", default=None, action=argparse.BooleanOptionalAction, help=crop)
    pixels = "the crop is out of an image with so many zeros at each side, whatever its size"
    add("--crop_padding", default=data.CROP_PADDING, type=positive_int, metavar="PIXELS", help=pixels)
    arguments.add_run_arguments(parser)
    add = parser.add_argument_group("training").add_argument
    start = "start from these weights, as far as they fit: another T, norm or number of classes"
    add("--init_from", default=None, type=arguments.path, metavar="CHECKPOINT", help=start)
    add("--num_epochs", default=100, type=positive_int, help="epochs; of a run that is resumed, as many or more")
    add("--lr", default=0.3, type=positive_float, help="learning rate")
    falls = "step: divided by 10 at 50, 70 and 90 %% of the epochs; cosine: at each epoch, cosine_steps: at each step"
    add("--lr_schedule", default="step", choices=["step", "cosine", "cosine_steps"], help=falls)
    add("--warmup_epochs", default=0.0, type=nonnegative_float, help="epochs over which lr rises from 0, step by step")
    loss = "cross-entropy: ce of the last output voltage, tet of each step's current"
    add("--loss", default="ce", choices=list(utill.LOSSES), help=loss)
    smooth = "this part of the target is spread over all classes, in training"
    add("--label_smoothing", default=0.0, type=fraction, help=smooth)
    add("--optimizer", default="sgd", choices=["sgd", "adam", "adamw"], help="optimizer")
    add("--momentum", default=0.9, type=fraction, help="momentum of sgd")
    add("--weight_decay", default=1e-4, type=nonnegative_float, help="weight decay")
    own = "weight decay of what a norm learns: gamma (default: that of all)"
    add("--gamma_weight_decay", default=None, type=nonnegative_float, help=own)
    precise = "average running statistics over BATCHES training batches, or all there are, for testing"
    add("--precise_bn", default=None, type=positive_int, metavar="BATCHES", help=precise)
    add("--data_on_device", action="store_true", help="keep the data on the device; no loading processes")
    add("--cuda_graph", action="store_true", help="replay the training step as one CUDA graph, on a GPU")
    add("--train_display_freq", default=10, type=positive_int, help="epochs between prints of the training loss")
    add("--test_display_freq", default=10, type=positive_int, help="epochs between tests; the last is always tested")
    folder = "run folder (default: runs/<dataset>_<arch>_T<steps>_<norm>_seed<seed>)"
    add("--run_dir", default=None, type=arguments.path, help=folder)
    add("--overwrite", action="store_true", help="replace the run that the run folder holds")
    add("--resume", action="store_true", help="go on with the run that the run folder holds, if any")
    every = "save after every STEPS steps, besides at the end of each epoch"
    add("--save_every", default=None, type=positive_int, metavar="STEPS", help=every)
    same = "the same bits in every run on a GPU, at some cost (a CPU gives them anyway)"
    add("--deterministic", action="store_true", help=same)
    parser.needs |= {
        "--momentum": (lambda args: args.optimizer == "sgd", "--optimizer sgd"),
        "--best_by": (lambda args: args.val_fraction, "images held out (--val_fraction)"),
        "--precise_bn": (lambda args: args.norm not in nets.WITHOUT_STATISTICS, "a norm that has running statistics"),
    }
    args = arguments.parse_with_config(parser, argv)
    if args.norm in nets.WITHOUT_STATISTICS:
        args.precise_bn = None  # of configs that ask for it, the rows without are trained too
    if args.warmup_epochs > args.num_epochs:
        raise UserError(f"--warmup_epochs {args.warmup_epochs:g} is more than the --num_epochs {args.num_epochs}")
    if args.label_smoothing and args.loss not in utill.SMOOTHED:
        raise UserError(f"--label_smoothing belongs to --loss {' or '.join(utill.SMOOTHED)}: leave it out")
    return args


def build_optimizer(net, args):
    parameters = list(net.parameters())
    if args.gamma_weight_decay is not None:
        gammas = {p: None for layer in net.layers() for p in layer.norm.parameters()}
        if not gammas:
            raise UserError(f"--gamma_weight_decay: a net with --norm {args.norm} has no gamma: leave it out")
        parameters = [
            {"params": [p for p in parameters if p not in gammas]},
            {"params": list(gammas), "weight_decay": args.gamma_weight_decay},
        ]
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    lr, options = args.lr, {"weight_decay": args.weight_decay}
    if args.optimizer == "sgd":
        options["momentum"] = args.momentum
    if args.cuda_graph:  # the replayed step reads the learning rate where `set_learning_rate` writes it
        lr = torch.tensor(args.lr, device=net.readout.weight.device)
        options |= {"fused": True} if args.optimizer == "sgd" else {"fused": True, "capturable": True}
    return kind(parameters, lr, **options)


def learning_rate(args, epoch, step, steps):
    """That of a step, of `steps` in the epoch, as the flags say."""
    return utill.learning_rate(args.lr, epoch, args.num_epochs, args.lr_schedule, args.warmup_epochs, step, steps)


def set_learning_rate(optimizer, lr):
    """Give it the learning rate of the next step."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def train_step(net, loss, optimizer, scaler, amp, images, labels):
    """Forward, backward, update. Returns tensors on the device: mean loss, right answers, largest gradient, and [L] the
    L2 norm of each gradient of `utill.synaptic_weights`.

    loss: one of utill.LOSSES. On a CPU nothing is updated where loss or gradient is inf or nan; on a GPU asking would
    make it wait.
    """
    with utill.autocast(images.device, amp):
        voltages = net.voltages(images)
    voltages = voltages.float() if amp != "off" else voltages
    mean = loss(voltages, labels)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(mean).backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    largest = torch.nn.utils.get_total_norm(gradients, float("inf"))
    norms = [largest.new_zeros(()) if w.grad is None else w.grad.norm() for w in utill.synaptic_weights(net).values()]
    norms = torch.stack(norms) if norms else largest.new_zeros(0)
    mean = mean.detach()
    if mean.device.type != "cpu" or (mean + largest).isfinite():
        scaler.step(optimizer)
        scaler.update()
    return mean, (voltages[-1].detach().argmax(1) == labels).sum(), largest, norms


def train_epoch(run, step, loader, args, signals):
    """The rest of run.epoch over the training set, with `step(images, labels)`. Returns (mean loss, accuracy in %)."""
    net, device, epoch = run.net, run.device, run.epoch
    net.train()
    loader.set_epoch(epoch, run.step)
    if run.step == 0:
        utill.seed_stream(args.seed, 0, epoch)
        run.losses, run.rights, run.norms = (utill.AverageMeter() for _ in range(3))
        run.epoch_seconds = 0.0
    run.tick()
    look_every = 1 if device.type == "cpu" else 20  # reading a number makes a GPU wait
    worst = torch.zeros((), device=device)
    options = dict(unit="batch", disable=None, leave=False, initial=run.step, total=len(loader))
    with tqdm(loader, desc=f"epoch {epoch + 1}/{args.num_epochs}", **options) as bar:
        for images, labels in bar:
            set_learning_rate(run.optimizer, learning_rate(args, epoch, run.step, len(loader)))
            images, labels = (part.to(device, non_blocking=True) for part in (images, labels))
            loss, right, gradient, norms = step(images, labels)
            run.losses.update(loss, len(labels))
            run.rights.update(right / len(labels), len(labels))
            run.step += 1
            if args.amp != "fp16":  # whose gradients may overflow: the scaler then skips the step
                worst = torch.maximum(worst, gradient)
                norms = norms.double()
                run.norms.update(torch.stack([norms, norms**2]))
            due = args.save_every and run.step % args.save_every == 0
            if run.step % look_every == 0 or due or signals.wanted or run.step == len(loader):
                mean, acc = float(run.losses.avg), 100 * float(run.rights.avg)
                if not math.isfinite(mean) or not math.isfinite(worst):
                    run.check()
                    raise UserError(f"the loss became {mean} at epoch {epoch + 1}, step {run.step}: lower --lr")
                run.epoch_seconds += run.tick()
                speed = run.losses.count / run.epoch_seconds
                bar.set_postfix_str(f"loss {mean:.4f}, acc {acc:.1f} %, {speed:.1f} images/s")
            if due:
                run.save()
            signals.act()
    # where it was resumed after its last step, the optimizer has not got that step's yet
    set_learning_rate(run.optimizer, learning_rate(args, epoch, len(loader) - 1, len(loader)))
    run.check()
    return float(run.losses.avg), 100 * float(run.rights.avg)


def end_epoch(run, loaders, judge, args, signals, mean, acc):
    """The log line of the epoch that has been trained: its validation and, where it is due, its test."""
    steps = len(loaders.train)
    record = {"epoch": run.epoch + 1, "lr": learning_rate(args, run.epoch, steps - 1, steps)}
    record |= {"train_loss": mean, "train_acc": acc}
    record["images_per_s"] = run.losses.count / run.epoch_seconds
    if run.norms.count:
        mean, square = run.norms.avg.cpu()
        spread = (square - mean**2).clamp(min=0).sqrt()
        names = utill.synaptic_weights(run.net)
        record["gradient_norm"] = dict(zip(names, mean.tolist(), strict=True))
        record["gradient_deviation"] = dict(zip(names, spread.tolist(), strict=True))  # from step to step
    record["mean_gamma"] = {layer: gamma.mean().item() for layer, gamma in run.net.gammas().items()}
    if args.precise_bn:
        utill.seed_stream(args.seed, 2, run.epoch)
        loaders.train.set_epoch(run.epoch)
        batches = itertools.islice(loaders.train, args.precise_bn)
        precise_bn.average_statistics(run.net, (images.to(run.device) for images, _ in batches), args.amp)
    how = dict(device=run.device, loss=judge, seed=args.seed, amp=args.amp, progress=signals.watch)
    evaluate = functools.partial(utill.evaluate, run.net, **how)
    if loaders.val is not None:
        val = evaluate(loaders.val)
        record |= {"val_loss": val.loss, "val_acc": val.top1()}
    if (run.epoch + 1) % args.test_display_freq == 0 or run.epoch + 1 == args.num_epochs:
        with utill.SpikeMeter(run.net) as meter:
            test = evaluate(loaders.test)
        record |= {"test_loss": test.loss, "test_acc": test.top1(), "test_acc5": test.top5()}
        record |= {"spike_rate": meter.rates(), "spikes_per_image": meter.per_image()}
    run.tick()
    return record | {"seconds": run.seconds}


def write_config(folder, config):
    flags = {key: value for key, value in config.items() if key != "split_seed"}
    runs.write_text(folder / "config.yaml", yaml.safe_dump(flags, sort_keys=False))


@utill.entry_point
def main(argv=None):
    args = parse_args(argv)
    with runs.Signals() as signals, contextlib.ExitStack() as stack:
        try:
            train(args, argv, signals, stack)
        except fused.NoGraph as error:
            raise UserError(f"--cuda_graph: {error}") from error


def train(args, argv, signals, stack):
    """The run that `args`, parsed from `argv`, ask for, from its data to its result.json.

    stack: an ExitStack, to be closed after the run, that keeps its folder to itself.
    """
    device = utill.pick_device(args.device)
    args.amp = utill.pick_amp(device, args.amp)
    if args.deterministic:
        utill.make_deterministic()
    if args.cuda_graph and (device.type != "cuda" or args.amp == "fp16"):
        raise UserError("--cuda_graph needs a GPU and --amp bf16 or off")
    name = f"{args.dataset}_{args.arch}_T{args.num_steps}_{args.norm}_seed{args.seed}"
    folder = args.run_dir or f"runs/{name}"
    runs.check_folder(folder, args.overwrite, args.resume)  # before the data are read, which may take minutes
    goes_on = args.resume and Path(folder, "last.pth.tar").exists()  # with the weights and the split that it has
    split = training_set.known_split(args, Path(folder, "last.pth.tar") if goes_on else args.init_from, goes_on)
    loaders = data.build_loaders(args, **split)
    torch.manual_seed(args.seed)
    net = nets.build_net(args, loaders.facts).to(device)
    try:
        net.check_input(torch.empty(args.batch_size, *net.encoder.input_shape, device="meta"))
    except ValueError as error:
        raise UserError(f"--batch_size {args.batch_size}: {error}") from None
    if args.num_steps <= (delay := sum(getattr(layer.lif, "delay", 0) for layer in net.layers())):
        raise UserError(f"--num_steps {args.num_steps}: firing first, this net answers after {delay} steps: use more")
    if args.precise_bn:
        precise_bn.check_statistics(net)  # before an epoch is trained
    engine, reason = nets.use_engine(net, args.engine, args.save_memory)
    judge = utill.LOSSES[args.loss](args.logit_scale)
    smooth = {"label_smoothing": args.label_smoothing} if args.label_smoothing else {}
    loss = utill.LOSSES[args.loss](args.logit_scale, **smooth)
    optimizer = build_optimizer(net, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    step = functools.partial(train_step, net, loss, optimizer, scaler, args.amp)
    if args.cuda_graph:
        step = fused.GraphedStep(step)
    if args.data_on_device:
        for loader in filter(None, (loaders.train, loaders.val, loaders.test)):
            loader.to(device)

    told = nets.init_from(net, args) if args.init_from and not goes_on else []
    folder, old = stack.enter_context(runs.run_folder(folder, args.overwrite, args.resume))
    config = {k: v for k, v in vars(args).items() if k not in ("config", "overwrite", "resume", "run_dir")}
    if split.get("split_seed", args.seed) != args.seed:
        config["split_seed"] = split["split_seed"]  # no flag: it follows from --init_from
    constants = {"config": config, "data": loaders.facts._asdict(), "held_out": loaders.held}
    run = runs.Run(net, optimizer, scaler, device, folder, constants)
    environment = runs.environment(device, argv, engine=engine, amp=args.amp, data=loaders.record)
    for other in filter(None, {folder if old else None, args.config and Path(args.config).parent}):
        if changed := runs.changed_versions(other, environment):
            print(f"not as in {other}, so numbers may differ: {changed}")
    if old:
        run.restore(old, vars(parse_args([])), environment)
        write_config(folder, config)
        runs.note_resumed(folder, environment, epoch=run.epoch, step=run.step)
        if run.step == 0 and run.best and run.best["epoch"] == run.epoch:
            runs.save_checkpoint(folder / "best.pth.tar", old)  # it may have been killed before it did
        print(f"resumed after {run.where()}")
        if run.epoch >= args.num_epochs:
            print(f"nothing to do: {run.epoch} epochs are done; a larger --num_epochs would train on")
        elif (before := old["config"].get("num_epochs", args.num_epochs)) < args.num_epochs:
            lr = learning_rate(args, run.epoch, 0, len(loaders.train))
            print(
                f"{args.num_epochs} epochs instead of {before}: the learning rate goes on by the {args.lr_schedule} "
                f"schedule of all {args.num_epochs}, from epoch {run.epoch + 1} with {lr:g}"
            )
            runs.forget_results(folder)  # they would be those of a shorter run
    else:
        print(*told, sep="\n", end="\n" if told else "")
        write_config(folder, config)
        runs.write_json(folder / "environment.json", environment)
    new = "; no run to go on with, a new one begins" if args.resume and not old else ""
    print(f"run folder {folder}{new}; {sum(p.numel() for p in net.parameters()):,} parameters; {device}")
    print(f"engine: {engine}, mixed precision {args.amp}" + (f" (not fused: {reason})" if reason else ""))

    curves = stack.enter_context(runs.curves(folder / "tensorboard", run.epoch + 1))
    by_last = loaders.val is None or args.best_by == "last"
    signals.run = run
    while run.epoch < args.num_epochs:
        record = end_epoch(run, loaders, judge, args, signals, *train_epoch(run, step, loaders.train, args, signals))
        run.epoch, run.step, run.log = run.epoch + 1, 0, [*run.log, record]
        run.accuracy = record.get("val_acc", record.get("test_acc"))
        # Never choose by the test set: without a validation set the best epoch is the last one.
        is_best = run.best is None or by_last or record["val_acc"] > run.best["val_acc"]
        run.best = record if is_best else run.best
        # A run killed before `last` does the end of the epoch again, and writes these two again.
        runs.write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in run.log))
        runs.write_curves(curves, record, net.gammas())
        run.save()
        if is_best:  # after `last`, which so never names an older epoch as the best than this file holds
            run.save("best.pth.tar")
        if run.epoch % args.train_display_freq == 0 or "test_acc" in record:
            keys = [k for k in ("train_loss", "train_acc", "val_acc", "test_acc") if k in record]
            print(f"epoch {run.epoch}/{args.num_epochs}", *(f"{k} {record[k]:.4f}" for k in keys), flush=True)
    signals.run = None  # all is saved: from here on a signal stops it at once

    best = dict(run.best)
    if "test_acc" not in best:  # the best epoch was not one of those tested on the way
        net.load_state_dict(runs.load_checkpoint(folder / "best.pth.tar")["state_dict"])
        test = utill.evaluate(net, loaders.test, device, judge, args.seed, amp=args.amp)
        best |= {"test_loss": test.loss, "test_acc": test.top1(), "test_acc5": test.top5()}
    run.tick()
    result = {
        "dataset": args.dataset, "arch": args.arch, "norm": args.norm, "num_steps": args.num_steps, "seed": args.seed,
        "test_acc": best["test_acc"], "test_acc5": best["test_acc5"], "count": loaders.test.num_images,
        "epoch": best["epoch"], "chosen_by": "last epoch" if by_last else "validation accuracy",
        "train_images": len(loaders.train.keys.indices), "seconds": run.seconds, "run_dir": str(folder),
    }  # fmt: skip
    runs.write_json(folder / "result.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
