"""report.html: one page on a run for the people who sign, complete in itself."""
