#!/usr/bin/env bash
# The comparisons of docs/evidence: SmolLM2-135M-Instruct on a sample of Alpaca. LoRA, three seeds: alpha 0, 5 and 15
# with completions; at alpha 15, per-sequence L against the width, and the noise types. Full fine-tuning on few
# records, five seeds: alpha 0 and 15, and at alpha 15 per-sequence L against the packed length.
#   scripts/evidence.sh [ALPACA.json] [ALPACA_EVAL.jsonl]      an Alpaca file, and instructions to complete
# Both are third-party data that this repository does not contain. If run again, it resumes after the last finished run.
source "$(dirname "$0")/_environment.sh" dev
alpaca=${1:-../shared/data/alpaca_random_9k.json} eval=${2:-../shared/data/alpaca_eval_805.jsonl}
for file in "$alpaca" "$eval"; do
  [ -f "$file" ] || { echo "scripts/evidence.sh: there is no file $file; give its path." >&2; exit 2; }
done
model=$("$python" scripts/fetch_smollm2.py)
prompts=outputs/evidence/prompts.jsonl
"$python" scripts/split.py "$alpaca" outputs/evidence/data --train 0 128 --test 128 178
"$python" scripts/split.py "$alpaca" outputs/evidence/few_records --train 0 64 --test 64 128
sample='import random, sys; sys.stdout.writelines(random.Random(0).sample(sys.stdin.readlines(), 50))'
"$python" -c "$sample" <"$eval" >"$prompts"
compare() { # name of the results, config, folder of the runs, options
  .venv/bin/neftune-hf compare --config "scripts/$2.yaml" --model_name_or_path "$model" \
    --output_dir "outputs/evidence/$3" "${@:4}"
  cp "outputs/evidence/$3/results.json" "docs/evidence/$1.json"
}
lora() { compare "$1" evidence "$1" --seeds 0 1 2 --records 50 --alphas "${@:2}"; }
few() { compare "$1" few_records few --seeds 0 1 2 3 4 --records 64 --max_new_tokens 0 --alphas "${@:2}"; }
lora alphas 0 5 15 --max_new_tokens 128 --prompts "$prompts"
lora packed 15 --max_new_tokens 0 --vary neftune_length=sequence,padded
lora padded 15 --max_new_tokens 0 --vary neftune_length=sequence,padded --packing false --per_device_train_batch_size 8
lora types 15 --max_new_tokens 0 --vary neftune_noise_type=uniform,gaussian,bernoulli
few few_alphas 0 15 --vary neftune_length=sequence
few few_length 15 --vary neftune_length=sequence,padded
"$python" - <<'PYTHON'
# The figures of the docs: the first two of the report, with their panels side by side.
import re
from pathlib import Path

colours = "<style>svg { color: #24292f } @media (prefers-color-scheme: dark) { svg { color: #e6edf3 } }</style>"
report = Path("outputs/evidence/alphas/report.html").read_text(encoding="utf-8")
figures = re.findall(r'<div class="panels">(.*?)</div>', report, re.DOTALL)
for name, figure in zip(("curve", "differences"), figures):
    panels = re.findall("<svg.*?</svg>", figure, re.DOTALL)
    width, height = (float(re.search(rf'{side}="([\d.]+)pt"', figure)[1]) for side in ("width", "height"))
    for n, panel in enumerate(panels):
        panels[n] = panel.replace("<svg", f'<svg x="{n * width}"', 1).replace('pt"', '"', 2)
    size = f'width="{len(panels) * width}pt" viewBox="0 0 {len(panels) * width} {height}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{colours}{"".join(panels)}</svg>\n'
    Path(f"docs/evidence/{name}.svg").write_text(svg, encoding="utf-8")
PYTHON
