#!/usr/bin/env bash
# Claims of the paper put to the test on CIFAR-10 at 16x16, and what results/claims.md says of them. Both budgets are the same.
#
#   DATA=data/cifar10 bash scripts/claims.sh --rows gamma_0 gamma_3.05 gamma_18.3
set -euo pipefail
cd "$(dirname "$0")/.."
seeds="0 1 2"
. scripts/rows.sh
results=${RESULTS:-results}/claims
pages() { python scripts/make_claims.py --results "$results"; }
# gamma_E: weight decay shrinks a gamma without gradient by exp(-E): 0, 3.05 (the published command), 18.3 (the paper's text)
rows="gamma_0 gamma_3.05 gamma_18.3 fire_first fire_first_3.05 base hard_reset alpha_0.1 alpha_1 beta dropout_0.2 tet logits_sum none bn"
rows+=" T4 T6 T10 T25 T50 T100 direct_T4 direct_T6 direct_T12 direct_T25 binary_T4 binary_T6 binary_T12 binary_T25"
rows+=" bn_T10 bn_T25 bn_T50 bn_T100"
rows+=" base_3 ann" # about as accurate as none, and as base without spikes: for scripts/robustness.sh
rows+=" conversion hybrid hybrid_scratch"
chain="ann conversion hybrid"
rows+=" published_gamma_0 published" # the longer test: the published command, but at 16x16, without decay on gammas and with it

recipe() {
    local flags=(--config configs/claims/base.yaml)
    case $1 in
    gamma_* | fire_first*) flags=(--config configs/claims/gamma.yaml) ;;
    published*) flags=(--config configs/cifar10_vgg9.yaml --img_size 16) ;;
    esac
    case $1 in
    gamma_0) flags+=(--gamma_weight_decay 0) ;;
    gamma_3.05) flags+=(--gamma_weight_decay 0.0021786) ;; # 3.05 (1 - momentum) / the sum of the learning rates, 140
    gamma_18.3) flags+=(--gamma_weight_decay 0.0130714) ;;
    published) flags+=(--gamma_weight_decay 0.0001) ;; # what its --weight_decay is, named for the pages
    published_gamma_0) flags+=(--gamma_weight_decay 0) ;;
    fire_first) flags+=(--spike_order fire_first) ;;
    fire_first_3.05) flags+=(--spike_order fire_first --gamma_weight_decay 0.0021786) ;;
    hard_reset | alpha_* | dropout_*) flags+=(--neuron "$1") ;;
    beta) flags+=(--norm bntt_beta) ;;
    tet) flags+=(--loss tet) ;;
    logits_sum) flags+=(--logit_scale 12) ;; # T: the voltage after T steps itself, as in eq. 5
    none | bn) flags+=(--norm "$1") ;;
    base_3) flags+=(--num_epochs 3) ;;
    conversion)
        convert ann conversion --num_steps 32 --encoding direct --percentile 99.9 --limit_test 1000 \
            --data_dir "$(lies_in cifar10)"
        return
        ;;
    hybrid*)
        flags+=(--encoding direct --norm none --neuron learnt_lif --leak_mem 0.99 --optimizer adam --weight_decay 0.0001)
        ;;&
    hybrid) flags+=(--lr 0.0001 --init_from "$results/conversion/seed{seed}/best.pth.tar") ;;
    ann) flags+=(--arch vgg9_ann --num_steps 1 --dropout 0.2 --num_epochs 8) ;;
    bn_T*) flags+=(--norm bn --num_steps "${1#bn_T}") ;;
    T*) flags+=(--num_steps "${1#T}") ;;
    direct_T*) flags+=(--encoding direct --num_steps "${1#direct_T}") ;;
    binary_T*) flags+=(--encoding poisson_binary --num_steps "${1#binary_T}") ;;
    esac
    run "$1" "${flags[@]}" --data_dir "$(lies_in cifar10)"
    case $1 in
    base | bn | bn_*) averaged "$1" ;;
    esac
}

averaged() { # accuracy with statistics averaged over 50 training batches, all time-steps alike
    [ -z "$dry" ] || return 0
    local seed folder
    for seed in $seeds; do
        folder=$results/$1/seed$seed
        [ -f "$folder/averaged.json" ] || [ ! -f "$folder/best.pth.tar" ] || {
            python test.py "$folder/best.pth.tar" --precise_bn 50 --out "$folder/averaged.json" \
                $(sed -n 's/^limit_test: \([0-9]*\)$/--limit_test \1/p' "$folder/config.yaml") # the images of result.json
        }
    done
}
train_rows "$@"
