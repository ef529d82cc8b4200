"""Write a survey of 500 households and seven targets that some weights of them meet."""

import numpy as np
import pandas as pd

rng = np.random.default_rng(0)
size = rng.integers(1, 6, 500)
households = pd.DataFrame(
    {
        "id": np.arange(1000, 1500),
        "weight": rng.uniform(80, 120, 500).round(3),
        "region": rng.choice(["north", "south"], 500),
        "size": size,
        "income": (rng.lognormal(10, 0.5, 500) * size**0.5).round(2),
    }
)
true = households["weight"] * np.where(households["region"] == "north", 1.15, 0.9)
rows = [("households", "", ""), ("people", "size", ""), ("income", "income", "")]
rows += [(f"{what} in the {where}", column, f"region == '{where}'") for where in ("north", "south")
         for what, column in (("households", ""), ("people", "size"))]  # fmt: skip
targets = pd.DataFrame(rows, columns=["name", "measure", "where"])
targets["value"] = [
    (true * (households[column] if column else 1))[households.eval(where) if where else slice(None)].sum()
    for _, column, where in rows
]
households.to_csv("households.csv", index=False)
targets.to_csv("targets.csv", index=False)
