#!/usr/bin/env bash
# The comparisons of docs/evidence: SmolLM2-135M-Instruct on a sample of Alpaca, three seeds each. Alpha 0, 5 and 15 with
# completions; then, at alpha 15, per-sequence L against the batch's width, and the noise types.
#   scripts/evidence.sh [ALPACA.json] [ALPACA_EVAL.jsonl]      an Alpaca file, and instructions to complete
# Both are third-party data that this repository does not contain. If run again, it resumes after the last finished run.
source "$(dirname "$0")/_environment.sh" dev
alpaca=${1:-../shared/data/alpaca_random_9k.json} prompts=${2:-../shared/data/alpaca_eval_805.jsonl}
for file in "$alpaca" "$prompts"; do
  [ -f "$file" ] || { echo "scripts/evidence.sh: there is no file $file; give its path." >&2; exit 2; }
done
model=$("$python" scripts/fetch_smollm2.py)
mkdir -p outputs/evidence/data
"$python" - "$alpaca" "$prompts" <<'PYTHON'
import json, random, sys
from pathlib import Path

folder = Path("outputs/evidence/data")
records = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
random.Random(0).shuffle(records)
folder.joinpath("train.json").write_text(json.dumps(records[:128]))
folder.joinpath("test.json").write_text(json.dumps(records[128:178]))
lines = Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()
prompts = [{"instruction": json.loads(line)["instruction"]} for line in random.Random(0).sample(lines, 50)]
Path("outputs/evidence/prompts.json").write_text(json.dumps(prompts))
PYTHON
compare() {
  .venv/bin/neftune-hf compare --config scripts/evidence.yaml --model_name_or_path "$model" --seeds 0 1 2 --records 50 \
    --output_dir "outputs/evidence/$1" "${@:2}"
  cp "outputs/evidence/$1/results.json" "docs/evidence/$1.json"
}
compare alphas --alphas 0 5 15 --max_new_tokens 128 --prompts outputs/evidence/prompts.json "${@:3}"
compare packed --alphas 15 --max_new_tokens 0 --vary neftune_length=sequence,padded
compare padded --alphas 15 --max_new_tokens 0 --vary neftune_length=sequence,padded --packing false \
  --per_device_train_batch_size 8
compare types --alphas 15 --max_new_tokens 0 --vary neftune_noise_type=uniform,gaussian,bernoulli
"$python" - <<'PYTHON'
# The figures of the docs.
import json
from pathlib import Path

from neftune_hf.compare.figures import draw
from neftune_hf.compare.report import by_setting, judged, summarise

page = Path("docs/evidence")
folder = Path("outputs/evidence/alphas")
files = sorted(folder.joinpath("runs").glob("*.json"))
runs = sorted(map(json.loads, (file.read_text(encoding="utf-8") for file in files)),
              key=lambda run: (run["setting"]["neftune_noise_alpha"], run["seed"]))
colours = "<style>svg { color: #24292f } @media (prefers-color-scheme: dark) { svg { color: #e6edf3 } }</style>"
plan = json.loads(folder.joinpath("plan.json").read_text(encoding="utf-8"))
figures = draw(by_setting(runs), judged(summarise(runs, plan)))
for name in ("curve", "differences"):
    svg, _ = figures[name]
    page.joinpath(f"{name}.svg").write_text(svg.replace(">", f">{colours}", 1), encoding="utf-8")
PYTHON
