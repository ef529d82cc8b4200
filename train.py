"""Train or fine-tune a network with L0 gates: `python train.py --help`."""

from sparsereg.commands import launch

if __name__ == "__main__":
    launch("train")
