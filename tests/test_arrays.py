"""Arrays of a wrong shape are caught in the tests, and cost nothing where jaxtyping is not loaded."""

import subprocess
import sys

import jaxtyping
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from sparsereg import SparseL0Linear, distributions
from sparsereg.calibration.problem import CalibrationProblem, exact_totals
from sparsereg.calibration.solver.distances.linear import Linear
from sparsereg.calibration.solver.losses import Quadratic, TargetLoss
from sparsereg.calibration.solver.matrix import household_matrix
from sparsereg.linalg.csr import CsrMatrix, multiply

THREE, FOUR = torch.zeros(3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
MATRIX = sp.csr_array(np.ones((2, 3), dtype=np.float32))  # two targets, three households
LOSS = TargetLoss(FOUR, FOUR)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: distributions.gated_product(THREE, FOUR),
        lambda: distributions.quantile(THREE, FOUR),
        lambda: distributions.p_active(torch.arange(3)),
        lambda: LOSS.value(THREE),
        lambda: LOSS.gradient_by_totals(THREE),
        lambda: TargetLoss(FOUR, THREE),
        lambda: Quadratic(FOUR, THREE),
        lambda: Linear(np.zeros(3), np.ones(4)),
        lambda: Linear(np.zeros(3), np.ones(3)).value(np.zeros((3, 1))),
        lambda: household_matrix(MATRIX.T.tocsr()).totals(torch.ones(2)),
        lambda: household_matrix(MATRIX.T.tocsr(), backend="torch").gradient(torch.ones(3).double()),
        lambda: exact_totals(MATRIX, np.ones(2)),
        lambda: CalibrationProblem(MATRIX, [1.0, 1.0]).scaled_errors(np.ones(3)),
        lambda: multiply(torch.ones(2), CsrMatrix(MATRIX)),
    ],
)
def test_a_wrong_shape_is_caught(mistake):
    with pytest.raises(jaxtyping.TypeCheckError):
        mistake()


def test_a_wrong_result_is_caught():
    net = SparseL0Linear(3, seed=0)
    net.n_features = 4
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        net.get_deterministic_gates()


def test_the_library_does_not_load_jaxtyping():
    code = (
        "import sys, sparsereg.calibration.solver.exact, sparsereg.sparse; "
        "from sparsereg.shapes import Float; from torch import Tensor; "
        "assert Float[Tensor, 'gates'] is Tensor; print('jaxtyping' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
