"""The code of each kernel that writes FP8, compiled for Hopper without a GPU. Run by tests in a process of its own.

ptxas 12.8, which Triton 3.6 brings, joins two conversions whose results are packed into one register, and may then take
the other uses of those results from registers that nobody wrote. So no result may be packed and used elsewhere too.
"""

import itertools
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_megatron.models.fused import triton_float8

LARGEST = {"*fp8e4nv": 448.0, "*fp8e5": 57344.0}
CONVERSION = re.compile(r"cvt\.rn\.satfinite\.e[45]m[23]x2\.f32\s+(%rs\d+)")


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], divisible: bool) -> str:
    """The PTX, for sizes that are multiples of 16 or not."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
        if name in pointers or (divisible and name not in constants):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": triton_float8._WARPS}).asm[
        "ptx"
    ]


def used_beside_packing(ptx: str) -> list[str]:
    """Results of conversions that are packed into a wider register and have another use."""
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    results = {match[1] for line in lines if (match := CONVERSION.match(line))}
    assert results
    uses: dict[str, list[str]] = {result: [] for result in results}
    for line in lines:
        written = CONVERSION.match(line)
        for name in re.findall(r"%rs\d+", line):
            if name in results and not (written and name == written[1]):
                uses[name].append(line)
    return [n for n, found in uses.items() if len(found) > 1 and any(line.startswith("mov.b32") for line in found)]


for (eight, large), x, beside, divisible in itertools.product(
    LARGEST.items(), ("*fp32", "*bf16"), (1, 2), (False, True)
):
    pointers = dict.fromkeys(("dq", "dk", "dv", "dy", "x"), x) | {"eight": eight, "beside": eight if beside == 1 else x}
    pointers |= dict.fromkeys(("scale", "inverse", "amax", "measured", "sums", "cos", "sin"), "*fp32")
    constants = {"LIMIT": large, "BESIDE": beside, "ROWS": triton_float8._ROWS}
    gated = {"NAME": 2, "GATED": True}
    heads = {"WIDTH": 64, "PER_GROUP": 2, "ROTARY": True, "INTERLEAVED": False, "SUMS": False}
    tile = {**constants, "COLUMNS": triton_float8._COLUMNS}
    for kernel, chosen in (
        (triton_float8._quantize, {**tile, "DYNAMIC": True, "TOP": 8}),
        (triton_float8._quantize, {**tile, "DYNAMIC": False, "TOP": 8}),
        (triton_float8._activation_forward, {**tile, **gated}),
        (triton_float8._activation_backward, {**tile, **gated, "SUMS": True}),
        (triton_float8._join_heads, {**constants, **heads}),
    ):
        if kernel is triton_float8._quantize and beside == 2:
            continue  # keeps its input
        names = {name: kind for name, kind in pointers.items() if name in kernel.arg_names}
        wrong = used_beside_packing(compiled(kernel, names, chosen, divisible))
        assert not wrong, f"{kernel.__name__}{names}{chosen}, divisible={divisible}: {wrong}"
print("ok")
