#!/usr/bin/env bash
# Rows of the table of smollm2-135m-exact, in their order on as many GPUs as there are, after unpack.sh; then watch.sh:
#
#     bash docs/results/gpu/plan.sh 128 256 hybrid gemma ...        returns at once
#
# A row of a GPU begins when the one before it is in its second stage, whose wait for the compiler leaves the GPU idle; it
# is compared while the next one trains. Measured on one H200, seconds: first row after 140; from row to row 30 million
# tokens 330 (128 slots 410, 256 some 800), 10 million 150, 1 million 50, 100 million 820; a comparison 130 beside a
# training, of the last row 170.
cd "$(dirname "$0")/../../.." || exit
even='convert.layer_slots=""'
need=0=128,1=32,2=64,3-5=128,6=64,7-8=256,9-10=64,11=32,12=128,13=64,14-15=128,16=64,17-20=256,21-22=128,23=256,24=128,25-26=32,27=128,28-29=64
whole=/root/log/whole.yaml # the recipe without the ablation, which rows of 31 million tokens with 64 slots have
start=/root/runs/start
one="stages.0.tokens=1048576 stages.1.tokens=262144" ten="stages.0.tokens=8388608 stages.1.tokens=2097152"
long="stages.0.tokens=83886080 stages.1.tokens=16777216"

row() { # NAME -> RECIPE key=value ...
    case $1 in
    64-0) echo "$whole" ;; # the start, untrained
    64-1m) echo "$whole $one" ;;
    64-10m) echo "$whole $ten" ;;
    64-30m) echo memory ;; # as shipped
    64-30m-seed1) echo "$whole seed=1" ;;
    64-100m) echo "$whole $long" ;;
    64-100m-seed1) echo "$whole $long seed=1" ;;
    128) echo "$whole convert.slots=128 convert.layer_slots=\"$need\"" ;;
    256) echo "$whole convert.slots=256 $even" ;;
    hybrid) echo "$whole convert.keep_softmax=4,9,14,19,24,29 $even" ;;
    paper) echo "$whole convert.preset=paper convert.eviction=oldest convert.eviction_text=[] $even" ;;
    gemma) echo "memory convert.layer_slots=\"$(sed -n 's/.*--layer-slots //p' /root/log/gemma-slots.log)\"" ;;
    *) return 1 ;;
    esac
}

begin() { # the start of rows of 64 slots
    python3 -m t2r convert /root/teacher $start --slots 64 --eviction score --eviction-text /root/data/corpus/train-00.jsonl.zst \
        --no-verify --layer-slots "$(sed -n 's/ *layer_slots: \([^ ]*\).*/\1/p' t2r/configs/smollm2-135m-exact.yaml)"
}

lane() { # GPU: takes rows from the queue till it is empty, once kernels.sh has left the GPU
    while grep -qsx "$1" /root/log/running.kernels; do sleep 1; done
    while name=$(flock /root/log/lock sh -c 'head -n 1 /root/log/queue; sed -i 1d /root/log/queue') && [ "$name" ]; do
        case $name in 64*) export START=$start ;; *) unset START ;; esac
        case $name in gemma*) export TEACHER=/root/gemma ;; *) export TEACHER=/root/teacher ;; esac
        until [ -f /root/log/$(basename $TEACHER).ready ]; do sleep 1; done
        read -r recipe words < <(row "$name")
        # shellcheck disable=SC2086
        GPU=$1 RECIPE=$recipe bash docs/results/gpu/row.sh "$name" $words &
        until [ -d "/root/runs/$name/2-distill" ] || grep -qs " $name: \(trained\|failed\)" /root/log/rows.log; do sleep 1; done
    done
    wait
}

tokens() { # ORIGINAL: what its rows ask for; a row may begin with the first of them
    for kind in '' lookups-again:; do
        python3 -m t2r prepare smollm2-135m-exact "source=$1" 'convert.eviction_text=["/root/data/corpus/train-00.jsonl.zst"]' \
            'data.validation=["/root/data/corpus/validation-wiki.jsonl.zst"]' "data.train=[\"$kind/root/data/corpus/train-*.jsonl.zst\"]" \
            data.lookups=0 >"/root/log/prepare-$(basename "$1")-${kind%:}.log" 2>&1 &
    done
}

original() { # NAME FOLDER
    python3 docs/results/gpu/teacher.py "$1" "$2" >"/root/log/$(basename "$2").log" 2>&1 && tokens "$2"
}

gemma() { # with the numbers of slots that its layers need
    original gemma /root/gemma && python3 -m t2r slots /root/gemma --slots 64 --eviction score \
        --text /root/data/corpus/train-00.jsonl.zst >/root/log/gemma-slots.log 2>&1
    touch /root/log/gemma.ready
}

main() {
    trap 'rm -f /root/log/running.plan' EXIT
    sed '1i ablation: off' t2r/recipes/memory.yaml >$whole
    printf '%s\n' "$@" >/root/log/queue
    case $* in *gemma*) gemma & ;; esac
    original SmolLM2 /root/teacher && begin >/root/log/start.log 2>&1 || exit
    touch /root/log/teacher.ready
    for gpu in $(nvidia-smi -L | sed -n 's/^GPU \([0-9]*\).*/\1/p'); do lane "$gpu" & done
    wait
}

if [ "$1" = main ]; then main "${@:2}"; else
    for name in "$@"; do row "$name" >/dev/null 2>&1 || { echo "no row $name" && exit 1; }; done
    touch /root/log/running.plan
    setsid nohup bash "$0" main "$@" >/root/log/plan.log 2>&1 </dev/null &
fi
