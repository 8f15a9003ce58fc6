#!/usr/bin/env bash
# Accuracy where few tokens are left: MATH-500 and GSM8K, one batch of 100 problems per arm; started again, it
# goes on.
#
#     bash benchmarks/accuracy/run.sh MODEL DATA OUT WAVE [PROFILE]
#
# DATA: a folder with math500_even.jsonl and gsm8k_200.jsonl. Calibration of Qwen2.5-Coder-1.5B used problems of the
# first hundred lines of the former and of the latter, so the second hundred is asked. WAVE: a demand profile of the
# model (coder-wave.json, from four problems of referee/make_prompts.py by referee/models.sh). PROFILE: a cost
# profile; without one the package's. A quarter of an hour per arm and core for a model of 1.5 billion
# parameters; tables: reasonalloc report OUT/math500 --base best (and OUT/gsm8k).
set -euo pipefail
model=$1 data=$2 out=$3 wave=$4
profile=()
[ $# -lt 5 ] || profile=(--profile "$5")

ask() { # folder, task, file of problems, arms, budgets, further options
  mkdir -p "$out/$1"
  sed -n 101,200p "$data/$3.jsonl" > "$out/$1/problems.jsonl"
  reasonalloc eval "$model" --dtype bfloat16 --task "$2" --data "$out/$1/problems.jsonl" \
    --protocol greedy --max-new-tokens 512 --batch-size 100 --interval 64 --arms "$4" --budgets "$5" \
    --out "$out/$1" "${@:6}"
}

ask math500 math500 math500_even full,rkv 64
ask math500 math500 math500_even best,best-bytes 64 "${profile[@]}"
ask math500 math500 math500_even random,snapkv,h2o,pyramid-rkv 64
ask math500 math500 math500_even reasonalloc 64 --profile "$wave"
ask math500 math500 math500_even rkv 48,96
ask math500 math500 math500_even best 48,96 "${profile[@]}"
ask gsm8k gsm8k gsm8k_200 full,rkv,random,h2o,snapkv,pyramid-rkv 64
ask gsm8k gsm8k gsm8k_200 best 64,96 "${profile[@]}"
ask gsm8k gsm8k gsm8k_200 best-bytes 64 "${profile[@]}"
ask gsm8k gsm8k gsm8k_200 reasonalloc 64 --profile "$wave"
ask gsm8k gsm8k gsm8k_200 rkv 96
ask pinned math500 math500_even best 48,64 --prompt pin "${profile[@]}"
ask pinned math500 math500_even rkv,random 48,64 --prompt pin
# The published layers against the same budgets on random layers.
arms=rkv/profile/uniform
for seed in 0 1 2 3 4; do arms+=",rkv/shuffled(seed=$seed)/uniform"; done
ask gsm8k gsm8k gsm8k_200 "$arms" 96 --profile "$wave"
