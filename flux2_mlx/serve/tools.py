"""The tools of flux2-mcp."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from ..errors import InputError
from ..imaging.files import encode_image, save_image
from .answers import follow
from .events import Failure, Picture, StepDone
from .orders import OPTIONS, Pictures, decode_picture
from .studio import Studio

SHOWN_SIDE, SHOWN_QUALITY = 1024, 85  # of the image in an answer, which hosts want below a megabyte


def build_server(studio: Studio, output: Path, readable: Sequence[Path]) -> MCPServer:
    """The tools.

    Args:
        studio: its worker runs.
        output: folder of the images.
        readable: folders whose pictures may be edited, too.
    """
    server: MCPServer = MCPServer(
        "flux2", log_level="CRITICAL", instructions="Generates and edits images with FLUX.2 [klein] on this machine."
    )
    names = ", ".join(dict.fromkeys(OPTIONS.values()))

    async def draw(prompt: str, pictures: Pictures, given: dict[str, Any], context: Context) -> list[Any]:
        options = {name: value for name, value in given.items() if value is not None}
        answer: list[Any] = []
        try:
            order = await studio.order("mcp", {"prompt": prompt, **options}, pictures)
            async with contextlib.aclosing(follow(studio.worker, order)) as events:
                async for event in events:
                    if isinstance(event, StepDone):
                        await context.report_progress(event.index, event.steps)
                    elif isinstance(event, Picture):
                        file = output / f"flux2-{event.settings['seed']}.png"
                        written = save_image(event.picture, file, event.settings, event.parameters)
                        shown = event.picture.copy()
                        shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
                        answer.append(Image(data=encode_image(shown, ".jpg", quality=SHOWN_QUALITY), format="jpeg"))
                        answer.append("\n".join((f"{written}  seed {event.settings['seed']}", *event.warnings)))
        except (InputError, Failure) as error:
            raise ToolError(studio.catalogue.tell(error)) from None  # whose message is told, and nothing else
        return answer

    options_help = f"Further options by name: {names}. LoRAs: {', '.join(studio.catalogue.loras) or 'none'}."

    @server.tool(
        structured_output=False,
        description=f"Generate an image of a prompt. Returns it and the path of its PNG file. {options_help}",
    )
    async def generate_image(
        prompt: str,
        context: Context,
        width: int | None = None,
        height: int | None = None,
        seed: int | None = None,
        steps: int | None = None,
        lora: dict[str, float] | None = None,
        options: dict[str, Any] | None = None,
    ) -> list[Any]:
        given = {"width": width, "height": height, "seed": seed, "steps": steps, "lora": lora}
        return await draw(prompt, Pictures(), {**given, **(options or {})}, context)

    @server.tool(
        structured_output=False,
        description="Edit pictures as a prompt says, or take a subject or a style from them. Each is a path in a "
        "folder that the owner listed (images generated before among them), or base64. With strength (0 to 1) the "
        f"first is what img2img starts from. Returns the image and the path of its PNG file. {options_help}",
    )
    async def edit_image(
        prompt: str,
        images: list[str],
        context: Context,
        strength: float | None = None,
        seed: int | None = None,
        steps: int | None = None,
        lora: dict[str, float] | None = None,
        options: dict[str, Any] | None = None,
    ) -> list[Any]:
        try:
            contents = [picture(text, [output, *readable]) for text in images]
        except InputError as error:
            raise ToolError(str(error)) from None
        first = contents.pop(0) if strength is not None and contents else None
        given = {"strength": strength, "seed": seed, "steps": steps, "lora": lora}
        return await draw(prompt, Pictures(contents, first), {**given, **(options or {})}, context)

    return server


def picture(text: str, folders: Sequence[Path]) -> bytes:
    """The content of a picture: a file in one of these folders, or base64.

    Raises:
        InputError: for another file.
    """
    if not text.startswith(("/", "~", ".")) or len(text) > os.pathconf("/", "PC_PATH_MAX"):
        return decode_picture(text, "image")
    file = Path(os.path.realpath(os.path.expanduser(text)))
    if not any(file.is_relative_to(os.path.realpath(folder)) for folder in folders):
        listed = ", ".join(map(str, folders))
        raise InputError(f"{text} is in none of the folders that pictures are read from: {listed}; --images adds one")
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {text}: {error.strerror}") from None
