"""Choose few survey households and weights that meet population targets: `python calibrate.py --help`."""

from sparsereg.commands import launch

if __name__ == "__main__":
    launch("calibrate")
