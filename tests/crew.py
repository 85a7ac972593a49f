"""The processes of one command, as torchrun starts them."""

import contextlib
import os
import signal
import socket
from pathlib import Path

import processes


class Crew:
    """So many processes of one command in a folder, which are ended with the block.

    Each writes what it says to crew_<rank>.txt.
    """

    def __init__(self, count, *arguments, cwd):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.logs = [Path(cwd) / f"crew_{rank}.txt" for rank in range(count)]
        self.members = []
        for rank, log in enumerate(self.logs):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
            places |= {"LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = {**os.environ, **{key: str(value) for key, value in places.items()}}
            with log.open("w") as file:
                told = {"stdout": file, "stderr": file}
                self.members.append(processes.Process(*arguments, cwd=cwd, env=env, **told))

    def wait(self, timeout=120):
        """Return the exit codes."""
        return [member.wait(timeout) for member in self.members]

    def read(self):
        """Return what each has said."""
        return [log.read_text() for log in self.logs]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for member in self.members:
            with contextlib.suppress(ProcessLookupError):
                member.send_signal(signal.SIGKILL)
