"""A wrong command line ends in exactly one line that starts with ``error:``, and exit code 2."""

import errno
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest

from sparsereg import cli
from sparsereg.arguments import named, quoted, spelled, swept_keys
from sparsereg.calibration.config import CalibrationRun
from sparsereg.cli import settings_of
from sparsereg.commands import calibrate, test, train
from sparsereg.errors import wrong_input

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = {"train": train.run, "test": test.run, "calibrate": calibrate.run}


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Call a script in this process; return its exit code and the lines on stderr."""
    monkeypatch.chdir(tmp_path)

    def call(name, *arguments, work=None):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.script(name, work or RUNS[name])
        return stop.value.code, capfd.readouterr().err.splitlines()

    return call


EVERYWHERE = [
    ("seed", "cannot read the argument seed; expected KEY=VALUE"),
    ("=3", "cannot read the argument =3"),
    ("seed=[1", "cannot read the argument seed=[1"),
    ("seed={a: 1", "cannot read the argument"),
    ("seed=" + "[" * 2000, "cannot read the argument"),
    ("seed=1 seed=2", "seed is given twice, seed=1 and seed=2"),
    ("seed=1 ++seed=1", "seed is given twice"),
    ("seed={a:1} seed=1", "seed is given twice"),
    ("seed=1 seed={a:1}", "seed.a is given twice"),
    ("no_such_key=" + "9" * 20000, "no_such_key"),
    ("seed=null", "seed=null: expected an integer in [0, 2**32)"),
    ("seed=true", "seed=true: expected"),
    ("seed=1e3", "seed=1000.0: expected"),
    ("seed=1,2", "seed=1,2: expected one value; a sweep over several has -m"),
    ("seed=${oc.env:NO_SUCH_VARIABLE}", "NO_SUCH_VARIABLE"),
    ("seed=${no_such_key}", "seed: Interpolation key 'no_such_key' not found"),
    ("seed=${oc.no_such_resolver:1}", "seed: Unsupported interpolation type"),
    ("seed=${seed}", "seed"),
    ("seed=???", "seed: Missing mandatory value"),
    ("seed=" + "9" * 400, "seed=(an integer of 1329 bits): expected"),
    ("~seed", "~seed: a setting cannot be taken away"),
    ("+sed=1", "unknown key 'sed': did you mean 'seed'?"),
    ("sed=1", "unknown key 'sed': did you mean 'seed'?"),
    ("seed.a=1", "seed"),
    ("hydra.verbose=3.5", "the configuration cannot be composed"),
    ("hydra.no_such=1", "hydra.no_such"),
    ("hydra/job_logging=no_such", "unknown choice hydra/job_logging=no_such"),
    ("no/such/group=x", "no/such/group"),
    ("-m seed=1,2 hydra.sweep.dir=/dev/null/x", "cannot write /dev/null"),
    ("--cfg nothing", "invalid choice: 'nothing'"),
    ("--no-such-flag", "--no-such-flag"),
    ("--config-dir=nowhere", "--config-dir=nowhere: no such folder"),
    ("--config-name=nothing", "nothing"),
    ("--config-path=nowhere", "nowhere"),
    ("-m --cfg job", "--multirun and --cfg do not go together"),
    ("--resolve", "--resolve belongs to --cfg"),
    ("--package a", "--package belongs to --cfg"),
    ("--cfg job --package no_such", "package 'no_such' not found in config"),
    ("--cfg hydra -p no.such", "package 'no.such' not found in config"),
    ("--experimental-rerun=x.pickle", "--experimental-rerun"),
    ("ckpt_path=[a]", "ckpt_path=[a]: expected a text or null"),
    ("ckpt_path=''", "ckpt_path=: expected a text or null, not empty"),
    ("ckpt_path=no_such_file", "no_such_file"),
]
NETWORKS = [
    ("model=3", "model=3: expected one of compacted, googlenet"),
    ("model=null", "model=null: expected one of"),
    ("model=[lenet5]", "model=[lenet5]: expected one of"),
    ("model={name:lenet5}", "model={name: lenet5}: expected one of"),
    ("model=lenet5 model=lenet300", "model is given twice"),
    ("data=null", "data=null: expected one of cifar10, digits"),
    ("data=false", "data=false: expected one of"),
    ("~data", "~data: a setting cannot be taken away"),
    ("trainer=1", "trainer=1: expected one of auto, cpu"),
    ("data.augment=3", "data.augment=3: expected keys and values or null"),
    ("data.augment.flip=sure", "data.augment.flip=sure: expected true or false"),
    ("data.augment.zom=0.1", "unknown key 'data.augment.zom': did you mean 'data.augment.zoom'?"),
    ("+data.augment.zom=0.1", "unknown key 'data.augment.zom': did you mean 'data.augment.zoom'?"),
    ("data.augment.crop_ratio=[1.2,0.9]", "data.augment.crop_ratio=[1.2, 0.9]: expected two numbers"),
    ("model.sampling=0.5", "model.sampling=0.5: expected one of batch, example"),
    ("model.weights=F.pth", "unknown key 'model.weights' here: it belongs to model=timm or torchvision"),
    ("data.path=F.npz", "unknown key 'data.path' here: it belongs to data=labelled_text or npz or text"),
    ("+model.gates=1", "unknown key 'model.gates': did you mean 'model.gate'?"),
    ("trainer.max_epochs=-2", "trainer.max_epochs=-2: expected"),
    ("trainer.limit_train_batches=1.5", "trainer.limit_train_batches=1.5: expected"),
    ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1: expected"),
    ("trainer.min_epochs=9 trainer.max_epochs=2", "trainer.min_epochs=9 is more than trainer.max_epochs=2"),
    ("trainer.compile=perhaps", "trainer.compile=perhaps: expected true or false"),
    ("callbacks.batch_norm=5", "callbacks.batch_norm=5: expected keys such as num_images, batch_size"),
    ("callbacks={batch_norm:1}", "callbacks={batch_norm: 1}: expected one of default"),
    ("callbacks.batch_norm.batch_size=1", "callbacks.batch_norm.batch_size=1: expected an integer >= 2"),
]
BY_SCRIPT = {
    "train": [
        ("temperature=0.5", "temperature=0.5: expected one of constant, cosine, exponential, linear"),
        ("optimizer=[1]", "optimizer=[1]: expected one of adamw_cosine"),
        ("experiment=null", "experiment=null: expected one of"),
        ("optimizer.lr=inf", "optimizer.lr=inf: expected a number > 0"),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: expected a list of 2 numbers"),
        ("optimizer.betas=[]", "optimizer.betas=[]: expected a list of 2 numbers"),
        ("optimizer.betas=[0.9,x]", "optimizer.betas=[0.9, x]: expected a list of 2 numbers"),
        ("optimizer.momentum=1", "optimizer.momentum=1: expected"),
        ("optimizer.schedule=multistep", "optimizer.schedule=multistep needs the epochs of its steps"),
        ("optimizer.lr=${optimizer}", "optimizer"),
        ("target={ramp:0.5} target.ramp=0.3", "target.ramp is given twice"),
        ("target=0.5", "target=0.5: expected keys such as params"),
        ("target_sparsity=0.5 lambda_l0=2", "exclude each other"),
        ("target_sparsity=0.5 lambda_l0=1.0", "exclude each other"),
        ("target_sparsity=0.5 target_macs=0.5", "exclude each other"),
        ("target_sparsity=0.5 trainer.max_epochs=-1", "give trainer.max_epochs"),
        ("lambda_l0=null", "lambda_l0=null leaves open"),
        ("resume_training=true", "resume_training=true needs a checkpoint"),
        ("logger.name=x", "unknown key 'logger.name'"),
        ("callbacks.histogram_every_n_epochs=-3", "callbacks.histogram_every_n_epochs=-3: expected"),
        ("callbacks.compact_every_n_epochs=-1", "callbacks.compact_every_n_epochs=-1: expected"),
        *NETWORKS,
    ],
    "test": [
        ("compact=1", "compact=1: expected true or false"),
        ("benchmark=yes", "benchmark=yes: expected true or false"),
        ("export=tflite", "export=tflite: expected one of onnx, openvino, pt2 or null"),
        ("", "give the checkpoint to test"),
        *NETWORKS,
    ],
    "calibrate": [
        ("problem=1", "problem=1: expected one of households, matrix, synthetic"),
        ("problem=null", "problem=null: expected one of"),
        ("problem.households=many", "problem.households=many: expected an integer >= 100"),
        ("problem.households=0", "problem.households=0: expected an integer >= 100"),
        ("problem.disagreement=nan", "problem.disagreement=nan: expected a number in [0, 0.5)"),
        ("problem.seed=-1", "problem.seed=-1: expected"),
        ("problem.kind=matrx", "problem.kind=matrx: expected one of synthetic, matrix, households"),
        ("problem.matrix=M.npz", "unknown key 'problem.matrix' here: it belongs to problem=matrix"),
        ("problem=matrix", "problem=matrix needs problem.matrix=FILE"),
        ("problem=matrix problem.matrix={a:1}", "problem.matrix={a: 1}: expected a text or null"),
        ("problem=households problem.weight=[w]", "problem.weight=[w]: expected a text or null"),
        ("holdout=3", "holdout=3: expected keys such as groups, folds"),
        ("holdout.folds=1", "holdout.folds=1: expected an integer >= 2 or null"),
        ("holdout.groups=[]", "holdout.groups=[]: expected"),
        ("holdout.groups=[a] holdout.folds=3", "holdout.groups and holdout.folds contradict each other"),
        ("max_weight_ratio=inf", "max_weight_ratio=inf: expected a number > 0 or null"),
        ("checkpoint_seconds=-1", "checkpoint_seconds=-1: expected a number >= 0"),
        ("temperature=0.5 temperature.initial=0.6", "temperature.initial is given twice"),
        ("temperature=-1", "temperature.initial=-1: expected a number >= 1e-06"),
        ("method=calibrate bounds=[2,0.5]", "bounds=[2, 0.5]: expected the smaller one first"),
        ("method=calibrate bounds=2", "bounds=2: expected a list of 2"),
        ("method=calibrate bounds=[nan,2]", "bounds=[nan, 2]: expected a list of 2"),
        ("method=calibrate unit_factor=[a]", "unit_factor=[a]: expected a text or null"),
        ("plots=on", "plots=on: expected true or false"),
        ("+group_multipliers.income=lots", "group_multipliers={income: lots}: expected keys and values"),
    ],
}
CASES = [(name, line, said) for name, own in BY_SCRIPT.items() for line, said in [*EVERYWHERE, *own]]


@pytest.mark.costly
@pytest.mark.parametrize(("name", "line", "said"), CASES, ids=[f"{n} {line[:40]}" for n, line, _ in CASES])
def test_a_wrong_command_line_is_one_line(run, name, line, said):
    arguments = [calibrate.spelt_out(a) if name == "calibrate" else a for a in line.split()]
    if name == "test" and line and "ckpt_path" not in line:
        arguments.append("ckpt_path=run.ckpt")
    code, err = run(name, *arguments)
    assert code == 2, err
    assert len(err) == 1, err
    assert err[0].startswith("error: ")
    assert len(err[0]) < 2100
    if not (name == "test" and line in ("seed=1,2",)):
        assert said in err[0]
    assert not [*Path("outputs").glob("**/version_*"), *Path("outputs").glob("failures")]


LONG = "x" * 300
NAMED = [
    ("train", f"ckpt_path={LONG}"),
    ("train", f"ckpt_path={LONG} resume_training=true"),
    ("train", f"distill.ckpt_path={LONG} model=lenet300 data=digits data.image_size=8"),
    ("train", f"--config-dir={LONG}"),
    ("train", f"data=npz data.path={LONG}"),
    ("train", f"data=image_folder data.root={LONG}"),
    ("train", f"model=torchvision model.weights={LONG} data=digits"),
    ("test", f"ckpt_path={LONG}"),
    ("calibrate", f"ckpt_path={LONG}"),
    ("calibrate", f"problem.tables={LONG}"),
    ("calibrate", f"problem=matrix problem.matrix=M.npz problem.targets={LONG}.csv"),
    ("calibrate", f"problem=households problem.households=H.csv problem.targets={LONG}.csv"),
]


@pytest.mark.parametrize(("name", "line"), NAMED, ids=[f"{n} {line[:24]}" for n, line in NAMED])
def test_a_name_that_no_file_can_have_is_one_line(run, name, line):
    code, err = run(name, *line.split())
    assert (code, len(err)) == (2, 1), err
    assert err[0].startswith(f"error: {'x' * 60}"), err
    assert "File name too long; expected the path of a file or folder" in err[0]


def test_a_file_that_may_not_be_read_is_one_line(run):
    def work(composed):
        with wrong_input():
            raise PermissionError(errno.EACCES, "Permission denied", "mine/H.csv")

    said = "error: mine/H.csv: Permission denied; expected the path of a file or folder that can be read"
    assert run("calibrate", work=work) == (2, [said])


def test_messages_do_not_stand_before_an_error(run):
    import logging

    def work(composed):
        with wrong_input():
            logging.getLogger("sparsereg").info("on the way")
            raise ValueError("it cannot be")

    assert run("train", work=work) == (2, ["error: it cannot be"])


def test_messages_are_told_when_all_is_well(run):
    import logging

    def work(composed):
        with wrong_input():
            logging.getLogger("sparsereg").info("on the way")
        raise ValueError("ours")

    code, err = run("train", work=work)
    assert code == 1
    assert err[0] == "on the way"
    assert err[1].startswith("failed: ValueError: ours")


@pytest.mark.parametrize("name", list(RUNS))
def test_too_little_memory_is_said_and_blames_no_file(run, name):
    import torch

    def numpy_memory():
        np.empty(2**55, dtype=np.float64)

    def torch_memory():
        torch.empty(2**55)

    def blamed():
        try:
            torch.empty(2**55)
        except RuntimeError as error:
            raise ValueError("F.ckpt: cannot be read") from error

    for fails in (numpy_memory, torch_memory, blamed):

        def work(composed, fails=fails):
            with wrong_input():
                fails()

        arguments = ["ckpt_path=x"] if name == "test" else []
        code, err = run(name, *arguments, work=work)
        assert code == 2
        assert err == [f"error: out of memory: {cli.LESS_MEMORY[name]}"]


@pytest.mark.parametrize(
    "text",
    ["lambda_l0: 1\nlambda_l0: 2\n", "5\n", "\tlambda_l0: 1\n", "lambda_l0: \0\n", "? [a]\n: 1"],
)
def test_an_experiment_that_is_no_yaml_is_one_line(run, tmp_path, text):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text("# @package _global_\n" + text)
    code, err = run("train", "--config-dir", "mine", "experiment=own")
    assert (code, len(err)) == (2, 1), err
    assert err[0].startswith("error: ")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("problem.id=größe", "problem.id='größe'"),
        (
            "report.variables=[umsatz,gewinn/erträge, año ]",
            "report.variables=[umsatz,'gewinn/erträge', 'año' ]",
        ),
        ("problem.households=Größen und mehr.csv", "problem.households='Größen und mehr.csv'"),
        ("problem.targets=d.xlsx::Süd 1", "problem.targets='d.xlsx::Süd 1'"),
        ("missing_in={a: ñ, b: 'ü'}", "missing_in={a: 'ñ', b: 'ü'}"),
        ("targets.include=[\"region == 'Süd'\"]", "targets.include=[\"region == 'Süd'\"]"),
        ("problem.id='größe'", "problem.id='größe'"),
        ("seed=1", "seed=1"),
        ("pick=macs<=3", "pick='macs<=3'"),
        ('pick="macs<=3"', 'pick="macs<=3"'),
    ],
)
def test_letters_of_any_language_need_no_quotes(said, meant):
    assert quoted([said, "--größe", said]) == [meant, "--größe", meant]


@pytest.mark.parametrize(
    "said",
    [
        ["+missing_in.größe=zero", "+missing_in.año=drop"],
        ["+missing_in={größe: zero, año: drop}"],
        ["+missing_in={ größe : zero,año:drop}"],
    ],
)
def test_keys_that_are_names_of_columns_have_any_letters(said):
    data = ["problem=households", "problem.households=H.csv", "problem.targets=T.csv"]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = hydra.compose("calibrate", overrides=quoted([*data, *said]))
    assert settings_of(CalibrationRun, composed).missing_in == {"größe": "zero", "año": "drop"}


def test_names_are_spelled_in_ascii_and_back():
    assert spelled("größe 日") == "gr__uf6____udf__e __u65e5__"
    assert named(spelled("größe 日")) == "größe 日"
    assert quoted(["+group_multipliers.Süd=2"]) == ["+group_multipliers.S__ufc__d=2"]


def test_a_key_with_other_letters_is_one_line(run):
    code, err = run("calibrate", "+größe.x=zero")
    assert (code, len(err)) == (2, 1)
    assert err[0].endswith("a key has the letters a to z, digits, _ and - only")


def test_keys_of_a_sweep():
    job = ["seed=1", "trainer.fast=False", "lambda_l0=0.5", "row=a"]
    assert swept_keys(job, ["-m", "trainer.fast=false", "seed=1", "lambda_l0=0.5,1"]) == ["lambda_l0", "row"]
    assert swept_keys(["seed=1"], ["-m", "seed=range(3)"]) == ["seed"]


def test_errors_in_a_circle_are_told(run):
    def work(composed):
        full, other = OSError(errno.ENOSPC, "No space left on device"), RuntimeError("while flushing")
        full.__context__, other.__context__ = other, full
        raise full

    code, err = run("train", work=work)
    assert code == 2
    assert "the disk is full" in err[0]
