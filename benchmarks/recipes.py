"""Cost of each recipe: ms per step of the baseline, with one recipe at a time.

python benchmarks/recipes.py [--turns 5]
"""

from collections.abc import Sequence
from functools import partial

import common
from cifarnet.cli import CONFIGS
from steps import compose_baseline, seconds_a_step

# recipes with a mandatory setting, such as a teacher's checkpoint, are left out
RECIPES = {
    file.stem: [f"+recipe={file.stem}"]
    for file in sorted((CONFIGS / "recipe").glob("*.yaml"))
    if "???" not in file.read_text("utf-8")
}
SIDES = {"as configured": [], **RECIPES, "objective=focal": ["objective=focal"], "data.cutout=8": ["data.cutout=8"]}


def milliseconds(overrides: Sequence[str], recipe: Sequence[str]) -> float:
    return 1000 * seconds_a_step(compose_baseline(*overrides, *recipe))


def main() -> None:
    sides = {name: partial(milliseconds, recipe=recipe) for name, recipe in SIDES.items()}
    values = common.take_turns(sides, common.parser(__doc__, turns=5).parse_args())
    common.report("recipes", "ms a step", values, base="as configured")


if __name__ == "__main__":
    main()
