"""The site's reference: docstrings as its Markdown has them."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):`~?\.*([^`]*)`")


class Docstrings(griffe.Extension):
    """Prepares docstrings of modules that are imported, not read."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Drop what a value's own type says: it is that of ``str``, of ``int``."""
        if "property" not in attr.labels:
            attr.docstring = None

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Turn Sphinx's roles into plain names."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
