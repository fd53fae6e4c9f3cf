# What the scripts for H100 clusters share; examples/qwen2.5_*.sh source it and say everything that differs.
#
# A run is four commands over three folders: prepare the data (OUTPUT/data), import the model (OUTPUT/import), train
# (OUTPUT/run) and export (OUTPUT/hf). What is there already isn't done again, so that the same command goes on with a
# run that was stopped or killed. Every node runs the script; OUTPUT lies on a file system that all of them share.
#
# The script ends with
#   0                finished: OUTPUT/hf holds the model, and OUTPUT/verified says that it is the last step's
#   REQUEUE_STATUS   to be started again: stopped by a signal or a limit, or failed after a newer checkpoint
#   3                OUTPUT/hf isn't the last step's weights; never started again
#   another status   failed without a newer checkpoint: starting it again would fail again; read the log
# torchrun hides the status with which a rank ended, so this is told from what lies in OUTPUT.
# shellcheck shell=bash

#: From the environment: what a scheduler sets, and what belongs to the machines instead of the model.
DRY_RUN=${DRY_RUN:-0}                  # 1: print the commands and start nothing
NODE_RANK=${NODE_RANK:-${PET_NODE_RANK:-0}}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}  # of the first node
MASTER_PORT=${MASTER_PORT:-29500}
REQUEUE_STATUS=${REQUEUE_STATUS:-75}   # EX_TEMPFAIL; Kubeflow starts again from 128 on
WAIT_MINUTES=${WAIT_MINUTES:-120}      # for the first node's preparation, on the others
readonly UNVERIFIED_STATUS=3
HF_CACHE=${HF_CACHE:-}                 # where the imported model is kept; default OUTPUT/import. Runs may share it
# Torch from 2.12 on waits so many seconds for ranks that it has told to end; 2.11 waits 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# The checkout's environment comes first, but in a container only one that lies on top of the image's packages: another
# is the host's and would hide the image's torch and Transformer Engine.
if [ -x "$root/.venv/bin/python" ] && { [ -z "${NVIDIA_PYTORCH_VERSION:-}${CONTAINER:-}" ] ||
  grep -q 'include-system-site-packages = true' "$root/.venv/pyvenv.cfg"; }; then
  PATH="$root/.venv/bin:$PATH"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # Megatron: collectives start in order
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}" # micro-batches differ in length

fail() {
  echo "error: $*" >&2
  exit 2
}

# Stopped before the ranks are there: nothing is lost, and everything that is written is written beside and renamed.
stopped_early() {
  mkdir -p "$run"
  touch "$run/requeue" # srun's status may be that of a task that it killed
  # shellcheck disable=SC2046 # one word each
  kill $(jobs -p) 2>/dev/null || true
  exit "$REQUEUE_STATUS"
}

usage() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0" >&2
  exit 2
}

# paths DATA MODEL OUTPUT [FLAG…]: sets data, model, output, run, exported and flags.
paths() {
  [ $# -ge 3 ] || usage
  data=$1 model=$2 output=$3 flags=("${@:4}")
  prepared=$output/data run=$output/run exported=$output/hf verified=$output/verified
  [ "$DRY_RUN" = 1 ] && return
  trap stopped_early TERM INT USR1
  [ -e "$data" ] || fail "DATA $data: no such file or folder"
  [ -f "$model/config.json" ] || fail "MODEL $model: not a Hugging Face folder (no config.json)"
}

# show TITLE COMMAND…: prints what a shell would be given.
show() {
  echo "# $1"
  printf '%q ' "${@:2}"
  printf '\n'
}

# show_and_run TITLE COMMAND…: under DRY_RUN it only shows.
show_and_run() {
  show "$@"
  [ "$DRY_RUN" = 1 ] || "${@:2}"
}

# align: the whole run, as the sourcing script's variables say; ends that script.
align() {
  local layout=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --context-parallel-size "$CP")
  [ "$TP" = 1 ] || layout+=(--sequence-parallel)
  layout+=(--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)

  # The published hyperparameters of AMoPO with SimPO (arXiv 2506.07165).
  local objective=(--amopo-pairwise simpo --amopo-beta 0.8 --amopo-gamma 2.0 --amopo-epochs 3)
  local optimizer=(--optimizer adam --lr 3e-7 --min-lr 0 --lr-decay-style cosine --lr-warmup-fraction 0.1
    --clip-grad 3.0 --weight-decay 0)
  local batch=(--global-batch-size "$GLOBAL_BATCH" --amopo-max-tokens-per-micro-batch "$MAX_TOKENS")
  local intervals=(--amopo-keep-checkpoints "$KEEP" --save-interval "$SAVE_INTERVAL" --eval-interval "$EVAL_INTERVAL"
    --log-interval 1)

  set_precision "$PRECISION" "$FP8_RECIPE" "$FP8_BF16_LAYERS"
  set_recompute "$RECOMPUTE"
  prepare_data --dimensions "$DIMENSIONS" --source-scale "$SOURCE_SCALE" --cutoff-len "$CUTOFF" \
    --validation-fraction 0.02
  train_and_export "${layout[@]}" "${PRECISION_FLAGS[@]}" "${RECOMPUTE_FLAGS[@]}" \
    "${objective[@]}" "${optimizer[@]}" "${batch[@]}" "${intervals[@]}"
}

