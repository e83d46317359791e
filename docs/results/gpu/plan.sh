#!/usr/bin/env bash
# The rows of smollm2-135m-exact, after unpack.sh: bash docs/results/gpu/plan.sh all on four GPUs, or first (another time
# second) on two, which returns at once; then watch.sh. What first does not come to at its end is in second again.
#
# A lane trains its rows one after the other; each is compared while the next one trains. Measured, seconds: teacher there
# after 45, tokens after 160, 100 million tokens 820 of which two waits of 60 for the compiler, 30 million 350 (128 slots:
# 450), a comparison 110 alone and 230 beside a training.
cd "$(dirname "$0")/../../.." || exit
even='convert.layer_slots=""'
need=0=128,1=32,2=64,3-5=128,6=64,7-8=256,9-10=64,11=32,12=128,13=64,14-15=128,16=64,17-20=256,21-22=128,23=256,24=128,25-26=32,27=128,28-29=64
fit='convert.eviction_text=["/root/data/corpus/train-00.jsonl.zst"]'
whole=/root/log/whole.yaml # the recipe without the ablation, which the first row has
start=/root/runs/start
# what data.lookups=0.2 does, but facts are asked for within 800 tokens only
near='data.train=[] data.lookups=0 data.mix=[{"data":["/root/data/corpus/train-*.jsonl.zst"],"weight":0.8},{"data":["lookups:/root/data/corpus/train-*.jsonl.zst"],"weight":0.2}]'

tokens() { # what the runs ask for, at the same time: plain text, and with lookups of either kind
    local held='data.validation=["/root/data/corpus/validation-wiki.jsonl.zst"]'
    for kind in '' lookups: lookups-again:; do
        python3 -m t2r prepare smollm2-135m-exact source=/root/teacher "$fit" "$held" "data.train=[\"$kind/root/data/corpus/train-*.jsonl.zst\"]" \
            data.lookups=0 >"/root/log/prepare-${kind%:}.log" 2>&1 &
    done
    wait
}

begin() { # the start of all rows of 64 slots
    CUDA_VISIBLE_DEVICES=1 OMP_NUM_THREADS=8 python3 -m t2r convert /root/teacher $start --slots 64 --eviction score \
        --eviction-text /root/data/corpus/train-00.jsonl.zst --no-verify \
        --layer-slots "$(sed -n 's/ *layer_slots: \([^ ]*\).*/\1/p' t2r/configs/smollm2-135m-exact.yaml)" >/root/log/start.log 2>&1
}

lane() { # of a GPU: NAME RECIPE key=value ..., one row a line; those of 64 slots have one start
    while read -r name recipe words; do
        case $name in 64*) export START=$start ;; *) unset START ;; esac
        # shellcheck disable=SC2086
        GPU=$1 RECIPE=$recipe bash docs/results/gpu/row.sh "$name" $words &
        until grep -qs " $name: \(trained\|failed\)" /root/log/rows.log; do sleep 1; done
    done
    wait
}

rows() { # of a plan, by lane
    local long="stages.0.tokens=83886080 stages.1.tokens=16777216"
    local paper="convert.preset=paper convert.eviction=oldest convert.eviction_text=[]"
    case $1-$2 in
    all-0) echo "64-100m memory $long
64-10m $whole stages.0.tokens=8388608 stages.1.tokens=2097152
64-1m $whole stages.0.tokens=1048576 stages.1.tokens=262144" ;;
    all-1) echo "64-100m-seed1 $whole $long seed=1
hybrid $whole convert.keep_softmax=4,9,14,19,24,29 $even" ;;
    all-2) echo "64-30m memory
64-30m-near $whole $near
paper $whole $paper $even" ;;
    all-3) echo "64-0 $whole
128 $whole convert.slots=128 convert.layer_slots=\"$need\"
256 $whole convert.slots=256 $even" ;;
    first-0) echo "64-100m memory $long
64-30m memory
64-10m $whole stages.0.tokens=8388608 stages.1.tokens=2097152" ;;
    first-1) echo "64-100m-seed1 $whole $long seed=1
128 $whole convert.slots=128 convert.layer_slots=\"$need\"
64-1m $whole stages.0.tokens=1048576 stages.1.tokens=262144" ;;
    second-0) echo "paper $whole $paper $even
256 $whole convert.slots=256 $even" ;;
    second-1) echo "hybrid $whole convert.keep_softmax=4,9,14,19,24,29 $even
64-10m $whole stages.0.tokens=8388608 stages.1.tokens=2097152
64-1m $whole stages.0.tokens=1048576 stages.1.tokens=262144" ;;
    esac
}

main() {
    until [ -d /root/teacher ]; do sleep 1; done
    sed '1i ablation: off' t2r/recipes/memory.yaml >$whole
    begin &
    tokens # and begin, which has begun before
    for gpu in 0 1 2 3; do rows "$1" $gpu | lane $gpu & done
    wait
    touch /root/log/all-done
}

if [ "${2:-}" = main ]; then main "$1"; else setsid nohup bash "$0" "$1" main >/root/log/plan.log 2>&1 </dev/null & fi
