"""Class labels from the data source to the network, and classifier-free guidance."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import TINY, Command
from image_fixtures import SHARES, encoded, fill, pixels
from pyarrow import parquet
from torch import Tensor, nn

from diffusion_lab import load_run
from diffusion_lab.analytic import Gaussian, GaussianMixture
from diffusion_lab.data import ImageDataModule
from diffusion_lab.data.faces import HAIR_STYLES, draw_faces, face_factors
from diffusion_lab.denoiser import ClassifierFree, NetworkDenoiser
from diffusion_lab.errors import ConfigError, DataError
from diffusion_lab.interop.diffusers import save_unet
from diffusion_lab.loss import Simple
from diffusion_lab.nn import UNet
from diffusion_lab.parameterization import Epsilon
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import UniPC
from diffusion_lab.schedule import Linear
from diffusion_lab.training.lr_schedule import Constant
from diffusion_lab.training.module import DiffusionModule


def opened(tmp_path: Path, **options) -> ImageDataModule:
    data = ImageDataModule(
        **{"size": 8, "batch_size": 4, "cache_dir": str(tmp_path / "cache"), **options}
    )
    data.open()
    return data


# --- data sources -------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["uint8", "bytes", "none"])
def test_face_labels_are_the_chosen_factor(tmp_path: Path, cache: str) -> None:
    """Every batch has the label of each image, in any order."""
    splits = {"train": 40, "val": 8, "test": 8}
    data = opened(tmp_path, source="faces", splits=splits, label="hair_style", cache=cache)
    assert data.classes == list(HAIR_STYLES)
    factors = face_factors(torch.arange(56))["hair_style"]
    assert data.images["test"].labels.tolist() == factors[48:].tolist()
    for batch in data.train_dataloader():
        assert batch["label"].tolist() == factors[batch["index"]].tolist()
        assert torch.equal(batch["image"], draw_faces(batch["index"], size=8))
    plain = opened(tmp_path, source="faces", splits=splits, cache=cache)
    assert plain.classes == [] and "label" not in next(iter(plain.train_dataloader()))


def test_file_labels_are_the_folder_names(tmp_path: Path) -> None:
    """The labels stay correct after an unreadable image is skipped."""
    names = [f"{kind}/{k}.png" for kind in ("cat", "dog", "eel") for k in range(4)]
    fill(tmp_path / "in", names)
    (tmp_path / "in" / "cat" / "1.png").write_bytes(b"")
    data = opened(tmp_path, source=str(tmp_path / "in"), splits=SHARES, label="folder",
                  on_error="skip")  # fmt: skip
    assert data.classes == ["cat", "dog", "eel"]
    for split in data.images.values():
        assert [data.classes[k] for k in split.labels] == [n.split("/")[0] for n in split.names]


def test_parquet_labels_are_the_column_values(tmp_path: Path) -> None:
    rows = [{"bytes": encoded(pixels(k)), "path": None} for k in range(10)]
    kinds = [["male", "female"][k % 3 == 0] for k in range(10)]
    table = pa.table({"image": rows, "sex": kinds, "age": [0.5] * 10})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    source = str(tmp_path / "a.parquet")
    data = opened(tmp_path, source=source, splits=SHARES, label="sex")
    assert data.classes == ["female", "male"]
    for split in data.images.values():
        assert [data.classes[k] for k in split.labels] == [kinds[p] for p in split.positions]
    with pytest.raises(DataError, match="has no such column; it has image, sex, age"):
        opened(tmp_path, source=source, splits=SHARES, label="hair")
    with pytest.raises(
        DataError, match=r"data.label=age is not allowed; the column has no classes"
    ):
        opened(tmp_path, source=source, splits=SHARES, label="age")


def test_unknown_label_of_a_source_is_an_error(tmp_path: Path) -> None:
    faces = {"source": "faces", "splits": {"train": 8, "val": 4, "test": 4}}
    with pytest.raises(DataError, match=r"data.label=width is not allowed; faces have .*glasses"):
        opened(tmp_path, **faces, label="width")
    fill(tmp_path / "in", ["a.png", "b.png"])
    with pytest.raises(DataError, match="a folder of images has the classes of folder"):
        opened(tmp_path, source=str(tmp_path / "in"), splits=SHARES, label="hair")
    opened(tmp_path, **faces)
    packed = next((tmp_path / "cache").glob("*/manifest.json")).parent
    with pytest.raises(ConfigError, match=r"the packed cache data.source=.* has no classes"):
        opened(tmp_path, source=str(packed), splits=SHARES, label="hair_style")


# --- training -----------------------------------------------------------------------------------


class LabelOutput(nn.Module):
    """A network whose output is the label times a scale."""

    classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, index: Tensor, label: Tensor) -> Tensor:
        self.seen, self.seen_index = label, index
        return self.scale * label.reshape(-1, *[1] * (x.ndim - 1)).to(x).expand_as(x)


def module(dropout: float) -> DiffusionModule:
    result = DiffusionModule(
        LabelOutput(), Linear(), Epsilon(), Simple(),
        lambda parameters: torch.optim.SGD(parameters, 0.1),
        lambda optimizer, steps: Constant(optimizer, steps),
        label_dropout=dropout,
    )  # fmt: skip
    result._log_loss = lambda loss: None
    return result


def batch(count: int, first: int = 0) -> dict:
    index = torch.arange(first, first + count)
    return {
        "x_0": torch.zeros(count, 1, 2, 2), "index": index, "label": index % 3, "weight": 1.0,
        "key": make_key(0, "train", 0, index), "stratum": torch.zeros(count), "split": "train",
    }  # fmt: skip


def test_label_dropout_has_its_rate_and_depends_on_the_image_only() -> None:
    labels = torch.arange(4000) % 3
    for dropout in (0.0, 0.1, 1.0):
        trained = module(dropout)
        trained.training_step(batch(4000), 0)
        withheld = trained.network.seen == 3
        assert float(withheld.float().mean()) == pytest.approx(dropout, abs=0.02)
        assert torch.equal(trained.network.seen[~withheld], labels[~withheld])
        whole = trained.network.seen
    trained = module(0.1)
    trained.training_step(batch(4000), 0)
    whole = trained.network.seen
    trained.training_step(batch(7, 2000), 1)  # the same images in another batch
    assert torch.equal(trained.network.seen, whole[2000:2007])


def test_label_dropout_is_independent_of_the_time_and_of_the_noise() -> None:
    """A stream shared with t would drop labels at t <= 0.1 only."""
    trained, images = module(0.1), batch(20_000)
    trained.training_step(images, 0)
    dropped = trained.network.seen == 3
    decile = ((trained.network.seen_index + 1) / 100.001).long()  # index 0 to 999
    for k in range(10):  # about 2000 images each: the standard error is 0.007
        share = float(dropped[decile == k].float().mean())
        assert share == pytest.approx(0.1, abs=0.03), k
    noise = KeyedGenerator(images["key"])
    noise.uniform()  # t
    for value in noise.normal(1, 2, 2).flatten(1).T:
        assert float(value[dropped].mean()) == pytest.approx(0, abs=0.1)
        assert float(value[dropped].std()) == pytest.approx(1, abs=0.1)


def test_validation_uses_every_label() -> None:
    trained = module(1.0)
    trained.log = lambda *args, **kwargs: None
    trained.validation_step({**batch(30), "split": "val"}, 0)
    assert torch.equal(trained.network.seen, torch.arange(30) % 3)


def test_class_embedding_starts_at_zero_and_gets_gradients() -> None:
    torch.manual_seed(0)
    unet = UNet(channels=8, multipliers=(1,), blocks=1, attention_levels=(), groups=4, classes=3)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(unet(x, 10.0, 0), unet(x, 10.0))
    assert torch.equal(unet(x, 10.0), unet(x, 10.0, 3))  # no label is equivalent to label K
    torch.nn.init.normal_(unet.conv_out.weight)
    torch.nn.init.normal_(unet.down[0].block[0].conv_2.weight)
    unet(x, 10.0, torch.tensor([0, 0, 2, 3])).square().sum().backward()
    rows = unet.class_embedding.weight.grad.abs().sum(1) > 0
    assert rows.tolist() == [True, False, True, True]
    with pytest.raises(ConfigError, match="classes=3 is not supported by diffusers"):
        save_unet(unet, "nowhere")


# --- guidance -----------------------------------------------------------------------------------


def mixture() -> GaussianMixture:
    means = torch.tensor([[2.0, 0.0], [-1.0, 1.0]])
    covariances = torch.tensor([[[0.1, 0.02], [0.02, 0.05]], [[0.2, 0.0], [0.0, 0.1]]])
    return GaussianMixture(torch.tensor([0.3, 0.7]), means, covariances)


def test_classifier_free_score_is_the_score_of_the_tilted_density() -> None:
    """The score is that of p(x_t) p(c | x_t)^w; at w = 1 the samples are samples of the class."""
    whole, schedule = mixture(), Linear()
    one = Gaussian(whole.means[0], whole.covariances[0])
    conditional, unconditional = one.denoiser(schedule), whole.denoiser(schedule)
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(64, 2, generator=generator, dtype=torch.float64)
    t = torch.tensor(0.4, dtype=torch.float64)
    alpha_t, sigma_t = schedule(t)
    for w in (0.0, 1.0, 2.5):
        guided = ClassifierFree(conditional, unconditional, w)
        x = x_t.clone().requires_grad_()
        # log p(x_t) + w log p(c | x_t), up to a constant
        log_p = whole.log_prob_t(x, alpha_t, sigma_t)
        log_c = one.log_prob_t(x, alpha_t, sigma_t) - log_p
        (score,) = torch.autograd.grad((log_p + w * log_c).sum(), x)
        torch.testing.assert_close(guided.score(x_t, t), score, rtol=1e-9, atol=1e-9)
    samples = UniPC(50)(ClassifierFree(conditional, unconditional, 1.0), x_t)
    assert bool((whole.responsibilities(samples)[:, 0] > 0.9).all())


def test_denoiser_passes_one_label_per_image_to_the_network() -> None:
    labels = torch.tensor([0, 2, 1])
    denoiser = NetworkDenoiser(LabelOutput(), Linear(), Epsilon(), labels)
    x_t, t = torch.zeros(3, 1, 2, 2), torch.tensor(0.5)
    output = denoiser.outputs(x_t, t)[0]
    assert output[:, 0, 0, 0].tolist() == [0, 2, 1]


# --- command line -------------------------------------------------------------------------------


def test_eval_generates_a_class_by_name_or_number(lab: Command) -> None:
    tiny = [word for word in TINY if not word.startswith("experiment=")]
    result = lab("train", "experiment=ddpm_faces_classes", *tiny, "trainer.max_steps=3",
                 "optimizer.lr=0.05", "hydra.run.dir=run")  # fmt: skip
    assert result.code == 0, result.text
    weight = load_run("run").network.class_embedding.weight
    assert weight.shape[0] == 10 and float(weight.abs().sum()) > 0
    small = ["task=generate", "num_samples=3", "sampler.steps=2", "trainer.accelerator=cpu"]
    for name, options in {
        "name": ["label=curly"], "number": ["label=4"], "other": ["label=bald"], "none": [],
        "strong": ["label=4", "guidance_scale=3"], "weak": ["label=4", "guidance_scale=0"],
    }.items():  # fmt: skip
        result = lab("eval", "run=run", f"hydra.run.dir={name}", *options, *small)
        assert result.code == 0, result.text
    images = {name: np.load(f"{name}/samples.npy") for name in
              ("name", "number", "other", "none", "strong", "weak")}  # fmt: skip
    assert np.array_equal(images["name"], images["number"])
    assert np.array_equal(images["weak"], images["none"])
    for other in ("other", "none", "strong"):
        assert not np.array_equal(images["name"], images[other])
    assert "class curly, guidance scale 1.0" in Path("name/report.html").read_text()
    result = lab("eval", "run=run", "label=blond", *small)
    assert result.code == 1
    assert "label=blond is not one of the 9 classes" in result.text and "curly" in result.text


def test_mismatch_of_classes_and_network_is_an_error(lab: Command) -> None:
    for options, message in (
        (["data.label=glasses"], "network.classes=0, but the images have 2 classes"),
        (["network.classes=9"], "the images have 0 classes (data.label=None); set network.cla"),
        (["data.label=nose"], "data.label=nose is not allowed; faces have"),
    ):
        result = lab("train", *TINY, "trainer.max_steps=1", *options)
        assert result.code == 1 and message in result.text and "Traceback" not in result.text
