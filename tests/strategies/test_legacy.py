"""The strategies in apps of Flower's older API: same results, same screening, hostile replies."""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fl_bgmd.strategies.legacy import BGMD, GMD, QBGMD, LegacyStrategy
from flower_messages import (
    DIMENSIONS,
    TRUE_WEIGHTS,
    UNPICKLED,
    batch_norm_model,
    honest_reply,
    needed,
    npy_of_shape,
    pickled_objects,
    plain_model,
    random_update,
    sent_arrays,
    to_numpy,
    train_message,
)
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client import Client, NumPyClient
from flwr.client.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp import ClientApp
from flwr.common import (
    Code,
    EvaluateRes,
    FitRes,
    Parameters,
    Status,
    ndarray_to_bytes,
    ndarrays_to_parameters,
)
from flwr.server import ServerAppComponents, ServerConfig, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)
from flwr.serverapp import ServerApp
from warm_python import run_code

import fl_bgmd.strategies
from fl_bgmd.mods import ByzantineMod, CompressionMod
from fl_bgmd.replies import Rejection
from fl_bgmd.strategies import legacy
from fl_bgmd.wire import PACKED_KEY
from simulations.grid import InProcessGrid

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(set(legacy.__all__) - {"LegacyStrategy"})
OK = Status(Code.OK, "")
N = 10


