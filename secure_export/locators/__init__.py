"""Locators: which class would a backdoor aim at? They see a view of the weights and the fit split only."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from secure_export.records.measured import Suspect
from secure_export.records.memory import Progress, Split, View, silent
from secure_export.registry import Plugin


class Locator(Plugin):
    """(view, fit) to Suspect; `needs_module` locators train a copy, of the full-precision subject only."""

    needs_module: ClassVar[bool] = False

    @abstractmethod
    def locate(self, view: View, fit: Split, *, seed: int, progress: Progress = silent) -> Suspect:
        """The class a backdoor in these weights would aim at, or None, with a score per class."""
