"""From a YAML file and the command line's overrides to a RunConfig. The dialect is AngelSlim's; see docs/config.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..errors import ConfigError, nearest
from .dialect import NOT_SUPPORTED, SPELLINGS, WITHOUT_EFFECT
from .document import Document, parse
from .fields import FieldError, check, describe
from .recipe import Recipe
from .recipe_file import recipe_of
from .run_config import SECTIONS, CalibrationConfig, DatasetConfig, ModelConfig, RunConfig

_SERVED_GROUP_SIZES = (32, 64, 128)


def load_run_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    model_path: str | None = None,
    save_path: str | None = None,
    overwrite: bool = False,
    statistics: str | None = None,
    calibrate: bool = False,
) -> RunConfig:
    """Read `path`, put the overrides (`a.b=value`, value in YAML) over it, and check every key and value.

    `model_path`, `save_path`, `overwrite` and `statistics` go over both. `dataset.data_path`,
    `calibration.statistics`, and `model.model_path` where it is a folder, are looked for in the current folder, then
    beside the YAML file. `calibrate`: for that command, which needs data whatever the recipe. ConfigError names file,
    line and key.
    """
    file = Path(path).expanduser()
    document = parse(_read(file), str(path))
    if not isinstance(document.values, dict):
        what = "is empty" if document.values is None else f"holds {describe(document.values)}, not sections"
        raise ConfigError(f"{path}: {what}; a configuration has sections: {', '.join(SECTIONS)}")
    reader = _Reader(document, calibrate)
    for override in overrides:
        reader.set(override, "--set")
    for key, value in (
        ("model.model_path", model_path),
        ("global.save_path", save_path),
        ("calibration.statistics", statistics),
    ):
        if value is not None:
            reader.put(key, value, f"--{key.partition('.')[2].replace('_', '-')}")
    if overwrite:
        reader.put("global.overwrite", True, "--overwrite")
    return reader.run_config(file, beside=model_path is None)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file{_similar(file)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{file}: is a folder; give a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None


def _similar(file: Path) -> str:
    """A did-you-mean for the first part of the path that does not exist."""
    for part in reversed([file, *file.parents]):
        if not part.exists():
            try:
                names = [entry.name for entry in part.parent.iterdir()]
            except OSError:
                return ""
            missing = "" if part == file else f": there is no {part}"
            return f"{missing}{nearest(part.name, names)}"
    return ""


@dataclass
class _Reader:
    """Builds the sections, and knows of each key where it comes from and whether it does anything."""

    document: Document
    calibrate: bool = False
    overridden: dict[str, str] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)
    given: set[str] = field(default_factory=set)

    def error(self, path: str, problem: str) -> ConfigError:
        """With the override, or file and line, that `path` comes from."""
        for key, option in self.overridden.items():
            # The key itself, one below it, or a section that the file lacks and the override made.
            made = key.startswith(f"{path}.") and path not in self.document.lines
            if made or path == key or path.startswith((f"{key}.", f"{key}[")):
                return ConfigError(f"{option}: {path}: {problem}")
        return ConfigError(f"{self.document.where(path)}: {problem}")

    def set(self, override: str, option: str) -> None:
        """Take in `a.b=value`."""
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{option} {override}: write it as key=value, e.g. dataset.num_samples=64")
        self.put(key, parse(text, f"{option} {override}").values, f"{option} {override}")

    def put(self, path: str, value: object, option: str) -> None:
        """Set the key at `path`, making the sections above it where the file lacks them."""
        *above, last = path.split(".")
        section = self.document.values
        for i, part in enumerate(above):
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                inner = ".".join(above[: i + 1])
                raise ConfigError(f"{option}: {path}: {inner} is {describe(section)}, not a section with keys")
        section[last] = value
        # A later override of a key, or of a section around it, takes the place of an earlier one.
        for key in [k for k in self.overridden if k == path or k.startswith(f"{path}.")]:
            del self.overridden[key]
        self.overridden = {path: option, **self.overridden}

    def run_config(self, file: Path, beside: bool) -> RunConfig:
        """Every section checked, paths found, notes made."""
        values: dict[str, Any] = self.document.values
        for key in values:
            if key not in SECTIONS:
                self._other_key(key, values[key], SECTIONS)
        if "compression" not in values:
            raise ConfigError(
                f"{self.document.label}: the section compression is missing; it says what to do:\n"
                "  compression:\n    name: quantization\n    quantization:\n      name: int8_dynamic"
            )
        if "model" not in values:
            raise ConfigError(
                f"{self.document.label}: the section model is missing; give --model-path, or add:\n"
                "  model:\n    model_path: Qwen/Qwen3-0.6B"
            )
        sections = {
            key: self.section(cls, values.get(key, {}), key)
            for key, cls in SECTIONS.items()
            if key != "dataset" or key in values
        }
        sections["model"] = _beside(sections["model"], file) if beside else sections["model"]
        sections["calibration"] = self._statistics(sections["calibration"], file)
        try:
            config = RunConfig(
                sections["global"],
                sections["model"],
                sections["compression"],
                sections.get("dataset"),
                source=file,
                stem=file.stem,
                calibration=sections["calibration"],
            )
        except FieldError as error:
            raise ConfigError(f"{self.document.label}: {error}") from None
        if config.dataset is not None and (config.runs_model or self.calibrate):
            config = replace(config, dataset=self._found(config.dataset, file))
        return replace(config, notes=tuple(self._notes(config)))

    def section(self, cls: type[Any], value: object, path: str) -> Any:
        """`value` as an instance of the dataclass `cls`."""
        if not isinstance(value, dict):
            raise self.error(path, f"expected a section with keys, got {describe(value)}")
        hints = get_type_hints(cls)
        known = {f.name: f for f in fields(cls)}
        arguments: dict[str, Any] = {}
        for key, entry in value.items():
            at = f"{path}.{key}"
            key = SPELLINGS.get(at, key)
            if key in arguments:
                raise self.error(at, f"stands twice, here as {at.rpartition('.')[2]}")
            if key not in known:
                self._other_key(at, entry, known)
                continue
            self.given.add(at)
            nested = _section_class(hints[key])
            if nested is Recipe:
                arguments[key] = self._recipe(entry, at)
            elif nested is not None and entry is not None:
                arguments[key] = self.section(nested, entry, at)
            else:
                arguments[key] = self._checked(entry, hints[key], at)
        for name, f in known.items():
            if name not in arguments and f.default is MISSING and f.default_factory is MISSING:
                raise self.error(f"{path}.{name}", "is missing")
        try:
            return cls(**arguments)
        except FieldError as error:
            raise self.error(f"{path}.{error.key}", error.problem) from None

    def _recipe(self, value: object, path: str) -> Recipe:
        try:
            return recipe_of(value)
        except FieldError as error:
            raise self.error(f"{path}{error.key.removeprefix('recipe')}", error.problem) from None

    def _checked(self, value: object, hint: Any, path: str) -> Any:
        parent, _, key = path.rpartition(".")
        try:
            return check(value, hint, key)
        except FieldError as error:
            raise self.error(f"{parent}.{error.key}", error.problem) from None

    def _other_key(self, path: str, value: object, known: Iterable[str]) -> None:
        """A key that is no field: without effect, of something not supported, or an error."""
        if path in WITHOUT_EFFECT:
            self._checked(value, WITHOUT_EFFECT[path].hint, path)
            self.idle.append(path)
            return
        if path in NOT_SUPPORTED:
            refused = NOT_SUPPORTED[path]
            if any(value is entry or (value == entry and type(value) is type(entry)) for entry in refused.harmless):
                return
            raise self.error(path, f"{refused.why}; leave it out")
        section, _, key = path.rpartition(".")
        idle = [path.rpartition(".") for path in WITHOUT_EFFECT]
        valid = [*known, *(name for place, _, name in idle if place == section)]
        elsewhere = [place.rpartition(".")[0] for place in _every_key() if place.rpartition(".")[2] == key]
        hint = f"; it belongs to {' or '.join(elsewhere)}" if any(elsewhere) else nearest(key, valid)
        raise self.error(path, f"unknown key{hint}; {section or 'the top level'} has {', '.join(known)}")

    def _found(self, dataset: DatasetConfig, file: Path) -> DatasetConfig:
        """`data_path` as a path that exists: from the current folder, else from that of the YAML file."""
        path = Path(dataset.data_path).expanduser()
        tried = [path] if path.is_absolute() else [path, file.parent / path]
        for candidate in tried:
            if candidate.exists():
                return replace(dataset, data_path=str(candidate))
        listed = " and ".join(str(candidate.absolute()) for candidate in dict.fromkeys(tried))
        raise self.error(
            "dataset.data_path",
            f"no such file: {dataset.data_path}{_similar(path)} (looked for {listed}); give calibration text, "
            "or try examples/data/calibration.jsonl",
        )

    def _statistics(self, calibration: CalibrationConfig, file: Path) -> CalibrationConfig:
        """With the folder of statistics as a path that exists; `quantkit calibrate` makes them, and uses none."""
        if calibration.statistics is None or self.calibrate:
            return replace(calibration, statistics=None)
        path = Path(calibration.statistics).expanduser()
        for candidate in [path] if path.is_absolute() else [path, file.parent / path]:
            if candidate.is_dir():
                return replace(calibration, statistics=str(candidate))
        raise self.error(
            "calibration.statistics",
            f"no such folder: {calibration.statistics}{_similar(path)}; make it with quantkit calibrate",
        )

    def _notes(self, config: RunConfig) -> Iterator[str]:
        idle = [*self.idle, *(f"compression.recipe: {name}" for name in config.recipe.idle)]
        if self.calibrate:
            return
        if not config.recipe.needs_data:
            unread = ("model.torch_dtype", "model.trust_remote_code", "calibration.offload")
            idle += [key for key in unread if key in self.given]
        if "compression.quantization.smooth_alpha" in self.given and not any(
            m.kind == "smoothquant" for m in config.recipe.modifiers
        ):
            idle.append("compression.quantization.smooth_alpha")
        if idle:
            yield f"accepted, without effect: {', '.join(idle)}"
        if config.calibration.statistics is not None and not config.recipe.needs_data:
            yield f"{config.algorithm} looks at no activations: calibration.statistics is ignored"
        if config.dataset is not None and not config.runs_model and config.recipe.needs_data:
            yield "the statistics stand in for data: the section dataset is ignored"
        if config.dataset is not None and not config.recipe.needs_data:
            yield f"{config.algorithm} needs no data: the section dataset is ignored"
        for size in {group.scheme.weights.group_size for group in config.recipe.groups} - {None, *_SERVED_GROUP_SIZES}:
            yield f"group_size {size}: vLLM's kernels read {', '.join(map(str, _SERVED_GROUP_SIZES))} only"


def _section_class(hint: Any) -> type[Any] | None:
    """The dataclass that `hint` is, or is an option of; None for plain values."""
    return next((option for option in (hint, *get_args(hint)) if is_dataclass(option)), None)  # type: ignore[return-value]


def _beside(model: ModelConfig, file: Path) -> ModelConfig:
    """A folder named relative to the YAML file, where the current folder has none of that name; else a hub id."""
    path = Path(model.model_path).expanduser()
    if not path.is_absolute() and not path.exists() and (file.parent / path).is_dir():
        return replace(model, model_path=str(file.parent / path))
    return model


def _every_key() -> Iterator[str]:
    """The dotted path of every key that is accepted."""

    def below(cls: type[Any], path: str) -> Iterator[str]:
        hints = get_type_hints(cls)
        for f in fields(cls):
            yield f"{path}.{f.name}"
            nested = _section_class(hints[f.name])
            if nested is not None and nested is not Recipe:
                yield from below(nested, f"{path}.{f.name}")

    for key, cls in SECTIONS.items():
        yield key
        yield from below(cls, key)
    yield from WITHOUT_EFFECT
