"""The compiled backends: C++ for the CPU and CUDA C++ for the GPU, to the bits of the reference.

Read in this order: ``compiled`` (what both share: tensors become dense buffers and layouts), ``native`` (the CPU's
extension module), ``cuda`` (kernels compiled by NVRTC at run time), ``csrc/mx.h`` (what one element and one block go
through, for both), ``csrc/kernels.cpp`` and ``csrc/kernels.cu`` (the loops), ``csrc/threads.cpp``, ``csrc/module.cpp``.
"""
