"""Workers are made by a process that has imported everything, and see what this one sees."""

import os
import sys

import pytest

from simulations.processes import workers
from simulations.runner import pool


def test_workers_have_this_process_environment_folder_and_path_of_the_moment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for value in ("one", "another"):
        folder = tmp_path_factory.mktemp(value)
        (folder / f"module_{value}.py").write_text(f"def told():\n    return {value!r}\n")
        monkeypatch.setenv("SAID_TO_WORKERS", value)
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(folder)
        with pool(1) as executor:
            assert executor.submit(os.getenv, "SAID_TO_WORKERS").result() == value
            assert executor.submit(os.getcwd).result() == str(folder)
            told = __import__(f"module_{value}").told
            assert executor.submit(told).result() == value
    monkeypatch.delenv("SAID_TO_WORKERS")
    with pool(1) as executor:
        assert executor.submit(os.getenv, "SAID_TO_WORKERS").result() is None


@pytest.mark.skipif(
    workers().get_start_method() != "forkserver", reason="this system has no fork server"
)
def test_workers_have_imported_torch_before_they_are_made() -> None:
    context = workers()
    here, there = context.Pipe()
    # Of a function that needs nothing: what is there was there before.
    process = context.Process(target=_tell, args=(there,))
    process.start()
    assert here.recv() is True
    process.join()


def _tell(channel: object) -> None:
    channel.send("torch" in sys.modules)  # type: ignore[attr-defined]
