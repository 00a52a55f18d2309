"""The limits of this machine: PCIe copies, host memory bandwidth, fused AdamW on the host. Prints one JSON line."""

from __future__ import annotations

import json
import time

import torch


def best(fn, repeat: int = 5) -> float:
    fn()
    times = []
    for _ in range(repeat):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def fused_adamw(master: torch.Tensor, grad: torch.Tensor, *states: torch.Tensor) -> None:
    """One update in place, with both moments in ``states``; all fp32 (n,)."""
    torch._fused_adamw_(
        [master],
        [grad],
        [states[0]],
        [states[1]],
        [],
        [torch.tensor(3.0)],
        lr=1e-4,
        beta1=0.9,
        beta2=0.999,
        weight_decay=0.0,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )


def main() -> None:
    n = 2**26
    found: dict[str, float | str | int] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    p, g, m, v = (torch.rand(n) for _ in range(4))
    found["host_adamw_gb_s"] = 28 * n / best(lambda: fused_adamw(p, g, m, v)) / 1e9
    found["host_copy_gb_s"] = 8 * n / best(lambda: p.copy_(g)) / 1e9
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        host, device = torch.empty(n, pin_memory=True), torch.empty(n, device="cuda")
        host2, device2 = torch.empty(n, pin_memory=True), torch.empty(n, device="cuda")
        up, down = torch.cuda.Stream(), torch.cuda.Stream()
        found["h2d_gb_s"] = 4 * n / best(lambda: device.copy_(host, non_blocking=True)) / 1e9
        found["d2h_gb_s"] = 4 * n / best(lambda: host.copy_(device, non_blocking=True)) / 1e9

        def both() -> None:
            with torch.cuda.stream(up):
                device.copy_(host, non_blocking=True)
            with torch.cuda.stream(down):
                host2.copy_(device2, non_blocking=True)

        found["both_gb_s"] = 8 * n / best(both) / 1e9
        start = time.perf_counter()
        arena = torch.zeros(2**28)
        int(torch.cuda.cudart().cudaHostRegister(arena.data_ptr(), 2**30, 0))
        found["pin_1gib_s"] = time.perf_counter() - start
        torch.cuda.cudart().cudaHostUnregister(arena.data_ptr())
    print("LIMITS " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
