#!/usr/bin/env bash
# The CIFAR-10 nets that come with the code, for a GPU: four time-steps of direct encoding; 25 of Poisson spikes, from the
# weights of the first; ten of Poisson spikes, from scratch. Not the paper's recipe. Both budgets are the same.
#
#   DATA=data/cifar10 FLAGS="--data_on_device --cuda_graph" bash scripts/nets.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/rows.sh
rows="direct_T4 poisson_T25 poisson_T10" chain="direct_T4 poisson_T25"

recipe() {
    local name=cifar10_vgg9_$1 flags=(--config "configs/nets/$1.yaml" --data_dir "$(lies_in cifar10)")
    [ "$1" != poisson_T25 ] || flags+=(--init_from "$results/cifar10_vgg9_direct_T4/seed{seed}/best.pth.tar")
    run "$name" "${flags[@]}"
}
train_rows "$@"
