"""Attacks on the scripts: wrong commands and files, kills, full disks, flipped bits; docs/robustness.md."""
