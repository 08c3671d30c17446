"""The ``mxlab`` command.

Read in this order: ``main`` (assembles it), ``options`` (what several commands take), ``console`` (printing, logging,
progress), ``help`` (examples, shipped files), ``records`` (results as JSON), then a file a command: ``eval``,
``sweep``, ``convert``, ``compare``, ``inspect``, ``results``, ``report``, ``demo``, ``doctor``, ``run``, ``bench``.
"""
