"""A commented Python file -> HTML in rows: an explanation, and the code that it explains.

Used by experiments/pages.py. Docstrings and comments that stand alone become explanations. The code
is every other line of the file, unchanged, without the empty lines around it. A label (a), (b), ...
links an equation of the module's docstring with the lines that end with the same label. The letters
of "Letters: B batch, ..." explain themselves in shapes, (B, L, D), and in equations.
Read next: Source, then Source.rows()."""

import ast
import io
import keyword
import re
import tokenize
from html import escape
from math import ceil
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parent.parent
PAPERS = ("dit", "dtr", "racedit", "ditmoe", "dydit")
LABEL = re.compile(r"(?<!\S)\(([a-z])\)")
EQUATION = re.compile(r"    (.*?)(?: +\(([a-z])\))?")                    # a line, its label
NOTE = re.compile(r"(.*?\S)(?<!:)(\s{4,})(\S.*)")                      # an equation, a note
ITEM = re.compile(r"(\d\.|-)(?= )")
HEAD = re.compile(r"(?:Equations|Worked example|The [\w' ]{3,40}(?=,)|"
                  r"[A-Z][^:.;(]{2,59}\w(?= ?[:(])|(?:What|Why|Where)[^:.;(]*(?=\.))")
LAST_HEAD = re.compile(r"[^.]+\.?")                    # of the list at the end of the docstring
TIGHT = (r"\d[\d.]*e-\d+|(?<!\S)--?[a-z][\w-]*|"      # no line ends inside: 1e-4, --path, i != j
         r"\(\w{1,6} [-+*/] \w{1,6}\)|"                    # nor inside (1 - m)
         r"\b[\w']+ (?:[!<>]?=|[<>]) [\w.]*\w\b(?![\w'(])")
TERM = re.compile(rf"({TIGHT}|[\w'^]*\([^()]{{1,14}}\))")
IN_SHAPE = re.compile(r"(?<![A-Za-z])(?:E_t|[A-Za-z])(?![A-Za-z0-9])")  # the letters of (B, L, D)
SYMBOL = re.compile(r"(?<!for )(?<![\w^'.])\d*(E_t|lambda|[A-Za-z])(?![\w'(]| =)|[&<>]")
MARKS = re.compile(rf"(?P<tight>{TIGHT})|"
                   r"(?P<above>docstring\s+above)|(?P<ruler>first \"# -+\" line)|"
                   r"arXiv:(?P<arxiv>\d+\.\d+)|(?P<file>[\w/]+)\.(?:py|md)\b|"
                   r"(?<!\S)\((?P<label>[a-z])\)|"
                   r"(?P<shape>\((?:[\w.*/+|^ -]{1,12},)+[\w.*/+|^ -]{0,12}\))|"
                   r"(?P<name>[A-Za-z_]\w+(?:\.\w+)?)(?P<call>\(\))?|[&<>]")


def html(text):
    return escape(text, quote=False)


def stop_once(page):
    """The Tab key stops at the first (B, L, D) of a page only; a pointer can ask all of them."""
    told = set()

    def stop(m):
        text, before = m[2], len(told)
        told.add(text)
        return m[0] if len(told) > before else f'<abbr tabindex="-1"{m[1]}>{text}</abbr>'
    return re.sub(r'<abbr tabindex="0"([^>]*)>(.*?)</abbr>', stop, page)


def terms(text, to_html=html):
    """A formula, in which no line ends inside a term."""
    return "".join(f"<var>{to_html(part)}</var>" if i % 2 else to_html(part)
                   for i, part in enumerate(TERM.split(text)))


def tokens(text):
    """tokenize's tokens. From Python 3.12 on an f-string is many of them: here it is one."""
    start, depth = None, 0
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        kind, start = tokenize.tok_name[t.type], start or t.start
        depth += (kind == "FSTRING_START") - (kind == "FSTRING_END")
        if not depth:
            yield t._replace(type=tokenize.STRING if kind == "FSTRING_END" else t.type, start=start)
            start = None


