"""The house rules that a test can check: imports go one way, files and functions stay small, nothing heavy comes in."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flux2_mlx

PACKAGE = Path(flux2_mlx.__file__).parent
ROOT = PACKAGE.parent

# Packages and modules at the top of flux2_mlx, each importing from those of earlier lines alone, or from itself.
ORDER = [
    {"_version", "errors", "bars"},
    {"paths"},
    {"lazy", "collectives", "fields", "writing"},
    {"disk_cache"},
    {"device"},
    {"dtypes"},
    {"models"},
    {"sampling", "quantization"},
    {"families"},
    {"checkpoints"},
    {"adapters", "imaging"},
    {"runtime"},
    {"checks"},
    {"regions"},
    {"options"},
    {"conditioning"},
    {"inputs"},
    {"refusals", "samplings"},
    {"request"},
    {"decoding"},
    {"results"},
    {"generation"},
    {"pipeline"},
    {"public"},
    {"training", "diagnosis"},
    {"cli"},
    {"generate", "convert", "fuse", "lora", "doctor"},
    {"serve"},
]
RUNTIME = {"mlx", "numpy", "safetensors", "huggingface_hub", "tokenizers", "PIL", "tqdm", "flux2_mlx"}
# An extra, and a module that Python has from 3.11 on, each imported where it is needed.
OPTIONAL = {"checkpoints.formats.gguf": {"gguf"}, "cli.training": {"tomllib"}, "serve": {"starlette", "uvicorn", "mcp"}}

MAX_LINES, MAX_FUNCTION, MAX_ARGUMENTS = 460, 80, 12
PUBLIC = {"stream", "from_pretrained"}  # whose signatures list every option


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


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


def test_every_module_has_a_place():
    assert {module_name(path).split(".")[0] for path in modules()} == set().union(*ORDER)


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_imports_go_one_way(path):
    top = module_name(path).split(".")[0]
    level = next(i for i, line in enumerate(ORDER) if top in line)
    allowed = {top}.union(*ORDER[:level])
    assert {name.split(".")[0] for name in imports(path)[0]} <= allowed


@pytest.mark.parametrize("package", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_no_package_imports_in_circles(package):
    own = {module_name(path): imports(path)[0] for path in (PACKAGE / package).rglob("*.py")}
    own = {name: {other for other in others if other in own} for name, others in own.items()}
    while own:
        free = {name for name, others in own.items() if not others & own.keys()}
        assert free, f"a circle among {sorted(own)}"
        own = {name: others for name, others in own.items() if name not in free}


def test_a_package_holds_no_code_of_its_own():
    for path in PACKAGE.rglob("*/__init__.py"):
        docstring, *rest = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr), path
        assert not rest, path


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_files_and_functions_are_small(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES
    for node in functions(path):
        start = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.lineno
        assert node.end_lineno - start < MAX_FUNCTION, node.name
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        assert len(arguments) <= MAX_ARGUMENTS or node.name in PUBLIC, node.name


def test_an_option_of_sampling_alone_is_written_in_few_places():
    """guidance_rescale touches nothing but CFG: its field, its signature, its pass through, its use."""
    lines = [line for path in modules() for line in path.read_text().splitlines() if "guidance_rescale" in line]
    assert len(lines) <= 6, lines


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_only_the_runtime_dependencies_are_imported(path):
    name = module_name(path)
    optional = OPTIONAL.get(name, OPTIONAL.get(name.partition(".")[0], set()))
    assert imports(path)[1] <= RUNTIME | optional | set(sys.stdlib_module_names)


def test_sampling_knows_neither_images_nor_memory():
    for path in (PACKAGE / "sampling").glob("*.py"):
        own, other = imports(path)
        assert "PIL" not in other, path
        assert not {name.split(".")[0] for name in own} & {"runtime", "options", "checkpoints"}, path


def test_libraries_do_not_print():
    for path in modules():
        if module_name(path).split(".")[0] in ("bars", "cli", "generate", "convert", "fuse", "lora", "doctor"):
            continue
        assert not re.search(r"^\s*print\(", path.read_text(), re.MULTILINE), path


def test_nothing_can_load_a_pickle():
    """Neither Python's own modules for it nor NumPy's and torch's ways to one."""
    for path in modules():
        assert not imports(path)[1] & {"pickle", "marshal", "shelve", "dbm"}, path
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        assert not calls & {"np.load", "numpy.load", "torch.load", "eval", "exec"}, path
        assert "allow_pickle" not in path.read_text(), path


# The steps of a command's start, and what is not imported then, nor before.
HEAVY = "torch transformers diffusers httpx asyncio tqdm importlib.metadata huggingface_hub.utils"
STARTS = {
    "import flux2_mlx, flux2_mlx.generate": "numpy mlx PIL huggingface_hub flux2_mlx.families flux2_mlx.options",
    "flux2_mlx.generate.main(['--help'])": "flux2_mlx.pipeline flux2_mlx.cli.session",
    "flux2_mlx.generate.main('a --model nano --steps 1 --width 64 --height 64 --output a.png'.split())": HEAVY,
}


def test_a_command_imports_what_it_needs(tmp_path):
    """Counted, not timed: an HTTP library, asyncio and the metadata of packages took a third of the time to start."""
    code = "import contextlib, io, sys\n"
    for step in STARTS:
        code += f"with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): {step}\n"
        code += "print(*sys.modules)\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FLUX2_MLX_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "a.png").is_file()
    loaded = [set(line.split()) for line in done.stdout.splitlines()]
    assert len(loaded) == len(STARTS)
    for there, without in zip(loaded, STARTS.values(), strict=True):
        assert not there & set(f"{without} {HEAVY}".split())
    assert "flux2_mlx.pipeline" in loaded[-1]


def test_public_names_are_there_once_asked_for():
    code = "import flux2_mlx; print(hasattr(flux2_mlx, 'nothing'), 'FluxKlein' in dir(flux2_mlx), flux2_mlx.pipeline)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False True <module 'flux2_mlx.pipeline'")


def test_the_project_speaks_of_itself_alone():
    """Nothing tracked leans on what users do not have: a folder beside the project, or a path of one machine."""
    words = ["../sha" + "red", "/wo" + "rk/", "/op" + "t/", "/ro" + "ot/"]
    suffixes = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".svg"}
    for path in [
        *ROOT.glob("*"),
        *(
            p
            for d in ("flux2_mlx", "tests", "benchmarks", "examples", "docs", ".ci", ".github")
            for p in ROOT.glob(f"{d}/**/*")
        ),
    ]:
        if path.is_file() and (path.suffix in suffixes or path.parent.name == ".ci"):
            text = path.read_text(encoding="utf-8")
            assert not [word for word in words if word in text], path
