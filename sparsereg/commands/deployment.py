"""What test.py hands over: the compacted network, its files, their accuracy and their speed."""

import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from sparsereg.compression import (
    Count,
    benchmark,
    compact,
    export,
    fuse,
    load_compacted,
    original_size,
    quantize,
    save_compacted,
)
from sparsereg.compression.deploy import check_packages, write_onnx
from sparsereg.compression.oneshot.pruning import shrink
from sparsereg.compression.quantization import CALIBRATION_EXAMPLES
from sparsereg.compression.timing.latency import HEADER, Latency, in_words
from sparsereg.compression.timing.rounding import fastest_rounding
from sparsereg.compression.timing.runtimes import Loaders, Source, check_runtime, default_runtime, installed
from sparsereg.data.batches import call, only
from sparsereg.data.own import RunData
from sparsereg.errors import InputError
from sparsereg.files import write_new
from sparsereg.layers import GatedLayer, save_csr
from sparsereg.layers.storage import Storage
from sparsereg.penalties import hard_concretes
from sparsereg.training import build
from sparsereg.training import checkpoint as checkpoints
from sparsereg.training.accounting import accountant_of
from sparsereg.training.artefacts import (
    Artefact,
    examples_in_words,
    file_megabytes,
    megabytes,
    to_ship,
)
from sparsereg.training.checkpoint import Checkpoint
from sparsereg.training.config import Evaluation, Training
from sparsereg.training.stages import UNDER_GATES
from sparsereg.training.tasks.measure import measure
from sparsereg.training.tasks.task import SHARES, Task
from sparsereg.zoo import networks
from sparsereg.zoo.kinds.compacted import CompactedModel
from sparsereg.zoo.kinds.own import OwnNetwork

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml"}
"""Of the file that ``export=`` writes."""
TESTS = {".onnx": ("onnxruntime", "openvino"), ".xml": ("openvino",), ".pt2": ("eager",)}
"""The runtimes that a file is tested in: the first that is installed."""
CALIBRATION_BATCH = 32
SECONDS_OF_FILES = 1.0
"""Seconds for which files are timed to know which of them to ship, where nobody asks for timings."""
SHRINK_EXAMPLES = 2048
"""Training inputs that shrinking in one shot looks at."""


