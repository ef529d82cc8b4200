"""Sparsify in LightningModules of strangers."""

import logging
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sparsereg
from sparsereg import Sparsify
from sparsereg.compression import load_compacted
from sparsereg.compression.batch_norm_folding import fuse
from sparsereg.compression.timing.measured import TOLERANCE
from sparsereg.errors import InputError
from sparsereg.loops.groups import RATE
from sparsereg.penalties import hard_concretes


@pytest.fixture(autouse=True)
def _lightning_in_tests():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        yield


def mlp():
    return nn.Sequential(
        nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2)
    )


class Mine(pl.LightningModule):
    """The usual one: its training_step calls a network that it has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = mlp()

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.log("early", 1.0)
        return F.cross_entropy(self.net((x - 0.5) / 2), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("acc", (self.net((x - 0.5) / 2).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


class ShortNames(Mine):
    """Calls the number of the batch as it likes."""

    def training_step(self, batch, i):
        return super().training_step(batch, i)


def loader(n=64, batch=16, shuffle=True):
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=draws)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch, shuffle=shuffle)


def fitted(module, sparsify, tmp_path, train=None, **settings):
    usual = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    usual |= {"enable_model_summary": False, "default_root_dir": tmp_path, "log_every_n_steps": 1}
    usual |= {"enable_checkpointing": False}
    callbacks = [sparsify, *settings.pop("more", [])]
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = pl.Trainer(**(usual | settings), callbacks=callbacks)
    trainer.fit(module, loader() if train is None else train, ckpt_path=ckpt_path)
    return trainer


def shares(sparsify):
    counted = sparsereg.count(sparsify.network, sparsify.sparsifier.example)
    return counted.compacted_macs / counted.macs, counted.compacted_parameters / counted.parameters


def test_the_number_of_the_batch_may_have_any_name(tmp_path):
    module, sparsify = ShortNames(), Sparsify(target_macs=0.5)
    fitted(module, sparsify, tmp_path, max_epochs=1)
    assert sparsify.network is module.net
    assert shares(sparsify)[0] <= 0.5


def test_network_is_found_compacted_written_and_equal(tmp_path):
    module, sparsify = Mine(), Sparsify(target_macs=0.5)
    net = module.net
    trainer = fitted(module, sparsify, tmp_path)
    assert sparsify.network is module.net is net
    assert 0.4 < shares(sparsify)[0] <= 0.5
    assert sparsify.path == tmp_path / "compacted.pt"
    x = torch.randn(5, 6)
    torch.testing.assert_close(load_compacted(sparsify.path)(x), sparsify.compacted(x))
    torch.testing.assert_close(sparsify.compacted(x), module.net.eval()(x), rtol=1e-4, atol=1e-5)
    assert {"lambda_target", "target_kept", "expected_kept"} <= set(trainer.callback_metrics)
    inputs = torch.cat([b[0] for b in loader()])
    mean = net[0]((inputs - 0.5) / 2).mean(0)  # of what training_step makes of the batch
    torch.testing.assert_close(net[1].running_mean, mean, rtol=1e-3, atol=1e-3)


def test_milliseconds_are_met_by_what_is_measured(milliseconds, tmp_path):
    module = Mine()
    module.net = nn.Sequential(
        nn.Linear(6, 200), nn.BatchNorm1d(200), nn.ReLU(), nn.Linear(200, 90), nn.ReLU(), nn.Linear(90, 2)
    )
    asked = 0.6 * milliseconds(module.net)
    with pytest.raises(ValueError, match="threads must be an integer >= 1"):
        Sparsify(target_latency_ms=asked, threads=0)
    sparsify = Sparsify(target_latency_ms=asked, runtime="eager", batch=4)
    with pytest.raises(RuntimeError, match="when the Trainer starts"):
        sparsify.network
    trainer = fitted(module, sparsify, tmp_path, max_epochs=4)
    assert sparsify.sparsifier.budget.measured.what == "eager, 1 thread, batch 4"
    assert sparsify.sparsifier.budget.reached == pytest.approx(asked, rel=TOLERANCE)
    assert milliseconds(fuse(sparsify.compacted)) == pytest.approx(sparsify.sparsifier.budget.reached)
    assert trainer.callback_metrics["lambda_target"] >= 0
    x = torch.randn(5, 6)
    torch.testing.assert_close(sparsify.compacted(x), module.net.eval()(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"^target_latency_ms=1e-06: with all gates shut .*: ask for more$"):
        fitted(Mine(), Sparsify(target_latency_ms=1e-6, runtime="eager"), tmp_path)


def test_gates_have_a_group_of_their_own_without_decay(tmp_path):
    module, sparsify = Mine(), Sparsify(target_sparsity=0.5, gate_lr=0.3)
    trainer = fitted(module, sparsify, tmp_path)
    (optimizer,) = trainer.optimizers
    weights, gates = optimizer.param_groups
    assert {id(p) for p in gates["params"]} == {id(g.log_alpha) for g in hard_concretes(module).values()}
    assert not {id(p) for p in gates["params"]} & {id(p) for p in weights["params"]}
    assert (gates["lr"], gates["weight_decay"], weights["lr"], weights["weight_decay"]) == (
        0.3,
        0,
        0.01,
        0.01,
    )
    assert shares(sparsify)[1] <= 0.5


SCHEDULES = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, total_steps=12),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.5**n),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4),
            torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
        ],
        [4],
    ),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_move_the_weights_only(name, tmp_path):
    class Scheduled(Mine):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
            schedule = {"scheduler": SCHEDULES[name](optimizer), "interval": "step", "monitor": "early"}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    seen = []

    class Watch(pl.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            seen.append([g["lr"] for g in optimizer.param_groups if RATE not in g][0])

        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates = [(g["lr"], g[RATE]) for g in optimizer.param_groups if RATE in g]
            assert len(rates) == 1
            assert rates[0][0] == rates[0][1] > 0.1

    fitted(Scheduled(), Sparsify(target_macs=0.5), tmp_path, more=[Watch()])
    assert len(set(seen)) > 1


def test_accumulation_and_bf16(tmp_path):
    module, sparsify = Mine(), Sparsify(target_macs=0.5)
    fitted(module, sparsify, tmp_path, accumulate_grad_batches=2, precision="bf16-mixed")
    assert sparsify.sparsifier.num_steps == 6
    assert sparsify.compacted(torch.randn(2, 6)).dtype == torch.float32
    assert shares(sparsify)[0] <= 0.5


class Late(Mine):
    """Makes its network in setup; batches are dictionaries; calls itself."""

    def __init__(self, hook):
        pl.LightningModule.__init__(self)
        self.hook = hook

    def _make(self):
        self.embed = nn.Embedding(50, 12)
        self.hidden = nn.Linear(12, 24)
        self.head = nn.Linear(24, 2)

    def setup(self, stage):
        if self.hook == "setup":
            self._make()

    def configure_model(self):
        if self.hook == "configure_model" and not hasattr(self, "head"):
            self._make()

    def forward(self, tokens, scale):
        return self.head(F.gelu(self.hidden(self.embed(tokens).mean(1)))) * scale

    def training_step(self, batch):
        return F.cross_entropy(self(batch["text"]["tokens"], scale=batch["scale"][:, None]), batch["y"])


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_network_that_is_made_late_and_reads_nested_dictionaries(hook, tmp_path):
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(50, (64, 7), generator=draws)
    rows = [{"text": {"tokens": t}, "scale": torch.ones(()), "y": t[0] % 2} for t in tokens]
    sparsify = Sparsify(target_sparsity=0.4)
    module = Late(hook)
    fitted(module, sparsify, tmp_path, DataLoader(rows, 16))
    assert sparsify.network is module
    assert shares(sparsify)[1] <= 0.6
    example = {"tokens": tokens[:3], "scale": torch.ones(3, 1)}
    torch.testing.assert_close(sparsify.compacted(**example), module.eval()(**example), rtol=1e-4, atol=1e-5)


class TwoOptimizers(pl.LightningModule):
    """Steps by itself, with an optimizer for the body and one for the head."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)
        )

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        body, head = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        for optimizer in (body, head):
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in (body, head):
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.body.parameters(), 1e-2), torch.optim.SGD(self.head.parameters(), 0.1)


