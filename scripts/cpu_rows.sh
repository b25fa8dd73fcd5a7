#!/usr/bin/env bash
# The runs that a CPU can train, into results/ (see results/README.md). Run again after a stop, it goes on.
#
#   bash scripts/cpu_rows.sh digits                            # 3 seeds x bntt, bn, none: 20 minutes on 2 cores
#   bash scripts/cpu_rows.sh smnist                            # MNIST in data/mnist, or downloaded there: an hour
#   bash scripts/cpu_rows.sh nmnist tiny_imagenet cifar10jpeg  # data in data/nmnist-small, data/tiny-imagenet-mini
#                                                              # and data/cifar10-jpeg: 20, 15 and 30 minutes
#
# DATA=DIR looks for the data in DIR instead of data, RESULTS=DIR writes the runs there.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh --quiet
data=${DATA:-data}
results=${RESULTS:-results}

row() { # folder of the run, flags
    local run=$results/$1
    shift
    [ -f "$run/result.json" ] || python train.py "$@" --run_dir "$run" --save_every 20 --resume
    # a published run brings no checkpoint
    if [ ! -f "$run/early_exit.json" ] && [ -f "$run/best.pth.tar" ] && grep -q '^norm: bntt' "$run/config.yaml"; then
        python early_exit.py "$run/best.pth.tar" --sweep \
            $(sed -n 's/^limit_test: \([0-9]*\)$/--limit_test \1/p' "$run/config.yaml") # the images of result.json
    fi
}

for name in "$@"; do
    case $name in
    digits)
        for seed in 0 1 2; do
            for norm in bntt bn none; do
                row "digits_vgg9_$norm/seed$seed" --config configs/digits_vgg9.yaml --norm $norm --seed $seed
            done
        done
        ;;
    smnist)
        row smnist_fc3_bntt/seed0 --config configs/smnist_fc3.yaml --data_dir "$data/mnist"
        for norm in none bn; do
            row smnist_fc3_$norm/seed0 --config configs/smnist_fc3.yaml --data_dir "$data/mnist" --norm $norm \
                --num_epochs 2 --limit_train 10000
        done
        ;;
    nmnist)
        row nmnist_small_cnn7/seed0 --config configs/nmnist_cnn7.yaml --data_dir "$data/nmnist-small" --num_epochs 6
        ;;
    tiny_imagenet)
        row tiny_imagenet_mini_vgg11/seed0 --config configs/tiny_imagenet_vgg11.yaml \
            --data_dir "$data/tiny-imagenet-mini" --num_steps 10 --num_epochs 3 --batch_size 20 --lr 0.1 \
            --limit_train 800 --limit_test 200 \
            --lr_schedule cosine --num_workers 0 --amp auto --test_display_freq 1 --train_display_freq 1
        ;;
    cifar10jpeg)
        row cifar10jpeg_vgg9_T10_10k/seed0 --config configs/cifar10_vgg9.yaml --dataset imagefolder \
            --data_dir "$data/cifar10-jpeg" --num_steps 10 --limit_train 10000 --limit_test 2000 --num_epochs 4 \
            --batch_size 50 --lr 0.1 --lr_schedule cosine --amp auto --num_workers 0 --train_display_freq 1 \
            --test_display_freq 1
        ;;
    *)
        echo "error: $name is none of digits, smnist, nmnist, tiny_imagenet, cifar10jpeg" >&2
        exit 2
        ;;
    esac
done
python scripts/make_tables.py
