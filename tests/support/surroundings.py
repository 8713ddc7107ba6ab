"""What a generation that is interrupted may leave behind."""

from __future__ import annotations

import gc
import signal
import sys
import warnings
from typing import Any

import torch


def surroundings() -> dict[str, Any]:
    """Return whatever may be left behind in the thread and the process."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return {
        "transforms": torch._C._functorch.get_dynamic_layer_stack_depth(),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), depth),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "stance": None if dynamo is None else dynamo._stance,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "garbage": gc.isenabled(),
        "handlers": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
        "timer": signal.getitimer(signal.ITIMER_REAL),
        "outputs": (sys.stdout, sys.stderr, sys.unraisablehook),
        "filters": list(warnings.filters),
        "generator": torch.get_rng_state().tolist(),
    }
