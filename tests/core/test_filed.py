"""Arrays in a file: Flower's own to everyone, on the wire too, and not in memory."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flower_messages import batch_norm_model, plain_model, same_bits
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fl_bgmd.checkpoints import Checkpoints
from fl_bgmd.filed import encoded, filed, folder_of
from fl_bgmd.held import is_held, num_bytes
from fl_bgmd.layout import ModelLayout
from fl_bgmd.mapped import NoRoomError
from fl_bgmd.replies import arrays_from_state, arrays_to_state


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "bool"])
@pytest.mark.parametrize("shape", [(), (0, 3), (4, 3), (1_500_000,)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_filed_array_is_the_one_that_flower_makes(
    dtype: str, shape: Any, order: Any, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    values = np.asarray((100 * draw.standard_normal(shape)).astype(dtype), order=order)
    given = ArrayRecord({"x": Array(values), "y": Array(values[..., None])})
    record = filed(given, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert folder_of(record) == tmp_path
    assert np.array_equal(record["x"].numpy(), values)
    plain = ArrayRecord({key: Array(a.numpy().copy(order="C")) for key, a in given.items()})
    for key, array in record.items():
        assert num_bytes(array) == len(plain[key].data)
        assert bytes(encoded(array)) == plain[key].data
        assert array == plain[key]
    # The same names on the wire, those of its chunks included.
    ours = get_all_nested_objects(RecordDict({"arrays": record}))
    theirs = get_all_nested_objects(RecordDict({"arrays": plain}))
    assert list(ours) == list(theirs)
    assert [o.deflate() for o in ours.values()] == [o.deflate() for o in theirs.values()]


def test_what_arrives_is_flowers_own(tmp_path: Path) -> None:
    content = RecordDict({"arrays": filed(plain_model(), tmp_path)})
    contents = {name: each.deflate() for name, each in get_all_nested_objects(content).items()}
    received = inflate_object_from_contents(content.object_id, contents)
    assert isinstance(received, RecordDict)
    assert {type(array) for array in received.array_records["arrays"].values()} == {Array}
    assert same_bits(received.array_records["arrays"], plain_model())


@pytest.mark.parametrize("name", ["dtype", "shape", "stype", "data"])
def test_an_array_that_somebody_changed_is_one_of_bytes(name: str, tmp_path: Path) -> None:
    record = filed(plain_model(), tmp_path)
    array = record["weight"]
    before, twin = array.data, copy.copy(array)
    setattr(array, name, b"spoiled" if name == "data" else getattr(array, name))
    assert folder_of(record) is None
    assert array.data == encoded(array) == (b"spoiled" if name == "data" else before)
    assert array.object_id == Array(array.dtype, array.shape, array.stype, array.data).object_id
    assert twin.data == before


def test_nothing_filed_reaches_another_process(tmp_path: Path) -> None:
    record = filed(plain_model(), tmp_path)
    for other in (pickle.loads(pickle.dumps(record)), copy.deepcopy(record)):
        assert {type(array) for array in other.values()} == {Array}
        assert same_bits(other, plain_model())
    assert {type(array) for array in ArrayRecord(dict(record)).values()} == {Array}


def test_a_layout_makes_filed_arrays_of_a_filed_model(tmp_path: Path) -> None:
    layout = ModelLayout(filed(batch_norm_model(), tmp_path))
    made = layout.to_arrays(layout.values, layout.buffer_values)
    assert is_held(made)
    assert folder_of(made) == tmp_path
    assert list(made) == list(batch_norm_model())
    assert same_bits(made, batch_norm_model())
    assert filed(made, tmp_path / "nowhere") is made


def test_a_checkpoint_of_a_filed_model_is_that_of_a_plain_one(tmp_path: Path) -> None:
    models = {"filed": filed(batch_norm_model(), tmp_path), "plain": batch_norm_model()}
    found = {}
    for name, model in models.items():
        checkpoints = Checkpoints(tmp_path / name)
        path = checkpoints.save(1, arrays_to_state(model), {})
        assert path is not None
        found[name] = path.name
        loaded = checkpoints.load({})
        assert loaded is not None
        assert same_bits(arrays_from_state(loaded[1]), batch_norm_model())
    assert found["filed"] == found["plain"]


def test_no_room_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NoRoomError, match="nowhere"):
        filed(plain_model(), tmp_path / "nowhere")


IN_SMALL_MEMORY = """
import sys, numpy as np
from pathlib import Path
from flwr.app import Array, ArrayRecord
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from benchmarks.measure import held_bytes
from benchmarks.scale import Peak
from fl_bgmd.checkpoints import Checkpoints
from fl_bgmd.filed import filed
from fl_bgmd.layout import ModelLayout
from fl_bgmd.replies import arrays_to_state

folder = Path(sys.argv[1])

def use(record):
    layout = ModelLayout(record)
    assert layout.holds(layout.values)
    made = layout.to_arrays(layout.values, layout.buffer_values)
    for each in get_all_nested_objects(made).values():
        each.deflate()
    Checkpoints(folder / "checkpoints").save(1, arrays_to_state(made), {})

small = ArrayRecord({"x": Array(np.zeros(10, np.float32))})
use(filed(small, folder))
model = [ArrayRecord({str(i): Array(np.zeros(2_500_000, np.float32)) for i in range(10)})]
record = filed(model.pop(), folder)
before = held_bytes("RssAnon")
with Peak() as peak:
    use(record)
print(peak.bytes - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory as Linux counts it")
def test_a_filed_model_is_laid_out_sent_made_anew_and_saved_without_a_copy(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", IN_SMALL_MEMORY, str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": str(2**20)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40e6  # of 100 MB
