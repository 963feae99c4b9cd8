"""The deterministic forms of all kernels and reductions that a step uses. To be called before the first CUDA call.

Refuses an environment that says the opposite.
"""

import os

import torch

_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS: one workspace a stream, so that the split of a sum is fixed
    "NCCL_ALGO": "Ring",  # the order of a sum: never by what NCCL measures, and never inside the switch (NVLS)
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine's attention, backward
}
_ALLOWED = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}


def use_deterministic_kernels() -> None:
    """torch, cuBLAS, NCCL and attention, in this process.

    Raises:
        ValueError: an environment variable asks for something else; nothing has been changed then.
    """
    wrong = [
        f"{name}={os.environ[name]} contradicts run.deterministic=true; unset it, or use {' or '.join(allowed)}"
        for name, allowed in _ALLOWED.items()
        if os.environ.get(name, allowed[0]) not in allowed
    ]
    if wrong:
        raise ValueError("\n".join(wrong))
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # an operation without a deterministic form raises; flash and memory-efficient attention take theirs by this flag
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass has no deterministic form
