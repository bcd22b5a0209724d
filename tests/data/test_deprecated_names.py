"""Deprecated data options: on the command line and in saved runs."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from diffusion_lab.deprecated import current_config, current_overrides
from diffusion_lab.errors import ConfigError
from diffusion_lab.runs import check_resume_compatible, compose

OLD = {"column": "image", "order": "lanes", "lanes": 4, "window": 3, "tail": "spread"}
NEW = {
    "image_column": "image", "order": "interleave", "interleave": 4, "shuffle_buffer": 3,
    "drop_last": False,
}  # fmt: skip


def test_overrides_are_converted_to_the_current_names() -> None:
    for group in ("data", "model.data"):
        old = [f"{group}.{key}={value}" for key, value in OLD.items()]
        new = [f"{group}.{key}={str(v).lower() if v is False else v}" for key, v in NEW.items()]
        assert current_overrides(old) == new == current_overrides(new)
    assert current_overrides(["data.tail=drop"]) == ["data.drop_last=true"]
    assert current_overrides(["data.order=shuffle"]) == ["data.order=shuffle"]


def test_saved_configuration_is_converted_to_the_current_names() -> None:
    saved = {"seed": 1, "data": {"size": 8, "splits": {"train": 1}, **OLD}, "model": {"data": OLD}}
    new = {"seed": 1, "data": {"size": 8, "splits": {"train": 1}, **NEW}, "model": {"data": NEW}}
    assert current_config(saved) == new == current_config(new)
    assert saved["data"]["lanes"] == 4  # the argument itself is not changed


def test_run_of_the_previous_release_can_be_resumed() -> None:
    overrides = [f"data.{key}={value}" for key, value in NEW.items()]
    config = compose("train", [*overrides, "++paths.output_dir=out", "++paths.cache_dir=cache"])
    saved = OmegaConf.to_container(config, resolve=False)
    saved = {**saved, "seed": config.seed}
    for key in NEW:
        del saved["data"][key]
    saved["data"] = {
        **saved["data"], **OLD, "seed": config.seed, "cache_dir": config.data.cache_dir,
    }  # fmt: skip
    check_resume_compatible(Path("run"), saved, config)
    saved["data"]["tail"] = "drop"
    with pytest.raises(ConfigError, match=r"data.drop_last: True -> False"):
        check_resume_compatible(Path("run"), saved, config)
