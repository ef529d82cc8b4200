import dataclasses
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sparsereg.data import CONFIGS, Augmentation, ImageArrays, ImageDataModule, build
from sparsereg.data.image_folder import ImageFolder
from sparsereg.errors import InputError
from sparsereg.settings import plain

# Lightning's own use of a deprecated function of PyTorch, and its remark where there is a GPU.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning"),
]

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs" / "data"


def trainer(tmp_path, epochs, **settings):
    return pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        default_root_dir=tmp_path, **settings,
    )  # fmt: skip


def ready(source, **settings):
    module = ImageDataModule(source, **{"val_size": 10, "batch_size": 8, **settings})
    module.prepare_data()
    module.setup("fit")
    return module


def test_statistics_are_those_of_the_training_part(fixed):
    module = ready(fixed(500, shape=(3, 9, 7)), val_size=100)
    pixels = module.source.arrays.train_images[module.split.train].numpy().astype(np.float64) / 255
    np.testing.assert_allclose(module.mean, pixels.mean((0, 2, 3)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(module.std, pixels.std((0, 2, 3)), rtol=0, atol=1e-12)
    seen = torch.cat([x for x, _ in module.train_dataloader()]).double()
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(seen.std((0, 2, 3), correction=0), torch.ones(3).double(), rtol=0, atol=1e-6)


def test_constant_channels_give_zeros(arrays):
    good = arrays()
    images = good.train_images.clone()
    images[:, 1] = 37
    data = dataclasses.replace(good, train_images=images)
    module = ready(type("Source", (), {"name": "x", "load": lambda self: data})())
    assert module.std[1] == 1.0
    x, _ = next(iter(module.train_dataloader()))
    assert x[:, 1].abs().max() < 1e-6
    assert x.isfinite().all()


def test_parts(fixed):
    module = ready(fixed(50), augmentation=Augmentation(flip=True))
    assert (module.num_train, module.num_val, module.num_test, module.num_classes) == (40, 10, 20, 5)
    assert module.image_shape == (3, 8, 8)
    plain = ready(fixed(50))
    for name in ("val", "test"):
        with_, without = (list(getattr(m, f"{name}_dataloader")()) for m in (module, plain))
        for (x, y), (other, _) in zip(with_, without, strict=True):
            assert torch.equal(x, other)  # no augmentation
        assert len(torch.cat([y for _, y in with_])) == {"val": 10, "test": 20}[name]
    val_labels = torch.cat([y for _, y in module.val_dataloader()])
    assert torch.equal(val_labels, module.source.arrays.train_labels[module.split.val])


# Lightning says so where there is nothing to validate on.
@pytest.mark.filterwarnings("ignore:Total length of .list. across ranks is zero:UserWarning")
def test_all_images_can_train(fixed, tmp_path):
    module = ready(fixed(50), val_size=0)
    assert (module.num_train, module.num_val, module.val_dataloader()) == (50, 0, [])
    run, model = trainer(tmp_path, 1), Classifier()
    run.fit(model, datamodule=module)
    assert run.global_step == 7


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))
        self.validated = 0
        self.labels = []

    def training_step(self, batch, batch_idx):
        self.labels.append(batch[1].tolist())
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.validated += len(batch[1])

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_in_a_trainer(fixed, tmp_path):
    module = ImageDataModule(fixed(50), val_size=10, batch_size=8)
    run, model = trainer(tmp_path, 2), Classifier()
    run.fit(model, datamodule=module)
    assert (run.global_step, model.validated) == (10, 20)
    run.test(model, datamodule=module, verbose=False)
    assert model.validated == 40


@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning")
def test_overfit_batches_are_the_same_in_each_epoch(fixed, tmp_path):
    module, model = ready(fixed(50)), Classifier()
    trainer(tmp_path, 3, overfit_batches=2).fit(model, datamodule=module)
    assert len(model.labels) == 6
    assert model.labels[:2] == model.labels[2:4] == model.labels[4:]


def test_fewer_images(fixed):
    module, whole = ready(fixed(50), limit_train_images=16), ready(fixed(50))
    assert module.num_train == 16
    assert torch.equal(module.train_positions, whole.split.train[:16])
    assert module.split.digest == whole.split.digest
    with pytest.raises(InputError, match="limit_train_images=41 is more than the 40"):
        ready(fixed(50), limit_train_images=41)


def test_estimation_batches(fixed):
    module = ready(fixed(50), augmentation=Augmentation(flip=True, crop_scale=(0.5, 1.0)))
    first, second = (list(module.estimation_batches(30, 16)) for _ in range(2))
    assert [len(x) for x in first] == [16, 14]
    assert torch.equal(torch.cat(first), torch.cat(second))
    raw = module.source.arrays.train_images[module.split.train[:30]].double() / 255
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (module.mean, module.std))
    torch.testing.assert_close(torch.cat(first).double(), (raw - mean) / std, rtol=0, atol=1e-5)
    assert sum(len(x) for x in module.estimation_batches(10_000)) == 40


@pytest.mark.parametrize("device_resident", [True, False, "auto"])
def test_images_are_moved_once(fixed, device_resident):
    module = ready(fixed(50), device_resident=device_resident)
    stores = {id(module.train_dataloader().store), id(module.val_dataloader().store)}
    assert len(stores) == 1  # training and validation images are one tensor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("device_resident", [True, False, "auto"])
