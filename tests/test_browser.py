"""JupyterLab as `make lab` starts it, in a real browser: open train.ipynb, edit its parameters, run all cells twice,
then make a mistake."""
import importlib.util, json, os, re, shutil, signal, subprocess, sysconfig, time
from pathlib import Path
from types import SimpleNamespace
import pytest
from conftest import ROOT, losses

pytestmark = pytest.mark.slow
NOTEBOOK = ROOT / "nbs" / "train.ipynb"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
]
SMALL = (
    "tracker, device, threads, epochs, limit, batch_size, log_every, eval_every = 'none', 'cpu', 1, 2, 300, 50, 2, 1"
)
CELLS = """return [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')].map(cell => ({
    prompt: cell.querySelector('.jp-InputPrompt').textContent,
    source: cell.querySelector('.cm-content')?.textContent ?? '',
    outputs: [...cell.querySelectorAll('.jp-OutputArea-output')].map(o => ({text: o.textContent,
    images: [...o.querySelectorAll('img')].map(i => i.naturalWidth)}))}))"""
ERROR = "LabError: "

class Page:
    "What a person at JupyterLab does and sees; all of it together has two minutes."
    def __init__(self, driver): self.driver, self.deadline = driver, time.monotonic() + 120

    def wait(self, condition, what: str):
        while not (found := condition()):
            if time.monotonic() > self.deadline:
                raise TimeoutError(
                    f"{what}: not within two minutes; the page shows "
                    f"{self.driver.find_element('tag name', 'body').text[-1500:]}"
                )
            time.sleep(.2)
        return found

    def find(self, css: str):
        return self.wait(lambda: [e for e in self.driver.find_elements("css selector", css) if e.is_displayed()], css)
    def cells(self) -> list[dict]: return self.driver.execute_script(CELLS)
    def keys(self):
        from selenium.webdriver import ActionChains
        return ActionChains(self.driver)

    def control(self, key: str) -> None:
        from selenium.webdriver.common.keys import Keys
        self.keys().key_down(Keys.CONTROL).send_keys(getattr(Keys, key, key)).key_up(Keys.CONTROL).perform()

    def open(self, name: str, count: int) -> None:
        self.keys().double_click(self.find(f".jp-DirListing-item[title*='{name}']")[0]).perform()
        self.wait(
            lambda: len(self.cells()) == count and all(c["source"] for c in self.cells()),
            f"the {count} code cells of {name}",
        )
        # before the kernel is chosen the indicator says idle, too, and JupyterLab forgets what it is asked to run
        def ready():
            return self.find(".jp-Toolbar-kernelName")[-1].text not in ("", "No Kernel") and self.driver.find_elements(
                "css selector", ".jp-Notebook-ExecutionIndicator[data-status=idle]"
            )
        self.wait(ready, "the kernel")

    def add_line(self, marker: str, line: str) -> None:
        "Type at the end of the cell that contains `marker`."
        cell = next(
            c
            for c in self.driver.find_elements("css selector", ".jp-CodeCell")
            if marker in c.get_attribute("textContent")
        )
        self.driver.execute_script("arguments[0].scrollIntoView()", cell)
        cell.find_element("css selector", ".cm-line").click()
        self.control("END")
        self.keys().send_keys("\n" + line).perform()
        self.wait(lambda: any(c["source"].endswith(line) for c in self.cells()), f"the line {line}")

    def run_all(self) -> list[dict]:
        "Run > Run All Cells; the cells when the last one has a new number, or an error has emptied the queue."
        before = self.cells()[-1]["prompt"]
        next(e for e in self.find(".lm-MenuBar-item") if e.text == "Run").click()
        self.find("[data-command='runmenu:run-all']")[0].click()
        def done():
            cells = self.cells()
            last = cells[-1]["prompt"]
            failed = any(ERROR in o["text"] for c in cells for o in c["outputs"])
            return (
                not any("*" in c["prompt"] for c in cells)
                and (failed or last != before and re.search(r"\d", last))
                and cells
            )
        return self.wait(done, "all cells run")

    def save(self, path: Path) -> dict:
        before = path.stat().st_mtime_ns
        self.control("s")
        self.wait(
            lambda: (
                path.stat().st_mtime_ns != before
                and not self.driver.find_elements("css selector", ".jp-mod-current.jp-mod-dirty")
            ),
            f"{path.name} saved",
        )
        return json.loads(path.read_text(encoding="utf-8"))

def stop(process: subprocess.Popen, seconds: float) -> None:
    "End a process started in a session of its own, and what it started there."
    for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 5)):
        try: os.killpg(process.pid, number)
        except ProcessLookupError: pass  # all of them are gone
        try: return process.wait(patience) and None
        except subprocess.TimeoutExpired: pass

@pytest.fixture(scope="module")
def tools():
    "chromium and its driver."
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    missing = [
        what
        for what, there in (
            ("chromium", browser),
            ("chromedriver", driver),
            ("selenium, pip install -e '.[browser]' -c constraints.txt", importlib.util.find_spec("selenium")),
        )
        if not there
    ]
    if missing: pytest.skip(f"not installed: {'; '.join(missing)}")
    return browser, driver

