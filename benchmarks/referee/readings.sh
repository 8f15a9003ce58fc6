#!/usr/bin/env bash
# What the published method's sources leave open: each reading by itself, then the best of each level together.
#
#     bash benchmarks/referee/readings.sh MODEL PROMPTS TEXTS OUT BUDGETS INTERVAL TOKENS
#
# PROMPTS: problems of no test set (maths.jsonl of make_prompts.py), of which four are continued by TOKENS tokens, a
# sample of the attention at every eighth part. TEXTS: fidelity/test.jsonl or long texts of make_long.py. Tables:
# python benchmarks/referee/tables.py OUT
set -euo pipefail
model=$1 prompts=$2 texts=$3 out=$4 budgets=$5 interval=$6 tokens=$7
mkdir -p "$out"
wave() { # name, further options
  local file="$out/wave-$1.json"
  [ -f "$file" ] || reasonalloc calibrate "$model" --dtype bfloat16 --prompts "$prompts" --count 4 \
    --max-new-tokens "$tokens" --every $((tokens / 8)) "${@:2}" -o "$file"
}
wave all
wave generated --keys generated
wave one-query --window 1
wave many-queries --window 64

arms=rkv,rkv/profile/uniform,"rkv/profile(demand=max)/uniform"
for name in generated one-query many-queries; do arms+=",rkv/profile(path=$out/wave-$name.json)/uniform"; done
arms+=",rkv/uniform/reasonalloc"
for heads in score_norm=paper score_norm=standard margin=32; do arms+=",rkv/uniform/reasonalloc($heads)"; done
arms+=",reasonalloc,rkv/profile(demand=max)/reasonalloc(score_norm=standard)"
arms+=",rkv/profile(path=$out/wave-generated.json)/reasonalloc(score_norm=standard)"
reasonalloc fidelity "$model" --dtype bfloat16 --interval "$interval" --trajectories "$texts" --arms "$arms" \
  --budgets "$budgets" --profile "$out/wave-all.json" --out "$out/readings.jsonl"
