#!/usr/bin/env bash
# Table 2: event data and a 7-layer CNN. The full budget takes DVS-CIFAR10, the mini one a small part of N-MNIST.
#
#   DATA=DIR bash scripts/table2.sh
#   DATA=data/nmnist-small bash scripts/table2.sh --budget mini
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/rows.sh
rows="bntt bn none"

recipe() {
    case $budget in
    full) compare dvs_cifar10_cnn7 "$1" configs/dvs_cifar10_cnn7.yaml --data_dir "$(lies_in dvs-cifar10)" ;;
    mini) compare nmnist_small_cnn7 "$1" configs/nmnist_cnn7.yaml --data_dir "$(lies_in nmnist-small)" --num_epochs 6 ;;
    esac
}
train_rows "$@"
