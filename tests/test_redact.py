"""Secrets in addresses are refused, and masked where they are written."""

import re
from pathlib import Path

import pytest
from conftest import Command
from omegaconf import OmegaConf

from diffusion_lab.command.data import main
from diffusion_lab.data import ImageDataModule
from diffusion_lab.data.storage import open_storage
from diffusion_lab.errors import ConfigError
from diffusion_lab.redact import mask, refuse_secrets
from diffusion_lab.report.page import KeyValueSection, write_report
from diffusion_lab.report.sweep_report import summarize

SECRETS = {
    "s3://KEY:hunter2@bucket/x": "s3://***@bucket/x",
    "s3://KEY:hun/ter2+hunter2@bucket/x": "s3://***@bucket/x",
    "s3://KEY:hunter2%2F@bucket/x?region=a": "s3://***@bucket/x?region=a",
    "https://hunter2@host/x": "https://***@host/x",
    "https://host/x?a=1&X-Amz-Signature=hunter2&b=2": "https://host/x?a=1&X-Amz-Signature=***&b=2",
    "s3://b/x?secret_key=hunter2": "s3://b/x?secret_key=***",
    "s3://b/x?access_key=hunter2&region=a": "s3://b/x?access_key=***&region=a",
    "gs://b/x?access_token=hunter2": "gs://b/x?access_token=***",
    "https://h/x?password=hunter2": "https://h/x?password=***",
    "https://h/x?api_key=hunter2": "https://h/x?api_key=***",
}
HARMLESS = [
    "faces", "~/images", "/data/a@b:c/d", "s3://bucket/a@b", "s3://bucket/folder/",
    "hf://datasets/korexyz/celeba-hq-256x256@42078a1fb27b6079eaab8cf453efd3d79a8b7bda",
    "s3://bucket/x?region=eu-west-1&endpoint_override=localhost:9000&scheme=http",
    "gs://anonymous@bucket/x", "http://localhost:8000/a@b", "data.splits={train: 64, val: 16}",
    "name='a@b'", "sampler@fid.sampler=seeds", "https://arxiv.org/abs/2306.10574 me@host.org",
]  # fmt: skip


@pytest.mark.parametrize("address", SECRETS)
def test_secrets_are_masked_and_refused(address: str) -> None:
    assert mask(f"a={address} b") == f"a={SECRETS[address]} b"
    for call in (refuse_secrets, open_storage, _module):
        with pytest.raises(ConfigError, match=r"AWS_PROFILE") as error:
            call(address)
        assert str(error.value).startswith(SECRETS[address]) and "hunter2" not in str(error.value)


def _module(address: str) -> ImageDataModule:
    return ImageDataModule(address, 8, 2, {"train": 1, "val": 1, "test": 1})


@pytest.mark.parametrize("text", HARMLESS)
def test_other_texts_are_unchanged(text: str) -> None:
    assert mask(text) == text
    refuse_secrets(text)


def test_the_command_of_caches_refuses_a_secret(capsys: pytest.CaptureFixture) -> None:
    for address in ("s3://KEY:hunter2@bucket/x", "s3://b/x?secret_key=hunter2"):
        assert main(["ingest", f"data.source={address}"]) == 1
        output = capsys.readouterr()
        assert "hunter2" not in output.out + output.err and "AWS_PROFILE" in output.err


@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.parametrize("flags", [[], ["-m", "seed=0,1"]])
def test_a_command_with_a_secret_writes_nothing(
    command: str, flags: list[str], lab: Command, tmp_path: Path
) -> None:
    for address in ("s3://KEY:hunter2@bucket/x", "s3://b/x?secret_key\\=hunter2"):
        result = lab(command, *flags, f"data.source={address}", "hydra.run.dir=a")
        assert result.code == 1 and "hunter2" not in result.text
        assert "AWS_SECRET_ACCESS_KEY" in result.text and "Traceback" not in result.text
    assert not list(tmp_path.iterdir())


def test_a_secret_in_conf_is_refused_before_anything_is_written(
    lab: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "conf" / "data"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("defaults: [faces]\nsource: s3://KEY:hunter2@bucket/x\n")
    for flags in ([], ["-m"]):
        result = lab(
            "train", "--config-dir", "conf", *flags, "data=mine", "hydra.run.dir=a",
            "hydra.sweep.dir=s",
        )  # fmt: skip
        assert result.code == 1 and "source: s3://***@bucket/x holds a secret" in result.text
        assert "hunter2" not in result.text and [p.name for p in tmp_path.iterdir()] == ["conf"]


def test_reports_mask_secrets_of_older_runs(tmp_path: Path) -> None:
    address = "s3://KEY:hunter2@bucket/x?token=hunter2&region=a"
    sections = [KeyValueSection("Settings", {"Data": address})]
    page = write_report(tmp_path / "report.html", address, address, sections).read_text()
    assert "hunter2" not in page and len(re.findall(r"s3://\*\*\*@bucket/x", page)) >= 3
    (tmp_path / "0" / ".hydra").mkdir(parents=True)
    overrides = OmegaConf.create([f"data.source={address}", "seed=1"])
    OmegaConf.save(overrides, tmp_path / "0" / ".hydra" / "overrides.yaml")
    summarize(tmp_path)
    for name in ("summary.csv", "report.html"):
        text = (tmp_path / name).read_text()
        assert "hunter2" not in text and "s3://***@bucket/x" in text
