"""The configurations of the commands, which are installed as ``sparsereg.configs``."""
