#!/usr/bin/env bash
# One call on a machine with a GPU and nvcc: builds the package with its CUDA kernels, runs their tests, benchmarks, and
# looks for bad memory accesses and races. Needs torch, numpy, pybind11, setuptools, pytest, pytest-timeout there, and
# no network. Writes hamming_cuda.json into the folder given, else bench/results.
#   bench/gpu_check.sh [--quick] [folder]
set -uo pipefail
cd "$(dirname "$0")/.."
quick=()
[ "${1:-}" = --quick ] && quick=(--quick) && shift
out=${1:-bench/results}
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

echo "== build"
CMR_FAST_CUDA=1 timeout 240 python3 -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$work/site" . || exit 1
# what was built, not the source tree
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
python3 -c 'import cmr_fast as cf, torch; print(cf.explain("hamming_topk", torch.zeros((1, 8), dtype=torch.uint8, device="cuda")))' || exit 1

echo "== tests"
timeout 180 python3 -m pytest -q -ra -p no:cacheprovider tests/ops/test_hamming_cuda.py || failed=1

echo "== benchmark"
timeout 240 python3 bench/benchmarks/hamming_cuda.py "${quick[@]}" --json "$out/hamming_cuda.json" || failed=1

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        echo "== compute-sanitizer $tool"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            python3 -m pytest -q -p no:cacheprovider tests/ops/test_hamming_cuda.py -k small_case >"$work/$tool.log" 2>&1
        code=$?
        tail -3 "$work/$tool.log"
        [ $code = 0 ] || echo "$tool: exit code $code (9: it found something; 124: out of time)"
        [ $code = 9 ] && failed=1
    done
fi
exit $failed
