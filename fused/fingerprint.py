"""What code does, as a value to be compared and written down: that of functions and classes, and of what those read."""

import functools
import sys
import sysconfig
import types
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn as nn

from fused.common import Unsupported

PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device)
UNREAD = {
    "__init__",
    "__doc__",
    "__annotations__",
    "__dict__",
    "__weakref__",
    "__firstlineno__",
    "__static_attributes__",
}
INERT = (
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.BuiltinFunctionType,
    type(namedtuple("_", "x").x),
)
OF_MODULES = vars(nn.Module()).keys()


@functools.cache
def _shipped(package):
    """Whether a package's code is taken as it is: torch's, numpy's, ours, or the standard library's."""
    if package in ("torch", "numpy", "fused"):
        return True
    file = getattr(sys.modules.get(package), "__file__", None)  # of a user's own statistics.py it lies elsewhere
    own = package == "__main__" or file and not Path(file).is_relative_to(sysconfig.get_path("stdlib"))
    return package in sys.stdlib_module_names and not own


def settings_of(module, but=()):
    """What a module holds besides parameters, buffers and modules, by which its code may go, as a hashable value.

    but: names that are left out. Raises `Unsupported` as `content`.
    """
    return tuple(
        (k, content(v, set())) for k, v in sorted(vars(module).items()) if k not in OF_MODULES and k not in but
    )


def content(value, seen):
    """What a value is for code that reads it, hashable: of functions and classes their code, and what that reads.

    seen: the functions and classes met before, to which a name is enough. `__init__` has run, and does not count.
    Raises `Unsupported` of a value that may change unseen, as a tensor does.
    """
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if type(value) in PLAIN:
        return value
    if isinstance(value, property):
        value = (value.fget, value.fset)
    if isinstance(value, functools.partial):
        value = (value.func, value.args, value.keywords)
    if type(value) in (tuple, list):
        return tuple(content(v, seen) for v in value)
    if type(value) in (set, frozenset):
        return frozenset(content(v, seen) for v in value)
    if type(value) is dict:
        return tuple((content(k, seen), content(v, seen)) for k, v in value.items())
    name = f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', None)}"
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, INERT):
        return name
    if isinstance(value, (type, types.FunctionType)):
        if value in seen or _shipped(name.partition(".")[0]):
            return name
        seen.add(value)
        return name, *(_of_class(value, seen) if isinstance(value, type) else _of_function(value, seen))
    raise Unsupported(f"its code reads a {type(value).__name__}, which may change unseen")


def _of_class(kind, seen):
    yield from (content(base, seen) for base in kind.__mro__[1:])
    yield from ((name, content(vars(kind)[name], seen)) for name in sorted(vars(kind).keys() - UNREAD))


def _of_function(function, seen):
    names = _names(function.__code__)
    read = [function.__globals__[name] for name in names if name in function.__globals__]
    modules = [m for m in read if isinstance(m, types.ModuleType) and not _shipped(m.__name__.partition(".")[0])]
    read += [getattr(module, name) for module in modules for name in names if hasattr(module, name)]
    read += [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    yield function.__code__
    yield from (content(v, seen) for v in (*read, function.__defaults__, function.__kwdefaults__))


@functools.cache
def _names(code):
    """All names of globals and attributes in a function's code, those of functions inside it included; sorted."""
    inner = [name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names(const)]
    return sorted({*code.co_names, *inner})


def text_of(value):
    """The same text in every process for the same content."""
    if isinstance(value, types.CodeType):
        read = (value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
        called = (value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags)
        value = (value.co_code, value.co_consts, *read, *called, getattr(value, "co_exceptiontable", None))
    if isinstance(value, frozenset):
        return f"{{{','.join(sorted(map(text_of, value)))}}}"
    if isinstance(value, tuple):
        return f"({','.join(map(text_of, value))})"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)
