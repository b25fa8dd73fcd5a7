#!/usr/bin/env bash
# Table 1: BNTT, one BN for all time-steps, and no normalisation, on CIFAR-10 (VGG9), CIFAR-100 and Tiny-ImageNet (VGG11);
# on CIFAR-10 one BN tested with the average statistics of 50 training batches; the net without spikes, its conversion,
# and hybrid training, each of which starts from the one before; the hybrid's net from scratch.
#
#   bash scripts/table1.sh --rows cifar10_bntt
#   DATA=data/cifar10-jpeg bash scripts/table1.sh --budget mini --rows cifar10_bntt cifar10_bn cifar10_none
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/rows.sh
rows="cifar10_bntt cifar10_bn cifar10_bn_averaged cifar10_none cifar10_ann cifar10_conversion cifar10_hybrid cifar10_hybrid_scratch"
rows+=" cifar100_bntt cifar100_bn cifar100_none"
rows+=" tiny_imagenet_bntt tiny_imagenet_bn tiny_imagenet_none"
chain="cifar10_ann cifar10_conversion cifar10_hybrid"

recipe() {
    local technique=${1##*_}
    case $budget-$1 in
    full-cifar10_none) cifar cifar10 none --num_steps 100 ;; # as in the paper
    *-cifar*) cifar "${1%%_*}" "${1#*_}" ;;
    full-*)
        compare tiny_imagenet_vgg11 "$technique" configs/tiny_imagenet_vgg11.yaml --data_dir "$(lies_in tiny-imagenet)"
        ;;
    mini-*) # a few classes, images and epochs: it runs, no more
        compare tiny_imagenet_mini_vgg11 "$technique" configs/tiny_imagenet_vgg11.yaml \
            --data_dir "$(lies_in tiny-imagenet-mini)" --num_steps 10 --num_epochs 3 --limit_train 800 --limit_test 200 \
            --batch_size 20 --lr 0.1 --lr_schedule cosine --num_workers 0 --amp auto --test_display_freq 1 \
            --train_display_freq 1
        ;;
    esac
}
train_rows "$@"
