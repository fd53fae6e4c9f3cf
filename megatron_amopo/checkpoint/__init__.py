"""Checkpoints: Hugging Face folders to Megatron's `torch_dist` format and back, without a model or a process group."""
