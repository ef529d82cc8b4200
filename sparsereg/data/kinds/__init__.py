"""The sources of data: a file each, whose name ``data=`` takes.

Each has its settings, named ``DATA``, and how it is read: ``source(**keys of its own)`` for images, else
``module(seed, channels_last, **keys)``. What is slow is imported when it is called: the command line is
checked before PyTorch is loaded.
"""
