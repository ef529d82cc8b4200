"""Settings: one declaration of type, range, default and meaning; files and help texts are made from it."""

import math
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sparsereg import reference
from sparsereg.errors import InputError
from sparsereg.settings import (
    SEED,
    Contradiction,
    Settings,
    above,
    all_keys,
    count,
    declared,
    plain,
    read,
    setting,
    within,
)

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Inner(Settings):
    """A group below."""

    share: float = setting(0.5, "a share", within("[0, 1)"))
    low: float = setting(0.0, "the least")
    high: float = setting(1.0, "the most")

    def check(self) -> None:
        """In order."""
        if self.low > self.high:
            raise Contradiction("{}low is more than {}high")


@dataclass(frozen=True)
class Outer(Settings):
    """One setting of each type."""

    OTHERS: ClassVar[str | None] = "others"

    flag: bool = setting(False, "a switch")
    number: int = setting(3, "a number", count())
    rate: float | None = setting(None, "a rate", above(0))
    size: int | float = setting(2, "a count or a share", within("[0, 9]"))
    word: str = setting("a", "a choice", choices=("a", "bee"))
    mode: bool | str = setting("auto", "a switch or auto", choices=("auto",))
    path: str | None = setting(None, "a file")
    pair: tuple[float, float] = setting((0.1, 0.2), "two numbers", within("[0, 1)"))
    many: tuple[int, ...] = setting((1,), "some", count())
    few: tuple[int, ...] = setting((), "some or none", count(), empty=True)
    shares: Mapping[str, float] = setting(dict, "by name")
    seed: int = setting(0, "of all noise", SEED)
    inner: Inner = setting(lambda: Inner(share=0.25), "a group")
    off: Inner | None = setting(None, "a group that may be left out")
    hidden: int = setting(7, "of the library only", key=False)
    others: Mapping[str, Any] = setting(dict, "anything else")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"flag": "yes"}, "flag=yes: expected true or false"),
        ({"flag": 1}, "flag=1: expected true or false"),
        ({"flag": None}, "flag=null: expected true or false"),
        ({"number": 0}, "number=0: expected an integer >= 1"),
        ({"number": 2.0}, "number=2.0: expected an integer >= 1"),
        ({"number": True}, "number=true: expected an integer >= 1"),
        ({"number": 10**30}, "at most 2,147,483,647"),
        ({"number": 10**5000}, "number=(an integer of 16610 bits)"),
        ({"seed": 2**32}, "seed=4294967296: expected an integer in [0, 2**32)"),
        ({"rate": 0}, "rate=0: expected a number > 0 or null"),
        ({"rate": math.nan}, "rate=nan: expected a number > 0 or null"),
        ({"rate": math.inf}, "rate=inf: expected a number > 0 or null"),
        ({"rate": "0.1"}, "rate=0.1: expected a number > 0 or null"),
        ({"rate": 10**400}, "rate=(an integer of 1329 bits): expected"),
        ({"word": "be"}, "word=be: expected one of a, bee: did you mean 'bee'?"),
        ({"word": True}, "word=true: expected one of a, bee"),
        ({"mode": "yes"}, "mode=yes: expected one of auto or true or false"),
        ({"path": ""}, "path=: expected a text or null, not empty"),
        ({"path": ["a"]}, "path=[a]: expected a text or null"),
        ({"path": "a\nb"}, "expected a text or null"),
        ({"path": "a\0b"}, "expected a text or null"),
        ({"path": "\udcff"}, "expected a text or null"),
        ({"path": "a" * 5000}, "expected a text or null"),
        ({"pair": [0.1]}, "pair=[0.1]: expected a list of 2 numbers, each a number in [0, 1)"),
        ({"pair": [0.1, "x"]}, "pair=[0.1, x]: expected a list of 2 numbers"),
        ({"pair": [0.1, 1.0]}, "pair=[0.1, 1.0]: expected a list of 2 numbers, each a number in [0, 1)"),
        ({"pair": 0.1}, "pair=0.1: expected a list of 2 numbers"),
        ({"many": []}, "many=[]: expected a list of integers, each an integer >= 1, not empty"),
        ({"many": [1, 2.5]}, "many=[1, 2.5]: expected a list of integers"),
        ({"shares": {"a": "x"}}, "shares={a: x}: expected keys and values"),
        ({"shares": [1]}, "shares=[1]: expected keys and values"),
        ({"inner": 3}, "inner=3: expected keys such as share, low, high"),
        ({"inner": None}, "inner=null: expected keys such as share, low, high"),
        ({"inner": {"shar": 0.1}}, "unknown key 'inner.shar': did you mean 'inner.share'?"),
        ({"inner": {"share": 1}}, "inner.share=1: expected a number in [0, 1)"),
        ({"inner": {"low": 2}}, "inner.low is more than inner.high"),
        ({"off": "no"}, "off=no: expected keys and values or null"),
    ],
)
def test_wrong_values_are_named_with_what_was_expected(given, message):
    with pytest.raises(InputError) as caught:
        read(Outer, given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("given", [3, None, [1], "x"])
def test_a_group_that_is_no_group(given):
    with pytest.raises(InputError, match="the configuration=.*: expected keys such as flag, number, rate"):
        read(Outer, given)


def test_values_become_their_types_and_the_rest_keeps_its_default():
    made = read(Outer, {"rate": 1, "size": 0.5, "mode": False, "path": 12, "inner": {"low": 0.5}, "odd": [1]})
    assert (made.rate, type(made.rate), made.size, made.mode, made.path) == (1.0, float, 0.5, False, "12")
    assert made.inner == Inner(share=0.25, low=0.5)
    assert made.others == {"odd": [1]}
    assert plain(made)["odd"] == [1]
    assert read(Outer, plain(made)) == made
    assert "hidden" not in plain(made)


def test_the_library_checks_the_same_and_nothing_can_be_changed():
    with pytest.raises(ValueError, match="number=0: expected an integer >= 1"):
        Outer(number=0)
    with pytest.raises(ValueError, match="low is more than high"):
        Inner(low=2.0)
    with pytest.raises(FrozenInstanceError):
        Outer().number = 2


# ---- the scripts' settings


@pytest.mark.parametrize("name", list(reference.SETTINGS))
def test_every_key_of_the_files_is_a_setting_and_every_setting_a_key(name):
    """For all choices of all groups; with the same default, so that a new setting is in one place."""
    cls = reference.declared_by(name)
    groups = {key: sorted(p.stem for p in (CONFIGS / key).glob("*.yaml")) for key in declared(cls)}
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for group, choices in groups.items():
            for choice in choices:
                composed = OmegaConf.to_container(compose(name, [f"{group}={choice}"]), resolve=True)
                kind = declared(cls)[group].group.kind_of(composed[group], group)
                needed = dict.fromkeys(getattr(kind, "NEEDED", ()), "FILE")
                made = plain(read(kind, composed[group] | needed))
                if group == "logger":  # a file switches on what it names, so that several go together
                    made = {key: value for key, value in made.items() if key in composed[group]}
                assert made == composed[group] | needed
        composed = OmegaConf.to_container(compose(name), resolve=True)
    if name == "train":
        assert composed.pop("logger") == {"tensorboard": {}}
        composed["logger"] = plain(declared(cls)["logger"].default)
    assert composed == plain({key: d.default for key, d in declared(cls).items() if d.key})


def test_files_are_written_from_the_settings():
    for path, text in reference.files(CONFIGS).items():
        assert path.read_text() == text, f"{path.name} is not up to date: run make configs"


@pytest.mark.parametrize("name", list(reference.SETTINGS))
def test_every_setting_says_what_it_means_in_the_help(name):
    cls = reference.declared_by(name)
    told = reference.help_of(name, {}, CONFIGS)
    for key, setting_ in all_keys(cls).items():
        assert setting_.help or key.endswith((".name", ".kind", ".source")), key
    for key in declared(cls):
        if declared(cls)[key].key:
            assert f"\n  {key}:" in told
    assert max(len(line) for line in told.splitlines()) <= 120


def test_choices_are_keys_of_their_tables():
    from sparsereg.calibration import config as calibration
    from sparsereg.calibration.solver.selection import NAMES
    from sparsereg.data.config import CONFIGS as DATA
    from sparsereg.data.kind import KINDS as SOURCES
    from sparsereg.model.googlenet import ACTIVATIONS
    from sparsereg.zoo.config import CONFIGS as MODELS
    from sparsereg.zoo.kinds.googlenet import GoogleNetModel
    from sparsereg.zoo.network import KINDS

    assert set(calibration.METHODS) == {"auto", *NAMES}
    assert set(DATA) == set(SOURCES)
    assert set(MODELS) == set(KINDS)
    assert set(declared(GoogleNetModel)["act"].choices) == set(ACTIVATIONS)
