"""Where the loss comes from: what a recipe does to every operand, and what each part of it costs.

Read in this order:

- ``statistics``: what a format does to one tensor; ``operands``: every operand of a model;
- ``parts``: a recipe cut by role, layer and projection; ``sensitivity``: what each part costs;
- ``inspection``: all of it; ``run``: an inspection as a folder; ``write``, ``tables``, ``figures``: what is in there.
"""
