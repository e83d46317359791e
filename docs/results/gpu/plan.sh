#!/usr/bin/env bash
# All rows, on two GPUs, after unpack.sh: bash docs/results/gpu/plan.sh, which returns at once; then watch.sh.
#
# A lane trains its rows one after the other; each is compared while the next one trains. Text is tokenised first, for
# two minutes, beside the trainer's speed on one GPU, tests and times of the kernels on the other. A row of 100 million tokens
# takes a GPU eleven minutes and two to compare.
cd "$(dirname "$0")/../../.." || exit
long="stages.0.tokens=83886080 stages.1.tokens=16777216"
even='convert.layer_slots=""'
need=0=128,1=32,2=64,3-5=128,6=64,7-8=256,9-10=64,11=32,12=128,13=64,14-15=128,16=64,17-20=256,21-22=128,23=256,24=128,25-26=32,27=128,28-29=64
whole=/root/log/whole.yaml # the same without the ablation
paper="convert.preset=paper convert.eviction=oldest convert.eviction_text=[]"

tokens() {
    python3 -m t2r prepare smollm2-135m-exact source=/root/teacher 'data.train=["/root/data/corpus/train-*.jsonl.zst"]' \
        'convert.eviction_text=[]' 'data.validation=["/root/data/corpus/validation-wiki.jsonl.zst"]' >/root/log/prepare.log 2>&1
}

lane() { # of a GPU: NAME RECIPE key=value ..., one row a line
    while read -r name recipe words; do
        # shellcheck disable=SC2086
        GPU=$1 RECIPE=$recipe bash docs/results/gpu/row.sh "$name" $words &
        until grep -qs " $name: \(trained\|failed\)" /root/log/rows.log; do sleep 1; done
    done
    wait
}

speed() {
    python3 -m t2r convert /root/teacher /root/start --slots 64 --no-verify &&
        python3 docs/results/train_speed.py /root/teacher /root/start /root/log/speed.json --kinds lm --compile --forward 32768
    touch /root/log/speed-done
}

kernels() { # the smallest tiles first, each shape of a compiler's own; without them if they are wrong
    export OMP_NUM_THREADS=1
    tests="python3 -m pytest -n 12 -v -p no:cacheprovider"
    local pids=() fine=1
    for spec in PAPER HARD_CLOCK EVICTING; do
        for size in 3,32 3,64 3,128; do
            PYTHONPATH=$PYTHONPATH:tests python3 -c "if True:
                import torch
                from kernel_cases import *
                compare($spec, torch.bfloat16, 0.02, shape=dict(zip('GM', ($size))) | {'T': 257, 'B': 4, 'H': 3, 'D': 64}, scale=0.125)" &
            pids+=($!)
        done
    done
    for pid in "${pids[@]}"; do wait "$pid" || fine=0; done
    echo "small tiles are fine: $fine"
    [ $fine = 1 ] || sed -i '/Row(90_000, 2, 64, 32,/d' kernels/gsa/tiles.py
    touch /root/log/tiles-done
    python3 -m t2r bench kernels --shape 32,2048,9,3,64,32 --shape 32,2048,9,3,64,64 --out /root/log/bench
    $tests -m gpu tests
    $tests tests/test_kernels.py
}

main() {
    until [ -d /root/teacher ]; do sleep 1; done
    sed '1i ablation: off' t2r/recipes/memory.yaml >$whole
    CUDA_VISIBLE_DEVICES=1 kernels >/root/log/kernels.log 2>&1 &
    CUDA_VISIBLE_DEVICES=0 timeout 330 bash "$0" speed >/root/log/speed.log 2>&1 &
    tokens
    until [ -f /root/log/tiles-done ]; do sleep 1; done
    lane 1 <<ROWS &
64-100m-seed1 $whole $long seed=1
128 $whole convert.slots=128 convert.layer_slots="$need"
hybrid $whole convert.keep_softmax=4,9,14,19,24,29 $even
256 $whole convert.slots=256 $even
ROWS
    until [ -f /root/log/speed-done ] || ! pgrep -f '[g]pu/plan.sh speed' >/dev/null; do sleep 1; done
    lane 0 <<ROWS &
64-100m memory $long
64-30m memory
paper $whole $paper $even
64-10m $whole stages.0.tokens=8388608 stages.1.tokens=2097152
ROWS
    wait
    touch /root/log/all-done
}

case ${1:-} in
main | speed) "$1" ;;
*) setsid nohup bash "$0" main >/root/log/plan.log 2>&1 </dev/null & ;;
esac
