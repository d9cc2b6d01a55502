"Installation from settings.ini, without pkg_resources (which current setuptools no longer has)."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
lines = lambda key: [line for line in cfg[key].splitlines() if line.strip()]
extras = {key.removesuffix("_requirements"): lines(key) for key in cfg if key.endswith("_requirements")}

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"].split(),
    author=cfg["author"], author_email=cfg["author_email"], license="Apache-2.0",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["drifting_kd*"]), package_data={"drifting_kd": ["weights/*", "known.json"]},
    include_package_data=True, zip_safe=False,
    python_requires=f">={cfg['min_python']}", install_requires=lines("requirements"), extras_require=extras,
    entry_points={"console_scripts": lines("console_scripts"),
                  "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    # a plain path entry: the clone's own folder, which has the package's name, must not hide it from its parent folder
    options={"editable_wheel": {"mode": "compat"}},
)
