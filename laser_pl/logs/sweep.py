"""What W&B hears of a sweep's run that ends before it has begun."""

import sys

import wandb

from laser_pl.errors import one_line


def report_failed_start(message: str) -> None:
    """Let a sweep know of a run that ends before it has begun; without this it would just be gone.

    Args:
        message: why, for the run's summary.
    """
    try:
        run = wandb.init(settings=wandb.Settings(silent=True))
    except wandb.Error as error:
        print(f"wandb: hears nothing of this: {one_line(error)}", file=sys.stderr)
        return
    run.summary["error"] = message
    wandb.finish(exit_code=2)
