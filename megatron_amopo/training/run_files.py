"""What the files of a run's ``--save`` folder are called, beside Megatron's checkpoints. Training writes them, reports
read them.
"""

RUN_RECORD = "run.json"  # what must not change within a run
STARTS_FILE = "starts.jsonl"  # when and how the run was started and resumed
METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.jsonl"  # of a run that only evaluates: it adds nothing to a training run's history
LEDGER_FOLDER = "ledger"  # of Parquet files
REQUEUE_FILE = "requeue"  # there while a run has stopped before its last step and wants to be started again
