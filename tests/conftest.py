import pytest


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
