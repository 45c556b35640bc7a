"""The strategies for apps of Flower's older API: ``client_fn``, ``server_fn``, ``NumPyClient``.

``from fl_bgmd.strategies.legacy import BGMD`` takes the place of
``from flwr.server.strategy import FedAvg``. Sampling and configuration stay those of the older
``FedAvg``; what clients send becomes the messages that :class:`~fl_bgmd.strategies.RobustStrategy`
screens and aggregates.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common import (
    EvaluateRes,
    FitIns,
    FitRes,
    Metrics,
    MetricsAggregationFn,
    Parameters,
    Scalar,
)
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg

from fl_bgmd.flower import CLIENT_FAILED, received_message
from fl_bgmd.layout import ModelLayout
from fl_bgmd.options import Option, check_all, declared
from fl_bgmd.replies import declared_array, median_metrics
from fl_bgmd.wire import EXAMPLES, packed_keys

from . import rules
from .declared import options_of, signature_of
from .robust import RobustStrategy
from .settings import FLOWERS_OPTIONS, OWN_OPTIONS, OwnRounds

LOG = logging.getLogger("flwr.fl_bgmd")

_LOSS = "fl-bgmd.loss"
_AS_SENT = "as-sent"

AnyRes = TypeVar("AnyRes", FitRes, EvaluateRes)

_OPTIONS = frozenset(inspect.signature(FedAvg).parameters)
_MESSAGE_OPTIONS = frozenset(FLOWERS_OPTIONS) - _OPTIONS
_OWN_ROUNDS = frozenset(name for name, option in OWN_OPTIONS.items() if option.has(OwnRounds))


class LegacyStrategy(FedAvg):
    """Base of all: a :class:`~fl_bgmd.strategies.RobustStrategy` as an older ``Strategy``.

    A subclass names its rule in ``rule_type``. Replies that the screening rejects, and clients
    that failed, cost the run nothing.

    Parameters
    ----------
    parameter_names : sequence of str, optional
        Names of the model's arrays in the order in which clients send them, for example
        ``list(model.state_dict())``. The older API sends none, and without them the statistics of
        batch normalization (``running_mean``, ``running_var``) are aggregated like weights.
    **options
        All of :class:`flwr.server.strategy.FedAvg`'s (``inplace`` means nothing here) and the
        rule's own. ``fit_metrics_aggregation_fn`` and ``evaluate_metrics_aggregation_fn`` see
        accepted replies only; without them metrics are combined by their median.

    Attributes
    ----------
    rule : RobustStrategy
        The strategy that does the work. Its ``state_dict()`` holds what the next round needs.

    Raises
    ------
    TypeError
        For an option that neither has, with the nearest that they have.
    ValueError
        For a value that the rule refuses.
    """

    rule_type: ClassVar[type[RobustStrategy]]
    __signature__: ClassVar[inspect.Signature]

    def __init__(self, *, parameter_names: Sequence[str] | None = None, **options: Any) -> None:
        if foreign := sorted(_MESSAGE_OPTIONS.intersection(options)):
            raise TypeError(
                f"{', '.join(foreign)}: options of Flower's message API; allowed here: "
                f"{', '.join(sorted(_OPTIONS))} and those of the rule"
            )
        if foreign := sorted(_OWN_ROUNDS.intersection(options)):
            raise TypeError(
                f"{', '.join(foreign)}: not for the older API, whose rounds are Flower's"
            )
        check_all(
            type(self).__name__, {"parameter_names": parameter_names, **options}, self.options()
        )
        super().__init__(**{name: options.pop(name) for name in _OPTIONS & options.keys()})
        self.parameter_names = None if parameter_names is None else list(parameter_names)
        self._combined: Metrics = {}
        self._layout: ModelLayout | None = None
        self.rule = self.rule_type(
            train_metrics_aggr_fn=self._combiner(self.fit_metrics_aggregation_fn),
            evaluate_metrics_aggr_fn=self._combiner(self.evaluate_metrics_aggregation_fn),
            **options,
        )

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Return what can be given by keyword: the rule's options, the older ``FedAvg``'s, own."""
        left_out = _MESSAGE_OPTIONS | _OWN_ROUNDS
        rule = options_of(cls.rule_type)
        known = {name: option for name, option in rule.items() if name not in left_out}
        known |= declared(FedAvg.__init__, ("self",), positional=True)
        return known | declared(LegacyStrategy.__init__)

    def __repr__(self) -> str:
        """Name the strategy."""
        return f"{type(self).__name__}(accept_failures={self.accept_failures})"

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Return ``initial_parameters``; without them Flower asks one client, whoever it is."""
        self.rule.warn_at_start()
        parameters = super().initialize_parameters(client_manager)
        if parameters is None:
            LOG.warning(
                "initial_parameters is not set: the initial model comes from one random client, "
                "which may be hostile"
            )
        return parameters

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Sample clients and send them the model, the round and the round's seed."""
        pairs = super().configure_fit(server_round, parameters, client_manager)
        asked = ConfigRecord()
        self._layout = self.rule.open_round(server_round, self._model(parameters), asked)
        self.rule.expect(len(pairs))
        added = cast(dict[str, Scalar], dict(asked))
        return [(proxy, FitIns(ins.parameters, {**ins.config, **added})) for proxy, ins in pairs]

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Screen the replies, apply the rule; return the new model and the diagnostics.

        Diagnostics that are lists (``client-weights``) have no place in the older API.
        """
        if failures and not self.accept_failures:
            return None, {}
        replies = [_reply(proxy, res, self._trained) for proxy, res in results]
        self._combined = {}
        arrays, metrics = self.rule.aggregate_train(server_round, replies + _errors(failures))
        assert arrays is not None
        tensors = [array.data for array in arrays.values()]
        return Parameters(tensors, "numpy.ndarray"), _scalars(metrics) | self._combined

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Combine losses and metrics by their medians."""
        if failures and not self.accept_failures:
            return None, {}
        replies = [_reply(proxy, res, _evaluated) for proxy, res in results]
        self._combined = {}
        metrics = _scalars(self.rule.aggregate_evaluate(server_round, replies + _errors(failures)))
        loss = metrics.pop(_LOSS, None)
        return None if loss is None else float(loss), metrics | self._combined

    def _model(self, parameters: Parameters) -> ArrayRecord:
        """Return the model that goes out as named arrays."""
        names = self.parameter_names
        if names is None:
            names = [str(i) for i in range(len(parameters.tensors))]
        if len(names) != len(parameters.tensors):
            raise ValueError(
                f"parameter_names has {len(names)} names; the model has "
                f"{len(parameters.tensors)} arrays"
            )
        arrays = [declared_array(data, parameters.tensor_type) for data in parameters.tensors]
        return ArrayRecord(dict(zip(names, arrays, strict=True)))

    def _trained(self, res: FitRes) -> RecordDict:
        """Return a reply to training as the content of a message."""
        arrays = [
            declared_array(data, res.parameters.tensor_type) for data in res.parameters.tensors
        ]
        unknown = [f"array {i}" for i in range(len(arrays))]
        names = [*self._names(arrays), *unknown]
        return _content(res, arrays=dict(zip(names, arrays, strict=False)))

    def _names(self, arrays: list[Array]) -> list[str]:
        """Return the names of the arrays in a reply: the model's, or those of a packed update."""
        assert self._layout is not None
        packed = packed_keys(self._layout)
        is_packed = (
            self.rule.compressor is not None
            and len(arrays) == len(packed)
            and arrays[0].dtype == "uint8"
        )
        return packed if is_packed else self._layout.keys

    def _combiner(
        self, combine: MetricsAggregationFn | None
    ) -> Callable[[list[RecordDict], str], MetricRecord] | None:
        """Return a function of the older API as one of the message API."""
        if combine is None:
            return None

        def combined(contents: list[RecordDict], _: str) -> MetricRecord:
            numbers = [content.metric_records["metrics"] for content in contents]
            self._combined = dict(
                combine(
                    [
                        (int(cast(float, found[EXAMPLES])), _as_sent(content))
                        for found, content in zip(numbers, contents, strict=True)
                    ]
                )
            )
            return median_metrics({_LOSS: found[_LOSS]} for found in numbers if _LOSS in found)

        return combined


