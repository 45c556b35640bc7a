"""In a checkout, another name of ``clients/``; in the wheel that folder takes this place."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clients import *  # noqa: F403
else:
    from fl_bgmd._checkout import alias

    alias(__name__)
