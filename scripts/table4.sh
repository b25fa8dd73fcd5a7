#!/usr/bin/env bash
# Table 4: the ways to use BN in a spiking net, each on the nets and data of table 1: one BN for all time-steps, tdBN,
# TEBN, PLIF neurons with one BN, and BNTT.
#
#   bash scripts/table4.sh --rows cifar10_bn cifar10_tdbn cifar10_plif_bn cifar10_bntt
#   DATA=data/cifar10-jpeg bash scripts/table4.sh --budget mini --rows cifar10_tdbn cifar10_plif_bn
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/rows.sh
rows="cifar10_bn cifar10_bn_averaged cifar10_tdbn cifar10_tebn cifar10_plif_bn cifar10_bntt"
rows+=" cifar100_bn cifar100_tdbn cifar100_tebn cifar100_plif_bn cifar100_bntt"

recipe() { cifar "${1%%_*}" "${1#*_}"; }
train_rows "$@"
