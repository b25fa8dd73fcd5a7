#!/usr/bin/env bash
# Section 4.7: the nets of weights/, the net without spikes, and some rows of scripts/claims.sh, where they were trained,
# under noise and attack. Writes RESULTS/claims/robustness/<net>/analysis.json and what results/claims.md says of them.
# A net that was measured is left out.
#
#   DATA=data/cifar10 bash scripts/robustness.sh
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
-h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
?*) echo "robustness.sh: error: it takes no flags, but DATA=DIR and RESULTS=DIR" >&2 && exit 2 ;;
esac
. scripts/venv.sh --quiet
data=${DATA:-data/cifar10} results=${RESULTS:-results}

measure() { # name, images to attack, checkpoint
    local folder=$results/claims/robustness/$1
    if [ ! -f "$folder/analysis.json" ] && [ -f "$3" ]; then
        mkdir -p "$folder"
        cp "$3" "$folder/$1.pth"
        python analysis.py "$folder/$1.pth" --data_dir "$data" --limit_test 1000 --noise 0.05 0.1 0.2 --fgsm 2 4 8 --pgd 2 \
            --draws 2 --surrogate_width 1 2 --attack_images "$2" --amp auto --num_workers 0
        rm "$folder/$1.pth"
    fi
}
measure bntt_T25 100 weights/cifar10_vgg9_T25.pth
measure bntt_T4 100 weights/cifar10_vgg9_T4.pth
measure ann 100 "$results/cifar10_vgg9_ann/seed0/best.pth.tar"
for row in base base_3 none bn ann; do
    nets=("$results/claims/$row"/seed*/best.pth.tar)
    measure "${row}_16" 300 "${nets[0]}" # the first there is
done
python scripts/make_claims.py --results "$results/claims"
