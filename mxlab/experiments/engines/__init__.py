"""What runs the points of a sweep: ``local`` in this process, ``gpus`` in a process for each GPU."""
