"""Repeated kernel calls without repeated thought: the launches of one call, written out as a straight function.

A small scan runs for 15 µs on a GPU, and the Python between the public call and the driver takes longer than that. For
tensors of one kind (shapes, strides, dtypes, device, alignment) all of it comes out the same but the addresses. So the
second call of a kind is watched: which compiled kernels it launches, on which grids, and where each address comes from
(an argument, a result, scratch). From the third on, a function written from these notes allocates the results and one
scratch, and launches. Whatever it could not repeat faithfully (a copy made on the way, a result that is a view) leaves
the kind to the ordinary code. Watching uses what torch sees, so host code needs no care of its own.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import update_wrapper, wraps
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mambascope.ops.ready import Guarded, kind_of
from mambascope.ops.scan.triton_math import INTERPRETED

__all__ = ["Replayed", "note", "replayed"]

_MOST = 2048  # kinds that are remembered, of one function
_HARMLESS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "promote_types"}
_MUCH = 1 << 20  # entries of a tensor that Triton's interpreter takes minutes for
_warned: list[str] = []
_watching = threading.local()  # .launches: of the call that this thread watches


def note(compiled: Any, programs: int, arguments: Sequence[Any], constants: Sequence[Any]) -> None:
    """A launch that has been made; kept if its thread watches."""
    launches = getattr(_watching, "launches", None)
    if launches is not None:
        launches.append((compiled, programs, tuple(arguments), tuple(constants)))


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None


def _telling(function: Callable[..., Any], tensors: int) -> Callable[..., Any]:
    """The function, whose out-of-memory errors say what was asked of it."""

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except torch.OutOfMemoryError as error:
            raise _told(error, function.__name__, args[:tensors]) from None

    return call


def _told(error: Exception, name: str, tensors: Sequence[Any]) -> Exception:
    shapes = ", ".join(str(tuple(x.shape)) for x in tensors if x is not None)
    return torch.OutOfMemoryError(f"{name} of tensors {shapes} does not fit: {error}")


def _warn_of_interpreter(name: str, x: Tensor) -> None:
    if INTERPRETED and x.numel() > _MUCH and not _warned:
        _warned.append(name)
        warnings.warn(
            f"TRITON_INTERPRET is set, so {name} of a tensor {tuple(x.shape)} runs step by step in Python: minutes "
            "where backend='cpu' or 'torch' takes milliseconds. It is meant for tests at small shapes.",
            stacklevel=4,
        )


class Replayed:
    """A kernel's host function, whose first ``tensors`` positional arguments are tensors or None."""

    def __init__(self, function: Callable[..., Any], tensors: int) -> None:
        self.function, self.tensors = _telling(function, tensors), tensors
        self.known: dict[Any, Callable[..., Any] | None] = {}
        self.latest = Guarded()
        update_wrapper(self, function)

    def __call__(self, *args: Any, **options: Any) -> Any:
        count = self.tensors
        if not _on_gpu(args[0]):
            _warn_of_interpreter(self.function.__name__, args[0])
            return self.function(*args, **options)
        # In a call that is watched, this one's launches are noted too: they must be made the ordinary way.
        if len(args) < count or getattr(_watching, "launches", None) is not None:
            return self.function(*args, **options)
        tensors, rest = args[:count], (args[count:], *options.items())
        found, where = self.latest.find(tensors, rest)
        if found is not None:
            return found(*args, **options)
        kind = kind_of(tensors)
        if kind is None:
            return self.function(*args, **options)
        key = (kind, *rest)
        found = self.known.get(key)
        if found is None:
            return self.learn(key, args, options)
        if getattr(found, "aligned", False):
            self.latest.learn(where, found)
        return found(*args, **options)

    def learn(self, key: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """An ordinary call; watched if its kind was seen before."""
        if key not in self.known:
            if len(self.known) >= _MOST:
                self.forget()
            self.known[key] = None
            return self.function(*args, **options)
        result, replay = _watch(self.function, args, options, self.tensors)
        self.known[key] = replay or self.function
        return result

    def ready(self, kind: Any, *options: Any, rest: tuple[Any, ...] = ()) -> Callable[..., Any] | None:
        """What repeats calls of a kind with these further arguments and options (name and value of each, in the order
        in which they are passed); None before there is anything, and for calls that can only be made again."""
        found = self.known.get((kind, rest, *options))
        return None if found is self.function else found

    def forget(self) -> None:
        """After a change of what host code decides, by hand."""
        self.known.clear()
        self.latest.known.clear()


def replayed(tensors: int) -> Callable[[Callable[..., Any]], Replayed]:
    """Decorator; see `Replayed`."""
    return lambda function: Replayed(function, tensors)


class _Watch(TorchDispatchMode):
    """Whether a call did anything on tensors besides launches: allocations and views may be repeated, nothing else."""

    faithful = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        view = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not view and func._schema.name.split("::")[1] not in _HARMLESS:
            self.faithful = False
        return func(*args, **(kwargs or {}))


def _watch(
    function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], tensors: int
) -> tuple[Any, Callable[..., Any] | None]:
    launches: list[Any] = []
    _watching.launches = launches
    try:
        with _Watch() as watch:
            result = function(*args, **options)
    finally:
        _watching.launches = None
    inputs: Sequence[Tensor | None] = args[:tensors]
    given = [id(x) for x in inputs if x is not None]
    if not watch.faithful or not launches or len(set(given)) < len(given):
        return result, None
    try:
        return result, _write(function, args, options, launches, inputs, result)
    except _CannotRepeatError:
        return result, None


