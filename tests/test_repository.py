"""The repository as a contributor and pip see it: clean and exported, installable from settings.ini, pinned, and free
of anybody's paths."""
import importlib.metadata, importlib.util, json, os, re, shutil, subprocess, sys, sysconfig
from configparser import ConfigParser
from pathlib import Path
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from conftest import ROOT

def kept() -> list[Path]:
    "Files of the repository, as far as git knows them; without git, whatever is not in a folder that .gitignore names."
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [Path(name) for name in sorted(set(listed.stdout.split("\0"))) if name and (ROOT / name).is_file()]
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()} | {".git"}
    paths = (p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file())
    return sorted(
        p
        for p in paths
        if not ignored & set(p.parts) and not any(part.endswith(".egg-info") for part in p.parts) and p.suffix != ".pyc"
    )

@pytest.fixture
def copy(tmp_path):
    for path in kept():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tmp_path / path)
    return tmp_path

def content(folder: Path) -> dict:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }

def tool(folder: Path, *command: str | Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]

SCRIPTS = Path(sysconfig.get_path("scripts"))

def test_clean_and_export_change_nothing(copy):
    before = content(copy)
    for name in ("clean", "export"):
        tool(copy, SCRIPTS / f"nbdev_{name}")
        after = content(copy)
        changed = sorted(k for k in before | after if before.get(k) != after.get(k))
        assert not changed, f"nbdev_{name} changes {', '.join(changed)}: run `make notebooks` and commit"

def tags(folder: Path) -> list:
    return [
        t for c in json.loads((folder / "nbs/train.ipynb").read_text())["cells"] for t in c["metadata"].get("tags", [])
    ]

def test_the_setting_that_keeps_papermills_tag_matters(copy):
    "Without it nbdev_clean drops the tag, and papermill's values would be overwritten by the defaults."
    settings = (copy / "settings.ini").read_text()
    tool(copy, SCRIPTS / "nbdev_clean")
    assert tags(copy) == ["parameters"] and "\nallowed_cell_metadata_keys = tags\n" in settings
    (copy / "settings.ini").write_text(settings.replace("allowed_cell_metadata_keys = tags\n", ""))
    tool(copy, SCRIPTS / "nbdev_clean")
    assert tags(copy) == []

# ---- git and JupyterLab

