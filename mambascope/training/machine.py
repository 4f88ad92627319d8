"""What a result was computed on."""

import platform

import torch

__all__ = ["machine"]


def machine(device: str | torch.device) -> dict[str, str]:
    """Device and versions, for a card."""
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else platform.processor() or platform.machine()
    return {"device": f"{where.type}: {name}", "torch": torch.__version__, "python": platform.python_version()}
