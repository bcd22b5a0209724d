"""Rows of the speed tables: computed from measured costs, stored as JSON, shown as Markdown.

A cost is a measurement of one round: seconds per image or step, or bytes. The ratio is the median
over the rounds of the peer's cost divided by ours, above 1 if ours is better; its spread is the
interquartile range divided by the median.
"""

__all__ = ["Row", "merge", "page", "report", "row", "spread", "summary", "table"]

from collections.abc import Iterable, Sequence
from statistics import median, quantiles
from typing import Any

Row = dict[str, Any]

# Conversion of a cost to the unit of the table; a rate is the inverse of a cost.
UNITS = {
    "images/s": lambda cost: 1 / cost,
    "images/s a core": lambda cost: 1 / cost,
    "GFLOP/s": lambda cost: 1e-9 / cost,
    "ms": lambda cost: 1e3 * cost,
    "MB": lambda cost: 1e-6 * cost,
}
HEAD = (
    "| | ours | peer | | peer is | ratio | spread | ours, GFLOP/s | of the peak | |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)
TELLING = ("train", "sample", "guided", "memory", "loader", "framework")  # of the README
WHAT = {
    "train": "training step", "sample": "sampling step", "guided": "guided step, with a VJP",
    "memory": "memory of a training step", "loader": "JPEG files to tensors",
    "framework": "`python train.py`",
}  # fmt: skip


def spread(values: Sequence[float]) -> float:
    """The interquartile range over the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def row(
    name: str, device: str, unit: str, ours: Sequence[float], peer: Sequence[float],
    peer_name: str, **more: Any,
) -> Row:  # fmt: skip
    """Makes a row of both sides' costs.

    Arguments:
        name: What was measured, "train/faces/float32".
        device: "cpu" or the GPU's name.
        unit: A key of UNITS.
        ours: Our cost in each round: seconds an image for "images/s", seconds for "ms", bytes.
        peer: The peer's in the same rounds.
        peer_name: The name of the peer.
        more: Further keys: machine, note, flops (of a unit), peak (in FLOP/s).
    """
    flops, peak = more.pop("flops", None), more.pop("peak", None)
    ratios = [theirs / mine for mine, theirs in zip(ours, peer, strict=True)]
    if flops:
        rate = flops / median(ours)
        more |= {"gflops": _round(rate / 1e9), "share": _share(rate, peak)}
    shown = UNITS[unit]
    return {
        "name": name,
        "device": device,
        "ours": _round(shown(median(ours))),
        "peer": _round(shown(median(peer))),
        "peer_name": peer_name,
        "unit": unit,
        "ratio": _round(median(ratios)),
        "spread": _round(spread(ratios)),
        "rounds": len(ratios),
        **{key: value for key, value in more.items() if value not in (None, "")},
    }


def _share(rate: float, peak: float) -> float | None:
    """The share of the peak; None above 1, where fewer operations are done than are counted."""
    share = _round(rate / peak)
    return share if share <= 1 else None


def _round(value: float) -> float:
    """Rounds to four significant digits."""
    return float(f"{value:.4g}")


def merge(old: Iterable[Row], new: Sequence[Row], everything: bool) -> list[Row]:
    """Returns earlier rows that remain valid, followed by new ones.

    Arguments:
        old: Rows of earlier measurements.
        new: Rows of this measurement.
        everything: Whether all rows of the device were measured, so that none of its old rows is
            kept. Otherwise only rows that were measured again are replaced.
    """
    devices = {each["device"] for each in new}
    again = {(each["name"], each["device"], each["peer_name"]) for each in new}
    kept = [
        each
        for each in old
        if (each["device"] not in devices if everything else _key(each) not in again)
    ]
    rows = [*kept, *new]
    peaks: dict[tuple[str, str], float] = {}
    for each in rows:
        kind, _, dtype = each["name"].partition("/")
        if kind == "peak":
            peaks[each["device"], dtype] = max(each["ours"], each["peer"])
    for each in rows:  # of the newest peak: the machine may have been busy before
        peak = peaks.get((each["device"], each["name"].rpartition("/")[2]))
        if "gflops" in each and peak:
            share = _share(each["gflops"], peak)
            each.pop("share", None)
            if share is not None:
                each["share"] = share
    return rows


def _key(each: Row) -> tuple[str, str, str]:
    return each["name"], each["device"], each["peer_name"]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: Iterable[Row]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [HEAD]
    for each in rows:
        gflops = _number(each["gflops"]) if "gflops" in each else ""
        share = f"{each['share']:.0%}" if "share" in each else ""
        lines.append(
            f"| {each['name']} | {_number(each['ours'])} | {_number(each['peer'])} "
            f"| {each['unit']} | {each['peer_name']} | {each['ratio']:.2f} | {each['spread']:.1%} "
            f"| {gflops} | {share} | {each.get('note', '')} |"
        )
    return "\n".join(lines)


def report(rows: Sequence[Row], method: str) -> str:
    """Returns the page of all rows: a table for each machine, and the method."""
    parts = []
    for machine in dict.fromkeys(each["machine"] for each in rows):
        own = [each for each in rows if each["machine"] == machine]
        parts += [f"### {own[0]['device']}", f"{machine}.", table(own)]
    return "\n\n".join([*parts, method]) + "\n"


def _shown(rows: Sequence[Row]) -> list[Row]:
    """The rows of the kinds in TELLING, in their order, of a GPU if there is one."""
    device = next((r["device"] for r in rows if r["device"] != "cpu"), "cpu")
    own = [r for r in rows if r["device"] == device and _kind(r) in TELLING]
    return sorted(own, key=lambda r: TELLING.index(_kind(r)))


def _kind(each: Row) -> str:
    return each["name"].split("/")[0]


def _short_table(rows: Sequence[Row]) -> str:
    lines = ["| | ours | peer | | peer is | ratio |", "|---|---|---|---|---|---|"]
    for each in rows:
        kind, *rest = each["name"].split("/")
        lines.append(
            f"| {WHAT[kind]}, {', '.join(rest)} | {_number(each['ours'])} "
            f"| {_number(each['peer'])} | {each['unit']} | {each['peer_name']} "
            f"| {each['ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _machines(rows: Sequence[Row]) -> str:
    return "; ".join(dict.fromkeys(each["machine"] for each in rows))


def page(rows: Sequence[Row]) -> str:
    """The table of docs/speed.md."""
    own = _shown(rows)
    return _short_table(own) + (
        "\nBoth sides have the same weights and inputs and run alternately; a ratio above 1 means "
        f"that ours is better. {_machines(own)}.\n"
    )


def summary(rows: Sequence[Row]) -> str:
    """The README's table: the first row of each kind."""
    own = {_kind(each): each for each in reversed(_shown(rows))}
    first = [own[kind] for kind in TELLING if kind in own]
    return _short_table(first) + (
        "\nBoth sides have the same weights and inputs and run alternately; a ratio above 1 means "
        f"that ours is better. {_machines(first)}. [All rows](docs/speed.md), [how they are "
        "measured](benchmarks/results/speed.md).\n"
    )
