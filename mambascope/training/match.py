"""Rivals of one size: another pattern in the same backbone, one width chosen so that the parameters come out equal.

    counts = match(load_recipe(…).model, "af", n_layers=12, n_heads=8)
    print(counts); counts.config     # d_ff chosen, the nearest multiple of 8

The counts are exact: every mixer is asked for its own parameters.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from mambascope.config import MIXERS, MambaConfig
from mambascope.errors import ConfigError, nearest
from mambascope.loading.names import count_parameters, parameter_shapes

__all__ = ["FREE", "Match", "match"]

FREE = {"d_ff": 8, "d_inner": 16, "n_layers": 1}
"""Fields that may be chosen, and the steps that they are chosen in."""

_CLOSE = 0.01


@dataclass(frozen=True)
class Match:
    """A model and the one that was made to match it; ``free`` is the field that was chosen."""

    target: MambaConfig
    config: MambaConfig
    free: str

    @property
    def difference(self) -> float:
        """Parameters of ``config`` over those of ``target``, minus one."""
        return count_parameters(self.config) / count_parameters(self.target) - 1

    def __str__(self) -> str:
        pairs = [(_counts(cfg), cfg) for cfg in (self.target, self.config)]
        rows = list(dict.fromkeys(name for counts, _ in pairs for name in counts))
        lines = [f"{'':<34}{self.target.pattern or 'm':>14}{self.config.pattern or 'm':>14}"]
        lines += [f"{name:<34}" + "".join(f"{counts.get(name, 0):>14,}" for counts, _ in pairs) for name in rows]
        lines.append(f"{'parameters':<34}" + "".join(f"{count_parameters(cfg):>14,}" for _, cfg in pairs))
        chosen = f"{self.free} = {getattr(self.config, self.free):,} in {self.config.n_layers} layers"
        return "\n".join([*lines, f"{chosen}: {self.difference:+.2%}"])


def match(
    target: MambaConfig, pattern: str, free: str | None = None, *, step: int | None = None, **options: Any
) -> Match:
    """The config with this ``pattern`` whose ``free`` width makes its parameters nearest to the target's.

    ``free``: ``d_ff`` (the default where the pattern has feed-forward layers), ``d_inner`` (otherwise), or ``n_layers``
    (the default where no layer has an inner width; in whole repetitions of the pattern), in multiples of ``step``, or
    of 8 (d_ff) and 16 (d_inner), and finer ones where those miss by more than 1 %.
    ``options``: other fields of the config (``n_layers``, ``n_heads``, ``window``, …); the rest is the target's.

    Raises ConfigError for an option that a config does not have, and
    where no value of ``free`` comes within the parameters of one step.
    """
    if free is None:
        free = "d_ff" if "f" in pattern else "n_layers" if set(pattern) <= set("aw") else "d_inner"
    if free not in FREE:
        raise ConfigError(f"free={free!r}: the field to choose is one of {', '.join(FREE)}")
    if free in options:
        raise ConfigError(f"{free} is to be chosen, so it cannot be given as {options[free]!r}; name another free=")
    for key in options:
        if key not in (known := {field.name for field in dataclasses.fields(MambaConfig)} - {"pattern"}):
            raise ConfigError(f"config has no field {key!r} to set{nearest(key, known)}")
    if step is not None and step < 1:
        raise ConfigError(f"step must be at least 1, got {step}")
    if step is None:
        step = max(1, len(pattern)) if free == "n_layers" else FREE[free]
        found = _nearest(target, pattern, free, step, options)
        while free != "n_layers" and abs(found.difference) > _CLOSE and step > 1:  # small models need small steps
            step //= 2
            found = _nearest(target, pattern, free, step, options)
        return found
    return _nearest(target, pattern, free, step, options)


def _nearest(target: MambaConfig, pattern: str, free: str, step: int, options: dict[str, Any]) -> Match:
    want = count_parameters(target)

    def at(steps: int) -> MambaConfig:
        return target.with_pattern(pattern, **{**options, free: steps * step})

    low, high = 1, 2
    while count_parameters(at(high)) < want:
        if count_parameters(at(2 * high)) == count_parameters(at(high)):
            raise ConfigError(f"{free} changes no parameter of pattern {pattern!r}; name another free=")
        low, high = high, 2 * high
    while high - low > 1:  # the count grows with the width
        middle = (low + high) // 2
        low, high = (middle, high) if count_parameters(at(middle)) < want else (low, middle)
    best = min((at(low), at(high)), key=lambda cfg: abs(count_parameters(cfg) - want))
    found, one = Match(target, best, free), count_parameters(at(high)) - count_parameters(at(low))
    if abs(count_parameters(best) - want) > one:
        raise ConfigError(
            f"pattern {pattern!r} has {count_parameters(best):,} parameters at the least ({free} = {step}), more than "
            f"the {want:,} to match; give fewer layers (n_layers=)"
        )
    return found


def _counts(cfg: MambaConfig) -> Counter[str]:
    """Parameters by part: embeddings, norms, and every kind of mixer."""
    counts: Counter[str] = Counter()
    for name, shape in parameter_shapes(cfg).items():
        size = 1
        for n in shape:
            size *= n
        if ".mixer." in name:
            letter = cfg.layers[int(name.split(".")[1])]
            n = cfg.layers.count(letter)
            counts[f"{MIXERS[letter]}, {n} layer{'s' * (n > 1)}"] += size
        else:
            counts["norms" if "norm" in name or "ln_final" in name else "embedding"] += size
    return counts
