"""Sparse regression: products, gradients, recovery of the support, and the defects it must not have."""

import math

import numpy as np
import pytest
import torch
from scipy import sparse

from sparsereg.linalg.csr import (
    CsrMatrix,
    TorchMatrix,
    mean_squared_error,
    multiply,
    to_csr,
)
from sparsereg.sparse import SparseL0Linear


def random_matrix(rows: int, columns: int, density: float = 0.3, seed: int = 0, **kwargs):
    return sparse.random(rows, columns, density, format="csr", rng=np.random.default_rng(seed), **kwargs)


def long_indices(x):
    parts = (x.data, x.indices.astype(np.int64), x.indptr.astype(np.int64))
    return sparse.csr_matrix(parts, x.shape)


KINDS = {
    "csr": lambda x: x,
    "csc": lambda x: x.tocsc(),
    "coo": lambda x: x.tocoo(),
    "array": lambda x: sparse.csr_array(x),
    "float32": lambda x: x.astype(np.float32),
    "integers": lambda x: (x * 10).astype(np.int64),
    "long indices": long_indices,
    "dense": lambda x: x.toarray(),
    "tensor": lambda x: torch.from_numpy(x.toarray()),
    "torch coo": lambda x: torch.from_numpy(x.toarray()).to_sparse(),
    "torch csr": lambda x: torch.from_numpy(x.toarray()).to_sparse_csr(),
}
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")


