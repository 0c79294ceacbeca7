"""The private interfaces that we use exist, and only one module names them."""

import ast
from pathlib import Path

import pytest
from llmfoundry.models.layers.ffn import MPTMLP
from llmfoundry.models.llm_embed import ContrastiveModel, FinetuneEmbeddingModel
from llmfoundry.models.mpt import modeling_mpt
from streaming import StreamingDataset

import m2_plugin
from m2_plugin.foundry import private

PACKAGE = Path(m2_plugin.__file__).parent
LIBRARIES = {"llmfoundry", "composer", "streaming"}


def test_what_is_overridden_is_called():
    methods = [f for f in vars(ContrastiveModel).values() if hasattr(f, "__code__")]
    called = {name for method in methods for name in method.__code__.co_names}
    assert called >= set(private.OVERRIDDEN)
    assert issubclass(FinetuneEmbeddingModel, ContrastiveModel)


def test_attributes_are_read_by_llm_foundry():
    sources = {
        "_is_residual": Path(modeling_mpt.__file__).parents[1] / "layers/ffn.py",
        private.FSDP_SETTINGS: Path(modeling_mpt.__file__),
    }
    for name, path in sources.items():
        assert name in path.read_text()
    mlp = MPTMLP(d_model=8, expansion_ratio=2)
    assert private.is_residual(mlp.down_proj) and not private.is_residual(mlp.up_proj)


@pytest.mark.parametrize("method", ["prepare_shard", "_each_sample_id", "_ready_thread"])
def test_streamings_state_is_where_we_change_it(method):
    names = getattr(StreamingDataset, method).__code__.co_names
    assert "_shard_states" in names or "_event" in names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_no_other_module_imports_private_names(path):
    if path == Path(private.__file__):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            assert not [name for name in names if name.startswith("_")], ast.unparse(node)
