"""Mutation testing: planted bugs that the quick tests must detect.

Each entry of `mutants.yaml` replaces one text of one file of the package. It is applied to a copy
of the package, where the tests that are named in the entry must fail. The list is run by
`make mutants` and by a slow test.

Each run is a child process of one that has imported the libraries, which takes a second instead
of ten.
"""

__all__ = ["LIST", "ROOT", "Mutant", "read", "run"]

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_name("mutants.yaml")
COPIED = ["diffusion_lab", "conf", "tests", "docs", "pyproject.toml"]  # that tests need
TIMEOUT = 300  # seconds; a mutant may loop forever
PASSED, FAILED, UNKNOWN = 0, 1, 3  # exit codes of pytest; others mean that no test ran


@dataclass(frozen=True)
class Mutant:
    """A planted bug.

    Attributes:
        file: The file, relative to the repository.
        old: The text that is replaced; it must occur once.
        new: Its replacement.
        tests: The tests that must fail, as arguments of pytest.
    """

    file: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        return f"{self.file}: {self.old.strip()!r} -> {self.new.strip()!r} ({self.tests})"

    def apply(self, root: Path) -> None:
        """Plants the bug in a copy of the repository.

        Raises:
            ValueError: If the text does not occur exactly once, or does not change.
        """
        path = root / self.file
        text = path.read_text()
        count = text.count(self.old)
        if count != 1 or self.old == self.new:
            raise ValueError(f"{self}: the text occurs {count} times, but it must occur once")
        path.write_text(text.replace(self.old, self.new))


def read(path: Path = LIST) -> list[Mutant]:
    """Returns the planted bugs of a list."""
    content = yaml.safe_load(path.read_text())
    return [Mutant(file, **entry) for file, entries in content.items() for entry in entries]


def _import_libraries() -> None:
    """Imports what most tests need, except for the package itself."""
    import diffusers  # noqa: F401
    import hydra  # noqa: F401
    import lightning  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import torchmetrics  # noqa: F401


def _copy(mutant: Mutant) -> Path:
    """Copies the package and its tests to a temporary directory and plants the bug there."""
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    for name in COPIED:
        source, to = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__", "_build"))
        else:
            shutil.copy(source, to)
    mutant.apply(folder)
    return folder


def _test(mutant: Mutant, folder: Path) -> int:
    """Runs the tests of a mutant in this process and returns the exit code of pytest."""
    import pytest

    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p) not in (ROOT, ROOT / "tests"))]
    sys.dont_write_bytecode = True
    signal.alarm(TIMEOUT)
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", "--no-header"]
    return int(pytest.main([*arguments, *mutant.tests.split()]))


def run(mutants: Iterable[Mutant], processes: int = 1) -> list[str]:
    """Returns a line for each mutant that the tests do not detect.

    Arguments:
        mutants: The planted bugs.
        processes: The number of mutants that are tested at once.
    """
    _import_libraries()
    waiting, running, survivors = list(mutants), dict[int, tuple[Mutant, Path]](), list[str]()
    sys.stdout.flush()
    while waiting or running:
        if waiting and len(running) < processes:
            mutant = waiting.pop(0)
            folder = _copy(mutant)
            pid = os.fork()
            if pid == 0:
                code = UNKNOWN
                try:
                    code = _test(mutant, folder)
                finally:
                    os._exit(code)
            running[pid] = mutant, folder
            continue
        pid, status = os.wait()
        mutant, folder = running.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        if code == PASSED:
            survivors.append(f"survived: {mutant}")
        elif code not in (FAILED, -signal.SIGALRM):
            output = folder / "output.txt"
            text = output.read_text()[-2000:] if output.exists() else ""
            survivors.append(f"not tested, exit code {code}: {mutant}\n{text}")
        shutil.rmtree(folder)
        print("." if code in (FAILED, -signal.SIGALRM) else "S", end="", flush=True)
    print()
    return survivors


def main() -> None:
    """Runs the list, or the entries whose file or tests contain the given texts."""
    chosen = [m for m in read() if all(text in str(m) for text in sys.argv[1:])]
    survivors = run(chosen, processes=len(os.sched_getaffinity(0)))
    print(*survivors, f"{len(chosen)} mutants, {len(survivors)} not detected", sep="\n")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
