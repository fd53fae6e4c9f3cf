"""Training: our flags beside Megatron's, one step, its metrics, and the run. ``step.py`` is the page to read first."""