class Source:
    """A file taken apart. docs {first line: (last line, text)}, notes {line: comment that stands
    alone}, places {name: line}, starts (lines where a definition begins a row), labels {label: its
    lines of code}, equations {label: its lines}, letters {letter: "letter meaning"}."""

    def __init__(self, text):
        self.lines, self.tokens, tree = text.splitlines(), list(tokens(text)), ast.parse(text)
        self.docs, self.places, self.starts = {}, {}, set()
        self.labels, self.equations, self.letters = {}, {}, {}
        comments = [t for t in self.tokens if t.type == tokenize.COMMENT]
        self.notes = {t.start[0]: t.string for t in comments if t.line.lstrip().startswith("#")}
        for t in comments:                              # a note's label belongs to the next line
            for label in LABEL.findall(t.string):
                line = t.start[0] + (t.start[0] in self.notes)
                self.labels.setdefault(label, []).append(line)
        self.define(tree, "")
        self.doc, label = ast.get_docstring(tree), None
        self.next = re.search(r"Read next:\s(.*?)\.(?:\s|$)", self.doc + "Read next: .", re.S)[1]
        for line in self.doc.split("\n"):
            found = EQUATION.fullmatch(line)
            label = found and (found[2] or label)       # until a line that is not indented
            if label:
                self.equations.setdefault(label, []).append(found[1])
        listed = re.search(r"Letters: (.*?)\.(?=\s|$)", self.doc, re.S)[1].replace("\n", " ")
        for item in re.split(r", (?=(?:\w|E_t|lambda) )(?![^(]*\))", listed):
            self.letters[item.split()[0]] = item

    def define(self, node, prefix):
        doc, labelled = ast.get_docstring(node), sum(self.labels.values(), [])
        if doc:
            self.docs[node.body[0].lineno] = node.body[0].end_lineno, doc
        for part in node.body:
            if isinstance(part, (ast.ClassDef, ast.FunctionDef)):
                first = min(n.lineno for n in (part, *part.decorator_list))
                self.places[prefix + part.name] = part.lineno
                if not prefix or ast.get_docstring(part) or any(
                        first <= n <= part.end_lineno for n in labelled):
                    self.starts.add(first)
                self.define(part, f"{part.name}.")

    # ------------------------------------------------------------------------ explanations -> HTML

    def explain(self, text, letters):
        """Text whose letters explain themselves to a pointer, a finger and the keyboard."""
        known = "; ".join(self.letters[c] for c in dict.fromkeys(letters) if c in self.letters)
        return f'<abbr tabindex="0" aria-label="{escape(known)}">{html(text)}</abbr>' if known \
            else html(text)

    def mark(self, m):
        name, file, word, label = m["name"], m["file"], html(m[0]), m["label"]
        if m["shape"]:
            return self.explain(m[0], IN_SHAPE.findall(m[0]))
        if m["tight"]:
            return f"<var>{word}</var>"
        if name and m.string[m.start() - 1:m.start()] == m.string[m.end():m.end() + 1] == '"':
            return word                                 # "balance_loss", a key of aux
        to = (f"https://arxiv.org/abs/{m['arxiv']}" if m["arxiv"]
              else "#text" if m["above"] else "#part-1" if m["ruler"]
              else f"#eq-{label}" if label in self.equations
              else f"#L{self.places[name]}" if name in self.places and (
                  m["call"] or re.search(r"\.|[a-z]_\w", name))
              else f"{file}.html" if file in PAPERS
              else f"../{m[0]}" if file and (ROOT / m[0]).exists() else "")
        return f'<a href="{to}">{word}</a>' if to else word

    def inline(self, text):
        """Text with links to papers, files, definitions and equations."""
        return MARKS.sub(self.mark, text)

    def formula(self, text):
        return terms(text, lambda s: SYMBOL.sub(lambda m: self.explain(m[0], [m[1]]), s))

    def equation(self, line):
        """A line of equations. Beside its label: links to the lines of code that carry it, too."""
        text, label = EQUATION.fullmatch(line).groups()
        found, where = NOTE.fullmatch(text), self.labels.get(label, ())
        text, pad, note = found.groups() if found else (text, "", "")
        name = f' id="eq-{label}" data-q="{label}"' if label else ""
        lines = " ".join(f'<a href="#L{n}" data-n="{n}" aria-label="line {n}"></a>' for n in where)
        go = f"<span>({label}) {lines}</span>" if label else ""
        indent = len(line) - len(line.lstrip()) - 4
        return (f'<div{name} style="--i:{indent}"><span>{self.formula(text)}<i>{pad}</i>'
                f"<em>{terms(note)}</em></span>"
                f"{go}</div>")

    def prose(self, text):
        """A docstring or a comment -> paragraphs, lists, equations and ASCII pictures. In the
        module's docstring paragraphs have headings, and the list at its end can be closed."""
        out = []
        for block in text.split("\n\n"):
            parts, kind = [], ""                        # (kind, lines) of paragraphs, items, ...
            closes = text in self.doc and self.doc.endswith(block) and "\n- " in block
            for line in block.split("\n"):
                item, before = ITEM.match(line), kind
                kind = "pre" if line.startswith("    ") else "li" if item or (
                    kind == "li" and line.startswith("  ")) else "p"
                last = parts[-1][1][-1] if parts else ""
                ended = (text in self.doc and kind == before == "p" and last.endswith(".")
                         and len(f"{last} {line.split()[0]}") <= 100)
                if kind != before or item or ended:     # ended: the next word had room there
                    parts.append((kind, []))
                parts[-1][1].append(line)
            for i, (kind, lines) in enumerate(parts):
                if kind == "pre" and any(map(LABEL.search, lines)):
                    out.append(f'<div class="eqs">{"".join(map(self.equation, lines))}</div>')
                elif kind == "pre":
                    drawing = html(dedent("\n".join(lines)))
                    out.append(f'<pre tabindex="0">{drawing}</pre>')
                elif closes and i == 0:
                    head = LAST_HEAD.match(lines[0])[0]
                    rest = self.inline("\n".join(lines).removeprefix(head).strip())
                    out.append(f"<details open><summary><h3>{self.inline(head)}</h3></summary>"
                               f"{rest and f'<p>{rest}</p>'}")
                else:
                    first = kind == "p" and text in self.doc and (i == 0 or parts[i - 1][0] == "p")
                    head = (HEAD if first else ITEM).match(lines[0])
                    head = head[0] if head else ""
                    rest = self.inline("\n".join(lines).removeprefix(head))
                    out.append(f"<div><h3>{html(head)}</h3>{rest}</div>" if head and first else
                               f"<{kind}>{head and f'<b>{head}</b>'}{rest}</{kind}>")
            out += ["</details>"] * closes
        return re.sub(r"(<li>.*?</li>\n?)+", r"<ul>\g<0></ul>", "\n".join(out), flags=re.S)

    # ------------------------------------------------------------------------ code -> HTML

    def paint(self):
        """-> {line: its code as HTML}. A name of this file links to its definition."""
        painted, ends = dict.fromkeys(range(1, len(self.lines) + 1), ""), {}
        for before, t, after in zip(self.tokens, self.tokens[1:], self.tokens[2:]):
            (n, a), (_, b) = t.start, t.end
            if t.type in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
                continue
            text, gap = html(self.lines[n - 1][a:b]), self.lines[n - 1][ends.get(n, 0):a]
            ends[n] = b
            if t.type == tokenize.COMMENT:
                gap, text = f"<i>{gap}</i>", f"<em>{self.inline(t.string)}</em>"
            elif t.type in (tokenize.STRING, tokenize.NUMBER):
                text = f"<s>{text}</s>"
            elif keyword.iskeyword(t.string):
                text = f"<b>{text}</b>"
            elif before.string in ("def", "class"):
                text = f"<dfn>{text}</dfn>"
            elif t.string in self.places and before.string != "." and (
                    after.string == "(" or t.string[0].isupper()):
                text = f'<a href="#L{self.places[t.string]}">{text}</a>'
            elif t.string in "(." and after.string != ")":
                text += "<wbr>"                         # a narrow screen may break the line here
            painted[n] += gap + text
        return {n: line + html(self.lines[n - 1][ends.get(n, 0):]) for n, line in painted.items()}

    def rows(self):
        """The file below its docstring -> [explanations (HTML), lines of code (HTML), heading]."""
        painted, at, rows, shown = self.paint(), {}, [[[], [], ""]], set()
        for label, lines in self.labels.items():
            for n in lines:
                at.setdefault(n, []).append(label)
        n, empty = self.docs[1][0] + 1, []              # empty lines inside the code of a row
        while n <= len(self.lines):
            last = n
            if rows[-1][1] and (n in self.notes or n in self.starts):
                rows.append([[], [], ""])
                empty = []
            if n in self.docs:
                last, text = self.docs[n]
                rows[-1][0].append(f'<div data-n="{n}-{last}">{self.prose(text)}</div>')
            elif n in self.notes:
                while last + 1 in self.notes:
                    last += 1
                words = [self.notes[i].lstrip("# ") for i in range(n, last + 1)]
                if words[0].startswith("---"):          # a ruler
                    words = [word.lstrip("- ") for word in words]
                    rows[-1][2] = words.pop(0).rstrip(",")
                rows[-1][0].append(f'<p data-n="{n}-{last}">{self.inline(" ".join(words))}</p>')
            elif painted[n]:
                for i in (*empty, n):
                    mark = f' data-q="{"".join(at[i])}"' if i in at else ""
                    indent = len(self.lines[i - 1]) - len(self.lines[i - 1].lstrip())
                    rows[-1][1].append(f'<span id="L{i}" data-n="{i}" style="--i:{indent}"{mark}>'
                                       f"{painted[i]}</span>")
                for label in [label for label in at.get(n, ()) if label not in shown]:
                    card = "<br>".join(NOTE.sub(r"\1 <em>\3</em>", terms(line.strip()))
                                       for line in self.equations[label])
                    rows[-1][0].append(f'<a class="card" href="#eq-{label}" data-q="{label}">'
                                       f"<b>({label})</b> {card}</a>")
                    shown.add(label)
                empty = []
            elif rows[-1][1]:
                empty.append(n)
            n = last + 1
        return rows

    @staticmethod
    def beside(explanations, code):
        """Whether two columns pay: the explanation, of 67 letters to a line, is hardly taller."""
        parts = re.split("<p>|<li>|<br>|</a>|</div>", "".join(explanations))
        lines = sum(ceil(len(re.sub("<.*?>", "", part)) / 67) for part in parts)
        return 0 < lines * 23 < len(code) * 19 + 60         # pixels

    def contents(self, rows):
        """Links to the definitions, one paragraph for each part of the file."""
        names = {n: name for name, n in self.places.items() if "." not in name}
        parts = [["code", "the paper's part", ""]]
        for _, code, heading in rows:
            if heading:
                parts.append([f"part-{len(parts)}", heading.split(",")[0], ""])
            for n in map(int, re.findall(r'id="L(\d+)"', "".join(code))):
                parts[-1][2] += f' <a href="#L{n}">{names[n]}</a>' if n in names else ""
        return "".join(f'<p><a href="#{to}"><b>{html(part)}</b></a>{links}</p>'
                       for to, part, links in parts)
