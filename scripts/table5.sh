#!/usr/bin/env bash
# Table 5: BNTT beside LayerNorm, VGG9 on CIFAR-10. The row of BNTT is that of table 1.
#
#   bash scripts/table5.sh
#   DATA=data/cifar10-jpeg bash scripts/table5.sh --budget mini
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/rows.sh
rows="bntt ln"

recipe() { cifar cifar10 "$1"; }
train_rows "$@"
