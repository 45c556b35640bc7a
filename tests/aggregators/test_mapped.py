"""Rows in a file: the bits of rows in memory, and no memory of the size of the matrix."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fl_bgmd import mapped
from fl_bgmd.aggregators import MIXINGS, RULES, build_rule
from fl_bgmd.mapped import NoRoomError, folder_of

SPECS = [
    *RULES,
    *(f"gmd+{mixing}" for mixing in MIXINGS),
    "bgmd:memory=per-client",
    "bgmd:memory=mean",
    "cmd+clipping+median-clipping+nearest-neighbor",
    "centered-clipping+centering+clipping",
]


def in_file(rows: Tensor, folder: Path) -> Tensor:
    """Return rows in a file."""
    there = mapped.mapped(tuple(rows.shape), rows.dtype, folder)
    return there.copy_(rows)


def bits(value: Any) -> Any:
    """Return a memory, whatever it is, as what can be compared."""
    if isinstance(value, Tensor):
        return value.tolist()
    return {k: bits(v) for k, v in vars(value).items()} if hasattr(value, "__dict__") else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_every_rule_gives_the_same_bits(
    spec: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "SMALL", 0)  # all that can be in a file is
    drawn = torch.Generator().manual_seed(0)
    memories: list[Any] = [None, None]
    lasts: list[Any] = [None, None]
    for number in range(2):
        rows = torch.randn(11, 1500, generator=drawn, dtype=torch.float64).to(dtype)
        rows[:3] *= 50
        if dtype == torch.float64 and number:
            rows[0] *= 1e160
        given = [rows.clone(), in_file(rows, tmp_path)]
        found = []
        for i, updates in enumerate(given):
            rule = build_rule(spec, generator=torch.Generator().manual_seed(number))
            found.append(
                rule(
                    updates,
                    memories[i],
                    nodes=[(node + number) % 12 for node in range(11)],
                    root=rows[5].float(),
                    last=lasts[i],
                    overwrite=True,
                )
            )
            memories[i], lasts[i] = found[-1].memory, found[-1].vector
        assert found[0].vector.tolist() == found[1].vector.tolist()
        assert bits(found[0].weights) == bits(found[1].weights)
        assert bits(found[0].memory) == bits(found[1].memory)
        assert given[0].double().tolist() == given[1].double().tolist()


def test_the_file_has_no_name_and_goes_with_its_last_view(tmp_path: Path) -> None:
    rows = mapped.mapped((3, 5), torch.float32, tmp_path)
    view = rows[1:].view(-1)[2:]
    assert list(tmp_path.iterdir()) == []
    assert folder_of(view) == tmp_path
    view.fill_(4.0)
    assert rows.sum() == 4.0 * 8
    known = len(mapped._folders)
    del rows
    assert view.sum() == 4.0 * 8
    del view
    assert len(mapped._folders) == known - 1
    assert folder_of(torch.zeros(3)) is None


def test_a_full_disk_and_a_folder_that_is_none_are_errors(tmp_path: Path) -> None:
    with pytest.raises(NoRoomError, match=rf"{tmp_path} has [\d,]+ bytes free and 4,[0,]+ are"):
        mapped.mapped((10**9, 10**9), torch.float32, tmp_path)
    with pytest.raises(NoRoomError, match=r"nowhere, where 4 bytes are needed: .*No such file"):
        mapped.mapped((1, 1), torch.float32, tmp_path / "nowhere")


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from fl_bgmd.aggregators import build_rule
from fl_bgmd.mapped import mapped

N, D, SHARE = 24, 500_000, 0.7
folder, specs = Path(sys.argv[1]), sys.argv[2:]
torch.set_num_threads(1)

def apply(spec, rows, rounds):
    rule, memory, last = build_rule(spec, generator=torch.Generator().manual_seed(1)), None, None
    nodes = list(range(len(rows)))
    for _ in range(rounds):
        root = rows[7].clone()
        result = rule(rows, memory, nodes=nodes, root=root, last=last, overwrite=True)
        memory, last = result.memory, result.vector

def used():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmData"].split()[0]) * 1024

rows = mapped((N, D), torch.float32, folder)
generator = torch.Generator().manual_seed(0)
for row in rows:
    row.copy_(torch.randn(D, generator=generator))
small = rows[:, :3000].clone()
for spec in specs:  # pools, libraries
    apply(spec, small.clone(), 1)
size = N * D * 4
resource.setrlimit(resource.RLIMIT_DATA, (used() + int(SHARE * size), -1))
try:
    rows + 1
    print("no limit")
except RuntimeError:
    pass
for spec in specs:
    try:
        apply(spec, rows, 2)
    except (RuntimeError, MemoryError) as error:
        print(spec, "-", str(error)[:200].replace(chr(10), " "))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory limits of Linux")
def test_no_rule_holds_a_second_matrix_in_memory(tmp_path: Path) -> None:
    """Beyond what is loaded there is room for 0.7 of the matrix: seven blocks, or 16 vectors."""
    specs = [spec for spec in SPECS if spec not in ("smea",)]
    code = [sys.executable, "-c", LIMITED, str(tmp_path), *specs]
    # Freed blocks go back at once: what is held is what is used.
    own = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(code, capture_output=True, text=True, check=False, env=own)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == []
