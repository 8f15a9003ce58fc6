#!/usr/bin/env bash
# Is the wave a property of the architecture? Waves of several models from the same prompts, compared pair by pair.
#
#     bash benchmarks/referee/models.sh PROMPTS OUT NAME=MODEL NAME=MODEL ...
#
# PROMPTS: JSON lines, such as maths.jsonl of make_prompts.py; four of them, 256 generated tokens each. A few minutes
# for a model of 1.5 billion parameters.
set -euo pipefail
prompts=$1 out=$2
mkdir -p "$out"
files=()
for pair in "${@:3}"; do
  file="$out/${pair%%=*}.json"
  [ -f "$file" ] || reasonalloc calibrate "${pair#*=}" --dtype bfloat16 --prompts "$prompts" --count 4 \
    --max-new-tokens 256 --every 32 -o "$file"
  reasonalloc profile stability "$file"
  for other in "${files[@]}"; do reasonalloc profile compare "$other" "$file"; done
  files+=("$file")
done
