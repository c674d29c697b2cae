import sys

import pytest


@pytest.fixture
def call(monkeypatch, capfd):
    """Run the command line; return its exit code and everything it printed."""
    from d2l import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["d2l", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code, "".join(capfd.readouterr())

    return run
