import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: threads of theirs would wait for each other
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"


@pytest.fixture
def cli(capsys):
    """Run a command line in this process; returns (exit code, stdout, stderr)."""
    from t2i_align.cli.main import main

    def run(*words):
        with pytest.raises(SystemExit) as exit_info:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return exit_info.value.code, out, err

    return run
