#!/usr/bin/env bash
# What is to be measured of kernels and trainer on a GPU with nothing else on it, after unpack.sh; then watch.sh:
#
#     bash docs/results/gpu/kernels.sh GPU bench peer speed counters ...        returns at once
#
# Parts are the functions below, in the order they are named; at most, in seconds: bench 300, peer 600 (most of it fla's own
# tuning), speed 400, counters 150, parts 120, tiles 200, waits 1,000. plan.sh has no row on the GPU until they are done; it
# converts on GPU 0, so beside it name another.
cd "$(dirname "$0")/../../.." || exit
log=/root/log
shape='--shape 8,2048,32,8,128,64'

parts() { # time and memory of the first shape by the bytes of scratch that backward may have
    python3 - <<'PYTHON'
import json
import torch
from t2r import bench
from t2r.kernels.gsa import launch

copied = bench.copy_bandwidth()
for mib in (180, 290, 400, 768):
    launch.SCRATCH = mib * 2**20
    for gates in bench.GATES:
        args, spec = bench.inputs(bench.SHAPES[0], gates), bench.spec_of(gates, 64)
        row = bench.time_one(bench.SHAPES[0], gates, lambda args: bench.ours(args, spec, "triton"), args, copied)
        print(json.dumps({"scratch_mib": mib, **vars(row)}), flush=True)
        del args
        torch.cuda.empty_cache()
PYTHON
}

start() { # a model of SmolLM2's shape, its weights random, and its conversion
    python3 - <<'PYTHON'
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a").save_pretrained("/root/original")
config = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, rope_theta=100000.0,
)
LlamaForCausalLM(config).save_pretrained("/root/original")
PYTHON
    python3 -m t2r convert /root/original /root/start --slots 64 --no-verify
}

counters() { # of every kernel of both passes, and of decode
    timeout 150 ncu --log-file $log/ncu.csv --clock-control none --set full -c 40 --csv --page raw \
        -k 'regex:^(gates|memory|output|occupancy|inner|scan|outer|logits|step)_kernel' python3 - <<'PYTHON'
import torch
from t2r import bench

for shape, kind in ((bench.SHAPES[0], "exact"), (bench.SHAPES[0], "paper"), (bench.SHAPES[3], "exact")):
    args, spec = bench.inputs(shape, kind), bench.spec_of(kind, 64)
    o = bench.ours(args, spec, "triton")
    bench.gradients(o, args, torch.ones_like(o))
bench.median = lambda run: run() or 1.0
bench.time_decode(bench.DECODE[2], 1.0)
PYTHON
}

bench() { timeout 300 python3 -m t2r bench kernels --out $log/bench; }

peer() {
    PYTHONPATH=$PYTHONPATH:/tmp/peer timeout 600 python3 -m t2r bench kernels $shape --shape 32,2048,9,3,64,64 --gates paper \
        --no-decode --out $log/peer
}

tiles() { timeout 200 python3 docs/results/kernels/tiles.py $log/tiles.json 14; }

waits() { # waits.patch: without and with its two switches kernel by kernel, then every test of the kernels with it
    cp -r . /root/waits && cd /root/waits && patch -p1 <docs/results/kernels/waits.patch || return
    export PYTHONPATH=/root/waits:/tmp/site
    for switches in False,False True,False True,True; do
        sed -i "s/^AHEAD = .*/AHEAD = tl.constexpr(${switches%,*})/; s/^BY_SUM = .*/BY_SUM = tl.constexpr(${switches#*,})/" kernels/gsa/tile.py
        python3 -c 'from t2r.bench import *; x = copy_bandwidth(); print(table([time_decode(shape, x) for shape in DECODE]))'
        timeout 240 python3 docs/results/kernels/tiles.py $log/waits-$switches.json 14
    done
    timeout 300 python3 -m pytest -n 8 -q -p no:cacheprovider -m gpu tests/test_kernels_gpu.py
    timeout 100 python3 -m pytest -n 12 -q -p no:cacheprovider tests/test_kernels.py
}

speed() { # of the trainer, at short and at long contexts
    start
    for context in 2048 8192; do
        timeout 200 python3 docs/results/train_speed.py /root/original /root/start $log/speed-$context.json --kinds lm --compile \
            --tokens 524288 --forward 32768 --contexts $context
    done
}

main() { # GPU PART ...
    export CUDA_VISIBLE_DEVICES=$1
    trap "rm -f $log/running.kernels" EXIT
    for part in "${@:2}"; do
        timeout 1000 bash "$0" only "$part" >"$log/$part.log" 2>&1
        echo "$(date +%T) $part: done, $?" >>$log/rows.log
    done
}

if [ "$1" = only ]; then "$2"; elif [ "$1" = main ]; then main "${@:2}"; else
    for part in "${@:2}"; do declare -F "$part" >/dev/null || { echo "no part $part" && exit 1; }; done
    echo "$1" >$log/running.kernels
    setsid nohup bash "$0" main "$@" >$log/kernels.log 2>&1 </dev/null &
fi
