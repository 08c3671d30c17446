"""What microxcaling has and :mod:`mxlab.compat.mx` does not, and what to use instead."""

from __future__ import annotations

from mxlab.errors import CompatError

PROVIDED = (
    "MxSpecs, add_mx_args, get_mx_specs, finalize_mx_specs, apply_mx_specs, get_backwards_mx_specs, "
    "quantize_mx_op, quantize_elemwise_op, Linear, linear, matmul and bmm"
)
_ELEMENTWISE = "use torch's own, and mx.quantize_elemwise_op on its result where bfloat rounding matters"
_CONVOLUTION = "use torch's own; mx.quantize_mx_op quantizes its operands"

# By what serves instead: microxcaling's functions, classes and modules.
_INSTEAD = {
    _CONVOLUTION: (
        "Conv1d Conv2d Conv3d ConvTranspose2d conv1d conv2d conv3d convolution transpose_convolution LSTM rnn"
    ),
    _ELEMENTWISE: (
        "sigmoid tanh relu relu6 leaky_relu silu gelu Sigmoid Tanh ReLU ReLU6 LeakyReLU SiLU GELU activations "
        "adaptive_avg_pool2d AdaptiveAvgPool2d adaptive_avg_pooling BatchNorm1d BatchNorm2d BatchNorm3d batchnorm "
        "LayerNorm RMSNorm layer_norm layernorm GroupNorm groupnorm norm_utils Softmax softmax "
        "simd_add simd_sub simd_mul simd_div simd_split simd_sqrt simd_square simd_exp simd_log simd_reduce_sum "
        "simd_reduce_mean simd_norm simd_ops vector_ops"
    ),
    "use mx.quantize_elemwise_op, whose gradient passes straight through": "quantize_bfloat quantize",
    "quantize a whole model with mxlab.apply(model, recipe), which replaces its layers and leaves torch as it is": (
        "mx_mapping inject_pyt_ops"
    ),
    "custom_cuda=True needs no extension here": "custom_extensions",
    "products are torch's, at the precision that torch.set_float32_matmul_precision sets": "matmul_precision",
}
REMEDIES = {name: remedy for remedy, names in _INSTEAD.items() for name in names.split()}


def check(name: str) -> None:
    """Raise CompatError where ``name`` is a part of microxcaling that is not provided."""
    if name in REMEDIES:
        raise CompatError(f"mxlab's mx has no {name}: {REMEDIES[name]}. It has {PROVIDED}", name=f"mx.{name}")
