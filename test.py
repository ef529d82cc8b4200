"""Say what a trained network is worth, and hand over a smaller one: `python test.py --help`."""

from sparsereg.commands import launch

if __name__ == "__main__":
    launch("test")
