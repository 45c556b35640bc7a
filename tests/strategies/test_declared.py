"""Strategy classes as declarations: options by keyword, a rule of their own or none."""

import pytest
from strategy_rounds import STRATEGIES

from fl_bgmd.strategies import BGMD, RobustStrategy


def test_arguments_are_by_keyword_and_known() -> None:
    for cls in {entry[0] for entry in STRATEGIES.values()}:
        with pytest.raises(TypeError):
            cls(0.5)
        with pytest.raises(TypeError, match="no_such_option"):
            cls(no_such_option=1)


def test_the_base_class_takes_a_rule_and_the_others_have_one() -> None:
    with pytest.raises(TypeError, match=r"rule is '' for RobustStrategy; allowed: a spec such as"):
        RobustStrategy()
    with pytest.raises(TypeError, match=r"rule is 'gmd' for BGMD; allowed: none"):
        BGMD("gmd")
    assert str(RobustStrategy("gmd:tol=1e-3", mixing="bucketing:3").rule) == (
        "gmd:tol=0.001+bucketing:bucket-size=3"
    )
