"""The part of the packaging that pyproject.toml cannot say: configs/ is installed as sparsereg.configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sparsereg", "sparsereg.*"]), "sparsereg.configs"],
    package_dir={"sparsereg.configs": "configs"},
    package_data={
        "sparsereg": ["py.typed"],
        "sparsereg.calibration.reporting.page": ["report.html"],
        "sparsereg.page": ["*.html", "page.css", "page.js"],
        "sparsereg.training.page": ["report.html"],
        "sparsereg.configs": ["**/*.yaml"],
    },
)
