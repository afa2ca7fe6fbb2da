"""The pages in docs/: nothing lost, every link has a target, and as new as the sources."""

import ast
import io
import re
import tokenize

import pytest
from helpers import ROOT

from common.checkpoint import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_every_label_of_an_equation_stands_on_a_line_of_code_and_the_other_way_round(name):
    text = (ROOT / f"{name}.py").read_text()
    equations = re.findall(r"(?m)^    .* \(([a-z])\)$", ast.get_docstring(ast.parse(text)))
    assert equations == list("abcdefghijklmnop"[:len(equations)]) != []
    comments = [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)
                if token.type == tokenize.COMMENT]
    assert set(re.findall(r" \(([a-z])\)", " ".join(comments))) == set(equations)
