#!/usr/bin/env bash
# From a file of preferences to an exported model, on a machine without a GPU: prepare, convert, train on two ranks, export.
#
#     examples/try_your_data.sh DATA_FILE TOKENIZER_DIR [OUTPUT_DIR]
#
# The model is small and random (examples/make_random_model.py): this shows that your data goes through, what is dropped, and that
# the loss falls; it does not make a useful model. For that, give the folder of a real Qwen2/Qwen2.5 model as MODEL.
#
# Variables, with their defaults:
#   DIMENSIONS=helpfulness,correctness,instruction_following   SOURCE_SCALE=  (e.g. 0-4; default: the prompts' 1-5)
#   CUTOFF=1024   STEPS=24   GLOBAL_BATCH=2   LR=3e-3   VOCAB_SIZE=  (rows of the random model's embedding)   MODEL=
#   VALIDATION_FRACTION=0.1   (of the prompts; with few of them take more)
#   FTX_GAMMA=1   (weight of the SFT term: a random model must learn to write before it can prefer; 0 is published)
set -euo pipefail

if [ $# -lt 2 ] || [ $# -gt 3 ]; then
  sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
data=$1 tokenizer=$2 output=${3:-runs/try-your-data}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -x "$root/.venv/bin/python" ] && PATH="$root/.venv/bin:$PATH"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export CUDA_VISIBLE_DEVICES="" # two ranks on the CPU, whatever the machine has

if [ -e "$output" ]; then
  echo "error: $output exists; remove it or name another OUTPUT_DIR" >&2
  exit 2
fi
mkdir -p "$output"
trap 'rmdir "$output" 2>/dev/null || true' EXIT # a first step that failed leaves nothing behind

scale=()
[ -n "${SOURCE_SCALE:-}" ] && scale=(--source-scale "$SOURCE_SCALE")
python "$root/tools/prepare_preferences.py" "$data" --output "$output/data" --tokenizer "$tokenizer" \
  --dimensions "${DIMENSIONS:-helpfulness,correctness,instruction_following}" "${scale[@]}" \
  --cutoff-len "${CUTOFF:-1024}" --validation-fraction "${VALIDATION_FRACTION:-0.1}"

model=${MODEL:-$output/hf-start}
if [ -z "${MODEL:-}" ]; then
  vocab=()
  [ -n "${VOCAB_SIZE:-}" ] && vocab=(--vocab-size "$VOCAB_SIZE")
  python "$root/examples/make_random_model.py" --tokenizer "$tokenizer" --output "$model" "${vocab[@]}"
fi
python "$root/tools/convert_checkpoint.py" hf-to-megatron "$model" "$output/megatron-start"

torchrun --standalone --nproc-per-node 2 -m megatron_amopo.train \
  --amopo-data "$output/data" --pretrained-checkpoint "$output/megatron-start" \
  --save "$output/megatron-aligned" --load "$output/megatron-aligned" \
  --tensor-model-parallel-size 2 \
  --micro-batch-size 1 --global-batch-size "${GLOBAL_BATCH:-2}" --train-iters "${STEPS:-24}" \
  --optimizer adam --lr "${LR:-3e-3}" --min-lr 0 --lr-decay-style cosine --lr-warmup-fraction 0.1 --clip-grad 3.0 \
  --weight-decay 0 --amopo-ftx-gamma "${FTX_GAMMA:-1}" --amopo-eval-at-start --log-interval 1

python "$root/tools/convert_checkpoint.py" megatron-to-hf "$output/megatron-aligned" "$output/hf-aligned"
python "$root/tools/convert_checkpoint.py" verify "$output/hf-aligned" "$output/megatron-aligned"
echo "metrics: $output/megatron-aligned/metrics.jsonl    model: $output/hf-aligned"
