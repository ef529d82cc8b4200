"""The kinds of networks: a file each, whose name ``model=`` takes.

Each has its settings, named ``NETWORK``, and ``build(form, gated, gates, **its other keys)``, which imports
what is slow when it is called: the command line is checked before PyTorch is loaded. A network that is to
have gates, and has none then, gets them from ``sparsereg.gate``.
"""
