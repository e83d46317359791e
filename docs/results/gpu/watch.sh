#!/usr/bin/env bash
# Keeps in $OUT what the rows have left so far, for so many seconds or until all are done: bash docs/results/gpu/watch.sh 570
#
# The machine goes 30 seconds after a call: ask for all the calls that the rows need at one time, each as long as may be.
for ((left = ${1:-570}; left > 0; left -= 20)); do
    cp /root/log/rows.log "$OUT"/ 2>/dev/null
    # unfinished reports, too: what recipes have measured lies in their units
    tar -czf "$OUT/.all" --exclude=items.jsonl --exclude='*.claim' -C /root log $(cd /root && ls -d reports runs/*/*/metrics.jsonl \
        runs/*/config.yaml 2>/dev/null) 2>/dev/null && mv "$OUT/.all" "$OUT/all.tgz"
    date +%T
    for log in /root/log/*.log; do echo "$(basename "$log"): $(tail -c 300 "$log" | tail -n 1 | cut -c 1-150)"; done
    [ -f /root/log/all-done ] && break
    sleep 20
done
