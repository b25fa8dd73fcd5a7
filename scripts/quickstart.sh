#!/usr/bin/env bash
# Install into .venv, train a spiking VGG9 with BNTT on handwritten digits (embedded: no
# download), test it and read its early exit. About 2 minutes on 2 CPU cores after the install.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
-h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
?*) echo "quickstart.sh: error: it takes no flags" >&2 && exit 2 ;;
esac
. scripts/venv.sh --quiet
run=runs/quickstart
python train.py --config configs/digits_vgg9.yaml --run_dir "$run" --overwrite
python test.py "$run/best.pth.tar" --repeats 3
python early_exit.py "$run/best.pth.tar" --sweep
echo "Figure: $PWD/$run/early_exit.png    Curves: tensorboard --logdir $PWD/$run/tensorboard"
