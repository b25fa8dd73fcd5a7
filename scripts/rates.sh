#!/usr/bin/env bash
# A learning rate for each norm and neuron of the mini tables: 3 epochs of their protocol, judged on 1,000 images held out.
# rows.sh takes the best of each. Both budgets are the same.
#
#   DATA=data/cifar10 bash scripts/rates.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/rows.sh
results=${RESULTS:-results}/rates
pages() { python scripts/make_tables.py --results "$results" --held_out; }
rows=
for rate in 0.03 0.1 0.3; do
    for technique in bntt bn tdbn tebn ln plif_bn none; do rows+=" ${technique}_$rate"; done
done
rows=${rows# }" bntt_1 bn_1 tdbn_1 tebn_1 plif_bn_1 ln_0.01 none_0.01" # beside those that were best at an end of the grid

recipe() {
    local technique=${1%_*} flags=(--norm "${1%_*}")
    [ "$technique" != plif_bn ] || flags=(--neuron plif --norm bn)
    run "$1" --config configs/mini/cifar10_vgg9.yaml --data_dir "$(lies_in cifar10)" --num_epochs 3 \
        --val_fraction 0.02 --limit_test 500 "${flags[@]}" --lr "${1##*_}"
}
train_rows "$@"
