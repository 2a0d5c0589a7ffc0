"""The judge: a small convolutional classifier, trained by `carv.training.digits`, read as data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from carv.checkpoint import write_whole

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_KIND = "carv-judge"


@dataclass(frozen=True)
class JudgeConfig:
    """The shape of a judge.

    Attributes:
        size: pixels along each side of its pictures, a multiple of 4.
        classes: that it tells apart.
        width: channels at the highest resolution; twice as many lower down.
        features: before the last layer.
    """

    size: int = 16
    classes: int = 10
    width: int = 32
    features: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 4096:
                raise ValueError(f"{name} is a whole number between 1 and 4096, got {value!r}")
        if self.size % 4 or self.width % 8:
            raise ValueError(f"size is a multiple of 4 and width one of 8, got {self.size} and {self.width}")


class JudgeNetwork(nn.Module):
    """Three convolutions, two of them halving the resolution, and two linear layers.

    Groups are normalised and not batches: what the judge says of a picture does not depend on the others.

    Args:
        config: its shape.
    """

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        width, low = config.width, config.size // 4
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * low * low, config.features),
            nn.SiLU(),
        )
        self.head = nn.Linear(config.features, config.classes)

    def features(self, pictures: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N d"]:
        """What the last layer sees of pictures in [0, 1]."""
        seen: Tensor = self.body(2 * pictures - 1)
        return seen

    def forward(self, pictures: Float[Tensor, "N 3 S S"]) -> Float[Tensor, "N classes"]:
        """Logits."""
        logits: Tensor = self.head(self.features(pictures))
        return logits


class Judge:
    """A frozen classifier: its features measure distances, its classes whether a picture shows what was asked for.

    Both methods are differentiable in the pictures. They compute in float32.

    Args:
        network: trained; it is frozen here.
        config: its shape.

    Example:
        >>> judge = Judge.from_pretrained(small_dit() / "judge")                        # doctest: +SKIP
        >>> hits = judge.probabilities(pictures).argmax(dim=1) == asked                 # doctest: +SKIP
    """

    def __init__(self, network: JudgeNetwork, config: JudgeConfig) -> None:
        self.network, self.config = network.eval().requires_grad_(False), config

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu") -> Judge:
        """The judge in a folder: config.json and model.safetensors.

        Raises:
            ValueError: no judge is there, or a damaged one; one sentence.
        """
        folder = Path(folder)
        config = _read_config(folder)
        with torch.device("meta"):  # no random weights, and torch's global generator is left alone
            network = JudgeNetwork(config)
        weights = _read_weights(folder)
        expected = network.state_dict()
        if weights.keys() != expected.keys() or any(weights[name].shape != expected[name].shape for name in expected):
            raise ValueError(f"the weights in {folder} are not those of its {CONFIG}; copy the judge's folder again")
        if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
            raise ValueError(f"the weights in {folder} are not all finite; copy the judge's folder again")
        network.load_state_dict(weights, assign=True)
        return cls(network.to(device), config)

    def save(self, folder: Path) -> None:
        """Write the folder that `from_pretrained` reads; weights in float16."""
        weights = {name: tensor.half().contiguous() for name, tensor in self.network.state_dict().items()}
        config = {"kind": _KIND, **asdict(self.config)}
        write_whole(folder / WEIGHTS, save(weights))
        write_whole(folder / CONFIG, (json.dumps(config, indent=1) + "\n").encode())

    @property
    def classes(self) -> int:
        """How many classes it tells apart."""
        return self.config.classes

    @property
    def size(self) -> int:
        """Pixels along each side of its pictures."""
        return self.config.size

    def features(self, pictures: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N d"]:
        """What the last layer sees of pictures in [0, 1].

        Raises:
            ValueError: pictures of another shape, or of integers.
        """
        return self.network.features(self._checked(pictures))

    def probabilities(self, pictures: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N classes"]:
        """The probability of each class for pictures in [0, 1].

        Raises:
            ValueError: pictures of another shape, or of integers.
        """
        return functional.softmax(self.network(self._checked(pictures)), dim=1)

    def _checked(self, pictures: Tensor) -> Tensor:
        if pictures.shape[1:] != (3, self.size, self.size) or not pictures.is_floating_point():
            raise ValueError(
                f"this judge takes pictures [N, 3, {self.size}, {self.size}] of floats in [0, 1], "
                f"got {list(pictures.shape)} of {pictures.dtype}"
            )
        return pictures.float()


def _read_config(folder: Path) -> JudgeConfig:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} holds no judge: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.pop("kind", None) != _KIND:
        raise ValueError(f"{path} does not describe a judge: its kind is not {_KIND!r}")
    try:
        return JudgeConfig(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a judge: {error}") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder} holds no judge: it has no {WEIGHTS}")
    try:
        return {name: tensor.float() for name, tensor in load(path.read_bytes()).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again") from error
