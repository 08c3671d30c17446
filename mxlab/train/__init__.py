"""Quantization that learns: ``binary_residual`` has residual binarization with learnable means."""
