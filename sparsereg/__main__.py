"""``python -m sparsereg`` is the command ``sparsereg``."""

from sparsereg.commands import main

if __name__ == "__main__":
    main()
