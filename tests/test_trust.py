"""Configurations of somebody else: what a checkpoint or a run directory may name."""

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from conftest import Command, Trained
from gadgets import gadgets, positions
from omegaconf import OmegaConf

from diffusion_lab import load_run
from diffusion_lab.command.report import report
from diffusion_lab.errors import LabError, RunError
from diffusion_lab.interop.diffusers import load_unet, save_unet
from diffusion_lab.nn import UNet
from diffusion_lab.report.sweep_report import summarize
from diffusion_lab.runs import compose, rebuild, resumed_evaluation
from diffusion_lab.runs.compose import CONFIG_PATH
from diffusion_lab.runs.signature import sign
from diffusion_lab.runs.trust import (
    allowed_modules,
    check_nodes,
    check_source,
    check_values,
    compose_unsigned,
)

OLD = Path(__file__).parent / "fixtures" / "run_0_1"
NODES = ("network", "schedule", "parameterization", "data")
SMALL = ["task=generate", "num_samples=2", "sampler.steps=2", "trainer.accelerator=cpu"]
MODULE = """
import os
import torch
from lightning import Callback
from diffusion_lab.nn import UNet

class Net(UNet):
    pass

class Note(Callback):
    pass
"""

Forge = Callable[[dict[str, Any]], Path]


@pytest.fixture
def forge(tmp_path: Path) -> Forge:
    """Writes a checkpoint without a signature, whose configuration has other values."""
    content = torch.load(OLD / "checkpoints" / "last.ckpt", weights_only=True)

    def write(changes: dict[str, Any], signature: str | None = None) -> Path:
        config = dict(content["diffusion_lab"]["config"])
        for key, value in changes.items():
            group, _, name = key.partition(".")
            config[group] = {**config[group], name: value} if name else value
        saved = {**content["diffusion_lab"], "config": config, "signature": signature}
        torch.save({**content, "diffusion_lab": saved}, tmp_path / "forged.ckpt")
        return tmp_path / "forged.ckpt"

    return write


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user, with a network and a callback."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "own_parts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    sys.modules.pop("own_parts", None)
    importlib.invalidate_caches()
    return "own_parts"


def untouched(tmp_path: Path) -> bool:
    return not (tmp_path / "made").exists() and (tmp_path / "made.victim").is_dir()


@pytest.fixture
def nodes(tmp_path: Path) -> dict[str, dict[str, Any]]:
    (tmp_path / "made.victim").mkdir()
    return gadgets(str(tmp_path / "made"))


# --- targets ------------------------------------------------------------------------------------


def test_a_gadget_is_refused_at_every_position(nodes: dict, tmp_path: Path) -> None:
    for gadget in nodes.values():
        for place, value in positions(gadget).items():
            for key in NODES:
                for node in (value, {"_target_": "torch.nn.Identity", "a": value}):
                    with pytest.raises(RunError, match=r"_target_=.* is refused.*allow=") as error:
                        check_nodes(node, key, "last.ckpt", (), signed=False)
                    assert f"last.ckpt: {key}." in str(error.value), place
            with pytest.raises(RunError, match=r"is refused|its overrides set"):
                check_values({"callbacks": {"x": value}}, {}, (), "resume=a", ())
    assert untouched(tmp_path)


@pytest.mark.parametrize("name", gadgets("made"))
def test_load_run_refuses_a_gadget(name: str, nodes: dict, forge: Forge, tmp_path: Path) -> None:
    inside = {"_target_": "builtins.bool", "_args_": [nodes[name]]}
    for changes in ({"network.blocks": inside}, {"schedule": nodes[name]}):
        with pytest.raises(RunError, match=r"_target_=.* is refused"):
            load_run(forge(changes))
    assert untouched(tmp_path)


@pytest.mark.parametrize("key", ["network.a", "schedule.s", "parameterization.a", "data.source"])
def test_load_run_refuses_a_gadget_in_every_node(
    key: str, nodes: dict, forge: Forge, tmp_path: Path
) -> None:
    for value in positions(nodes["gzip"]).values():
        with pytest.raises(RunError, match=rf"{key}.*_target_=.* is refused"):
            load_run(forge({key: value}))
    assert untouched(tmp_path)


