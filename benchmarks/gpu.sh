#!/usr/bin/env bash
# All that only a GPU shows, some ten minutes on an H200: tests, parts of a job, whole jobs beside
# transformers. Tables go to RESULTS.md, logs to FOLDER; what is over is kept when a later step fails.
#
#     benchmarks/gpu.sh FOLDER [SHAPE ...]
set -u
out=${1:?usage: gpu.sh FOLDER [SHAPE ...]}
shift
[ $# -gt 0 ] || set -- 3b 7b
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

step() { # NAME LIMIT_S COMMAND...
    local name=$1 limit_s=$2 start=$SECONDS
    shift 2
    timeout "$limit_s" "$@" >"$out/$name.txt" 2>"$out/$name.err"
    echo "$name: exit $?, $((SECONDS - start)) s"
    tail -n 14 "$out/$name.txt"
    cp benchmarks/RESULTS.md "$out/"
}

step tests 240 python3 -m pytest tests/engine/test_cuda.py -q -n 8 -p no:cacheprovider
for shape in "$@"; do
    step "parts-$shape" 120 python3 benchmarks/gpu_parts.py --shape "$shape" --write --profile "$out/kernels-$shape"
    step "job-$shape" 300 python3 benchmarks/gpu.py --shape "$shape" --rows 2048 --baseline-rows 64 --write
done
