"""Train or fine-tune a network with L0 gates: `python train.py --help`."""

from sparsereg.interruption import guard

if __name__ == "__main__":
    with guard():  # before anything that takes time is imported
        from sparsereg.commands.train import main

        main()
