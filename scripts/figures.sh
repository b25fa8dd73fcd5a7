#!/usr/bin/env bash
# All that trained nets show: the paper's figures 1 to 8 and more, energy, robustness, exits of each image, one page.
#
#   bash scripts/figures.sh RUN/best.pth.tar                    # figures and analysis.html in RUN
#   OUT=cmp bash scripts/figures.sh A/best.pth.tar B/best.pth.tar --limit_test 2000
#
# Flags after the checkpoints go to analysis.py and win over those here.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;; esac
checkpoints=()
while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do
    checkpoints+=("$1")
    shift
done
[ ${#checkpoints[@]} -gt 0 ] || { echo "figures.sh: error: name the CHECKPOINTs to measure" >&2; exit 2; }
. scripts/venv.sh --quiet
python analysis.py "${checkpoints[@]}" --html --noise 0.05 0.1 0.15 0.2 --fgsm 1 2 4 8 --surrogate_width 0.5 1 2 \
    ${OUT:+--out "$OUT"} "$@"
