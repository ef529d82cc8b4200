"""Selectors: numbers that hold, ties, gradients, kinds of data."""

import numpy as np
import pandas as pd
import pytest
import torch

import sparsereg.gates
from sparsereg.gates import FeatureGate, HybridGate, L0Gate, SampleGate
from sparsereg.gates.selection import top
from sparsereg.model import basic_l0_blocks
from sparsereg.penalties import compute_l0_penalty, update_temperatures


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spread(gate, seed: int = 1):
    """Give the gates of a selector different locations."""
    with torch.no_grad():
        gate.gates.log_alpha.copy_(2 * torch.randn(gate.size, generator=seeded(seed)))
    return gate


# eval mode


@pytest.mark.parametrize("p", [0.001, 0.3, 0.7, 0.999])
def test_equal_logits_neither_select_all_nor_none(p):
    data = torch.randn(1000, 40)
    for gate, select, dim, number in (
        (SampleGate(1000, 100), "select_samples", 0, 100),
        (FeatureGate(40, 7), "select_features", 1, max(1, min(7, round(40 * p)))),
    ):
        with torch.no_grad():
            gate.gates.log_alpha.fill_(torch.logit(torch.tensor(p)).item() + gate.temperature * -2.3979)
        selected, indices = getattr(gate.eval(), select)(data, generator=seeded())
        assert len(indices) == number
        assert torch.equal(selected, data.index_select(dim, indices))
        assert len(indices.unique()) == number


@pytest.mark.parametrize(("n", "target"), [(1, 1), (10, 1), (10, 10), (10_000, 1000), (257, 256)])
def test_sample_gate_selects_exactly_its_target(n, target):
    for gate in (SampleGate(n, target).eval(), spread(SampleGate(n, target)).eval()):
        _, indices = gate.select_samples(torch.zeros(n, 2))
        assert len(indices) == target
        assert torch.equal(indices, indices.sort().values)


def test_selection_is_by_rank_of_p_active():
    gate = spread(SampleGate(500, 50)).eval()
    _, indices = gate.select_samples(torch.zeros(500, 1))
    want = torch.topk(gate.gates.p_active(), 50).indices.sort().values
    assert torch.equal(indices, want)


def test_gates_that_are_sure_are_ranked_too():
    """P(z > 0) rounds to 1 above a location of 17 and to 0 below -103, and ranks nothing any more."""
    for base in (40.0, -200.0):
        gate = SampleGate(100, 2).eval()
        with torch.no_grad():
            gate.gates.log_alpha.fill_(base)
            gate.gates.log_alpha[[7, 71]] = base + 10
        assert gate.gates.p_active().unique().numel() == 1
        assert gate.get_active_indices().tolist() == [7, 71]


def test_ties_are_broken_by_the_generator_and_without_bias():
    gate = SampleGate(20, 5).eval()
    data = torch.zeros(20, 1)
    first, again = (gate.select_samples(data, seeded(3))[1] for _ in range(2))
    assert torch.equal(first, again)
    generator = seeded()
    counts = torch.zeros(20)
    for _ in range(4000):
        counts[gate.select_samples(data, generator)[1]] += 1
    # Each item is one of 5 in 20: 1000 +- 27.
    assert (counts - 1000).abs().max() < 140


def test_without_a_generator_eval_mode_repeats_itself():
    gate = FeatureGate(30, 4).eval()
    a, b = (gate.select_features(torch.zeros(2, 30))[1] for _ in range(2))
    assert torch.equal(a, b)


def test_only_ties_are_random():
    p = torch.tensor([0.5, 0.9, 0.5, 0.1, 0.5])
    seen = {tuple(top(p, 2, seeded(s)).tolist()) for s in range(50)}
    assert seen == {(0, 1), (1, 2), (1, 4)}


