"""For the site: ``name: text`` lines of a dataclass's docstring are its ``Attributes:`` section."""

from __future__ import annotations

from typing import Any

import griffe


class FieldSections(griffe.Extension):
    """As ``--help`` reads them (``core/command_line.py: _sectioned``)."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.docstring is None:
            return
        lines = cls.docstring.value.splitlines()
        starts = tuple(f"{name}: " for name, m in cls.members.items() if m.is_attribute)
        first = next((i for i, line in enumerate(lines) if line.startswith(starts)), None)
        if starts and first is not None:
            fields = ["  " + line if line else line for line in lines[first:]]
            cls.docstring.value = "\n".join([*lines[:first], "", "Attributes:", *fields])