def _content(
    res: FitRes | EvaluateRes, arrays: dict[str, Array] | None = None, loss: float | None = None
) -> RecordDict:
    """Return what a client sent as records; metrics that are no numbers for its owner only."""
    numbers: dict[str, Any] = {
        key: int(value) if isinstance(value, bool) else value
        for key, value in res.metrics.items()
        if isinstance(value, int | float)
    }
    numbers[EXAMPLES] = res.num_examples
    if loss is not None:
        numbers[_LOSS] = loss
    content = RecordDict(
        {"metrics": MetricRecord(numbers), _AS_SENT: ConfigRecord(cast(Any, res.metrics))}
    )
    if arrays is not None:
        content["arrays"] = ArrayRecord(arrays)
    return content


def _evaluated(res: EvaluateRes) -> RecordDict:
    """Return a reply to evaluation as the content of a message."""
    return _content(res, loss=float(res.loss))


def _as_sent(content: RecordDict) -> Metrics:
    """Return a client's own metrics."""
    return cast(Metrics, dict(content.config_records[_AS_SENT]))


def _reply(proxy: ClientProxy, res: AnyRes, to_content: Callable[[AnyRes], RecordDict]) -> Message:
    """Return what a client sent as a message; what is no message becomes an error reply."""
    try:
        return received_message(_node(proxy), content=to_content(res))
    except Exception as error:  # a client must not be able to end the run
        return _error(f"{type(error).__name__}: {error}", _node(proxy))


