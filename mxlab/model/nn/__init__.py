"""Modules that compute on quantized operands.

Read in this order: ``operands`` (what is done to each operand of a linear layer), ``weights`` (weights that are
quantized once), ``linear`` (linear layers), ``shared_input`` (one quantized input for several layers), ``attention``,
``experts``; then ``forward`` (running a module's forward inside code of ours), ``products`` (seeing the matmuls in it),
``phase`` (prefill or decode).
"""
