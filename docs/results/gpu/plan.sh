#!/usr/bin/env bash
# Rows of the table of smollm2-135m-exact, in their order on as many GPUs as there are, after unpack.sh; then watch.sh:
#
#     bash docs/results/gpu/plan.sh 64-0 64-30m-text 64-30m-calm 64-100m ...        returns at once
#
# Rows of the table take the changes of the better of 64-30m-text and 64-30m-calm, which come before them, and wait for it.
# A row of a GPU begins when the one before it is in its second stage, whose wait for the compiler leaves the GPU idle; it
# is compared while the next one trains. Measured on one H200, seconds: first row after 140; from row to row 30 million tokens
# 330 (128 slots 410), 10 million 150, 1 million 50; a comparison 130 beside a training, of the last row 170; 100 million 820.
cd "$(dirname "$0")/../../.." || exit
even='convert.layer_slots=""'
need=0=128,1=32,2=64,3-5=128,6=64,7-8=256,9-10=64,11=32,12=128,13=64,14-15=128,16=64,17-20=256,21-22=128,23=256,24=128,25-26=32,27=128,28-29=64
whole=/root/log/whole.yaml # the recipe without the ablation, which rows of 31 million tokens with 64 slots have
start=/root/runs/start
text='stages.0.loss.answers=text stages.1.loss.answers=text'
calm="$text stages.0.lr.gates=1e-3 stages.0.warmup_tokens=524288 stages.1.lr.gates=3e-4"
one="stages.0.tokens=1048576 stages.1.tokens=262144" ten="stages.0.tokens=8388608 stages.1.tokens=2097152"
long="stages.0.tokens=83886080 stages.1.tokens=16777216"
slots128="convert.slots=128 convert.layer_slots=\"$need\""

best() { # the changes of whichever of the two was better, once that is known
    case $(python3 docs/results/gpu/best.py 64-30m-text 64-30m-calm 2>>/root/log/best.log) in
    64-30m-text) echo "$text" ;;
    64-30m-calm) echo "$calm" ;;
    esac
}

row() { # NAME -> RECIPE key=value ...
    case $1 in
    64-0) echo "$whole" ;; # the start, untrained
    64-30m) echo memory ;; # as shipped
    64-30m-text) echo "memory $text" ;;
    64-30m-calm) echo "memory $calm" ;;
    64-1m) echo "$whole $one $(best)" ;;
    64-10m) echo "$whole $ten $(best)" ;;
    64-100m) echo "$whole $long $(best)" ;;
    64-100m-seed1) echo "$whole $long seed=1 $(best)" ;;
    128) echo "$whole $slots128 $(best)" ;;
    256) echo "$whole convert.slots=256 $even $(best)" ;;
    hybrid) echo "$whole convert.keep_softmax=4,9,14,19,24,29 $even $(best)" ;;
    paper) echo "$whole convert.preset=paper convert.eviction=oldest convert.eviction_text=[] $even $(best)" ;;
    *) return 1 ;;
    esac
}

begin() { # the start of rows of 64 slots
    python3 -m t2r convert /root/teacher $start --slots 64 --eviction score --eviction-text /root/data/corpus/train-00.jsonl.zst \
        --no-verify --layer-slots "$(sed -n 's/ *layer_slots: \([^ ]*\).*/\1/p' t2r/configs/smollm2-135m-exact.yaml)"
}

lane() { # GPU: takes rows from the queue till it is empty
    while name=$(flock /root/log/lock sh -c 'head -n 1 /root/log/queue; sed -i 1d /root/log/queue') && [ "$name" ]; do
        read -r recipe words < <(row "$name")
        case $name in 64*) export START=$start ;; *) unset START ;; esac
        # shellcheck disable=SC2086
        GPU=$1 RECIPE=$recipe bash docs/results/gpu/row.sh "$name" $words &
        until [ -d "/root/runs/$name/2-distill" ] || grep -qs " $name: \(trained\|failed\)" /root/log/rows.log; do sleep 1; done
    done
    wait
}

tokens() { # what the rows ask for: a row may begin with the first of them
    for kind in '' lookups-again:; do
        python3 -m t2r prepare smollm2-135m-exact source=/root/teacher 'convert.eviction_text=["/root/data/corpus/train-00.jsonl.zst"]' \
            'data.validation=["/root/data/corpus/validation-wiki.jsonl.zst"]' "data.train=[\"$kind/root/data/corpus/train-*.jsonl.zst\"]" \
            data.lookups=0 >"/root/log/prepare-${kind%:}.log" 2>&1 &
    done
}

main() {
    trap 'touch /root/log/all-done' EXIT # also of what failed before any row: watch.sh ends then, and the calls after it
    python3 docs/results/gpu/teacher.py >/root/log/teacher.log 2>&1 || exit
    sed '1i ablation: off' t2r/recipes/memory.yaml >$whole
    printf '%s\n' "$@" >/root/log/queue
    tokens
    begin >/root/log/start.log 2>&1 || exit
    for gpu in $(nvidia-smi -L | sed -n 's/^GPU \([0-9]*\).*/\1/p'); do lane "$gpu" & done
    wait
}

if [ "$1" = main ]; then main "${@:2}"; else
    for name in "$@"; do (best() { :; } && row "$name" >/dev/null) || { echo "no row $name" && exit 1; }; done
    setsid nohup bash "$0" main "$@" >/root/log/plan.log 2>&1 </dev/null &
fi
