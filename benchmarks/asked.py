"The command line of a benchmark: its options are their defaults."
import argparse
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"

def asked(doc: str,   # the script's docstring
          out: str,   # name of the result in results/
          **options,  # name=default; a list takes several words, False is a switch
         ) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, default in options.items():
        several = isinstance(default, list)
        how = dict(type=type(default[0] if several else default), default=default)
        if several: how["nargs"] = "+"
        if default is False: how = dict(action="store_true")
        parser.add_argument(f"--{name.replace('_', '-')}", help=" ", **how)
    parser.add_argument("--out", type=Path, default=RESULTS / out, help="where the result goes")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return args
