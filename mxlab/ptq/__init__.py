"""Post-training quantization: choose the values on the grid by data, rather than round to nearest.

Read in this order: ``calibration`` (the tokens by which it is chosen), ``streams`` (the quantized model beside the
unquantized one, layer by layer), ``statistics`` (what is kept of a layer's input), ``scales`` (the scale of each
block), ``gptq`` (the elements), ``correction`` (what the layers before have lost), ``pipeline`` (all of it, in order).
``mase`` runs the tables of a MASE file, with MASE's meaning.
"""
