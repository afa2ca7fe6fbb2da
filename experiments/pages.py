"""One page per paper: its file with every explanation beside its code, as docs/*.html.

    python -m experiments.pages             writes docs/; needs only the standard library

Nothing is typed twice. Code, text, equations and letters come from the sources (annotate.py takes
them apart), captions from claims.py, tables from the READMEs, figures from assets/, the maps of a
slider from results/maps.json (python -m experiments.maps). tests/programs/test_pages.py fails when
a page is older than these or has lost a line. How a page looks and acts: pages.css and pages.js.
Read next: paper(), then index()."""

import ast
import json
import re
import sys
from base64 import b64encode
from html import escape

from experiments.annotate import PAPERS, ROOT, Source, html

CLAIMS = dict(dtr="T", racedit="R", ditmoe="M", dydit="Y")              # T1 is a claim of DTR
MAPS = ROOT / "experiments/results/maps.json"


def read(file):
    return (ROOT / file).read_text()


# ------------------------------------------------------------------------ Markdown -> HTML


def words(text):
    """A line of Markdown: code, images, links. Paths start at the root of the project."""
    def code(m):
        name = m[1].removesuffix(".py")
        page = name in PAPERS and name != m[1]
        return f'<a href="{name}.html"><code>{m[1]}</code></a>' if page else f"<code>{m[1]}</code>"

    def link(m):
        return f'<a href="{m[2] if "://" in m[2] else "../" + m[2]}">{m[1]}</a>'
    text = re.sub(r"`([^`]+)`", code, html(text))
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    return re.sub(r"\[([^]]+)\]\((\S+?)\)", link, text)


def table(lines):
    """On a phone each cell is a line of its own, which begins with its heading (data-h)."""
    head, _, *rows = [[words(cell.strip()) for cell in line.strip("|").split(" | ")]
                      for line in lines]
    heads = [re.sub("<.*?>", "", h) for h in head]
    out = ["".join(f"<th>{h}</th>" for h in head)]
    out += ["".join(f'<td data-h="{h}"{" class=dash" * (cell == "-")}>{cell}</td>'
                    for h, cell in zip(heads, row)) for row in rows]
    names = ["", *(f' id="{r[0]}"' if re.fullmatch(r"[RMYT]\d+", r[0]) else "" for r in rows)]
    return "<table>{}</table>".format("\n".join(f"<tr{n}>{r}</tr>" for n, r in zip(names, out)))


def markdown(text):
    """The part of Markdown that the READMEs use."""
    out = []
    for i, part in enumerate(re.split(r"```\w*\n(.*?)```\n", text, flags=re.S)):
        for block in [part] if i % 2 else re.split(r"\n\n+", part.strip()):
            mark, lines = block.split(" ")[0], block.split("\n")
            if i % 2:
                out.append(f'<pre tabindex="0">{html(block)}</pre>')
            elif mark in ("#", "##"):
                out.append(f"<h{len(mark)}>{words(block[len(mark) + 1:])}</h{len(mark)}>")
            elif mark.startswith("!["):
                out.append(image(*re.fullmatch(r"!\[(.*)\]\((.*)\)", block).group(2, 1)))
            elif mark == "|":
                out.append(table(lines))
            elif mark == "-":
                items = ("<li>" + words(item) for item in block[2:].split("\n- "))
                out.append(f"<ul>{''.join(items)}</ul>")
            elif block:
                out.append(f"<p>{words(block)}</p>")
    return "\n".join(out)


# ------------------------------------------------------------------------ parts of a page


