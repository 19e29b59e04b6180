"""The table of the campaign's outcomes."""

import os
import random
import shlex

import pytest

from campaign.commands import RUN, Pool, Tally


@pytest.fixture(scope="session")
def tallies():
    """All tallies; the table is printed at the end."""
    made: list[Tally] = []
    yield made
    lines = ["", "| class | tried | right | refused | wrong |", "| --- | ---: | ---: | ---: | ---: |"]
    lines = ["", f"S is {shlex.join(RUN)}", *lines]
    print("\n".join([*lines, *(tally.row() for tally in made)]), flush=True)


@pytest.fixture(scope="session")
def pool():
    made = Pool()
    yield made
    made.close()


@pytest.fixture
def tally(tallies):
    """Return the tally of a new class of inputs."""

    def make(name: str) -> Tally:
        tallies.append(Tally(name))
        return tallies[-1]

    return make


@pytest.fixture
def draw(request):
    """Random draws that depend on CAMPAIGN_SEED and on the test."""
    return random.Random(f"{os.environ.get('CAMPAIGN_SEED', '0')} {request.node.name}")
