"""How the notebooks read: size of cells, one definition each, what they show, width of lines; beside goals and others.

    python benchmarks/pages.py [--by-notebook] [--long] [--save]

Lines of a cell are those that are neither blank nor a `#|` directive. The limits look at every line of code: 25 lines
for a cell that exports, 120 characters for a line. Prose is not held to a width. An exported cell is one that exports a
function or class; it has one definition if exactly one stands at its top level. A code cell shows something if an
output is stored with it. A library notebook's name begins with a digit. Cells are counted from 0 (ruff: from 1).

The figures of nbdev, fastcore and course22p2 were counted once, in the same way, over all their notebooks.
"""
import argparse, ast, datetime, json, re, statistics, sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST_CELL, WIDEST_LINE = 25, 120

# what is counted: (goal, nbdev, fastcore, course22p2)
BESIDE = {
    "lines of a code cell, median / 90th percentile": ("6 / 23", "6 / 23", "3 / 10", "3 / 10"),
    "lines of an exported cell, median": ("11.5", "11.5", "4", "7"),
    "exported cells with one definition": ("90 %", "79 %", "93 %", "90 %"),
    "exported cells over 25 lines": ("0", "", "", ""),
    "code cells with visible output": ("25 %", "11 %", "18 %", "43 %"),
    "words of a markdown cell, median / 90th percentile": ("12.5 / 62", "12.5 / 62", "17 / 54", "3 / 14"),
    "notebook lines over 120 characters": ("0 %", "1 %", ".4 %", ".2 %"),
}

@dataclass
class Cell:
    notebook: str
    number: int          # from 0
    code: bool           # otherwise markdown
    source: str
    names: list[str]     # top-level functions and classes, where the cell exports
    shown: bool          # an output is stored

    @property
    def every_line(self) -> list[str]: return self.source.splitlines()

    @property
    def lines(self) -> int: return sum(bool(x.strip()) and not x.startswith("#|") for x in self.every_line)

    @property
    def is_long(self) -> bool: return bool(self.names) and len(self.every_line) > LONGEST_CELL

def exported_names(source: str) -> list[str]:
    "Functions and classes at the top level of a cell that exports."
    if not any(line.startswith(("#| export", "#|export")) for line in source.splitlines()): return []
    try: body = ast.parse(source).body
    except SyntaxError: return []   # a magic: nothing of it is exported
    return [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]

def read(path: Path) -> list[Cell]:
    "Code and markdown cells of a notebook."
    found = []
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "raw": continue
        source, code = "".join(cell["source"]), cell["cell_type"] == "code"
        names = exported_names(source) if code else []
        found.append(Cell(path.stem, number, code, source, names, bool(cell.get("outputs"))))
    return found

def middle_and_tail(values: Iterable[int]) -> tuple[float, ...]:
    "Median and 90th percentile; of nothing, nothing."
    values = sorted(values)
    return (statistics.median(values), values[int(.9 * len(values))]) if values else ()

def measure(cells: list[Cell]) -> dict:
    code = [c for c in cells if c.code]
    exported = [c for c in code if c.names]
    widths = [len(line) for c in code for line in c.every_line]
    return dict(
        code_cells=len(code), lines_of_code_cell=middle_and_tail(c.lines for c in code),
        exported_cells=len(exported), lines_of_exported_cell=middle_and_tail(c.lines for c in exported),
        one_definition=sum(len(c.names) == 1 for c in exported), long_exported_cells=sum(c.is_long for c in exported),
        cells_with_output=sum(c.shown for c in code),
        words_of_markdown_cell=middle_and_tail(len(c.source.split()) for c in cells if not c.code),
        code_lines=len(widths), wide_lines=sum(w > WIDEST_LINE for w in widths), widest_line=max(widths, default=0))

def package() -> dict:
    "The package's own lines; the index and the lists of names that nbdev writes are nobody's to read."
    files = [p for p in sorted((ROOT / "drifting_kd").glob("*.py")) if p.name != "_modidx.py"]
    texts = [re.sub(r"^__all__ = \[[^]]*\]$", "", p.read_text(encoding="utf-8"), flags=re.M) for p in files]
    widths = [len(line) for text in texts for line in text.splitlines()]
    return dict(lines=len(widths), wide_lines=sum(w > WIDEST_LINE for w in widths), widest_line=max(widths, default=0))

