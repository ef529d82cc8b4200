"""Say what a trained network is worth, and hand over a smaller one: `python test.py --help`."""

from sparsereg.interruption import guard

if __name__ == "__main__":
    with guard():  # before anything that takes time is imported
        from sparsereg.commands.test import main

        main()