def test_everything_in_conf_is_allowed() -> None:
    folder = Path(__file__).parents[1] / "conf"
    for path in sorted(folder.rglob("*.yaml")):
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        config = {k: v for k, v in (config or {}).items() if k not in ("hydra", "defaults")}
        if path.parent.name != "benchmark":  # a leaderboard is not resumed
            check_values(_targets(config), {}, (), str(path), ())


def _targets(value: Any) -> dict[str, Any]:
    """The groups of keys, and of other keys the targets alone."""
    kept = {k: v for k, v in value.items() if isinstance(v, dict) or k == "_target_"}
    return {k: _targets(v) if isinstance(v, dict) else v for k, v in kept.items()}


@pytest.mark.parametrize("name", ["torch.nn.Linear", "torch.nn.SiLU", "torch.optim.SGD"])
def test_modules_and_optimizers_of_torch_are_allowed(name: str) -> None:
    check_nodes({"a": [{"_target_": name}]}, "network", "last.ckpt", (), signed=False)


@pytest.mark.parametrize(
    "name",
    ["torch.nn.functional.relu", "torch.nn.utils.skip_init", "torch.nn.Buffer", "torch.optim.os",
     "diffusion_lab.data.draw_faces", "diffusion_lab.metric.METRICS", "diffusion_lab.nn.os.system",
     "diffusion_lab.data.folder_source.FolderSource", "diffusion_lab.load_run", "x", "", 3, None,
     ["os.system"]],
)  # fmt: skip
def test_other_names_are_refused(name: Any) -> None:
    node = {"a": {"_target_": name, "_args_": []}}
    with pytest.raises(LabError):
        check_nodes(node, "network", "last.ckpt", (), signed=False)


@pytest.mark.parametrize("value", [{1, 2}, torch.ones(1), b"x"])
def test_other_types_than_plain_containers_are_refused(value: Any) -> None:
    with pytest.raises(RunError, match=r"network\.a holds a"):
        check_nodes({"a": value}, "network", "last.ckpt", (), signed=True)


