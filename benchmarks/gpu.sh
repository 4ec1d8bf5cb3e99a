#!/usr/bin/env bash
# The benchmarks on one GPU, sized for an H100: benchmarks/gpu.sh [PART...]
#
# Parts: tests attention minilm minilm-256 smollm2-135m profile 1b 1b-unrolled
# llama3.1-8b llama3.1-8b-full clip peft peft-compiled finetune; by default all. A
# part takes 1 to 4 minutes.
#
#   PYTHON        has this package and jax[cuda13]; by default python
#   TORCH_PYTHON  has torch for CUDA, peft and transformers; without it the
#                 parts peft and peft-compiled are left out
#   RESULTS       a folder; by default benchmarks/results
#   CARD          ends the names of files; by default what nvidia-smi says
#   PART_SECONDS  a part is stopped after so many; by default 600
#   ROUNDS        for all parts, in place of their own numbers
#
# A part that fails, for lack of memory say, does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
results=${RESULTS:-benchmarks/results}
card=${CARD:-$(nvidia-smi --query-gpu=name --format=csv,noheader |
  head -1 | awk '{print tolower($2)}')}
parts=("$@")
if [ ${#parts[@]} -eq 0 ]; then
  parts=(tests attention minilm minilm-256 smollm2-135m profile 1b 1b-unrolled
    llama3.1-8b llama3.1-8b-full clip peft peft-compiled finetune)
fi
failed=()
# Several processes share the card: of one that takes a pool, it would take all.
export XLA_PYTHON_CLIENT_PREALLOCATE=false

run() {
  echo "+ $*" >&2
  local start=$SECONDS
  timeout "${PART_SECONDS:-600}" "$@" || failed+=("$*")
  echo "  $((SECONDS - start)) s" >&2
}

step_time() {
  local out=$1 rounds=$2
  shift 2
  run "$python" -m benchmarks.step_time "$@" --rounds "${ROUNDS:-$rounds}" \
    --out "$results/step_time_${out}_$card.json"
}

against_peft() {
  local out=$1
  shift
  if [ -z "${TORCH_PYTHON:-}" ]; then
    echo "$out is left out: TORCH_PYTHON is not set" >&2
    return
  fi
  run "$python" -m benchmarks.against_peft --torch-python "$TORCH_PYTHON" \
    --rounds "${ROUNDS:-20}" "$@" \
    --out "$results/against_peft_${out}_$card.json"
}

for part in "${parts[@]}"; do
  case $part in
    # Without TensorFloat-32, which rounds float32 products to 11 bits.
    tests)
      run env JAX_DEFAULT_MATMUL_PRECISION=highest "$python" -m pytest \
        tests/bilora_jax -q -n "${JOBS:-12}" -W default -p no:cacheprovider
      ;;
    attention)
      run "$python" -m benchmarks.attention --rounds "${ROUNDS:-10}" \
        --out "$results/attention_$card.json"
      ;;
    minilm) step_time minilm 30 --workload minilm --steps 20 --memory-jobs 6 ;;
    minilm-256)
      step_time minilm-256 30 --workload minilm-256 --steps 10 --memory-jobs 6
      ;;
    smollm2-135m)
      step_time smollm2-135m 30 --workload smollm2-135m --steps 5 \
        --memory-jobs 4
      ;;
    profile)
      run "$python" -m benchmarks.step_profile --workload smollm2-135m --steps 5 \
        --out "$results/step_profile_smollm2-135m_$card.json"
      ;;
    1b-unrolled)
      step_time 1b-unrolled 20 --workload 1b --steps 2 --memory-jobs 2 \
        --unrolled --remat none
      ;;
    1b) step_time 1b 20 --workload 1b --steps 2 --memory-jobs 2 ;;
    llama3.1-8b) step_time llama3.1-8b 10 --workload llama3.1-8b ;;
    llama3.1-8b-full)
      step_time llama3.1-8b-full 10 --workload llama3.1-8b --remat full
      ;;
    clip)
      run "$python" -m benchmarks.clip_cost --width 2048 --tokens 2048 \
        --rounds "${ROUNDS:-20}" --out "$results/clip_cost_$card.json"
      ;;
    peft) against_peft 1b --workload 1b ;;
    peft-compiled) against_peft 1b-compiled --workload 1b --compile ;;
    finetune)
      for method in lora bilora; do
        run "$python" -m train --preset snippets-smollm2 --method "$method" \
          --train-rows 0 --eval-rows 0 --epochs 3 --eval-every 200 \
          --log-every 50 --dtype bfloat16 --base-dtype float32 \
          --run-dir "runs/smollm2-$method-$card"
      done
      ;;
    *) failed+=("there is no part $part") ;;
  esac
done
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