@pytest.fixture(scope="module")
def server(tools, tmp_path_factory):
    "`make lab` in a root of its own, as settings that nobody has touched: (root, address, log)."
    base = tmp_path_factory.mktemp("lab")
    root, log = base / "root", base / "server.log"
    (root / "nbs").mkdir(parents=True)
    shutil.copy(NOTEBOOK, root / "nbs")
    own = dict(
        JUPYTER_CONFIG_DIR=str(base / "config"),
        JUPYTER_DATA_DIR=str(base / "data"),
        IPYTHONDIR=str(base / "ipython"),
        OMP_NUM_THREADS="1",
        OMP_WAIT_POLICY="passive",
    )
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("DKD_ROOT", "IN_TEST", "MPLBACKEND", "JUPYTER_RUNTIME_DIR", "MAKEFLAGS")
    } | own
    flags = "--no-browser" + (" --allow-root" if os.geteuid() == 0 else "")
    command = [
        "make",
        "-f",
        ROOT / "Makefile",
        "-o",
        ".venv/ready",
        "lab",
        f"BIN={sysconfig.get_path('scripts')}",
        f"LAB={flags}",
    ]  # -o: install nothing
    with open(log, "w") as out:
        process = subprocess.Popen(
            command,
            cwd=root,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 60
        while not (address := re.search(r"http://127\.0\.0\.1:\S+token=\w+", log.read_text())):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(.2)
        yield root, address[0], log
    finally: stop(process, 10)

@pytest.fixture(scope="module")
def page(tools, server, tmp_path_factory):
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = tools[0]
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]: options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=tools[1], popen_kw=dict(start_new_session=True))
    driver = None
    try:
        driver = webdriver.Chrome(options=options, service=service)
        driver.set_page_load_timeout(60)
        driver.get(server[1])
        yield Page(driver)
    finally:
        try: driver and driver.quit()
        finally:
            if getattr(service, "process", None): stop(service.process, 5)  # the browser ends with its driver

@pytest.fixture(scope="module")
def seen(server, page):
    "Everything that is done in the page; the tests below look at what it left."
    root, _, log = server
    copy = root / "nbs" / NOTEBOOK.name
    given = NOTEBOOK.read_bytes()
    page.open(copy.name, sum(c["cell_type"] == "code" for c in json.loads(given)["cells"]))
    page.add_line("run_name: str", SMALL)
    first = page.run_all()
    second = page.run_all()
    saved = page.save(copy)
    size = copy.stat().st_size
    page.add_line("run_name: str", "optimizer = 'adamv'")
    wrong = page.run_all()
    return SimpleNamespace(
        root=root,
        first=first,
        second=second,
        wrong=wrong,
        saved=saved,
        size=size,
        untouched=NOTEBOOK.read_bytes() == given,
        log=log.read_text(),
    )

def text(cells: list[dict]) -> str: return "\n".join(o["text"] for c in cells for o in c["outputs"])
def finished(root: Path) -> list[Path]: return sorted(p.parent for p in root.glob("runs/*/metrics.json"))

@pytest.mark.parametrize("turn", ["first", "second"])
def test_all_cells_run_and_say_what_came_out(seen, turn):
    cells, run = getattr(seen, turn), finished(seen.root)[("first", "second").index(turn)]
    assert "Error" not in text(cells) and "Warning" not in text(cells), text(cells)
    accuracy = json.loads((run / "metrics.json").read_text())["test/accuracy"]
    assert f"test accuracy {accuracy:.4f}" in text(cells) and str(run) in text(cells)

@pytest.mark.parametrize("turn", ["first", "second"])
def test_every_figure_is_shown_once(seen, turn):
    shown = [image for c in getattr(seen, turn) for o in c["outputs"] for image in o["images"]]
    saved = {
        len(list(run.glob("figures/*.png")))
        for run in (seen.root / "runs").iterdir()
        if (run / "metrics.json").exists()
    }
    assert (
        saved == {len(shown) - 1} and len(shown) > 5 and min(shown) > 200
    )  # the data, then each figure that the run keeps; drawn, not broken
    assert all(sum(len(o["images"]) for o in c["outputs"]) <= 1 for c in getattr(seen, turn))

def test_running_again_in_the_same_kernel_makes_a_second_run_with_the_same_numbers(seen):
    first, second = finished(seen.root)
    assert second.name == first.name + "-2" and losses(first) == losses(second) and losses(first)
    assert int(re.search(r"\d+", seen.second[0]["prompt"])[0]) == len(seen.first) + 1  # the kernel went on counting

@pytest.mark.parametrize("turn", ["first", "second"])
def test_progress_bar_is_readable(seen, turn):
    cell = next(c for c in getattr(seen, turn) if "fit(" in c["source"])
    steps = losses(finished(seen.root)[0])[-1][0]
    lines = text([cell]).strip().splitlines()
    assert len(lines) <= 8 and f"{steps}/{steps}" in "".join(lines).replace(" ", ""), lines

def test_wrong_value_is_one_line_and_starts_nothing(seen):
    at = next(i for i, c in enumerate(seen.wrong) if ERROR in text([c]))
    assert (
        text([seen.wrong[at]])
        .strip()
        .splitlines()[-1]
        .startswith(ERROR + "optimizer='adamv' is not known; did you mean 'adam")
    )
    assert (
        text(seen.wrong).count(ERROR) == 1
        and not text(seen.wrong[at + 1 :])
        and "Run(cfg" not in "".join(c["source"] for c in seen.wrong[: at + 1])
    )
    assert len(finished(seen.root)) == len([p for p in seen.root.glob("runs/*") if p.is_dir()]) == 2

def test_saving_keeps_the_tag_and_stays_in_the_copy(seen):
    tagged = [c for c in seen.saved["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and "".join(tagged[0]["source"]).endswith(SMALL)
    assert seen.untouched and seen.size < 1_000_000

def test_server_has_nothing_to_complain_about(seen):
    assert not re.findall(r"^\[E .*|^Traceback.*|\d{4}-\d\d-\d\d \S+ - ERROR.*", seen.log, re.M), seen.log
