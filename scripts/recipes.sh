#!/usr/bin/env bash
# The search behind configs/cpu/: one change of configs/cpu/search.yaml a row, judged on the 1,000 images held out. Both
# budgets are the same.
#
#   DATA=data/cifar10 bash scripts/recipes.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/rows.sh
results=${RESULTS:-results}/recipes
pages() { python scripts/make_tables.py --results "$results" --held_out; }
rows="base lr_5e-4 lr_2e-3 wd_0.1 batch_32 batch_128 tet logit_scale_2 gamma_wd_0 smooth_0.1 warm_0.5 sgd_0.1 sgd_0.3"

recipe() {
    local flags=()
    case $1 in
    base) ;;
    lr_*) flags=(--lr "${1#lr_}") ;;
    wd_*) flags=(--weight_decay "${1#wd_}") ;;
    batch_*) flags=(--batch_size "${1#batch_}") ;;
    gamma_wd_*) flags=(--gamma_weight_decay "${1#gamma_wd_}") ;;
    smooth_*) flags=(--label_smoothing "${1#smooth_}") ;;
    warm_*) flags=(--warmup_epochs "${1#warm_}" --lr_schedule cosine_steps) ;;
    tet) flags=(--loss tet) ;;
    logit_scale_*) flags=(--logit_scale "${1#logit_scale_}") ;;
    sgd_*) flags=(--optimizer sgd --weight_decay 0.0005 --lr "${1#sgd_}") ;;
    esac
    run "$1" --config configs/cpu/search.yaml --data_dir "$(lies_in cifar10)" "${flags[@]}"
}
train_rows "$@"
