"""Choose few survey households and weights that meet population targets: `python calibrate.py --help`."""

from sparsereg.commands.calibrate import main

if __name__ == "__main__":
    main()
