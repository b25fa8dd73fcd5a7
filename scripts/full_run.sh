#!/usr/bin/env bash
# The headline row from end to end: correctness checks, benchmark, VGG9 on CIFAR-10 by the authors' published
# recipe, test and early exit. Run again after a stop, it goes on where it was.
#
#   bash scripts/full_run.sh                          # CIFAR-10, downloaded into ./data; a GPU if there is one
#   bash scripts/full_run.sh cifar10-jpeg.tar.xz      # an archive or folder with train/<class>/ and test/<class>/
#   SEEDS="0 1 2" NAME=cifar10_vgg9_paper bash scripts/full_run.sh "" --weight_decay 5e-4 --num_epochs 120
#   TOY=1 bash scripts/full_run.sh DATA               # the same at toy size: minutes on a CPU
#
# What follows DATA ("" for the download) goes to train.py. Everything lands in $OUT/$NAME, a folder per seed:
# results/cifar10_vgg9 for the download, results/cifar10jpeg_vgg9_T25 for DATA, runs/..._toy for a toy.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh -r requirements-dev.txt
data=${1:-}
shift || true
name=${NAME:-$([ -n "$data" ] && echo cifar10jpeg_vgg9_T25 || echo cifar10_vgg9)}${TOY:+_toy}
out=${OUT:-${TOY:+runs}}
out=${out:-results}/$name
mkdir -p "$out"

flags=(--config configs/cifar10_vgg9.yaml --amp auto --test_display_freq 10 --train_display_freq 1 --save_every 100)
if [ -f "$data" ]; then
    folder=data/$(basename "$data" | sed 's/\.tar.*//')
    if [ ! -d "$folder" ]; then # unpacked aside: a folder cut in the middle is never taken for a whole one
        mkdir -p data
        aside=$(mktemp -d data/.unpack-XXXXXX)
        trap 'rm -rf "$aside"' EXIT
        tar xf "$data" -C "$aside"
        [ -d "$aside/train" ] || mv "$aside"/*/* "$aside" # an archive of one folder
        mv "$aside" "$folder"
    fi
    data=$folder
fi
if [ -n "$data" ]; then
    [ -d "$data/train" ] || { echo "error: $data has no train/<class>/ in it: name an image folder or an archive of one" >&2; exit 2; }
    flags+=(--dataset imagefolder --data_dir "$data")
fi
device=$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
[ "$device" = cuda ] && flags+=(--data_on_device --cuda_graph)
checks=(tests/test_model.py tests/test_fused.py tests/test_fused_triton.py)
bench=(--batch_size 256 --repeats 5 --profile)
if [ -n "${TOY:-}" ]; then
    flags+=(--num_steps 3 --limit_train 512 --limit_test 200 --batch_size 64 --num_epochs 2 --lr 0.05 --num_workers 0)
    checks+=(-k "lif or equals_the_plain_loop")
    bench=(--batch_size 4 --num_steps 3 --repeats 2 --contenders ours-plain ours-fused ours-fused-bf16 --no_memory)
fi

if [ ! -f "$out/checks.txt" ]; then
    python -m pytest -q "${checks[@]}" | tee "$out/checks.tmp"
    mv "$out/checks.tmp" "$out/checks.txt"
fi
if [ ! -f "$out/benchmark.txt" ]; then
    python benchmarks/benchmark.py --device "$device" --out "$out" "${bench[@]}" | tee "$out/benchmark.tmp"
    mv "$out/benchmark.tmp" "$out/benchmark.txt"
fi
for seed in ${SEEDS:-0}; do
    run=$out/seed$seed
    python train.py "${flags[@]}" "$@" --seed "$seed" --run_dir "$run" --resume
    python test.py "$run/best.pth.tar" --repeats 5 | tee "$run/test.txt"
    python early_exit.py "$run/best.pth.tar" --sweep | tee "$run/early_exit.txt"
done
