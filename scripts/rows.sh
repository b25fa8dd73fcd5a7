# Sourced by the scripts that train rows, as table1.sh and claims.sh: reads their flags. Such a script names its $rows,
# defines `recipe` (what one of them trains, at each $budget), $chain where some begin with what the one before left,
# `pages` where it has other pages than the tables, and calls `train_rows "$@"`.
# shellcheck shell=bash
budget=full seeds=${seeds:-0} data=${DATA:-data} results=${RESULTS:-results} chain= workers=${JOBS:-1}

usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    cat <<END

  --budget full|mini   full (default): the paper's recipe, for a GPU; mini: a protocol for 2 CPU cores
  --rows ROW ...       some rows alone, of: $rows
  --seeds "0 1 2"      a run for each seed (default: $seeds)
  DATA=DIR             the data lie, or are downloaded to, DIR/<set> if there is such a folder, else DIR (default: data).
                       CIFAR may be an image tree train/<class>/, test/<class>/, or an archive of one
  RESULTS=DIR          where the runs go (default: results). Paths are from the folder of the README
  FLAGS="--flag ..."   more flags of train.py for every run, as --data_on_device --cuda_graph on a GPU
  JOBS=N               N runs at a time, which share the cores: where one alone does not fill a GPU. Fetch the data before
  WARM=1               one Python process for many runs, which imports and compiles once: where they are short

Run it again after a stop, with the same FLAGS: it goes on. A row that has its result.json is not run again.
END
}

fail() {
    echo "$(basename "$0"): error: $1" >&2
    exit 2
}

read_flags() {
    local chosen=
    while [ $# -gt 0 ]; do
        case $1 in
        -h | --help) usage && exit ;;
        --budget | --seeds | --rows) [ -n "${2:-}" ] || fail "$1 needs a value (--help lists the flags)" ;;
        *) fail "there is no flag $1 (--help lists the flags)" ;;
        esac
        case $1 in
        --budget) budget=$2 ;;
        --seeds) seeds=$2 ;;
        --rows)
            while [ $# -gt 1 ] && [ "${2#-}" = "$2" ]; do
                [[ " $rows " == *" $2 "* ]] || fail "there is no row $2: choose from $rows"
                chosen+=" $2"
                shift
            done
            [ -n "$chosen" ] || fail "--rows needs a value (--help lists the flags)"
            shift
            continue
            ;;
        esac
        shift 2
    done
    rows=${chosen:-$rows}
    case $budget in full | mini) ;; *) fail "--budget is full or mini, got $budget" ;; esac
    [[ $workers =~ ^[1-9][0-9]*$ ]] || fail "JOBS takes a number, 1 or more, got $workers"
    [[ $seeds =~ ^[0-9]+( [0-9]+)*$ ]] || fail "--seeds takes numbers, as in --seeds \"0 1 2\", got $seeds"
}

train_rows() {
    read_flags "$@"
    . scripts/venv.sh --quiet
    [ ! -f "$data" ] || unpack
    local dry=1 jobs= linked=
    for row in $rows; do recipe "$row"; done # what is wrong with a later row is said before the first one is trained
    dry=
    for row in $chain; do [[ " $rows " != *" $row "* ]] || linked+="+$row"; done
    for row in $rows; do
        [[ "$linked+" != *"+$row+"* ]] || row=${linked#+} # these one after the other, where the first of them stands
        [[ " $jobs " = *" $row "* ]] || jobs+=" $row"
    done
    if [ "$workers" = 1 ]; then work; else share_out; fi
    pages
}

work() { # all jobs, or of several workers those that none has taken
    local all=$seeds job
    row= # what is being trained
    for job in $jobs; do
        for seeds in $all; do
            if [ "$workers" -gt 1 ] && ! mkdir "$taken/$job-$seeds" 2>/dev/null; then
                [ -d "$taken/$job-$seeds" ] || fail "cannot write to $taken"
                continue
            fi
            [ -z "${WARM:-}" ] || [ -n "${SERVER_PID:-}" ] || keep_warm
            for row in ${job//+/ }; do recipe "$row"; done
        done
    done
    row=
}

share_out() { # the jobs to $workers processes, which share the cores
    local taken worker pids=() code=0 cores
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > workers ? cores / workers : 1))}
    taken=$(mktemp -d)
    trap "rm -rf '$taken'" EXIT
    set -m # a worker and what it runs are one group of processes, to stop
    trap 'kill -TERM -- $(jobs -p | sed s/^/-/) 2>/dev/null || true' INT TERM HUP
    for ((worker = 1; worker <= workers; worker++)); do
        (
            trap '[ -z "${row:-}" ] || echo "$worker: stopped at $row, seed $seeds" >&2' EXIT
            work
        ) | numbered "$worker" &
        pids+=($!)
    done
    set +m # it would tell of each that ends
    for worker in "${pids[@]}"; do wait "$worker" || code=$?; done
    wait
    trap - INT TERM HUP
    [ "$code" = 0 ] || exit "$code"
}

numbered() { # the lines of a worker
    trap '' INT TERM HUP
    local line
    while IFS= read -r line; do echo "$1: $line"; done
}

keep_warm() { # scripts/serve.py takes the place of python for what trains and reads
    exec 4>&1
    coproc SERVER { python scripts/serve.py 3>&1 1>&4; }
    python() {
        case $1 in train.py | test.py | convert.py | early_exit.py) ;; *) command python "$@" && return || return ;; esac
        printf '%s\0' $# "$@" >&"${SERVER[1]}"
        local code
        read -r code <&"${SERVER[0]}" && return "$code" || fail "scripts/serve.py ended"
    }
}

