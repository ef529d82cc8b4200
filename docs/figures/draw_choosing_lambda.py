"""Draw choosing_lambda.png: what lambda_l0 does under Adam.

Run ``python docs/figures/draw_choosing_lambda.py`` in the repository. LeNet-300-100 on scikit-learn's
digits, gates on its 64 pixels, 300 and 100 units, one minute on a CPU. Left, gates of pixels that are the
same in every training image: useless, whatever the price. Right, how many of all gates are open in the end.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from sparsereg.distributions import draw_together
from sparsereg.model.lenet import LeNet300
from sparsereg.penalties import hard_concretes, l_c0

LAMBDAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
EPOCHS = 60
BATCH = 64


def train(lambda_l0: float, images: Tensor, labels: Tensor) -> tuple[list[float], float]:
    """Return mean P(z > 0) of the useless gates after each epoch, and the final share of open gates."""
    torch.manual_seed(0)
    net = LeNet300(10, (1, 8, 8), droprate_init=0.2)
    gates = hard_concretes(net)
    useless = images.flatten(1).std(0) == 0
    optimizer = torch.optim.Adam(
        [
            {"params": [p for n, p in net.named_parameters() if "log_alpha" not in n], "lr": 1e-3},
            {"params": [g.log_alpha for g in gates.values()], "lr": 1e-2},
        ]
    )
    course = []
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH):
            draw_together(gates.values())
            loss = F.cross_entropy(net(images[batch]), labels[batch]) + lambda_l0 * l_c0(net)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            course.append(net.input_gate.gates.p_active()[useless].mean().item())
    total = sum(g.log_alpha.numel() for g in gates.values())
    return course, sum(g.get_num_active() for g in gates.values()) / total


def main() -> None:
    """Train for each lambda and draw."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    shares = []
    for i, lambda_l0 in enumerate(LAMBDAS):
        course, share = train(lambda_l0, images, labels)
        left.plot(course, label=f"{lambda_l0:g}", color=plt.get_cmap("viridis")(i / len(LAMBDAS)))
        shares.append(share)
        print(f"{lambda_l0:g}: useless gates {course[-1]:.3f}, open gates {share:.3f}")
    left.set(xlabel="epoch", ylabel="P(z > 0), mean of constant pixels", title="useless gates", ylim=(0, 1))
    left.legend(title="lambda_l0", fontsize=8)
    right.semilogx(LAMBDAS, shares, "o-")
    right.set(xlabel="lambda_l0", ylabel="open gates / all gates", title="all gates, last epoch", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(Path(__file__).parent / "choosing_lambda.png", dpi=150)


if __name__ == "__main__":
    main()
