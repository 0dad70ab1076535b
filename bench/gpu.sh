#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: the tests marked `gpu`, then the benchmarks, the rows that matter
# most first. Results go to bench/results/<device>/. Wants a source tree and $PYTHON with torch; installs nothing.
#
#   PYTHON=python3.12 bench/gpu.sh                      on a machine with a CUDA device
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
failed=0
if "$PYTHON" -c 'import pytest' 2>/dev/null; then
    timeout 150 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/test_gpu.py
    code=$?
    [[ $code == 0 || $code == 5 ]] || failed=$code
else
    echo "bench/gpu.sh: no pytest here; the GPU tests were not run."
fi
"$PYTHON" -m bench.gpu.run --seconds $((490 - ($(date +%s) - started))) "$@" || failed=$?
exit "$failed"
