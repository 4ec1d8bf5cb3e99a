#!/usr/bin/env bash
# The benchmarks on one GPU, sized for an H200: benchmarks/h200.sh [PART...]
#
# Parts: minilm minilm-256 smollm2-135m 1b llama3.1-8b clip
#   attention peft; by default all.
#
#   PYTHON        has this package and jax[cuda13]; by default python
#   TORCH_PYTHON  has torch for CUDA, peft and transformers; without it the part
#                 peft is left out
#   RESULTS       a folder; by default benchmarks/results
#
# Has not been run on a GPU yet: rounds and sizes are estimates. A part that
# fails, for lack of memory say, does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${RESULTS:-benchmarks/results}
parts=("$@")
if [ ${#parts[@]} -eq 0 ]; then
  parts=(minilm minilm-256 smollm2-135m 1b llama3.1-8b clip attention peft)
fi
failed=()

run() {
  echo "+ $*" >&2
  "$@" || failed+=("$*")
}

step_time() {
  local out=$1
  shift
  run "${PYTHON:-python}" -m benchmarks.step_time "$@" \
    --out "$results/step_time_${out}_h200.json"
}

against_peft() {
  local out=$1
  shift
  run "${PYTHON:-python}" -m benchmarks.against_peft "$@" \
    --torch-python "$TORCH_PYTHON" --out "$results/against_peft_${out}_h200.json"
}

for part in "${parts[@]}"; do
  case $part in
    minilm) step_time minilm --workload minilm --steps 20 ;;
    minilm-256) step_time minilm-256 --workload minilm-256 --steps 10 ;;
    smollm2-135m) step_time smollm2-135m --workload smollm2-135m --steps 5 ;;
    1b) step_time 1b --workload 1b --steps 2 --rounds 20 ;;
    llama3.1-8b)
      step_time llama3.1-8b --workload llama3.1-8b --rounds 10
      step_time llama3.1-8b-full --workload llama3.1-8b --rounds 10 --remat full
      ;;
    clip)
      run "${PYTHON:-python}" -m benchmarks.clip_cost --width 2048 \
        --tokens 2048 --out "$results/clip_cost_h200.json"
      ;;
    attention)
      run "${PYTHON:-python}" -m benchmarks.attention \
        --out "$results/attention_h200.json"
      ;;
    peft)
      if [ -z "${TORCH_PYTHON:-}" ]; then
        echo "peft is left out: TORCH_PYTHON is not set" >&2
        continue
      fi
      against_peft 1b --workload 1b --rounds 20
      against_peft 1b-compiled --workload 1b --rounds 20 --compile
      ;;
    *) failed+=("there is no part $part") ;;
  esac
done
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
