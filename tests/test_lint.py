"""What a GPU would fail at, and a CPU never tells, as the code itself shows it."""

import ast
from collections.abc import Callable, Iterator

import pytest

from tests.test_structure import PACKAGE, module_name, modules

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Module

# What is reversed by [::-1] and is no array, as it is written before the bracket or the call.
TUPLES = {"config.decoder_channels", "size", "tuple"}
COLLECTIVES = {f"mx.distributed.{name}" for name in ("all_sum", "all_gather", "all_max", "all_min", "sum_scatter")}
COLLECTIVES |= {"mx.distributed.send", "mx.distributed.recv", "mx.distributed.recv_like", "nn.average_gradients"}
EVALUATED_BY = "collectives._evaluated"
# Functions that give lazy arrays of files to others, which read them before they compute (see lazy.py).
LAZY_READERS = {"checkpoints.files._load_file"}


def functions(tree: ast.Module) -> Iterator[Function]:
    """A module and its functions, those inside of others too."""
    yield tree
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """What is in a function and in none inside of it; a lambda belongs to its function."""
    left: list[ast.AST] = list(function.body)
    while left:
        node = left.pop()
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
            left.extend(ast.iter_child_nodes(node))


def dotted(node: ast.AST) -> str:
    """A name with its attributes, as mx.distributed.all_sum; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner and isinstance(node, ast.Attribute) else ""


def calls(function: Function, *names: str) -> list[ast.Call]:
    """The calls of these functions, as they are written."""
    found = [node for node in own_nodes(function) if isinstance(node, ast.Call) and dotted(node.func) in names]
    return sorted(found, key=lambda call: call.lineno)


def negative_strides(tree: ast.Module, _: str) -> Iterator[str]:
    """Before MLX 0.32 a compiled kernel of Metal read a stride of -1 as 2^32 - 1."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            steps = [part.step for part in parts if isinstance(part, ast.Slice)]
            base = node.value.func if isinstance(node.value, ast.Call) else node.value
            is_tuple = isinstance(node.slice, ast.Slice) and dotted(base) in TUPLES
            if any(isinstance(step, ast.UnaryOp) for step in steps) and not is_tuple:
                yield f"{node.lineno}: a negative stride, {ast.unparse(node)}"
        elif isinstance(node, ast.Call) and dotted(node.func) in ("mx.flip", "mx.as_strided"):
            yield f"{node.lineno}: a negative stride, {ast.unparse(node)}"


def float64(tree: ast.Module, _: str) -> Iterator[str]:
    """Metal has no float64; NumPy's becomes float32 in mx.array."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "float64" and dotted(node) != "np.float64":
            yield f"{node.lineno}: float64 outside of NumPy, {ast.unparse(node)}"


def collectives_elsewhere(tree: ast.Module, module: str) -> Iterator[str]:
    """A GPU that waits for another process is stopped by macOS after some five seconds. So one function evaluates what
    is sent, then the collective by itself, on the CPU; and every collective goes through it.
    """
    owner, function = EVALUATED_BY.rsplit(".", 1)
    nodes = list(ast.walk(tree))
    given = [node.args[0] for node in nodes if isinstance(node, ast.Call) and dotted(node.func) == function]
    for node in nodes:
        if dotted(node) in COLLECTIVES and not (module == owner and node in given):
            yield f"{node.lineno}: a collective that {EVALUATED_BY} does not evaluate, {dotted(node)}"


def unread_files(tree: ast.Module, module: str) -> Iterator[str]:
    """The CPU reads files, so a GPU would wait for the disk in the midst of its commands."""
    for function in functions(tree):
        name = f"{module}.{getattr(function, 'name', '')}"
        for call in calls(function, "mx.load"):
            later = [one for one in calls(function, "mx.eval") if one.lineno > call.lineno or call in ast.walk(one)]
            if name not in LAZY_READERS and not later:
                yield f"{call.lineno}: {name} gives what it did not read, {ast.unparse(call)}"


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in modules()}
RULES: list[Callable[[ast.Module, str], Iterator[str]]] = [
    negative_strides,
    float64,
    collectives_elsewhere,
    unread_files,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_nothing_that_a_gpu_fails_at(rule):
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{fault}"
        for path, tree in TREES.items()
        for fault in rule(tree, module_name(path))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "code", "told"),
    [
        (negative_strides, "y = x[..., ::-1]", "1: a negative stride, x[..., ::-1]"),
        (negative_strides, "y = x[:, 3:0:-2]", "1: a negative stride"),
        (negative_strides, "y = size[::-1], x[::-1]", "1: a negative stride, x[::-1]"),
        (negative_strides, "y = mx.flip(x, 1)", "1: a negative stride, mx.flip"),
        (float64, "y = x.astype(mx.float64)", "1: float64 outside of NumPy, mx.float64"),
        (
            collectives_elsewhere,
            "y = mx.distributed.all_sum(x)",
            "1: a collective that collectives._evaluated does not",
        ),
        (collectives_elsewhere, "y = _evaluated(mx.distributed.all_sum, x)", "1: a collective that"),
        (collectives_elsewhere, "def f(x):\n    return nn.average_gradients(x, group)", "2: a collective that"),
        (
            unread_files,
            'def read(path):\n    return mx.load(path)["x"].astype(mx.float16)',
            "2: made_up.read gives what",
        ),
        (
            unread_files,
            "def read(path):\n    mx.eval(0)\n    return lambda: mx.load(path)",
            "3: made_up.read gives what",
        ),
    ],
)
def test_a_rule_finds_its_fault(rule, code, told):
    found = list(rule(ast.parse(code), "made_up"))
    assert len(found) == 1
    assert found[0].startswith(told)


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (negative_strides, "y = x[:-1], x[..., ::2], tuple(x)[::-1], config.decoder_channels[::-1]"),
        (float64, "y = np.array(x, np.float64), mx.float32"),
        (collectives_elsewhere, "group: mx.distributed.Group = mx.distributed.init()"),
        (unread_files, 'def read(path):\n    x = mx.load(path)["x"]\n    mx.eval(x)\n    return x + 1'),
    ],
)
def test_a_rule_passes_what_is_right(rule, code):
    assert not list(rule(ast.parse(code), "made_up"))


def test_collectives_go_through_one_function():
    assert not list(collectives_elsewhere(ast.parse("y = _evaluated(mx.distributed.all_sum, x)"), "collectives"))


def test_the_lists_name_what_is_there():
    """An entry that nothing needs any more would let a fault pass."""
    text = {module_name(path): path.read_text(encoding="utf-8") for path in modules()}
    assert all(any(name in code and "[::-1]" in code for code in text.values()) for name in TUPLES)
    for name in [*LAZY_READERS, EVALUATED_BY]:
        module, function = name.rsplit(".", 1)
        assert f"def {function}(" in text[module]
