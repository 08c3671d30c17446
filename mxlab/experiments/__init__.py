"""Many evaluations, their results as run directories.

Read in this order: ``runs`` (one run directory), ``sweep`` (a grid of runs), ``engines`` (what runs its points),
``format_study`` (every format in every role), ``provenance`` (versions, machine, code), ``demo``, ``notebook``.
"""