def test_two_optimizers_by_hand(tmp_path):
    draws = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(64, 1, 8, 8, generator=draws), torch.randint(3, (64,), generator=draws))
    module, sparsify = TwoOptimizers(), Sparsify(target_macs=0.5)
    trainer = fitted(module, sparsify, tmp_path, DataLoader(data, 16))
    assert shares(sparsify)[0] <= 0.5
    for optimizer, part in zip(trainer.optimizers, (module.body, module.head), strict=True):
        own = {id(p) for p in part.parameters()}
        gates = [p for g in optimizer.param_groups if RATE in g for p in g["params"]]
        assert gates
        assert all(id(p) in own for p in gates)


def test_test_of_a_checkpoint_in_a_new_process_has_the_gates(tmp_path):
    more = [pl.callbacks.ModelCheckpoint(tmp_path / "ckpt", save_last=True)]
    module, sparsify = Mine(), Sparsify(target_macs=0.5)
    fitted(module, sparsify, tmp_path, more=more, enable_checkpointing=True)
    assert sparsify.path == tmp_path / "ckpt" / "compacted.pt"

    class Tested(Mine):
        test_step = Mine.validation_step

    again = Tested()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[Sparsify(target_macs=0.5)]
    )
    trainer.test(again, loader(shuffle=False), ckpt_path=tmp_path / "ckpt" / "last.ckpt", verbose=False)
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_training_that_stops_early_is_compacted_all_the_same(tmp_path, caplog):
    sparsify = Sparsify(target_macs=0.3)
    with caplog.at_level(logging.WARNING):
        fitted(Mine(), sparsify, tmp_path, more=[Stop()])
    assert shares(sparsify)[0] <= 0.3
    assert "the gates have not come near the target" in caplog.text


