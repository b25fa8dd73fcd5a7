"""What code does, as a value to be compared and written down: that of functions and classes, and of what those read."""

import functools
import inspect
import sys
import types
from collections import namedtuple

PLAIN = (int, float, complex, str, bytes, type(None), type(Ellipsis))
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
KNOWN = {"torch", "numpy", "fused", *sys.stdlib_module_names} - {"__main__"}  # packages whose code is taken as it is


class Itself:
    """An object whose content does not tell what it does: it equals itself alone."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, Itself) and self.value is other.value

    def __hash__(self):
        return id(self.value)


def settings_of(module):
    """Numbers, words and functions in a module, by which its code may go, as a hashable value."""
    found = {k: v for k, v in vars(module).items() if isinstance(v, PLAIN) or inspect.isfunction(v)}
    return tuple((k, content(found[k], set())) for k in sorted(found.keys() - {"training"}))


def content(value, seen):
    """What a value is for code that reads it, hashable: of functions and classes their code, and what that reads.

    seen: the functions and classes met before, to which a name is enough. `__init__` has run, and does not count.
    """
    value = getattr(value, "__func__", value)  # of a static or class method
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, property):
        value = (value.fget, value.fset)
    if isinstance(value, (tuple, list)):
        return tuple(content(v, seen) for v in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(content(v, seen) for v in value)
    if isinstance(value, dict):
        return tuple((content(k, seen), content(v, seen)) for k, v in value.items())
    name = f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', None)}"
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, INERT):
        return name
    if isinstance(value, (type, types.FunctionType)):
        if value in seen or name.split(".")[0] in KNOWN:
            return name
        seen.add(value)
        return name, *(_of_class(value, seen) if isinstance(value, type) else _of_function(value, seen))
    state = {k: v for k, v in getattr(value, "__dict__", {}).items() if isinstance(v, PLAIN)}
    return Itself(value), *state.items()


def _of_class(kind, seen):
    yield from (content(base, seen) for base in kind.__mro__[1:])
    yield from ((name, content(vars(kind)[name], seen)) for name in sorted(vars(kind).keys() - UNREAD))


def _of_function(function, seen):
    names = _names(function.__code__)
    read = [function.__globals__[name] for name in names if name in function.__globals__]
    modules = [m for m in read if isinstance(m, types.ModuleType) and m.__name__.split(".")[0] not in KNOWN]
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
    """The same text in every process for the same content. Raises TypeError where a value has none."""
    if isinstance(value, types.CodeType):
        value = (value.co_code, value.co_consts, value.co_names, value.co_varnames, value.co_freevars)
    if isinstance(value, frozenset):
        return f"{{{','.join(sorted(map(text_of, value)))}}}"
    if isinstance(value, tuple):
        return f"({','.join(map(text_of, value))})"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, PLAIN):
        return repr(value)
    raise TypeError(f"{type(value)} differs from process to process")
