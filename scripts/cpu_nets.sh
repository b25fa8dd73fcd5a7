#!/usr/bin/env bash
# A CIFAR-10 net that two CPU cores train in two hours: direct encoding, first two time-steps, whose epochs cost half, then
# four from the weights of those. Not the paper's recipe. Both budgets are the same.
#
#   DATA=data/cifar10 bash scripts/cpu_nets.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/rows.sh
rows="T2 T4" chain="T2 T4"

recipe() {
    local name=cifar10_cpu_vgg9 flags=(--config configs/cpu/cifar10_vgg9.yaml --data_dir "$(lies_in cifar10)")
    case $1 in
    T2) flags+=(--num_steps 2 --num_epochs 9 --lr 0.001 --warmup_epochs 0.3) ;;
    T4) flags+=(--init_from "$results/${name}_T2/seed{seed}/best.pth.tar") ;;
    esac
    run "${name}_$1" "${flags[@]}"
}
train_rows "$@"
