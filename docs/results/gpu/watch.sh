#!/usr/bin/env bash
# Keeps in $OUT what the rows have left so far, for so many seconds or until nothing runs: bash docs/results/gpu/watch.sh 570
#
# The machine goes 30 seconds after a call: ask for all the calls that the rows need at one time, each as long as may be.
# What comes back is small, whatever there is: a file of over 16 MiB is left behind, and with it all that it holds. So of
# a report no answers to single items, and its numbers are said here too (row.sh), should no file arrive.
end=$((SECONDS + ${1:-570}))
touch /tmp/said
while :; do
    cp /root/log/rows.log "$OUT"/ 2>/dev/null
    for part in log reports runs; do
        (cd /root && find $part -path '*.partial' -prune -o -type f -size -2M \
            \( -path 'log/*' -o -name 'report.json' -o -name 'report.md' -o -name '*.png' -o -name 'metrics.jsonl' -o -name 'config.yaml' -o -name 'env.json' \) -print |
            tar -czf "$OUT/.$part" -T - && mv "$OUT/.$part" "$OUT/$part.tgz") 2>/dev/null
    done
    {
        for log in /root/log/*.log; do echo "$(basename "$log"): $(tail -c 300 "$log" | tail -n 1 | cut -c 1-110)"; done
        cat /root/log/*.numbers 2>/dev/null
    } >/tmp/saying
    date +%T
    grep -avxFf /tmp/said /tmp/saying # what is new
    cp /tmp/saying /tmp/said
    ls /root/log/running.* >/dev/null 2>&1 || break
    ((SECONDS + 20 >= end)) && break
    sleep 20
done
