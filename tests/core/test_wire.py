"""What travels: terms down, updates up, each read as it was written."""

from typing import Any

import numpy as np
import pytest
import torch
from flower_messages import (
    batch_norm_model,
    honest_reply,
    random_update,
    same_bits,
    sent_arrays,
    to_numpy,
    to_record,
    train_message,
)
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fl_bgmd.compression import build_compressor
from fl_bgmd.layout import BUFFER_DTYPE, ModelLayout
from fl_bgmd.replies import screen
from fl_bgmd.wire import (
    MODEL_RECORD,
    PACKED_KEY,
    PACKED_RECORD,
    Terms,
    TrainedReply,
    pack_model,
    packed_keys,
    packed_with,
)

ALL = Terms(round=7, seed=2**32 - 1, compressor="qsgd:7", error_feedback=False, compression_seed=5)


@pytest.mark.parametrize(
    ("terms", "config"),
    [
        (Terms(), {"server-round": 0}),
        (Terms(round=3, seed=9), {"server-round": 3, "round-seed": 9}),
        (
            Terms(round=1, compressor="sign"),
            {"server-round": 1, "compressor": "sign", "error-feedback": True},
        ),
        (
            ALL,
            {
                "server-round": 7,
                "round-seed": 2**32 - 1,
                "compressor": "qsgd:7",
                "error-feedback": False,
                "compression-seed": 5,
            },
        ),
    ],
)
def test_terms_are_read_as_they_were_written(terms: Terms, config: dict[str, Any]) -> None:
    written = ConfigRecord({"epochs": 3})
    terms.to_config(written)
    assert dict(written) == {"epochs": 3, **config}
    assert Terms.from_config(written) == terms
    assert Terms.of(RecordDict({"whatever": written})) == terms


def test_messages_of_other_strategies_have_no_terms() -> None:
    assert Terms.of(RecordDict()) == Terms()
    assert Terms.of(RecordDict({"config": ConfigRecord({"lr": 0.1})})) == Terms()
    assert Terms().packing() is None


@pytest.mark.parametrize("first", ["config", MODEL_RECORD])
def test_the_compressor_of_the_model_is_not_that_of_the_updates(first: str) -> None:
    compressor = build_compressor("qsgd:100")
    records = pack_model(batch_norm_model(), compressor, 0)[0]
    config = ConfigRecord()
    Terms(round=2).to_config(config)
    both = {"config": config, MODEL_RECORD: records[MODEL_RECORD]}
    content = RecordDict({first: both.pop(first), **both})
    assert Terms.of(content) == Terms(round=2)
    assert Terms.of(content).packing() is None


def test_the_servers_seed_reaches_the_compressor() -> None:
    terms = Terms(compressor="rand-k:0.5", compression_seed=3)
    shared, own = terms.packing(), terms.packing(build_compressor("scaled-rand-k:0.2"))
    assert shared == build_compressor("rand-k:0.5").for_round(3)
    assert own == build_compressor("scaled-rand-k:0.2").for_round(3)
    assert Terms(compressor="qsgd", compression_seed=3).packing() == build_compressor("qsgd")


# ------------------------------------------------------------------------------------ updates


def reply_to(message: Message, name: str | None) -> Message:
    """Return an honest reply, its arrays in another order than sent, packed if there is a name."""
    model = sent_arrays(message)
    reply = honest_reply(message, random_update(model, 0, 0.1))
    arrays = sent_arrays(reply)
    reply.content["arrays"] = ArrayRecord({key: arrays[key] for key in reversed(list(arrays))})
    if name is not None:
        compressor, layout = build_compressor(name), ModelLayout(model)
        trained = TrainedReply.read(reply.content, layout, None)
        data = compressor.for_shapes(layout.shapes).encode(trained.update)
        trained.pack(data, compressor, 1.5)
    return reply


def screened(reply: Message, layout: ModelLayout, name: str | None) -> tuple[Any, Any, Any]:
    row = np.empty(layout.num_directions, layout.dtype)
    buffers = np.empty(layout.num_buffers, BUFFER_DTYPE)
    compressor = None if name is None else build_compressor(name)
    return screen(reply, layout, row, buffers, compressor=compressor), row, buffers


@pytest.mark.parametrize("name", [None, "qsgd:7", "low-rank:1", "top-k:0.5", "none"])
def test_a_reply_is_read_as_the_server_reads_it_and_replaced_once(name: str | None) -> None:
    message = train_message(batch_norm_model())
    layout = ModelLayout(sent_arrays(message))
    reply = reply_to(message, name)
    assert packed_with(reply.content) == (None if name is None else build_compressor(name).name)
    if name is not None:
        buffers = [spec.key for spec in layout.buffers]
        assert list(sent_arrays(reply)) == packed_keys(layout) == [PACKED_KEY, *buffers]
    found, row, buffers = screened(reply, layout, name)
    assert found.reason is None
    compressor = None if name is None else build_compressor(name)
    trained = TrainedReply.read(reply.content, layout, compressor)
    assert torch.equal(trained.update, torch.from_numpy(row))
    assert np.array_equal(trained.model.buffer_values, buffers)
    lie = -3 * trained.update
    trained.replace(lie)
    assert list(sent_arrays(reply)) == layout.keys
    assert PACKED_RECORD not in reply.content
    found, row, kept = screened(reply, layout, name)
    assert found.reason is None
    np.testing.assert_allclose(row, lie.numpy(), atol=1e-5)
    assert np.array_equal(kept, buffers)


def test_a_replaced_update_keeps_the_dtypes_of_the_reply() -> None:
    message = train_message(batch_norm_model())
    layout = ModelLayout(sent_arrays(message))
    reply = honest_reply(message, random_update(sent_arrays(message), 0))
    wide = {
        key: value.astype(np.float64) if value.dtype == np.float32 else value
        for key, value in to_numpy(sent_arrays(reply)).items()
    }
    reply.content["arrays"] = before = to_record(wide)
    trained = TrainedReply.read(reply.content, layout, None)
    trained.replace(trained.update)
    after = sent_arrays(reply)
    assert [array.dtype for array in after.values()] == [array.dtype for array in before.values()]
    assert not same_bits(after, sent_arrays(message))


def test_what_a_server_scales_is_replaced_by_what_it_scales_to_the_lie() -> None:
    message = train_message(batch_norm_model())
    layout = ModelLayout(sent_arrays(message))
    compressor = build_compressor("scaled-rand-k:0.25").for_round(1)
    reply = honest_reply(message, random_update(sent_arrays(message), 0))
    trained = TrainedReply.read(reply.content, layout, compressor)
    lie = torch.full((layout.num_directions,), 2.0)
    trained.replace(lie)
    coordinates = compressor.coordinates(layout.num_directions)
    assert coordinates is not None
    row = np.empty(len(coordinates), layout.dtype)
    buffers = np.empty(layout.num_buffers, BUFFER_DTYPE)
    given: dict[str, Any] = {"compressor": compressor, "coordinates": coordinates}
    assert screen(reply, layout, row, buffers, **given).reason is None
    np.testing.assert_allclose(row, lie[: len(row)].numpy(), rtol=1e-4)
