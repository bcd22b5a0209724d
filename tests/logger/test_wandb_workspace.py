"""W&B workspace: the model that is sent to the server, and errors of the command."""

import json
import sys

import pytest

from diffusion_lab.logger.wandb_workspace import SECTIONS, ImagePanel, LinePanel, build, main


def test_view_has_all_sections_and_keys() -> None:
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
            if isinstance(panel, LinePanel):
                assert config["x_axis"] == "trainer/global_step"
                assert config["metrics"] == list(panel.keys) or panel.pattern
                assert config["metric_regex"] == panel.pattern
                assert bool(config["y_log_scale"]) == panel.log
            elif isinstance(panel, ImagePanel):
                assert config["media_keys"] == list(panel.keys)
    sweep = json.dumps(sections[titles.index("Sweep")])
    assert "config:schedule.value._target_" in sweep and "summary:val/loss_ema" in sweep


def test_missing_and_unknown_options_are_an_error(capsys: pytest.CaptureFixture) -> None:
    for arguments, message in (
        (["--project=faces"], "required: --entity"),
        (["--entity=team", "--project=faces", "--projct=faces"], "--projct"),
    ):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0 and "--entity" in capsys.readouterr().out


def test_missing_package_or_server_is_an_error(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert main(["--entity=team", "--project=faces"]) == 1
    assert "pip install 'diffusion-lab[workspace]'" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # no server listens at this address
    assert main(["entity=team", "project=faces"]) == 1  # the syntax of the previous release
    assert "the view is not created" in capsys.readouterr().err
