"""report.html of a training run or a test: what was reached, and the one file to ship."""
