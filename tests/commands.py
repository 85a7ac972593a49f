"""Commands as a user types them, in the process of the test."""

import contextlib
import io
import sys
import warnings

import pytest

from medssl import cli


def run_command(*arguments: object) -> tuple[int, str]:
    """Run a command; return its exit code and what it printed. A traceback is an error."""
    said, code = io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        patch.setattr(sys, "argv", ["medssl", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    assert isinstance(code, int), code
    return code, said.getvalue()
