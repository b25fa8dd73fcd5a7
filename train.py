"""Train a spiking VGG with BNTT by surrogate-gradient backpropagation through time.

The authors' published commands, and the paper's own recipe as a config:

    python train.py --num_steps 25 --lr 0.3 --arch vgg9 --dataset cifar10 --batch_size 256 \
        --leak_mem 0.95 --num_workers 4 --num_epochs 100
    python train.py --num_steps 30 --lr 0.3 --arch vgg11 --dataset cifar100 --batch_size 128 \
        --leak_mem 0.99 --num_workers 4 --num_epochs 100
    python train.py --config configs/cifar10_vgg9_paper.yaml

A run leaves in its folder: config.yaml, environment.json, log.jsonl (a line an epoch),
TensorBoard events, last.pth.tar, best.pth.tar and result.json. The last line of stdout is
result.json as one line.
"""

import argparse
import functools
import json
import math
import sys
import time

import torch
import torch.nn.functional as F
import yaml
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import arguments
import data
import fused
import utill
from utill import UserError


def parse_args(argv=None):
    parser = arguments.ArgumentParser(__doc__.splitlines()[0])
    arguments.add_net_arguments(parser)
    group = arguments.add_data_arguments(parser, data.DATASETS)
    group.add_argument("--limit_train", default=None, type=arguments.positive_int,
                       help="use so many training images (default: all)")  # fmt: skip
    group.add_argument("--val_fraction", default=0.0, type=arguments.fraction,
                       help="part of the training set held out, to choose the best epoch on")  # fmt: skip
    group.add_argument("--augment", default=None, action=argparse.BooleanOptionalAction,
                       help="random crop and flip (default: as suits the data set)")  # fmt: skip
    arguments.add_run_arguments(parser)
    group = parser.add_argument_group("training")
    group.add_argument("--num_epochs", default=100, type=arguments.positive_int, help="epochs")
    group.add_argument("--lr", default=0.3, type=arguments.positive_float, help="learning rate")
    group.add_argument("--lr_schedule", default="step", choices=["step", "cosine"],
                       help="step: divided by 10 at 50, 70 and 90 %% of the epochs")  # fmt: skip
    group.add_argument("--optimizer", default="sgd", choices=["sgd", "adam", "adamw"], help="optimizer")
    group.add_argument("--momentum", default=0.9, type=arguments.fraction, help="momentum of sgd")
    group.add_argument("--weight_decay", default=1e-4, type=arguments.nonnegative_float, help="weight decay")
    group.add_argument("--data_on_device", action="store_true",
                       help="keep the data set on the device and augment there; no loading processes")  # fmt: skip
    group.add_argument("--cuda_graph", action="store_true",
                       help="replay the training step as one CUDA graph (fused engine on a GPU)")  # fmt: skip
    group.add_argument("--train_display_freq", default=10, type=arguments.positive_int,
                       help="print the training loss every so many epochs")  # fmt: skip
    group.add_argument("--test_display_freq", default=10, type=arguments.positive_int,
                       help="test every so many epochs, and after the last")  # fmt: skip
    group.add_argument("--run_dir", default=None, type=str,
                       help="run folder (default: runs/<dataset>_<arch>_T<steps>_<norm>_seed<seed>)")  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace the run that --run_dir holds")
    return arguments.parse_with_config(parser, argv)


def build_optimizer(net, args):
    if args.optimizer == "sgd":
        return torch.optim.SGD(net.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    return optimizer(net.parameters(), args.lr, weight_decay=args.weight_decay)


def train_step(net, optimizer, scaler, amp, images, labels):
    """Forward, backward, update. Returns (mean loss, number of right answers) as tensors on the device."""
    with utill.autocast(images.device, amp):
        logits = net(images)
    loss = F.cross_entropy(logits.float() if amp != "off" else logits, labels)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), (logits.detach().argmax(1) == labels).sum()


def train_epoch(net, step, loader, device, epoch, args):
    """One pass over the training set with `step(images, labels)`. Returns (mean loss, accuracy in %, images/s)."""
    net.train()
    utill.seed_stream(args.seed, 0, epoch)
    losses, rights, start = utill.AverageMeter(), utill.AverageMeter(), time.perf_counter()
    look_every = 1 if device.type == "cpu" else 20  # reading a number makes a GPU wait
    bar = tqdm(loader, desc=f"epoch {epoch + 1}/{args.num_epochs}", unit="batch", disable=None, leave=False)
    for i, (images, labels) in enumerate(bar, start=1):
        loss, right = step(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))
        losses.update(loss, len(labels))
        rights.update(right / len(labels), len(labels))
        if i % look_every == 0 or i == len(loader):
            mean, acc = float(losses.avg), 100 * float(rights.avg)
            speed = losses.count / (time.perf_counter() - start)
            if not math.isfinite(mean):
                raise UserError(f"the loss became {mean} at epoch {epoch + 1}, step {i}: lower --lr, or check the data")
            bar.set_postfix_str(f"loss {mean:.4f}, acc {acc:.1f} %, {speed:.1f} images/s")
    # weights that are no numbers may hide behind a finite loss: neurons that never fire give logits of zero
    if not all(tensor.isfinite().all() for tensor in net.state_dict().values()):
        raise UserError(f"the weights became infinite or nan in epoch {epoch + 1}: lower --lr, or check the data")
    return mean, acc, speed


def write_scalars(writer, record, gammas, epoch):
    for key, value in record.items():
        if isinstance(value, dict):
            for name, x in value.items():
                writer.add_scalar(f"{key}/{name}", x, epoch)
        elif isinstance(value, float):
            writer.add_scalar(key, value, epoch)
    for name, gamma in gammas.items():
        writer.add_histogram(f"gamma/{name}", gamma, epoch)


