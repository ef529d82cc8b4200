"""Command lines: every key of every schema with wrong and right values, groups, pairs, flags, odd text."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import base

SCRIPTS = ("train", "test", "calibrate")


@dataclass(frozen=True)
class Case:
    """A command line.

    Attributes:
        script, arguments: what is typed.
        expected: accept, refuse or any.
        about: the idea, in a word, for the summary.
    """

    script: str
    arguments: tuple[str, ...]
    expected: str
    about: str


@dataclass(frozen=True)
class Key:
    """A key of a composed configuration.

    Attributes:
        script: whose.
        choice: the group choice that brings it in, or nothing.
        path: dotted.
        default: its value.
    """

    script: str
    choice: str | None
    path: str
    default: Any


def keys() -> list[Key]:
    """Return every key of every script under every choice of every group, each once."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from sparsereg.cli import CONFIGS

    OmegaConf.register_new_resolver("checkpoint_of_job", lambda number: "F", replace=True)
    found: dict[tuple[str, str], Key] = {}
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for script in SCRIPTS:
            for choice in [None, *choices()]:
                try:
                    cfg = hydra.compose(script, overrides=[choice] if choice else [])
                except Exception:  # a group that this script does not have
                    continue
                for path, value in _flat(OmegaConf.to_container(cfg, resolve=False)):
                    if isinstance(value, str) and "${" in value:
                        value = 0.5  # the one of the schedules
                    found.setdefault((script, path), Key(script, choice, path, value))
    GlobalHydra.instance().clear()
    return list(found.values())


def choices() -> list[str]:
    """Return every choice of every group but Hydra's own."""
    from sparsereg.cli import CONFIGS

    files = sorted(p.relative_to(CONFIGS) for p in CONFIGS.glob("*/*.yaml"))
    return [f"{p.parent}={p.stem}" for p in files if p.parts[0] not in ("hydra", "row", "experiment")]


