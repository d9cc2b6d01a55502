"""git's view of a notebook (`make filter`): as `nbdev_clean` leaves it, and an experiment's without outputs.

git gives the file on stdin and takes stdout. What is no notebook, or has a conflict in it, passes as it is.
"""
import sys
from execnb.nbio import nb2str
from fastcore.utils import loads
from nbdev.clean import clean_nb

def cleaned(text: str) -> str:
    "A notebook without what opening, running and saving it add."
    nb = loads(text)
    experiment = not any("#| default_exp" in "".join(cell["source"]) for cell in nb["cells"])
    clean_nb(nb, allowed_cell_metadata_keys=["tags"])  # as settings.ini says
    if experiment:
        nb["metadata"].pop("widgets", None)
        for cell in nb["cells"]:
            if "outputs" in cell: cell["outputs"] = []
    while nb["cells"] and nb["cells"][-1]["cell_type"] == "code" and not "".join(nb["cells"][-1]["source"]).strip():
        nb["cells"].pop()  # Shift+Enter on the last cell adds an empty one
    return nb2str(nb)

if __name__ == "__main__":
    given = sys.stdin.buffer.read()
    try: given = cleaned(given.decode()).encode()
    except (ValueError, TypeError, KeyError, AttributeError): pass
    sys.stdout.buffer.write(given)