# set_precision bf16|fp8 FP8_RECIPE FP8_BF16_LAYERS: what they ask for, into PRECISION_FLAGS.
set_precision() {
  local recipe=$2 edges=$3
  PRECISION_FLAGS=(--bf16 --transformer-impl transformer_engine)
  [ "$1" = bf16 ] && return
  [ "$1" = fp8 ] || fail "PRECISION=$1: expected bf16 or fp8"
  case $recipe in
    tensorwise) PRECISION_FLAGS+=(--fp8-format hybrid) ;; # e4m3 forward, e5m2's wider range for gradients
    blockwise) PRECISION_FLAGS+=(--fp8-format e4m3) ;;    # a scale per block leaves gradients no need of that range
    delayed)                                              # scales are from the largest values of the last steps
      PRECISION_FLAGS+=(--fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max)
      [ "$edges" = 0 ] || fail "FP8_RECIPE=delayed keeps no layers in bf16: set FP8_BF16_LAYERS=0, too"
      ;;
    *) fail "FP8_RECIPE=$recipe: expected tensorwise, blockwise or delayed" ;;
  esac
  PRECISION_FLAGS+=(--fp8-recipe "$recipe")
  [ "$edges" = 0 ] || PRECISION_FLAGS+=(--first-last-layers-bf16
    --num-layers-at-start-in-bf16 "$edges" --num-layers-at-end-in-bf16 "$edges")
}

# set_recompute none|mlp|full: what it asks for, into RECOMPUTE_FLAGS.
set_recompute() {
  case $1 in
    none) RECOMPUTE_FLAGS=() ;;
    # The MLP's inner activations, the largest part, are computed again, attention isn't.
    mlp) RECOMPUTE_FLAGS=(--recompute-granularity selective --recompute-modules mlp) ;;
    # Of each layer only its input is kept.
    full) RECOMPUTE_FLAGS=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1) ;;
    *) fail "RECOMPUTE=$1: expected none, mlp or full" ;;
  esac
}

# prepare_data FLAG VALUE…: DATA itself where it is prepared, else OUTPUT/data, made by the first node on first use.
prepare_data() {
  if [ -f "$data/manifest.json" ]; then
    prepared=$data
    set --
  fi
  keep_inputs "$@"
  if [ "$prepared" = "$data" ] || { [ "$DRY_RUN" != 1 ] && [ -f "$prepared/manifest.json" ]; }; then
    echo "# using prepared data: $prepared"
    return
  fi
  if [ "$NODE_RANK" != 0 ]; then
    [ "$DRY_RUN" = 1 ] || wait_for "$prepared/manifest.json" "the first node's preparation"
    return
  fi
  local command=(python "$root/tools/prepare_preferences.py" "$data" --output "$prepared" --tokenizer "$model" "$@")
  show "prepare the data, once" "${command[@]}"
  [ "$DRY_RUN" = 1 ] && return
  "${command[@]}" &
  wait "$!" # which a signal interrupts, unlike a command in the foreground
}

# keep_inputs FLAG VALUE…: notes DATA, MODEL and what DATA is prepared with in OUTPUT/inputs. OUTPUT goes on with what it
# has, so a start that asks for others is refused.
keep_inputs() {
  [ "$DRY_RUN" != 1 ] || return 0
  local file=$output/inputs wanted
  wanted=$(printf '%s %s\n' DATA "$(realpath -ms "$data")" MODEL "$(realpath -ms "$model")" "$@")
  if [ -f "$file" ]; then
    diff "$file" - <<<"$wanted" >&2 ||
      fail "OUTPUT $output was begun with other inputs (<) than these (>): take another OUTPUT"
  elif [ "$NODE_RANK" = 0 ]; then
    mkdir -p "$output"
    echo "$wanted" >"$file.partial"
    mv "$file.partial" "$file"
  fi
}

