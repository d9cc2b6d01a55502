"The notebooks' form, and train.ipynb as users run it: from any folder, with and without output, twice in one kernel."

import ast, dataclasses, dis, importlib, json, os, re, subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import papermill, pytest, yaml
from conftest import ROOT, losses, python, same_weights

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb") if p.name[0] not in "_.")
LIBRARY, EXPERIMENTS = [p for p in NOTEBOOKS if p.name[0].isdigit()], [p for p in NOTEBOOKS if not p.name[0].isdigit()]
MODULES = sorted(p for p in (ROOT / "drifting_kd").glob("*.py") if p.name[0] != "_")
LEVEL = {p.stem[3:]: int(p.stem[:2]) for p in LIBRARY}  # the number is the place in the house: floors in tens
each = lambda name, paths: pytest.mark.parametrize(name, paths, ids=lambda p: p.stem)

def cells(path: Path) -> list[tuple[dict, str]]:
    return [(c, "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]

def by_name(rows) -> list[tuple]: return sorted(rows, key=lambda row: row[0])

def place_of_tag(path: Path) -> int:
    tagged = [i for i, (c, _) in enumerate(cells(path)) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, f"{path.name}: {len(tagged)} cells are tagged 'parameters'"
    return tagged[0]

def config_of(path: Path) -> type:
    "The dataclass that the notebook's guard reads."
    name = re.search(r"guard\.read\((\w+)\)", cells(path)[place_of_tag(path) + 1][1])[1]
    code = [node for c, source in cells(path) if c["cell_type"] == "code" for node in ast.parse(source).body]
    module = next(n.module for n in code if isinstance(n, ast.ImportFrom) and name in [a.name for a in n.names])
    return getattr(importlib.import_module(module), name)

# ---- form

@each("path", NOTEBOOKS)
def test_every_notebook_is_clean_and_small(path):
    assert path.stat().st_size < 300_000
    for c, _ in cells(path):
        if c["cell_type"] != "code": continue
        assert c["execution_count"] is None and not any(o.get("execution_count") for o in c["outputs"])

@each("path", NOTEBOOKS)
def test_no_cell_is_longer_than_a_screen(path):
    code = [
        source.splitlines()
        for c, source in cells(path)
        if c["cell_type"] == "code" and "parameters" not in c["metadata"].get("tags", [])
    ]  # that one is as long as its family
    long = {lines[1]: len(lines) for lines in code if len(lines) > 60}
    assert not long, f"{path.name}: {long}"

@each("path", LIBRARY)
def test_library_notebook_exports_its_module(path):
    assert (
        any(f"#| default_exp {path.stem[3:]}" in source.splitlines() for _, source in cells(path))
        and (ROOT / "drifting_kd" / f"{path.stem[3:]}.py").exists()
    )


ROOMS = """core run track metrics sources data plots models checkpoints generators text denoisers images extractors fid
optim loop train classify analysis report drift encoders generate drifting kd features teachers distill
judges scores evaluate sweep cli""".split()

def test_rooms_stand_in_the_order_of_the_design():
    assert len(set(LEVEL.values())) == len(LIBRARY) and {p.stem for p in MODULES} == set(LEVEL)
    assert [name for name in LEVEL if name in ROOMS] == ROOMS

def test_a_name_means_one_thing():
    "No two modules define a function, class or constant of one name."
    homes = {}
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            patched = any("patch" in ast.unparse(d) for d in getattr(node, "decorator_list", []))  # a method
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not patched: names = [node.name]
            elif isinstance(node, ast.Assign): names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            else: names = []
            for name in set(names) - {"__all__"}: homes.setdefault(name, []).append(path.stem)
    assert not {name: where for name, where in homes.items() if len(where) > 1}

@each("path", MODULES)
def test_arrows_point_one_way(path):
    used = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): used |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["drifting_kd" if node.level else "", node.module]))
            used |= {base} if base != "drifting_kd" else {f"{base}.{a.name}" for a in node.names}
    inside = {name.split(".")[1] for name in used if name.startswith("drifting_kd.")}
    assert not [name for name in inside if LEVEL[name] >= LEVEL[path.stem]]

