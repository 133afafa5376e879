"""The test Hub, and sources that were opened in another test forgotten."""

from collections.abc import Iterator

import pytest

from loratool.storage import location
from loratool.testing.fixtures import hub, xet_hub

__all__ = ["fresh", "hub", "xet_hub"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    location.forget()
