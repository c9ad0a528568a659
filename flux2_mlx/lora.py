"""python -m flux2_mlx.lora: a folder of images and captions to a LoRA.

    python -m flux2_mlx.lora --data photos --output fox --trigger "sks fox"
    python -m flux2_mlx.lora --config fox.json --steps 2000
    python -m flux2_mlx.lora --resume fox

The folder of a run has lora.safetensors (the latest), checkpoints/ (LoRAs of earlier steps, and the state to go on
with), samples/, log.jsonl (a line a step), loss.png, config.json (the options), and cache/ (latents, prompts).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .cli.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. All else is imported once interrupts are handled.

    Returns:
        The exit code: see run_command. Of a data set each fault has a line; Ctrl-C, SIGTERM and SIGHUP finish the step
        and save.
    """

    def run() -> int:
        from .cli import training

        return training.run(argv)

    return run_command(run, interrupted="what was saved before is kept")


if __name__ == "__main__":
    sys.exit(main())
