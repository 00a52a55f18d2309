"""Page-locked host memory of exact size.

torch's own pinned allocator rounds blocks up to powers of two, which wastes up to half of a large arena; here an
ordinary allocation is registered with the driver instead, and unregistered before it is freed.
"""

from __future__ import annotations

import resource

import torch
from torch import Tensor

from hf_zero_plugin.errors import ConfigError
from hf_zero_plugin.host_limits import available_memory_bytes

__all__ = ["PinnedArena"]


class PinnedArena:
    """One fp32 allocation, handed out in slices; page-locked if ``pin`` and a CUDA device is present.

    Raises:
        ConfigError: it would not fit into host memory or under the limit of locked memory.
    """

    def __init__(self, numel: int, *, pin: bool, dtype: torch.dtype = torch.float32) -> None:
        num_bytes = numel * torch.empty((), dtype=dtype).element_size()
        self._check(num_bytes)
        self._memory = torch.empty(numel, dtype=dtype)
        self._taken = 0
        self._registered = False
        if pin and numel and torch.cuda.is_available():
            self._memory.fill_(0)  # touch the pages from all threads before the driver locks them one by one
            self._lock(num_bytes)

    @staticmethod
    def _check(num_bytes: int) -> None:
        available = available_memory_bytes()
        if num_bytes > available:
            raise ConfigError(
                f"$.zero_optimization: what this rank offloads needs another "
                f"{num_bytes / 2**30:.1f} GiB of host memory, {available / 2**30:.1f} GiB is available. "
                "Use more ranks, lower offload_optimizer.ratio so that a share stays on the device, or train fewer "
                "parameters."
            )

    def _lock(self, num_bytes: int) -> None:
        cudart = torch.cuda.cudart()
        result = cudart.cudaHostRegister(self._memory.data_ptr(), num_bytes, 0)
        if int(result) != 0:
            soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
            limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 2**30:.2f} GiB"
            raise ConfigError(
                f"$.zero_optimization.offload_optimizer.pin_memory: the driver refused to page-lock "
                f"{num_bytes / 2**30:.1f} GiB (error {int(result)}; ulimit -l is {limit}). "
                "Raise the limit, or set pin_memory to false (slower copies)."
            )
        self._registered = True

    def take(self, numel: int) -> Tensor:
        """The next ``numel`` elements, shape (numel,)."""
        assert self._taken + numel <= self._memory.numel(), "arena is smaller than its pieces"
        part = self._memory[self._taken : self._taken + numel]
        self._taken += numel
        return part

    def release(self) -> None:
        """Unlock the pages; tensors taken from the arena stay readable."""
        if self._registered:
            self._registered = False
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())

    def __del__(self) -> None:
        try:
            self.release()
        except Exception:  # the driver may be gone at interpreter exit, and its locks with it
            pass
