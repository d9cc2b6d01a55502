"""A GPU made of the CPU: tensors of the device `pretend:0` hold CPU tensors and refuse to meet others.

Every wait for the device is counted.

    python tests/pretend.py NOTEBOOK '{"epochs": 2}' ...    runs notebooks on it, one after the other, in one process

What it cannot show: CUDA's own kernels, their speed, their rounding; and branches that ask for `cuda` by name.
"""
import collections, contextlib, functools, json, sys
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default}                     # may cross
ANSWERS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.item.default,
}  # the host waits for a number
WAITS, watching = collections.Counter(), False

class Device:
    "What torch asks a device's module for."
    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    _lazy_init = staticmethod(lambda: None)
    device_count, current_device = staticmethod(lambda: 1), staticmethod(lambda: 0)
    manual_seed_all = staticmethod(lambda seed: None)  # its numbers come from the CPU's generator
    get_rng_state, set_rng_state = (
        staticmethod(lambda device=0: torch.zeros(8, dtype=torch.uint8)),
        staticmethod(lambda state, device=0: None),
    )
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])

_setup_privateuseone_for_python_backend("pretend", Device())
_autocast = torch.library.Library("_", "IMPL")
_autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast changes nothing there
DEVICE = torch.device("pretend:0")

def wait(what: str) -> None:
    if watching: WAITS[what] += 1

def _there(device) -> bool: return device is not None and torch.device(device).type == "pretend"

class Pretend(torch.Tensor):
    @staticmethod
    def __new__(cls, held: torch.Tensor):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )
        self.held = held
        return self
    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None): return call(operator, args, kwargs or {})
    def __repr__(self) -> str: return f"Pretend({tuple(self.shape)}, {self.dtype})"
    def tolist(self):
        wait("tolist")
        return self.held.tolist()
    def numpy(self, *args, **kwargs): raise TypeError("can't convert a pretend:0 tensor to numpy; use Tensor.cpu()")
    __array__ = numpy

    def __reduce_ex__(self, protocol):
        return self.held.detach().clone().__reduce_ex__(protocol)  # what load_checkpoint gives anywhere

    def __deepcopy__(self, memo: dict):
        if id(self) not in memo:
            copy = self.detach().clone()
            memo[id(self)] = (
                torch.nn.Parameter(copy, self.requires_grad)
                if isinstance(self, torch.nn.Parameter)
                else copy.requires_grad_(self.requires_grad)
            )
        return memo[id(self)]

def call(operator, args: tuple, kwargs: dict):
    "Do it on the CPU, unless a GPU would refuse."
    held = functools.partial(tree_map_only, Pretend, lambda t: t.held)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    mine, host = [t for t in tensors if isinstance(t, Pretend)], [t for t in tensors if not isinstance(t, Pretend)]
    if mine and operator not in COPIES:
        strangers = [tuple(t.shape) for t in host if t.ndim]
        if strangers and operator in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            wait(f"an index from the host for {operator}")  # a GPU takes those, and waits
        elif strangers:
            raise RuntimeError(f"{operator}: expected all tensors on one device, found pretend:0 and cpu {strangers}")
        if operator in ANSWERS: wait(str(operator))
    target = kwargs.get("device")
    if kwargs.get("generator") is not None and (mine or _there(target)):
        raise RuntimeError(f"{operator}: a generator of the CPU for a tensor of pretend:0")
    blocking = not (kwargs.get("non_blocking") or operator is aten.copy_.default and len(args) > 2 and args[2])
    if _there(target):
        if operator in COPIES and host and blocking: wait(f"an upload of {tuple(args[0].shape)}")
        return tree_map_only(
            torch.Tensor,
            Pretend,
            operator(
                *held(args),
                **held(
                    kwargs | {"device": torch.device("cpu")} | ({"pin_memory": False} if "pin_memory" in kwargs else {})
                ),
            ),
        )
    if operator is aten.copy_.default and len({type(t) for t in args[:2]}) > 1 and blocking:
        wait("copy_ between host and device")
    out = operator(*held(args), **held(kwargs))
    if target is not None:
        if mine: wait(f"a download of {tuple(args[0].shape)}")
        return out
    written = [i for i, a in enumerate(operator._schema.arguments) if a.alias_info and a.alias_info.is_write]
    if written and any(r.alias_info for r in operator._schema.returns):  # in place: the very tensors come back
        back = [args[i] if i < len(args) else kwargs[operator._schema.arguments[i].name] for i in written]
        return back[0] if len(back) == 1 else tuple(back)
    return tree_map_only(torch.Tensor, Pretend, out) if mine else out

class OnTheDevice(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None): return call(operator, args, kwargs or {})

def _by_way_of_the_host(make):
    "torch.tensor and its like leave dispatching aside."
    @functools.wraps(make)
    def made(*args, device=None, **kwargs):
        return make(*args, **kwargs).to(device) if _there(device) else make(*args, device=device, **kwargs)

    return made

def _no_inference(mode=True):
    "A tensor of Python has no inference form."
    return torch.no_grad()(mode) if callable(mode) else torch.no_grad() if mode else contextlib.nullcontext()

@contextlib.contextmanager
def watched():
    global watching
    before, watching = watching, True
    try: yield
    finally: watching = before

def everywhere() -> None:
    "From here on `auto` is the device, and every step but a task's first is watched."
    from drifting_kd import cache, core, data, diffusion, drifting, evaluate, train  # noqa: F401 (evaluate chooses a device, too)

    torch.tensor, torch.as_tensor, torch.inference_mode = (
        _by_way_of_the_host(torch.tensor),
        _by_way_of_the_host(torch.as_tensor),
        _no_inference,
    )
    torch.Tensor.new_tensor = lambda self, values, **options: torch.tensor(
        values, **dict(dtype=self.dtype, device=self.device) | options
    )
    own = core.choose_device
    for module in list(sys.modules.values()):
        if getattr(module, "choose_device", None) is own:
            module.choose_device = lambda name="auto": own(name) if name == "cpu" else DEVICE
    step = train.Loop.train_step
    def train_step(self, group):
        with watched() if self.step else contextlib.nullcontext(): step(self, group)
    train.Loop.train_step = train_step
    for batches in (data.Batches, drifting.Draws, diffusion.NoisedBatches, cache.HostBatches):
        def each(self, own=batches.__iter__):
            batches = own(self)
            for i in range(len(self)):
                with watched() if i else contextlib.nullcontext(): batch = next(batches)
                yield batch
        batches.__iter__ = each
    OnTheDevice().__enter__()

def run_notebook(name: str, **settings) -> None:
    "All cells, as Jupyter would, with parameters after the cell that has them."
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell.instance()
    shell.reset(new_session=True)
    for cell in json.loads((Path(__file__).parents[1] / "nbs" / f"{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] != "code": continue
        sources = ["".join(cell["source"])]
        if "parameters" in cell["metadata"].get("tags", []):
            sources.append("\n".join(f"{k} = {v!r}" for k, v in settings.items()))
        for source in sources: shell.run_cell(source, store_history=True).raise_error()

if __name__ == "__main__":
    everywhere()
    for name, settings in zip(sys.argv[1::2], sys.argv[2::2], strict=True): run_notebook(name, **json.loads(settings))
