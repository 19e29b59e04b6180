"""The trained networks of this package, which are used by name: `cifarnet.load("speedrun")`.

Each is a folder in the Hugging Face format, with a model card. `python benchmarks/ladder.py --ship` writes them.
"""

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the names of the trained networks."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
