"""``start=``: a run that starts from the weights of an earlier one."""

import hashlib

import numpy as np
import pandas as pd
import pytest

from sparsereg.errors import InputError

from .test_run import _own_folder, exactly, run  # noqa: F401


def tables(n=200):
    rng = np.random.default_rng(3)
    households = pd.DataFrame(
        {
            "id": [f"{i:03d}" for i in range(n)],
            "w": rng.random(n) + 1,
            "x": rng.random(n),
            "old": rng.random(n) < 0.4,
        }
    )
    households.to_csv("H.csv", index=False)
    where = ["", "old", "x > 0.5 and not old"]
    total = [1.2 * households.w.sum(), 0.5 * households.w.sum(), 80.0]
    targets = pd.DataFrame({"name": ["all", "old", "rich"], "value": total, "where": where})
    targets.to_csv("T1.csv", index=False)
    targets.assign(value=np.array(total) * [1.0, 1.02, 0.99]).to_csv("T2.csv", index=False)
    return [
        "problem=households", "problem.households=H.csv", "problem.weight=w", "problem.id=id",
        "num_households=null", "method=calibrate", "distance=raking", "plots=false", "tensorboard=false",
    ]  # fmt: skip


@pytest.mark.costly
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_folder_of_a_run_starts_the_next_one(suffix):
    common = tables()
    earlier, _ = run(*common, "problem.targets=T1.csv", f"weights_format={suffix}")
    cold, cold_results = run(*common, "problem.targets=T2.csv")
    warm, results = run(*common, "problem.targets=T2.csv", f"start={earlier}")
    assert results["steps"] < cold_results["steps"]
    weights = [exactly(folder / "weights.csv").weight for folder in (cold, warm)]
    np.testing.assert_allclose(*weights, rtol=1e-8)
    digest = hashlib.sha256((earlier / f"weights.{suffix}").read_bytes()).hexdigest()
    assert digest in [row["sha256"] for row in results["provenance"]["inputs"] if row["key"] == "start"]


@pytest.mark.costly
def test_households_that_left_are_named_and_new_ones_start_anew(caplog):
    common = tables()
    earlier, _ = run(*common, "problem.targets=T1.csv")
    weights = pd.read_csv(earlier / "weights.csv", dtype={"id": str})
    weights.id = [f"gone{i}" if i < 20 else known for i, known in enumerate(weights.id)]
    weights.to_csv("W.csv", index=False)
    cold, _ = run(*common, "problem.targets=T2.csv")
    warm, _ = run(*common, "problem.targets=T2.csv", "start=W.csv")
    assert "20 of 200 households are not there any more: 'gone0' for one" in caplog.text
    weights = [exactly(folder / "weights.csv").weight for folder in (cold, warm)]
    np.testing.assert_allclose(*weights, rtol=1e-8)


WRONG = {
    "no run": ("start=empty", "has no weights.csv: give the folder of a run that has finished"),
    "no file": ("start=nowhere.csv", "does not exist"),
    "no weight": ("start=H.csv", "no column 'weight' .start needs it"),
    "others": ("start=O.csv", "none of its 2 ids is that of a household, 'a' for one; .* such as '000'"),
    "twice": ("start=D.csv", "the id 001 is there twice, in rows 2 and 3"),
}


@pytest.mark.parametrize(("given", "said"), WRONG.values(), ids=WRONG)
def test_what_is_no_start_is_refused_in_one_line(tmp_path, given, said):
    common = tables()
    (tmp_path / "empty").mkdir()
    pd.DataFrame({"id": ["a", "b"], "weight": [1.0, 2.0]}).to_csv("O.csv", index=False)
    pd.DataFrame({"id": ["001", "001"], "weight": [1.0, 2.0]}).to_csv("D.csv", index=False)
    with pytest.raises(InputError, match=said) as error:
        run(*common, "problem.targets=T1.csv", given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "outputs").exists()
