"""Our callbacks in LightningModules that know nothing of them."""

import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sparsereg
from examples import own_lightning_module as example
from sparsereg.compression import Accountant
from sparsereg.training.callbacks import BatchNormEstimation, FiniteLoss, PenaltyWarmUp
from sparsereg.training.target import SparsityTarget, TargetSettings


@pytest.fixture(autouse=True)
def _lightning_in_tests():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        yield


@pytest.mark.costly
def test_example_meets_its_target():
    reached = example.main(epochs=4)
    assert 0.6 <= reached["exact_sparsity"] < 0.61
    assert reached["accuracy"] > 0.6


class Manual(pl.LightningModule):
    """Steps by itself; its second network is never used."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.unused = nn.BatchNorm1d(3)
        self.unused.running_mean.fill_(7.0)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def loader():
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=draws) * 3 + 1
    return DataLoader(TensorDataset(x, (x[:, 0] > 1).long()), 16, shuffle=True)


def trained(module, *callbacks, epochs=2):
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, loader())
    return module


def test_module_that_steps_by_itself():
    module = Manual()
    module.net = sparsereg.gate(module.net, torch.zeros(2, 6))
    accountant = Accountant(module.net, torch.zeros(2, 6))
    target = SparsityTarget(
        accountant, TargetSettings(cost="parameters", kept=0.5, start_epoch=0, ramp_epochs=1)
    )
    trained(module, target, BatchNormEstimation(64), FiniteLoss())
    assert accountant.exact_sparsity() >= 0.5
    x = torch.cat([batch[0] for batch in loader()])
    mean = module.net[0](x).mean(0)
    torch.testing.assert_close(module.net[1].running_mean, mean, rtol=1e-3, atol=1e-3)
    assert module.unused.running_mean.tolist() == [7.0] * 3


def test_statistics_leave_the_noise_of_training_alone():
    weights = []
    for callbacks in ([], [BatchNormEstimation(64)]):
        torch.manual_seed(0)
        weights.append(trained(Manual(), *callbacks).net[0].weight)
    assert torch.equal(*weights)


def test_what_a_callback_needs_is_said():
    with pytest.raises(
        TypeError, match=r"PenaltyWarmUp sets penalty_scale, a number that Manual has not: set"
    ):
        trained(Manual(), PenaltyWarmUp(2.0))
