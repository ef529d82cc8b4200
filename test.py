"""Say what a trained network is worth, and hand over a smaller one: `python test.py --help`."""

from sparsereg.commands.test import main

if __name__ == "__main__":
    main()
