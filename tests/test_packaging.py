"""What is installed: the command, the configurations, the extras; and what needs none of them."""

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparsereg
from sparsereg import commands
from sparsereg.errors import InputError
from sparsereg.extras import MODULES, MissingExtra, advice, need

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = {"torch", "numpy", "scipy"}


def requirements(*files: str) -> dict[str, str]:
    """Name and range of every requirement in some files."""
    lines = [line for file in files for line in (ROOT / file).read_text().splitlines()]
    found = [re.match(r"([A-Za-z][\w.-]*)(?:\[\w+\])?(\S*)$", line) for line in lines]
    return {m.group(1): m.group(2) for m in found if m}


def package_names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement).group() for requirement in requirements}


def project() -> dict:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest's
    return toml.loads((ROOT / "pyproject.toml").read_text())["project"]


def shell(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env}
    )


def run(*arguments: str, cwd: Path, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return shell("-m", "sparsereg", *arguments, cwd=cwd, PYTHONPATH=str(path), OMP_NUM_THREADS="1")


# ---- what pyproject.toml says


def test_ranges_are_those_that_make_installs():
    ranges = requirements("requirements.txt", "requirements-dev.txt")
    listed = project()
    extras = [
        r
        for e, rs in listed["optional-dependencies"].items()
        if e not in ("all", "track", "openvino")
        for r in rs
    ]
    for requirement in [*listed["dependencies"], *extras]:
        name, versions = re.match(r"([\w-]+)(.*)", requirement).groups()
        assert ranges[name] == versions, name


def test_library_needs_three_packages_and_extras_cover_the_rest():
    listed = project()
    names = {extra: package_names(rs) for extra, rs in listed["optional-dependencies"].items()}
    base = package_names(listed["dependencies"])
    assert base == LIBRARY
    assert base | names["train"] | names["calibrate"] == set(requirements("requirements.txt"))
    assert names["all"] == {"sparsereg"}
    assert set(names) == {*MODULES, "all"}


def test_every_module_of_an_extra_is_one_that_its_packages_bring():
    listed = project()["optional-dependencies"]
    imported = {"hydra-core": "hydra", "scikit-learn": "sklearn", "pillow": "PIL"}
    for extra, modules in MODULES.items():
        packages = package_names(listed[extra])
        assert set(modules) == {imported.get(p, p.replace("-", "_")) for p in packages}


def test_an_editable_installation_finds_the_configurations(tmp_path):
    """It maps names to folders, and takes those for packages that say so."""
    assert (ROOT / "configs" / "__init__.py").is_file()
    assert '"sparsereg.configs": "configs"' in (ROOT / "setup.py").read_text()
    found = importlib.metadata.distributions(name="sparsereg")
    if not any("editable" in (d.read_text("direct_url.json") or "") for d in found):
        pytest.skip("there is no editable installation here")
    code = "from importlib.resources import files; print((files('sparsereg.configs') / 'test.yaml').name)"
    assert shell("-c", code, cwd=tmp_path).stdout == "test.yaml\n"


def test_licence_and_citation():
    assert project()["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n\nCopyright (c) ")
    assert f"version: {sparsereg.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{sparsereg.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


# ---- make


def makes(folder: Path, *arguments: str) -> str:
    """Return the commands that make would run in a folder."""
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    of_make = ("TORCH", "TORCH_INDEX", "MAKEFLAGS", "MAKELEVEL")  # make test may have started the tests
    unset = {key: value for key, value in os.environ.items() if key not in of_make}
    command = ["make", "-n", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=unset)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_takes_the_builds_of_torch_that_were_named_and_keeps_them(tmp_path):
    for name in ("Makefile", "requirements.lock", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    usual, alone = makes(tmp_path, "test"), makes(tmp_path, "TORCH=cpu")
    named = makes(tmp_path, "test", "TORCH=cpu")
    assert "pytest" in usual
    assert "--index-url" not in usual
    assert named.startswith(alone)
    assert "--index-url https://download.pytorch.org/whl/cpu " in alone

    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".torch").write_text("cpu\n")
    assert makes(tmp_path, "test") == named.replace(".venv --clear\n", ".venv \n")
    (tmp_path / ".venv" / ".ready").touch()
    assert "--clear" not in makes(tmp_path, "test")
    assert makes(tmp_path, "TORCH=cpu") == makes(tmp_path, "install")
    assert "--clear" in makes(tmp_path, "test", "TORCH=cu128")
    assert "--index-url" not in makes(tmp_path, "test", "TORCH=")
    assert "--clear" in makes(tmp_path, "test", "TORCH=")


def test_make_without_the_usual_torch_installs_the_rest_of_the_lock(tmp_path):
    """Split by the recipe itself: torch and its CUDA libraries on one side, nothing lost on the other."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    recipe = re.search(r"^(sed .*) && \$install", makes(tmp_path, "TORCH=cpu"), re.M).group(1)
    subprocess.run(recipe, shell=True, cwd=tmp_path, check=True)
    torch, rest = ((tmp_path / ".venv" / name).read_text() for name in ("torch.txt", "without-torch.lock"))
    locked = (ROOT / "requirements.lock").read_text()
    names = {text: set(re.findall(r"^([a-z][\w.-]*)==", text, re.M)) for text in (torch, rest, locked)}
    assert names[torch] == {"torch", "torchvision"}
    gone = names[locked] - names[rest] - names[torch]
    assert "nvidia-cublas" in gone
    assert all(name.startswith(("nvidia-", "cuda-", "triton")) for name in gone)
    assert rest.count("--hash") < locked.count("--hash")


def test_the_workflow_runs_the_jobs_that_one_runs_by_hand():
    script = (ROOT / ".ci" / "run").read_text()
    known = set(re.search(r"known: (.*)\" >&2", script).group(1).split(", "))
    assert known == set(re.findall(r"^#   \.ci/run (\w+)", script, re.M))
    runs = re.findall(r"run: bash \.ci/run (.*)", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert {job for line in runs for job in line.split()} == known
    wrong = subprocess.run(["bash", str(ROOT / ".ci" / "run"), "tests"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "unknown job tests; known: test, slow" in wrong.stderr


# ---- the command


def test_version_and_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sparsereg", "--version"])
    commands.main()
    monkeypatch.setattr(sys, "argv", ["sparsereg"])
    commands.main()
    version, _, text = capsys.readouterr().out.partition("\n")
    assert version == f"sparsereg {sparsereg.__version__}"
    assert all(f"  {name} " in text for name in commands.COMMANDS)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["trian"], "error: unknown command 'trian': did you mean 'train'?"),
        (["-m", "a=1"], "error: unknown command '-m'; known: train, test, calibrate, demo, compare"),
        (["demo", "fast=true"], "error: sparsereg demo takes no arguments, got 'fast=true'"),
    ],
)
def test_wrong_commands_are_one_line(capsys, monkeypatch, given, line):
    monkeypatch.setattr(sys, "argv", ["sparsereg", *given])
    with pytest.raises(SystemExit) as stop:
        commands.main()
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", line + "\n")


@pytest.mark.parametrize("name", ["train", "test", "calibrate"])
def test_the_command_says_what_the_script_says(tmp_path, name):
    script = shell(str(ROOT / f"{name}.py"), "--cfg", "job", cwd=tmp_path, PYTHONPATH=str(ROOT))
    command = run(name, "--cfg", "job", cwd=tmp_path)
    assert command.returncode == script.returncode == 0, command.stderr
    assert command.stdout == script.stdout
    assert command.stderr == script.stderr == ""


def test_started_processes_get_the_whole_command_line(monkeypatch):
    """Lightning starts the other processes of a DDP run with sys.argv."""
    from sparsereg import cli

    seen = []

    def run(cfg):
        seen.append((cfg.seed, sys.argv[:]))
        sys.exit(0)

    monkeypatch.setattr(cli, "report", lambda name, error: pytest.fail(str(error)))
    monkeypatch.setattr(sys, "argv", ["/bin/sparsereg", "train", "seed=3"])
    with pytest.raises(SystemExit):
        cli.script("train", run, arguments=["seed=3"])
    assert seen == [(3, ["/bin/sparsereg", "train", "seed=3"])]


def started(monkeypatch, *words: str) -> None:
    """As if this process had been started with these words, the first of which is the interpreter."""
    monkeypatch.setattr(sys, "orig_argv", list(words))
    monkeypatch.setattr(sys, "argv", list(words[words[1] == "-m" and 2 or 1 :]))


def test_a_command_that_is_ended_says_how_to_continue_it(monkeypatch, tmp_path):
    from sparsereg.interruption import _command

    started(monkeypatch, "/bin/python", "../train.py", "seed=3")
    assert _command(["seed=3"]) == (["/bin/python", "../train.py"], ["seed=3"])
    command = tmp_path / "sparsereg"
    command.write_text("#!/bin/python\n")
    command.chmod(0o755)
    started(monkeypatch, "/bin/python", str(command), "train", "seed=3")
    assert _command(["seed=3"]) == ([str(command), "train"], ["seed=3"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _command(["seed=3"]) == (["sparsereg", "train"], ["seed=3"])
    assert _command([]) == (["sparsereg", "train", "seed=3"], [])
    monkeypatch.setattr(sys, "orig_argv", ["/bin/python", "-c", "..."])
    assert _command(["seed=3"]) == (["sparsereg", "train"], ["seed=3"])
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=3"])
    assert _command(["seed=3"]) == (["python", "train.py"], ["seed=3"])


@pytest.mark.parametrize("name", ["train", "test", "calibrate"])
def test_help_and_errors_name_the_command_that_was_typed(tmp_path, name):
    for start, typed in (
        ([str(ROOT / f"{name}.py")], f"python {name}.py"),
        (["-m", "sparsereg", name], f"python -m sparsereg {name}"),
        ([str(installed_command(tmp_path)), name], f"sparsereg {name}"),
    ):
        told = shell(*start, "--help", cwd=tmp_path, PYTHONPATH=str(ROOT))
        assert told.returncode == 0, told.stderr
        assert f"usage: {typed} " in told.stdout
        other = {"python", "sparsereg"} - {typed.split()[0]}
        assert not re.search(rf"^\W*({'|'.join(other)}) ", told.stdout, re.M)
        wrong = shell(*start, "sead=1", cwd=tmp_path, PYTHONPATH=str(ROOT))
        assert wrong.stderr.endswith(f"; see {typed} --cfg job\n")


def installed_command(folder: Path) -> Path:
    """Write what an installation makes of ``sparsereg`` in [project.scripts]."""
    command = folder / "bin" / "sparsereg"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f"#!{sys.executable}\nfrom sparsereg.commands import main\nmain()\n")
    return command


def test_compare(tmp_path):
    for k, results in enumerate(({"val_acc": 0.5, "data": {}}, {"val_acc": 0.25, "parameters": 1000})):
        (tmp_path / f"v{k}").mkdir()
        (tmp_path / f"v{k}" / "results.json").write_text(json.dumps(results))
    from sparsereg.commands.compare import compare

    lines = compare([str(tmp_path / "v0"), str(tmp_path / "v1" / "results.json")]).splitlines()
    assert [line.split() for line in lines[1:]] == [["val_acc", "0.5", "0.25"], ["parameters", "-", "1,000"]]
    with pytest.raises(InputError, match="keys=val_ac: no run has it: did you mean 'val_acc'"):
        compare([str(tmp_path / "v0"), "keys=val_ac"])
    with pytest.raises(InputError, match="v2: No such file or directory"):
        compare([str(tmp_path / "v2")])
    (tmp_path / "v1" / "results.json").write_text("[]")
    with pytest.raises(InputError, match="not the results.json of a run"):
        compare([str(tmp_path / "v1")])


# ---- without the extras

BARE = f"""
import sys
for name in {sorted({m for modules in MODULES.values() for m in modules})}:
    sys.modules[name] = None  # as if it were not installed
"""


def bare(code: str, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return shell("-c", BARE + code, *arguments, cwd=cwd, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


def test_the_library_needs_torch_numpy_and_scipy_only(tmp_path):
    code = """
import torch, sparsereg
for name in sparsereg.__all__:
    if name != "Sparsify":
        getattr(sparsereg, name)
try:
    sparsereg.Sparsify
except ModuleNotFoundError as error:
    assert "pip install 'sparsereg[train]'" in str(error), error
import sparsereg.compression, sparsereg.temperature, sparsereg.model.googlenet, sparsereg.calibration
net = sparsereg.SparseMLP(4, 3, 2)
sparsereg.compute_l0_penalty(net).backward()
net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
gated = sparsereg.gate(net, torch.randn(2, 6))
small = sparsereg.compression.compact(gated.eval(), torch.randn(2, 6))
sparsifier = sparsereg.Sparsifier(net, torch.randn(2, 6), target_macs=0.6, steps=1)
sparsifier.loss(sparsifier.model(torch.randn(2, 6)).sum()).backward()
small = sparsifier.finish()
import numpy, scipy.sparse
x = scipy.sparse.random(60, 5, 0.5, format="csr", random_state=0)
model = sparsereg.SparseL0Linear(5, seed=0).fit(x, x @ numpy.array([1, 0, 0, 2, 0.0]), epochs=20)
weights = sparsereg.SparseCalibrationWeights(60, seed=0)
weights.fit(x.T.tocsr(), numpy.ones(5), loss_type="relative", epochs=20)
print(type(small).__mro__[-2].__name__, *model.predict(x).shape, *weights.predict(x.T.tocsr()).shape)
"""
    done = bare(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Module", "60", "5"]


@pytest.mark.parametrize("name", ["train", "test", "calibrate", "demo"])
def test_a_command_without_its_extra_says_how_to_install_it(tmp_path, name):
    done = bare("from sparsereg.commands import main; main()", tmp_path, name)
    extra = commands.COMMANDS[name][0]
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"error: \w+ is not installed.*: pip install 'sparsereg\[{extra}\]'\n", done.stderr)


@pytest.mark.parametrize("name", ["training", "sklearn"])
def test_a_module_without_its_extra_says_how_to_install_it(tmp_path, name):
    done = bare(f"import sparsereg.{name}", tmp_path)
    assert "pip install 'sparsereg[train]'" in done.stderr.splitlines()[-1]


def test_advice_names_the_extra_of_a_module():
    assert advice(ModuleNotFoundError("no", name="onnxruntime.capi")).endswith("'sparsereg[export]'")
    assert advice(ModuleNotFoundError("no", name="somebody_elses")) is None
    with pytest.raises(MissingExtra, match=r"no_such_module is not installed.*sparsereg\[track\]"):
        need("track", "no_such_module")


def test_import_takes_no_time(tmp_path):
    """Torch is loaded with the first name that needs it, and nothing else is."""
    code = "import sys; before = set(sys.modules); import sparsereg; print(*set(sys.modules) - before)"
    loaded = shell("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT)).stdout.split()
    assert len(loaded) < 40
    assert not {"torch", "numpy", "scipy", "asyncio", "inspect"} & set(loaded)


# ---- the wheel


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with what the wheel installs."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "sparsereg", "configs"):
        copy = ["cp", "-r", str(ROOT / name), str(source / name)]
        source.mkdir(exist_ok=True)
        subprocess.run(copy, check=True)
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    done = shell("-m", "pip", *install, str(source), cwd=folder)
    if "No module named pip" in done.stderr:
        done = shell("-m", "uv", "pip", *install, str(source), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.mark.slow
def test_the_wheel_brings_configurations_types_and_the_command(site):
    assert (site / "sparsereg" / "py.typed").is_file()
    ours = {p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.yaml")}
    there = site / "sparsereg" / "configs"
    assert {p.relative_to(there) for p in there.rglob("*.yaml")} == ours
    ours = {p.relative_to(ROOT) for p in (ROOT / "sparsereg").rglob("*.py")}
    ours.add(Path("sparsereg/configs/__init__.py"))
    assert {p.relative_to(site) for p in (site / "sparsereg").rglob("*.py")} == ours
    (distribution,) = importlib.metadata.distributions(path=[str(site)])
    assert distribution.version == sparsereg.__version__
    assert distribution.metadata["License-Expression"] == "MIT"
    (command,) = distribution.entry_points
    assert (command.name, command.value) == ("sparsereg", "sparsereg.commands:main")


@pytest.mark.slow
def test_the_installed_command_trains_tests_and_compares_anywhere(site, tmp_path):
    small = ["data=digits", "model=lenet300", "trainer=cpu", "data.limit_train_images=200"]
    trained = run("train", *small, "trainer.max_epochs=1", "logger=none", cwd=tmp_path, path=site)
    assert trained.returncode == 0, trained.stderr
    results = trained.stdout.splitlines()[-1].removeprefix("results: ")
    folder = Path(results).parent
    tested = run("test", f"ckpt_path={folder / 'checkpoints' / 'last.ckpt'}", cwd=tmp_path, path=site)
    assert tested.returncode == 0, tested.stderr
    compared = run("compare", str(folder), "outputs/test/version_0", "keys=test_acc", cwd=tmp_path, path=site)
    _, first, second = compared.stdout.splitlines()[1].split()
    assert first == second


@pytest.mark.slow
def test_a_folder_of_the_users_own_configurations_is_found(site, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "quick.yaml").write_text("# @package _global_\nseed: 77\n")
    done = run("train", "--config-dir", "mine", "experiment=quick", "--cfg", "job", cwd=tmp_path, path=site)
    assert "seed: 77\n" in done.stdout, done.stderr
    code = "from importlib.resources import files; print((files('sparsereg.configs') / 'test.yaml').name)"
    assert shell("-c", code, cwd=tmp_path, PYTHONPATH=str(site)).stdout == "test.yaml\n"
