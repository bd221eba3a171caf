"""What W&B hears of a sweep's run that ends before it has begun."""

import wandb


def report_failed_start(message: str) -> None:
    """Let a sweep know of a run that ends before it has begun; without this it would just be gone.

    Args:
        message: why, for the run's summary.
    """
    run = wandb.init(settings=wandb.Settings(silent=True))
    run.summary["error"] = message
    wandb.finish(exit_code=2)
