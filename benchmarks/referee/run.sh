#!/usr/bin/env bash
# The questions that a referee would ask, on one model, one after the other; started again, it goes on.
#
#     bash benchmarks/referee/run.sh MODEL PROMPTS COSTS OUT
#
# PROMPTS: a folder with maths.jsonl, questions.jsonl, code.jsonl and documents.jsonl (make_prompts.py).
# COSTS: a cost profile of the model, with costs of layers (fidelity/smollm2-costs-bits.json).
# (a) and (d) look at all 25 texts, the others at ten, two of each kind. Two hours of one core for
# SmolLM2-135M, in bfloat16. Tables from OUT:
# python benchmarks/referee/tables.py OUT
set -euo pipefail
model=$1 prompts=$2 costs=$3 out=$4
all=benchmarks/fidelity/test.jsonl
budgets=64,128
mkdir -p "$out/texts"
ten=$out/texts/ten.jsonl
sed -n '1,2p;8,9p;11,12p;16,17p;21,22p' "$all" > "$ten"

wave() { # name, prompts, generated tokens, between two samples, further options
  local file="$out/wave-$1.json"
  [ -f "$file" ] || reasonalloc calibrate "$model" --prompts "$2" --max-new-tokens "$3" --every "$4" "${@:5}" -o "$file"
}
replay() { # name, texts, arms, further options
  reasonalloc fidelity "$model" --dtype bfloat16 --interval 64 --trajectories "$2" --arms "$3" \
    --out "$out/$1.jsonl" "${@:4}"
}

# (d) What each level adds.
wave maths "$prompts/maths.jsonl" 512 64
replay levels "$all" "rkv,rkv/profile/uniform,rkv/uniform/reasonalloc,reasonalloc,rkv/cost(by=layers)/uniform,\
rkv/cost/planned,calibrated/uniform/uniform,calibrated/cost(by=layers)/uniform,best" \
  --budgets $budgets --profile "$out/wave-maths.json" --profile "$costs"

# (e) The published method's gamma, beta and mu.
arms=rkv,reasonalloc
for gamma in 0 0.25 1; do arms+=",rkv/profile(gamma=$gamma)/reasonalloc"; done
for beta in 0.25 1; do arms+=",rkv/profile/reasonalloc(beta=$beta)"; done
for mu in 0 0.5 0.75; do arms+=",rkv/profile/reasonalloc(mu=$mu)"; done
arms+=",rkv/profile/reasonalloc(score_norm=paper)"
replay knobs "$ten" "$arms" --budgets 128 --profile "$out/wave-maths.json"

# (b) Costs of one kind of text on all others.
arms=rkv,best
for kind in solutions questions code prose generated; do arms+=",calibrated/cost(kind=$kind)/planned"; done
replay kinds "$ten" "$arms" --budgets $budgets --profile "$costs"

# (e) Interval and window.
for interval in 16 32 128; do
  replay "interval-$interval" "$ten" rkv,reasonalloc,best --budgets 128 --interval "$interval" \
    --profile "$out/wave-maths.json" --profile "$costs"
done
for window in 1 4 16 32; do
  replay "window-$window" "$ten" rkv,reasonalloc,best --budgets 128 --window "$window" \
    --profile "$out/wave-maths.json" --profile "$costs"
done

# (b) Waves of other benchmarks, (c) at other lengths, (e) with other shares of the attention's mass.
for name in questions code documents; do wave "$name" "$prompts/$name.jsonl" 512 64; done
for length in 128 256 1024; do
  wave "maths-$length" "$prompts/maths.jsonl" "$length" $((length < 512 ? length / 8 : 64))
done
for rho in 0.8 0.98; do wave "maths-rho$rho" "$prompts/maths.jsonl" 512 64 --rho "$rho"; done
arms=rkv
for name in maths questions code documents; do arms+=",rkv/profile(path=$out/wave-$name.json)/uniform"; done
for rho in 0.8 0.98; do arms+=",rkv/profile(path=$out/wave-maths-rho$rho.json)/uniform"; done
replay waves "$ten" "$arms" --budgets $budgets

# (a) The wave's budgets on the right layers and on random ones.
arms=rkv,rkv/profile/uniform
for seed in 0 1 2 3 4; do arms+=",rkv/shuffled(seed=$seed)/uniform"; done
replay layers "$all" "$arms" --budgets $budgets --profile "$out/wave-maths.json"
