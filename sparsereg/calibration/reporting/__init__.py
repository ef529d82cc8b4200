"""What a calibration reached: tables, plots, a record of the run."""
