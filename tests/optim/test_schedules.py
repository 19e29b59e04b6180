import pytest
import torch

from cifarnet.config import validate
from cifarnet.errors import UserError
from cifarnet.optim.schedules import Steps, WarmupCosine


def rates(steps, make):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    schedule, seen = make(optimizer, steps), []
    for _ in range(steps + 1):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_rates_equal_those_by_hand():
    half = 2**0.5 / 2
    cosine = [1, 2, 2, 1 + half, 1, 1 - half, 0]  # 2 of 6 steps of warm-up, then cos 0, π/4, π/2, …
    assert rates(6, lambda *made: WarmupCosine(*made, warmup=1 / 3)) == pytest.approx(cosine)
    assert rates(4, lambda *made: WarmupCosine(*made, warmup=0)) == pytest.approx([2, 1 + half, 1, 1 - half, 0])
    assert rates(1, WarmupCosine) == pytest.approx([2, 0])
    assert rates(4, Steps) == pytest.approx([2, 2, 0.2, 0.02, 0.02])
    assert rates(4, lambda *made: Steps(*made, milestones=[0.25], gamma=0.5)) == pytest.approx([2, 1, 1, 1, 1])


@pytest.mark.parametrize(
    "overrides",
    [
        ["scheduler=warmup_cosine", "scheduler.warmup=5"],
        ["scheduler=step", "scheduler.milestones=[30, 40]"],
        ["scheduler=step", "scheduler.gamma=0"],
    ],
)
def test_settings_out_of_range_are_refused(config, overrides):
    with pytest.raises(UserError) as error:
        validate(config(*overrides))
    assert str(error.value).startswith(overrides[1])
