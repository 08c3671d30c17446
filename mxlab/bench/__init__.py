"""What quantization costs, each thing against its unquantized twin in the same process.

Read in this order:

- ``timing``: twins take turns; medians, quartiles, ratios;
- ``results``: rows, JSON files, the machine and its instruction set;
- ``settings``: what benchmarks can be told; ``workloads``: models, token ids, tensors;
- a module for each benchmark: ``quantize``, ``linear``, ``forward``, ``generate``, ``lmeval``, ``startup``;
- ``suite``, which runs them; ``tables`` and ``figures``, which show the files and need no torch.
"""