@each("path", EXPERIMENTS)
def test_experiment_notebook_declares_its_configuration(path):
    every, place = cells(path), place_of_tag(path)
    assert every[0][1].startswith("# ")  # nothing stands before the title
    assert every[-1][0]["cell_type"] == "raw" and "skip_exec: true" in every[-1][1].splitlines()
    assert not any(re.search(r"^#\|\s*(export|default_exp)", source, re.M) or c.get("outputs") for c, source in every)
    assert "watch_parameters(globals())" in every[place - 1][1] and "guard.read(" in every[place + 1][1]
    lines = [
        line for line in every[place][1].splitlines() if line.strip() and not line.startswith("#")
    ]  # headings stand alone
    declared = [(n.target.id, n.annotation.id, ast.literal_eval(n.value)) for n in ast.parse(every[place][1]).body]
    fields = dataclasses.fields(config_of(path))
    assert by_name(declared) == by_name((f.name, getattr(f.type, "__name__", f.type), f.default) for f in fields)
    comments = [line.partition("#")[2] for line in lines]
    assert len(lines) == len(declared) and all(c.strip() and "=" not in c for c in comments)

@each("path", EXPERIMENTS)
def test_papermill_lists_every_parameter(path):
    listed = [
        (p["name"], p["inferred_type_name"]) for p in papermill.inspect_notebook(path).values()
    ]  # what --help-notebook prints
    fields = dataclasses.fields(config_of(path))
    assert by_name(listed) == by_name((f.name, getattr(f.type, "__name__", f.type)) for f in fields)

@each("path", sorted((ROOT / "nbs" / "configs").glob("*.yaml")))
def test_preset_is_accepted_and_says_what_to_expect(path):
    text = path.read_text(encoding="utf-8")
    source, command, expected = text.splitlines()[:3]
    assert re.match(r"# \w", source) and len(source) > 40
    assert (called := re.match(r"# command: +papermill (nbs/\w+\.ipynb) runs/\S+\.ipynb -f (\S+)", command)) and called[
        2
    ] == f"nbs/configs/{path.name}"
    assert re.match(r"# expected: +\S", expected)
    settings = yaml.safe_load(text)
    cfg = config_of(ROOT / called[1])(**settings)  # names, types and ranges
    assert settings and all(getattr(cfg, k) == (tuple(v) if isinstance(v, list) else v) for k, v in settings.items())

# ---- train.ipynb in real kernels: all started here, two at a time, and looked at by the tests below

TINY = dict(tracker="none", device="cpu", threads=1, limit=200, epochs=2, batch_size=50, log_every=2, eval_every=1)
WORDS = [w for name, value in TINY.items() for w in ("-p", name, str(value))]
TWICE = """import nbformat, os, sys
from nbclient import NotebookClient
nb = nbformat.read("nbs/train.ipynb", 4)
cell = next(c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
cell.source += sys.argv[1]
client = NotebookClient(nb, timeout=100)
with client.setup_kernel():
    for _ in range(2):
        for i, c in enumerate(nb.cells): client.execute_cell(c, i)"""

def retag(folder: Path, tagged: bool = True) -> None:
    "A root of its own, with the notebook in nbs/."
    (folder / "nbs").mkdir(parents=True)
    nb = json.loads((ROOT / "nbs" / "train.ipynb").read_text(encoding="utf-8"))
    if not tagged: nb["cells"][place_of_tag(ROOT / "nbs" / "train.ipynb")]["metadata"] = {}
    (folder / "nbs" / "train.ipynb").write_text(json.dumps(nb), encoding="utf-8")