def image(file, caption):
    """An image that is stored in the page itself."""
    data = b64encode((ROOT / file).read_bytes()).decode()
    return (f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{words(caption)}</figcaption></figure>")


def figures(name):
    """The figures in assets/ whose captions name a claim of this paper; samples of its model."""
    tree = ast.parse(read("experiments/claims.py"))
    captions = next(ast.literal_eval(node.value) for node in tree.body
                    if ast.unparse(node).startswith("CAPTIONS ="))
    mine = re.compile(rf"\b{CLAIMS.get(name, 'none')}\d")
    found = {f"assets/{file}.png": text for file, text in captions.items() if mine.search(text)}
    found |= {file: text for text, file in re.findall(r"!\[(.*?)\]\((.*?)\)", read("README.md"))
              if file.startswith(f"assets/{name}-")}
    return "\n".join(image(f, text) for f, text in found.items() if (ROOT / f).exists())


def ledger():
    """The verdicts of experiments/README.md, which experiments/claims.py has written there."""
    text = read("experiments/README.md")
    return re.search(r"<!-- ledger -->\n(.*?)\n\nContrasts,", text, re.S)[1]


def slider(name):
    maps = json.loads(MAPS.read_text()) if MAPS.exists() else {}
    if name not in maps:
        return ('<p class="none">No map stored: <code>python -m experiments.maps</code> makes it '
                "from a checkpoint.</p>")
    return (f'<section class="maps"><p>{html(maps[name]["text"])}</p><label>data '
            '<input type="range" aria-label="noise level t" value="0" min="0" '
            f'max="{len(maps[name]["t"]) - 1}"> noise <output></output></label>'
            '<div class="tiles"></div><noscript>The slider needs JavaScript.</noscript>'
            f'<script type="application/json">{json.dumps(maps[name], separators=(",", ":"))}'
            "</script></section>")


def shell(name, title, body):
    """A whole page."""
    style, script = read("experiments/pages.css"), read("experiments/pages.js")
    pages = "".join(f'<a href="{p}.html"{" aria-current=page" * (p == name)}>{text}</a>'
                    for p, text in [("index", "Overview"), *((p, f"{p}.py") for p in PAPERS)])
    return (f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html(title)}'
            '</title>\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<link rel="icon" href="data:,">\n<style>\n{style}</style>\n'
            f'<nav aria-label="pages">{pages}</nav>\n<main>\n{body}\n</main>\n'
            f"<script>\n{script}</script>\n</html>\n")


def paper(name):
    """The docstring with the maps and figures beside it, then the code in rows of two columns."""
    source = Source(read(f"{name}.py"))
    first, _, rest = source.doc.partition("\n\n")
    title, *by = re.split(r" {2,}|\n", first)
    aside = jump = ""
    if name != "dit":
        aside = f'<h2 id="maps">Over the noise levels</h2>{slider(name)}'
        jump = '<a href="#maps">over the noise levels</a> | '
    if name in CLAIMS:
        rows = re.findall(rf"\| ({CLAIMS[name]}\d+) \| (.*?) \| .*? \| (.*?) \|", ledger())
        items = "".join(f'<li><a href="index.html#{claim}">{claim}</a> {words(what)}: '
                        f"<b>{words(verdict)}</b>" for claim, what, verdict in rows)
        aside += f"<h2>What the paper says, and what we saw</h2><ul>{items}</ul>"
    aside += figures(name)
    out, places, section = [], {n: i for n, i in source.places.items() if "." not in n}, 0
    for explanations, code, heading in source.rows():
        if heading:
            section += 1
            out.append(f'<h2 id="part-{section}">{html(heading)}</h2>')
        out.append(f'<div class="row"><div><div>{"".join(explanations)}</div></div>'
                   f'<pre>{"".join(code)}</pre></div>')
    contents = "".join(f'<a href="#L{line}">{n}</a>' for n, line in places.items())
    return shell(name, title, (
        f'<header><h1>{html(title)}</h1><p>{source.inline(" ".join(by))} '
        f'<br><a href="../{name}.py">{name}.py</a> | {jump}<a href="#code">the code</a></p>'
        "</header>\n"
        f'<div class="top"><article>'
        f'{source.prose(rest)}</article>\n<aside>{aside}</aside></div>\n'
        f'<h2 id="code">The code</h2>\n<nav class="contents" aria-label="definitions">'
        f"{contents}</nav>\n" + "\n".join(out)))


def index():
    text = re.sub("<!--.*?-->\n", "", read("README.md")).split("\n## What the papers say")[0]
    title = text.split("\n")[0].removeprefix("# ")
    more = words("[Contrasts, seeds and intervals](experiments/README.md)")
    return shell("index", title, "\n".join([
        markdown(text), "<h2>What the papers say, and what we saw</h2>", markdown(ledger()),
        f"<p>{more}</p>"]))


def write(folder):
    folder.mkdir(exist_ok=True)
    for name in ("index", *PAPERS):
        text = index() if name == "index" else paper(name)
        (folder / f"{name}.html").write_text(text)
        print(f"{folder / name}.html: {len(text) / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(write(ROOT / "docs"))
