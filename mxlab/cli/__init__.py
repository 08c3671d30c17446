"""The ``mxlab`` command: ``main`` assembles it, ``options`` has what several commands take, then a file a command."""
