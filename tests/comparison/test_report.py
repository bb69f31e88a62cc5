import re

import pytest

from vlkr.comparison.report import latex
from vlkr.comparison.tables import Table, mean_std, p_value


def test_latex_is_booktabs_and_escaped():
    rows = [["a_b", "top-1 %"], ["x & y", "94.1 ± 0.3"], [r"\{~^", "<0.001"]]
    text = latex([Table("50 % of #1", tuple(rows[0]), rows[1:], "a_b")], "model $tiny$")
    lines = text.splitlines()
    assert lines[0] == "% model $tiny$"
    assert r"\caption{50 \% of \#1. a\_b.}" in lines
    assert r"\begin{tabular}{lr}" in lines
    assert r"a\_b & top-1 \% \\" in lines
    assert r"x \& y & 94.1 $\pm$ 0.3 \\" in lines
    assert r"\textbackslash{}\{\textasciitilde{}\textasciicircum{} & $<$0.001 \\" in lines
    rules = [line for line in lines if line.endswith("rule")]
    assert rules == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert len(re.findall(r"\\begin", text)) == len(re.findall(r"\\end", text)) == 2


@pytest.mark.parametrize(
    ("p", "text"), [(0.5, "0.500"), (0.001, "0.001"), (0.0009, "<0.001"), (None, "")]
)
def test_p_values(p, text):
    assert p_value(p) == text


def test_spread_of_other_units():
    assert mean_std([1.0, 2.0], scale=1, digits=2) == "1.50 ± 0.71"