@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "name -> (root, finished process) of every command."
    base = tmp_path_factory.mktemp("notebooks")
    roots = {name: base / name for name in ("good", "twice", "misspelt", "type", "tag")}
    for name, root in roots.items(): retag(root, tagged=name != "tag")
    (base / "elsewhere").mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ("DKD_ROOT", "IN_TEST")} | dict(
        OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", MPLBACKEND="agg"
    )

    def papermill(*words, cwd=roots["good"], stdout=subprocess.PIPE, **more):
        return python("-m", "papermill", *words, *WORDS, cwd=cwd, stdout=stdout, env=env | more)

    def piped():
        with open(base / "out.ipynb", "w") as out:
            return papermill("train.ipynb", "-p", "run_name", "nbs", cwd=roots["good"] / "nbs", stdout=out)

    def refused(name, *words): return papermill("nbs/train.ipynb", base / f"{name}.ipynb", *words, cwd=roots[name])
    jobs = dict(
        root=lambda: papermill("nbs/train.ipynb", base / "root.ipynb", "-p", "run_name", "root"),
        nbs=piped,
        elsewhere=lambda: papermill(
            roots["good"] / "nbs/train.ipynb",
            "deep.ipynb",
            "-p",
            "run_name",
            "elsewhere",
            cwd=base / "elsewhere",
            DKD_ROOT=str(roots["good"]),
        ),
        twice=lambda: python(
            "-c", TWICE, "".join(f"\n{k} = {v!r}" for k, v in TINY.items()), cwd=roots["twice"], env=env
        ),
        misspelt=lambda: refused("misspelt", "-p", "optimiser", "adamw"),
        type=lambda: refused("type", "-p", "resume", "false"),
        tag=lambda: refused("tag"),
    )
    with ThreadPoolExecutor(2) as pool: done = {name: pool.submit(job) for name, job in jobs.items()}
    return base, {name: future.result() for name, future in done.items()}

@pytest.mark.parametrize(
    "place, output", [("root", "root.ipynb"), ("nbs", "out.ipynb"), ("elsewhere", "elsewhere/deep.ipynb")]
)
def test_papermill_from_any_folder_with_or_without_output(ran, place, output):
    base, done = ran
    assert done[place].returncode == 0, done[place].stderr[-2000:]
    run, first = base / "good/runs" / place, base / "good/runs/root"
    assert json.loads((run / "metrics.json").read_text())["run"] == place
    assert losses(run) and losses(run) == losses(first) and same_weights(run, first)
    assert {p.relative_to(run) for p in run.rglob("*")} == {p.relative_to(first) for p in first.rglob("*")} and (
        run / "figures/curves.png"
    ).exists()
    assert str(run) in "".join(
        "".join(o.get("text", "")) for c, _ in cells(base / output) for o in c.get("outputs", [])
    )  # the notebook says where it went


def test_nothing_lands_where_the_caller_stands(ran):
    base, _ = ran
    assert [p.name for p in (base / "elsewhere").iterdir()] == ["deep.ipynb"]
    assert sorted(p.name for p in (base / "good").iterdir()) == ["nbs", "runs"] and [
        p.name for p in (base / "good/nbs").iterdir()
    ] == ["train.ipynb"]


@pytest.mark.parametrize(
    "mistake, message",
    [
        ("misspelt", "unknown parameter 'optimiser'; did you mean 'optimizer'"),
        ("type", "resume='false' (str): expected True or False"),
        ("tag", "epochs, eval_every, limit, log_every, threads, tracker had a value before the parameters cell"),
    ],
)
def test_mistakes_are_refused(ran, mistake, message):
    base, done = ran
    assert done[mistake].returncode != 0 and message in done[mistake].stderr, done[mistake].stderr[-2000:]
    assert not (base / mistake / "runs").exists()

def test_twice_in_one_kernel_makes_two_runs(ran):
    base, done = ran
    assert done["twice"].returncode == 0, done["twice"].stderr[-2000:]
    first, second = sorted(base.glob("twice/runs/*/metrics.json"))
    assert second.parent.name == first.parent.name + "-2"
    assert losses(first.parent) == losses(second.parent) == losses(base / "good/runs/root") and same_weights(
        first.parent, second.parent
    )


@each("path", EXPERIMENTS)
def test_no_cell_takes_the_name_of_a_parameter(path):
    "Running the cells again would read it as a given value."
    place, names = place_of_tag(path), {f.name for f in dataclasses.fields(config_of(path))}
    for c, source in cells(path)[place + 1:]:
        if c["cell_type"] == "code":
            assert not (
                taken := {
                    i.argval
                    for i in dis.get_instructions(compile(source, path.name, "exec"))
                    if i.opname == "STORE_NAME"
                }
                & names
            ), taken
