#!/usr/bin/env bash
# Build for the GPU at hand, run its tests, check memory, measure, report.
#
#   scripts/gpu.sh [--fresh] [--quick]      or: make gpu
#
# Writes benchmarks/results/<gpu>/: benchmarks.jsonl, report.md, report.png, environment.json and a log of every stage.
# Takes at most BUDGET seconds (540). A second call on the same sources goes on where the first stopped, also in the
# middle of the tests; --fresh starts over. Needs no network where pybind11 and ninja are installed. PEERS names folders
# with the sources of other packages (DeepGEMM, FlashMLA, ...), separated by colons: they are built into out/gpu/peers
# and measured beside ours. PREBUILT is an extension module built elsewhere for this Python: nothing is compiled then.
# GPU settings are left as they are. A summary comes last.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

python=${PYTHON:-$(for p in python python3; do "$p" -c 'import torch' 2>/dev/null && command -v "$p" && break; done)}
[ -n "$python" ] || { echo "no Python with torch on PATH; set PYTHON" >&2; exit 1; }
budget=${BUDGET:-540}
fresh="" quick=""
for option in "$@"; do
  case $option in
    --fresh) fresh=1 ;;
    --quick) quick=--quick ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
done

# name and architecture of the first GPU, with the "a" that Hopper's own instructions need
read -r arch gpu < <("$python" - <<'PY'
import re, torch
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability(0)
    print(f"{major}{minor}{'a' if major == 9 else ''}", re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()))
PY
)
[ -n "${gpu:-}" ] || { echo "no CUDA device that $python can use" >&2; exit 1; }

sources=$(find deepseek_kernels triton_kernels csrc build_backend tests benchmarks -name results -prune -o -type f \
  ! -name '*.pyc' ! -name '*.so' -print0 | sort -z | xargs -0 sha1sum | sha1sum | cut -c1-12)
commit=$(git rev-parse HEAD 2>/dev/null) || export DEEPSEEK_KERNELS_COMMIT=${commit:=sources-$sources}
results=benchmarks/results/$gpu
state=out/gpu/$gpu/$sources
[ -z "$fresh" ] || rm -rf "$state"
[ -d "$state" ] || rm -rf "$results" # of other sources
mkdir -p "$results" "$state"
left() { echo $((budget - SECONDS)); }

# stage NAME LIMIT COMMAND...: runs it once for these sources, within LIMIT seconds and what is left of the budget
stage() {
  local name=$1 limit=$2 log=$results/$1.txt code
  shift 2
  [ ! -e "$state/$name" ] || { echo "== $name: done before"; return 0; }
  [ "$(left)" -gt 15 ] || { echo "== $name: no time left"; return 0; }
  [ "$limit" -le "$(left)" ] || limit=$(left)
  local start=$SECONDS
  echo "== $name (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" > "$log" 2>&1
  code=$?
  echo "exit $code after $((SECONDS - start)) s" | tee -a "$log"
  [ $code -eq 124 ] || [ $code -eq 137 ] || [ $code -eq 75 ] || echo $code > "$state/$name"
}

build() {
  local isolation=""
  if [ -n "${PREBUILT:-}" ]; then
    cp "$PREBUILT" deepseek_kernels/ && ln -sfn ../triton_kernels deepseek_kernels/triton_kernels &&
      "$python" -m deepseek_kernels info
    return
  fi
  "$python" -c 'import pybind11, ninja, setuptools' 2>/dev/null && isolation="--no-build-isolation --no-deps"
  # shellcheck disable=SC2086
  DEEPSEEK_KERNELS_ARCHS=$arch "$python" -m pip install -v $isolation -e . &&
    "$python" -m deepseek_kernels info
}

# Every wrapper of the hardware in a kernel of its own, bit for bit against the software model: what fails here explains
# what fails later.
primitives() {
  "$python" -m pytest -q -m gpu -k primitives -rf -p no:xdist tests/test_hopper_model.py
}

