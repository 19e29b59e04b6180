import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from cifarnet.errors import UserError
from cifarnet.sweeps import space


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a=1,2", CategoricalDistribution(["1", "2"])),
        ("optimizer=sgd,adamw", CategoricalDistribution(["sgd", "adamw"])),
        ("a=range(16,65,16)", IntDistribution(16, 64, step=16)),
        ("a=range(0.0,0.5,0.1)", FloatDistribution(0.0, 0.4, step=0.1)),
        ("a=interval(0,1)", FloatDistribution(0, 1)),
        ("a=tag(log,interval(0.001,0.1))", FloatDistribution(0.001, 0.1, log=True)),
        ("a=int(interval(2,8))", IntDistribution(2, 8)),
        ("a=tag(log,range(1,65))", IntDistribution(1, 64, log=True)),
        ("a=range(64,15,-16)", IntDistribution(16, 64, step=16)),
        ("a=range(0,1000000000000)", IntDistribution(0, 999_999_999_999)),
        ("a='x,y','it\\'s'", CategoricalDistribution(["'x,y'", "'it\\'s'"])),
        ("a=[1,2],[3]", CategoricalDistribution(["[1,2]", "[3]"])),
    ],
)
def test_sweeps_become_distributions(override, expected):
    assert space.distribution(OverridesParser.create().parse_override(override)) == expected


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("a=interval(5,1)", "low"),
        ("a=interval(nan,1)", "use finite numbers"),
        ("a=interval(0,inf)", "use finite numbers"),
        ("a=tag(log,interval(0,1))", "low"),
        ("a=tag(log,range(1,10,2))", "step"),
        ("a=tag(lgo,interval(1,2))", "the only supported tag is log"),
        ("a=tag(log,choice(1,2))", "on intervals and ranges"),
        ("a=range(0,1,0)", "has no values"),
        ("a=range(0.0,1.0,0.0)", "has no values"),
        ("a=range(5,1)", "has no values"),
        ("a=range(0,inf)", "use finite numbers"),
        (f"a=range(0,1{'0' * 400}.0)", "use finite numbers"),
        ("a=tag(log,interval(0.001,1e300))", "use finite numbers below 2**63"),
        ("a=interval(-1e308,1e308)", "use finite numbers below 2**63"),
        ("a=range(0,1e18,1e-18)", "too many values"),
    ],
)
def test_a_wrong_sweep_is_reported_in_one_line(override, named):
    with pytest.raises(UserError) as error:
        space.distribution(OverridesParser.create().parse_override(override))
    assert override in str(error.value)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
