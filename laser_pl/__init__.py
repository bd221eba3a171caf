"""laser_pl: language models that judge their own answers, trained on PyTorch Lightning."""

__version__ = "0.1.0"
