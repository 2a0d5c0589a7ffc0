"""What the commands measure, by name: a pipeline, the law of t in its objective, and proposals for it.

toy              a Gaussian teacher whose every expectation is known, see `carv.tasks.toy`
sds              text-to-3D on carv's own world, after some training or from a run's checkpoint
distill          distribution matching (DMD), from the checkpoint of a `carv distill` run
module:object    your own: see `load_problem`
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeAlias

import tyro
from torch import Tensor

from carv.checkpoint import FileState, checkpoint_state, read_checkpoint
from carv.density import Density, uniform_steps
from carv.estimator import HierarchicalEstimator
from carv.gradient import Gradient, TeacherGradient
from carv.proposals import defensive, proportional
from carv.rng import Stream
from carv.sampler import TimestepSampler
from carv.strata import COUPLINGS
from carv.tasks.distill.config import TermEstimator
from carv.tasks.sds.config import EstimatorConfig, SDSConfig
from carv.tasks.sds.train import Trainer, load_teacher
from carv.tasks.toy import GaussianToy
from carv.variance.advice import Design
from carv.weights import Weight

Estimator: TypeAlias = Callable[[Stream], Tensor | Gradient]


@dataclass(frozen=True)
class ProblemConfig:
    """Which pipeline, in which state."""

    task: Annotated[str, tyro.conf.Positional] = "toy"
    """toy, sds, distill, or module:object for your own."""
    prompt: str = "a red chair"
    """sds: what to make."""
    teacher: str = "world"
    """sds: world, small, or a diffusers pipeline, as of carv sds."""
    steps: int = 150
    """sds: training steps before the measurement; with --run the run's own."""
    resolution: int = 32
    """sds: voxels along each side."""
    run: Path | None = None
    """A folder of `carv sds` or `carv distill`, to measure at its checkpoint; distill needs one."""
    t_min: int = 20
    """The smallest timestep of 1000."""
    t_max: int = 980
    """The largest timestep of 1000."""

    def to_dict(self) -> dict[str, Any]:
        """The settings that this task has, for records."""
        named = {"task": self.task, "t_min": self.t_min, "t_max": self.t_max}
        if self.task not in ("sds", "distill"):
            return named
        if self.run is not None or self.task == "distill":
            return named | {"run": None if self.run is None else str(self.run)}
        own = ("prompt", "teacher", "steps", "resolution")
        return named | {name: getattr(self, name) for name in own}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> ProblemConfig:
        """What `to_dict` gave."""
        return cls(**{**given, "run": Path(given["run"]) if given.get("run") else None})


@dataclass(frozen=True, eq=False)
class Problem:
    """A pipeline with all that a measurement of it needs.

    Attributes:
        task: the pipeline.
        base: p, the law of t in its objective.
        proposals: name -> q, `None` for p itself; "uniform" is p. With a weight also "weight", q ~ p w, and
            "defensive", that with a tenth of p.
        weight: w(t), if it is known.
        fingerprint: what else the numbers depend on, as JSON: digests of a user's module or of a checkpoint.
    """

    task: TeacherGradient
    base: Density
    proposals: Mapping[str, Density | None]
    weight: Weight | None = None
    fingerprint: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        task: TeacherGradient,
        base: Density,
        weight: Weight | None = None,
        proposals: Mapping[str, Density | None] | None = None,
        fingerprint: Mapping[str, str] | None = None,
    ) -> Problem:
        """A problem with the usual proposals and, if given, others.

        Args:
            task, base, weight, fingerprint: as the attributes.
            proposals: more of them.
        """
        known: dict[str, Density | None] = {"uniform": None}
        if weight is not None:
            by_weight = proportional(base, weight)
            known |= {"weight": by_weight, "defensive": defensive(base, by_weight)}
        return cls(task, base, known | dict(proposals or {}), weight, dict(fingerprint or {}))

    def estimator(self, design: Design, micro_batch: int | None = None) -> HierarchicalEstimator:
        """The estimator of a design.

        Args:
            design: R, K, and the names of proposal and coupling.
            micro_batch: at most how many draws the teacher sees at once.

        Raises:
            ValueError: a proposal or a coupling of another name.
        """
        if design.proposal not in self.proposals:
            raise ValueError(f"no proposal {design.proposal!r} here; known: {', '.join(self.proposals)}")
        if design.coupling not in COUPLINGS:
            raise ValueError(f"no coupling {design.coupling!r}; known: {', '.join(COUPLINGS)}")
        sampler = TimestepSampler(
            self.base,
            self.proposals[design.proposal],
            coupling=COUPLINGS[design.coupling],
            antithetic=design.antithetic,
            w=self.weight,
        )
        return HierarchicalEstimator(sampler, design.renders, design.renoise, micro_batch)


def load_problem(config: ProblemConfig, say: Callable[[str], None] | None = None) -> Problem:
    """The pipeline of a name; made once in a process, and anew when the checkpoint of `--run` is another.

    `module:object` is a `Problem`, a `TeacherGradient`, or a function without arguments that returns one of them. Of
    a `TeacherGradient` the attributes `base` (a `Density`; else uniform on t_min..t_max), `weight` (a `Weight`) and
    `proposals` (name -> `Density`) are used where it has them.

    Args:
        config: the name and its settings.
        say: told about what takes long.

    Raises:
        ValueError: an unknown name; an object that is none of these.
    """
    found = load_source(config, say)
    if not isinstance(found, Problem):
        raise ValueError(
            f"{config.task} returns single estimates; this command needs a pipeline: an object with the three methods "
            "of carv.TeacherGradient, or a carv.problems.Problem"
        )
    return found


