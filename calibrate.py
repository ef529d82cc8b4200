"""Choose few survey households and weights that meet population targets: `python calibrate.py --help`."""

from sparsereg.interruption import guard

if __name__ == "__main__":
    with guard():  # before anything that takes time is imported
        from sparsereg.commands.calibrate import main

        main()