class Proxy(ClientProxy):
    """A client of a given name; the tests bring its replies themselves."""

    def _never(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("not called")

    get_properties = get_parameters = fit = evaluate = reconnect = _never


PROXIES = [Proxy(str(node)) for node in range(1, N + 1)]


def manager(proxies: list[Proxy] = PROXIES) -> SimpleClientManager:
    """Return a client manager that knows the proxies."""
    made = SimpleClientManager()
    for proxy in proxies:
        made.register(proxy)
    return made


def to_parameters(record: ArrayRecord) -> Parameters:
    """Return a model as the older API carries it: bytes, no names, no shapes."""
    return Parameters([array.data for array in record.values()], "numpy.ndarray")


def trained(
    model: ArrayRecord, seed: int, num_examples: int = 10, metrics: dict[str, Any] | None = None
) -> FitRes:
    """Return an honest client's result."""
    message = train_message(model)
    reply = honest_reply(message, random_update(model, [1, seed], 0.1))
    return FitRes(OK, to_parameters(sent_arrays(reply)), num_examples, metrics or {})


def opened(strategy: LegacyStrategy, model: ArrayRecord, number: int = 1) -> LegacyStrategy:
    """Open a round."""
    strategy.configure_fit(number, to_parameters(model), manager())
    return strategy


def results(model: ArrayRecord, count: int = N, first: int = 0) -> list[tuple[ClientProxy, FitRes]]:
    """Return the honest clients' results."""
    return [(PROXIES[i], trained(model, i)) for i in range(first, count)]


# -------------------------------------------------------------------------- names and options


def test_every_strategy_has_an_older_twin() -> None:
    rules = {
        name
        for name in fl_bgmd.strategies.__all__
        if isinstance(found := getattr(fl_bgmd.strategies, name), type)
        and issubclass(found, fl_bgmd.strategies.RobustStrategy)
    } - {"RobustStrategy"}
    assert set(NAMES) == rules
    for name in NAMES:
        assert getattr(legacy, name).rule_type is getattr(fl_bgmd.strategies, name)
        assert issubclass(getattr(legacy, name), FedAvg)


def test_it_imports_from_many_threads_and_works_outside_of_a_run() -> None:
    """In a fresh process, where Flower has no run to make messages in."""
    code = """
import threading

found = []
def load():
    from fl_bgmd.strategies.legacy import GMD
    import fl_bgmd.strategies.legacy
    found.append((GMD, fl_bgmd.strategies.legacy.GMD))
threads = [threading.Thread(target=load) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len({kind for pair in found for kind in pair}) == 1 and len(found) == 8, found

import numpy as np
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.server import SimpleClientManager
from flwr.server.client_proxy import ClientProxy

class Proxy(ClientProxy):
    get_properties = get_parameters = fit = evaluate = reconnect = None

manager, model = SimpleClientManager(), ndarrays_to_parameters([np.ones(3)])
proxies = [Proxy("10"), Proxy("11")]
all(map(manager.register, proxies))
strategy = found[0][0]()
strategy.configure_fit(1, model, manager)
same = FitRes(Status(Code.OK, ""), model, 1, {})
parameters, metrics = strategy.aggregate_fit(1, [(p, same) for p in proxies], [OSError("x")])
assert parameters.tensors == model.tensors
assert (metrics["accepted"], metrics["rejected-error"]) == (2, 1)
try:
    from flwr.supercore.task_identity import TaskIdentity
    TaskIdentity.run_id
except (ImportError, RuntimeError):
    print("outside of a run")
"""
    done = run_code(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "outside of a run" in done.stdout


def test_options_go_where_they_belong() -> None:
    strategy = BGMD(
        fraction_fit=0.5,
        min_fit_clients=3,
        accept_failures=False,
        inplace=False,
        block_fraction=0.3,
        mixing="nearest-neighbor",
        byzantine_fraction=0.4,
    )
    assert (strategy.fraction_fit, strategy.min_fit_clients) == (0.5, 3)
    assert not strategy.accept_failures
    assert strategy.rule.block_fraction == 0.3
    assert (strategy.rule.mixing, strategy.rule.byzantine_fraction) == ("nearest-neighbor", 0.4)
    assert repr(strategy) == "BGMD(accept_failures=False)"


def test_impossible_options_are_refused() -> None:
    with pytest.raises(TypeError, match=r"fraction_train, min_train_nodes: options of .*message"):
        BGMD(min_train_nodes=3, fraction_train=0.5)
    with pytest.raises(TypeError, match="block_fracton"):
        BGMD(block_fracton=0.5)
    with pytest.raises(ValueError, match="block_fraction is 2; allowed: above 0 to 1"):
        BGMD(block_fraction=2)
    strategy = GMD(parameter_names=["weight"])
    with pytest.raises(ValueError, match="parameter_names has 1 names; the model has 2 arrays"):
        opened(strategy, plain_model())


def test_a_model_that_is_not_finite_is_refused() -> None:
    broken = ndarrays_to_parameters([np.array([1.0, np.nan])])
    with pytest.raises(ValueError, match="hold a NaN or an infinity"):
        GMD().configure_fit(1, broken, manager())


def test_without_initial_parameters_the_user_is_warned(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="flwr.fl_bgmd")
    assert GMD().initialize_parameters(manager()) is None
    assert "one random client" in caplog.text
    caplog.clear()
    given = to_parameters(plain_model())
    assert GMD(initial_parameters=given).initialize_parameters(manager()) is given
    assert not caplog.records


def test_what_the_settings_give_away_is_said_here_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="flwr.fl_bgmd")
    BGMD(seed=1, min_valid_replies=1).initialize_parameters(manager())
    assert "seed is given" in caplog.text
    assert "min_valid_replies is 1: in a round of fewer than 3" in caplog.text


# ------------------------------------------------------------------------------ same results


@pytest.mark.parametrize("name", NAMES)
def test_the_new_model_is_that_of_the_strategy_itself_to_the_bit(name: str) -> None:
    """Over three rounds: memories, generators and velocities go along."""
    cls = getattr(fl_bgmd.strategies, name)
    # A rule that remembers clients refuses rows of several of them.
    mixing = "clipping" if name == "FoolsGold" else "bucketing"
    options = {"server_momentum": 0.5, "mixing": mixing, "seed": 0, **needed(cls)}
    older: LegacyStrategy = getattr(legacy, name)(**options)
    strategy = cls(**options)
    names = list(plain_model())
    model, expected = plain_model(), plain_model()
    for number in range(1, 4):
        strategy.open_round(number, expected, ConfigRecord())
        replies = [
            honest_reply(train_message(expected, node), random_update(expected, [number, node]))
            for node in range(1, N + 1)
        ]
        fit = [
            (PROXIES[reply.metadata.src_node_id - 1], fit_res(sent_arrays(reply)))
            for reply in reversed(replies)  # they come in any order
        ]
        parameters, metrics = opened(older, model, number).aggregate_fit(number, fit, [])
        assert metrics["accepted"] == N
        assert metrics["bytes-down"] == N * sum(len(a.data) for a in model.values())
        expected, _ = strategy.aggregate_train(number, replies)
        assert parameters.tensors == to_parameters(expected).tensors
        assert parameters.tensor_type == "numpy.ndarray"
        model = expected
    assert names == list(expected)


def fit_res(arrays: ArrayRecord, num_examples: Any = 10) -> FitRes:
    return FitRes(OK, to_parameters(arrays), num_examples, {})


def test_statistics_of_batch_normalization_need_their_names() -> None:
    model = batch_norm_model()
    counted = to_numpy(model)
    fit = []
    for i in range(5):
        moved = {key: value.copy() for key, value in counted.items()}
        moved["bn.running_var"] = np.full(4, [1, 2, 3, 1e6, 1e6][i], np.float32)
        moved["bn.num_batches_tracked"] = np.array(10 + i)
        fit.append((PROXIES[i], FitRes(OK, ndarrays_to_parameters(list(moved.values())), 1, {})))
    strategy = opened(BGMD(parameter_names=list(model)), model)
    parameters, _ = strategy.aggregate_fit(1, fit, [])
    new = dict(zip(model, parameters.tensors, strict=True))
    assert new["bn.running_var"] == ndarray_to_bytes(np.full(4, 3, np.float32))
    assert new["bn.num_batches_tracked"] == ndarray_to_bytes(np.array(12))
    assert new["weight"] == ndarray_to_bytes(counted["weight"])

    nameless, _ = opened(legacy.Mean(), model).aggregate_fit(1, fit, [])
    unnamed = dict(zip(model, nameless.tensors, strict=True))
    assert unnamed["bn.num_batches_tracked"] == new["bn.num_batches_tracked"]  # told by its dtype
    assert unnamed["bn.running_var"] != new["bn.running_var"]


def test_clients_with_names_of_any_kind_keep_their_memory() -> None:
    proxies = [Proxy(name) for name in ("a", "ipv4:10.0.0.1:34567", "f00d" * 8)]
    strategy = BGMD(memory="per-client")
    for number in (1, 2):
        strategy.configure_fit(number, to_parameters(plain_model()), manager(proxies))
        strategy.aggregate_fit(
            number, [(p, trained(plain_model(), i)) for i, p in enumerate(proxies)], []
        )
    assert len(strategy.rule.state_dict()["memory"]["nodes"]) == 3


# --------------------------------------------------------------------------- hostile results

WEIGHT = (4, 3)
F4 = np.float32


def replaced(value: bytes | np.ndarray[Any, Any], index: int = 0) -> Callable[[], FitRes]:
    """Return a client that sends something else in the place of one array."""

    def build() -> FitRes:
        res = trained(plain_model(), 0)
        data = value if isinstance(value, bytes) else ndarray_to_bytes(value)
        res.parameters.tensors[index] = data
        return res

    return build


def with_tensors(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[], FitRes]:
    """Return a client that sends another list of arrays."""

    def build() -> FitRes:
        res = trained(plain_model(), 0)
        res.parameters.tensors = change(res.parameters.tensors)
        return res

    return build


def serialized_otherwise() -> FitRes:
    res = trained(plain_model(), 0)
    res.parameters.tensor_type = "pickle"
    return res


HONEST = trained(plain_model(), 0).parameters.tensors[0]
HOSTILE: dict[str, tuple[Callable[[], FitRes], Rejection]] = {
    "transposed": (replaced(np.zeros((3, 4), F4)), Rejection.SHAPE),
    "flattened": (replaced(np.zeros(12, F4)), Rejection.SHAPE),
    "broadcastable": (replaced(np.zeros((1, 1), F4)), Rejection.SHAPE),
    "another size": (replaced(np.zeros((400, 300), F4)), Rejection.SHAPE),
    "claims terabytes": (replaced(npy_of_shape("(1000000000, 1000)", b"")), Rejection.SHAPE),
    "negative shape": (replaced(npy_of_shape("(-4, -3)", bytes(48))), Rejection.SHAPE),
    "strings": (replaced(np.full(WEIGHT, "1.0")), Rejection.DTYPE),
    "complex": (replaced(np.zeros(WEIGHT, np.complex64)), Rejection.DTYPE),
    "integers": (replaced(np.zeros(WEIGHT, np.int32)), Rejection.DTYPE),
    "big-endian": (replaced(np.zeros(WEIGHT, ">f4")), Rejection.DTYPE),
    "pickled objects": (replaced(pickled_objects()), Rejection.DTYPE),
    "garbage": (replaced(b"garbage" * 9), Rejection.ENCODING),
    "no bytes": (replaced(b""), Rejection.ENCODING),
    "truncated": (replaced(HONEST[:-4]), Rejection.ENCODING),
    "trailing bytes": (replaced(HONEST + b"more"), Rejection.ENCODING),
    "header of code": (replaced(npy_of_shape("().__class__", bytes(48))), Rejection.ENCODING),
    "serialized otherwise": (serialized_otherwise, Rejection.ENCODING),
    "NaN": (replaced(np.full(WEIGHT, np.nan, F4)), Rejection.NON_FINITE),
    "infinity": (replaced(np.full(WEIGHT, -np.inf, F4)), Rejection.NON_FINITE),
    "beyond float32": (replaced(np.full(WEIGHT, 1e300)), Rejection.NON_FINITE),
    "no arrays": (with_tensors(lambda tensors: []), Rejection.KEYS),
    "one array": (with_tensors(lambda tensors: tensors[:1]), Rejection.KEYS),
    "three arrays": (with_tensors(lambda tensors: [*tensors, tensors[0]]), Rejection.KEYS),
    "other order": (with_tensors(lambda tensors: tensors[::-1]), Rejection.SHAPE),
    "arrays of nothing": (with_tensors(lambda tensors: [None, None]), Rejection.ERROR),
    "examples a text": (lambda: fit_res(plain_model(), "many"), Rejection.ERROR),
    "metrics nothing": (
        lambda: FitRes(OK, to_parameters(plain_model()), 1, None),
        Rejection.ERROR,
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("error")
def test_a_hostile_result_changes_nothing_to_the_bit(name: str) -> None:
    build, reason = HOSTILE[name]
    model = plain_model()
    honest = results(model, first=1)
    expected, _ = opened(BGMD(seed=0), model).aggregate_fit(1, honest, [])
    found, metrics = opened(BGMD(seed=0), model).aggregate_fit(
        1, [(PROXIES[0], build()), *honest], []
    )
    assert found.tensors == expected.tensors
    assert (metrics["accepted"], metrics["rejected"]) == (N - 1, 1)
    assert metrics[f"rejected-{reason}"] == 1
    assert not UNPICKLED


def test_a_safe_float_is_accepted_and_a_client_counts_once() -> None:
    model = plain_model()
    wide = [a.astype(np.float64) for a in to_numpy(model).values()]
    double = FitRes(OK, ndarrays_to_parameters(wide), 1, {})
    fit = [(PROXIES[0], double), (PROXIES[1], double), (PROXIES[1], double)]
    parameters, metrics = opened(GMD(), model).aggregate_fit(1, fit, [])
    assert (metrics["accepted"], metrics["rejected-duplicate"]) == (2, 1)
    assert parameters.tensors == to_parameters(model).tensors


def test_failures_are_counted_and_may_be_refused() -> None:
    model = plain_model()
    unfinished = FitRes(Status(Code.FIT_NOT_IMPLEMENTED, "no"), to_parameters(model), 0, {})
    failures = [ValueError("the client raised"), (PROXIES[0], unfinished)]
    expected, _ = opened(GMD(), model).aggregate_fit(1, results(model, first=2), [])
    found, metrics = opened(GMD(), model).aggregate_fit(1, results(model, first=2), failures)
    assert found.tensors == expected.tensors
    assert metrics["rejected-error"] == 2

    kept, metrics = opened(GMD(), model).aggregate_fit(1, [], failures)
    assert kept.tensors == to_parameters(model).tensors
    assert metrics["accepted"] == 0

    strict = opened(GMD(accept_failures=False), model)
    assert strict.aggregate_fit(1, results(model, first=2), failures) == (None, {})
    assert strict.aggregate_evaluate(1, [], failures) == (None, {})


# ----------------------------------------------------------------------------------- metrics


def test_metrics_are_combined_by_medians_and_texts_left_out() -> None:
    model = plain_model()
    fit = [
        (PROXIES[i], trained(model, i, 10, {"loss": loss, "good": i < 2, "note": "text"}))
        for i, loss in enumerate((1.0, 2.0, 1e30))
    ]
    _, metrics = opened(GMD(), model).aggregate_fit(1, fit, [])
    assert metrics["loss"] == 2.0
    assert metrics["good"] == 1.0
    assert "note" not in metrics
    assert all(isinstance(value, int | float) for value in metrics.values())


def test_the_users_functions_see_what_accepted_clients_sent() -> None:
    seen: list[Any] = []

    def combine(metrics: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
        seen.extend(metrics)
        return {"note": "combined", "sum": sum(count for count, _ in metrics)}

    model = plain_model()
    strategy = GMD(fit_metrics_aggregation_fn=combine, evaluate_metrics_aggregation_fn=combine)
    own = [{"note": "a", "ok": True}, {"raw": b"b"}, {"loss": 3}]
    fit = [(PROXIES[i], trained(model, i, 10 + i, own[i])) for i in range(3)]
    fit.append((PROXIES[3], HOSTILE["NaN"][0]()))
    _, metrics = opened(strategy, model).aggregate_fit(1, fit, [])
    assert seen == [(10, own[0]), (11, own[1]), (12, own[2])]
    assert (metrics["note"], metrics["sum"], metrics["accepted"]) == ("combined", 33, 3)

    seen.clear()
    tests = [(PROXIES[i], EvaluateRes(OK, loss, 5, own[i])) for i, loss in enumerate((1, 9.0, 2))]
    loss, metrics = strategy.aggregate_evaluate(1, tests, [])
    assert loss == 2.0
    assert metrics == {"note": "combined", "sum": 15}


@pytest.mark.parametrize("examples", [np.nan, -1, [1, 2]])
def test_a_nan_metric_or_a_useless_count_costs_a_client_nothing(examples: Any) -> None:
    """As in the message API, and a function of the user's own reads 1 for the count."""
    seen: list[Any] = []

    def combine(metrics: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
        seen.extend(count for count, _ in metrics)
        return {}

    model = plain_model()
    expected, _ = opened(BGMD(seed=0), model).aggregate_fit(1, results(model), [])
    fit = results(model)
    fit[0] = PROXIES[0], trained(model, 0, examples)
    fit[1] = PROXIES[1], trained(model, 1, 10, {"loss": np.nan})
    strategy = opened(BGMD(seed=0, fit_metrics_aggregation_fn=combine), model)
    found, metrics = strategy.aggregate_fit(1, fit, [])
    assert found.tensors == expected.tensors
    assert (metrics["accepted"], metrics["dropped-metrics"]) == (N, 1)
    assert seen == [1, *[10] * (N - 2)]


def test_a_users_function_that_fails_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="flwr.fl_bgmd")

    def combine(metrics: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
        return {"loss": sum(found["no-such-key"] for _, found in metrics)}

    model = plain_model()
    fit = [(PROXIES[i], trained(model, i, 1, {"loss": float(i)})) for i in range(3)]
    strategy = GMD(fit_metrics_aggregation_fn=combine)
    _, metrics = opened(strategy, model).aggregate_fit(1, fit, [])
    assert metrics["loss"] == 1.0
    assert "medians are used" in caplog.text


def test_losses_are_combined_by_their_median() -> None:
    losses = (1.0, 2.0, 3.0, 1e30, np.nan, "high", [1.0])
    replies = [
        (PROXIES[i], EvaluateRes(OK, loss, 5, {"accuracy": 0.1 * i}))
        for i, loss in enumerate(losses)
    ]
    loss, metrics = GMD().aggregate_evaluate(1, replies, [OSError("gone")])
    assert loss == 2.5  # the loss that is NaN is dropped, the accuracy beside it counts
    assert metrics == {"accuracy": pytest.approx(0.2), "dropped-metrics": 1}
    assert GMD().aggregate_evaluate(1, replies[5:], []) == (None, {})
    assert GMD().aggregate_evaluate(1, [], []) == (None, {})


def test_examples_weigh_only_where_asked_for_and_are_capped() -> None:
    model = plain_model()
    fit = [(PROXIES[i], trained(model, i, 10**18 if i == 0 else 10)) for i in range(3)]
    uniform, _ = opened(legacy.Mean(), model).aggregate_fit(1, fit, [])
    capped, _ = opened(legacy.Mean(weighting="examples"), model).aggregate_fit(1, fit, [])
    for a, b in zip(uniform.tensors, capped.tensors, strict=True):
        np.testing.assert_allclose(np.frombuffer(a[128:], F4), np.frombuffer(b[128:], F4))


# ----------------------------------------------------------------- Flower's own server and clients


class Regression(NumPyClient):
    """A client as anyone wrote them: linear regression, knows nothing of this project."""

    def __init__(self, partition: int) -> None:
        draw = np.random.default_rng([5, partition])
        self.inputs = draw.normal(size=(64, DIMENSIONS)).astype(F4)
        self.targets = self.inputs @ TRUE_WEIGHTS

    def fit(self, parameters: list[Any], config: dict[str, Any]) -> tuple[list[Any], int, Any]:
        weight, bias = parameters
        errors = self.inputs @ weight + bias - self.targets
        step = F4(0.3)
        new = [weight - step * errors @ self.inputs / len(errors), bias - step * errors.mean()]
        return new, len(errors), {"rounds-seen": config.get("server-round", -1)}

    def evaluate(self, parameters: list[Any], config: dict[str, Any]) -> tuple[float, int, Any]:
        weight, bias = parameters
        errors = self.inputs @ weight + bias - self.targets
        return float(np.square(errors).mean()), len(errors), {}


def regression_client(context: Context) -> Client:
    return Regression(int(context.node_config["partition-id"])).to_client()


def vandal(message: Message, context: Context, call_next: Any) -> Message:
    """Send something else from each of four clients: a mod, so that Flower itself carries it."""
    reply = call_next(message, context)
    partition = context.node_config["partition-id"]
    if message.metadata.message_type != "train" or partition > 3:
        return reply
    if partition == 0:
        raise RuntimeError("the client raised")
    arrays = reply.content["fitres.parameters"]
    if partition == 1:
        arrays["0"].data = pickled_objects()
    elif partition == 2:
        arrays["0"].data = ndarray_to_bytes(np.full(DIMENSIONS, np.nan, F4))
    else:
        del reply.content["fitres.parameters"]
    return reply


def serve(strategy: Strategy, mods: list[Any], rounds: int = 20) -> Any:
    """Run Flower's older server and clients; return the history."""
    kept: list[Any] = []
    app = ClientApp(client_fn=regression_client, mods=mods)

    def server_fn(context: Context) -> ServerAppComponents:
        from flwr.server import Server

        class Recording(Server):
            def fit(self, num_rounds: int, timeout: float | None) -> Any:
                history, elapsed = super().fit(num_rounds, timeout)
                kept.extend((history, self.parameters))
                return history, elapsed

        server = Recording(client_manager=SimpleClientManager(), strategy=strategy)
        return ServerAppComponents(server=server, config=ServerConfig(num_rounds=rounds))

    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    with np.errstate(all="ignore"):
        ServerApp(server_fn=server_fn)(InProcessGrid(app, N, {}), context)
    return kept


def options() -> dict[str, Any]:
    start = ndarrays_to_parameters([np.zeros(DIMENSIONS, F4), np.zeros((), F4)])
    return {"initial_parameters": start, "min_fit_clients": N, "min_available_clients": N}


def error_of(parameters: Parameters) -> float:
    weight = np.frombuffer(parameters.tensors[0][128:], F4)
    return float(np.linalg.norm(weight.astype(np.float64) - TRUE_WEIGHTS))


def test_a_run_of_the_older_server_outlives_vandals_where_averaging_ends() -> None:
    history, parameters = serve(BGMD(**options(), block_fraction=0.5, seed=0), [vandal])
    assert error_of(parameters) < 0.3 < np.linalg.norm(TRUE_WEIGHTS)
    fit = history.metrics_distributed_fit
    assert [count for _, count in fit["accepted"]] == [N - 4] * 20
    assert [count for _, count in fit["rejected-error"]] == [2] * 20  # raised; sent no arrays
    assert [count for _, count in fit["rejected-shape"]] == [1] * 20
    assert [count for _, count in fit["rejected-non-finite"]] == [1] * 20
    assert history.losses_distributed[-1][1] < 0.1
    assert not UNPICKLED
    with pytest.raises(ValueError, match=r"allow_pickle|Object arrays"):
        serve(FedAvg(**options()), [vandal])


def test_hostile_clients_are_redrawn_each_round_and_do_no_harm() -> None:
    played: set[tuple[int, int]] = set()

    def watch(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        if reply.has_content() and "byzantine" in reply.content:
            number = message.content["fitins.config"]["server-round"]
            played.add((number, context.node_config["partition-id"]))
        return reply

    mods = [watch, ByzantineMod(attack="bit-flip:100", fraction=0.4, seed=3)]
    history, parameters = serve(GMD(**options()), mods, rounds=40)
    assert error_of(parameters) < 0.3
    assert history.metrics_distributed_fit["rounds-seen"] == [(i, i) for i in range(1, 41)]
    by_round = [{p for n, p in played if n == number} for number in range(1, 41)]
    assert {len(partitions) for partitions in by_round} == {4}
    assert any(a != b for a, b in itertools.pairwise(by_round))


def test_compressed_updates_travel_through_the_older_api() -> None:
    packed: list[list[str]] = []

    def watch(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        if message.metadata.message_type == "train":
            packed.append(list(reply.content["fitres.parameters"]))
        return reply

    strategy = QBGMD(**options(), block_fraction=0.5, seed=0)
    mods = [watch, CompressionMod(), ByzantineMod(attack="bit-flip", fraction=0.2)]
    history, parameters = serve(strategy, mods, rounds=30)
    assert packed == [[PACKED_KEY]] * (30 * N)
    assert history.metrics_distributed_fit["accepted"][-1] == (30, N)
    assert error_of(parameters) < 0.5


def test_a_configuration_of_the_user_goes_along() -> None:
    strategy = GMD(on_fit_config_fn=lambda number: {"epochs": number, "server-round": "mine"})
    [(_, ins), *others] = strategy.configure_fit(2, to_parameters(plain_model()), manager())
    assert ins.config["epochs"] == 2
    assert ins.config["server-round"] == 2
    assert isinstance(ins.config["round-seed"], int)
    assert all(other.config == ins.config for _, other in others)


@pytest.mark.parametrize("name", ["checkpoints", "bench_after", "too_few_nodes"])
def test_options_of_rounds_that_flower_runs_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: not for the older API"):
        legacy.GMD(**{name: 1})


WRAPPERS: dict[str, tuple[Callable[[Strategy], Strategy], list[Any]]] = {
    "server-side-fixed": (
        lambda inner: DifferentialPrivacyServerSideFixedClipping(inner, 0.02, 1.0, N),
        [],
    ),
    "client-side-fixed": (
        lambda inner: DifferentialPrivacyClientSideFixedClipping(inner, 0.02, 1.0, N),
        [fixedclipping_mod],
    ),
    "server-side-adaptive": (
        lambda inner: DifferentialPrivacyServerSideAdaptiveClipping(inner, 0.02, N, 1.0),
        [],
    ),
    "client-side-adaptive": (
        lambda inner: DifferentialPrivacyClientSideAdaptiveClipping(inner, 0.02, N, 1.0),
        [adaptiveclipping_mod],
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_flowers_privacy_wrappers_take_our_strategies(name: str) -> None:
    np.random.seed(0)  # the wrappers draw their noise from it
    wrap, mods = WRAPPERS[name]
    attack = ByzantineMod(attack="bit-flip:100", fraction=0.4, seed=3)
    history, parameters = serve(wrap(GMD(**options())), [attack, *mods], rounds=15)
    assert error_of(parameters) < 0.5 * np.linalg.norm(TRUE_WEIGHTS)
    assert [count for _, count in history.metrics_distributed_fit["accepted"]] == [N] * 15
