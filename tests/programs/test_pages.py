"""The pages in docs/: nothing lost, every link has a target, and as new as the sources."""

import ast
import functools
import html
import io
import json
import re
import shutil
import subprocess
import sys
import tokenize
from html.parser import HTMLParser

import pytest
from helpers import ROOT, run_cli, write_model

from common.checkpoint import MODELS
from experiments import maps, pages
from experiments.annotate import PAPERS, Source

NAMES = ("index", *PAPERS)
DOCS = {name: (ROOT / f"docs/{name}.html").read_text() for name in NAMES}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome",
                                                "chrome"))), None)
VOID = {"meta", "link", "input", "br", "img"}


def source(name):
    return (ROOT / f"{name}.py").read_text()


class Page(HTMLParser):
    """What a page holds: lines {number: code}, prose {"first-last": explanation of these lines},
    text {tag: text inside it}, ids, and links (the id around a link, its address)."""

    def __init__(self, text):
        super().__init__()
        self.lines, self.prose, self.text, self.ids, self.links, self.open = {}, {}, {}, [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "id" in attributes:
            self.ids.append(attributes["id"])
            if re.fullmatch(r"L\d+", attributes["id"]):
                self.lines[int(attributes["id"][1:])] = ""
        if tag not in ("meta", "link", "input", "br", "img"):
            self.open.append((tag, attributes))
        if tag in ("p", "div", "span") and "article" in {tag for tag, _ in self.open} or tag == "p":
            self.handle_data("\n")              # a block begins
        if tag == "a":
            self.links.append((self.around("id"), attributes["href"]))

    def handle_endtag(self, tag):
        while self.open.pop()[0] != tag:
            pass

    def around(self, key):
        return next((a[key] for _, a in reversed(self.open) if key in a), None)

    def handle_data(self, data):
        tags, numbers = {tag for tag, _ in self.open}, self.around("data-n")
        if self.around("class") == "card":
            return                              # an equation of the docstring, shown once more
        if numbers and "-" in numbers:
            self.prose[numbers] = self.prose.get(numbers, "") + data
        elif numbers and "article" not in tags:
            self.lines[int(numbers)] += data
        for tag in tags:
            self.text[tag] = self.text.get(tag, "") + data


@functools.cache
def parsed(name):
    return Page(DOCS[name])


# ------------------------------------------------------------------------ the sources in the pages


@pytest.mark.parametrize("name", MODELS)
def test_every_label_of_an_equation_stands_on_a_line_of_code_and_the_other_way_round(name):
    text = source(name)
    equations = re.findall(r"(?m)^    .* \(([a-z])\)$", ast.get_docstring(ast.parse(text)))
    assert equations == list("abcdefghijklmnop"[:len(equations)]) != []
    comments = [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)
                if token.type == tokenize.COMMENT]
    assert set(re.findall(r" \(([a-z])\)", " ".join(comments))) == set(equations)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_what_the_sources_give_now(name):
    now = pages.index() if name == "index" else pages.paper(name)
    assert DOCS[name] == now, "older than its sources: python -m experiments.pages"


def test_the_pages_need_only_the_standard_library():
    """Not even torch: -S leaves out site-packages."""
    code = "from experiments import pages; print(len(pages.paper('racedit')))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True)
    assert int(done.stdout) == len(DOCS["racedit"]), done.stderr.decode()


@pytest.mark.parametrize("name", PAPERS)
def test_no_line_of_a_file_is_lost_or_changed(name):
    """Code comes back letter for letter, explanations word for word."""
    page, lines = parsed(name), source(name).split("\n")[:-1]
    for number, line in page.lines.items():
        assert line == lines[number - 1]
    explained = set()
    for numbers, text in page.prose.items():
        first, last = map(int, numbers.split("-"))
        explained |= {*range(first, last + 1)}
        wanted = "\n".join(lines[first - 1:last])
        if wanted.startswith("# ---"):          # a ruler: its first line is a heading
            heading, wanted = wanted.split("\n", 1)
            assert f">{heading.lstrip('# -')}</h2>" in DOCS[name]
        assert text.split() == re.sub(r'"""|(?m:^ *# ?-*)', "", wanted).split(), numbers
    top = {*range(1, lines.index("import math"))}              # the docstring of the file
    assert top | explained | {*page.lines} == {*range(1, len(lines) + 1)}
    assert not explained & {*page.lines}
    title, _, rest = ast.get_docstring(ast.parse(source(name))).partition("\n\n")
    assert page.text["header"].split()[:len(title.split())] == title.split()
    assert page.text["article"].split() == rest.split()