# ---- what is printed

def share(part: int, whole: int) -> str: return f"{part / whole:.0%}".replace("%", " %") if whole else "-"

def pair(values: tuple[float, ...]) -> str: return " / ".join(f"{v:g}" for v in values) or "-"

def wide(m: dict) -> str:
    percent = 100 * m["wide_lines"] / max(1, m["code_lines"])
    return f"{percent:.1f} %, longest {m['widest_line']}"

def in_words(m: dict) -> list[str]:
    "A measurement in the order of BESIDE."
    return [pair(m["lines_of_code_cell"]), f"{m['lines_of_exported_cell'][0]:g}",
            share(m["one_definition"], m["exported_cells"]), f"{m['long_exported_cells']} of {m['exported_cells']}",
            share(m["cells_with_output"], m["code_cells"]), pair(m["words_of_markdown_cell"]), wide(m)]

def table(rows: list[list]) -> None:
    "Rows in columns: the first to the left, the others to the right."
    rows = [[str(word) for word in row] for row in rows]
    sizes = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        print("  ".join([first.ljust(sizes[0]), *(word.rjust(n) for word, n in zip(others, sizes[1:]))]).rstrip())

def print_goals(library: dict, every: dict, package: dict) -> None:
    ours = zip(BESIDE, in_words(library), in_words(every))
    rows = [[what, mine, all_of_mine, *BESIDE[what]] for what, mine, all_of_mine in ours]
    beyond = f"{package['wide_lines']} of {package['lines']}"
    table([["", "library", "all notebooks", "goal", "nbdev", "fastcore", "course22p2"], *rows,
           ["package lines over 120 characters", beyond, "", "0", "", "", ""]])

def print_notebooks(notebooks: dict[str, list[Cell]]) -> None:
    rows = [["notebook", "code cells", "lines", "exported", "lines", "one definition", "over 25 lines", "shows",
             "words", "over 120 characters"]]
    for name, cells in notebooks.items():
        m = measure(cells)
        rows.append([name, m["code_cells"], pair(m["lines_of_code_cell"]), m["exported_cells"],
                     pair(m["lines_of_exported_cell"]), share(m["one_definition"], m["exported_cells"]),
                     m["long_exported_cells"], share(m["cells_with_output"], m["code_cells"]),
                     pair(m["words_of_markdown_cell"]), m["wide_lines"]])
    table(rows)

def print_long(cells: list[Cell]) -> None:
    "Exported cells over 25 lines or with more than one definition."
    for c in cells:
        if not c.is_long and len(c.names) < 2: continue
        print(f"{c.notebook}[{c.number}]: {len(c.every_line)} lines, {len(c.names)} definitions: {', '.join(c.names)}")

def save(path: Path, result: dict) -> None:
    sys.path.insert(0, str(ROOT))
    from drifting_kd.core import git_state, write_json   # here, so that counting needs nothing but Python
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    write_json(path, result | dict(git=git_state(), date=date))

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--by-notebook", action="store_true", help="a row for each notebook")
    parser.add_argument("--long", action="store_true", help="exported cells over 25 lines or with several definitions")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/pages.json, too")
    args = parser.parse_args()

    paths = [p for p in sorted((ROOT / "nbs").glob("*.ipynb")) if p.name[0] not in "_."]
    notebooks = {p.stem: read(p) for p in paths}
    cells = [c for cells in notebooks.values() for c in cells]
    library = [c for c in cells if c.notebook[0].isdigit()]
    result = dict(library=measure(library), all=measure(cells), package=package())

    print_goals(result["library"], result["all"], result["package"])
    if args.by_notebook:
        print()
        print_notebooks(notebooks)
    if args.long:
        print()
        print_long(library)
    if args.save:
        what = "size and form of the notebooks; pairs are median and 90th percentile"
        save(ROOT / "benchmarks" / "results" / "pages.json", dict(what=what) | result)

if __name__ == "__main__": main()
