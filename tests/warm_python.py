"""Python processes that find torch, numpy and flwr imported: three seconds less for each.

They are forked from one that has imported nothing else, and so know nothing of this project: for
tests of what an import brings with it. Another interpreter, flag or hash seed needs a new process.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

# Runs each code after the loop, as a new interpreter would: an exception or an exit is its own.
_SOURCE = """
import json, os, signal, sys, types
import flwr.app, flwr.clientapp, flwr.serverapp.strategy, numpy, pydantic, torch
for line in sys.stdin:
    task = json.loads(line)
    if isinstance(task, int):
        print(os.waitstatus_to_exitcode(os.waitpid(task, 0)[1]), flush=True)
        continue
    process = os.fork()
    if not process:
        break
    print(process, flush=True)
else:
    sys.exit()
os.setsid()
signal.signal(signal.SIGINT, signal.default_int_handler)
for number, name in enumerate((os.devnull, task["stdout"], task["stderr"])):
    os.dup2(os.open(name, os.O_RDWR), number)
sys.stdin = open(0)
os.environ.clear()
os.environ.update(task["env"])
os.chdir(task["cwd"])
sys.argv = ["-c", *task["arguments"]]
sys.modules["__main__"] = types.ModuleType("__main__")
exec(compile(task["code"], "<string>", "exec"), vars(sys.modules["__main__"]))
"""


@cache
def _first() -> "subprocess.Popen[str]":
    """Start the process that the others are forked from; it ends with this one."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, "-c", _SOURCE],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.communicate)
    return process


def _ask(task: object) -> int:
    first = _first()
    assert first.stdin is not None
    assert first.stdout is not None
    first.stdin.write(json.dumps(task) + "\n")
    first.stdin.flush()
    return int(first.stdout.readline())


class Started:
    """Code that runs as that of ``python -c`` does, after these imports, in a session of its own.

    ``env`` is all of its environment, without it this process's but for ``PYTHONPATH``.
    """

    def __init__(
        self,
        code: str,
        *arguments: str,
        folder: Path,
        cwd: Path | str = ".",
        env: Mapping[str, str] | None = None,
    ) -> None:
        if env is None:
            env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self._out, self._err = folder / "stdout", folder / "stderr"
        self._out.touch()
        self._err.touch()
        task = {"code": code, "arguments": arguments, "cwd": str(Path(cwd).resolve())}
        task |= {"env": dict(env), "stdout": str(self._out), "stderr": str(self._err)}
        self.pid = _ask(task)

    def wait(self) -> "subprocess.CompletedProcess[str]":
        """Return its status and what it wrote, once it has ended."""
        status = _ask(self.pid)
        return subprocess.CompletedProcess(
            ["-c"], status, self._out.read_text(), self._err.read_text()
        )


def run_code(
    code: str,
    *arguments: str,
    cwd: Path | str = ".",
    env: Mapping[str, str] | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Run code as ``python -c`` does, after these imports; return its status and what it wrote.

    ``env`` is all of its environment, without it this process's but for ``PYTHONPATH``.
    """
    with tempfile.TemporaryDirectory() as folder:
        return Started(code, *arguments, folder=Path(folder), cwd=cwd, env=env).wait()
