from pathlib import Path

from megalemur.observe.progress import Progress


def test_the_file_holds_the_step_of_the_newest_checkpoint(tmp_path):
    path = tmp_path / "progress"
    standing = 40
    progress = Progress(path, lambda: standing)
    assert path.read_text() == "40\n"
    progress.at_save(60, Path("x"), 1.0)
    assert path.read_text() == "40\n"  # it may still fail
    standing = 60
    progress.at_end()
    assert path.read_text() == "60\n" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_does_not_stop_the_run(tmp_path, caplog):
    Progress(tmp_path / "absent/progress", lambda: 40).at_end()
    assert "could not be written" in caplog.text