@dataclass
class HandOver:
    """Writes, measures and times what comes after training.

    Attributes:
        given: settings of test.py.
        cfg: of the checkpoint.
        checkpoint: what is tested.
        net: its network, on the CPU.
        example: one example.
        data: with the test examples.
        task: what is measured.
        device: where networks in PyTorch are tested.
        figures: that the checkpoint's network reached, by name.
        sizes: its parameters and multiply-accumulates, without gates.
    """

    given: Evaluation
    cfg: Training
    checkpoint: Checkpoint
    net: nn.Module
    example: Any
    data: RunData
    task: Task
    device: torch.device
    figures: dict[str, float | None]
    sizes: tuple[int, int]

    def __post_init__(self) -> None:
        self.results: dict[str, Any] = {}
        self.artefacts: list[Artefact] = []
        self.sources: dict[str, Source] = {}
        self._small: fx.GraphModule | None = None

    def run(self, folder: Path) -> dict[str, Any]:
        """Do what ``compact``, ``shrink``, ``export`` and the like ask for; return its results.

        Args:
            folder: of this test, for plots.
        """
        self._start()
        if self.given.compact:
            self._compact()
        if self.given.shrink is not None:
            self._shrink(self.given.shrink)
        if self.given.export:
            self._export()
        if self.given.benchmark:
            latency = self._time()
            print(f"plot: {latency.plot(folder / 'latency.png')}")
        described = examples_in_words(self.data.describe(), self.cfg.trainer.limit_test_batches)
        self.results |= {
            "artefacts": [a.to_dict() for a in self.artefacts],
            "measured_on": described,
            "ship": to_ship(self.artefacts, self.task),
        }
        return self.results

    # ---- networks in PyTorch

    def _start(self) -> None:
        """The dense network, the gated one of a fine-tuned run, and the checkpoint itself."""
        c = self.checkpoint
        name = "gated" if c.gated else "tuned" if c.before else "compacted" if c.structure else "dense"
        whole = original_size(self.net) or {"parameters": self.sizes[0], "macs": self.sizes[1]}
        dense = self._dense() if name != "dense" else None
        if name != "dense":
            size = megabytes(whole["parameters"])
            self._add(Artefact("dense", None, {}, whole["parameters"], whole["macs"], size), dense)
        beside = c.path.with_name(UNDER_GATES["last.ckpt"])
        gated = _rebuilt(beside) if name == "tuned" else None
        if gated is not None:
            figures = self._figures(self._in_torch(gated.to(self.device)))
            size = megabytes(whole["parameters"])
            made = Artefact("gated", str(beside), figures, whole["parameters"], whole["macs"], size)
            self._add(made, gated.cpu() if self.given.benchmark else None)
        size = megabytes(self.sizes[0])
        # Gates take part in the products that they shut: the gated network costs what the dense one does.
        self._add(Artefact(name, str(c.path), self.figures, *self.sizes, size), self.net)

    def _dense(self) -> nn.Module | None:
        """The network as it was before it had gates, with other weights: for its size and speed only."""
        settings = self.checkpoint.run_config["model"]
        try:
            model = self.cfg.model if not isinstance(self.cfg.model, CompactedModel) else settings
            dense = networks.build(model, self.checkpoint.form, gated=False).eval()
            # One of yours may have gates of its own, whatever is asked for.
            return None if isinstance(model, OwnNetwork) and hard_concretes(dense) else dense
        except InputError:
            return None  # of a compacted file, or code that only the command line may name

    def _add(self, artefact: Artefact, source: Source | None) -> None:
        self.artefacts.append(artefact)
        if source is not None:
            self.sources[artefact.name] = source

    def _compact(self) -> None:
        path, small = self._written("compacted", self.small)
        if any(isinstance(m, GatedLayer) and m.per_weight for m in self.net.modules()):
            self.results |= store_sparse(small, path.with_name("compacted.csr"))

    def _shrink(self, kept: float) -> None:
        """Shrink in one shot, on training inputs without labels."""
        net = self.net.to(self.device).eval()
        try:
            small = shrink(net, list(self._inputs(SHRINK_EXAMPLES)), kept, seed=self.given.seed)
        except ValueError as error:
            raise InputError(f"shrink={kept:g}: {error}") from error
        finally:
            net.cpu()
        # This is what is exported, quantized and timed from here on.
        self.net = self._small = small.cpu()
        self.__dict__.pop("_costs", None)
        self._written("shrunk", small)

    def _written(self, name: str, small: fx.GraphModule) -> tuple[Path, fx.GraphModule]:
        """Write a network in PyTorch beside the checkpoint; what is tested is what the file holds."""
        beside = self.checkpoint.path.with_name("compacted.pt")
        path = write_new(beside, lambda p: save_compacted(small, p, self._notes()))
        loaded = load_compacted(path)
        figures = self._figures(self._in_torch(loaded.to(self.device)))
        self.results |= {name: str(path), **{f"{name}_{figure}": value for figure, value in figures.items()}}
        self._made(name, path, figures, fuse(loaded.cpu()))
        return path, loaded

    def _notes(self) -> dict[str, Any]:
        """What a file says of where it comes from."""
        return {
            "config": self.checkpoint.config,
            **self.checkpoint.form.described(),
            "data": self.data.describe(),
            "checkpoint": str(self.checkpoint.path),
        }

    @property
    def small(self) -> fx.GraphModule:
        """What the gates leave, with the rounding that was asked for."""
        if self._small is None:
            self._small = compact(self.net, self.example, round_to=self.round_to)
        return self._small

    @cached_property
    def _costs(self) -> Count:
        """Of ``small``."""
        return accountant_of(self.small, self.example).count()

    @property
    def round_to(self) -> int:
        """``round_to``, chosen by timing where that is asked for."""
        if "round_to" not in self.results:
            given = self.given.round_to
            self.results["round_to"] = self._fastest() if given == "auto" else int(given)
        found: int = self.results["round_to"]
        return found

    def _fastest(self) -> int:
        with tempfile.TemporaryDirectory() as folder:
            make = None
            if self.given.quantize:
                make = lambda small, multiple: self._quantized_trial(small, Path(folder) / f"{multiple}.onnx")  # noqa: E731
            best, rows = fastest_rounding(
                self.net,
                self.example,
                runtimes=self.runtimes if not self.given.quantize else self.runtimes_of(".onnx"),
                batch_sizes=self.batch_sizes,
                threads=self.given.threads,
                make=make,
                on_step=lambda what: print(f"trying {what} ...", flush=True),
            )
        for row in rows:
            took = in_words(row.seconds * 1e3)
            print(f"  round_to={row.model:4s}{row.runtime:>12s}{row.batch:5d}{took:>10s} ms")
        print(f"round_to={best} is the fastest", flush=True)
        self.results["round_to_timings"] = [asdict(row) for row in rows]
        return best

    def _quantized_trial(self, small: fx.GraphModule, path: Path) -> Path:
        """A quantized file that is only timed: one batch is enough for its ranges."""
        plain = path.with_suffix(".float.onnx")
        # Padding is kept: rounded networks have channels of zeros that a second compaction would take out.
        write_onnx(fuse(small), self.example, plain)
        return quantize(plain, path, itertools.islice(self._inputs(CALIBRATION_EXAMPLES), 1))

    # ---- files

    def _export(self) -> None:
        suffix = SUFFIXES[str(self.given.export)]
        beside = self.checkpoint.path.parent
        path = free_path(beside / f"compacted{suffix}")
        print(f"exporting to {self.given.export} ...", flush=True)
        export(self.net, self.example, path, round_to=self.round_to)
        self.results["exported"] = str(path)
        self._made("exported", path, self._tested(path), path)
        if self.given.quantize:
            print("quantizing to 8-bit integers ...", flush=True)
            target = free_path(beside / "compacted.int8.onnx")
            quantize(path, target, self._inputs(CALIBRATION_EXAMPLES))
            self.results["quantized"] = str(target)
            self._made("int8", target, self._tested(target), target)
            if not self.given.benchmark:
                self._time_files()

    def _inputs(self, num_examples: int) -> Iterable[Any]:
        """Batches of training inputs, without labels."""
        batches = self.data.estimation_batches(num_examples, CALIBRATION_BATCH)
        return (only(inputs, self.example) for inputs in batches)

    def _made(self, name: str, path: Path, figures: dict[str, float | None], source: Source) -> None:
        """Note an artefact that is a file, and say what it is worth."""
        costs = self._costs
        files = [path, *([path.with_suffix(".bin")] if path.suffix == ".xml" else [])]
        made = Artefact(name, str(path), figures, costs.parameters, costs.macs, file_megabytes(*files))
        self._add(made, source)
        word = SHARES.get(self.task.figure, self.task.figure)
        figure = figures.get(f"test_{self.task.figure}")
        print(f"{name}: {path}" + ("" if figure is None else f", test {word} {figure:.4f}"), flush=True)

    def _tested(self, path: Path) -> dict[str, float | None]:
        """What a file reaches in the first of its runtimes that is installed."""
        runtime = next((r for r in TESTS[path.suffix] if installed(r)), None)
        if runtime is None:
            return {}
        threads = torch.get_num_threads()
        loaded = Loaders(self.example, threads).load(path, runtime)

        def answer(inputs: Any) -> Any:
            found = loaded.tensors(loaded.run(loaded.prepare(inputs)))
            return found if len(found) > 1 else found[0]

        return self._figures(answer, torch.device("cpu"))

    # ---- accuracy and speed

    def _in_torch(self, net: nn.Module) -> Callable[[Any], Any]:
        return lambda inputs: call(net, inputs)

    def _figures(
        self, answer: Callable[[Any], Any], device: torch.device | None = None
    ) -> dict[str, float | None]:
        loader = self.data.test_dataloader()
        limit = self.cfg.trainer.limit_test_batches
        batches = (
            limit if isinstance(limit, int) else len(loader) if limit is None else int(len(loader) * limit)
        )
        some = itertools.islice(loader, batches)
        if batches == 0:
            return {}
        found = measure(lambda x: answer(only(x, self.example)), self.task, some, device or self.device)
        return {f"test_{name}": value for name, value in found.items()}

    @property
    def runtimes(self) -> Sequence[str]:
        """Those that are asked for."""
        return runtimes_in(self.given)

    def runtimes_of(self, suffix: str) -> Sequence[str]:
        """Those that are asked for and read a file; the one that it is tested in if none does."""
        return [r for r in self.runtimes if r in TESTS[suffix]] or [TESTS[suffix][0]]

    @property
    def batch_sizes(self) -> Sequence[int]:
        """Those that are asked for."""
        return (self.given.batch,) if isinstance(self.given.batch, int) else self.given.batch

    def _time(self) -> Latency:
        """Time everything in turns, print rows as they are measured, and note them in the artefacts."""
        if self.checkpoint.gated and not {"compacted", "shrunk"} & self.sources.keys():
            costs = self._costs
            made = fuse(self.small)
            size = megabytes(costs.parameters)
            place = 1 + max(i for i, a in enumerate(self.artefacts) if a.name in ("dense", "gated"))
            self.artefacts.insert(place, Artefact("compacted", None, {}, costs.parameters, costs.macs, size))
            self.sources["compacted"] = made
        order = [a.name for a in self.artefacts if a.name in self.sources]
        print(HEADER, flush=True)
        latency = benchmark(
            {name: self._laid_out(self.sources[name]) for name in order},
            self.example,
            batch_sizes=self.batch_sizes,
            runtimes=self.runtimes,
            threads=self.given.threads,
            seconds=self.given.benchmark_seconds,
            channels_last=self.cfg.trainer.channels_last,
            on_row=lambda row: print(row.text, flush=True),
            on_step=lambda what: print(f"  loading {what} ...", flush=True),
        )
        print(latency.settings)
        if "eager" in self.runtimes and 1 in self.batch_sizes:
            print(EAGER_AT_ONE)
        self.artefacts = [a.timed(latency.rows) for a in self.artefacts]
        self.results["latency"] = [asdict(row) for row in latency.rows]
        self.results["latency_settings"] = latency.settings
        return latency

    def _time_files(self) -> None:
        """Time the file in floats and that in 8-bit integers, since one of them is shipped."""
        latency = benchmark(
            {name: self.sources[name] for name in ("exported", "int8")},
            self.example,
            batch_sizes=self.batch_sizes,
            runtimes=self.runtimes_of(".onnx"),
            threads=self.given.threads,
            seconds=SECONDS_OF_FILES,
        )
        self.artefacts = [a.timed(latency.rows) for a in self.artefacts]

    def _laid_out(self, source: Source) -> Source:
        """Networks in PyTorch as training has them in memory."""
        return build.in_memory_format(self.cfg, source) if isinstance(source, nn.Module) else source