def test_a_checkpoint_with_an_interpolation_is_refused(
    forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    path = forge({"network.channels": "${oc.decode:${oc.env:SECRET}}"})
    with pytest.raises(RunError, match=r"network.channels=\$\{oc.* holds values") as error:
        load_run(path)
    assert "hunter2" not in str(error.value)


# --- own components -----------------------------------------------------------------------------


def test_an_allowed_module_is_loaded(
    forge: Forge, own_module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = forge({"network._target_": "own_parts.Net"})
    with pytest.raises(RunError, match=r"network._target_=own_parts.Net .*allow=own_parts "):
        load_run(path)
    assert "own_parts" not in sys.modules  # its import would run it
    assert type(rebuild(path, allow="own_parts").network).__name__ == "Net"
    assert type(rebuild(path, allow=["other", "own_parts"]).network).__name__ == "Net"
    monkeypatch.setenv("DIFFUSION_LAB_ALLOW", "other, own_parts")
    assert type(load_run(path).network).__name__ == "Net"
    for name in ("own_parts.os.system", "own_parts.torch.save", "own_parts2.Net"):
        path = forge({"network._target_": name})
        with pytest.raises(RunError, match=f"network._target_={name} is refused"):
            load_run(path)


def test_a_signed_checkpoint_needs_no_permission(
    forge: Forge, own_module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changes = {"network._target_": "own_parts.Net", "data.source": "/data/images"}
    content = torch.load(forge(changes), weights_only=True)["diffusion_lab"]["config"]
    signed = forge(changes, sign(content))
    assert type(load_run(signed).network).__name__ == "Net" and rebuild(signed).signed
    signed = forge({**changes, "data.seed": 1}, sign(content))
    with pytest.raises(RunError, match="no valid signature"):
        load_run(signed)
    signed = forge(changes, sign(content))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another"))
    with pytest.raises(RunError, match="no valid signature"):
        load_run(signed)
    assert sign(content) != torch.load(signed, weights_only=True)["diffusion_lab"]["signature"]
    with pytest.raises(RunError, match="no valid signature"):
        load_run(signed)


def test_allowed_modules_are_those_of_key_and_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert allowed_modules(None) == () and allowed_modules("a") == ("a",)
    monkeypatch.setenv("DIFFUSION_LAB_ALLOW", "b,,c ")
    assert allowed_modules(["a"]) == ("a", "b", "c")


# --- sources ------------------------------------------------------------------------------------


def test_sources_of_others_are_generated_or_known() -> None:
    check_source("faces", "last.ckpt")
    check_source(compose("train", ["data=celeba"]).data.source, "last.ckpt")
    for source in ("/data/x", "~", "s3://b/x?endpoint_override=host", "hf://datasets/a/b", 3, []):
        with pytest.raises(RunError, match=r"last.ckpt names data.source=.*data.source=\.\.\."):
            check_source(source, "last.ckpt")


def test_evaluation_of_a_foreign_checkpoint(
    lab: Command, forge: Forge, nodes: dict, tmp_path: Path
) -> None:
    """Its source is opened only if the command repeats it; a gadget in its data is refused."""
    (tmp_path / "private").mkdir()
    task = ["task=denoise", "sigma_t=0.5", "num_images=2", *SMALL[1:]]
    path = forge({"data.source": str(tmp_path / "private")})
    result = lab("eval", f"ckpt={path}", *task, "hydra.run.dir=e")
    assert result.code == 1 and f"names data.source={tmp_path}/private" in result.text
    result = lab("eval", f"ckpt={path}", *task, "data.source=faces", "hydra.run.dir=f")
    assert result.code == 0, result.text
    path = forge({"data.splits": [nodes["gzip"]]})
    result = lab("eval", f"ckpt={path}", *task, "hydra.run.dir=g")
    assert result.code == 1 and "data.splits.0._target_=gzip.open is refused" in result.text
    assert "Traceback" not in result.text and untouched(tmp_path)


def test_evaluation_of_a_foreign_run_directory(
    lab: Command, forge: Forge, own_module: str, tmp_path: Path
) -> None:
    path = forge({"network._target_": "own_parts.Net"})
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    path.rename(tmp_path / "run" / "checkpoints" / "last.ckpt")
    result = lab("eval", "run=run", *SMALL, "hydra.run.dir=e")
    assert result.code == 1 and "own_parts.Net is refused" in result.text
    result = lab("eval", "run=run", "allow=own_parts", *SMALL, "hydra.run.dir=f")
    assert result.code == 0, result.text


def test_pretrained_weights_cannot_name_a_target(
    lab: Command, nodes: dict, tmp_path: Path
) -> None:
    save_unet(
        UNet(channels=8, multipliers=[1, 1], blocks=1, groups=4, attention_levels=[]),
        tmp_path / "unet",
    )
    path = tmp_path / "unet" / "config.json"
    plain = json.loads(path.read_text())
    for place, value in positions(nodes["gzip"]).items():
        path.write_text(json.dumps({**plain, "act_fn": value}))
        with pytest.raises(RunError, match="act_fn"):
            load_unet(tmp_path / "unet")
        assert untouched(tmp_path), place


# --- run directories ----------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> Callable[..., Path]:
    """Copies a run without a signature, with further overrides."""

    def copy(*overrides: str) -> Path:
        shutil.copytree(OLD, tmp_path / "foreign", dirs_exist_ok=True)
        path = tmp_path / "foreign" / ".hydra" / "overrides.yaml"
        old = OmegaConf.to_container(OmegaConf.load(OLD / ".hydra" / "overrides.yaml"))
        OmegaConf.save(OmegaConf.create([*old, *overrides]), path)
        return tmp_path / "foreign"

    return copy


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("callbacks.x._target_", "gzip.open", "callbacks.x._target_=gzip.open is refused"),
        ("callbacks.x._args_", ["/x"], "its overrides set callbacks.x._args_.0=/x"),
        ("x", {"a": [{"_target_": "gzip.open"}]}, "x.a.0._target_=gzip.open is refused"),
        ("x", {"_target_": "${y}"}, "x._target_=${y} is refused"),
        ("data.source", "s3://b/x?endpoint_override=h", "its overrides set data.source=s3://b/x"),
        ("data.source", "${name}", "its overrides set data.source=${name}"),
        ("data.cache_dir", "/x", "its overrides set data.cache_dir=/x"),
        ("paths.output_dir", "/x", "its overrides set paths.output_dir=/x"),
        ("trainer.default_root_dir", "/x", "its overrides set trainer.default_root_dir=/x"),
        ("callbacks.best.dirpath", "/x", "its overrides set callbacks.best.dirpath=/x"),
        ("callbacks.best.filename", "../x", "its overrides set callbacks.best.filename=../x"),
        ("extractor.weights", "/x", "its overrides set extractor.weights=/x"),
        ("logger.wandb.log_model", "all", "its overrides set logger.wandb.log_model=all"),
        ("task.image", "/x", "its overrides set task.image=/x"),
        ("model.path", "a/b", "its overrides set model.path=a/b"),
    ],
)
def test_values_of_a_foreign_directory_are_refused(key: str, value: Any, reason: str) -> None:
    values: Any = value
    for name in reversed(key.split(".")):
        values = {name: values}
    with pytest.raises(RunError) as error:
        check_values(values, {}, (), "resume=a", ())
    assert str(error.value).startswith(f"resume=a: {reason}")
    check_values(values, values, (), "resume=a", ())  # in conf/
    if not isinstance(value, dict | list):
        check_values(values, {}, {key}, "resume=a", ())


def test_values_that_are_no_places_are_not_restricted() -> None:
    values = {"data": {"source": "faces", "image_column": "a"}, "operator": {"weights": [1, 2]},
              "trainer": {"max_steps": 3, "profiler": None}, "name": "a"}  # fmt: skip
    check_values(values, {}, (), "resume=a", ())


@pytest.mark.parametrize(
    "override",
    ["name=${oc.env:SECRET}", "name=${oc.${x}:SECRET}", "name='$'", "name='${a}{oc.env:SECRET}$'"],
)
def test_resolvers_of_a_foreign_directory_are_refused(override: str) -> None:
    with pytest.raises(RunError, match=r"in \.hydra is refused") as error:
        compose_unsigned("train", Path("a"), ["seed=1", override], [], ())
    assert override in str(error.value)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("+callbacks.x._target_=gzip.open", "callbacks.x._target_=gzip.open is refused"),
        ("data.source=s3://b/x", "its overrides set data.source=s3://b/x"),
        ("name=${oc.env:SECRET}", "name=${oc.env:SECRET} in .hydra is refused"),
    ],
)
def test_resume_of_a_foreign_directory_is_refused(
    override: str, reason: str, foreign: Callable[..., Path], lab: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("SECRET", "hunter2")
    result = lab("train", f"resume={foreign(override)}", "trainer.max_steps=8")
    assert result.code == 1 and reason in result.text, result.text
    assert "Traceback" not in result.text and "hunter2" not in result.text


@pytest.mark.slow
def test_values_that_a_command_repeats_are_followed(
    foreign: Callable[..., Path], lab: Command, own_module: str, tmp_path: Path
) -> None:
    cache = f"data.cache_dir={tmp_path}/cache"
    directory = foreign("+callbacks.x._target_=own_parts.Note", cache, "allow=own_parts")
    result = lab("train", f"resume={directory}", "trainer.max_steps=8", cache)
    assert result.code == 1 and "callbacks.x._target_=own_parts.Note is refused" in result.text
    steps = ["trainer.max_steps=8", "checkpoint.every_n_steps=1"]
    result = lab("train", f"resume={directory}", *steps, cache, "allow=own_parts")
    assert result.code == 0, result.text
    result = lab("train", f"resume={directory}", "trainer.max_steps=9")  # now of this user, too
    assert result.code == 0, result.text


def test_the_command_itself_is_not_restricted(
    foreign: Callable[..., Path], lab: Command, own_module: str
) -> None:
    own = "+callbacks.x._target_=own_parts.Note"
    result = lab("train", f"resume={foreign()}", "trainer.max_steps=7", own)
    assert result.code == 0, result.text


def test_an_option_outside_conf_is_not_the_users(
    foreign: Callable[..., Path], lab: Command, tmp_path: Path
) -> None:
    (tmp_path / "evil.yaml").write_text("# @package _global_\ncallbacks: {x: {_target_: os.x}}\n")
    conf = Path(__file__).parents[1] / "conf" / "experiment"
    option = Path("/", *[".."] * len(conf.parts), *tmp_path.parts[1:], "evil").as_posix()[1:]
    result = lab("train", f"resume={foreign(f'experiment={option}')}", "trainer.max_steps=7")
    assert result.code == 1 and "Traceback" not in result.text
    assert "callbacks.x._target_=os.x is refused" in result.text, result.text


def test_an_own_run_with_own_parts_needs_no_permission(
    tiny: Command, lab: Command, own_module: str
) -> None:
    own = ["network._target_=own_parts.Net", "+callbacks.x._target_=own_parts.Note"]
    assert tiny(*own, "trainer.max_steps=2", "hydra.run.dir=a").code == 0
    result = lab("train", "resume=a", "ema.decay=0.9", "trainer.max_steps=3")
    assert result.code == 0, result.text
    result = lab("eval", "run=a", *SMALL, "hydra.run.dir=e")
    assert result.code == 0, result.text
    Path("a/.hydra/signature").unlink()
    result = lab("train", "resume=a", "trainer.max_steps=5")
    assert result.code == 1 and "own_parts.N" in result.text and "is refused" in result.text


def test_a_foreign_evaluation_is_checked(trained: Trained, lab: Command) -> None:
    trained("a", "trainer.max_steps=2")
    assert lab("eval", "run=a", *SMALL, "hydra.run.dir=e").code == 0
    (Path("e") / "partial").mkdir()  # as if it were not finished
    path = Path("e/.hydra/overrides.yaml")
    recorded = OmegaConf.to_container(OmegaConf.load(path))
    for override, reason in {
        "+x._target_=gzip.open": "x._target_=gzip.open is refused",
        "+task.image=/etc/hostname": "its overrides set task.image=/etc/hostname",
        "seed=${oc.env:SEED}": "in .hydra is refused",
        "data.source=/private": "its overrides set data.source=/private",
    }.items():
        OmegaConf.save(OmegaConf.create([*recorded, override]), path)
        with hydra.initialize_config_dir(CONFIG_PATH, version_base="1.3"):
            with pytest.raises(RunError) as error:
                resumed_evaluation(Path("e"), ["resume=e"])
        assert reason in str(error.value)
    OmegaConf.save(OmegaConf.create([*recorded, "data.source=/private"]), path)
    result = lab("eval", "resume=e", "data.source=/private")  # the prior's task opens no data
    assert result.code == 0, result.text


# --- reports ------------------------------------------------------------------------------------


def test_reports_show_interpolations_as_they_are(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, nodes: dict, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.chdir(tmp_path)
    run = trained("sweep/0", "trainer.max_steps=2")
    for name in ("config.yaml", "overrides.yaml"):
        config = OmegaConf.load(run / ".hydra" / name)
        if name == "config.yaml":
            config.name, config.optimizer.lr = "${oc.env:SECRET}", "${oc.env:SECRET}"
            config.network, config.x = nodes["gzip"], positions(nodes["gzip"])["list"]
        else:
            config.extend(["name=${oc.env:SECRET}", "${oc.env:SECRET}"])
        OmegaConf.save(config, run / ".hydra" / name)
    shutil.copytree(run / ".hydra", run / ".hydra" / "resumed-1")
    summarize(Path("sweep"))
    for page in (report(run), Path("sweep/report.html"), Path("sweep/summary.csv")):
        text = page.read_text()
        assert "hunter2" not in text and "oc.env:SECRET" in text, page
    assert untouched(tmp_path)
