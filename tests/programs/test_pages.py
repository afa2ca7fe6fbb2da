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
VOID = {"meta", "link", "input", "br", "img", "wbr"}


def source(name):
    return (ROOT / f"{name}.py").read_text()


class Page(HTMLParser):
    """What a page holds: lines {number: code}, prose {"first-last": explanation of these lines},
    text {tag: text inside it}, ids, links (the id around a link, its address), and shown: the links
    of equations whose address is shown."""

    def __init__(self, text):
        super().__init__()
        self.lines, self.prose, self.text, self.ids = {}, {}, {}, []
        self.links, self.shown, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "id" in attributes:
            self.ids.append(attributes["id"])
            if re.fullmatch(r"L\d+", attributes["id"]):
                self.lines[int(attributes["id"][1:])] = ""
        if tag not in VOID:
            self.open.append((tag, attributes))
        if tag in ("p", "div", "span") and "article" in {tag for tag, _ in self.open} or tag == "p":
            self.handle_data("\n")              # a block begins
        if tag == "a":
            self.links.append((self.around("id"), attributes["href"]))
            if "data-n" in attributes:          # the number is shown, and is that of the link
                assert attributes["href"] == f"#L{attributes['data-n']}"
                self.shown.append(self.links[-1])

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
        elif numbers and "article" not in tags and "a" != self.open[-1][0] or (
                numbers and self.around("id") == f"L{numbers}"):
            self.lines[int(numbers)] += data
        for tag in tags - ({"article"} if "aside" in tags else set()):
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
            assert f">{heading.lstrip('# -').rstrip(',')}</h2>" in DOCS[name]
        assert text.split() == re.sub(r'"""|(?m:^ *# ?-*)', "", wanted).split(), numbers
    top = {*range(1, lines.index("import math"))}              # the docstring of the file
    left = {*range(1, len(lines) + 1)} - top - explained - {*page.lines}
    assert {lines[n - 1] for n in left} == {""}
    for row in re.findall(r"<pre>(<span.*?)</pre>", DOCS[name], re.S):      # only between rows
        numbers = [*map(int, re.findall(r'id="L(\d+)"', row))]
        assert {*range(numbers[0], numbers[-1])} <= explained | {*numbers}
        assert lines[numbers[0] - 1] and lines[numbers[-1] - 1]
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
        wanted = [f"#L{n}" for n in lines]      # all of them, each with its number
        assert [to for at, to in links if at == f"eq-{label}"] == wanted
        assert [to for at, to in parsed(name).shown if at == f"eq-{label}"] == wanted
        for n in lines:                         # by the comment in the line or above it
            assert (f"L{n}", f"#eq-{label}") in links or n - 1 in Source(source(name)).notes


def test_words_about_the_file_lead_to_a_place_of_the_page():
    """On a page no docstring stands "above", and no line begins with "# ---"."""
    for name in PAPERS:
        text = source(name)
        for words, place in (("docstring above", "#text"), ('first "# -----" line', "#part-1")):
            assert text.count(words) == DOCS[name].count(f'<a href="{place}">{words}</a>')
    for name in PAPERS:                         # "balance_loss" in quotes is a key, and no link
        assert not re.search(r'"<a href="#L\d+">\w+</a>"', DOCS[name])
        heading = Source(source(name)).next.split("(")[0].split(",")[0]
        assert re.search(f'Read next: <a href="#L\\d+">{heading}', DOCS[name])


def test_definitions_are_listed_by_the_parts_of_the_file():
    found = re.findall(r'<p><a href="#(code|part-\d)"><b>(.*?)</b></a>(.*?)</p>', DOCS["racedit"])
    assert [part[:2] for part in found] == [("code", "the paper's part"),
                                            ("part-1", "the expert engine"),
                                            ("part-2", "plain DiT parts")]
    assert ">select</a>" in found[0][2] and ">Experts</a>" in found[1][2]
    assert "linear_fp32" in found[2][2] and "__init__" not in str(found)


def test_an_equation_stands_once_beside_the_code():
    for name in PAPERS:
        cards = re.findall(r'class="card" href="#eq-(.)"', DOCS[name])
        assert sorted(cards) == sorted(Source(source(name)).labels)


def test_claims_without_a_verdict_share_a_line(monkeypatch):
    rows = [("T1", "not run yet"), ("T2", "not run yet"), ("T3", "yes"), ("T4", "not run yet"),
            ("T5", "not testable here")]
    monkeypatch.setattr(pages, "ledger", lambda: "\n".join(
        f"| {claim} | says {claim} | Fig. 1 | {verdict} | - | - |" for claim, verdict in rows))
    found = pages.claims("T")
    assert found.count("<li>") == 1 and "says T3: <b>yes</b>" in found
    text = re.sub("<.*?>", "", found.split("<p>")[1])
    assert text == "T1-T2, T4: not run yet; T5: not testable here"


