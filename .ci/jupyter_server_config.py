"""What `make lab` adds to anybody's own settings of JupyterLab.

git takes a file of another size for a changed one and asks no filter (`make filter`). So each saved notebook that
differs from git's in nothing but what the filter takes out is shown to git once more; what is staged stays as it is.
"""
import contextlib, os, subprocess, warnings

def show_git(os_path: str, model: dict, **_) -> None:
    "After a save: let git note the notebook's new size, if nothing else is new."
    if model["type"] != "notebook": return
    folder, name = os.path.split(os_path)
    def git(*words) -> int: return subprocess.run(["git", *words, name], cwd=folder, capture_output=True).returncode
    with contextlib.suppress(OSError):  # no git
        if git("diff", "--quiet", "--") == 0: git("add", "--update", "--")

warnings.filterwarnings("ignore", "Overriding existing post_save_hook")  # Jupyter sets what it finds here twice
c = get_config()  # noqa: F821 (Jupyter gives it)
c.FileContentsManager.post_save_hook = show_git
