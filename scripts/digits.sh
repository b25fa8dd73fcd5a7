#!/usr/bin/env bash
# The quickstart's net with BNTT, one BN and no normalisation, three seeds each: no row of the paper's. Both budgets are
# the same: two CPU cores are enough, and the data are embedded.
#
#   bash scripts/digits.sh
set -euo pipefail
cd "$(dirname "$0")/.."
seeds="0 1 2"
. scripts/rows.sh
rows="bntt bn none"

recipe() { run "digits_vgg9_$1" --config configs/digits_vgg9.yaml --norm "$1"; }
train_rows "$@"