def test_a_caption_stands_alone():
    caption = "80 digits by <code>train.py <var>--model</var> racedit <var>--tiny</var></code>"
    assert caption in DOCS["racedit"]
    assert not any("model above" in DOCS[name] for name in PAPERS)


def test_no_line_ends_inside_a_number_an_option_or_a_comparison():
    mark = Source('"""Letters: B batch."""\n').inline
    assert mark("1e-4, --path, i != j") == "<var>1e-4</var>, <var>--path</var>, <var>i != j</var>"
    assert mark("t = 0 is data") == "<var>t = 0</var> is data"
    assert mark("x = f(2), a top-k") == "x = f(2), a top-k"
    painted = Source('"""Letters: B batch."""\nx = nn.Linear(a_b, c())\n').paint()[2]
    assert painted == "x = nn.<wbr>Linear(<wbr>a_b, c())"   # a narrow screen may break it here


def test_colours_can_be_told_apart():
    """WCAG: 4.5 for text, also on a marked line; 3 for the underline of a link."""
    def light(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05

    def contrast(a, b):
        return max(light(a) / light(b), light(b) / light(a))
    style = (ROOT / "experiments/pages.css").read_text()
    for scheme in re.findall(r":root \{(.*?)\n\}", style, re.S):
        colour = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        for ground in ("paper", "code", "mark"):
            for text in ("ink", "soft", "link", "word", "text"):
                assert contrast(colour[text], colour[ground]) >= 4.5, (text, ground)
        assert contrast(colour["dot"], colour["code"]) < 2.5       # a letter is weaker than a link
    assert "text-decoration-color: var(--link)" in style


def test_letters_explain_themselves():
    assert ('aria-label="B batch; L = (S/P)^2 tokens; D width">(B, L, D)</abbr>') in DOCS["dtr"]
    assert 'aria-label="T tasks">T</abbr>' in DOCS["dtr"]                   # in an equation
    assert 'aria-label="lambda the target ratio">lambda</abbr>' in DOCS["dydit"]
    about_h = "H heads, and also the number of groups (each has 4D/H channels)"
    assert Source(source("dydit")).letters["H"] == about_h                  # a comma in the meaning
    for name in PAPERS:                         # a letter alone: XL is no L, Fig. 3 no shape
        shapes = re.findall(r"<abbr[^>]*>(.*?)</abbr>", DOCS[name])
        assert shapes and not [s for s in shapes if re.search(r"XL|Fig|Table", s)]
        stops = re.findall(r'<abbr tabindex="0"[^>]*>(.*?)</abbr>', DOCS[name])
        assert len(stops) == len({*stops}) == len({*shapes})    # the Tab key stops once at each
    assert "(groups,)</abbr>" not in DOCS["racedit"] and "(n, in)</abbr>" not in DOCS["racedit"]


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


def test_a_model_without_a_map_has_no_slider(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "MAPS", tmp_path / "none.json")
    page = pages.paper("dtr")
    assert not any(words in page for words in ('type="range"', "#maps", "noise levels<"))


BROWSER = """<body><script>
const found = {}, frames = [];
function measure(name, width, page) {
  const root = page.contentDocument.documentElement, query = s => root.querySelector(s);
  const one = found[name + width] = {width: root.scrollWidth};
  const row = query(".beside");
  if (row) {
    const [text, code] = [...row.children].map(part => part.getBoundingClientRect());
    one.beside = text.left >= code.right && Math.abs(code.top - text.top) < 1;
    one.below = code.top >= text.bottom;
    const lines = [...root.querySelectorAll("pre [id]")], line = lines[lines.length >> 1];
    page.contentWindow.location.hash = line.id;                   // the lines before it are seen
    one.jump = line.getBoundingClientRect().top;
  }
  one.left = 0;
  for (const letters of root.querySelectorAll("abbr")) {          // none reaches beyond the page
    letters.focus();
    one.width = Math.max(one.width, root.scrollWidth);
    const told = getComputedStyle(letters, "::after");
    one.told = told.content;
    if (told.position == "absolute")
      one.left = Math.min(one.left, letters.getBoundingClientRect().left + parseFloat(told.left));
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
for (const [name, address] of PAGES) for (const width of [360, 800, 1300, 1500]) {
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
        phone, wide = found[f"{name}360"], found[f"{name}1500"]
        for width in (360, 800, 1300, 1500):
            assert found[f"{name}{width}"]["width"] <= width, (name, width)
            assert found[f"{name}{width}"]["left"] >= 0, (name, width)
            assert name == "index" or 200 < found[f"{name}{width}"]["jump"] < 400, (name, width)
        if name != "index":
            assert wide["beside"] and phone["below"] and found[f"{name}1300"]["below"], name
            assert phone["told"] == wide["told"] != "none", name    # letters explain themselves
        assert name not in stored or phone["changed"] and wide["changed"], name