wait_for() {
  local file=$1 what=$2 end=$((SECONDS + WAIT_MINUTES * 60))
  echo "waiting for $what: $file"
  while [ ! -f "$file" ]; do
    [ "$SECONDS" -lt "$end" ] || fail "$what didn't end within WAIT_MINUTES=$WAIT_MINUTES: $file isn't there"
    sleep 10 &
    wait "$!"
  done
}

# train_and_export FLAG…: on all nodes; ends the script with the status that the head of this file describes.
train_and_export() {
  if [ "$DRY_RUN" != 1 ] && [ -f "$verified" ]; then
    echo "finished already: $exported"
    exit 0
  fi
  if [ "$DRY_RUN" != 1 ] && [ -d "$exported" ]; then
    echo "exported already, but not verified: $exported"
    verify_export
  fi
  local rendezvous=(--standalone)
  if [ "$NODES" != 1 ]; then
    rendezvous=(--nnodes "$NODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
  fi
  local launch=(torchrun "${rendezvous[@]}" --nproc-per-node "$GPUS_PER_NODE" -m megatron_amopo.train
    --amopo-data "$prepared" --amopo-hf-model "$model" --amopo-hf-cache "${HF_CACHE:-$output/import}"
    --save "$run" --load "$run" --amopo-export-hf "$exported" --tensorboard-dir "$run/tensorboard" "$@" "${flags[@]}")

  local status=0 before
  before=$(saved_step)
  show "train: imports the model on first use, resumes where it stopped, exports after the last step" "${launch[@]}"
  if [ "$DRY_RUN" != 1 ]; then
    [ "$NODE_RANK" != 0 ] || rm -f "$run/requeue" # of an earlier start: this one may end before it looks
    launch_and_forward "${launch[@]}" || status=$?
    status=$(run_status "$status" "$before")
  fi
  [ "$status" = 0 ] || exit "$status"
  verify_export
}

# On the first node; ends the script.
verify_export() {
  [ "$NODE_RANK" = 0 ] || exit 0
  trap '' TERM INT USR1 # there is nothing to stop early
  show_and_run "show that the export is the last step's weights" \
    python "$root/tools/convert_checkpoint.py" verify "$exported" "$run" || exit "$UNVERIFIED_STATUS"
  [ "$DRY_RUN" = 1 ] || touch "$verified"
  exit 0
}

# Ranks get SIGUSR1, after which they save and end, whichever signal this script is sent. torchrun isn't told: it would
# kill ranks that take longer to save than it waits. Until the ranks listen they ignore it, so it is sent again and again.
launch_and_forward() {
  local launcher repeater='' interrupted status
  (trap '' USR1 && exec "$@") & # torchrun inherits that, as do its ranks until they listen
  launcher=$!
  trap 'interrupted=1; [ -n "$repeater" ] || { repeat_stop "$launcher" & repeater=$!; }' TERM INT USR1
  while true; do
    interrupted=0 status=0
    wait "$launcher" || status=$?
    [ "$interrupted" = 1 ] || break # else the signal ended `wait`, not torchrun
  done
  trap '' TERM INT USR1
  [ -z "$repeater" ] || kill "$repeater" 2>/dev/null || true
  return "$status"
}

# repeat_stop LAUNCHER: SIGUSR1 to its ranks every two seconds while it lives.
repeat_stop() {
  trap '' USR1 # Slurm signals all of a task's processes
  while kill -0 "$1" 2>/dev/null; do
    pkill -USR1 -P "$1" || true
    sleep 2
  done
}

saved_step() {
  cat "$run/latest_checkpointed_iteration.txt" 2>/dev/null || echo none
}

# run_status STATUS STEP: what STATUS of torchrun means for a run whose newest checkpoint was of STEP at its start.
run_status() {
  if [ "$1" != 0 ] && [ "$NODE_RANK" != 0 ]; then
    sleep 5 # the first node may still be writing what follows is read from
  fi
  if [ -f "$run/requeue" ]; then
    echo "$REQUEUE_STATUS" # stopped before its last step, all state saved
  elif [ -d "$exported" ]; then
    echo 0 # the last thing that training writes
  elif [ "$1" != 0 ] && [ "$(saved_step)" != "$2" ]; then
    echo "$REQUEUE_STATUS"
  elif [ "$1" = 0 ] && [ "$NODE_RANK" = 0 ]; then
    echo "$REQUEUE_STATUS" # ended by --exit-interval or the like
  else
    echo "$1"
  fi
}
