"""The picture of a sweep: seeds are means, axes are readable, what was asked for is there."""

import pytest

from sparsereg import sweep_plot
from sparsereg.sweep_plot import draw, grouped


def row(overrides, **results):
    return {"overrides": overrides, **results}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw, and return the panels."""
    kept = []
    panel = sweep_plot._panel

    def remembered(axes, *rest):
        panel(axes, *rest)
        kept.append(axes)

    monkeypatch.setattr(sweep_plot, "_panel", remembered)

    def call(rows, x, panels):
        path = tmp_path / "sweep.png"
        assert draw(path, rows, x, panels)
        assert path.read_bytes().startswith(b"\x89PNG")
        return kept

    return call


def test_seeds_are_one_point_with_mean_and_range():
    rows = [
        row(f"trainer=cpu lambda_l0={x} seed={s}", test_acc=0.9 + s / 100) for x in (1, 2) for s in (0, 2, 4)
    ]
    points, along = grouped(rows)
    assert along == "lambda_l0"
    assert [point.setting for point in points] == [{"lambda_l0": "1"}, {"lambda_l0": "2"}]
    assert points[0].mean("test_acc") == pytest.approx(92)
    assert points[0].reach("test_acc") == pytest.approx((2, 2))


def test_accuracy_against_sparsity_in_per_cent(drawn):
    rows = [row(f"lambda_l0={x}", test_acc=0.9 - x / 100, exact_sparsity=x / 10) for x in (1, 2, 5)]
    (axes,) = drawn(rows, "exact_sparsity", [["test_acc"]])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("parameters removed (%)", "test accuracy (%)")
    assert [text.get_text() for text in axes.texts] == ["1", "2", "5"]
    assert "lambda_l0" in axes.get_title()


def test_a_calibration_has_the_targets_left_out_and_the_sample_size(drawn):
    rows = [
        row(f"num_households={n}", kept=n, mean_are=5 / n, held_out_mean=50 / n, ess=n / 2)
        for n in (100, 1000)
    ]
    left, right = drawn(rows, "kept", [["mean_are", "held_out_mean"], ["ess"]])
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["calibrated targets", "targets left out"]
    assert left.get_xscale() == left.get_yscale() == "log"
    assert right.get_ylabel() == "effective sample size (households)"
    assert not left.texts  # the numbers stand on the axis


def test_what_differs_by_rounding_is_drawn_level(drawn):
    rows = [
        row(f"chi2={c}", kept=2000, mean_are=0.0039 + 1e-9 * i) for i, c in enumerate(("0", "1e-5", "1e-3"))
    ]
    (axes,) = drawn(rows, "kept", [["mean_are", "held_out_mean"], ["ess"]])  # no hold-out, no second panel
    low, high = axes.get_ylim()
    assert high - low > 0.01
    assert axes.get_xlabel() == "chi2"  # what was swept: everybody kept as many
    assert axes.get_xscale() == "symlog"


def test_words_are_labels_and_paths_are_short(drawn):
    rows = [
        row(f"ckpt_path=outputs/train/version_{i}/checkpoints/last.ckpt", test_acc=0.9, exact_sparsity=i / 10)
        for i in (1, 2)
    ]
    (axes,) = drawn(rows, "exact_sparsity", [["test_acc"]])
    assert [text.get_text() for text in axes.texts] == ["version_1", "version_2"]


def test_other_keys_are_lines_of_their_own(drawn):
    rows = [
        row(f"num_households={n} method={m}", kept=n, mean_are=0.1)
        for n in (10, 20, 30)
        for m in ("pps", "random")
    ]
    (axes,) = drawn(rows, "kept", [["mean_are"]])
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["method=pps", "method=random"]


@pytest.mark.parametrize("rows", [[], [row("seed=0")], [row("seed=0", test_acc=None)]])
def test_nothing_to_show(rows, tmp_path):
    assert not draw(tmp_path / "sweep.png", rows, "exact_sparsity", [["test_acc"]])
    assert not any(tmp_path.iterdir())


def test_one_job_alone(drawn):
    (axes,) = drawn([row("seed=0", test_acc=0.5, exact_sparsity=0.0)], "exact_sparsity", [["test_acc"]])
    assert axes.get_ylabel() == "test accuracy (%)"