def _flat(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in node.items():
        found.append((f"{prefix}{name}", value))
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
    return found


_EVERYWHERE = (
    "''", "' '", "null", "[]", "{}", "[[]]", "[null]", "{a:1}", "{a:{b:[1,2]}}",
    "${oc.env:SPARSEREG_FUZZ_SECRET}",
    "${oc.env:NO_SUCH}", "${nokey}", "${.x}", "${", "}", "$", "\\${x}", "'${oc.env:SPARSEREG_FUZZ_SECRET}'",
    "${hydra:runtime.cwd}",
    "${now:%Y}", "${oc.decode:'1'}", "${oc.create:{a:1}}", "${lambda_l0}", "???", "~", "1,2", "a,b",
    "range(1,3)",
    "choice(1,2)", "glob(*)", "interval(0,1)", "tag(a,1)", "[1,", "(1)", "'unclosed", "a'b", 'a"b',
    '"double"', "a b", "a\tb",
    "a\nb", "\u202eevil", "ünïcödé", "\u0660\u0661", "1\u00a0",
    "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    "é" * 500, "a" * 20000, "9" * 400, "=1", "==", "1=2", "a:b", "a=b=c", "%s%n", "\\", "../..", "/dev/null",
    ".", "-", "--", "0x10", "1_000", "1e3", "1.",
    "str(1)", "int(x)", "float(nan)", "bool(2)", "!!python/object:os.system", "__import__('os')", "{{1}}",
    "{_target_:os.system}",
)  # fmt: skip
_NOT_A_NUMBER = ("abc", "nan", "NaN", "inf", "-inf", "1e400", "-1e400", "''", "[1]", "[]", "{a:1}", "1.5.2",
"1;2", "one", "True1", "12abc", "'1 2'")  # fmt: skip
_NUMBERS = ("0", "-1", "1", "2", "0.5", "-0.5", "1.5", "1e-300", "1e300", "-1e300", "99999999999999999999",
"-99999999999999999999",
            "2147483648", "9223372036854775808", "1e-45", "0.0", "-0.0", "1.0", "100", "0.999999999999",
            "true", "null")  # fmt: skip
_NOT_A_SWITCH = (
    "abc",
    "2",
    "-1",
    "1.5",
    "nan",
    "[]",
    "[true]",
    "{}",
    "''",
    "maybe",
    "truee",
    "'true false'",
    "10",
)
_SWITCHES = ("true", "false", "True", "FALSE", "yes", "no", "on", "off", "1", "0", "null")
_NOT_TEXT = ("[a]", "{a:b}", "[]", "{}")
_TEXTS = ("abc", "null", "1", "1.5", "true", "''", "' '", "auto", "none", "last", "/dev/null",
"/no/such/file", ".", "images.npz", "H.csv", "x" * 300,
          "/dev/full", "/proc/self/mem", "~", "~nobody", "con\x01trol", "cuda:99", "cuda:-1", "cpu:x",
          "\\x00")  # fmt: skip
_LISTS = ("[]", "[a]", "[nan]", "[1]", "[1,2]", "[-1,0]", "[2,1]", "[0.5,0.5]", "[1,2,3]", "[[1,2]]",
"[null,null]", "{a:1}", "5", "abc", "null", "[inf,1]",
          "[1e400,2]", "[true,false]", "['','']")  # fmt: skip
_LONG = (
    "epochs",
    "finetune.epochs",
    "trainer.max_epochs",
    "problem.households",
    "problem.targets",
    "data.image_size",
)
"""Keys of which a huge value is right and means hours or all the memory."""
_WRITES = ("problem.tables",)
"""Keys that name a place to write to: only harmless ones."""
_SLOW = {"trainer.compile": ("true", "True", "TRUE", "yes", "on", "1"), "trainer.strategy": ("ddp",),
"benchmark": ("true", "True", "TRUE", "yes", "on", "1")}  # fmt: skip


def values(key: Key, rng: random.Random) -> tuple[str, str]:
    """Return a value and whether it must be refused."""
    default = key.default
    kind, must = rng.random(), "refuse"
    if key.path in _WRITES:
        return rng.choice(
            ("/dev/null", "/dev/full", "/proc/nothing", "H.csv", "new/folder", "''", "5", "[]")
        ), "any"
    if kind < 0.35:
        value, must = rng.choice(_EVERYWHERE), "any"
    elif isinstance(default, bool):
        value, must = (rng.choice(_NOT_A_SWITCH), "refuse") if kind < 0.75 else (rng.choice(_SWITCHES), "any")
    elif isinstance(default, int | float):
        value, must = (rng.choice(_NOT_A_NUMBER), "refuse") if kind < 0.65 else (rng.choice(_NUMBERS), "any")
        if must == "refuse" and isinstance(default, int) and rng.random() < 0.15:
            value = "1.5"
            must = "refuse" if not key.path.endswith(("val_size", "num_households")) else "any"
        if (
            key.path == "holdout.groups"
            or key.path in _LONG
            and value.lstrip("-").isdigit()
            and int(value) > 200
        ):
            value, must = "7", "any"
    elif isinstance(default, str):
        value, must = (rng.choice(_NOT_TEXT), "refuse") if kind < 0.5 else (rng.choice(_TEXTS), "any")
    elif isinstance(default, list):
        value, must = rng.choice(_LISTS), "any"
    elif isinstance(default, dict):
        value, must = (
            rng.choice(("5", "abc", "[1]", "[]", "{}", "true", "''", "{zzz:1}", "null", "nan", "/dev/null")),
            "any",
        )
    else:
        pool = (*_NUMBERS, *_TEXTS, *_LISTS, *_NOT_A_NUMBER, *_SWITCHES)
        value, must = rng.choice(pool), "any"
    if value in _SLOW.get(key.path, ()):
        value, must = "false", "any"
    if key.path in ("holdout.groups", "trainer.devices", "trainer.fast_dev_run", "device"):
        must = "any"
    if key.path in _LONG and must == "any" and _is_large(value):
        value = "7"
    return value, must


def _is_large(value: str) -> bool:
    try:
        return float(value) > 200 or float(value) == -1
    except ValueError:
        return "range" in value


def quoted(value: Any) -> str:
    """Write a default as Hydra's grammar reads it."""
    if isinstance(value, str):
        return "'" + value.replace("'", "\\'") + "'"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return "[" + ",".join(quoted(v) for v in value) + "]"
    return repr(value)


def arguments_for(script: str, choice: str | None = None, leave_out: tuple[str, ...] = ()) -> list[str]:
    """Return right arguments of a script, quick ones, without the keys that a case is about."""
    start = {"train": base.TRAIN, "calibrate": base.SURVEY, "test": [f"ckpt_path={base.GATED}", *base.TEST]}[
        script
    ]
    arguments = list(start)
    if choice:
        group = choice.partition("=")[0]
        arguments = [a for a in arguments if a.partition("=")[0] != group] + [choice]
        if group == "data":
            arguments = [a for a in arguments if not a.startswith("data.image_size")]
        arguments += {
            "data=npz": ["data.path=images.npz"],
            "data=image_folder": ["data.root=pictures", "data.image_size=8"],
        }.get(choice, [])
        if choice == "problem=households":
            arguments = list(base.HOUSEHOLDS)
        if choice == "problem=matrix":
            arguments = list(base.MATRIX)
    return [a for a in arguments if a.partition("=")[0] not in leave_out]


def one_key(key: Key, rng: random.Random) -> Case:
    """One key with an odd value."""
    value, must = values(key, rng)
    arguments = arguments_for(key.script, key.choice, (key.path,))
    if key.path in ("trainer.max_epochs", "trainer.min_epochs", "trainer.max_time"):
        arguments.append("trainer.max_steps=2")
    return Case(key.script, (*arguments, f"{key.path}={value}"), must, f"{key.path}={value[:30]}")


def default_value(key: Key, rng: random.Random) -> Case:
    """One key with the value that it has anyway."""
    if isinstance(key.default, dict) or key.path in _SLOW or key.path in _LONG or key.default is None:
        return one_key(key, rng)
    arguments = arguments_for(key.script, key.choice, (key.path,))
    if key.path == "trainer.max_epochs":
        arguments.append("trainer.max_steps=2")
    safe = key.choice is None or key.choice in (
        "data=npz",
        "data=image_folder",
        "model=lenet5",
        "temperature=linear",
    )
    plain = key.path not in (
        "ckpt_path",
        "num_households",
        "method",
        "model.name",
        "data.name",
        "data.root",
        "problem.kind",
    )
    expected = "accept" if safe and plain and key.path.partition(".")[0] not in ("model", "data") else "any"
    return Case(
        key.script, (*arguments, f"{key.path}={quoted(key.default)}"), expected, f"{key.path}=default"
    )


def two_keys(first: Key, rng: random.Random, all_keys: list[Key]) -> Case:
    """Two keys with odd values, or one twice."""
    mine = [k for k in all_keys if k.script == first.script and k.choice in (None, first.choice)]
    second = rng.choice(mine)
    if rng.random() < 0.2:
        second = first
    (one, _), (two, _) = values(first, rng), values(second, rng)
    arguments = arguments_for(first.script, first.choice, (first.path, second.path))
    if any(
        k.path in ("trainer.max_epochs", "trainer.min_epochs", "trainer.max_time") for k in (first, second)
    ):
        arguments.append("trainer.max_steps=2")
    twice = first is second
    given = (*arguments, f"{first.path}={one}", f"{second.path}={two}")
    return Case(
        first.script, given, "refuse" if twice and one != two else "any", f"pair {first.path} {second.path}"
    )


def spelling(key: Key, rng: random.Random) -> Case:
    """A key that is misspelt, or with another operator."""
    p = key.path
    head, _, tail = p.rpartition(".")
    changed = rng.choice(
        (f"{p}x=1", f"{p[:-1]}=1", f"+{p}=1", f"++{p}=1", f"~{p}", f"~{p}=zzz", p, f"{p}==1", f"{p}.x=1",
        f"{p}[0]=1", f"{p}.0=1",
         f"+{p}.zzz=1", f" {p}=1", f"{p} =1", f"{p}= 1", f"{p.upper()}=1", f"'{p}'=1", f"{p}@x=1",
         f"{head}.__class__=1", f"+{head or 'zzz'}._target_=os.system",
         f"{p}=", f"{p}:1", f"+{head}/{tail}=1", f"{p}\u200b=1", f"-{p}=1", f"--{p}=1", f"{p}\n=1",
         f".{p}=1", f"{p}.=1", f"{head}..{tail}=1")
    )  # fmt: skip
    path = changed.lstrip("+~").partition("=")[0]
    if path in _LONG and changed.startswith(("++", "+")):
        changed = changed.replace("=1", "=2")
    arguments = arguments_for(key.script, key.choice, (p,))
    if p.startswith("trainer.max"):
        arguments.append("trainer.max_steps=2") if p != "trainer.max_steps" else None
    return Case(key.script, (*arguments, changed), "any", f"spelling {changed[:40]}")


def group(rng: random.Random) -> Case:
    """A group that is given something else, or twice."""
    script = rng.choice(SCRIPTS)
    groups = {"train": ("model", "data", "temperature", "optimizer", "trainer", "logger", "callbacks",
    "experiment", "row"),
              "test": ("model", "data", "trainer", "callbacks"),
              "calibrate": ("problem", "temperature", "holdout")}[script]  # fmt: skip
    name = rng.choice(groups)
    value = rng.choice(("3", "0.5", "-1", "null", "[]", "{}", "[lenet300]", "[a,b]", "{name:x}", "true",
    "''", "nan", "no_such", "../train", "/etc/passwd", "lenet300.yaml",
                        "LENET300", " lenet300", "default", "cpu,gpu", "${x}", "a/b", "é", "x" * 5000, ".",
                        "..", "experiment", "hydra", "\\"))  # fmt: skip
    form = rng.choice(
        (
            "{n}={v}",
            "{n}={v}",
            "{n}={v}",
            "+{n}={v}",
            "~{n}",
            "~{n}={v}",
            "{n}@x={v}",
            "{n}@_global_={v}",
            "{n}={v} {n}={v}",
            "++{n}={v}",
            "{n}",
        )
    )
    wrong = (
        form.format(n=name, v=value).split(" ") if form.count("{n}") > 1 else [form.format(n=name, v=value)]
    )
    return Case(script, (*arguments_for(script, None, (name,)), *wrong), "any", f"group {wrong[0][:40]}")


CONTRADICTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("train", ("target_sparsity=0.5", "target_macs=0.5")),
    ("train", ("target_sparsity=0.5", "lambda_l0=2")),
    ("train", ("lambda_l0=null",)),
    ("train", ("resume_training=true",)),
    ("train", ("without_using_gate=true", "finetune.epochs=1")),
    ("train", ("without_using_gate=true", "target_sparsity=0.5")),
    ("train", ("trainer.min_epochs=5", "trainer.max_epochs=2")),
    ("train", ("seed=1", "seed=2")),
    ("train", ("optimizer.betas=[]",)),
    ("train", ("optimizer.betas=[1,2]",)),
    ("train", ("optimizer.schedule=multistep", "optimizer.milestones=[-5]")),
    ("train", ("data.augment.crop_scale=[1.0,0.5]",)),
    ("train", ("data.augment.crop_scale=[-1,0.5]",)),
    ("train", ("data.augment.crop_ratio=[2,1]",)),
    ("train", ("data.batch_size=0",)),
    ("train", ("data.val_size=-0.5",)),
    ("train", ("callbacks.histogram_every_n_epochs=-1",)),
    ("train", ("callbacks.compact_every_n_epochs=-1",)),
    ("train", ("trainer.check_val_every_n_epoch=0",)),
    ("train", ("trainer.check_val_every_n_epoch=-1",)),
    ("train", ("trainer.log_every_n_steps=-1",)),
    ("train", ("trainer.accumulate_grad_batches=0",)),
    ("train", ("trainer.gradient_clip_val=-1",)),
    ("train", ("trainer.devices=0",)),
    ("train", ("trainer.devices=-5",)),
    ("train", ("trainer.max_epochs=-2",)),
    ("train", ("ema_decay=1.5",)),
    ("train", ("label_smoothing=1",)),
    ("train", ("optimizer.lr=inf",)),
    ("train", ("optimizer.momentum=-1", "optimizer.name=sgd")),
    ("train", ("optimizer.gate_lr_ratio=-1",)),
    ("train", ("model.droprate_init=[0.5]",)),
    ("train", ("model.dropout=1.5",)),
    ("train", (f"ckpt_path={base.GATED}", "without_using_gate=true")),
    ("train", (f"ckpt_path={base.GATED}", "model=googlenet")),
    ("train", (f"ckpt_path={base.GATED}", "model=lenet5")),
    ("train", ("ckpt_path=/no/such/file",)),
    ("train", ("ckpt_path=.",)),
    ("train", ("ckpt_path=/dev/null",)),
    ("train", ("ckpt_path=/dev/zero",)),
    ("train", ("ckpt_path=H.csv",)),
    ("train", ("ckpt_path=''",)),
    ("train", ("distill.ckpt_path=/no/such",)),
    ("train", ("distill.ckpt_path=H.csv",)),
    ("train", ("distill.weight=2",)),
    ("train", ("data=npz",)),
    ("train", ("data=npz", "data.path=/dev/zero")),
    ("train", ("data=npz", "data.path=.")),
    ("train", ("data=image_folder", "data.root=/no/such")),
    ("train", ("data=image_folder", "data.root=H.csv")),
    ("train", ("model=compacted",)),
    ("train", ("trainer=gpu",)),
    ("train", ("trainer.accelerator=tpu",)),
    ("train", ("trainer.accelerator=abc",)),
    ("train", ("trainer.strategy=abc",)),
    ("train", ("trainer.profiler=abc",)),
    ("train", ("trainer.precision=7",)),
    ("train", ("trainer.gradient_clip_algorithm=abc",)),
    ("train", ("trainer.max_time=abc",)),
    ("test", ("ckpt_path=/no/such",)),
    ("test", ("ckpt_path=null",)),
    ("test", ("ckpt_path=.",)),
    ("test", ("ckpt_path=H.csv",)),
    ("test", (f"ckpt_path={base.GATED}", "export=abc")),
    ("test", (f"ckpt_path={base.GATED}", "compact=maybe")),
    ("calibrate", ("holdout.groups=[age]", "holdout.folds=3")),
    ("calibrate", ("max_weight_ratio=2", "refit=false")),
    ("calibrate", ("num_households=0",)),
    ("calibrate", ("num_households=-5",)),
    ("calibrate", ("num_households=301",)),
    ("calibrate", ("method=pruning", "num_households=null")),
    ("calibrate", ("holdout.folds=0",)),
    ("calibrate", ("holdout.folds=1",)),
    ("calibrate", ("holdout.folds=100000",)),
    ("calibrate", ("holdout.groups=[nothing]",)),
    ("calibrate", ("device=cuda:99",)),
    ("calibrate", ("problem=matrix",)),
    ("calibrate", ("problem=households",)),
    ("calibrate", ("problem=households", "problem.households=/dev/zero", "problem.targets=T.csv")),
    ("calibrate", ("problem=households", "problem.households=H.csv", "problem.targets=.")),
    ("calibrate", ("problem=households", "problem.households=H.csv", "problem.targets=T.csv",
    "problem.weight=zzz")),
    ("calibrate", ("problem=households", "problem.households=H.csv", "problem.targets=T.csv",
    "problem.weight=area")),
    ("calibrate", ("problem=households", "problem.households=H.csv", "problem.targets=T.csv",
    "problem.id=zzz")),
    ("calibrate", ("problem=households", "problem.households=H.csv", "problem.targets=T.csv",
    "problem.id=area")),
    ("calibrate", ("+group_multipliers.zzz=2",)),
    ("calibrate", ("problem.disagreement=-1",)),
    ("calibrate", ("ckpt_path=/no/such",)),
    ("calibrate", ("ckpt_path=H.csv",)),
    ("calibrate", (f"ckpt_path={base.INTERRUPTED}",)),
    ("calibrate", ("chi2=nan",)),
    ("calibrate", ("max_weight_ratio=inf",)),
    ("calibrate", ("temperature=-1",)),
    ("calibrate", ("temperature.anneal_epochs=0",)),
)  # fmt: skip
"""Two settings that exclude each other, ranges and paths: all to be refused."""


