"""MASE's algorithms with the meaning that MASE published, for its TOML files; mxlab's own are beside this package.

What is otherwise here than in :mod:`mxlab.ptq`: GPTQ rounds a whole block of inputs at once, and takes its second
moments from a model whose activations are not quantized; a rotated activation is transformed back before the product,
so that it is in the format where it is stored, not where it is multiplied.

Read in this order: ``tables`` (what a file asks for), ``windows`` (its calibration texts), ``gptq`` (blocks of a
weight), ``weights`` (all weights), ``rotation`` (the search), ``run`` (all of it).

Source: MASE (github.com/DeepWok/mase), its tutorial 7, ``transforms/gptq`` and ``quantize/rotation_search``; the code
is mxlab's own.
"""

from mxlab.ptq.mase.run import quantize_model
from mxlab.ptq.mase.windows import windows

__all__ = ["quantize_model", "windows"]
