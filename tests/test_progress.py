"""Plain lines of progress, as files and continuous integration see them."""

from t2i_align.progress import Progress


def test_a_line_tells_the_rate_of_whole_batches(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("t2i_align.progress.time.monotonic", lambda: now[0])
    with Progress(12, "drawing", batch=4) as progress:
        for _ in range(3):
            now[0] += 20.0  # four are made in 20 s, then counted one by one
            for _ in range(4):
                progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "drawing: 4/12, 0.2/s, 0.7 min left"
    assert lines[-1] == "drawing: 12/12, 0.2/s, 0.0 min left"
    assert len(lines) == 3


def test_a_resumed_job_counts_what_it_does_itself(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("t2i_align.progress.time.monotonic", lambda: now[0])
    with Progress(10, "scoring", start=6) as progress:
        now[0] += 30.0
        progress.advance(3, invalid=1)
    assert capsys.readouterr().err == "scoring: 9/10, 0.1/s, 0.2 min left, invalid 1\n"


def test_a_process_that_is_not_shown_says_nothing(capsys):
    with Progress(1, "scoring", shown=False) as progress:
        progress.advance()
    assert capsys.readouterr().err == ""