def contradiction(rng: random.Random) -> Case:
    """One of CONTRADICTIONS."""
    script, wrong = rng.choice(CONTRADICTIONS)
    named = {w.lstrip("+").partition("=")[0] for w in wrong}
    choice = next((w for w in wrong if w.startswith(("problem=", "data=npz", "data=image"))), None)
    leave_out = set(named)
    if choice:
        leave_out |= {
            "data.image_size",
            *(a.partition("=")[0] for a in base.SURVEY if a.startswith("problem.")),
        }
    given = [
        a
        for a in arguments_for(script, None, tuple(leave_out))
        if script != "test" or not a.startswith("ckpt_path")
    ]
    return Case(script, (*given, *wrong), "refuse", f"wrong {' '.join(wrong)[:60]}")


RIGHT: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("train", ("lambda_l0=0",)),
    ("train", ("lambda_l0=20", "droprate_init=0.05")),
    ("train", ("without_using_gate=true", "ckpt_path=null", "resume_training=false")),
    ("train", ("target_sparsity=0.5",)),
    ("train", ("target_macs=0.5",)),
    ("train", ("finetune.epochs=1", "target_sparsity=0.5")),
    ("train", (f"ckpt_path={base.PLAIN}", "lambda_l0=20", "droprate_init=0.05")),
    ("train", (f"ckpt_path={base.GATED}", "lambda_l0=2")),
    ("train", (f"ckpt_path={base.GATED}", "resume_training=true", "trainer.max_epochs=2")),
    ("train", (f"ckpt_path={base.PLAIN}", "resume_training=true", "without_using_gate=true",
    "trainer.max_epochs=2")),
    ("train", (f"distill.ckpt_path={base.PLAIN}",)),
    ("train", ("model=lenet5", "data.image_size=28")),
    ("train", ("model=sparse_mlp",)),
    ("train", ("model=googlenet", "data.image_size=32")),
    ("train", ("temperature=exponential",)),
    ("train", ("temperature=linear", "temperature.final=0.2")),
    ("train", ("optimizer=sgd_cosine",)),
    ("train", ("optimizer=adamw_multistep",)),
    ("train", ("logger=none",)),
    ("train", ("ema_decay=0.9",)),
    ("train", ("label_smoothing=0.1",)),
    ("train", ("test_checkpoint=best",)),
    ("train", ("data=npz", "data.path=images.npz")),
    ("train", ("data=image_folder", "data.root=pictures", "data.image_size=8")),
    ("train", ("callbacks.compact_every_n_epochs=1",)),
    ("train", ("penalty=weights",)),
    ("train", ("seed=4294967295",)),
    ("train", ("trainer.gradient_clip_val=1.0",)),
    ("train", ("trainer.precision=bf16-mixed",)),
    ("train", ("data.augment=null",)),
    ("train", ("data.val_size=0",)),
    ("train", ("-m", "lambda_l0=0.5,1")),
    ("test", (f"ckpt_path={base.GATED}",)),
    ("test", (f"ckpt_path={base.PLAIN}",)),
    ("test", (f"ckpt_path={base.GATED}", "compact=true")),
    ("test", (f"ckpt_path={base.GATED}", "export=pt2")),
    ("test", (f"ckpt_path={base.TUNED.parents[1]}",)),
    ("calibrate", ()),
    ("calibrate", ("method=random",)),
    ("calibrate", ("method=pps",)),
    ("calibrate", ("method=hybrid",)),
    ("calibrate", ("method=hard_concrete",)),
    ("calibrate", ("temperature=0.5", "method=hard_concrete")),
    ("calibrate", ("temperature=exponential", "temperature.final=0.1", "method=hard_concrete")),
    ("calibrate", ("num_households=null", "method=all")),
    ("calibrate", ("num_households=null",)),
    ("calibrate", ("hold_total=true",)),
    ("calibrate", ("max_weight_ratio=20",)),
    ("calibrate", ("loss=mape",)),
    ("calibrate", ("holdout.folds=2",)),
    ("calibrate", ("weights_format=parquet",)),
    ("calibrate", ("plots=true", "tensorboard=true")),
    ("calibrate", ("-m", "num_households=50,60")),
)  # fmt: skip
"""Right command lines."""


