"""What the server understands, as OpenAPI describes it, and as a page to read; both made from the code."""

from __future__ import annotations

import html
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from .._version import __version__
from . import native

Routes = Sequence[tuple[str, str, Callable[..., Any]]]


def describe(routes: Routes) -> dict[str, Any]:
    """The OpenAPI document of these routes."""
    paths: dict[str, Any] = {}
    for method, path, handler in routes:
        summary, _, rest = (inspect.getdoc(handler) or "").partition("\n\n")
        operation: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "the answer"}}}
        if rest:
            operation["description"] = rest
        if handler is native.draw:
            operation["requestBody"] = {"content": {"application/json": {"schema": body_schema()}}}
        paths.setdefault(path.replace(":path}", "}"), {})[method.lower()] = operation
    info = {"title": "flux2_mlx", "version": __version__, "description": inspect.getdoc(native)}
    return {"openapi": "3.1.0", "info": info, "paths": paths}


def body_schema() -> dict[str, Any]:
    """The body of POST /api/images."""
    text, picture = {"type": "string"}, {"type": "string", "format": "byte"}
    several = {"type": "array", "items": picture}
    own = {
        "prompt": text,
        "model": text,
        "lora": {"type": "object"},
        "image": several,
        "init_image": picture,
        "init_latents": text,
        "mask": picture,
        "format": {"type": "string", "enum": ["png", "jpeg", "webp"]},
        "quality": {"type": "integer", "minimum": 0, "maximum": 100},
        "preview": {"type": "string", "enum": ["webp", "jpeg", "none"]},
        "previews": {"type": "integer", "minimum": 0},
    }
    return {"type": "object", "required": ["prompt"], "properties": own | native.options_schema()}


def page(document: dict[str, Any]) -> str:
    """The document as HTML, which needs nothing from another host."""
    rows = [
        f"<tr><td>{method.upper()}</td><td><code>{html.escape(path)}</code></td>"
        f"<td>{html.escape(operation['summary'])}</td></tr>"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    options = [
        f"<tr><td><code>{name}</code></td><td>{html.escape(str(meta.get('type', '')))}</td>"
        f"<td>{html.escape(str(meta.get('description', '')))}</td></tr>"
        for name, meta in body_schema()["properties"].items()
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>flux2_mlx: APIs</title><h1>flux2_mlx</h1>'
        f'<p><a href="openapi.json">openapi.json</a></p><h2>Paths</h2><table>{"".join(rows)}</table>'
        f"<h2>The native API</h2><pre>{html.escape(document['info']['description'])}</pre>"
        f"<h2>Fields of POST /api/images</h2><table>{''.join(options)}</table></html>"
    )
