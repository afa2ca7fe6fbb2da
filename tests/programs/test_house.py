"""The layout of the project: which files there are, who imports whom, how long things are."""

import ast
import difflib
import io
import tokenize
from fnmatch import fnmatch
from graphlib import TopologicalSorter

import pytest
from helpers import ROOT

from common.checkpoint import MODELS

HOME = {*(f"{name}.py" for name in (*MODELS, "diffusion", "train", "sample")), "common", "data",
        "experiments", "tests", "assets", "docs", "README.md", "LICENSE", "requirements.txt",
        "pytest.ini", "tour.ipynb"}
TESTS = {"papers", "programs", "robustness", "golden", "helpers.py", "conftest.py", "README.md"}
FOLDERS = ("", "common", "data", "experiments", "tests", "tests/papers", "tests/programs",
           "tests/robustness")
SOURCES = {file.relative_to(ROOT).as_posix(): file.read_text()
           for folder in FOLDERS for file in sorted((ROOT / folder).glob("*.py"))}


@pytest.mark.parametrize("folder, allowed", [("", HOME), ("tests", TESTS)])
def test_a_folder_holds_only_what_belongs_there(folder, allowed):
    ignored = [*(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()), ".*"]
    names = {p.name for p in (ROOT / folder).iterdir()}
    assert {n for n in names if not any(fnmatch(n, pattern) for pattern in ignored)} <= allowed


# ------------------------------------------------------------------------ imports


def imports(name):
    """The files of the project that this one imports, also those that a function imports."""
    package, found = name.rpartition("/")[0], set()
    for node in ast.walk(ast.parse(SOURCES[name])):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package.replace("/", ".") * node.level, node.module]))
            names = [f"{base}.{alias.name}" for alias in node.names] + [base]
        else:
            continue
        for path in (n.replace(".", "/") for n in names):
            homes = [f"{at}{path}{end}" for at in ("", "tests/", f"{package}/")
                     for end in (".py", "/__init__.py")]
            found |= {home for home in homes if home in SOURCES}
    return found


def layer(name):
    return name.removesuffix(".py") if "/" not in name else name.split("/")[0]


BELOW = {**dict.fromkeys((*MODELS, "diffusion"), set()), "common": {"common", "diffusion"},
         "data": {"data", "common", "diffusion"}, "sample": {"data", "common", "diffusion"},
         "train": {"sample", "data", "common", "diffusion"}}


@pytest.mark.parametrize("name", [n for n in SOURCES if layer(n) in BELOW])
def test_imports_point_from_programs_to_data_and_common_to_diffusion(name):
    assert {layer(other) for other in imports(name)} <= BELOW[layer(name)]


def test_imports_have_no_circles_and_nobody_imports_a_test():
    graph = {name: imports(name) - {name} for name in SOURCES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(SOURCES)
    assert "common/cli.py" in graph["train.py"] and "data/digits.py" in graph["data/__init__.py"]
    for name, others in graph.items():
        assert not [other for other in others if "/test_" in other], name
        assert layer(name) == "tests" or "tests" not in map(layer, others), name


# ------------------------------------------------------------------------ lengths


def paper_code(name):
    """The code lines above the first ruler, without comments, docstrings and empty lines."""
    text = SOURCES[f"{name}.py"].split("\n# ------")[0]
    lines, code, before = text.split("\n"), {}, tokenize.NEWLINE
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    starts = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        docstring = token.type == tokenize.STRING and before in starts
        if token.type not in blank and not docstring:
            row, column = token.end
            code[row] = lines[row - 1][:column]
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            before = token.type
    return [line for line in code.values() if line.strip()]


BUDGETS = dict(dtr=35, racedit=110, ditmoe=110, dydit=180)


def test_the_diff_between_a_paper_and_dit_is_short():
    """The table is printed with -s; the README quotes it."""
    control = paper_code("dit")
    print("\n| code above the ruler | lines | added to dit.py | removed | at most |"
          f"\n|---|---|---|---|---|\n| dit.py | {len(control)} | | | |")
    added = {}
    for name, budget in BUDGETS.items():
        mine = paper_code(name)
        signs = [line[0] for line in difflib.unified_diff(control, mine, n=0)][2:]
        added[name] = signs.count("+")
        print(f"| {name}.py | {len(mine)} | {added[name]} | {signs.count('-')} | {budget} |")
    assert all(added[name] <= budget for name, budget in BUDGETS.items()), added


@pytest.mark.parametrize("name, most", [("train.py", 400), ("sample.py", 250)])
def test_a_program_can_be_read_in_one_sitting(name, most):
    assert SOURCES[name].count("\n") <= most


def test_lines_have_at_most_100_columns():
    long = [f"{name}:{i}" for name, text in SOURCES.items()
            for i, line in enumerate(text.split("\n"), 1) if len(line) > 100]
    assert long == []


# ------------------------------------------------------------------------ names

# Words that nobody searches for, which stood here before the field's own terms.
PRIVATE = """Refusal DataError Damaged everywhere find_out make_room keep_memory share_of_lr settle
    keyed index_noise density even_in_log_snr mean_x0 mean_x vb Watch begin_parts Told contests
    reach guess last_stat coin coins spend widths complete_loss judge timetable picture pictures
    """.split()
# Good names for a variable or a field, but not for a function or a class.
PRIVATE_FUNCTIONS = """together join place sound lost full Draw wide mix grid reverse abar walk
    pairs last won notes route hold ramp quiet complete given on kept rank""".split()


def test_private_words_have_given_way_to_the_terms_of_the_field():
    found = {}
    for name, text in SOURCES.items():
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        names = {token.string for token in tokens if token.type == tokenize.NAME}
        defined = {b.string for a, b in zip(tokens, tokens[1:]) if a.string in ("def", "class")}
        found[name] = names & set(PRIVATE) | defined & set(PRIVATE_FUNCTIONS)
    assert not any(found.values()), {name: words for name, words in found.items() if words}
