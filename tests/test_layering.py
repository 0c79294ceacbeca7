"""The rooms of the package, and what each may import.

`foundry → checkpoints → models → layers → ops`; no circles, neither between rooms nor between
modules. A new room, or a new module at the top of the package, needs an entry here.
"""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import m2_plugin

PACKAGE = Path(m2_plugin.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Room: the rooms that it may import. A room is a folder, or a module that others need alone.
ROOMS = {
    "": [],  # m2_plugin/__init__.py
    "constants": [],
    "executor": [],
    "files": [],
    "pictures": [],
    "suggest": [],
    "cli": [""],
    "recipes": ["", "files", "suggest"],
    "ops.backend": [],
    "ops.fixed": [],
    "ops.gradients": [],
    "ops.reference": [],
    "ops.kernels": ["files", "ops.backend", "ops.fixed", "ops.gradients", "ops.reference"],
    "ops": ["ops.backend", "ops.fixed", "ops.gradients", "ops.kernels", "ops.reference"],
    "layers": ["ops", "ops.backend", "ops.reference"],
    "models": ["constants", "layers", "ops", "ops.backend", "ops.fixed", "suggest"],
    "checkpoints": ["constants", "data", "files", "layers", "models", "suggest"],
    "data": ["files", "suggest"],
    "glue.tasks": ["suggest"],
    "glue": ["constants", "executor", "files", "glue.tasks", "pictures", "suggest"],
    "train_report": ["files", "pictures"],
    "foundry.mds_index": [],
    "foundry.conversion": ["data", "executor", "files", "foundry.mds_index", "suggest"],
    "foundry": [
        *("checkpoints", "constants", "data", "files", "foundry.conversion", "foundry.mds_index"),
        *("glue.tasks", "inference", "layers", "models", "ops", "recipes", "suggest"),
        "train_report",
    ],
    "doctor": ["ops", "ops.backend", "ops.kernels"],
    "inference": ["checkpoints", "data", "files", "models"],
    "chunks": ["executor", "files", "inference"],
    "retrieval": ["checkpoints", "chunks", "data", "embed", "files", "inference", "pictures"],
    "retrieval.negatives": ["data", "files"],
    "tasks": ["data", "inference"],
    "embed": ["checkpoints", "chunks", "data", "files", "inference", "models", "tasks"],
    "predict": ["chunks", "data", "inference", "tasks"],
    "evaluate": ["data", "files", "foundry", "inference"],
}
TENSORS = {"numpy", "safetensors", "torch", "transformers"}
# Room: the packages that it may import beside the standard library; other rooms: none.
PACKAGES = {
    "executor": {"distributed", "torch"},
    "ops.backend": {"torch"},
    "ops.fixed": {"torch"},
    "ops.gradients": {"torch"},
    "ops.reference": {"torch"},
    "ops.kernels": {"torch", "triton"},
    "ops": {"torch"},
    "layers": {"torch"},
    "models": TENSORS,
    "checkpoints": TENSORS | {"huggingface_hub", "onnx"},
    "data": {
        "bm25s",
        "datasets",
        "fsspec",
        "huggingface_hub",
        "numpy",
        "pyarrow",
        "transformers",
        "zstandard",
    },
    "pictures": {"matplotlib"},
    "glue": {"numpy", "omegaconf", "tqdm", "yaml"},
    "train_report": {"google", "matplotlib", "numpy", "tensorboard", "wandb", "yaml"},
    "foundry.conversion": {
        *("datasets", "numpy", "pyarrow", "streaming", "tqdm", "transformers", "xxhash")
    },
    "foundry": TENSORS
    | {"composer", "datasets", "fsspec", "llmfoundry", "pyarrow", "streaming", "torchmetrics"}
    | {"tqdm", "yaml"},
    "doctor": {"torch"},
    "inference": TENSORS,
    "chunks": {"torch", "tqdm"},
    "retrieval": {"ir_measures", "numpy", "torch", "tqdm"},
    "retrieval.negatives": {"numpy", "tqdm"},
    "tasks": TENSORS | {"pyarrow", "tokenizers"},
    "embed": {"numpy"},
    "predict": {"pyarrow"},
}
# Commands that answer --help at once, and rooms for them: heavy packages only within functions.
LIGHT = ["", "constants", "executor", "files", "pictures", "suggest", "cli", "recipes", "data"]
LIGHT += ["foundry.mds_index", "foundry.conversion", "glue", "glue.tasks", "train_report"]
LIGHT += ["retrieval.negatives"]
HEAVY = {"datasets", "distributed", "fsspec", "matplotlib", "pyarrow", "streaming", "torch"}
HEAVY |= {"transformers", "wandb"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def room(module: str) -> str:
    """The longest name in `ROOMS` that the module lies in."""
    name = module.removeprefix("m2_plugin").removeprefix(".")
    while name and name not in ROOMS:
        name = name.rpartition(".")[0]
    assert name or module == "m2_plugin", f"{module} is in no room: give it an entry in ROOMS"
    return name


def statements(tree: ast.AST, functions: bool) -> list[ast.Import | ast.ImportFrom]:
    """The imports of a file, without those for type checkers only."""
    found: list[ast.Import | ast.ImportFrom] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found += statements(node, functions)
    return found


def imported(path: Path, functions: bool = True) -> set[str]:
    """Names of the modules that a file imports; with `functions`, those in functions too."""
    names: set[str] = set()
    for node in statements(ast.parse(path.read_text()), functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            continue
        assert node.module and not node.level, f"{path}: a relative import"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            names.add(inner if inner in MODULES else node.module)
    return names


def packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - {"m2_plugin"} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_what_it_may(module):
    own, names = room(module), imported(MODULES[module])
    rooms = {room(name) for name in names if name.split(".")[0] == "m2_plugin"}
    assert rooms <= {own, *ROOMS[own]}
    assert packages(names) <= PACKAGES.get(own, set())
    if own in LIGHT:
        assert not packages(imported(MODULES[module], functions=False)) & HEAVY


def test_light_rooms_import_light_rooms():
    assert not {other for name in LIGHT for other in ROOMS[name]} - set(LIGHT)


def test_every_room_is_there():
    assert {room(module) for module in MODULES} == set(ROOMS)


def test_one_module_proposes_names():
    users = {module for module, path in MODULES.items() if "difflib" in imported(path)}
    assert users == {"m2_plugin.suggest"}


def test_no_circles_between_rooms():
    TopologicalSorter(ROOMS).prepare()  # raises CycleError, which names the circle


def test_no_circles_between_modules():
    graph = {name: imported(path) & MODULES.keys() for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()
