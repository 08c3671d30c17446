"""Post-training quantization: choose the values on the grid by data, rather than round to nearest.

Read in this order: ``job`` (one quantization from beginning to end), ``calibration`` (the tokens by which values are
chosen), ``pipeline`` (the algorithms, in order), ``search`` (which transform suits a layer), ``streams`` (the text
through the quantized model, and the unquantized one beside it), ``layers`` and ``experts`` (what is done at each
weight), ``statistics`` (what is kept of its input), ``wush`` (a transform that is fitted), ``offsets`` (the means of
keys), ``rounding`` by ``correction`` (what the layers before have lost), ``scales`` (of each block), ``factor`` and
``gptq`` (the elements), ``chosen`` (a weight on its grid), ``distillation`` (all weights together) of what is
``learned`` by the ``divergence`` of predictions, ``resume`` (what is kept of a run). ``mase`` runs the tables of a
MASE file, with MASE's meaning.
"""
