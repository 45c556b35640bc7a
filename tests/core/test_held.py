"""Arrays that are still values: the same as Flower's to everyone, and bytes once they travel."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import batch_norm_model, plain_model, reply_with, same_bits, train_message
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from fl_bgmd.held import HeldArray, answer, held, hold, is_held, num_bytes, tensors_of
from fl_bgmd.layout import BUFFER_DTYPE, ModelLayout
from fl_bgmd.replies import Rejection, screen


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "bool", "uint8"])
@pytest.mark.parametrize("shape", [(), (0, 3), (4, 3), (2,) * 20, (70_000,)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_held_array_is_the_one_that_flower_makes(dtype: str, shape: Any, order: Any) -> None:
    values = np.asarray(np.ones(shape, dtype), order=order)
    made, plain = HeldArray(values), Array(values)
    size = made.num_bytes
    assert made.__dict__["_bytes"] is None  # it knows without taking it
    assert size == num_bytes(plain) == len(made.data)
    assert made == plain
    assert plain == made
    assert np.array_equal(made.numpy(), values)


def test_of_the_values_everyone_has_their_own() -> None:
    made = HeldArray(np.zeros(3, np.float32))
    made.numpy()[:] = 1
    twin = copy.copy(made)
    assert twin.values is not None
    with pytest.raises(ValueError, match="read-only"):
        twin.values[:] = 1
    twin.shape = (1, 3)
    assert made.shape == (3,)
    assert np.array_equal(made.numpy(), np.zeros(3))


@pytest.mark.parametrize("name", ["dtype", "shape", "stype", "data"])
def test_an_array_that_somebody_changed_is_one_of_bytes(name: str) -> None:
    made = HeldArray(np.zeros(3, np.float32))
    before = made.data
    setattr(made, name, b"spoiled" if name == "data" else getattr(made, name))
    assert made.values is None
    assert made.data == (b"spoiled" if name == "data" else before)


def test_nothing_held_reaches_another_process() -> None:
    record = held(plain_model())
    assert is_held(record)
    for other in (pickle.loads(pickle.dumps(record)), copy.deepcopy(record)):
        assert {type(array) for array in other.values()} == {Array}
        assert same_bits(other, plain_model())
    assert {type(array) for array in ArrayRecord(dict(record)).values()} == {Array}


def test_an_answer_has_the_form_of_the_question() -> None:
    state = {key: torch.from_numpy(array.numpy()) for key, array in plain_model().items()}
    assert not is_held(answer(plain_model(), state))
    answered = answer(held(plain_model()), state)
    assert is_held(answered)
    assert same_bits(answered, plain_model())
    shared = tensors_of(answered)
    assert all(shared[key].data_ptr() == value.data_ptr() for key, value in state.items())


def test_a_layout_makes_arrays_in_the_form_of_its_model() -> None:
    for model in (batch_norm_model(), held(batch_norm_model())):
        layout = ModelLayout(model)
        made = layout.to_arrays(layout.values, layout.buffer_values)
        assert is_held(made) == is_held(model)
        assert same_bits(made, batch_norm_model())


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.ones((4, 3), np.float32), None),
        (np.asfortranarray(np.ones((4, 3), np.float32)), None),
        (np.ones((4, 3), np.float64), None),
        (np.ones((3, 4), np.float32), Rejection.SHAPE),
        (np.ones((4, 3), np.int32), Rejection.DTYPE),
        (np.ones((4, 3), ">f4"), Rejection.DTYPE),
        (np.full((4, 3), None), Rejection.DTYPE),
        (np.full((4, 3), np.nan, np.float32), Rejection.NON_FINITE),
    ],
)
def test_held_values_are_screened_like_bytes(values: NDArray[Any], reason: Any) -> None:
    message = train_message(plain_model())
    layout = ModelLayout(plain_model())
    bias = np.zeros(4, np.float32)
    row = np.empty(layout.num_directions, layout.dtype)
    reply = reply_with(message, hold({"weight": values, "bias": bias}))
    assert screen(reply, layout, row, np.empty(0, BUFFER_DTYPE)).reason == reason
    if reason is None:
        weight = plain_model()["weight"].numpy()
        assert np.array_equal(row[:12], (weight - values.astype(np.float32)).ravel())