def right(rng: random.Random) -> Case:
    """One of RIGHT, a survey of files, or a help text."""
    if rng.random() < 0.1:
        return Case("calibrate", tuple(rng.choice((base.HOUSEHOLDS, base.MATRIX))), "accept", "right files")
    if rng.random() < 0.1:
        script, flag = rng.choice(SCRIPTS), rng.choice((("--help",), ("--cfg", "job"), ("-h",)))
        return Case(script, (*arguments_for(script), *flag), "accept", f"right {flag[0]}")
    script, given = rng.choice(RIGHT)
    named = {g.partition("=")[0] for g in given}
    if "data=npz" in given:
        named.add("data.image_size")
    if any(g.startswith("ckpt_path=") for g in given) and "resume_training=true" in given:
        named.add("trainer.max_epochs")
    return Case(
        script,
        (*arguments_for(script, None, tuple(named)), *given),
        "accept",
        f"right {' '.join(given)[:60]}",
    )


_FLAGS = (
    ("--cfg", "job"), ("--cfg", "all"), ("--cfg", "hydra"), ("--cfg",), ("--cfg", "nope"),
    ("--cfg", "job", "--resolve"), ("--resolve",),
    ("--package", "x"), ("--cfg", "job", "--package", "nokey"), ("--cfg", "job", "-p", "optimizer"),
    ("--info",), ("--info", "nope"), ("--info", "defaults"), ("--info", "searchpath"),
    ("--hydra-help",), ("--version",), ("--help",), ("-h",), ("-m",), ("--multirun",), ("--run",), ("-r",),
    ("-x",), ("--foo",), ("--foo=bar",), ("--help=x",),
    ("-sc",), ("--shell-completion", "install=bash"), ("--config-path", "/no/such"), ("--config-path=.",),
    ("--config-name", "nope"), ("-cn", "test"), ("-cn",), ("--config-dir", "/no/such"),
    ("--config-dir",), ("--config-dir", "mine"), ("-cd", "H.csv"), ("--experimental-rerun", "/no/such"),
    ("--experimental-rerun", "evil.pickle"), ("--",), ("-",), ("---",),
    ("-m", "seed=1,2"), ("-m", "seed=abc,2"), ("-m", "seed=range(1,3)"), ("-m", "seed=1,1"),
    ("-m", "lambda_l0=0.1", "nokey=1,2"), ("-m", "-m"), ("--multirun", "--cfg", "job"),
    ("-m", "hydra/sweeper=nope"), ("-m", "hydra/launcher=joblib"), ("-m", "hydra.sweep.dir=/dev/null/x"),
    ("-m", "hydra.sweep.dir=H.csv"), ("-m", "hydra.sweep.subdir=a/b"), ("-m", "seed="), ("-m", "seed=1,"),
    ("hydra.run.dir=/dev/null/x",), ("hydra.run.dir=H.csv",), ("hydra.run.dir=''",),
    ("hydra.run.dir=other",), ("hydra.output_subdir=x",), ("hydra.job.chdir=true",),
    ("hydra.job.chdir=abc",), ("hydra.verbose=true",), ("hydra.verbose=abc",),
    ("hydra/job_logging=disabled",), ("hydra/job_logging=none",), ("hydra/job_logging=nope",),
    ("hydra.job_logging.root.level=FOO",), ("hydra/hydra_logging=default",),
    ("hydra.searchpath=[file:///no/such]",), ("hydra.searchpath=5",),
    ("hydra.mode=MULTIRUN",), ("hydra.mode=nope",), ("+hydra.callbacks.x._target_=os.getcwd",),
    ("+hydra.callbacks.x._target_=no.such",), ("hydra.callbacks=null",), ("hydra.callbacks.sweep=5",),
    ("hydra=5",), ("hydra=null",), ("~hydra",), ("hydra.nope=1",),
    ("hydra.job.name=''",), ("hydra.job.name=a/b",), ("hydra.job.env_set.X=1",), ("hydra.job.env_set=5",),
    ("hydra.runtime.cwd=x",), ("hydra.help.template=x",), ("hydra.overrides.task=[]",), ("hydra.job.num=5",),
    ("hydra.sweep.dir=5",),
)  # fmt: skip