class Stop(pl.Callback):
    def on_train_epoch_end(self, trainer, module):
        trainer.should_stop = True


class Wild(Mine):
    """Calls two networks one after the other and has no forward."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.other(self.net(batch[0])), batch[1])


class Lbfgs(Mine):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("module", "sparsify", "settings", "says"),
    [
        (Wild, {}, {}, "cannot tell which network of Wild is meant: give module= one of net, other"),
        (Mine, {"module": "nets"}, {}, "module='nets': Mine has no module of that name; there are net"),
        (Lbfgs, {}, {}, "Lbfgs.configure_optimizers: LBFGS cannot move gates"),
        (Mine, {"example": torch.zeros(2, 5)}, {}, "cannot be called with this example"),
        (Mine, {"families": "heads"}, {}, "nothing of heads that can go"),
        (Mine, {"target_macs": 0.001}, {}, "cannot be met: with every gate shut"),
        (Mine, {}, {"max_epochs": -1}, "needs to know when training ends"),
    ],
)
def test_wrong_use_is_said_in_one_line(module, sparsify, settings, says, tmp_path):
    with pytest.raises(ValueError, match=says) as caught:
        fitted(module(), Sparsify(**({"target_macs": 0.5} | sparsify)), tmp_path, **settings)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


class Painter(pl.LightningModule):
    """A generator of pictures from noise, which no batch holds, against a critic."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.paint = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 6))
        self.judge = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        painter, critic = self.optimizers()
        for optimizer, sign in ((critic, -1), (painter, 1)):
            optimizer.zero_grad()
            score = self.judge(self.paint(torch.randn(16, 4))).mean() - self.judge(batch[0]).mean()
            self.manual_backward(-sign * score)
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.Adam(self.paint.parameters(), 1e-3), torch.optim.Adam(
            self.judge.parameters(), 1e-3
        )


def test_generator_whose_inputs_are_in_no_batch(tmp_path, caplog):
    module, sparsify = Painter(), Sparsify(target_macs=0.5, module="paint", example=torch.zeros(2, 4))
    with caplog.at_level(logging.WARNING):
        fitted(module, sparsify, tmp_path)
    assert "BatchNorm statistics stay those of training" in caplog.text
    assert shares(sparsify)[0] <= 0.5
    noise = torch.randn(3, 4)
    torch.testing.assert_close(sparsify.compacted(noise), module.paint.eval()(noise), rtol=1e-4, atol=1e-5)


def test_module_names_one_of_two_networks(tmp_path):
    module, sparsify = Wild(), Sparsify(target_macs=0.5, module="net")
    fitted(module, sparsify, tmp_path)
    assert sparsify.network is module.net
    assert shares(sparsify)[0] <= 0.5


class Trained(Mine):
    """The same, from weights that were trained."""

    def __init__(self):
        super().__init__()
        optimizer = torch.optim.Adam(self.net.parameters(), 1e-2)
        for _ in range(20):
            for x, y in loader(shuffle=False):
                optimizer.zero_grad()
                F.cross_entropy(self.net((x - 0.5) / 2), y).backward()
                optimizer.step()


def shot(folder, epochs, path=None):
    sparsify = Sparsify(target_macs=0.4, one_shot=True, seed=3)
    module = Trained()
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[sparsify, pl.callbacks.ModelCheckpoint(folder, save_last=True)],
        default_root_dir=folder, logger=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, loader(), ckpt_path=path)
    return sparsify


def test_one_shot_goes_before_the_first_step_and_a_resumed_run_goes_on_bitwise(tmp_path):
    straight = shot(tmp_path / "straight", 4)
    first = shot(tmp_path / "first", 2)
    assert all(bool((location.abs() == 20).all()) for location in first.sparsifier.gates)
    resumed = shot(tmp_path / "second", 4, tmp_path / "first" / "last.ckpt")
    counted = sparsereg.count(resumed.network, torch.zeros(2, 6))
    assert 0.3 < counted.compacted_macs / counted.macs <= 0.4
    pairs = zip(straight.compacted.parameters(), resumed.compacted.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_one_shot_of_a_time_is_refused_before_training():
    with pytest.raises(InputError, match="for a start in one shot"):
        Sparsify(target_latency_ms=1.0, runtime="eager", one_shot=True)