@utill.entry_point
def main(argv=None):
    args = parse_args(argv)
    device = utill.pick_device(args.device)
    args.amp = utill.pick_amp(device, args.amp)
    loaders = data.build_loaders(args)
    torch.manual_seed(args.seed)
    net = utill.build_net(args, loaders.img_size, len(loaders.classes), loaders.in_channels).to(device)
    try:
        net.check_input(torch.empty(args.batch_size, loaders.in_channels, *[loaders.img_size] * 2, device="meta"))
    except ValueError as error:
        raise UserError(f"--batch_size {args.batch_size}: {error}") from None
    engine, reason = utill.use_engine(net, args)
    optimizer = build_optimizer(net, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    step = functools.partial(train_step, net, optimizer, scaler, args.amp)
    if args.cuda_graph:
        if device.type != "cuda" or engine != "fused" or args.amp == "fp16" or args.optimizer != "sgd":
            raise UserError("--cuda_graph needs a GPU, the fused engine, --optimizer sgd and --amp bf16 or off")
        step = fused.GraphedStep(step)
    if args.data_on_device:
        for loader in filter(None, (loaders.train, loaders.val, loaders.test)):
            loader.to(device)

    name = f"{args.dataset}_{args.arch}_T{args.num_steps}_{args.norm}_seed{args.seed}"
    run_dir = utill.new_run_dir(args.run_dir or f"runs/{name}", args.overwrite)
    config = {k: v for k, v in vars(args).items() if k not in ("config", "overwrite", "run_dir")}
    utill.write_text(run_dir / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    utill.write_json(run_dir / "environment.json", utill.environment(device, argv, engine=engine, amp=args.amp))
    print(f"run folder {run_dir}; {sum(p.numel() for p in net.parameters()):,} parameters; {device}")
    print(f"engine: {engine}, mixed precision {args.amp}" + (f" (not fused: {reason})" if reason else ""))

    writer, log, start, best = SummaryWriter(run_dir / "tensorboard"), [], time.perf_counter(), None
    for epoch in range(args.num_epochs):
        lr = utill.learning_rate(args.lr, epoch, args.num_epochs, args.lr_schedule)
        for group in optimizer.param_groups:
            if args.cuda_graph and group["lr"] != lr:
                step.forget()  # the graph holds the learning rate it was captured with
                optimizer.zero_grad(set_to_none=True)
            group["lr"] = lr
        loaders.train.set_epoch(epoch)
        loss, acc, speed = train_epoch(net, step, loaders.train, device, epoch, args)
        gammas = net.gammas()
        record = {"epoch": epoch + 1, "lr": lr, "train_loss": loss, "train_acc": acc, "images_per_s": speed}
        record["mean_gamma"] = {layer: gamma.mean().item() for layer, gamma in gammas.items()}
        if loaders.val is not None:
            val = utill.evaluate(net, loaders.val, device, args.seed, amp=args.amp)
            record |= {"val_loss": val.loss, "val_acc": val.top1()}
        last_epoch = epoch + 1 == args.num_epochs
        if (epoch + 1) % args.test_display_freq == 0 or last_epoch:
            with utill.SpikeMeter(net) as meter:
                test = utill.evaluate(net, loaders.test, device, args.seed, amp=args.amp)
            record |= {"test_loss": test.loss, "test_acc": test.top1(), "test_acc5": test.top5()}
            record["spike_rate"] = meter.rates()
        record["seconds"] = time.perf_counter() - start
        log.append(record)

        checkpoint = {
            "global_step": epoch + 1,
            "state_dict": net.state_dict(),
            "accuracy": record.get("val_acc", record.get("test_acc")),
            "config": config,
            "data": {key: getattr(loaders, key) for key in ("classes", "in_channels", "img_size", "mean", "std")},
            "optimizer": optimizer.state_dict(),
        }
        utill.save_checkpoint(run_dir / "last.pth.tar", checkpoint)
        # Never choose by the test set: without a validation set the best epoch is the last one.
        if best is None or loaders.val is None or record["val_acc"] > best["val_acc"]:
            best = record
            utill.save_checkpoint(run_dir / "best.pth.tar", checkpoint)
        utill.write_text(run_dir / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
        write_scalars(writer, record, gammas, epoch + 1)
        if (epoch + 1) % args.train_display_freq == 0 or "test_acc" in record:
            shown = {k: f"{record[k]:.4f}" for k in ("train_loss", "train_acc", "val_acc", "test_acc") if k in record}
            print(f"epoch {epoch + 1}/{args.num_epochs}", *(f"{k} {v}" for k, v in shown.items()), flush=True)
    writer.close()

    if "test_acc" not in best:  # the best epoch was not one of those tested on the way
        net.load_state_dict(utill.load_checkpoint(run_dir / "best.pth.tar")["state_dict"])
        test = utill.evaluate(net, loaders.test, device, args.seed, amp=args.amp)
        best |= {"test_loss": test.loss, "test_acc": test.top1(), "test_acc5": test.top5()}
    result = {
        "dataset": args.dataset, "arch": args.arch, "norm": args.norm, "num_steps": args.num_steps, "seed": args.seed,
        "test_acc": best["test_acc"], "test_acc5": best["test_acc5"], "count": loaders.test.num_images,
        "epoch": best["epoch"], "chosen_by": "last epoch" if loaders.val is None else "validation accuracy",
        "train_images": loaders.train.num_images, "seconds": time.perf_counter() - start, "run_dir": str(run_dir),
    }  # fmt: skip
    utill.write_json(run_dir / "result.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
