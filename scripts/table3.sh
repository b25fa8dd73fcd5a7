#!/usr/bin/env bash
# Table 3: sequential MNIST, a pixel a time-step. A CPU trains BNTT's full row too.
#
#   bash scripts/table3.sh --rows bntt
#   DATA=data/mnist bash scripts/table3.sh --budget mini
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/rows.sh
rows="bntt bn none ln"

recipe() {
    local flags=(--config configs/smnist_fc3.yaml --data_dir "$(lies_in mnist)")
    case $budget-$1 in
    full-bntt) run smnist_fc3_bntt "${flags[@]}" ;;
    full-*) run "smnist_full_fc3_$1" "${flags[@]}" --norm "$1" ;;
    mini-bntt) run smnist_mini_fc3_bntt "${flags[@]}" --num_epochs 2 --limit_train 10000 ;;
    mini-*) run "smnist_fc3_$1" "${flags[@]}" --norm "$1" --num_epochs 2 --limit_train 10000 ;;
    esac
}
train_rows "$@"
