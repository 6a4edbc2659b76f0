"""Matrix products of a Llama layer in FP8 (``torch._scaled_mm``, one scale a tensor) beside bf16, in TFLOP/s.

python -m benchmarks.float8_products [--tokens 16384]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LINEARS = {"qkv": (2048, 3072), "proj": (2048, 2048), "fc1": (2048, 16384), "fc2": (8192, 2048)}
"""Inputs and outputs of the linear layers of :func:`benchmarks.workloads.llama`."""


def milliseconds(run: Callable[[], Any], repeats: int = 10) -> float:
    """Median time of a product."""
    for _ in range(3):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events:
        event.record()
        run()
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def scaled(a: Tensor, b: Tensor, out_dtype: torch.dtype, fast: bool) -> Callable[[], Tensor]:
    """``a @ b.T`` of FP8 operands ``[rows, inner]`` and ``[columns, inner]``."""
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=out_dtype, use_fast_accum=fast)


def measure(name: str, rows: int, columns: int, inner: int) -> None:
    """One product, ``[rows, inner]`` by ``[columns, inner]``, in each way."""
    a, b = (torch.randn(size, inner, device="cuda") for size in (rows, columns))
    flops = 2.0 * rows * columns * inner
    print(f"{name:12s} {rows:6d} x {columns:6d} x {inner:6d}", end="")

    def show(label: str, run: Callable[[], Any]) -> None:
        try:
            time = milliseconds(run)
            print(f"  {label} {flops / time / 1e9:6.0f} ({time:.3f} ms)", end="", flush=True)
        except RuntimeError as error:
            print(f"  {label} {str(error).splitlines()[0][:60]!r}", end="", flush=True)

    x, y = a.bfloat16(), b.bfloat16()
    if name.endswith("weight"):
        total = torch.zeros(rows, columns, device="cuda")
        xt, yt = x.t().contiguous(), y.t().contiguous()  # as activations lie, [tokens, width]
        show("bf16+=", lambda: torch.addmm(total, xt.t(), yt, out_dtype=torch.float32, out=total))
    else:
        show("bf16", lambda: x @ y.t())
    for dtype in (E4M3, E5M2):
        for fast in (True, False):
            out = torch.float32 if name.endswith("weight") else torch.bfloat16
            show(
                f"{'e4m3' if dtype == E4M3 else 'e5m2'}{'+fast' if fast else ''}",
                scaled(a.to(dtype), b.to(E4M3), out, fast),
            )
    print(flush=True)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    tokens = parser.parse_args().tokens
    print(torch.cuda.get_device_name(), torch.__version__)
    for name, (inputs, outputs) in LINEARS.items():
        measure(f"{name} forward", tokens, outputs, inputs)
        measure(f"{name} input", tokens, inputs, outputs)
        measure(f"{name} weight", outputs, inputs, tokens)


if __name__ == "__main__":
    main()
