"""Machine description and generated sections of the pages."""

__all__ = ["README", "RESULTS", "ROOT", "cpu_name", "read_block", "versions", "write_block"]

import platform
import re
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """Returns the processor's name, or its architecture if the name is unknown."""
    text = CPUINFO.read_text() if CPUINFO.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.M)
    return found[1].strip() if found else platform.machine()


def versions(*packages: str) -> str:
    """Returns packages and their versions: "torch 2.14.1, diffusers 0.42.1"."""
    return ", ".join(f"{package} {version(package)}" for package in packages)


def _block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}:begin -->\n)(.*?)(<!-- {name}:end -->)", flags=re.S)


def read_block(name: str, page: Path = README) -> str:
    """Returns the text between <!-- name:begin --> and <!-- name:end --> on a page."""
    found = _block(name).search(page.read_text())
    if found is None:
        raise ValueError(f"{page} has no section <!-- {name}:begin -->")
    return found[2]


def write_block(name: str, text: str, page: Path = README) -> None:
    """Replaces the text between <!-- name:begin --> and <!-- name:end --> on a page."""
    page.write_text(_block(name).sub(lambda m: m[1] + text + m[3], page.read_text()))