def _errors(failures: Sequence[tuple[ClientProxy, Any] | BaseException]) -> list[Message]:
    """Return an error reply for each failure."""
    return [
        _error(f"{type(failure).__name__}: {failure}")
        if isinstance(failure, BaseException)
        else _error(f"status {failure[1].status}", _node(failure[0]))
        for failure in failures
    ]


def _error(reason: str, node: int = 0) -> Message:
    return received_message(node, error=Error(CLIENT_FAILED, reason))


def _node(proxy: ClientProxy) -> int:
    """Return a number for a client: its node id, or one made of any other name."""
    return int(proxy.cid) if proxy.cid.isdecimal() else int.from_bytes(proxy.cid.encode(), "big")


def _scalars(metrics: MetricRecord | None) -> Metrics:
    """Return the metrics that the older API can hold."""
    return {key: value for key, value in (metrics or {}).items() if isinstance(value, int | float)}


def older(strategy: type[RobustStrategy]) -> type[LegacyStrategy]:
    """Return a strategy class, one of your own for example, for apps of the older API."""
    text = f":class:`{strategy.__name__}` for the older API."
    own = {"rule_type": strategy, "__doc__": text, "__module__": strategy.__module__}
    made: type[LegacyStrategy] = type(strategy.__name__, (LegacyStrategy,), own)
    options = made.options()
    made.__signature__ = signature_of(made, options, takes_spec=False)
    return made


_TWINS = {
    name: older(found)
    for name, found in vars(rules).items()
    if isinstance(found, type) and issubclass(found, RobustStrategy) and found.spec
}
globals().update(_TWINS)

__all__ = ["LegacyStrategy", *sorted(_TWINS)]  # what there is to choose from


def __getattr__(name: str) -> type[LegacyStrategy]:
    """Say which twins there are; for type checkers, too, who do not see them made."""
    raise AttributeError(f"module {__name__!r} has no strategy {name!r}; it has {sorted(_TWINS)}")
