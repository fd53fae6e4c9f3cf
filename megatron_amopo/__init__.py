"""Adaptive Multi-objective Preference Optimization (AMoPO, arXiv 2506.07165) trained on megatron-core."""

__version__ = "0.1.0"
