"""The dashboard as code: what it says to the server, without one."""

import json
import sys

import pytest

from diffusion_lab.logger.wandb_workspace import SECTIONS, Lines, Pictures, build, main


def test_the_view_has_all_sections_and_keys() -> None:
    pytest.importorskip("wandb_workspaces")
    model = json.loads(build("team", "faces", "view")._to_model().model_dump_json())
    assert (model["entity"], model["project"], model["display_name"]) == ("team", "faces", "view")
    sections = model["spec"]["section"]["panel_bank_config"]["sections"]
    titles = ["Training", "Validation", "Samples", "Quality", "Restoration", "Sweep", "System"]
    assert [s["name"] for s in sections][: len(titles)] == titles
    for section, panels in zip(sections, SECTIONS.values(), strict=False):
        made = {panel["config"].get("chart_title"): panel for panel in section["panels"]}
        for panel in panels:
            config = made[panel.title]["config"]
            if isinstance(panel, Lines):
                assert config["x_axis"] == "trainer/global_step"
                assert config["metrics"] == list(panel.keys) or panel.pattern
                assert config["metric_regex"] == panel.pattern
                assert bool(config["y_log_scale"]) == panel.log
            elif isinstance(panel, Pictures):
                assert config["media_keys"] == list(panel.keys)
    sweep = json.dumps(sections[titles.index("Sweep")])
    assert "config:schedule.value._target_" in sweep and "summary:val/loss_ema" in sweep


def test_what_is_missing_is_named(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*arguments: str) -> str:
        assert main(list(arguments)) == 1
        return capsys.readouterr().err

    assert "entity=... is missing" in said("project=faces")
    assert "projct is no key; choose from entity, name, project" in said("projct=faces")
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert "pip install 'diffusion-lab[workspace]'" in said("entity=team", "project=faces")
    monkeypatch.undo()
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody is there
    assert "the view is not made" in said("entity=team", "project=faces")