def flag(rng: random.Random) -> Case:
    """Flags of Hydra, right and wrong, somewhere among the arguments."""
    script = rng.choice(SCRIPTS)
    given = rng.choice(_FLAGS)
    arguments = arguments_for(script, None, tuple(g.partition("=")[0] for g in given))
    place = rng.choice((0, len(arguments)))
    whole = arguments[:place] + list(given) + arguments[place:]
    return Case(script, tuple(whole), "any", f"flag {' '.join(given)[:50]}")


_TOKENS = ("", " ", "=", "==", "=1", "a", "+", "~", "++", "+=", "~=", "a.b.c=1", "nokey=1", "+nokey=1",
"++nokey=1", "λ=1", "a b=1", "\n", "\t=1", "🙂", "🙂=🙂", "'", "\"", "`id`",
           "$(id)", ";", "|", "a;b=1", "#", "# x=1", "//", "/", "/etc/passwd", "..", "*", "?", "[", "]", "{",
           "}", "()", "a=[", "a={", "a=(", "a='", 'a="', "a=\\", "@", "@x", "a@b=c", "a@b:c=d",
           "a:b", ":", "\x7f", "\u202e=1", "\ufeff", "x" * 100000, "a=" + "[" * 2000,
           "a=" + "[" * 200 + "]" * 200, "1=1", "None=1", "null=1", "true=1", "_=1", "__class__=1",
           "_target_=os.system", "+_target_=os.system",
           "_self_=1", "defaults=[]", "+defaults=[]", "-m=1", "key", "%", "%00", "\\x00", "lambda_l0",
           "data.path", "C:\\x=1", "http://x=1", "train", "train.py", "0", "-1", "--1", "=null")  # fmt: skip


