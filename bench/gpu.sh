#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: the tests marked `gpu`, then the benchmarks, the rows that matter
# most first. Results go to bench/results/<device>/, with a table.json for kernels/tiles/. Wants a source tree and
# $PYTHON with what pyproject.toml names; installs nothing.
#
#   PYTHON=python3.12 bench/gpu.sh                      on a machine with a CUDA device
#   PYTHON=python3.12 bench/gpu.sh --sections layers    rows of these sections alone, without the tests
#   bench/gpu.sh --device cpu --tiny --results /tmp/x   a rehearsal of every step, on small sizes
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
started=$(date +%s)

if [[ " $* " != *" --device cpu "* ]]; then
    if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "bench/gpu.sh: $PYTHON finds no torch with a CUDA device; nothing was tested or measured."
        exit 0
    fi
fi
# What is imported on the way to the first row: told by name, before minutes are spent.
missing=$("$PYTHON" -c 'import importlib.util
names = "triton", "numpy", "scipy", "sympy", "jinja2", "safetensors", "filelock", "tqdm", "tabulate"
print(*(name for name in names if importlib.util.find_spec(name) is None))')
if [[ -n $missing ]]; then
    echo "bench/gpu.sh: $PYTHON has no $missing; nothing was tested or measured."
    exit 1
fi
results=bench/results
for ((i = 1; i < $#; i++)); do
    [[ ${!i} != --results ]] || { next=$((i + 1)); results=${!next}; }
done
mkdir -p "$results" || exit 1
elapsed() { echo $(($(date +%s) - started)); }

failed=0
if [[ " $* " == *" --sections "* ]]; then
    echo "bench/gpu.sh: a part of the benchmarks alone; the GPU tests were not run."
elif "$PYTHON" -c 'import pytest' 2>/dev/null; then
    # Side by side, as most of it is compiling. The log is kept: the rows below would push it out of the end of a console
    # that is cut off.
    side_by_side=$("$PYTHON" -c 'import xdist; print("-n 6")' 2>/dev/null) || side_by_side=
    TORCHINDUCTOR_COMPILE_THREADS=2 timeout --kill-after=5 150 "$PYTHON" -m pytest -q -m gpu --tb=short $side_by_side \
        -p no:cacheprovider tests/test_gpu.py 2>&1 |
        tee "$results/gpu-tests.txt"
    code=${PIPESTATUS[0]}
    [[ $code == 0 || $code == 5 ]] || failed=$code
else
    echo "bench/gpu.sh: no pytest here; the GPU tests were not run."
fi
# A step may take longer than it says, and begins while there is time: what hangs or drags ends here. The rows so far
# are on disk, since they are written after each step.
timeout --kill-after=5 $((530 - $(elapsed))) "$PYTHON" -m bench.gpu.run --seconds $((490 - $(elapsed))) "$@" || failed=$?
exit "$failed"
