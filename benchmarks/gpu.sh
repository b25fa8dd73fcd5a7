#!/usr/bin/env bash
# All that a GPU is to answer, in calls of a few minutes that can be repeated and go on where the last one stopped.
#
#   BUDGET_S=520 bash benchmarks/gpu.sh                              # again, until it says that all stages are done
#   DATA=data/cifar10 AUTHORS=authors AMP=bf16 bash benchmarks/gpu.sh
#   TOY=1 bash benchmarks/gpu.sh                                     # all of it at toy size on a CPU, in a few minutes
#
# Stages, in this order; each leaves a file when it is done, and is not run again:
#   machine     the two ceilings: a large copy, a large bf16 matrix product
#   profile     time of every pass of every layer beside the bytes and operations it needs; sizes of tiles to choose from
#   benchmark   benchmarks/benchmark.py at batch 256: the authors' code, SpikingJelly by its Triton kernels, ours
#   tests       the Triton passes against the C++ passes and the plain loop (tests/test_fused_triton.py, which is a script)
#   graph       8 eager training steps against 8 of which most are one CUDA graph: the same bits
#   sanitizer   compute-sanitizer's memcheck and racecheck over every kernel at a tiny size, where the tool is installed
#   recipe      the published CIFAR-10 training, one seed, stopped and resumed at the end of each call
#
# It needs Linux, PyTorch 2.11 or newer with Triton and torchvision, a C++ compiler, and the Python packages of
# requirements.txt and pytest; it installs nothing and downloads nothing. The peers are taken where they can be imported
# (requirements-bench.txt); what is missing is left out, in one sentence.
#
#   BUDGET_S=520      seconds of this call; it stops before
#   OUT=results/gpu   where gpu.json (all numbers) and gpu.md (one table) go at the end of each call
#   WORK=runs/gpu     where the stages leave their files: keep it between calls. To repeat a stage, remove its file there
#   PYTHON=python3    the Python that has PyTorch
#   AUTHORS=DIR       a clone of the authors' repository
#   DATA=DIR          CIFAR-10 as published, or an image tree train/<class>/, test/<class>/, or a tar archive of one;
#                     without it the recipe is left out
#   AMP=off           precision of the recipe: off (float32, as published), or bf16 (half the time and memory)
#   PARTS=MB          also cut the recipe's last checkpoint into files of at most so many MB in OUT; put them into
#                     WORK/parts on another machine, and the recipe goes on there
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
-h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
?*) echo "gpu.sh: error: it takes no flags, but the variables that --help names" >&2 && exit 2 ;;
esac
. scripts/rows.sh
export BUDGET_S=${BUDGET_S:-520} OUT=${OUT:-results/gpu} WORK=${WORK:-runs/gpu} TOY=${TOY:-} AUTHORS=${AUTHORS:-}
export PYTHON=${PYTHON:-python3} PARTS=${PARTS:-}
"$PYTHON" -c 'import torch, triton, pytest' || fail "$PYTHON cannot import torch, triton and pytest: name another with PYTHON="
[ -n "$TOY" ] || "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "there is no GPU that PyTorch can use: TOY=1 runs all of it at toy size on a CPU"

dry='' recipe=()
run() { recipe=("$@"); } # rows.sh calls it with the name of a run and the flags of train.py
if [ -n "$TOY" ]; then
    "$PYTHON" benchmarks/gpu.py toy_data >/dev/null
    data=$WORK/toy
    cifar cifar10 bntt --img_size 8 --num_steps 2 --batch_size 4 --num_workers 0 --num_epochs 4 --device cpu --save_every 1
elif [ -n "${DATA:-}" ]; then
    [ ! -f "$data" ] || unpack
    cifar cifar10 bntt --amp "${AMP:-off}" --data_on_device --cuda_graph
fi
BUDGET_S=$((BUDGET_S - SECONDS)) # those that are spent
exec "$PYTHON" benchmarks/gpu.py all ${recipe[@]+"${recipe[@]}"}