def test_feature_gate_selects_what_its_gates_expect_and_no_more_than_allowed():
    gate = FeatureGate(50, 10).eval()
    with torch.no_grad():
        gate.gates.log_alpha.fill_(-20.0)
        gate.gates.log_alpha[[4, 7, 9]] = 20.0
    assert gate.select_features(torch.zeros(1, 50))[1].tolist() == [4, 7, 9]
    with torch.no_grad():
        gate.gates.log_alpha.fill_(20.0)
    assert len(gate.select_features(torch.zeros(1, 50))[1]) == 10
    with torch.no_grad():
        gate.gates.log_alpha.fill_(-20.0)
    assert len(gate.select_features(torch.zeros(1, 50))[1]) == 1


@pytest.mark.parametrize(
    ("n", "l0", "random", "target", "want"),
    [
        (1000, 0.25, 0.75, 100, (25, 75)),
        (1000, 0.25, 0.75, None, (50, 150)),
        (1000, 0.29, 0.71, 100, (29, 71)),
        (1000, 1.0, 0.0, 100, (100, 0)),
        (1000, 0.2, 0.3, 100, (20, 30)),
        (10, 0.5, 0.5, 10, (5, 5)),
        (10, 0.33, 0.67, 10, (3, 7)),
        (7, 0.5, 0.5, 7, (4, 3)),
        (10, 0.25, 0.75, None, (1, 1)),
        (5, 0.25, 0.75, None, (1, 0)),
    ],
)
def test_hybrid_shares_are_exact_and_do_not_overlap(n, l0, random, target, want):
    gate = HybridGate(n, l0, random, target).eval()
    assert (gate.n_l0, gate.n_random) == want
    data = torch.arange(n)
    selected, indices, types = gate.select(data, generator=seeded())
    assert torch.equal(selected, data[indices])
    assert len(indices.unique()) == len(indices) == sum(want)
    assert ((types == "l0").sum(), (types == "random").sum()) == want
    weights = torch.ones(len(indices))
    weights[types == "l0"] *= 2
    assert weights.sum() == 2 * want[0] + want[1]


def test_hybrid_gates_choose_the_first_share_and_chance_the_second():
    gate = HybridGate(200, 0.5, 0.5, 20).eval()
    spread(gate.l0_gate)
    best = set(torch.topk(gate.l0_gate.gates.p_active(), 10).indices.tolist())
    counts = torch.zeros(200)
    for seed in range(1900):
        _, indices, types = gate.select(torch.zeros(200, 1), random_seed=seed)
        assert set(indices[types == "l0"].tolist()) == best
        counts[indices[types == "random"]] += 1
    rest = counts[[i for i in range(200) if i not in best]]
    assert rest.sum() == 19_000
    assert (rest - 100).abs().max() < 45  # 100 +- 9.7


def test_random_seed_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    gate = HybridGate(50, target_items=10).eval()
    a, b = (gate.select(torch.zeros(50, 1), random_seed=3)[1] for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)


# training mode


@pytest.mark.parametrize("gate", [SampleGate(20_000, 3000), FeatureGate(20_000, 3000)])
def test_expected_number_in_training_mode(gate):
    assert gate.get_penalty().item() == pytest.approx(3000, rel=1e-5)
    number = len(gate.get_active_indices(generator=seeded()))
    assert abs(number - 3000) < 250  # 3000 +- 50
    spread(gate)
    number = len(gate.get_active_indices(generator=seeded()))
    assert abs(number - gate.get_penalty().item()) < 350


