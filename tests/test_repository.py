"""The repository as a contributor and pip see it: clean and exported, installable from settings.ini, pinned, and free
of anybody's paths."""
import importlib.metadata, json, os, re, shutil, subprocess, sys, sysconfig
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
