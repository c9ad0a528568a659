"""The house rules that a test can check: imports go one way, and nothing heavy comes in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flux2_mlx

PACKAGE = Path(flux2_mlx.__file__).parent
ROOT = PACKAGE.parent

# Each layer imports from those before it.
LAYERS = [
    {"_version", "config", "cache", "terminal"},
    {"models.rope", "models.blocks", "models.step_cache"},
    {"models.transformer", "models.text_encoder", "models.autoencoder", "models.taef2"},
    {"latents", "sampler", "checkpoints", "tokenizer", "memory"},
    {"quantize", "gguf_files"},
    {"images", "weights", "jobs", "roofline"},
    {"streaming", "inpaint", "preview", "adapters", "dataset"},
    {"plan", "writing"},
    {"commands", "pipeline"},
    {"session", "training"},
    {"generate", "convert", "fuse", "lora"},
]
RUNTIME = {"mlx", "numpy", "safetensors", "huggingface_hub", "tokenizers", "PIL", "tqdm", "flux2_mlx"}
# An extra, and a module that Python has from 3.11 on, each imported where it is needed.
OPTIONAL = {"gguf_files": {"gguf"}, "lora": {"tomllib"}}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def imports(path: Path) -> tuple[set[str], set[str]]:
    """(modules of this package, top-level names of other packages) that a file imports anywhere."""
    own, other = set(), set()
    parents = module_name(path).split(".")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            other |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            own.add(".".join([*parents[: -node.level], *(node.module or "").split(".")]).strip("."))
        elif isinstance(node, ast.ImportFrom):
            other.add(str(node.module).split(".")[0])
    return own, other


def test_every_module_has_a_layer():
    assert {module_name(path) for path in modules()} == set().union(*LAYERS)


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_imports_go_one_way(path):
    level = next(i for i, layer in enumerate(LAYERS) if module_name(path) in layer)
    allowed = set().union(*LAYERS[:level])
    if level == 0:
        allowed = {"_version", "config"}
    assert imports(path)[0] <= allowed


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_only_the_runtime_dependencies_are_imported(path):
    assert imports(path)[1] <= RUNTIME | OPTIONAL.get(module_name(path), set()) | set(sys.stdlib_module_names)


def test_nothing_can_load_a_pickle():
    """Neither Python's own modules for it nor NumPy's and torch's ways to one."""
    for path in modules():
        assert not imports(path)[1] & {"pickle", "marshal", "shelve", "dbm"}, path
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        assert not calls & {"np.load", "numpy.load", "torch.load", "eval", "exec"}, path
        assert "allow_pickle" not in path.read_text(), path


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, flux2_mlx, flux2_mlx.generate;"
        "print([m for m in ('torch', 'transformers', 'diffusers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_project_speaks_of_itself_alone():
    """Nothing tracked leans on what users do not have: a folder beside the project, or a path of one machine."""
    words = ["../sha" + "red", "/wo" + "rk/", "/op" + "t/", "/ro" + "ot/"]
    suffixes = {".py", ".md", ".toml", ".yaml", ".json", ".svg"}
    for path in [
        *ROOT.glob("*"),
        *(p for d in ("flux2_mlx", "tests", "benchmarks", "examples", ".ci") for p in ROOT.glob(f"{d}/**/*")),
    ]:
        if path.is_file() and (path.suffix in suffixes or path.parent.name == ".ci"):
            text = path.read_text(encoding="utf-8")
            assert not [word for word in words if word in text], path
