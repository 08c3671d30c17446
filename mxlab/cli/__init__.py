"""The ``mxlab`` command.

Read in this order: ``main`` (assembles it), ``options`` (what several commands take), ``console`` (printing, logging,
progress), then a file a command: ``eval``, ``sweep``, ``convert``, ``compare``, ``inspect``, ``report``, ``demo``,
``doctor``, ``run``, ``bench``.
"""
