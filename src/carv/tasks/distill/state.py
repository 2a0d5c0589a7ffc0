"""All that a checkpoint of several networks needs, as one flat dictionary of named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from carv.adaptive import AdaptiveProposal


def gathered(
    modules: Mapping[str, nn.Module],
    optimisers: Mapping[str, torch.optim.Optimizer],
    proposals: Mapping[str, AdaptiveProposal],
) -> dict[str, Tensor]:
    """Weights, optimisers' moments, and what adaptive proposals have learned."""
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    for name, optimiser in optimisers.items():
        for i, moments in optimiser.state_dict()["state"].items():
            tensors |= {f"adamw.{name}.{i}.{key}": value for key, value in moments.items()}
    for name, proposal in proposals.items():
        tensors |= {f"adaptive.{name}.{key}": value for key, value in proposal.state_dict().items()}
    return tensors


def scatter(
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    optimisers: Mapping[str, torch.optim.Optimizer],
    proposals: Mapping[str, AdaptiveProposal],
) -> None:
    """Put back what `gathered` gave."""
    for name, module in modules.items():
        module.load_state_dict(_below(f"{name}.", tensors))
    for name, optimiser in optimisers.items():
        moments: dict[int, dict[str, Any]] = {}
        for key, value in _below(f"adamw.{name}.", tensors).items():
            i, moment = key.split(".")
            moments.setdefault(int(i), {})[moment] = value
        optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    for name, proposal in proposals.items():
        proposal.load_state_dict(_below(f"adaptive.{name}.", tensors))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
