"""Flower client mods: put them before any ClientApp.

``ClientApp(mods=[ByzantineMod()])``
"""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable

from fl_bgmd.attacks import ATTACKS, byzantine_clients
from fl_bgmd.replies import ModelLayout


@dataclass(frozen=True)
class ByzantineMod:
    """Let a client lie when it is its turn: it trains honestly, then sends something else.

    Works alike in simulation and on a SuperNode. Each setting that is None is read from the run
    configuration; the partition comes from the node configuration (``partition-id``,
    ``num-partitions``), the round from the message.

    Attributes
    ----------
    attack : str, optional
        A name of :data:`fl_bgmd.attacks.ATTACKS` or ``none``. Run config: ``attack``.
    strength : float, optional
        The attack's knob; 0 means the paper's value. Run config: ``attack.scale``.
    fraction : float, optional
        Hostile fraction of the clients. Run config: ``byzantine-fraction``.
    selection : str, optional
        ``per-round`` or ``fixed``. Run config: ``byzantine-selection``.
    seed : int, optional
        Run config: ``seed``.
    """

    attack: str | None = None
    strength: float | None = None
    fraction: float | None = None
    selection: str | None = None
    seed: int | None = None

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Run the client, then replace its update if it is hostile in this round."""
        reply = call_next(message, context)
        name = self._setting(self.attack, context, "attack", "none")
        is_train = message.metadata.message_type.split(".")[0] == MessageType.TRAIN
        if name == "none" or not is_train or not reply.has_content():
            return reply
        if name not in ATTACKS:
            raise ValueError(f"attack is {name!r}; allowed: none, {', '.join(ATTACKS)}")
        server_round = 0
        for config in message.content.config_records.values():
            server_round = int(cast(int, config.get("server-round", server_round)))
        seed = int(self._setting(self.seed, context, "seed", 0))
        partition = int(context.node_config["partition-id"])
        hostile = byzantine_clients(
            int(context.node_config["num-partitions"]),
            float(self._setting(self.fraction, context, "byzantine-fraction", 0.0)),
            server_round,
            seed,
            str(self._setting(self.selection, context, "byzantine-selection", "per-round")),
        )
        if partition not in hostile:
            return reply
        chosen = ATTACKS[name]
        strength = float(self._setting(self.strength, context, "attack.scale", 0.0))
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([seed, server_round, partition]).generate_state(1)[0])
        )
        [sent] = message.content.array_records.values()
        [(record_name, trained)] = reply.content.array_records.items()
        # In the order sent: a client may reply in another one.
        in_order = ArrayRecord({key: trained[key] for key in sent})
        before, after = ModelLayout(sent), ModelLayout(in_order)
        update = torch.from_numpy(before.values - after.values)
        update = chosen.apply(update, strength or chosen.strength, generator)
        lie: ArrayRecord = after.to_arrays(before.values - update.numpy(), after.buffer_values)
        reply.content[record_name] = lie
        return reply

    @staticmethod
    def _setting(given: Any, context: Context, key: str, default: Any) -> Any:
        return context.run_config.get(key, default) if given is None else given
