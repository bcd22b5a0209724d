"""What the benchmarks share: the machine that figures are of, and their place in the README."""

__all__ = ["RESULTS", "ROOT", "cpu_name", "versions", "write_block"]

import platform
import re
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The processor's name, or its architecture where no file tells."""
    text = CPUINFO.read_text() if CPUINFO.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.M)
    return found[1].strip() if found else platform.machine()


def versions(*packages: str) -> str:
    """Returns packages and their versions: "torch 2.14.1, diffusers 0.42.1"."""
    return ", ".join(f"{package} {version(package)}" for package in packages)


def write_block(name: str, text: str) -> None:
    """Puts a text between the README's marks of a name, <!-- name:begin --> and :end."""
    readme = ROOT / "README.md"
    marked = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
    page = re.sub(marked, lambda m: m[1] + text + m[2], readme.read_text(), flags=re.S)
    readme.write_text(page)
