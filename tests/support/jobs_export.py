"""A job for :class:`megatron_amopo.certification.ranks.RankPool`: training that saves as Megatron does by default."""

from unittest import mock


def train_saving_by_rank(flags: list[str]):
    """A training run whose distributed optimizer is saved in Megatron's other format, `dp_reshardable`: by bucket and
    rank, as it lies in memory."""
    from megatron_amopo.certification.observed_run import train
    from megatron_amopo.training import arguments

    with mock.patch.dict(arguments.DEFAULTS, dist_ckpt_optim_fully_reshardable=False):
        return train(flags)
