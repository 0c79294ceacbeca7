"""Write a transformers folder that contains the model's code and works without this package.

With `trust_remote_code=True` transformers runs code in a folder if all its modules lie side by
side. They are generated from our sources: each module becomes one file, and imports between modules
become relative. Kernels are left out: in such a folder plain PyTorch computes everything.
"""

import ast
from importlib.util import find_spec
from pathlib import Path

from m2_plugin.checkpoints.card import add_section, usage
from m2_plugin.checkpoints.folder import byte_count, copy_beside_model, load_folder, save_folder
from m2_plugin.files import read_json, whole, write_json

__all__ = ["export_hub_folder", "flat_sources"]

PACKAGE = "m2_plugin"
KERNELS = "m2_plugin.ops.kernels"
CONFIGURATION = "m2_plugin.models.configuration_m2_bert"
MODELING = "m2_plugin.models.modeling_m2_bert"
AUTO_MAP = {
    "AutoConfig": "configuration_m2_bert.M2BertConfig",
    "AutoModel": "modeling_m2_bert.M2BertModel",
    "AutoModelForMaskedLM": "modeling_m2_bert.M2BertForMaskedLM",
    "AutoModelForMultipleChoice": "modeling_m2_bert.M2BertForMultipleChoice",
    "AutoModelForQuestionAnswering": "modeling_m2_bert.M2BertForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_m2_bert.M2BertForSequenceClassification",
    "AutoModelForTextEncoding": "modeling_m2_bert.M2BertForTextEmbedding",
    "AutoModelForTokenClassification": "modeling_m2_bert.M2BertForTokenClassification",
}
# The function that decides whether kernels run, and what it returns in such a folder.
GATE = "why_no_kernel"
ANSWER = "this folder holds plain PyTorch only: install m2_plugin, and load without remote code"


def export_hub_folder(folder: str | Path, out: str | Path, name: str | None = None) -> list[str]:
    """Copy a transformers folder with an M2-BERT, and add the code that it needs, no other.

    Args:
        folder: A transformers folder with an M2-BERT.
        out: The folder to write. It appears when it is complete.
        name: The name that the model will have on the hub, for its card.

    Returns:
        The names of the files in `out`.

    Raises:
        ValueError: If the folder has no complete M2-BERT, or if `out` exists.
    """
    config, weights = load_folder(folder)  # raises an error if the folder is not complete
    with whole(Path(out), byte_count(weights)) as temporary:
        temporary.mkdir()
        copy_beside_model(Path(folder), temporary)
        save_folder(temporary, config, weights)
        path, tokenizer = temporary / "config.json", temporary / "tokenizer_config.json"
        content = read_json(path) | {"auto_map": AUTO_MAP}
        if tokenizer.is_file():
            # For a model type that transformers does not know, pipelines load a tokenizer only if
            # config.json names its class.
            content["tokenizer_class"] = read_json(tokenizer).get("tokenizer_class")
        write_json(path, dict(sorted(content.items())))
        for file, source in flat_sources().items():
            (temporary / file).write_text(source, encoding="utf-8")
        code = usage(
            (config.architectures or [""])[0],
            is_m2=True,
            has_tokenizer=tokenizer.is_file(),
            where=name or ".",
            remote_code=True,
        )
        add_section(
            temporary,
            "Use without m2_plugin",
            f"This folder has the model's code, in plain PyTorch, which transformers runs if you "
            f"allow it:\n\n{code}",
            name=name or Path(out).name,
            config=config,
            parameters=sum(tensor.numel() for tensor in weights.values()),
        )
    return sorted(entry.name for entry in Path(out).iterdir())


def flat_sources() -> dict[str, str]:
    """Collect the configuration, the models and all modules that they import, as flat files.

    Returns:
        File name → source.
    """
    sources: dict[str, str] = {}
    waiting = [CONFIGURATION, MODELING]
    while waiting:
        module = waiting.pop()
        if _flat(module) not in sources:
            sources[_flat(module)], imported = _rewritten(module)
            waiting += imported
    # transformers 4 copies the modules that this file imports, but not those that they import.
    others = sorted(name for name in sources if name not in (_flat(CONFIGURATION), _flat(MODELING)))
    sources[_flat(MODELING)] += (
        "\n# Imported so that transformers copies these files too.\n"
        + "".join(f"from .{name} import __name__ as _  # noqa: E402, F401\n" for name in others)
    )
    return {f"{name}.py": source for name, source in sources.items()}


def _flat(module: str) -> str:
    """Name the file of a module: `m2_plugin.ops.backend` → `ops_backend`; `models.` is dropped."""
    return module.removeprefix(f"{PACKAGE}.").removeprefix("models.").replace(".", "_")


def _rewritten(module: str) -> tuple[str, list[str]]:
    """Return a module's source with relative imports, and the names of the modules it imports."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    lines, imported = text.splitlines(), []
    replaced: dict[int, tuple[int, str]] = {}  # first line → last line, new text
    for node in ast.walk(ast.parse(text)):
        indent = " " * getattr(node, "col_offset", 0)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            assert node.module is not None and node.end_lineno is not None
            if node.module.startswith(KERNELS):
                replaced[node.lineno] = node.end_lineno, f"{indent}raise ImportError({ANSWER!r})"
            else:
                imported.append(node.module)
                first = lines[node.lineno - 1].replace(node.module, f".{_flat(node.module)}", 1)
                replaced[node.lineno] = node.lineno, first
        elif isinstance(node, ast.FunctionDef) and node.name == GATE:
            start = node.body[1].lineno  # after its docstring
            assert node.end_lineno is not None
            replaced[start] = node.end_lineno, f"{indent}    return {ANSWER!r}"
    for start in sorted(replaced, reverse=True):
        end, new = replaced[start]
        lines[start - 1 : end] = [new]
    origin = module.replace(".", "/")
    return f"# Generated from {origin}.py (Apache-2.0).\n" + "\n".join(lines) + "\n", imported
