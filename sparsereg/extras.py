"""What is not installed, and how to install it: ``pip install 'sparsereg[EXTRA]'``.

The library itself needs torch, numpy and scipy. Everything else belongs to an extra of pyproject.toml.
"""

from importlib.util import find_spec
from pathlib import Path

from sparsereg.errors import InputError

MODULES = {
    "train": (
        *("pytorch_lightning", "hydra", "omegaconf", "torchmetrics", "torchvision", "tensorboard"),
        *("sklearn", "pandas", "matplotlib", "jinja2", "PIL", "tqdm"),
    ),
    "calibrate": (
        *("numba", "threadpoolctl", "pandas", "pyarrow", "hydra", "omegaconf", "matplotlib"),
        *("tensorboard", "tqdm", "jinja2"),
    ),
    "formats": ("pyreadstat", "openpyxl", "duckdb"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "timm": ("timm",),
    "huggingface": ("transformers", "accelerate"),
    "track": ("wandb", "mlflow"),
}
"""What is imported from the packages of each extra."""


class MissingExtra(ModuleNotFoundError):
    """Something that an extra of this package would install is not there."""


PLUGINS = {
    "hydra/launcher": {
        "joblib": "hydra-joblib-launcher",
        "submitit_local": "hydra-submitit-launcher",
        "submitit_slurm": "hydra-submitit-launcher",
    },
    "hydra/sweeper": {"optuna": "hydra-optuna-sweeper"},
}
"""The package of each plugin of Hydra, by group and choice."""


def plugin_advice(group: str, choice: str) -> str | None:
    """Return how to install a plugin of Hydra that is not there; None if it is none that we know."""
    package = PLUGINS.get(group, {}).get(choice)
    return None if package is None else f"{group}={choice} needs a plugin of Hydra: pip install {package}"


def need(extra: str, *modules: str) -> None:
    """Check that what an extra installs is there.

    Args:
        extra: key of ``MODULES``.
        *modules: those of its modules that are needed; by default all.

    Raises:
        MissingExtra: one is not; says how to install it.
    """
    for module in modules or MODULES[extra]:
        if find_spec(module) is None:
            raise MissingExtra(_advice(module, extra), name=module)


def needed_to_read(file: Path, module: str) -> None:
    """Check that what reads a format of files is there.

    Args:
        file: what is to be read.
        module: one of ``MODULES["formats"]``.

    Raises:
        InputError: it is not; says how to install it.
    """
    if find_spec(module) is None:
        raise InputError(f"{file}: {_advice(module, 'formats')}")


def missing(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return the error that says how to install what an import did not find, or the same one if it cannot."""
    said = advice(error)
    return error if said is None else MissingExtra(said, name=error.name)


def advice(error: ModuleNotFoundError) -> str | None:
    """Return how to install what an import did not find; None if it belongs to no extra."""
    if isinstance(error, MissingExtra):
        return str(error)
    module = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in MODULES.items() if module in modules), None)
    return None if extra is None else _advice(module, extra)


def _advice(module: str, extra: str) -> str:
    return f"{module} is not installed, which this needs: pip install 'sparsereg[{extra}]'"
