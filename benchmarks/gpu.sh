#!/usr/bin/env bash
# What needs a CUDA device: its tests, and the performance tables. Run again, it goes on where it stopped.
#
#   benchmarks/gpu.sh DIRECTORY     # results go there, as they lie in benchmarks/results
#   PYTHON=python3.12 benchmarks/gpu.sh DIRECTORY
set -euo pipefail

results=$(mkdir -p "${1:?Give the directory of the results}" && cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}

"$python" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("There is no CUDA device.")'
"$python" -m pytest -m gpu tests/test_gpu.py | tee "$results/gpu_tests.txt"
"$python" -m benchmarks.run --results "$results"
