"""Products with a fixed sparse matrix, and their gradients, without a copy of it.

A scipy matrix in compressed sparse rows is used where it lies. Both products and the squared error read
it in one pass, in threads over ranges of rows; the transposed matrix is never made.
"""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sparsereg.linalg.checked import check_indices
from sparsereg.linalg.threads import in_turns
from sparsereg.shapes import Float

MAX_PARTS = 16
"""Ranges of rows. Their number depends on the matrix alone, so that sums do not depend on the threads."""
SMALL = 1 << 17
"""Non-zeros below which threads cost more than they save."""


class CsrMatrix:
    """A sparse matrix on the CPU that multiplies vectors.

    Args:
        matrix: scipy sparse matrix or array, dense array, or torch tensor, two-dimensional; one in
            compressed sparse rows with float32 or float64 values is not copied.

    Raises:
        ValueError: it is not two-dimensional, or has NaN or infinity.
    """

    def __init__(self, matrix: Any) -> None:
        csr = to_csr(matrix)
        # A finite sum of magnitudes costs no temporary and means that every term is finite.
        with np.errstate(over="ignore", invalid="ignore"):
            suspicious = not np.isfinite(csr.data.sum(dtype=np.float64))
        if suspicious and not np.isfinite(csr.data).all():
            raise ValueError("X must be finite, got NaN or infinity")
        self.shape: tuple[int, int] = csr.shape
        self._csr = (csr.indptr, csr.indices, csr.data)
        parts = min(MAX_PARTS, max(1, csr.nnz // max(SMALL, self.shape[1])))
        bounds = np.searchsorted(csr.indptr, np.linspace(0, csr.nnz, parts + 1)[1:-1])
        self._bounds = np.concatenate([[0], bounds, [self.shape[0]]]).astype(np.int64)

    def _each(self, work: Callable[[int, int, int], Any]) -> list[Any]:
        """Run work(part, first, last) for every range of rows."""
        bounds = itertools.pairwise(self._bounds.tolist())
        return in_turns(work, ((part, first, last) for part, (first, last) in enumerate(bounds)))

    def product(self, w: Float[Tensor, "columns={self.shape[1]}"]) -> Float[Tensor, "rows={self.shape[0]}"]:
        """X w, (rows,), in the dtype of ``w`` (columns,)."""
        from sparsereg.linalg.kernels import product

        vector = w.detach().contiguous().numpy()
        out = np.empty(self.shape[0], dtype=vector.dtype)
        self._each(lambda k, first, last: product(*self._csr, vector, first, last, out))
        return torch.from_numpy(out)

    def transposed_product(
        self, r: Float[Tensor, "rows={self.shape[0]}"]
    ) -> Float[Tensor, "columns={self.shape[1]}"]:
        """X^T r, (columns,), in the dtype of ``r`` (rows,), accumulated in float64."""
        from sparsereg.linalg.kernels import transposed_product

        vector = r.detach().contiguous().numpy()
        out = np.zeros((len(self._bounds) - 1, self.shape[1]))
        self._each(lambda k, first, last: transposed_product(*self._csr, vector, first, last, out[k]))
        return torch.from_numpy(out.sum(0)).to(r.dtype)

    def squared_error(
        self,
        w: Float[Tensor, "columns={self.shape[1]}"],
        bias: float,
        y: Float[Tensor, "rows={self.shape[0]}"],
    ) -> tuple[float, Float[Tensor, "columns={self.shape[1]}"], float]:
        """Mean of (X w + bias - y)^2 over the rows, and its gradients by ``w`` and ``bias``.

        Args:
            w: (columns,).
            bias: added to every row.
            y: (rows,), in the dtype of ``w``.
        """
        from sparsereg.linalg.kernels import squared_error

        vector = w.detach().contiguous().numpy()
        target = y.detach().contiguous().numpy()
        gradient = np.zeros((len(self._bounds) - 1, self.shape[1]))
        offset = vector.dtype.type(bias)
        sums = self._each(
            lambda k, a, b: squared_error(*self._csr, vector, offset, target, a, b, gradient[k])
        )
        rows = self.shape[0]
        squares, residuals = (float(sum(column)) for column in zip(*sums, strict=True))
        by_w = torch.from_numpy(gradient.sum(0) * (2.0 / rows)).to(w.dtype)
        return squares / rows, by_w, residuals * 2.0 / rows


class TorchMatrix:
    """The same on another device than the CPU, by PyTorch's sparse products; holds X and X^T.

    Args:
        matrix: see ``CsrMatrix``.
        device: where to.
    """

    def __init__(self, matrix: Any, device: torch.device) -> None:
        csr = to_csr(matrix)
        if not np.isfinite(csr.data).all():
            raise ValueError("X must be finite, got NaN or infinity")
        self.shape: tuple[int, int] = csr.shape
        self._rows = _torch_csr(csr, device)
        self._columns = _torch_csr(csr.T.tocsr(), device)

    def product(self, w: Float[Tensor, "columns={self.shape[1]}"]) -> Float[Tensor, "rows={self.shape[0]}"]:
        """X w, (rows,)."""
        return (self._rows @ w.detach().to(self._rows.dtype)).to(w.dtype)

    def transposed_product(
        self, r: Float[Tensor, "rows={self.shape[0]}"]
    ) -> Float[Tensor, "columns={self.shape[1]}"]:
        """X^T r, (columns,)."""
        return (self._columns @ r.detach().to(self._columns.dtype)).to(r.dtype)

    def squared_error(
        self,
        w: Float[Tensor, "columns={self.shape[1]}"],
        bias: float,
        y: Float[Tensor, "rows={self.shape[0]}"],
    ) -> tuple[float, Float[Tensor, "columns={self.shape[1]}"], float]:
        """See ``CsrMatrix.squared_error``."""
        residual = self.product(w) + bias - y
        rows = self.shape[0]
        by_w = self.transposed_product(residual) * (2.0 / rows)
        return residual.double().square().mean().item(), by_w, 2.0 * residual.double().mean().item()


Matrix = CsrMatrix | TorchMatrix


def multiply(w: Float[Tensor, "columns"], matrix: Matrix) -> Float[Tensor, "rows"]:
    """X w, (rows,), differentiable in w (columns,)."""
    product: Tensor = _Product.apply(w, matrix)
    return product


def mean_squared_error(
    w: Float[Tensor, "columns"],
    bias: Float[Tensor, "1"] | None,
    matrix: Matrix,
    y: Float[Tensor, "rows"],
) -> Float[Tensor, ""]:
    """Mean of (X w + bias - y)^2, differentiable in w and bias; the gradient is made with the value.

    Args:
        w: (columns,).
        bias: (1,) or None.
        matrix: X.
        y: (rows,), in the dtype of ``w``.
    """
    error: Tensor = _SquaredError.apply(w, bias, matrix, y)
    return error


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, matrix: Matrix) -> Tensor:
        ctx.matrix = matrix
        return matrix.product(w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.matrix.transposed_product(grad), None


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, bias: Tensor | None, matrix: Matrix, y: Tensor) -> Tensor:
        offset = 0.0 if bias is None else bias.item()
        value, by_w, by_bias = matrix.squared_error(w, offset, y)
        ctx.save_for_backward(by_w)
        ctx.by_bias = by_bias
        return w.new_tensor(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (by_w,) = ctx.saved_tensors
        by_bias = (grad * ctx.by_bias).reshape(1) if ctx.needs_input_grad[1] else None
        return grad * by_w, by_bias, None, None


def to_csr(matrix: Any) -> Any:
    """Compressed sparse rows in float32 or float64; no copy if it is that already.

    Args:
        matrix: scipy sparse matrix or array, dense array, or torch tensor (dense or sparse).

    Raises:
        ValueError: it is not two-dimensional, or has indices that point beyond it.
    """
    if isinstance(matrix, Tensor):
        matrix = _from_torch(matrix.detach().cpu())
    if len(getattr(matrix, "shape", ())) != 2:
        kind = getattr(matrix, "shape", type(matrix).__name__)
        raise ValueError(f"X must be a two-dimensional matrix, got {kind}")
    if sparse.issparse(matrix):
        check_indices(matrix)
    csr = matrix.tocsr() if sparse.issparse(matrix) else sparse.csr_matrix(np.asarray(matrix))
    if csr.data.dtype not in (np.float32, np.float64):
        csr = csr.astype(np.float32)
    return csr


def _from_torch(tensor: Tensor) -> Any:
    if tensor.layout == torch.strided:
        return tensor.numpy()
    if tensor.layout == torch.sparse_csr:
        parts = (tensor.values().numpy(), tensor.col_indices().numpy(), tensor.crow_indices().numpy())
        return sparse.csr_matrix(parts, shape=tuple(tensor.shape))
    coo = tensor.to_sparse_coo().coalesce()
    row, column = coo.indices().numpy()
    return sparse.coo_matrix((coo.values().numpy(), (row, column)), shape=tuple(tensor.shape))


def _torch_csr(csr: Any, device: torch.device) -> Tensor:
    with warnings.catch_warnings():
        # PyTorch calls its compressed sparse rows a beta feature on first use, and some versions unchecked.
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
        indptr, indices, data = (torch.from_numpy(part) for part in (csr.indptr, csr.indices, csr.data))
        return torch.sparse_csr_tensor(
            indptr, indices, data, size=csr.shape, device=device, check_invariants=True
        )