def test_training_mode_is_repeatable_and_random():
    gate = SampleGate(200, 50)
    data = torch.zeros(200, 1)
    a, b, c = (gate.select_samples(data, seeded(s))[1] for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    a, b = (HybridGate(200, target_items=50).select(data, generator=seeded(1))[1] for _ in range(2))
    assert torch.equal(a, b)


def test_selected_rows_are_the_rows_and_carry_the_gates_gradient():
    gate = SampleGate(300, 150)
    data = torch.randn(300, 4, generator=seeded(9))
    selected, indices = gate.select_samples(data, seeded())
    assert torch.equal(selected, data[indices])
    (grad,) = torch.autograd.grad(selected.sum(), gate.gates.log_alpha)
    (want,) = torch.autograd.grad((data * gate.get_gates(seeded()).view(-1, 1)).sum(), gate.gates.log_alpha)
    torch.testing.assert_close(grad, want)
    assert grad.abs().sum() > 0


def test_selected_columns_carry_the_gates_gradient():
    gate = FeatureGate(30, 20)
    data = torch.randn(6, 30, generator=seeded(9))
    selected, indices = gate.select_features(data, seeded())
    assert torch.equal(selected, data[:, indices])
    (grad,) = torch.autograd.grad(selected.sum(), gate.gates.log_alpha)
    (want,) = torch.autograd.grad((data * gate.get_gates(seeded())).sum(), gate.gates.log_alpha)
    torch.testing.assert_close(grad, want)


def test_weights_are_gated_in_training_mode_and_given_in_eval_mode():
    gate = SampleGate(100, 40)
    weights = torch.rand(100, generator=seeded(5)) + 0.5
    _, chosen, indices = gate.select_weighted_samples(torch.zeros(100, 2), weights, seeded())
    torch.testing.assert_close(chosen, (weights * gate.get_gates(seeded()))[indices])
    assert torch.autograd.grad(chosen.sum(), gate.gates.log_alpha)[0].abs().sum() > 0
    _, chosen, indices = gate.eval().select_weighted_samples(torch.zeros(100, 2), weights.numpy())
    assert torch.equal(chosen, weights[indices])
    assert len(indices) == 40


def test_gates_learn_which_features_matter():
    """A loss on the selected columns alone moves the gates: 3 of 12 columns make the target."""
    generator = seeded(4)
    x = torch.randn(400, 12, generator=generator)
    y = x[:, :3].sum(1)
    gate = FeatureGate(12, 6, temperature=0.5)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    for _ in range(300):
        prediction = gate.apply_gates(x, 1, generator).sum(1)
        loss = (prediction - y).square().mean() + 0.05 * gate.get_penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert gate.eval().select_features(x)[1].tolist() == [0, 1, 2]


# kinds of data


@pytest.mark.parametrize("training", [True, False])
def test_features_with_names_from_tensors_arrays_and_frames(training):
    gate = FeatureGate(5, 3).train(training)
    array = np.arange(20.0).reshape(4, 5)
    names = list("abcde")
    found = []
    for data in (torch.from_numpy(array), array, pd.DataFrame(array, columns=names)):
        selected, chosen = gate.select_features_with_names(data, names, seeded())
        assert type(selected) is type(data)
        values = selected.detach() if torch.is_tensor(selected) else selected
        found.append((chosen, np.asarray(values)))
    assert found[0][0] == found[1][0] == found[2][0]
    for _, values in found:
        assert np.array_equal(values, array[:, [names.index(n) for n in found[0][0]]])
    frame = pd.DataFrame(array, columns=names)
    selected, chosen = gate.select_features_with_names(frame, generator=seeded())
    assert list(selected.columns) == chosen == found[0][0]


def test_rows_of_arrays_frames_series_and_integers():
    gate = SampleGate(6, 2).eval()
    frame = pd.DataFrame({"a": range(6), "s": list("uvwxyz")}, index=range(10, 16))
    indices = gate.select_samples(torch.arange(6))[1].tolist()
    assert gate.select_samples(np.arange(6))[0].tolist() == indices
    assert gate.select_samples(frame)[0].index.tolist() == [10 + i for i in indices]
    assert gate.select_samples(frame["s"])[0].tolist() == ["uvwxyz"[i] for i in indices]
    assert gate.train().select_samples(torch.arange(6), seeded())[0].dtype == torch.int64
    stacked = torch.randn(2, 3, 6)
    assert FeatureGate(6, 2).eval().select_features(stacked)[0].shape == (2, 3, 2)


def test_base_gate():
    gate = spread(L0Gate(8, temperature=0.4, init_mean=0.3))
    x = torch.randn(3, 8)
    torch.testing.assert_close(gate.eval().apply_gates(x, 1), x * gate.gates.median())
    assert gate.get_active_indices().tolist() == torch.nonzero(gate.gates.median() > 0.5).flatten().tolist()
    update_temperatures(gate, 0.9)
    assert gate.temperature == 0.9
    gate.temperature = 0.2
    assert gate.gates.temperature == 0.2
    assert compute_l0_penalty(gate).item() == pytest.approx(gate.get_penalty().item())


def test_threshold_of_a_selector_is_another_question():
    gate = spread(SampleGate(100, 10)).eval()
    assert len(gate.get_active_indices()) == 10
    assert len(gate.get_active_indices(threshold=0.0)) == gate.gates.get_num_active()


def test_the_two_gates_of_this_name_say_so():
    assert sparsereg.gates.L0Gate is not basic_l0_blocks.L0Gate
    assert "basic_l0_blocks.L0Gate" in sparsereg.gates.L0Gate.__doc__


# wrong arguments


def bad(value: float) -> torch.Tensor:
    data = torch.zeros(10, 3)
    data[2, 1] = value
    return data


FRAME = pd.DataFrame(np.zeros((2, 4)), columns=list("abcd"))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: L0Gate(0), "size"),
        (lambda: L0Gate(3, temperature=-1), "temperature"),
        (lambda: L0Gate(3, init_mean=1.5), "init_mean"),
        (lambda: L0Gate(3).apply_gates(torch.zeros(4)), "x must have size 3"),
        (lambda: L0Gate(3).get_active_indices(1.0), "threshold"),
        (lambda: SampleGate(0, 1), "n_samples"),
        (lambda: SampleGate(10, 0), "target_samples"),
        (lambda: SampleGate(10, -1), "target_samples"),
        (lambda: SampleGate(10, 11), "target_samples must be at most 10"),
        (lambda: SampleGate(10, 2.5), "target_samples"),
        (lambda: SampleGate(10, 2, temperature=0), "temperature"),
        (lambda: SampleGate(10, 2).select_samples(torch.zeros(9, 2)), "10 rows"),
        (lambda: SampleGate(10, 2).select_samples([1.0] * 10), "tensor"),
        (lambda: SampleGate(10, 2).select_samples(bad(float("nan"))), "finite"),
        (lambda: SampleGate(10, 2).select_samples(bad(float("inf")).numpy()), "finite"),
        (lambda: SampleGate(10, 2).select_samples(pd.DataFrame(bad(float("nan")).numpy())), "finite"),
        (lambda: SampleGate(10, 2).select_weighted_samples(bad(0), bad(float("nan"))[:, 1]), "weights"),
        (lambda: SampleGate(10, 2).select_weighted_samples(bad(0), torch.ones(9)), "weights"),
        (lambda: FeatureGate(0, 1), "n_features"),
        (lambda: FeatureGate(3, 4), "max_features must be at most 3"),
        (lambda: FeatureGate(3, 2).select_features(torch.zeros(3, 4)), "3 columns"),
        (lambda: FeatureGate(4, 2).select_features_with_names(FRAME, list("abc")), "4 names, got 3"),
        (lambda: FeatureGate(4, 2).select_features_with_names(FRAME, list("abxd")), "'x'"),
        (lambda: FeatureGate(4, 2).select_features_with_names(torch.zeros(2, 4)), "feature_names"),
        (lambda: FeatureGate(3, 2).select_features_with_names(FRAME), "3 columns"),
        (lambda: HybridGate(0), "n_items"),
        (lambda: HybridGate(10, target_items=11), "target_items must be at most 10"),
        (lambda: HybridGate(10, 0.5, 0.6), "sum to at most 1"),
        (lambda: HybridGate(10, 0.0, 0.5), "l0_fraction"),
        (lambda: HybridGate(10, 0.5, -0.1), "random_fraction"),
        (lambda: HybridGate(10).select(torch.zeros(9, 1)), "10 rows"),
        (lambda: HybridGate(10).select(torch.zeros(10), 1, seeded()), "random_seed"),
    ],
)
def test_wrong_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
