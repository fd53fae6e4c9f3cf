#!/usr/bin/env bash
# AMoPO of Qwen2.5-32B on two nodes of eight H100 (80 GB), or on eight with NODES=8.
#
#     examples/qwen2.5_32b.sh DATA MODEL OUTPUT [training flags…]
#
# DATA    preferences in any format of docs/preparing-data.md, prepared on first use; or a prepared folder
# MODEL   Qwen2.5-32B-Instruct as a Hugging Face folder
# OUTPUT  gets data/, import/, run/ and hf/, the aligned model. The same command goes on with a run that was stopped.
#
# Start it on every node with NODE_RANK and MASTER_ADDR set, as examples/slurm and examples/kubernetes do.
#
# Everything under "Variables" can be set from outside, e.g. PRECISION=fp8 GLOBAL_BATCH=128 examples/qwen2.5_32b.sh …;
# DRY_RUN=1 prints the commands and starts nothing. docs/clusters.md explains, docs/cards/qwen2.5_32b.md says what has
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
NODES=${NODES:-2}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
TP=${TP:-8}                            # divides the 40 query heads and 8 key-value heads: 1, 2, 4 or 8
PP=${PP:-1}
CP=${CP:-1}
RECOMPUTE=${RECOMPUTE:-none}           # or mlp, full
GLOBAL_BATCH=${GLOBAL_BATCH:-64}       # records per step
MAX_TOKENS=${MAX_TOKENS:-$((8 * CUTOFF))} # of a micro-batch, see below
SAVE_INTERVAL=${SAVE_INTERVAL:-50}     # steps; a checkpoint with optimizer takes 14 bytes × 32.8e9 = 459e9
KEEP=${KEEP:-2}                        # checkpoints; older ones are deleted when a newer one is complete
EVAL_INTERVAL=${EVAL_INTERVAL:-50}

# Why TP 8 × DP = NODES. All figures are estimates, in bytes; none has been measured. An H100 has 85e9.
#
#   parameters    32,763,876,352; an eighth of them, 4.10e9, on each tensor-parallel rank
#   weights       bf16, 2 × 4.10e9                                                          8.2e9
#   gradients     fp32, 4 × 4.10e9                                                         16.4e9
#   optimizer     fp32 weights and two moments, 12 × 4.10e9, distributed over DP 2         24.6e9   (DP 8:  6.1e9)
#   activations   2 × (7 × 5,120 + 4 × 1,024 + 3 × 27,648) × 64 layers = 15.7e6 per token,
#                 an eighth of it per rank (sequence parallelism), × 8,192 tokens          16.1e9
#                                                                               together  65.3e9   (DP 8: 46.8e9)
# On top come CUDA, NCCL and workspaces, and under FP8 a copy of the weights and one of their transposes, 2 bytes per
# parameter of the rank.
#
# One record has at most D × (prompt + two responses) ≤ 4 × 2 × 1,024 = 8,192 tokens, so MAX_TOKENS holds any, and
# several short ones together; for D ≤ 4 it bounds the activations, under this CUTOFF to those above. A longer record
# makes a micro-batch of its own.
#
# Tensor parallelism fills a node and its NVLink, and one key-value head is left to each rank; between nodes only
# gradients and weights travel, once per step. On eight nodes TP=4 PP=2 is the alternative: the same first three parts,
# larger matrices per GPU, but a pipeline that keeps the activations of two micro-batches on its first stage (32.2e9,
# together 62.9e9) and idles for 1/16 of a step of GLOBAL_BATCH=128 in micro-batches of one record.
align # cluster/common.sh: the published hyperparameters, and what the models share