def test_gpu_and_cpu_make_the_same_batches(fixed, device_resident):
    augmentation = Augmentation(flip=True, crop_scale=(0.5, 1.0), degrees=10)
    modules = [
        ready(fixed(50), augmentation=augmentation, device=device, device_resident=device_resident)
        for device in ("cpu", "cuda")
    ]
    for (x, y), (other, others) in zip(*(m.train_dataloader() for m in modules), strict=True):
        assert other.is_cuda
        assert torch.equal(y, others.cpu())
        torch.testing.assert_close(x, other.cpu(), rtol=0, atol=1e-3)


def test_files_give_the_batches_of_arrays(folder):
    def module(**settings):
        source = ImageFolder(str(folder), image_size=8, num_workers=0, **settings)
        return ready(source, val_size=2, augmentation=Augmentation(flip=True, crop_scale=(0.5, 1.0)))

    in_memory, in_files = module(), module(max_memory_gb=0)
    assert in_files.describe() == in_memory.describe()
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for (x, y), (other, others) in zip(*(getattr(m, name)() for m in (in_memory, in_files)), strict=True):
            assert torch.equal(x, other)
            assert torch.equal(y, others)


def test_description_and_split_are_written(fixed, tmp_path):
    module = ready(fixed(50))
    description = module.describe()
    assert description["num_train"] == 40
    assert description["split_sha256"] == module.split.digest
    plain = (int, float, str)
    for value in description.values():
        assert isinstance(value, plain) or all(isinstance(v, plain) for v in value)
    with np.load(module.save_split(tmp_path / "split.npz")) as file:
        assert file["val"].tolist() == module.split.val.tolist()


def test_setup_twice_changes_nothing(fixed):
    module = ready(fixed(50))
    split = module.split
    module.prepare_data()
    module.setup("test")
    assert module.split is split


@pytest.mark.parametrize("settings", [
    {"batch_size": 0}, {"batch_size": 2.5}, {"eval_batch_size": -1}, {"split_seed": -1}, {"seed": -1},
    {"limit_train_images": 0}, {"device_resident": "gpu"},
])  # fmt: skip
def test_wrong_arguments(fixed, settings):
    (name,) = settings
    with pytest.raises(InputError, match=name):
        ImageDataModule(fixed(), **settings)


# ---- configuration


def test_sources_and_schemas_agree():
    assert set(CONFIGS) == {path.stem for path in CONFIG_DIR.glob("*.yaml")}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "own"])
def test_files_say_what_the_schemas_default_to(name):
    with initialize_config_dir(str(CONFIG_DIR.parent), version_base="1.3"):
        config = compose(overrides=[f"+data={name}"])
    composed = config.data
    assert plain(CONFIGS[name]()) == OmegaConf.to_container(composed)


def test_built_from_a_file():
    with initialize_config_dir(str(CONFIG_DIR.parent), version_base="1.3"):
        composed = compose(overrides=["+data=digits", "data.batch_size=64", "data.val_size=100"]).data
    module = build(composed, seed=7)
    module.setup()
    assert (module.batch_size, module.num_val, module.seed, module.num_train) == (64, 100, 7, 1337)
    assert module.augmentation.identity
    colour = build({"name": "cifar10"}).augmentation
    assert colour == Augmentation(flip=True, crop_scale=(0.8, 1.0), crop_ratio=(0.9, 1.1))
    assert build({"name": "cifar10", "augment": None}).augmentation is None
    assert build({"name": "cifar10", "augment": {"crop_scale": None}}).augmentation == Augmentation(flip=True)


@pytest.mark.parametrize(("cfg", "match"), [
    ({}, "data.name is missing: expected one of cifar10, digits, image_folder, labelled_text, mnist, npz"),
    ({"name": "cifar"}, "data.name=cifar: expected one of .*: did you mean 'cifar10'"),
    ({"name": 3}, "data.name=3: expected one of"),
    ({"name": "digits", "batchsize": 3}, "unknown key 'data.batchsize': did you mean 'data.batch_size'"),
    ({"name": "digits", "path": "x"}, "unknown key 'data.path'"),
    ({"name": "digits", "augment": {"flipp": True}}, "augment.flipp': did you mean 'data.augment.flip'"),
    ({"name": "digits", "batch_size": "many"}, "data.batch_size=many: expected an integer"),
    ({"name": "digits", "batch_size": 0}, "data.batch_size=0: expected an integer >= 1"),
    ({"name": "digits", "batch_size": None}, "data.batch_size=null: "),
    ({"name": "digits", "val_size": "half"}, "data.val_size=half: expected a count"),
    ({"name": "digits", "augment": {"crop_scale": [0.8, 2.0]}}, "augment.crop_scale="),
    ({"name": "digits", "augment": {"crop_scale": [0.8, 0.7]}}, "the smaller one first"),
    ({"name": "digits", "augment": {"crop_scale": 0.8}}, "augment.crop_scale=0.8: expected a list of 2"),
    ({"name": "digits", "augment": {"crop_ratio": None}}, "data.augment.crop_ratio=null: "),
    ({"name": "digits", "augment": 5}, "data.augment=5: expected keys and values or null"),
    ({"name": "image_folder", "image_size": 0}, "image_size"),
    ({"name": "digits", "device_resident": "maybe"}, "device_resident=maybe: expected one of auto or"),
])  # fmt: skip
def test_wrong_configuration(cfg, match):
    with pytest.raises(InputError, match=match) as caught:
        build(cfg)
    assert "\n" not in str(caught.value)


def test_wrong_val_size_is_found_when_the_data_are_known():
    with pytest.raises(InputError, match="val_size=1437 must leave"):
        build({"name": "digits", "val_size": 1437}).setup()


def test_types():
    assert isinstance(build({"name": "digits"}).source.load(), ImageArrays)
