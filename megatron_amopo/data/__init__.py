"""Preference data: from the files people have to the token groups that training reads.

raw file -> sources.py -> formats.py -> records.py -> prompts.py -> tokenize.py -> cutting.py -> shards.py ->
dataset.py

`prepare.py` runs that chain in parallel and writes a folder (Arrow shards and a manifest); `dataset.py` opens the
folder again. Nothing of that knows Megatron or needs torch, so data can be prepared on a
machine that has neither. `balance.py` deals groups to ranks and micro-batches, `planning.py` looks at a whole
run of that, `segments.py` and `batching.py` pack the groups for training, as torch tensors.
"""
