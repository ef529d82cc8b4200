"""What a user types: ``sparsereg train``, ``test``, ``calibrate``, the same as the scripts of these names."""