def test_code_is_coloured_and_an_f_string_is_one_string():
    painted = Source('"""Letters: B batch."""\nx = f"{1 + 2} ok"  # (B, 3)\n').paint()
    assert painted[2] == ('x = <s>f"{1 + 2} ok"</s><i>  </i><em># <abbr tabindex="0" '
                          'aria-label="B batch">(B, 3)</abbr></em>')


# ------------------------------------------------------------------------ links, letters, size


@pytest.mark.parametrize("name", NAMES)
def test_every_link_has_a_target(name):
    page = parsed(name)
    assert len(set(page.ids)) == len(page.ids)
    for _, address in page.links:
        file, _, place = address.partition("#")
        if address.startswith("https://arxiv.org/abs/"):
            continue
        if file in ("", *(f"{other}.html" for other in NAMES)):
            target = parsed(file.removesuffix(".html") or name)
            assert not place or place in target.ids, address
        else:
            assert (ROOT / "docs" / file).exists() and not place, address


@pytest.mark.parametrize("name", PAPERS)
def test_an_equation_links_to_its_lines_and_they_link_back(name):
    links, labels = parsed(name).links, Source(source(name)).labels
    assert {at for at, _ in links if at and at.startswith("eq-")} == {f"eq-{q}" for q in labels}
    for label, lines in labels.items():
        assert [to for at, to in links if at == f"eq-{label}"] == [f"#L{n}" for n in lines]
        for n in lines:                         # by the comment in the line or above it
            assert (f"L{n}", f"#eq-{label}") in links or n - 1 in Source(source(name)).notes


def test_letters_explain_themselves():
    assert ('aria-label="B batch; L = (S/P)^2 tokens; D width">(B, L, D)</abbr>') in DOCS["dtr"]
    assert 'aria-label="T tasks">T</abbr>' in DOCS["dtr"]                   # in an equation
    assert 'aria-label="lambda the target ratio">lambda</abbr>' in DOCS["dydit"]
    about_h = "H heads, and also the number of groups (each has 4D/H channels)"
    assert Source(source("dydit")).letters["H"] == about_h                  # a comma in the meaning
    for name in PAPERS:                         # a letter alone: XL is no L, Fig. 3 no shape
        shapes = re.findall(r"<abbr[^>]*>(.*?)</abbr>", DOCS[name])
        assert shapes and not [s for s in shapes if re.search(r"XL|Fig|Table", s)]


def test_the_overview_has_the_ledger_and_the_reading_order():
    page = parsed("index")
    assert {f"{c}{i}" for c in "RMYT" for i in range(1, 11)} <= {*page.ids}
    assert {f"{name}.html" for name in PAPERS} <= {to for _, to in page.links}
    assert "which work can be left out?" in page.text["td"]


def test_the_pages_load_nothing_and_are_small():
    assert sum(len(text.encode()) for text in DOCS.values()) <= 3_000_000
    for text in DOCS.values():
        assert not re.search(r'(?:src|srcset)="(?!data:)|<link(?! rel="icon" href="data:)|@import|'
                             r"url\(|fetch\(|import\(|XMLHttp|<iframe", text)


# ------------------------------------------------------------------------ the maps, in a browser


