"""Quantize one tensor to MXFP4 with published tools, and keep what they return for docs/published_tools.md and a test.

python tools/docs/record_published_tools.py PATH/TO/microxcaling

Writes tests/golden/published_tools.json and .npz. Needs gguf, torchao, compressed-tensors, nvidia-modelopt, amd-quark,
fp-quant and triton, and a checkout of microsoft/microxcaling; neither mxlab nor its tests need any of these. All run on
the CPU, FP-Quant's kernel in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"


def the_tensor() -> Tensor:
    """Return (32, 64) bfloat16: a block of ties with 7, the block's largest; then normal numbers of many scales."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, generator=generator) * torch.randint(-8, 9, (32, 1), generator=generator).exp2()
    ties = torch.tensor([7, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25])
    x[0, :32] = torch.cat([ties, -ties, ties / 2, -ties / 2])
    return x.bfloat16()


def ggml(x: Tensor) -> Tensor:
    """Quantize with the Python twin of ggml's C code, which packs and unpacks."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    packed = quantize(x.float().numpy(), GGMLQuantizationType.MXFP4)
    return torch.from_numpy(dequantize(packed, GGMLQuantizationType.MXFP4))


def modelopt(x: Tensor) -> Tensor:
    """Quantize with ModelOpt's packed tensors, as checkpoints hold them."""
    from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor

    packed, scale = MXFP4QTensor.quantize(x, 32)
    return packed.dequantize(torch.float32, scale=scale, block_sizes={-1: 32})


def quark(x: Tensor) -> Tensor:
    """Quantize with Quark's fake quantization under its default, ``even``."""
    from quark.torch.kernel.hw_emulation.hw_emulation_interface import fake_quantize_mx

    return fake_quantize_mx(x, axis=-1, block_size=32, scale_calculation_mode="even", mx_element_dtype="fp4")


def torchao(mode: str) -> Callable[[Tensor], Tensor]:
    """Return what quantizes with torchao's MXTensor."""

    def quantized(x: Tensor) -> Tensor:
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.prototype.mx_formats.mx_tensor import MXTensor

        mx = MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode[mode])
        return mx.dequantize(torch.float32)

    return quantized


def compressed_tensors(x: Tensor) -> Tensor:
    """Quantize as compressed-tensors does a weight under its preset MXFP4."""
    from compressed_tensors.quantization import QuantizationArgs, fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    preset: Any = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    args = QuantizationArgs(**preset, scale_dtype=torch.uint8, zp_dtype=torch.uint8)
    groups = x.unflatten(-1, (-1, 32))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    return fake_quantize(x, scale, None, args)


def fp_quant(is_quest: bool) -> Callable[[Tensor], Tensor]:
    """Return what quantizes with FP-Quant's pseudo-quantization, with the identity for its Hadamard matrix."""

    def quantized(x: Tensor) -> Tensor:
        from fp_quant.module.triton.mxfp4 import mxfp4_forward_kernel

        wide = x.float()  # the interpreter lacks bfloat16
        out = torch.empty_like(wide)
        mxfp4_forward_kernel.fn[(1,)](
            wide, torch.eye(32), out, None, wide.numel(), 32, 32,
            gaussian_scale=2.92247856 / 6.0 if is_quest else 3 / 4, quest=is_quest, BLOCK_SIZE=wide.numel(),
        )  # fmt: skip
        return out

    return quantized


def microxcaling(x: Tensor) -> Tensor:
    """Quantize with microxcaling's torch path under its default rounding."""
    from mx.mx_ops import quantize_mx_op
    from mx.specs import MxSpecs

    specs = MxSpecs()
    specs.update(scale_bits=8, block_size=32, custom_cuda=False)
    return quantize_mx_op(x, specs, elem_format="fp4_e2m1", axes=[-1], round="nearest")


# Name, package, what is called, what does it, and how mxlab spells the same.
TOOLS: list[tuple[str, str, str, Callable[[Tensor], Tensor], str, str]] = [
    ("ggml", "gguf", "`MXFP4` of `gguf.quants`", ggml, "fp4_e2m1@32,rounding=nearest_zero", "exact"),
    ("ModelOpt", "nvidia-modelopt", "`MXFP4QTensor`, packed", modelopt,
     "fp4_e2m1@32,scale_rule=rceil,rounding=nearest_zero", "exact"),
    ("Quark", "amd-quark", "`fake_quantize_mx`, `even`", quark, "fp4_e2m1@32,scale_rule=even,rounding=even", "exact"),
    ("torchao", "torchao", "`MXTensor`, `FLOOR`", torchao("FLOOR"), "fp4_e2m1@32,rounding=even", "exact"),
    ("torchao", "torchao", "`MXTensor`, `RCEIL`", torchao("RCEIL"),
     "fp4_e2m1@32,scale_rule=rceil,rounding=even", "exact"),
    ("compressed-tensors", "compressed-tensors", "preset MXFP4, `fake_quantize`", compressed_tensors,
     "fp4_e2m1@32,scale_rule=even,rounding=even", "exact"),
    ("FP-Quant", "fp-quant", "pseudo-quantization, `abs_max`", fp_quant(False),
     "fp4_e2m1@32,scale_rule=four_thirds,rounding=nearest_zero", "exact"),
    ("FP-Quant", "fp-quant", "pseudo-quantization, `quest`", fp_quant(True),
     "fp4_e2m1@32,scale_rule=quest,rounding=nearest_zero", "exact"),
    ("microxcaling", "", "`quantize_mx_op`, `custom_cuda=False`", microxcaling, "fp4_e2m1@32", "microxcaling"),
]  # fmt: skip


def main(checkout: str) -> None:
    """Run every tool and write both files."""
    import numpy as np

    sys.path.insert(0, checkout)
    commit = subprocess.run(["git", "-C", checkout, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    x = the_tensor()
    arrays, rows = {"input": bits(x)}, []
    for name, package, call, quantized, fmt, numerics in TOOLS:
        key = f"output_{len(rows)}"
        # A zero has no sign in mxlab, and in some tools it has.
        arrays[key] = bits((quantized(x.clone()).float() + 0.0).bfloat16())
        found = version(package) if package else commit.stdout.strip()
        about = {"tool": name, "version": found, "call": call, "output": key}
        rows.append({**about, "format": fmt, "numerics": numerics})
    np.savez_compressed(GOLDEN / "published_tools.npz", allow_pickle=False, **arrays)
    (GOLDEN / "published_tools.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def bits(x: Tensor) -> Any:
    """Return the bits of a bfloat16 tensor, as numpy's uint16."""
    return x.contiguous().view(torch.uint16).numpy()


if __name__ == "__main__":
    main(*sys.argv[1:])