def git(folder: Path, *words: str) -> str:
    own = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_CONFIG_GLOBAL": os.devnull}
    known = "-c user.name=a -c user.email=a@b".split()
    done = subprocess.run(["git", *known, *words], cwd=folder, env=own, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "error" not in done.stderr, done.stderr
    return done.stdout

NOTEBOOKS = "nbs/train.ipynb", "nbs/03_metrics.ipynb"  # an experiment, and one of the library
CI = ".ci/clean_notebook.py", ".ci/jupyter_server_config.py"

@pytest.fixture
def clone(tmp_path):
    "What a clone of this repository has, as far as git and make look at it."
    origin = tmp_path / "origin"
    for path in (".gitattributes", ".gitignore", "Makefile", "settings.ini", *CI, *NOTEBOOKS):
        (origin / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, origin / path)
    for words in ("init -q", "add -A", "commit -qm first"): git(origin, *words.split())
    git(tmp_path, "clone", "-q", "origin", "clone")
    return tmp_path / "clone"

def ask_for_filter(clone: Path, scripts: str | Path = SCRIPTS) -> None: tool(clone, "make", "filter", f"BIN={scripts}")

def ran(path: Path) -> dict:
    "A notebook after every cell was run, the last one with Shift+Enter: what JupyterLab sends to be saved."
    import nbformat
    nb, library = nbformat.read(path, 4), path.name[0].isdigit()
    nb.cells.append(nbformat.v4.new_code_cell())
    nb.metadata["kernelspec"]["display_name"] = "Python 3 (ipykernel)"
    nb.metadata |= dict(language_info=dict(name="python", version="3.11.2")) | ({} if library else dict(widgets={}))
    for number, cell in enumerate(nb.cells, 1):
        cell.metadata |= dict(trusted=True, editable=True, execution={"iopub.status.busy": "2026-01-01T00:00:00Z"})
        if cell.cell_type != "code": continue
        cell.execution_count = number
        if not library: cell.outputs += [nbformat.v4.new_output("execute_result", {"text/plain": "1"})]
        for output in cell.outputs:
            if output.output_type == "execute_result": output.execution_count = number
    return nb

def run_and_save(clone: Path, name: str) -> None:
    "Save with JupyterLab's own means, as `make lab` sets them up."
    from jupyter_server.services.contents.largefilemanager import LargeFileManager
    from traitlets.config.loader import PyFileConfigLoader
    config = PyFileConfigLoader("jupyter_server_config.py", str(clone / ".ci")).load_config()
    LargeFileManager(config=config, root_dir=str(clone)).save(dict(type="notebook", content=ran(clone / name)), name)

def change_source(path: Path) -> None:
    nb = json.loads(path.read_text(encoding="utf-8"))
    next(c for c in nb["cells"] if c["cell_type"] == "code")["source"].insert(0, "1 + 1\n")
    path.write_text(json.dumps(nb), encoding="utf-8")

@pytest.mark.parametrize("name", NOTEBOOKS)
def test_running_and_saving_a_notebook_changes_nothing_for_git(clone, name):
    run_and_save(clone, name)
    assert git(clone, "status", "--porcelain") == f" M {name}\n"  # so that there is something to clean
    ask_for_filter(clone)
    run_and_save(clone, name)
    assert git(clone, "status", "--porcelain") == git(clone, "diff", "HEAD") == ""
    assert '"execution_count": 2' in (clone / name).read_text(encoding="utf-8")  # the file is as it was saved
    change_source(clone / name)
    assert git(clone, "status", "--porcelain") == f" M {name}\n"
    lines = git(clone, "diff", "-U0").splitlines()
    assert [line.strip(" ,+") for line in lines if re.match(r"[+-] ", line)] == [r'"1 + 1\n"']

def test_saving_stages_no_change_and_no_new_notebook(clone):
    ask_for_filter(clone)
    change_source(clone / NOTEBOOKS[0])
    shutil.copyfile(clone / NOTEBOOKS[1], clone / "nbs/new.ipynb")
    for name in (NOTEBOOKS[0], "nbs/new.ipynb"): run_and_save(clone, name)
    assert git(clone, "status", "--porcelain") == f" M {NOTEBOOKS[0]}\n?? nbs/new.ipynb\n"

def test_a_new_output_of_the_library_is_a_change(clone):
    ask_for_filter(clone)
    path = clone / NOTEBOOKS[1]
    nb = json.loads(path.read_text(encoding="utf-8"))
    output = next(o for c in nb["cells"] for o in c.get("outputs", []) if "text" in o or "data" in o)
    output |= dict(output_type="stream", name="stdout", text=["another\n"])
    path.write_text(json.dumps(nb), encoding="utf-8")
    assert git(clone, "status", "--porcelain") == f" M {NOTEBOOKS[1]}\n"

@pytest.mark.parametrize("content", ["<<<<<<< ours\n{}\n=======\n", "[1]", '{"cells": [{}]}', ""])
def test_git_gets_what_is_no_notebook_as_it_is(clone, content):
    ask_for_filter(clone)
    (clone / NOTEBOOKS[0]).write_text(content)
    git(clone, "add", NOTEBOOKS[0])
    assert git(clone, "show", f":{NOTEBOOKS[0]}") == content

def test_a_clone_without_environment_works(clone):
    "Its filter asked for and its .venv gone: git sees files as they are, and says nothing about it."
    assert git(clone, "status", "--porcelain") == ""
    ask_for_filter(clone, "gone")
    run_and_save(clone, NOTEBOOKS[0])
    assert git(clone, "status", "--porcelain") == f" M {NOTEBOOKS[0]}\n"
    git(clone, "commit", "-qam", "outputs")
    git(clone, "checkout", "-q", "HEAD~1")
    assert (clone / NOTEBOOKS[0]).read_bytes() == (ROOT / NOTEBOOKS[0]).read_bytes()

def test_hooks_of_nbdev_add_nothing_to_the_tree(clone, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tool(clone, SCRIPTS / "nbdev_install_hooks")
    assert "nbdev_merge" in git(clone, "config", "merge.nbdev-merge.driver")
    assert git(clone, "status", "--porcelain") == ""

@pytest.mark.parametrize("target", ["lab", "notebooks"])
def test_make_asks_for_the_filter(clone, target):
    said = subprocess.run(
        ["make", "-n", "-o", ".venv/ready", "-o", ".venv/ready-dev", target],
        cwd=clone,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    assert "git config filter.notebooks.clean" in said
    assert target != "lab" or f"JUPYTER_CONFIG_PATH={clone}/.ci " in said

def test_filter_stays_out_of_a_repository_round_about(clone):
    "An unpacked archive has no .git; the folder that it lies in may have one."
    (clone / "inner").mkdir()
    shutil.copyfile(ROOT / "Makefile", clone / "inner/Makefile")
    ask_for_filter(clone / "inner")
    assert "filter.notebooks" not in git(clone, "config", "--local", "--list")

def test_filter_leaves_every_notebook_as_it_is():
    spec = importlib.util.spec_from_file_location("clean_notebook", ROOT / ".ci/clean_notebook.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        assert module.cleaned(text := path.read_text(encoding="utf-8")) == text, path.name

# ---- installation

def settings() -> dict:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]

def required(extra: str = "") -> dict:
    "name -> requirement, of the package itself or of an extra."
    lines = settings()[f"{extra}_requirements" if extra else "requirements"].splitlines()
    return {canonicalize_name(r.name): r for r in map(Requirement, filter(None, lines))}

EXTRAS = [key.removesuffix("_requirements") for key in settings() if key.endswith("_requirements")]
PINS = {
    canonicalize_name(r.name): r
    for r in (
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
}

def test_setup_says_what_settings_say(copy):
    "Real metadata, made where pkg_resources does not exist."
    tool(
        copy,
        sys.executable,
        "-c",
        "import runpy, sys; sys.modules['pkg_resources'] = None; sys.argv = ['setup.py', '-q', 'egg_info']; "
        "runpy.run_path('setup.py', run_name='__main__')",
    )
    made = importlib.metadata.Distribution.at(copy / "drifting_kd.egg-info")
    cfg = settings()
    assert (made.name, made.version, made.metadata["Requires-Python"]) == (
        cfg["lib_name"],
        cfg["version"],
        f">={cfg['min_python']}",
    )
    assert f'__version__ = "{cfg["version"]}"' in (copy / "drifting_kd/__init__.py").read_text()
    assert sorted(made.metadata.get_all("Provides-Extra")) == sorted(EXTRAS)
    found = {extra: {} for extra in ["", *EXTRAS]}
    for r in map(Requirement, made.requires):
        extra = re.search(r"""extra == ["'](\w+)""", str(r.marker or ""))
        found[extra[1] if extra else ""][canonicalize_name(r.name)] = str(r.specifier)
    assert found == {extra: {name: str(r.specifier) for name, r in required(extra).items()} for extra in ["", *EXTRAS]}
    assert [(e.name, e.value) for e in made.entry_points.select(group="console_scripts")] == [
        tuple(cfg["console_scripts"].split("="))
    ]

def test_the_use_of_a_gpu_can_be_read_where_there_is_one():
    "torch.cuda.utilization asks nvidia-ml-py, which torch does not bring; there is no CUDA for macOS."
    marker = required()["nvidia-ml-py"].marker
    assert [marker.evaluate(dict(sys_platform=name)) for name in ("linux", "win32", "darwin")] == [True, True, False]

def test_every_pin_is_exact():
    assert all(re.fullmatch(r"==[\w.]+", str(r.specifier)) and not r.marker for r in PINS.values()), [
        str(r) for r in PINS.values() if not str(r.specifier).startswith("==")
    ]

@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_pins_satisfy_the_ranges(extra):
    installed = {"", "dev"} | {
        e
        for path in ("Makefile", ".ci/run")
        for group in re.findall(r"-e \"?\.\[([\w,]+)\]", (ROOT / path).read_text())
        for e in group.split(",")
    }
    for name, requirement in required(extra).items():
        if name in PINS:
            assert requirement.specifier.contains(next(iter(PINS[name].specifier)).version), (
                f"{PINS[name]} is outside {requirement}"
            )
        else:
            assert extra not in installed, f"make or .ci/run installs {requirement}, which constraints.txt does not pin"

def test_torch_and_torchvision_are_a_pair():
    "torchvision 0.n is built for torch 2.(n-15); the lower ends of the ranges and the pins keep to it."
    pin = {name: Version(next(iter(PINS[name].specifier)).version) for name in ("torch", "torchvision")}
    low = {
        name: Version(next(s.version for s in required()[name].specifier if s.operator == ">="))
        for name in ("torch", "torchvision")
    }
    for pair in (pin, low): assert pair["torch"].major == 2 and pair["torchvision"].minor - pair["torch"].minor == 15

# ---- nothing of the author's machine

def test_no_path_of_anybodys_machine():
    pattern = re.compile(rb"/(?:home|Users|root|work)/[\w.]|\.\./shared|[A-Z]:\\\\?Users")
    found = [
        f"{path}: {hit[0].decode()}"
        for path in kept()
        if b"\0" not in (text := (ROOT / path).read_bytes())
        for hit in pattern.finditer(text)
    ]
    assert not found, found
    assert os.fsencode(Path.home()) == b"/" or not [
        p for p in kept() if os.fsencode(f"{Path.home()}/") in (ROOT / p).read_bytes()
    ]