pages() { python scripts/make_tables.py --results "$results"; } # what the runs say, in Markdown

run() { # the name of the runs, then flags of train.py; {seed} in them is the run's
    [ -z "$dry" ] || return 0
    local name=$1 seed folder
    shift
    for seed in $seeds; do
        folder=$results/$name/seed$seed
        # shellcheck disable=SC2086
        [ -f "$folder/result.json" ] ||
            python train.py "${@//\{seed\}/$seed}" --seed "$seed" --run_dir "$folder" --save_every 100 ${FLAGS:-} --resume
        # of a run that was published without its checkpoint there is nothing to read
        if [ ! -f "$folder/early_exit.json" ] && [ -f "$folder/best.pth.tar" ] && grep -q '^norm: bntt' "$folder/config.yaml"; then
            python early_exit.py "$folder/best.pth.tar" --sweep \
                $(sed -n 's/^limit_test: \([0-9]*\)$/--limit_test \1/p' "$folder/config.yaml") # the images of result.json
        fi
    done
}

convert() { # the names of an ANN's runs and of the runs converted from them, then flags of convert.py
    [ -z "$dry" ] || return 0
    local ann=$1 name=$2 seed folder
    shift 2
    for seed in $seeds; do
        folder=$results/$name/seed$seed
        [ -f "$folder/result.json" ] ||
            python convert.py "$results/$ann/seed$seed/best.pth.tar" "$@" --seed "$seed" --out "$folder" --overwrite
    done
}

compare() { # the name of BNTT's runs, a technique, a config, more flags: the same net and data with that technique
    local name=$1 technique=$2 config=$3
    shift 3
    case $technique in
    bntt) run "$name" --config "$config" "$@" ;;
    plif_bn) run "${name}_plif_bn" --config "$config" --neuron plif --norm bn "$@" ;;
    bn_averaged) run "${name}_bn_averaged" --config "$config" --norm bn --precise_bn 50 "$@" ;;
    ann) run "${name}_ann" --config "${config%.yaml}_ann.yaml" "$@" ;;
    hybrid)
        run "${name}_hybrid" --config "${config%.yaml}_hybrid.yaml" \
            --init_from "$results/${name}_conversion/seed{seed}/best.pth.tar" "$@"
        ;;
    hybrid_scratch) run "${name}_hybrid_scratch" --config "${config%.yaml}_hybrid.yaml" --lr 0.001 "$@" ;; # Adam's own rate
    *) run "${name}_$technique" --config "$config" --norm "$technique" "$@" ;;
    esac
}

cifar() { # cifar10 or cifar100, a technique, more flags
    local set=$1 technique=$2 name=$1 dir config
    shift 2
    dir=$(lies_in "$set")
    set -- --data_dir "$dir" "$@"
    # JPEG changes the pixels: not the published data, and not a run of the paper's row
    if [ -n "$(find -L "$dir/train" -iname '*.jp*g' -print -quit 2>/dev/null)" ]; then
        local classes=("$dir"/train/*/)
        [ "cifar${#classes[@]}" = "$set" ] || fail "$dir holds ${#classes[@]} classes: it is no $set (--rows chooses rows)"
        name+=jpeg
        set -- --dataset imagefolder "$@"
    fi
    case $budget-$set in
    full-cifar10) name+=_vgg9 config=configs/cifar10_vgg9.yaml ;;
    full-cifar100) name+=_vgg11_paper config=configs/cifar100_vgg11_paper.yaml ;;
    mini-cifar10) name+=_mini_vgg9 config=configs/mini/cifar10_vgg9.yaml ;;
    mini-cifar100) name+=_mini_vgg11 config=configs/mini/cifar100_vgg11.yaml ;;
    esac
    case $budget-$technique in
    full-* | *-ann | *-conversion | *-hybrid*) ;;
    *) set -- --lr "$(rate "$technique")" "$@" ;;
    esac
    case $budget-$technique in
    full-conversion)
        convert "${name}_ann" "${name}_conversion" --num_steps 1000 --encoding direct --percentile 99.99 \
            --limit_test 5000 --data_dir "$dir"
        ;;
    mini-conversion)
        convert "${name}_ann" "${name}_conversion" --num_steps 256 --encoding direct --percentile 99.9 \
            --limit_test 1000 --data_dir "$dir"
        ;;
    *) compare "$name" "$technique" "$config" "$@" ;;
    esac
}

rate() { # learning rate of a technique in the mini tables: the best of scripts/rates.sh, on images held out
    case $1 in
    ln) echo 0.03 ;;
    none) echo 0.1 ;;
    *) echo 0.3 ;;
    esac
}

lies_in() { # DATA/<set>, or DATA itself
    if [ -d "$data/$1" ]; then echo "$data/$1"; else echo "$data"; fi
}

unpack() { # $data, an archive, beside itself; aside first, so that half a folder is never taken for a whole one
    local folder=${data%.t*} aside
    [ "$folder" != "$data" ] || fail "$data must be a folder, or end in .tar, .tar.gz, .tar.xz or .tgz"
    if [ ! -d "$folder" ]; then
        aside=$(mktemp -d "$folder.unpack-XXXXXX")
        trap "rm -rf '$aside'" EXIT
        tar xf "$data" -C "$aside" 2>/dev/null || fail "$data is no archive that tar can unpack"
        [ -d "$aside/train" ] || mv "$aside"/*/* "$aside" 2>/dev/null || true # an archive of one folder
        [ -d "$aside/train" ] || fail "$data has no train/<class>/ in it: name an image tree or an archive of one"
        mv "$aside" "$folder"
    fi
    data=$folder
}