def matrices(x):
    return CsrMatrix(x), TorchMatrix(x, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_products_with_every_kind_of_matrix(kind):
    x = KINDS[kind](random_matrix(40, 17))
    dense = np.asarray(to_csr(x).todense(), dtype=np.float64)
    w, r = torch.randn(17, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    for matrix in matrices(x):
        torch.testing.assert_close(matrix.product(w), torch.from_numpy(dense) @ w, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            matrix.transposed_product(r), torch.from_numpy(dense).T @ r, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("threads", [1, 2])
def test_large_products_in_parts_and_threads(threads):
    """Enough non-zeros for several parts; ragged rows, some empty, among them the first and the last."""
    x = random_matrix(3000, 600, 0.4)
    scale = np.ones(3000)
    scale[[0, 7, 8, 2999]] = 0
    x = sparse.csr_matrix(sparse.diags(scale) @ x)
    x.eliminate_zeros()
    w, r = torch.randn(600, dtype=torch.float64), torch.randn(3000, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        matrix = CsrMatrix(x)
        assert len(matrix._bounds) > 3
        np.testing.assert_allclose(matrix.product(w), x @ w.numpy(), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(matrix.transposed_product(r), x.T @ r.numpy(), rtol=1e-9, atol=1e-9)
        value, by_w, by_bias = matrix.squared_error(w, 0.5, r)
    finally:
        torch.set_num_threads(before)
    residual = x @ w.numpy() + 0.5 - r.numpy()
    assert value == pytest.approx((residual**2).mean())
    np.testing.assert_allclose(by_w, 2 * x.T @ residual / 3000, rtol=1e-9, atol=1e-9)
    assert by_bias == pytest.approx(2 * residual.mean())


def test_sums_do_not_depend_on_the_number_of_threads():
    x = random_matrix(3000, 600, 0.4, dtype=np.float32)
    w, y = torch.randn(600), torch.randn(3000)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            value, by_w, by_bias = CsrMatrix(x).squared_error(w, 0.1, y)
            found.append((value, by_w.tolist(), by_bias))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_gradients_are_the_derivatives():
    y = torch.randn(30, dtype=torch.float64)
    w = torch.randn(8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, dtype=torch.float64, requires_grad=True)
    for matrix in matrices(random_matrix(30, 8)):
        assert torch.autograd.gradcheck(lambda w, m=matrix: multiply(w, m), w)
        assert torch.autograd.gradcheck(lambda w, b, m=matrix: mean_squared_error(w, b, m, y), (w, bias))
        assert torch.autograd.gradcheck(lambda w, m=matrix: mean_squared_error(w, None, m, y), w)


def test_compressed_rows_are_not_copied():
    x = random_matrix(20, 5)
    assert np.shares_memory(CsrMatrix(x)._csr[2], x.data)


def test_forward_trains_in_the_users_own_loop():
    x, y = random_matrix(60, 6), torch.randn(60)
    model = SparseL0Linear(6, seed=0)
    with torch.no_grad():
        model.weight.fill_(0.5)
    (model(x) - y).square().mean().backward()
    assert model.weight.grad.abs().sum() > 0
    assert model.log_alpha.grad is not None
    assert model.bias.grad is not None
    a, b = (model(x, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model(x, deterministic=True), model.predict(x))
    assert torch.equal(model.eval()(x), model.predict(x))


# What is found


@pytest.mark.parametrize("seed", range(3))
def test_four_variables(seed):
    """The demonstration with true coefficients 1, 0, -2, 0."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((500, 4))
    y = x @ np.array([1.0, 0.0, -2.0, 0.0]) + 0.1 * rng.standard_normal(500)
    model = SparseL0Linear(4, seed=seed, init_mean=0.5).fit(sparse.csr_matrix(x), y)
    assert model.get_selected_features().tolist() == [0, 2]
    coefficients = model.get_coefficients()
    assert coefficients[[1, 3]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(coefficients[[0, 2]], torch.tensor([1.0, -2.0]), atol=0.12, rtol=0)
    assert model.get_sparsity() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("seed", range(2))
def test_twenty_of_a_thousand(seed):
    rng = np.random.default_rng(seed)
    x = random_matrix(4000, 1000, 0.05, seed)
    support = np.sort(rng.choice(1000, 20, replace=False))
    b = np.zeros(1000)
    b[support] = rng.choice([-3, -2, -1, 1, 2, 3], 20)
    y = 30 + x @ b + 0.1 * rng.standard_normal(4000)
    model = SparseL0Linear(1000, seed=seed).fit(x, y, lambda_reg=1e-3, lr=0.05, epochs=400)
    assert model.get_selected_features().tolist() == support.tolist()
    error = (model.predict(x).double() - torch.from_numpy(y)).square().mean().item()
    assert error < 0.05


def test_without_intercept():
    x = random_matrix(300, 5)
    model = SparseL0Linear(5, fit_intercept=False, seed=0).fit(x, x @ np.array([2, -3, 1, 0, 0.0]))
    assert model.bias is None
    assert {0, 1, 2} <= set(model.get_selected_features().tolist())


# Defects of the original


def test_another_matrix_of_the_same_shape_is_read():
    x = random_matrix(50, 4)
    model = SparseL0Linear(4, fit_intercept=False, seed=0).fit(x, np.ones(50), epochs=20)
    torch.testing.assert_close(model.predict(5 * x), 5 * model.predict(x))
    x.data *= 2
    torch.testing.assert_close(model.predict(x), model.predict(x.copy()))


def test_the_same_seed_gives_the_same_weights():
    x, y = random_matrix(80, 9), np.random.default_rng(0).standard_normal(80)
    state = torch.get_rng_state()
    models = [SparseL0Linear(9, seed=7) for _ in range(2)]
    assert torch.equal(models[0].log_alpha, models[1].log_alpha)
    fitted = [m.fit(x, y, epochs=30).get_coefficients() for m in models]
    again = models[0].fit(x, y, epochs=30).get_coefficients()
    assert torch.equal(fitted[0], fitted[1])
    assert torch.equal(fitted[0], again)
    assert torch.equal(torch.get_rng_state(), state)
    other = SparseL0Linear(9, seed=8).fit(x, y, epochs=30)
    assert not torch.equal(other.weight, models[0].weight)


def test_warm_start_goes_on():
    x, y = random_matrix(80, 3), np.arange(80.0)
    model = SparseL0Linear(3, seed=1).fit(x, y, epochs=5)
    before = model.weight.detach().clone()
    model.fit(x, y, epochs=1, lr=1e-9, warm_start=True)
    torch.testing.assert_close(model.weight, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to use")
def test_without_cuda_the_cpu_is_used_with_a_warning():
    with pytest.warns(UserWarning, match="there is no CUDA"):
        model = SparseL0Linear(3, device="cuda")
    assert model.device.type == "cpu"


def test_fit_logs_and_does_not_print(capsys, caplog):
    with caplog.at_level("INFO", logger="sparsereg.sparse"):
        SparseL0Linear(3).fit(random_matrix(9, 3), np.ones(9), epochs=4, verbose=True, verbose_freq=2)
    assert [r.message.split(":")[0] for r in caplog.records] == ["epoch 2", "epoch 4"]
    assert capsys.readouterr() == ("", "")


def test_state_dicts(tmp_path):
    model = SparseL0Linear(6, beta=0.4, seed=0).fit(random_matrix(20, 6), np.ones(20), epochs=5)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    other = SparseL0Linear(6)
    other.load_state_dict(torch.load(tmp_path / "m.pt"))
    assert torch.equal(other.get_coefficients(), model.get_coefficients())
    assert other.beta == 0.4
    theirs = {"weight": torch.ones(6), "bias": torch.ones(1), "log_alpha": torch.arange(6.0)}
    other.load_state_dict(theirs)
    assert other.log_alpha.tolist() == list(range(6))


def data(**change):
    x = random_matrix(10, 4)
    if "x" in change:
        x.data[3] = change["x"]
    y = np.ones(10)
    if "y" in change:
        y[2] = change["y"]
    return x, y


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: SparseL0Linear(0), "n_features"),
        (lambda: SparseL0Linear(4, beta=0.0), "beta"),
        (lambda: SparseL0Linear(4, beta=math.nan), "beta"),
        (lambda: SparseL0Linear(4, gamma=0.1), "interval"),
        (lambda: SparseL0Linear(4, zeta=0.9), "interval"),
        (lambda: SparseL0Linear(4, init_keep_prob=1.0), "init_keep_prob"),
        (lambda: SparseL0Linear(5).fit(*data()), "n_features = 5 columns, got 4"),
        (lambda: SparseL0Linear(4).fit(*data(x=math.nan)), "X must be finite"),
        (lambda: SparseL0Linear(4).fit(*data(x=-math.inf)), "X must be finite"),
        (lambda: SparseL0Linear(4).predict(data(x=math.nan)[0]), "X must be finite"),
        (lambda: TorchMatrix(data(x=math.nan)[0], torch.device("cpu")), "X must be finite"),
        (lambda: SparseL0Linear(4).fit(*data(y=math.nan)), "y must be finite"),
        (lambda: SparseL0Linear(4).fit(data()[0], np.ones(9)), "y must have 10 values"),
        (lambda: SparseL0Linear(4).predict(np.ones(4)), "two-dimensional"),
        (lambda: SparseL0Linear(4).fit(*data(), lambda_reg=-1), "lambda_reg"),
        (lambda: SparseL0Linear(4).fit(*data(), lr=0), "lr"),
        (lambda: SparseL0Linear(4).fit(*data(), epochs=0), "epochs"),
        (lambda: SparseL0Linear(4).fit(*data(), verbose_freq=0), "verbose_freq"),
    ],
)
def test_wrong_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_huge_finite_values_are_finite():
    x = data()[0]
    x.data[:] = 1e308
    CsrMatrix(x)
