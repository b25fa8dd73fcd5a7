"""What the plain loop runs, as it stands in memory: the code of torch, model.py and baselines.py, and what that reads.

The engine stands for what was there when it was imported, and was proved on it: what was replaced since runs plain.
"""

import functools
import sys
import sysconfig
import types
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import baselines
import encoders
import model
from fused.common import Unsupported

OURS = ("model", "baselines")
TABLES = ("ARCHS", "NORMS", "ENCODERS")  # to which rows are added; a net is made by then
LIVE = ("SURROGATE_ALPHA",)  # which the engine reads at each call
PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device)
BUILT_IN = (types.GetSetDescriptorType, types.MemberDescriptorType, types.MethodDescriptorType)
TORCHS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity)
TORCH_CODE = [(nn.Module, "_call_impl"), (nn.Conv2d, "_conv_forward")]
TORCH_CODE += [(kind, name) for kind in TORCHS for name in ("forward", "__call__", "_check_input_dim")]
TORCH_CODE += [(F, name) for name in ("conv2d", "linear", "batch_norm", "avg_pool2d", "adaptive_avg_pool2d")]
TORCH_CODE += [(torch, name) for name in ("stack", "cat", "zeros_like", "promote_types", "batch_norm")]
TORCH_CODE += [(torch.Tensor, name) for name in ("abs", "clamp", "detach", "to")]
OF_FILES = {"__file__", "__cached__", "__builtins__", "__annotations__", "__annotate__", "__conditional_annotations__"}
OF_FILES |= vars(types.ModuleType("m")).keys()  # what every module has
FILES = tuple(module.__file__ for module in (model, baselines, encoders))
FOLDERS = (f"{Path(torch.__file__).parent}/", f"{sysconfig.get_path('stdlib')}/")
PACKAGES = {"torch", "numpy", "math", "encoders", *OURS, *sys.stdlib_module_names}
OF_MODULES = vars(nn.Module()).keys()
OF_CLASSES = {*vars(types.new_class("C")), "__annotations__", "__annotate_func__", "__annotations_cache__", "__init__"}
CODE_KEYS = ["co_code", "co_consts", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_flags"]
CODE_KEYS += ["co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_exceptiontable"]


def code():
    """{name: what stands there now}, to be compared with what stood there before.

    Raises `Unsupported` where something of another file is called, or something is read that may change unseen.
    """
    read = {f"{owner.__name__}.{name}": getattr(owner, name) for owner, name in TORCH_CODE if hasattr(owner, name)}
    for module in (model, baselines, encoders):
        for name, value in vars(module).items():
            if name not in (*OF_FILES, *TABLES, *LIVE):
                read[f"{module.__name__}.{name}"] = value
                read |= _read(name, value, module.__name__)
    return {name: fixed(name, value) for name, value in read.items()}


def settings_of(module):
    """What a module holds besides parameters, buffers and modules, by which its code may go, as a hashable value.

    Raises `Unsupported` as `code`.
    """
    return tuple((name, fixed(name, v)) for name, v in sorted(vars(module).items()) if name not in OF_MODULES)


def _read(name, kind, home):
    """{name: value} of what the code of a class of that module may read. `__init__` has run, and does not count."""
    if not isinstance(kind, type) or kind.__module__ != home or issubclass(kind, tuple):
        return {}
    found = {f"{name}.__bases__": kind.__bases__}
    for key, value in vars(kind).items():
        if key not in OF_CLASSES:
            found |= {f"{name}.{key}": value} | _read(f"{name}.{key}", value, home)
    return found


def fixed(name, value):
    """A value that equals another one only if code that reads them does the same."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if type(value) in PLAIN:
        return type(value), value
    if type(value) in (tuple, frozenset):
        return type(value), *(fixed(name, v) for v in value)
    if type(value) is property:
        return tuple(fixed(name, v) for v in (value.fget, value.fset))
    if type(value) is functools.partial and not vars(value):
        return fixed(name, (value.func, value.args, *value.keywords.items()))
    if isinstance(value, BUILT_IN):
        return value
    of_module = isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, types.ModuleType | None)
    if not of_module and not isinstance(value, (type, types.ModuleType, types.FunctionType)):
        raise Unsupported(f"{name} is a {type(value).__name__}, which may change unseen")
    home, its_code = getattr(value, "__module__", None) or value.__name__, getattr(value, "__code__", None)
    of_file = not its_code or its_code.co_filename in FILES or its_code.co_filename.startswith(FOLDERS)
    if home.partition(".")[0] not in PACKAGES or not of_file:
        raise Unsupported(f"{name} is of another file")
    if not its_code:
        return value
    read = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *vars(value).items())
    read += tuple(cell.cell_contents for cell in value.__closure__ or ())
    return value, its_code, fixed(name, read)


def text(value):
    """Of what `code` or `settings_of` found: the same text in every process."""
    if isinstance(value, types.CodeType):
        value = tuple(getattr(value, key, None) for key in CODE_KEYS)
    if isinstance(value, tuple):
        return f"({','.join(map(text, value))})"
    return getattr(value, "__qualname__", None) or repr(value)
