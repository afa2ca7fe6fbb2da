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
from itertools import count

from experiments.annotate import PAPERS, ROOT, Source, html, stop_once, terms

CLAIMS = dict(dtr="T", racedit="R", ditmoe="M", dydit="Y")              # T1 is a claim of DTR
MAPS = ROOT / "experiments/results/maps.json"


def read(file):
    return (ROOT / file).read_text()


# ------------------------------------------------------------------------ Markdown -> HTML


def words(text):
    """A line of Markdown: code, images, links. Paths start at the root of the project."""
    def code(m):
        name, text = m[1].removesuffix(".py"), f"<code>{terms(m[1], str)}</code>"
        page = name in PAPERS and name != m[1]
        return f'<a href="{name}.html">{text}</a>' if page else text

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
    return (f'<figure><img alt="{escape(caption).replace("`", "")}" '
            f'src="data:image/png;base64,{data}"><figcaption>{words(caption)}</figcaption>'
            "</figure>")


def figures(name):
    """The figures in assets/ whose captions name a claim of this paper; samples of its model."""
    tree = ast.parse(read("experiments/claims.py"))
    captions = next(ast.literal_eval(node.value) for node in tree.body
                    if ast.unparse(node).startswith("CAPTIONS ="))
    found = {f"assets/{file}.png": text for file, text in captions.items()
             if re.search(rf"\b{CLAIMS.get(name, 'none')}\d", text)}
    readme = read("README.md")                  # there, "the model above" is that of the command
    command = re.search(rf"train\.py --model {name}\b[^&|#\n]*\w", readme) or [f"{name}.py"]
    found |= {file: text.replace("the model above", f"`{command[0]}`")
              for text, file in re.findall(r"!\[(.*?)\]\((.*?)\)", readme)
              if file.startswith(f"assets/{name}-")}
    return "\n".join(image(f, text) for f, text in found.items() if (ROOT / f).exists())


def ledger():
    """The verdicts of experiments/README.md, which experiments/claims.py has written there."""
    text = read("experiments/README.md")
    return re.search(r"<!-- ledger -->\n(.*?)\n\nContrasts,", text, re.S)[1]


def slider(name):
    maps = json.loads(MAPS.read_text()) if MAPS.exists() else {}
    if name not in maps:
        return ""
    return (f'<h2 id="maps">Over the noise levels</h2><section class="maps">'
            f'<p>{html(maps[name]["text"])}</p><label>data <input type="range" '
            f'aria-label="noise level t" value="0" min="0" max="{len(maps[name]["t"]) - 1}"> '
            'noise <output></output></label>'
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


def claims(letter):
    """The claims of a paper with their verdicts; those without one in one line, R1-R3, R5."""
    items, others = "", {}
    row = rf"\| ({letter}\d+) \| (.*?) \| .*? \| (.*?) \|"
    for claim, what, verdict in re.findall(row, ledger()):
        link = f'<a href="index.html#{claim}">{claim}'
        if not re.match("not (run yet|testable)", verdict):
            items += f"<li>{link}</a> <span>{words(what)}: <b>{words(verdict)}</b></span>"
            continue
        runs, n = others.setdefault(verdict, []), int(claim[1:])
        if not runs or runs[-1][2] != n - 1:
            runs.append([link, n, n])
        runs[-1][2] = n
    lines = (", ".join(f"{link}{f'-{letter}{last}' * (last > first)}</a>" for link, first, last
                       in runs) + f": {verdict}" for verdict, runs in others.items())
    return (f"<h2>What the paper says, and what we saw</h2>{items and f'<ul>{items}</ul>'}"
            f"<p>{'; '.join(lines)}</p>")


def paper(name):
    """The docstring with the maps and figures beside it, then the code in rows."""
    source = Source(read(f"{name}.py"))
    first, _, rest = source.doc.partition("\n\n")
    title, *by = re.split(r" {2,}|\n", first)
    maps, found = slider(name), claims(CLAIMS[name]) if name in CLAIMS else ""
    start, more = re.fullmatch(r"(.*?</pre>(?:\n<pre.*?</pre>)*)\n(.*)", source.prose(rest),
                               re.S).groups()               # ends with the first drawing
    out, rows, parts = [], source.rows(), count(1)
    for explanations, code, heading in rows:
        if heading:
            out.append(f'<h2 id="part-{next(parts)}">{html(heading)}</h2>')
        text = f'<div><div>{"".join(explanations)}</div></div>' * bool(explanations)
        out.append(f'<div class="row{" beside" * source.beside(explanations, code)}">{text}<pre>'
                   f'{"".join(code)}</pre></div>')
    return shell(name, title, stop_once(
        f'<header><h1>{html(title)}</h1><p>{source.inline(" ".join(by))}</p><p class="go">'
        f'<b>Read next: {source.inline(source.next)}</b> <a href="#code">the code</a> '
        f'{maps and """<a href="#maps">over the noise levels</a> """}'
        f'<a href="../{name}.py">{name}.py</a></p></header>\n'
        f'<article id="text" class="top"><div>{start}</div>\n<aside>{maps}{found}'
        f'{figures(name)}</aside>\n<div>{more}</div></article>\n<h2 id="code">The code</h2>\n'
        '<p class="none">Missing line numbers: comments and docstrings, shown with their code, and '
        'empty lines.</p>\n<nav class="contents" aria-label="definitions">'
        f"{source.contents(rows)}</nav>\n" + "\n".join(out)))


def index():
    text = re.sub("<!--.*?-->\n", "", read("README.md")).split("\n## What the papers say")[0]
    title = text.split("\n")[0].removeprefix("# ")
    return shell("index", title, "\n".join([
        markdown(text), "<h2>What the papers say, and what we saw</h2>", markdown(ledger()),
        f"<p>{words('[Contrasts, seeds and intervals](experiments/README.md)')}</p>"]))


def write(folder):
    folder.mkdir(exist_ok=True)
    for name in ("index", *PAPERS):
        text = index() if name == "index" else paper(name)
        (folder / f"{name}.html").write_text(text)
        print(f"{folder / name}.html: {len(text) / 1000:.0f} kB")


if __name__ == "__main__":
    sys.exit(__doc__ if sys.argv[1:] else write(ROOT / "docs"))
