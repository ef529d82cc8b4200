"""What calibrate.py does: settings, the run, its checkpoint."""
