"""Speed benchmark: both sides compute the same, and ratios have the right direction."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pytest
import torch

from benchmarks import machine
from benchmarks.speed import __main__ as command
from benchmarks.speed import contestants, report
from benchmarks.speed.alternate import OutOfMemory, time_alternately
from diffusion_lab.interop.diffusers import save_unet

TINY = contestants.SETTINGS["tiny"]
KEYS = {"name", "device", "ours", "peer", "peer_name", "unit", "ratio", "spread"}
FLOPS, MEMORY = 10**9, [100e6, 110e6, 120e6]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_unet(contestants.make_network(TINY), folder)
    return folder


@pytest.mark.parametrize("peer", command.EAGER)
def test_both_sides_have_the_same_weights(weights: Path, peer: str) -> None:
    x, _, index = contestants._inputs("ours", TINY, 2, "cpu")
    ours, theirs = (
        contestants.predict(contestants.load(side, TINY, weights, "cpu").eval(), x, index)
        for side in ("ours", peer)
    )
    assert ours.abs().max() > 0.1  # not the zeros of a new network
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for mine, other in zip(
        *(contestants.guided(side, TINY, weights, 2, "cpu").step() for side in ("ours", peer)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def test_both_sides_train_and_sample_images_of_one_shape(weights: Path) -> None:
    for side in ("ours", "diffusers contiguous"):
        work = contestants.train(side, TINY, weights, "float32", 2, "cpu")
        work.step()
        assert len(work.facts["memory"]) == 3
        images = torch.as_tensor(
            contestants.sample(side, TINY, weights, "float32", 2, "cpu").step()
        )
        assert sorted(images.shape) == [2, 3, 16, 16]
        assert 0 <= images.min() < images.max() <= 1


def test_memory_is_the_peak_of_a_step() -> None:
    size = 64 * 2**20

    def step() -> None:
        torch.ones(size // 4)  # freed before the end of the step
        torch.ones(size // 64)

    assert contestants._memory_of(step, "cpu") == pytest.approx(size, rel=0.1)


class Stub:
    """A side with a known speed."""

    def __init__(self, log: list, name: str, seconds: float) -> None:
        self.log, self.name, self.seconds = log, name, seconds

    def run(self, steps: int) -> float:
        self.log.append((self.name, steps))
        return steps * self.seconds


def test_sides_alternate() -> None:
    log: list = []
    pair = {name: Stub(log, name, s) for name, s in (("a", 0.1), ("b", 0.25))}
    assert time_alternately(pair, 3, 60) == {"a": [0.1] * 3, "b": [0.25] * 3}
    # Two steps of the slower side last half a second; the first side changes in every round.
    assert log == [("a", 1), ("b", 1), *[(name, 2) for name in "abbaab"]]
    assert len(time_alternately(pair, 9, seconds=0)["a"]) == 3
    assert len(time_alternately(pair, 2, seconds=0, steps=1)["a"]) == 2


def test_ratio_above_1_means_that_ours_is_better() -> None:
    ours, peer = [0.1, 0.2, 0.4, 0.2], [0.2, 0.2, 0.4, 0.6]  # ratios 2, 1, 1, 3
    row = report.row("train/x/float32", "cpu", "images/s", ours, peer, "p", flops=1e9, peak=1e10)
    assert row.keys() >= KEYS
    assert (row["ours"], row["peer"], row["ratio"]) == (5, 3.333, 1.5)
    assert row["spread"] == pytest.approx((2.25 - 1) / 1.5, rel=1e-3)
    assert (row["gflops"], row["share"]) == (5, 0.5)
    row = report.row("sample/x/float32", "cpu", "ms", [0.1], [0.14], "p")
    assert (row["ours"], row["peer"], row["ratio"], row["spread"]) == (100, 140, 1.4, 0)
    assert "gflops" not in row and "share" not in row
    assert report.row("memory/x/float32", "cpu", "MB", [8e7], [1e8], "p")["ratio"] == 1.25


SECONDS = {
    "ours": 0.5, "ours compiled": 0.4, "diffusers contiguous": 0.8,
    "diffusers channels_last": 0.6, "diffusers compiled": 0.6, "bare loop": 0.49, "network": 1.0,
    "torchvision": 1.0,
}  # fmt: skip


class Stubbed(command.Bench):
    """A benchmark whose sides have known speeds and run out of memory for large batches."""

    def peak(self, dtype: str) -> None:
        self.peaks[dtype] = 1e11

    def weights(self, config: str) -> Path:
        return self.folder

    def measure(self, make, names, arguments, rounds=9, seconds=30, steps=None):
        if arguments.get("batch") == 64 and make == contestants.train:
            names = ["ours"]
        if arguments.get("batch") == 512 and make == contestants.sample:
            raise OutOfMemory("ours")
        times = {name: [SECONDS[name]] * 3 for name in names}
        facts = {"flops": FLOPS} | ({"memory": MEMORY} if make == contestants.train else {})
        return times, dict.fromkeys(names, facts)


def stubbed(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *only: str
) -> tuple[list, Sequence[str]]:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(contestants, "make_photos", lambda folder: 64)
    bench = Stubbed(device, 2, tmp_path, only)
    return bench.run_all(), bench.skipped


def test_rows_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "emulates_bfloat16", lambda: True)
    rows, skipped = stubbed("cpu", tmp_path, monkeypatch)
    assert not skipped
    assert all(row.keys() >= KEYS and row["device"] == "cpu" for row in rows)
    found = {(row["name"], row["peer_name"]): row for row in rows}
    assert len(found) == len(rows)
    eager = found["train/faces/float32", "diffusers eager"]
    assert eager["note"] == "channels_last"  # the faster layout
    assert (eager["ours"], eager["ratio"]) == (32, 1.2)
    assert eager["gflops"] == 3 * FLOPS * 32 / 1e9
    compiled = found["train/faces/float32", "diffusers compiled"]
    assert (compiled["ours"], compiled["ratio"]) == (40, 1.5)
    assert compiled["note"].endswith("without it: 1.20")
    assert found["memory/64/float32", "diffusers eager"]["ours"] == 110
    sampled = found["sample/faces/float32", "diffusers eager"]
    assert (sampled["ours"], sampled["gflops"]) == (50, 16 * FLOPS / 1e9 / 0.05)
    assert not [name for name, _ in found if name.endswith("bf16")]  # bfloat16 would be emulated
    assert found["framework/faces", "bare loop"]["ratio"] == 0.98
    assert found["loader/jpeg", "torchvision ImageFolder"]["ours"] == 64  # per core


def test_rows_of_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rows, _ = stubbed("cuda", tmp_path, monkeypatch, "train", "sample")
    assert {row["device"] for row in rows} == {"some GPU"}
    found = {(row["name"], row["peer_name"]): row for row in rows}
    # The peers need half of the batch size; the note has the result of ours at the full size.
    row = found["train/256/bf16", "diffusers compiled"]
    assert row["batch"] == 32
    assert (
        "batch 64: the peer is out of memory, ours takes 7.81 ms an image and 110 MB"
        in (row["note"])
    )
    assert found["sample/faces/bf16", "diffusers eager"]["batch"] == 256
    printed = capsys.readouterr().out
    assert "train/256/bf16: 128 of 300 a second (ours, batch 64)" in printed
    assert "sample/256/bf16: 1600 of 900 a second (ours compiled, batch 64)" in printed


def test_measurements_beyond_the_time_limit_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Stubbed("cpu", 2, tmp_path, ["guided"], minutes=0)
    assert bench.run_all() == []
    assert bench.skipped == ["guided/faces/float32", "guided/64/float32"]


def test_new_rows_replace_old_rows_of_the_same_measurement() -> None:
    def rows(device: str, *names: str) -> list:
        return [report.row(n, device, "ms", [1.0], [2.0], "p", machine=device) for n in names]

    old = [*rows("cpu", "a", "b"), *rows("gpu", "a")]
    new = rows("cpu", "b")
    assert report.merge(old, new, everything=False) == [*rows("cpu", "a"), *rows("gpu", "a"), *new]
    assert report.merge(old, new, everything=True) == [*rows("gpu", "a"), *new]


def test_shares_are_relative_to_the_newest_peak() -> None:
    old = [
        report.row("train/a/float32", "cpu", "images/s", [1.0], [1.0], "b", flops=6e9, peak=5e9)
    ]
    peak = [report.row("peak/float32", "cpu", "GFLOP/s", [1 / 8e9], [1 / 7e9], "matmul")]
    assert "share" not in old[0]  # above 1: fewer operations are executed than counted
    assert report.merge(old, peak, everything=False)[0]["share"] == 0.75
    assert "share" not in report.merge([*old, *peak], [_slow_peak()], everything=False)[0]


def _slow_peak() -> dict:
    return report.row("peak/float32", "cpu", "GFLOP/s", [1 / 5e9], [1 / 4e9], "matmul")


def test_cpu_with_bfloat16_support_has_bf16_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "emulates_bfloat16", lambda: False)
    rows, _ = stubbed("cpu", tmp_path, monkeypatch)
    names = {row["name"] for row in rows}
    assert {f"{k}/{c}/bf16" for k in ("train", "sample") for c in ("faces", "64")} <= names


def test_page_shows_the_values_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = stubbed("cpu", tmp_path, monkeypatch)
    blocks: dict[str, str] = {}

    def keep(name: str, text: str, page: Path = machine.README) -> None:
        blocks[page.name] = text

    monkeypatch.setattr(command, "write_block", keep)
    command.write(rows, True, tmp_path)
    assert json.loads((tmp_path / "latest.json").read_text()) == rows
    page = (tmp_path / "speed.md").read_text()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines()]
    read = [c for c in cells if len(c) == 10][2:]  # without the header
    assert [(c[0], c[4], c[3], c[9]) for c in read] == [
        (r["name"], r["peer_name"], r["unit"], r.get("note", "")) for r in rows
    ]
    for c, row in zip(read, rows, strict=True):
        values = [float(text.replace(",", "")) for text in (c[1], c[2], c[5])]
        assert values == pytest.approx([row["ours"], row["peer"], row["ratio"]], rel=6e-3)
    assert rows[0]["machine"] in page and command.METHOD in page
    row = r"^\| training step, faces, float32 \|.*\| ([\d.]+) \|$"
    shown = re.findall(row, blocks["speed.md"], flags=re.M)
    assert shown == ["1.20", "1.50"]
    assert blocks["README.md"].count("| training step") == 1


def test_pages_show_the_newest_rows() -> None:
    path = machine.RESULTS / "latest.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    assert all(row.keys() >= KEYS for row in rows)
    assert all(row.get("share", 0) <= 1 for row in rows)
    assert not [row for row in rows if "emulated" in row.get("note", "")]
    assert machine.read_block("speed") == report.summary(rows)
    assert machine.read_block("speed", machine.ROOT / "docs" / "speed.md") == report.page(rows)


@pytest.mark.slow
def test_benchmark_runs_with_a_tiny_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    found: list = []
    run_all = command.Bench.run_all

    monkeypatch.setattr(command.Bench, "run_all", lambda b: found.extend(run_all(b)) or found)
    monkeypatch.setattr(command, "write", lambda *_, **__: pytest.fail("--quick writes nothing"))
    command.main(["--quick", "--device", "cpu", "--threads", "1"])
    names = [row["name"].split("/")[0] for row in found]
    assert names == [
        "peak", "train", "memory", "sample", "guided", "framework", "loader", "features",
    ]  # fmt: skip
    assert all(row.keys() >= KEYS and row["ratio"] > 0 for row in found)
    assert median(row["rounds"] for row in found) == 1
