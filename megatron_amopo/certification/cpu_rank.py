"""What ranks on the CPU are forks of: a process that has imported everything and initialised nothing."""

import logging
import os
import warnings

# The CPU's arithmetic, also on a machine with fewer GPUs than ranks: before torch asks for either.
os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

import megatron_amopo.training.train  # noqa: E402, F401
