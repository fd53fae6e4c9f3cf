"""The entry point: ``torchrun --nproc-per-node 8 -m megatron_amopo.train …``; what it does is in ``training/train.py``.

It imports nothing at module level because checkpoint writers start processes that import the main module again: with
Megatron in it, each rank would pay for Megatron's import twice.
"""

if __name__ == "__main__":
    from megatron_amopo.training.train import main

    main()
