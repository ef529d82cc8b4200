"""``compare=RUN1,RUN2``: what is different between two runs, in tables and a few lines."""

from pathlib import Path

from sparsereg.calibration.reporting.comparison import compare_runs
from sparsereg.files import new_version, write_json
from sparsereg.table_file import write_table

OUTPUTS = Path("outputs") / "calibrate" / "comparisons"


def compare(first: Path, second: Path) -> Path:
    """Compare two runs, print and write what is different, and return the path of results.json.

    Args:
        first: The folder of a run.
        second: Of another.

    Raises:
        InputError: One is no folder of a run that has finished.
    """
    found = compare_runs(first, second)
    folder = new_version(OUTPUTS)
    write_table(folder / "targets.csv", found.targets)
    write_table(folder / "households.csv", found.households)
    write_json(folder / "results.json", {"runs": [str(first), str(second)], **found.counts()})
    for line in [*found.lines(), f"files        {folder}"]:
        print(line)
    return folder / "results.json"
