"""The one place that lets Megatron run without CUDA: on CPU tensors and gloo, for trying and testing.

Megatron names CUDA in many places: factory calls with ``device="cuda"``, ``torch.cuda.current_device()``, streams,
random states. :func:`prepare` redirects those to the CPU when torch sees no CUDA device, and leaves them alone when it
does. It changes process-wide state, so call it once, before Megatron builds anything. The rest of the package asks
:func:`current_device` and never ``torch.cuda``.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")

#: Megatron's own flags that a run without CUDA needs, by the names of its argument namespace.
CPU_ARGUMENTS: dict[str, Any] = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
}

#: The same for a run with CUDA but without Transformer Engine.
WITHOUT_TE_ARGUMENTS: dict[str, Any] = {
    "transformer_impl": "local",
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
}

_prepared = False


def has_cuda() -> bool:
    """Whether this process computes on a GPU. Holds for the process' life, whatever Megatron is told meanwhile."""
    return _real_is_available()


def default_arguments() -> dict[str, Any]:
    """Megatron's own flags that this machine needs, by the names of its argument namespace; Megatron's defaults take
    Transformer Engine and apex for granted."""
    if not has_cuda():
        return CPU_ARGUMENTS
    arguments = {} if importlib.util.find_spec("transformer_engine") else dict(WITHOUT_TE_ARGUMENTS)
    if not importlib.util.find_spec("fused_weight_gradient_mlp_cuda"):  # apex's
        arguments["gradient_accumulation_fusion"] = False
    return arguments


def current_device() -> torch.device:
    """The device of this rank's tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else CPU


def prepare() -> None:
    """Make Megatron usable on this machine. Idempotent."""
    global _prepared
    if _prepared:
        return
    _prepared = True
    # Megatron insists on this for tensor parallelism, and it must be set before CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # torch first: Megatron decorates functions with torch.compile when it is imported.
    if not has_cuda():
        _redirect_torch()
        _redirect_megatron()
    _skip_compiling_present_helpers()
    _let_plain_adam_be_resumed()


@functools.cache
def _real_is_available() -> bool:
    return torch.cuda.is_available()


class _CpuFactories(TorchFunctionMode):
    """Turns ``device="cuda…"`` into the CPU in every torch call, and the tensor methods that move to a GPU into the
    identity.
    """

    _IDENTITY = frozenset({torch.Tensor.cuda, torch.Tensor.pin_memory})
    # The optimizer tells parameters apart by these names.
    _CUDA_TYPE_NAMES: ClassVar = {
        "torch.FloatTensor": "torch.cuda.FloatTensor",
        "torch.HalfTensor": "torch.cuda.HalfTensor",
        "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._IDENTITY:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(args[0])
            return self._CUDA_TYPE_NAMES.get(name, name)
        if func is torch.Tensor.to:
            args = tuple(CPU if _names_cuda(arg) else arg for arg in args)
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return func(*args, **kwargs)


def _names_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _Stream:
    """A stream without a device: everything on it has already happened."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def wait_stream(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_event(self, *args: Any, **kwargs: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, *args: Any, **kwargs: Any) -> "_Event":
        return _Event()

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exc: Any) -> None:
        pass


class _Event(_Stream):
    """An event without a device: already recorded."""

    def record(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait(self, *args: Any, **kwargs: Any) -> None:
        pass

    def query(self) -> bool:
        return True


class _Properties:
    """What is asked of a device: as old as Megatron accepts, so that nothing newer is switched on."""

    major, minor, multi_processor_count, total_memory, name = 7, 0, 1, 0, "cpu"


def _returning(value: Any) -> Callable:
    """A function that ignores its arguments. Each is an object of its own: torch's compiler registers functions by
    identity.
    """
    return lambda *args, **kwargs: value


def _redirect_torch() -> None:
    _CpuFactories().__enter__()
    cuda = torch.cuda
    replacements: dict[str, Any] = {
        "current_device": _returning(CPU),
        "set_device": _returning(None),
        "synchronize": _returning(None),
        "empty_cache": _returning(None),
        "reset_peak_memory_stats": _returning(None),
        "current_stream": _returning(_Stream()),
        "default_stream": _returning(_Stream()),
        "set_stream": _returning(None),
        "stream": _returning(contextlib.nullcontext()),
        # Classes stay classes: annotations such as ``torch.cuda.Stream | None`` are evaluated elsewhere.
        "Stream": _Stream,
        "Event": _Event,
        "memory_allocated": _returning(0),
        "max_memory_allocated": _returning(0),
        "memory_reserved": _returning(0),
        "max_memory_reserved": _returning(0),
        "memory_stats": _returning({}),
        "get_device_properties": _returning(_Properties()),
        "get_device_capability": _returning((_Properties.major, _Properties.minor)),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "manual_seed_all": _returning(None),
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
    }
    for name, replacement in replacements.items():
        setattr(cuda, name, replacement)
    # Compiling small CPU graphs takes longer than the runs that this module is for.
    torch.compile = _identity_compile


def _identity_compile(model: Callable | None = None, **options: Any) -> Callable:
    return (lambda function: function) if model is None else model


def _redirect_megatron() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    # These drive torch's CUDA generators directly.
    megatron_random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)

    from megatron.training import training

    training.initialize_megatron = _with_pretended_cuda(training.initialize_megatron)


def _with_pretended_cuda(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with pretended_cuda():
            return function(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def pretended_cuda() -> Iterator[None]:
    """Let torch claim one CUDA device, for code that only asks whether there is one.

    Megatron's initialisation does. Anywhere else the claim would break ``torch.accelerator``.
    """
    real = torch.cuda.is_available, torch.cuda.device_count
    torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
    try:
        yield
    finally:
        torch.cuda.is_available, torch.cuda.device_count = real


def _skip_compiling_present_helpers() -> None:
    """Megatron's wheel carries the compiled dataset helpers but not the Makefile that its start-up calls to build
    them.
    """
    from megatron.core.datasets import utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):
        utils.compile_helpers = _returning(None)


def _let_plain_adam_be_resumed() -> None:
    """Without Transformer Engine and apex the distributed optimizer runs torch's Adam, whose state of a parameter has
    its step beside the moments. Loading a checkpoint reads that step before the first step has made it, asks for it
    among the moments, and leaves one tensor to all parameters, which torch's Adam would then count up once for each."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer_class = distrib_optimizer.DistributedOptimizer
    read, load = optimizer_class.state_dict, optimizer_class.load_state_dict
    write = optimizer_class._set_main_param_and_optimizer_states

    @functools.wraps(read)
    def state_dict(self: Any) -> dict[str, Any]:
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return read(self)

    @functools.wraps(load)
    def load_state_dict(self: Any, state: dict[str, Any]) -> None:
        load(self, state)
        for values in self.optimizer.state.values():
            if "step" in values:
                values["step"] = values["step"].clone()

    @functools.wraps(write)
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        write(self, model_param, {"step": None, **tensors})

    optimizer_class.state_dict = state_dict
    optimizer_class.load_state_dict = load_state_dict
    optimizer_class._set_main_param_and_optimizer_states = set_states
