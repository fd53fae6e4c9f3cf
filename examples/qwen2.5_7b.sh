#!/usr/bin/env bash
# AMoPO of Qwen2.5-7B on one node of eight H100 (80 GB).
#
#     examples/qwen2.5_7b.sh DATA MODEL OUTPUT [training flags…]
#
# DATA    preferences in any format of docs/preparing-data.md, prepared on first use; or a prepared folder
# MODEL   Qwen2.5-7B-Instruct as a Hugging Face folder
# OUTPUT  gets data/, import/, run/ and hf/, the aligned model. The same command goes on with a run that was stopped.
#
# Everything under "Variables" can be set from outside, e.g. PRECISION=fp8 GLOBAL_BATCH=128 examples/qwen2.5_7b.sh …;
# DRY_RUN=1 prints the commands and starts nothing. docs/clusters.md explains, docs/cards/qwen2.5_7b.md says what has
# been tried: no GPU so far. docs/fp8.md: recipes.
set -euo pipefail
# shellcheck disable=SC2034 # align reads the variables
# shellcheck source-path=SCRIPTDIR source=cluster/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster/common.sh"
paths "$@"

# Variables
DIMENSIONS=${DIMENSIONS:-helpfulness,correctness,instruction_following} # scores in DATA; with the general prompt D = 4
SOURCE_SCALE=${SOURCE_SCALE:-0-4}      # their range, HelpSteer2's
CUTOFF=${CUTOFF:-1024}                 # most tokens of prompt + response
PRECISION=${PRECISION:-bf16}           # or fp8
FP8_RECIPE=${FP8_RECIPE:-tensorwise}   # or blockwise, delayed
FP8_BF16_LAYERS=${FP8_BF16_LAYERS:-1}  # first and last so many layers stay in bf16; 0 under delayed
NODES=${NODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
TP=${TP:-2}                            # divides the 28 query heads and 4 key-value heads: 1, 2 or 4
PP=${PP:-1}
CP=${CP:-1}
RECOMPUTE=${RECOMPUTE:-none}           # or mlp, full
GLOBAL_BATCH=${GLOBAL_BATCH:-64}       # records per step
MAX_TOKENS=${MAX_TOKENS:-$((8 * CUTOFF))} # of a micro-batch, see below
SAVE_INTERVAL=${SAVE_INTERVAL:-50}     # steps; a checkpoint with optimizer takes 14 bytes × 7.6e9 = 107e9
KEEP=${KEEP:-2}                        # checkpoints; older ones are deleted when a newer one is complete
EVAL_INTERVAL=${EVAL_INTERVAL:-50}

# Why TP 2 × DP 4. All figures are estimates, in bytes; none has been measured. An H100 has 85e9.
#
#   parameters    7,615,616,512; half of them, 3.81e9, on each tensor-parallel rank
#   weights       bf16, 2 × 3.81e9                                                          7.6e9
#   gradients     fp32, 4 × 3.81e9                                                         15.2e9
#   optimizer     fp32 weights and two moments, 12 × 3.81e9, distributed over DP 4         11.4e9
#   activations   2 × (7 × 3,584 + 4 × 512 + 3 × 18,944) × 28 layers = 4.7e6 per token,
#                 half of it per rank (sequence parallelism), × 8,192 tokens               19.3e9
#                                                                               together  53.5e9
# On top come CUDA, NCCL and workspaces, and under FP8 a copy of the weights and one of their transposes, 2 bytes per
# parameter of the rank.
#
# One record has at most D × (prompt + two responses) ≤ 4 × 2 × 1,024 = 8,192 tokens, so MAX_TOKENS holds any, and
# several short ones together; for D ≤ 4 it bounds the activations, under this CUTOFF to those above. A longer record
# makes a micro-batch of its own. TP 1 × DP 8 takes 57.1e9 for the first three and fits only with RECOMPUTE=full (3.0e9
# of activations), which computes a third more. Tensor parallelism stays within the node's NVLink.
align # cluster/common.sh: the published hyperparameters, and what the models share
