#!/usr/bin/env bash
# One row of the table of smollm2-135m-exact, on the GPU machine after unpack.sh: trained, then compared by recipe memory.
#
#     GPU=0 RECIPE=memory TEACHER=/root/teacher [START=FOLDER] bash docs/results/gpu/row.sh NAME [key=value ...]
#
# TEACHER: the original. START: a conversion to begin with, in place of the configuration's own; a NAME that ends in -0
# is it, untrained.
# /root/runs/NAME holds the run, /root/reports/NAME the report, /root/log/NAME.log what was said, /root/log/rows.log when.
# What one comparison has found out about the original the others need not: finished units are gathered in /root/units.
set -u
name=$1
shift
units=/root/reports/.$name.partial/units
found=/root/units/$(basename "$TEACHER")
mkdir -p /root/log /root/runs "$found" "$units"
export CUDA_VISIBLE_DEVICES=${GPU:-0}
words=(source="$TEACHER" device=cuda compare=null convert.verify=false
    'convert.eviction_text=["/root/data/corpus/train-00.jsonl.zst"]' 'data.train=["/root/data/corpus/train-*.jsonl.zst"]'
    'data.validation=["/root/data/corpus/validation-wiki.jsonl.zst"]' data.stream=true stages.0.micro_batch=32 stages.1.micro_batch=4
    stages.0.save_every=0 stages.1.save_every=0)
# to look at held-out text costs a graph of its own and a minute of a row
for stage in 0 1; do words+=(stages.$stage.validation_tokens=0 stages.$stage.validate_every=0); done
say() { echo "$(date +%T) $name: $*" >>/root/log/rows.log; }
compare() {
    cp -n "$found"/*.json "$units"/ 2>/dev/null
    while sleep 5; do cp -n "$units"/*.json "$found"/ 2>/dev/null; done &
    local gather=$!
    python3 -m t2r compare "original=$TEACHER" "$name=/root/runs/$name/model" --recipe "${RECIPE:-memory}" \
        --dtype bfloat16 --data /root/data/eval --device cuda:0,cuda:0 --out "/root/reports/$name"
    say "done, $?"
    kill $gather
    python3 docs/results/gpu/summary.py "/root/reports/$name/report.json" >"/root/log/$name.numbers"
}
train() {
    case $name in
    *-0) mkdir -p "/root/runs/$name" && cp -r "$START" "/root/runs/$name/model" ;;
    *) python3 -m t2r finetune --config smollm2-135m-exact --out "/root/runs/$name" ${START:+--model "$START"} "$@" ;;
    esac
}
{
    say "begins on GPU $CUDA_VISIBLE_DEVICES"
    train "${words[@]}" "$@" && say trained && compare || say failed
} >"/root/log/$name.log" 2>&1
