#!/usr/bin/env bash
# One call on a machine with a GPU and nvcc, of ten minutes at most: builds the package with its CUDA kernels, runs the
# tests of what runs on a GPU, looks for bad memory accesses and races, and measures. Needs torch, numpy, pybind11,
# setuptools, pytest, pytest-timeout there, and no network. Writes pgd_cuda.json, infonce_cuda.json, triplet_cuda.json,
# sinkhorn_cuda.json and hamming_cuda.json into the folder given, else bench/results.
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
end=590  # SECONDS by which every stage is over

# stage NAME SECONDS COMMAND...: what remains of the ten minutes where that is less
stage() {
    local name=$1 most=$2 left=$((end - SECONDS)) code
    shift 2
    [ "$left" -lt "$most" ] && most=$left
    echo "== $name (${SECONDS} s so far)"
    if [ "$most" -lt 5 ]; then
        echo "$name: no time left"
        failed=1
        return
    fi
    timeout -k 5 "$most" "$@"
    code=$?
    [ $code = 124 ] && echo "$name: cut off after $most s"
    [ $code = 0 ] || failed=1
    return $code
}
tests() { stage "tests $1" "$2" python3 -m pytest -ra -p no:cacheprovider "tests/ops/test_$1.py" "${@:3}"; }
measure() { stage "benchmark $1" "$2" python3 "bench/benchmarks/$1.py" "${quick[@]}" "${@:3}" --json "$out/$1.json"; }

stage build 150 env CMR_FAST_CUDA=1 python3 -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$work/site" . || exit 1
# what was built, not the source tree
export PYTHONPATH="$work/site:$PWD/bench/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
python3 -c 'import cmr_fast as cf, torch; print(cf.explain("hamming_topk", torch.zeros((1, 8), dtype=torch.uint8, device="cuda")))' || exit 1

tests pgd_triton 60 -k "not interpreter and not compiles"
tests triplet_cuda 30
tests infonce_triton 80 -k "gpu or blocks_as_they_are or cuda_graph or error_budget"
tests sinkhorn_cuda 40
tests hamming_cuda 100

measure pgd_cuda 40
measure triplet_cuda 30
measure sinkhorn_cuda 40
measure infonce_cuda 100 --rounds 5

if command -v compute-sanitizer >/dev/null; then
    before=$failed
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "compute-sanitizer $tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            python3 -m pytest -p no:cacheprovider tests/ops/test_hamming_cuda.py tests/ops/test_pgd_triton.py \
            -k "small_case or (cuda and (steps or finite) and not interpreter)" >"$work/$tool.log" 2>&1
        code=$?
        tail -3 "$work/$tool.log"
        [ $code = 0 ] || echo "$tool: exit code $code (9: it found something; 124: out of time)"
        [ $code = 9 ] && before=1
    done
    failed=$before  # a tool that does not run here, or not in time, is no failure
fi

measure hamming_cuda 240
exit $failed
