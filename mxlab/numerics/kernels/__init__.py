"""The compiled backends: C++ for the CPU and CUDA C++ for NVIDIA GPUs, with the bits of the reference.

Read in this order: ``compiled`` (what both share: tensors become dense buffers and layouts), ``native`` (the CPU's
extension module), ``packing`` and ``products`` (packed codes, and products with them, on the CPU), ``launches`` (which
CUDA kernels with which arguments), ``cuda`` (compiles them by NVRTC at run time and launches them).

Then ``csrc/``. Both backends compile ``mx.h`` (formats, float32 bits, storage types, random numbers), ``exact.h`` and
``microxcaling.h`` (one block's scale and one element, in either numerics) and ``ops.h`` (these as template arguments of
loops). ``kernels.cu`` holds the loops of the GPU. Those of the CPU are in ``rows.h`` and ``columns.h``, which use
``scales.h``, ``elements.h`` and ``loops.h``, and in ``elementwise.h``; ``kernels.cpp`` puts them together, once per
instruction set, behind the table of functions in ``kernels.h``. ``threads.cpp`` hands out their work, and
``module.cpp`` makes it callable from Python, ``round_plan.h`` what rounds element by element.

Products with packed weights are a part of their own. ``dot.h`` says what they are; ``dot.cpp`` is compiled once per
instruction set that has instructions for them. ``unpack.h`` brings codes in order, ``tiles.h`` multiplies many rows,
``one_row.h`` one, ``values.h`` gives the values back; ``integers.h``, compiled with the other kernels, turns
activations into integers and packs; ``products.cpp`` is for Python.
"""
