"""One site for the tests of this folder: made when it is first needed, and made anew after a test left it in a bad way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.site_kit import Site, is_well


class Keeper:
    """The site in use, if any."""

    def __init__(self, make_folder) -> None:
        self._make_folder = make_folder
        self._site: Site | None = None

    def get(self) -> Site:
        if self._site is None:
            folder: Path = self._make_folder("site")
            self._site = Site(folder)
            try:
                self._site.start()
            except BaseException:
                self.drop()
                raise
        return self._site

    def drop(self) -> None:
        site, self._site = self._site, None
        if site is not None:
            site.stop()


@pytest.fixture(scope="session")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keeper]:
    keeper = Keeper(tmp_path_factory.mktemp)
    yield keeper
    keeper.drop()


@pytest.fixture
def site(keeper: Keeper) -> Iterator[Site]:
    """A server and two agents that run the newest version and do nothing."""
    found = keeper.get()
    yield found
    with suppress(AttributeError):  # stopped before it had a line
        found.line.flow()
        found.between.honest()
    if not is_well(found):
        keeper.drop()
