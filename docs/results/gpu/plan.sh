#!/usr/bin/env bash
# All rows, on two GPUs, after unpack.sh: bash docs/results/gpu/plan.sh, which returns at once; then watch.sh.
#
# A lane trains its rows one after the other; each is compared while the next one trains. Text is tokenised first, for
# two minutes, beside the trainer's speed on one GPU, tiles and tests of the kernels on the other. A row of 100 million tokens
# takes a GPU eleven minutes and two to compare.
cd "$(dirname "$0")/../../.." || exit
long="stages.0.tokens=88080384 stages.1.tokens=16777216 stages.0.validate_every=320 stages.1.validate_every=128"
even='convert.layer_slots=""'

tokens() {
    python3 -m t2r prepare smollm2-135m-exact source=/root/teacher 'data.train=["/root/data/corpus/train-*.jsonl.zst"]' \
        'convert.eviction_text=[]' 'data.validation=["/root/data/corpus/validation-wiki.jsonl.zst"]' >/root/log/prepare.log 2>&1
}

lane() { # of a GPU: NAME key=value ..., one row a line
    while read -r name words; do
        # shellcheck disable=SC2086
        GPU=$1 bash docs/results/gpu/row.sh "$name" $words &
        until grep -qs " $name: \(trained\|done\)" /root/log/rows.log; do sleep 1; done
    done
    wait
}

speed() {
    python3 -m t2r convert /root/teacher /root/start --slots 64 --no-verify &&
        python3 docs/results/train_speed.py /root/teacher /root/start /root/log/speed.json --kinds lm --compile --forward 32768
}

kernels() {
    timeout 180 python3 docs/results/kernels/tiles.py /root/log/tiles.json
    OMP_NUM_THREADS=1 python3 -m pytest -n 6 -v -m gpu -p no:cacheprovider tests
}

main() {
    until [ -d /root/teacher ]; do sleep 1; done
    CUDA_VISIBLE_DEVICES=0 speed >/root/log/speed.log 2>&1 &
    CUDA_VISIBLE_DEVICES=1 kernels >/root/log/kernels.log 2>&1 &
    tokens
    need=$(CUDA_VISIBLE_DEVICES=1 OMP_NUM_THREADS=8 python3 -m t2r slots /root/teacher --slots 128 --eviction score \
        --text /root/data/corpus/train-00.jsonl.zst | tee /root/log/slots.log | sed -n 's/.*--layer-slots //p')
    lane 0 <<ROWS &
64-100m $long
hybrid convert.keep_softmax=4,9,14,19,24,29 $even
64-10m stages.0.tokens=8388608 stages.1.tokens=2097152
ROWS
    lane 1 <<ROWS &
64-100m-seed1 $long seed=1
128 convert.slots=128 convert.layer_slots="$need"
paper convert.preset=paper convert.eviction=oldest convert.eviction_text=[] $even
ROWS
    wait
    touch /root/log/all-done
}

if [ "${1:-}" = main ]; then main; else setsid nohup bash "$0" main >/root/log/plan.log 2>&1 </dev/null & fi
