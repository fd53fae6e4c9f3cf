"""Jobs for :class:`megatron_amopo.certification.ranks.RankPool` that start the training command, or ask it without
training."""

import contextlib
import io
import sys
from typing import Any
from unittest.mock import patch

import torch


def command(flags: list[str]) -> tuple[int, str, str]:
    """``torchrun … -m megatron_amopo.train FLAGS`` within this process: exit code, standard output, standard error."""
    from megatron_amopo.certification.observed_run import clean_megatron
    from megatron_amopo.training.train import main

    sys.argv = ["train", *flags]
    code, printed, errors = 0, io.StringIO(), io.StringIO()
    with clean_megatron(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, printed.getvalue(), errors.getvalue()


def refusal(flags: list[str], *, world_size: int = 1) -> str:
    """The message with which a start with these flags on so many ranks is refused; empty if it isn't."""
    import os

    from megatron_amopo.errors import AmopoError
    from megatron_amopo.training.arguments import parse_arguments
    from megatron_amopo.training.run_record import check_resumed_run

    sys.argv = ["train", *flags]
    os.environ["WORLD_SIZE"] = str(world_size)
    try:
        check_resumed_run(*parse_arguments())
    except AmopoError as error:
        return str(error)
    return ""


def said_under_torchrun(local_rank: int, seconds: float) -> str:
    """What a rank prints of an error that all ranks find before training, where the first doesn't end within
    ``seconds``.
    """
    import os

    from megatron_amopo.errors import ConfigError
    from megatron_amopo.training import train

    said = io.StringIO()
    with (
        patch.dict(os.environ, {"LOCAL_RANK": str(local_rank), "TORCHELASTIC_RUN_ID": "none"}),
        patch.object(train, "FIRST_RANK_SPEAKS_S", seconds),
        patch.object(train, "prepare", side_effect=ConfigError("--lr is missing")),
        contextlib.redirect_stderr(said),
        contextlib.suppress(SystemExit),
    ):
        train.main()
    return said.getvalue()


def parser_flags() -> dict[str, tuple[str, str]]:
    """Name → (flag, group) of all flags of the training command."""
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    from megatron_amopo.training.arguments import add_amopo_arguments
    from megatron_amopo.training.supported_flags import read_flags

    parser = add_amopo_arguments(add_megatron_arguments(argparse.ArgumentParser()))
    return {flag.name: (flag.flag, flag.group) for flag in read_flags(parser)}


def run_record_of(flags: list[str]) -> dict[str, Any]:
    """What ``run.json`` would say of a run with these flags."""
    from megatron_amopo.training.arguments import parse_arguments
    from megatron_amopo.training.run_record import run_record

    sys.argv = ["train", *flags]
    return run_record(parse_arguments()[1])


def device_facts() -> dict[str, Any]:
    """What torch answers where Megatron runs without CUDA."""
    from megatron_amopo import device

    tensors = [
        torch.zeros(2, device="cuda"),
        torch.tensor([1.0], device=torch.device("cuda", 3)),
        torch.ones(2).cuda(),
        torch.ones(2).to("cuda:0"),
        torch.empty(1, device=torch.cuda.current_device()),
    ]
    before = torch.cuda.is_available()
    with device.pretended_cuda():
        during = torch.cuda.is_available()
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(3)
    torch.cuda.set_rng_state(state)
    return {
        "factories": [str(tensor.device) for tensor in tensors],
        "claims": [before, during, torch.cuda.is_available()],
        "accelerator": torch.accelerator.is_available(),
        "state restored": torch.equal(drawn, torch.rand(3)),
        "type": torch.zeros(1).type(),
        "classes": isinstance(torch.cuda.Stream, type) and isinstance(torch.cuda.Event, type),
    }