EAGER_AT_ONE = (
    "note: eager PyTorch at a batch of 1 is the wrong way: it mostly times how operations are called and has "
    "slow kernels for small convolutions; judge a network for single examples in onnxruntime or openvino"
)


def _rebuilt(path: Path) -> nn.Module | None:
    """The network of a checkpoint, if it is there and is made of no code but ours."""
    if not path.is_file():
        return None
    try:
        return build.restore(checkpoints.read(str(path))).eval()
    except InputError:
        return None


def check(given: Evaluation) -> None:
    """Raise an InputError that says what to install if something is asked for that is not there."""
    if given.export:
        check_packages(SUFFIXES[given.export])
    if given.quantize:
        check_runtime("onnxruntime")
    for runtime in runtimes_in(given) if given.benchmark or given.round_to == "auto" else ():
        check_runtime(runtime)


def runtimes_in(given: Evaluation) -> Sequence[str]:
    """Return the runtimes that are asked for."""
    if given.runtime is None:
        return (default_runtime(),)
    return (given.runtime,) if isinstance(given.runtime, str) else given.runtime


def free_path(path: Path) -> Path:
    """Return the first of ``stem.suffix``, ``stem-1.suffix`` ... that is no file yet, nor has a ``.bin``."""
    for number in itertools.count():
        found = path.with_name(f"{path.stem}-{number}{path.suffix}") if number else path
        weights = found.with_suffix(".bin") if path.suffix == ".xml" else found
        if not found.exists() and not weights.exists():
            return found
    raise AssertionError("numbers do not end")


def store_sparse(net: nn.Module, path: Path) -> dict[str, Any]:
    """Write a network with zeros among its weights as compressed sparse rows; say what that saves.

    Returns:
        The file and its measured size, and the size of the dense tensors, for results.json.
    """
    measured: list[Storage] = []
    path = write_new(path, lambda beside: measured.append(save_csr(net, beside)))
    (storage,) = measured
    print(
        f"sparse rows: {path}, {storage.stored_bytes:,} bytes of {storage.dense_bytes:,} dense; "
        f"{storage.num_nonzero:,} of {storage.num_weights:,} weights are not zero (saves storage, not time)"
    )
    return {
        "csr": str(path),
        "csr_bytes": storage.stored_bytes,
        "dense_bytes": storage.dense_bytes,
        "nonzero_parameters": storage.num_nonzero,
    }