class _CannotRepeatError(Exception):
    pass


# What torch's compiler allocates with in the code that it writes: less than half of the time of `torch.empty_strided`.
_quick_empty: Any = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None)


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _launcher(run: Any) -> tuple[Any, tuple[Any, ...]]:
    """What launches a compiled kernel, and what it takes between the kernel's handle and its metadata: the driver's own
    function where Triton 3.6 only puts constants in between, else Triton's object as it is."""
    own = getattr(run, "launch", None)
    plain = own is not None and not hasattr(run, "kernel_signature")  # of later versions, which launch in another way
    if not plain or run.global_scratch_size or run.profile_scratch_size:
        return run, ()
    return own, (run.launch_cooperative_grid, run.launch_pdl, None, None)


def _current_device() -> Any:
    """Triton's function that tells the current device, or what it comes down to."""
    own = triton.runtime.driver.active.get_current_device
    return torch._C._cuda_getDevice if own is torch.cuda.current_device else own  # pyright: ignore[reportAttributeAccessIssue]


class _Script:
    """Source of a replay: how results, scratch and addresses are named in it."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        self.inputs = inputs
        self.of_input = {id(x): i for i, x in enumerate(inputs) if x is not None}
        self.from_outside = {x.untyped_storage().data_ptr() for x in inputs if x is not None}
        self.results: dict[int, str] = {}  # name by storage
        self.kinds: dict[int, tuple[tuple[int, ...], torch.dtype]] = {}  # shape and dtype of that name
        self.scratch: dict[int, int] = {}  # offset by storage
        self.size = 0
        self.lines: list[str] = []
        self.names: dict[str, Any] = {}
        self.quick = _quick_empty is not None and all(x is None or x.is_cuda for x in inputs)

    def constant(self, value: Any) -> str:
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    def new(self, shape: tuple[int, ...], like: Tensor) -> str:
        """Expression for a contiguous tensor of this shape, of the dtype and device of another."""
        return f"empty({shape}, {_dense(shape)}, {self.kind(like.dtype, like.device)})"

    def kind(self, dtype: torch.dtype, device: torch.device) -> str:
        """Further arguments of an allocation; the quick one is on the current device, which the replay has checked."""
        name = self.constant(dtype)
        return name if self.quick else f"dtype={name}, device={self.constant(device)}"

    def result(self, x: Any) -> str:
        """Expression for a result; its allocation becomes a line of its own."""
        if x is None:
            return "None"
        if isinstance(x, tuple) and type(x) is tuple:
            return "(" + "".join(self.result(v) + ", " for v in x) + ")"
        if isinstance(x, dict):
            return "{" + ", ".join(f"{k!r}: {self.result(v)}" for k, v in x.items()) + "}"
        if not isinstance(x, Tensor):
            raise _CannotRepeatError
        if id(x) in self.of_input:
            return f"a{self.of_input[id(x)]}"
        if x.numel() == 0:
            return self.new(tuple(x.shape), x)
        storage = x.untyped_storage()
        at, whole = storage.data_ptr(), storage.nbytes() == x.numel() * x.element_size() and x.is_contiguous()
        if at in self.from_outside:
            raise _CannotRepeatError
        if at not in self.results:
            shape = tuple(x.shape) if whole else (storage.nbytes() // x.element_size(),)
            self.results[at] = f"r{len(self.results)}"
            self.kinds[at] = (shape, x.dtype)
            self.lines.append(f"{self.results[at]} = {self.new(shape, x)}")
        elif self.kinds[at][1] != x.dtype:
            raise _CannotRepeatError
        if self.kinds[at][0] == tuple(x.shape) and whole:
            return self.results[at]
        return f"{self.results[at]}.as_strided({tuple(x.shape)}, {x.stride()}, {x.storage_offset()})"

    def address(self, x: Any) -> str:
        """Expression for a launch's argument."""
        if x is None or isinstance(x, (bool, int, float)):
            return repr(x)
        if not isinstance(x, Tensor):
            raise _CannotRepeatError
        if id(x) in self.of_input:
            return f"p{self.of_input[id(x)]}"
        if x.numel() == 0:
            return "0"
        storage = x.untyped_storage()
        at = storage.data_ptr()
        offset = x.data_ptr() - at
        if at in self.from_outside:
            holders = [i for i, y in enumerate(self.inputs) if y is not None and y.untyped_storage().data_ptr() == at]
            if len(holders) > 1:  # which of them it is a view of cannot be told
                raise _CannotRepeatError
            first = self.inputs[holders[0]]
            assert first is not None
            return f"p{holders[0]} + {x.data_ptr() - first.data_ptr()}"
        if at in self.results:
            return f"{self.results[at]}.data_ptr() + {offset}" if offset else f"{self.results[at]}.data_ptr()"
        if at not in self.scratch:
            self.scratch[at] = self.size
            self.size += -(-storage.nbytes() // 256) * 256
        return f"s + {self.scratch[at] + offset}"


def _write(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
    launches: list[Any],
    inputs: Sequence[Tensor | None],
    result: Any,
) -> Callable[..., Any]:
    """The function that repeats these launches and hands back results like these."""
    first = inputs[0]
    assert first is not None
    script = _Script(inputs)
    answer = script.result(result)
    calls, used = [], set()
    for compiled, programs, arguments, constants in launches:
        addresses = [script.address(x) for x in arguments]
        used |= {a.split(" ")[0] for a in addresses if a.startswith("p")}
        run, between = _launcher(compiled.run)
        run, handle, metadata = (script.constant(x) for x in (run, compiled.function, compiled.packed_metadata))
        rest = [x if isinstance(x, str) else script.constant(x) for x in map(_literal, constants)]
        start = (
            f"{run}({programs}, 1, 1, stream, {', '.join([handle, *map(repr, between), metadata])}, None, None, None"
        )
        calls.append(", ".join([start, *addresses, *rest]) + ")")
    index = first.get_device()
    # Another current device, or somebody's launch hooks: the ordinary code knows what to do.
    checks = [f"if current() != {index}" + "".join(f" or {script.constant(h)}.calls" for h in _hooks()) + ":"]
    checks.append("    return ordinary(" + ", ".join(f"a{i}" for i in range(len(inputs))) + ", *rest, **options)")
    addresses = [f"p{i} = a{i}.data_ptr()" for i, x in enumerate(inputs) if x is not None and f"p{i}" in used]
    aligned = not any(x is not None and f"p{i}" in used and x.data_ptr() & 15 for i, x in enumerate(inputs))
    if aligned and used:  # so that callers need not look at addresses
        addresses += [f"if ({' | '.join(sorted(used))}) & 15:", checks[-1]]
    if script.size:
        kind = script.kind(torch.uint8, first.device)
        script.lines.append(f"scratch = empty(({script.size},), (1,), {kind})")
        script.lines.append("s = scratch.data_ptr()")
    inputs_again = "(" + "".join(f"a{i}, " for i in range(len(inputs))) + ")"
    allocate = ["try:", *(f"    {line}" for line in script.lines or ["pass"]), "except OutOfMemory as error:"]
    allocate.append(f"    raise told(error, {function.__name__!r}, {inputs_again}) from None")
    body = [*checks, *addresses, *allocate, f"stream = raw_stream({index})", *calls, f"return {answer}"]
    head = "def replay(" + ", ".join(f"a{i}" for i in range(len(inputs))) + ", *_, **__):\n"
    names = script.names | {
        "OutOfMemory": torch.OutOfMemoryError,
        "told": _told,
        "empty": _quick_empty if script.quick else torch.empty_strided,
        "rest": args[len(inputs) :],
        "options": options,
        "ordinary": function,
        "current": _current_device(),
        "raw_stream": triton.runtime.driver.active.get_current_stream,
    }
    source = head + "".join(f"    {line}\n" for line in body)
    exec(compile(source, f"<replay of {function.__name__}>", "exec"), names)  # noqa: S102 - of our own making
    names["replay"].aligned = aligned
    return names["replay"]


def _literal(x: Any) -> Any:
    return repr(x) if x is None or isinstance(x, (bool, int)) else x


def _hooks() -> list[Any]:
    """Triton's launch hooks, where this version keeps them in lists."""
    runtime = triton.knobs.runtime
    return [h for h in (runtime.launch_enter_hook, runtime.launch_exit_hook) if hasattr(h, "calls")]
