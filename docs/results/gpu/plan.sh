#!/usr/bin/env bash
# The rows of smollm2-135m-exact, on two GPUs, after unpack.sh: bash docs/results/gpu/plan.sh choose (once that has said
# which recipe is best, another time final), which returns at once; then watch.sh.
#
# A row of a lane begins when the one before it is in its second stage, whose wait for the compiler leaves the GPU idle; it
# is compared while the next one trains. Measured, seconds: teacher there after 45, tokens after 160, 100 million tokens
# 820 of which two waits of 60 for the compiler, 30 million 350 (128 slots: 450), a comparison 110 alone and 230 beside a
# training. The start itself is compared while texts are made into tokens.
cd "$(dirname "$0")/../../.." || exit
even='convert.layer_slots=""'
need=0=128,1=32,2=64,3-5=128,6=64,7-8=256,9-10=64,11=32,12=128,13=64,14-15=128,16=64,17-20=256,21-22=128,23=256,24=128,25-26=32,27=128,28-29=64
fit='convert.eviction_text=["/root/data/corpus/train-00.jsonl.zst"]'
whole=/root/log/whole.yaml # the recipe without the ablation, which the first row has
start=/root/runs/start
far=docs/results/memory/far-settings.patch
# what data.lookups=0.2 does, but facts are asked for within 800 tokens only
near='data.train=[] data.lookups=0 data.mix=[{"data":["/root/data/corpus/train-*.jsonl.zst"],"weight":0.8},{"data":["lookups:/root/data/corpus/train-*.jsonl.zst"],"weight":0.2}]'

tokens() { # what the runs of a plan ask for, at the same time: plain text, and with lookups of either kind
    local held='data.validation=["/root/data/corpus/validation-wiki.jsonl.zst"]' kinds=('' lookups-again:) pids=()
    [ "$1" = choose ] && kinds+=(lookups:)
    for kind in "${kinds[@]}"; do
        python3 -m t2r prepare smollm2-135m-exact source=/root/teacher "$fit" "$held" "data.train=[\"$kind/root/data/corpus/train-*.jsonl.zst\"]" \
            data.lookups=0 >"/root/log/prepare-${kind%:}.log" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || return; done
}

begin() { # FOLDER: the start of all rows of 64 slots
    CUDA_VISIBLE_DEVICES=1 OMP_NUM_THREADS=8 python3 -m t2r convert /root/teacher "$1" --slots 64 --eviction score \
        --eviction-text /root/data/corpus/train-00.jsonl.zst --no-verify \
        --layer-slots "$(sed -n 's/ *layer_slots: \([^ ]*\).*/\1/p' t2r/configs/smollm2-135m-exact.yaml)" >"/root/log/$(basename "$1").log" 2>&1
}

begin_far() { # the same with settings of eviction for which attention from far away counts more
    cp -r . /root/far && cd /root/far && { patch -p1 -i "$far" || git apply "$far"; } && PYTHONPATH=$PWD:/tmp/site begin $start-far
}

lane() { # of a GPU: NAME RECIPE key=value ..., one row a line; those of 64 slots have one start
    while read -r name recipe words; do
        case $name in *-far) export START=$start-far ;; 64*) export START=$start ;; *) unset START ;; esac
        # shellcheck disable=SC2086
        GPU=$1 RECIPE=$recipe bash docs/results/gpu/row.sh "$name" $words &
        until [ -d "/root/runs/$name/2-distill" ] || grep -qs " $name: \(trained\|failed\)" /root/log/rows.log; do sleep 1; done
    done
    wait
}

rows() { # of a plan, by lane
    local one="stages.0.tokens=1048576 stages.1.tokens=262144" ten="stages.0.tokens=8388608 stages.1.tokens=2097152"
    local long="stages.0.tokens=83886080 stages.1.tokens=16777216"
    local paper="convert.preset=paper convert.eviction=oldest convert.eviction_text=[] $even"
    local hybrid="convert.keep_softmax=4,9,14,19,24,29 $even"
    local slots128="convert.slots=128 convert.layer_slots=\"$need\"" slots256="convert.slots=256 $even"
    case $1-$2 in
    choose-0) echo "64-30m memory
64-30m-far $whole
64-10m $whole $ten
64-1m $whole $one" ;;
    choose-1) echo "128 $whole $slots128
64-30m-near $whole $near
hybrid $whole $hybrid" ;;
    final-0) echo "64-100m memory $long
256 $whole $slots256" ;;
    final-1) echo "64-100m-seed1 $whole $long seed=1
paper $whole $paper" ;;
    esac
}

main() {
    trap 'touch /root/log/all-done' EXIT # also of what failed before any row: watch.sh ends then, and the calls after it
    python3 docs/results/gpu/teacher.py >/root/log/teacher.log 2>&1 || exit
    sed '1i ablation: off' t2r/recipes/memory.yaml >$whole
    tokens "$1" &
    local tokens=$!
    begin $start || exit
    if [ "$1" = choose ]; then
        (begin_far) || exit
        GPU=1 START=$start RECIPE=$whole bash docs/results/gpu/row.sh 64-0 &
    fi
    wait $tokens || exit
    for gpu in 0 1; do rows "$1" $gpu | lane $gpu & done
    wait
}

if [ "${2:-}" = main ]; then main "$1"; else setsid nohup bash "$0" "$1" main >/root/log/plan.log 2>&1 </dev/null & fi
