"""Who imports whom: every arrow between our files points down, and none hides inside a function."""

import ast
import graphlib
import sys

import pytest
from conftest import ROOT

# A room (a .py file of the root, or the folder fused/) and our rooms that it may import.
ROOMS = {
    "utill": "",
    "encoders": "",
    "model": "encoders",
    "arguments": "utill",
    "runs": "utill",
    "baselines": "model encoders",
    "fused": "model baselines encoders",
    "precise_bn": "model utill",
    "nets": "model encoders baselines fused runs utill arguments",
    "cache": "utill",
    "image_data": "cache utill",
    "event_data": "image_data cache utill",
    "data": "event_data image_data cache utill",
    "training_set": "nets data utill arguments",
    "exits": "utill",
    "energy": "",
    "attacks": "model utill",
    "records": "utill",
    "pages": "records energy utill",
    "figures": "pages records runs utill",
}
ENTRY_POINTS = ("train", "test", "early_exit", "analysis", "convert")
MAY = {room: set(below.split()) for room, below in ROOMS.items()} | dict.fromkeys(ENTRY_POINTS, set(ROOMS))
TORCH_ALONE = dict.fromkeys(("encoders", "model", "baselines"), {"torch"})
LIBRARIES = TORCH_ALONE | {"utill": {"torch", "numpy"}, "fused": {"torch", "triton"}}

FILES = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "fused").glob("*.py"))]


def room_of(path):
    return "fused" if path.parent.name == "fused" else path.stem


def imports(text):
    """Top-level names of all that Python source imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("fused" if node.level else node.module.split(".")[0])  # only fused/ has relative ones
    return found


def upward(room, text):
    """What a room imports of ours and may not."""
    return (imports(text) & MAY.keys()) - MAY[room] - ({room} if room == "fused" else set())


def test_every_file_has_a_place_in_the_table():
    assert {room_of(path) for path in FILES} <= MAY.keys()


def test_the_table_has_no_circle():
    order = list(graphlib.TopologicalSorter(MAY).static_order())
    assert set(order) == MAY.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_lies_below_it(path):
    assert upward(room_of(path), path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_paper_and_what_all_share_need_few_libraries(path):
    others = imports(path.read_text(encoding="utf-8")) - MAY.keys() - set(sys.stdlib_module_names)
    assert others <= LIBRARIES.get(room_of(path), others)


def test_torchvision_is_imported_by_what_needs_it_alone():
    """Its import takes a second, which a command on digits, a net or a picture need not wait for."""
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert "torchvision" not in imports("\n".join(map(ast.unparse, top))), path


@pytest.mark.parametrize(
    ("room", "text", "found"),
    [
        ("utill", "import os, model", {"model"}),
        ("data", "from nets import NORMS", {"nets"}),
        ("runs", "def f():\n    import model as m", {"model"}),
        ("model", "try:\n    from fused.engine import attach\nexcept ImportError:\n    pass", {"fused"}),
        ("fused", "from . import cpu\nimport fused.engine\nimport utill", {"utill"}),
        ("test", "import train, nets, data", {"train"}),
    ],
)
def test_an_arrow_that_points_up_is_seen(room, text, found):
    assert upward(room, text) == found


def test_the_parts_of_the_fused_engine_do_not_import_each_other_in_a_circle():
    parts = {}
    for path in (ROOT / "fused").glob("*.py"):
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module]
        parts[path.stem] = {n.module.split(".")[1] for n in nodes if n.module.startswith("fused.")}
    assert len(list(graphlib.TopologicalSorter(parts).static_order())) == len(parts)