def load_source(config: ProblemConfig, say: Callable[[str], None] | None = None) -> Problem | Estimator:
    """As `load_problem`, but `module:object` may also be a function of a `Stream` that returns one estimate."""
    state = None if config.run is None else checkpoint_state(config.run)
    made = _made.get(config)
    if made is None or made[0] != state:
        made = _made[config] = state, _make(config, say)
    return made[1]


_made: dict[ProblemConfig, tuple[FileState | None, Problem | Estimator]] = {}


def _make(config: ProblemConfig, say: Callable[[str], None] | None) -> Problem | Estimator:
    base = uniform_steps(config.t_min, config.t_max)
    if config.task == "toy":
        toy = GaussianToy()
        return Problem.of(toy, base, toy.weight)
    if config.task == "sds":
        return _sds(config, say)
    if config.task == "distill":
        return _distill(config)
    if ":" in config.task:
        return _user(config.task, base, say)
    raise ValueError(f"unknown task {config.task!r}; use toy, sds, distill, or module:object for your own")


def _sds(config: ProblemConfig, say: Callable[[str], None] | None) -> Problem:
    """The pilot's renders are independent, so cameras are not stratified over a step here."""
    fingerprint = {}
    if config.run is None:
        settings = SDSConfig(
            config.prompt,
            teacher=config.teacher,
            field="voxel",
            resolution=config.resolution,
            final_rate=1.0,
            stratify_azimuth=False,
        )
        trainer = Trainer(settings, load_teacher(settings, say))
        for step in range(config.steps):
            trainer.step()
            if say is not None and (step + 1) % 50 == 0:
                say(f"training before the measurement: {step + 1} of {config.steps} steps")
    else:
        tensors, described = read_checkpoint(config.run)
        settings = dataclasses.replace(SDSConfig.from_json(described), stratify_azimuth=False)
        trainer = Trainer(settings, load_teacher(settings, say))
        trainer.load_state_dict(tensors)
        fingerprint["checkpoint"] = _checkpoint_digest(tensors, described)
    law = EstimatorConfig(t_min=config.t_min, t_max=config.t_max).base(trainer.task.teacher.schedule)
    return Problem.of(trainer.task, law, trainer.task.weight, fingerprint=fingerprint)


def _distill(config: ProblemConfig) -> Problem:
    """The distribution-matching term alone: the gradient that Table 3 of the paper measures.

    Classes are drawn independently: the pilot's upstream states are independent.
    """
    if config.run is None:
        raise ValueError("distill is measured at a run's checkpoint: give --run, a folder of `carv distill`")
    from carv.tasks.distill.run import restored  # diffusers is an extra

    tensors, described = read_checkpoint(config.run)
    dmd = restored(tensors, described).dmd
    dmd.classes = dataclasses.replace(dmd.classes, balance=False)
    base = TermEstimator(t_min=config.t_min, t_max=config.t_max).base(dmd.teacher.schedule)
    return Problem.of(dmd, base, fingerprint={"checkpoint": _checkpoint_digest(tensors, described)})


def _user(name: str, base: Density, say: Callable[[str], None] | None) -> Problem | Estimator:
    module, found = _imported(name)
    if inspect.isclass(found) or (callable(found) and not isinstance(found, TeacherGradient) and _needs(found) == 0):
        found = found()
    if isinstance(found, Problem):
        return dataclasses.replace(found, fingerprint={**found.fingerprint, **_source(module)})
    if isinstance(found, TeacherGradient):
        own = getattr(found, "base", None)
        if own is None and say is not None:
            say(f"{name} has no attribute `base`: t is uniform on {base.low:g}..{base.high:g}")
        weight = getattr(found, "weight", None)
        return Problem.of(
            found,
            own if isinstance(own, Density) else base,
            weight if isinstance(weight, Weight) else None,
            getattr(found, "proposals", None),
            _source(module),
        )
    if callable(found) and _needs(found) == 1:
        estimator: Estimator = found
        return estimator
    raise ValueError(
        f"{name} is a {type(found).__name__}; give an object with upstream, contribution and pull_back "
        "(carv.TeacherGradient), a carv.problems.Problem, a function without arguments that returns one of them, or a "
        "function of a carv.Stream that returns one estimate"
    )


def _imported(name: str) -> tuple[ModuleType, Any]:
    """The object of module:object; the working folder is looked at first, as `python -m` does."""
    module_name, _, path = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise ValueError(f"no module {module_name!r} here or installed; run from the folder that holds it") from error
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module_name} has no {path!r}")
        found = getattr(found, part)
    return module, found


def _needs(function: Callable[..., Any]) -> int:
    """How many arguments a call needs at least."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def _source(module: ModuleType) -> dict[str, str]:
    path = getattr(module, "__file__", None)
    return {} if path is None else {"module": _digest(Path(path).read_bytes())}


def _checkpoint_digest(tensors: Mapping[str, Tensor], described: str) -> str:
    return _digest(described.encode(), *(tensors[name].contiguous().numpy().tobytes() for name in sorted(tensors)))


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
