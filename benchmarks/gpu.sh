#!/usr/bin/env bash
# All that only a GPU shows: whole jobs beside transformers, tests, parts of a job; some ten minutes on
# an H200. What does not fit into the time is left out, the last first. Tables go to RESULTS.md, logs
# and copies of them to FOLDER as they come.
#
#     benchmarks/gpu.sh FOLDER [SECONDS]
set -u
out=${1:?usage: gpu.sh FOLDER [SECONDS]}
end_s=$((SECONDS + ${2:-900}))
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

step() { # NAME LEAST_S MOST_S COMMAND...
    local name=$1 least_s=$2 most_s=$3 start_s=$SECONDS left_s=$((end_s - SECONDS))
    shift 3
    if [ "$left_s" -lt "$least_s" ]; then
        echo "$name: left out, $left_s s are left and $least_s are needed"
        return
    fi
    timeout --kill-after 10 $((left_s < most_s ? left_s : most_s)) "$@" >"$out/$name.txt" 2>"$out/$name.err"
    echo "$name: exit $?, $((SECONDS - start_s)) s"
    tail -n 14 "$out/$name.txt"
    cp benchmarks/RESULTS.md "$out/"
}

for shape in 3b 7b; do
    step "job-$shape" 150 280 python3 benchmarks/gpu.py --shape "$shape" --rows 2048 --baseline-rows 64 \
        --write --json "$out/job-$shape.json"
done
step tests 60 240 python3 -m pytest tests/engine/test_cuda.py -q -n 8 -p no:cacheprovider
for shape in 3b 7b; do
    step "parts-$shape" 60 200 python3 benchmarks/gpu_parts.py --shape "$shape" --write \
        --profile "$out/kernels-$shape"
done