# What has passed is not run again after an interruption. A kernel that hangs, or an illegal access, costs one worker.
tests() {
  local workers="" done=$state/passed.txt code
  if "$python" -c 'import xdist' 2>/dev/null; then
    workers="-n $(($(nproc) > 16 ? 14 : $(nproc) > 2 ? $(nproc) - 2 : 1)) --dist worksteal"
    "$python" -c 'import pytest_timeout' 2>/dev/null && workers="$workers --timeout 60 --timeout-method thread"
  fi
  touch "$done.new" && cat "$done.new" >> "$done" && : > "$done.new"
  # shellcheck disable=SC2086
  DEEPSEEK_KERNELS_TESTS_PASSED=$done "$python" -m pytest -q -m gpu --durations=5 -rf $workers
  code=$?
  [ ! -s "$done.lost" ] || { echo "in these tests the device was lost:" && cat "$done.lost"; }
  return $code
}

peers() {
  local folder
  while IFS= read -r -d: folder; do
    [ -n "$folder" ] || continue
    "$python" -m pip install -q --no-build-isolation --no-deps --target out/gpu/peers "$folder" && echo "$folder: 1 passed"
  done <<< "${PEERS:-}:"
}

# The first sample of every op on every backend, with torch's allocator out of the way so that each tensor has its ends.
memcheck() {
  local tool
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) ||
    { echo "no compute-sanitizer here"; return 0; }
  "$python" -m pytest --collect-only -q -m gpu tests/test_contract.py -k test_sample 2>/dev/null |
    awk -F'[][]' '/::/ { n = split($2, part, "-"); key = part[1] "-" part[n - 1]
                         if (part[n - 1] != "reference" && !seen[key]++) print }' > "$state/memcheck.cases"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 xargs -r -a "$state/memcheck.cases" -d '\n' "$tool" --tool memcheck \
    --error-exitcode 9 --print-limit 20 "$python" -m pytest -q -p no:xdist
}

benchmarks() {
  local code=4 tries=0
  while [ $code -eq 4 ] && [ $tries -lt 8 ]; do # 4: the device was lost, which a new process gets back
    "$python" benchmarks/run.py --device cuda $quick --seconds 0.1 --out "$results/benchmarks.jsonl" --resume --budget "$1"
    code=$? tries=$((tries + 1))
  done
  return $code
}

environment() {
  PYTHONPATH=benchmarks:$PYTHONPATH "$python" - "$results" "$state" <<'PY'
import json, sys
from pathlib import Path

import torch
from common import environment

from deepseek_kernels.__main__ import collect

results, state = map(Path, sys.argv[1:])
about = environment(torch.device("cuda", 0)) | {"command": "scripts/gpu.sh", "installation": collect()}
about["exit_codes"] = {p.name: int(p.read_text()) for p in sorted(state.iterdir()) if not p.suffix}
(results / "environment.json").write_text(json.dumps(about, indent=1) + "\n")
PY
}

export -f build primitives tests memcheck peers benchmarks
export python arch results state quick
run=(bash -uo pipefail -c)
export PYTHONPATH=$PWD:$PWD/out/gpu/peers${PYTHONPATH:+:$PYTHONPATH}
stage build 200 "${run[@]}" build
stage primitives 90 "${run[@]}" primitives
stage tests 240 "${run[@]}" tests
stage memcheck 90 "${run[@]}" memcheck
[ -z "${PEERS:-}" ] || stage peers 300 "${run[@]}" peers
measure=$(($(left) - 25))
stage benchmarks $((measure + 15)) "${run[@]}" "benchmarks $measure"
environment
[ ! -s "$results/benchmarks.jsonl" ] || "$python" benchmarks/report.py "$results/benchmarks.jsonl"

echo
echo "== $gpu, commit $commit, $SECONDS s"
failed=0 stages="build primitives tests memcheck ${PEERS:+peers} benchmarks"
for name in $stages; do
  code=$(cat "$state/$name" 2>/dev/null || echo unfinished)
  detail=$(grep -E '^[0-9]+ (passed|failed)|^=+ .*(passed|failed)|ERROR SUMMARY|no compute-sanitizer|wrong or missing' \
    "$results/$name.txt" 2>/dev/null | tail -1)
  echo "$name: $code ${detail:+($detail)}"
  [ "$code" = 0 ] || failed=1
done
[ $failed = 0 ] || grep -hE '^FAILED|WRONG|  FAILED  |^E  ' "$results"/*.txt 2>/dev/null | sort | uniq -c | sort -rn | head -20
echo "results in $results"
exit $failed
