#!/usr/bin/env bash
# One row of the table of smollm2-135m-exact, on the GPU machine after unpack.sh: trained, then compared by recipe memory.
#
#     GPU=0 bash docs/results/gpu/row.sh NAME [key=value ...]
#
#     row.sh 64-100m stages.0.tokens=88080384 stages.1.tokens=16777216          the same with seed=1
#     row.sh 128 convert.slots=128 'convert.layer_slots=""'      row.sh 256 convert.slots=256 'convert.layer_slots=""'
#     row.sh hybrid convert.keep_softmax=4,9,14,19,24,29 'convert.layer_slots=""'
#     row.sh paper convert.preset=paper convert.eviction=oldest 'convert.layer_slots=""' convert.slots=64
#
# /root/runs/NAME holds the run, /root/reports/NAME the report, /root/log/NAME.log what was said. Start it with setsid
# and poll; `t2r prepare` with the same words beforehand (two minutes) keeps tokenising out of the row.
set -u
name=$1 gpu=${GPU:-0}
shift
until [ -d /root/teacher ]; do sleep 1; done
mkdir -p /root/log /root/runs /root/reports
export CUDA_VISIBLE_DEVICES=$gpu
words=(source=/root/teacher device=cuda compare=null convert.verify=false
    'convert.eviction_text=["/root/data/corpus/train-00.jsonl.zst"]' 'data.train=["/root/data/corpus/train-*.jsonl.zst"]'
    'data.validation=["/root/data/corpus/validation-wiki.jsonl.zst"]' stages.0.micro_batch=32 stages.1.micro_batch=4
    stages.0.save_every=0 stages.1.save_every=0)
say() { echo "$(date +%T) $*" >>/root/log/rows.log; }
{
    say "$name: begins on GPU $gpu"
    python3 -m t2r finetune --config "${CONFIG:-smollm2-135m-exact}" --out "/root/runs/$name" "${words[@]}" "$@" &&
        say "$name: trained" &&
        python3 -m t2r compare original=/root/teacher "$name=/root/runs/$name/model" --recipe memory --dtype bfloat16 \
            --data /root/data/eval --device cuda:0,cuda:0 --out "/root/reports/$name"
    say "$name: done, $?"
} >"/root/log/$name.log" 2>&1
