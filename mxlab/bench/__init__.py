"""Measure what quantization costs, each thing against its unquantized counterpart in the same process.

Read in this order:

- ``timing``: contenders take turns; medians, quartiles, ratios;
- ``results``: rows, JSON files, the machine and its instruction set; ``targets``: what the project wants to reach;
- ``workload``: what a benchmark can be told, the cases that follow, how a case is measured;
- ``subjects``: models, token ids, tensors; ``mxpackage``: Microsoft's microxcaling as a contender;
- the workloads: ``quantize``, ``linear``, ``inference``, ``evaluation``, ``startup``;
- ``suite``, which runs them; ``tables`` and ``figures``, which show the files and need no torch.
"""