def token(rng: random.Random) -> Case:
    """Something that is no argument at all."""
    script = rng.choice(SCRIPTS)
    arguments = arguments_for(script)
    arguments.insert(rng.randrange(len(arguments) + 1), rng.choice(_TOKENS))
    if rng.random() < 0.2:
        arguments.insert(rng.randrange(len(arguments) + 1), rng.choice(_TOKENS))
    return Case(script, tuple(arguments), "any", "token")


class Commands:
    """All command lines of a seed, by number."""

    def __init__(self, seed: int):
        self.seed = seed
        self.keys = keys()
        random.Random(seed).shuffle(self.keys)

    def __getitem__(self, number: int) -> Case:
        """Return a case: every key has its turn, between other attacks."""
        rng = random.Random(f"commands-{self.seed}-{number}")
        key = self.keys[(number // 2) % len(self.keys)]
        if number % 2 == 0:
            return one_key(key, rng)
        kinds: dict[Callable[[], Case], float] = {
            lambda: one_key(key, rng): 2,
            lambda: two_keys(key, rng, self.keys): 2,
            lambda: default_value(key, rng): 1.5,
            lambda: spelling(key, rng): 1.5,
            lambda: group(rng): 1.5,
            lambda: contradiction(rng): 2,
            lambda: right(rng): 1.5,
            lambda: flag(rng): 1.5,
            lambda: token(rng): 1,
        }
        return rng.choices(list(kinds), list(kinds.values()))[0]()