def test_maps_are_strings_of_one_character_per_cell(tmp_path, few_digits):
    def write(name):
        file = tmp_path / f"{name}-digits.pt"
        write_model(file, name, size=28, patch=4, channels=1, dim=32, heads=2)
    write("racedit")
    write("ditmoe")
    out, _ = run_cli(maps, "--checkpoints", tmp_path, "--out", tmp_path / "maps.json")
    assert "dydit-digits.pt: missing" in out
    found = json.loads((tmp_path / "maps.json").read_text())
    assert set(found) == {"dtr", "racedit", "ditmoe"}
    write("dydit")
    run_cli(maps, "--checkpoints", tmp_path, "--out", tmp_path / "maps.json")
    found = json.loads((tmp_path / "maps.json").read_text())
    assert len(found["dydit"]["tiles"]) == 10
    for entry in (*found.values(), *json.loads(pages.MAPS.read_text()).values()):
        for tile in entry["tiles"]:
            assert len(tile["frames"]) == len(entry["t"])
            assert len({len(frame) for frame in tile["frames"]}) == 1
            assert len(tile["frames"][0]) % tile["columns"] == 0
            assert tile["kind"] != "heat" or int(max(max(tile["frames"])), 36) <= tile["most"]
        assert all(len(curve["values"]) == len(entry["t"]) for curve in entry["curves"])
    first, last = (found["dtr"]["tiles"][1]["frames"][i] for i in (0, -1))
    assert first == "1" * 102 + "0" * 26 and last == "0" * 26 + "1" * 102   # beta = 0.8, D = 128


def test_a_model_without_a_map_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "MAPS", tmp_path / "none.json")
    assert "No map stored" in pages.paper("racedit") and 'type="range"' not in pages.paper("dtr")


BROWSER = """<body><script>
const found = {}, frames = [];
function measure(name, width, page) {
  const root = page.contentDocument.documentElement, query = s => root.querySelector(s);
  const one = found[name + width] = {width: root.scrollWidth};
  const row = [...root.querySelectorAll(".row")].find(r => r.firstChild.textContent.length > 40);
  if (row) {
    const [text, code] = [...row.children].map(part => part.getBoundingClientRect());
    one.beside = code.left >= text.right && Math.abs(code.top - text.top) < 1;
  }
  for (const letters of root.querySelectorAll("abbr")) {          // none reaches beyond the page
    letters.focus();
    one.width = Math.max(one.width, root.scrollWidth);
    one.told = getComputedStyle(letters, "::after").content;
  }
  const slider = query("input");
  if (slider) {
    const look = () => [...root.querySelectorAll("canvas")].map(c => c.toDataURL()).join();
    const before = look(), said = query("output").textContent;
    slider.value = slider.max;
    slider.dispatchEvent(new Event("input"));
    one.changed = look() != before && query("output").textContent != said;
  }
}
addEventListener("load", () => {
  for (const [name, width, page] of frames) measure(name, width, page);
  document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>";
});
for (const [name, address] of PAGES) for (const width of [360, 1300]) {
  const page = document.body.appendChild(document.createElement("iframe"));
  page.style.width = width + "px"; page.style.height = "800px"; page.style.border = 0;
  page.src = address;
  frames.push([name, width, page]);
}
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
def test_in_a_browser_a_page_fits_a_phone_and_its_slider_changes_the_picture(tmp_path):
    addresses = [[name, (ROOT / f"docs/{name}.html").as_uri()] for name in NAMES]
    (tmp_path / "all.html").write_text(BROWSER.replace("PAGES", json.dumps(addresses)))
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                           "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'user'}",
                           (tmp_path / "all.html").as_uri()], capture_output=True, text=True,
                          timeout=120)
    found = json.loads(html.unescape(re.search("<pre>(.*?)</pre>", done.stdout)[1]))
    stored = json.loads(pages.MAPS.read_text())
    for name in NAMES:
        phone, wide = found[f"{name}360"], found[f"{name}1300"]
        assert phone["width"] <= 360 and wide["width"] <= 1300, name
        if name != "index":
            assert wide["beside"] and not phone["beside"], name
            assert phone["told"] == wide["told"] != "none", name    # letters explain themselves
        assert name not in stored or phone["changed"] and wide["changed"], name
