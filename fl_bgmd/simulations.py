"""In a checkout, another name of ``simulations/``; in the wheel that folder takes this place."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulations import *  # noqa: F403
else:
    from fl_bgmd._checkout import alias

    alias(__name__)
