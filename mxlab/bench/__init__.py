"""``mxlab bench``: what quantization costs, each thing against its unquantized twin in the same process.

``timing`` alternates twins and ``stats`` sums them up; a module for each benchmark gives rows; ``suite`` puts them into
a JSON file with the machine's description; ``grid``, ``figures`` and ``tables`` show such files and need no torch.
"""
