"""Worker momentum across rounds, as a client mod for any Flower app."""

from dataclasses import dataclass
from typing import Any

from flwr.app import Context, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable

from fl_bgmd.client_state import keep, kept
from fl_bgmd.layout import ModelLayout
from fl_bgmd.wire import PACKED_KEY, TrainedReply, marked

BETA_KEY = "client-momentum"
LIES_KEY = "client-momentum-of-lies"

_HONEST = "fl-bgmd.momentum"
_HOSTILE = "fl-bgmd.momentum-of-lies"


@dataclass(frozen=True)
class MomentumMod:
    """Let a client send the running mean of its updates: ``m <- beta m + (1 - beta) u``.

    Karimireddy et al. (ICML 2021), Algorithm 2: with u the update of a round and m starting at 0,
    the honest updates scatter less, and lies hide less well between them. Steps that the server
    takes lag behind: beta counts where few rounds are run. It works alike in simulation and on a
    SuperNode, for any app and strategy; m lives in the client's ``Context.state``, and starts at 0
    again where that is gone (:mod:`fl_bgmd.client_state`).

    The order of the mods is what they do to an update, the last first. Put behind
    :class:`.mods.ByzantineMod` (``mods=[CompressionMod(), ByzantineMod(), MomentumMod(0.9)]``)
    hostile clients send their lie as it is; put before it, the lie goes through their momentum. It
    stands behind :class:`.mods.CompressionMod`: what is compressed, with the error feedback added,
    is m. What a client sends while it is hostile stays out of the m of its honest rounds, and has
    one of its own.

    Attributes
    ----------
    beta : float, optional
        0 to below 1; 0 is none. Run config: ``client-momentum``.
    lies : bool, optional
        For an app that has the mod in both places: act only where the run configuration's
        ``client-momentum-of-lies`` says the same. By default always.
    """

    beta: float | None = None
    lies: bool | None = None

    def __post_init__(self) -> None:
        """Refuse a beta with which the running mean would not be one."""
        _check("beta", self.beta or 0.0)

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Run the client, then put its running mean in the update's place."""
        reply = call_next(message, context)
        beta = self.beta
        if beta is None:
            beta = _check(BETA_KEY, context.run_config.get(BETA_KEY, 0.0))
        elsewhere = self.lies is not None and self.lies != context.run_config.get(LIES_KEY, False)
        is_train = message.metadata.message_type.split(".")[0] == MessageType.TRAIN
        if beta == 0 or elsewhere or not is_train or not reply.has_content():
            return reply
        [sent] = message.content.array_records.values()
        records = list(reply.content.array_records.values())
        if len(records) == 1 and PACKED_KEY in records[0]:
            raise ValueError(
                "the update is packed before MomentumMod; allowed: MomentumMod behind "
                "CompressionMod in mods"
            )
        if len(records) != 1 or set(records[0]) != set(sent):
            return reply  # no model: the server's screening says so
        trained = TrainedReply.read(reply.content, ModelLayout(sent), None)
        name = _HONEST if marked(reply.content) is None else _HOSTILE
        update = beta * kept(context, name, trained.update) + (1 - beta) * trained.update
        keep(context, name, update)
        trained.replace(update)
        return reply


def _check(name: str, beta: Any) -> float:
    """Return a beta as a number; raise ``ValueError`` for one out of range."""
    if not 0 <= float(beta) < 1:
        raise ValueError(f"{name} is {beta}; allowed: 0 to below 1")
    return float(beta)
