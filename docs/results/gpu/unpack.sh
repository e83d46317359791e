# Source me on the GPU machine, from the repository's root, once all pieces of pack.sh lie in /root/parts:
#
#     mkdir -p /root/parts; cp CARRIED/part.* /root/parts      in a call for each piece
#     source docs/results/gpu/unpack.sh                         again in every later call
#
# Afterwards: packages in /tmp/site, fla in /tmp/peer, the code in /root/repo, packed originals in /root/unpacked/model
# (plan.sh makes them /root/teacher and /root/gemma), benchmarks in /root/data/eval, text in /root/data/corpus. Calls
# follow one another within 30 seconds, or the machine is taken back with all that is on it: send the last piece,
# unpack.sh, plan.sh and watch.sh in one call, and let it run.
if [ ! -d /root/repo ]; then
    mkdir -p /root/unpacked /tmp/site /root/log
    cat /root/parts/part.* | tar -x -C /root/unpacked
    tar -xzf /root/unpacked/site.tgz -C /tmp
    for wheel in /root/unpacked/peer/*.whl; do python3 -m zipfile -e "$wheel" /tmp/peer; done
    mv /root/unpacked/data /root/data && tar -xzf /root/data/eval.tgz -C /root/data
    cp -r . /root/repo
fi
export PYTHONPATH=/root/repo:/tmp/site HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 PYTHONUNBUFFERED=1 TQDM_DISABLE=1
export MPLCONFIGDIR=/tmp/mpl
cd /root/repo
