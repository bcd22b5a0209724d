"""The list of planted bugs: its texts and tests exist; all of them are detected (slow)."""

import os

import mutants
import pytest
from mutants import LIST, ROOT, Mutant


def test_every_planted_bug_replaces_one_text_and_names_existing_tests() -> None:
    listed = mutants.read()
    assert len(listed) >= 60 and len({(m.file, m.old) for m in listed}) == len(listed)
    texts = {m.file: (ROOT / m.file).read_text() for m in listed}
    for mutant in listed:
        assert texts[mutant.file].count(mutant.old) == 1 and mutant.old != mutant.new, mutant
        for name in mutant.tests.split():
            file, _, test = name.partition("::")
            assert f"def {test}" in (ROOT / file).read_text(), mutant


def test_bug_is_planted_in_the_copy_only(tmp_path) -> None:
    (tmp_path / "a.py").write_text("x = 1\ny = 1\n")
    Mutant("a.py", "x = 1", "x = 2", "").apply(tmp_path)
    assert (tmp_path / "a.py").read_text() == "x = 2\ny = 1\n"
    for old, new in (("= 2", "= 2"), ("=", "<"), ("z", "x")):
        with pytest.raises(ValueError, match="must occur once"):
            Mutant("a.py", old, new, "").apply(tmp_path)


@pytest.mark.slow
def test_all_planted_bugs_are_detected() -> None:
    """A bug that is detected is not reported, and one that changes nothing is."""
    harmless = Mutant(
        "diffusion_lab/pixels.py", "x = x.detach()", "x = x.detach().detach()",
        "tests/report/test_image_grid.py::test_levels_are_rounded_not_truncated",
    )  # fmt: skip
    assert LIST.exists()
    survivors = mutants.run([harmless, *mutants.read()], len(os.sched_getaffinity(0)))
    assert survivors == [f"survived: {harmless}"]
