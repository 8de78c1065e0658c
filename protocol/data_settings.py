"""The section of a plan that says where rows come from, how they are read, and what is done to them before training."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import Field, PositiveInt, field_validator, model_validator

from protocol.mixture_settings import MixtureSettings
from protocol.strict import Name, Strict
from protocol.writer_settings import WriterSettings, beside

N = TypeVar("N", int, float)
ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
_HUB_NAME = re.compile(r"(?!\.)[\w.-]+/(?!\.)[\w.-]+(:[\w.-]+){0,2}")
# Country and the number's usual name; which forms of it are taken, and why these: docs/data.md.
MaskKind = Literal[
    "email",
    "phone",
    "card",
    "iban",
    "cn-id",
    "us-ssn",
    "ca-sin",
    "mx-curp",
    "br-cpf",
    "gb-nhs",
    "de-idnr",
    "fr-nir",
    "it-cf",
    "es-dni",
    "es-nie",
    "be-nn",
    "ch-ahv",
    "pl-pesel",
    "cz-rc",
    "ro-cnp",
    "se-pnr",
    "no-fnr",
    "dk-cpr",
    "fi-hetu",
    "tr-tckn",
    "ru-inn",
    "za-id",
    "in-aadhaar",
    "in-pan",
    "kr-rrn",
    "jp-my-number",
    "th-pin",
    "my-nric",
]
EVERY_KIND: tuple[MaskKind, ...] = get_args(MaskKind)
RowField = Literal[
    "input_text",
    "target_text",
    "instruction",
    "input",
    "output",
    "messages",
    "conversations",
    "system",
    "tools",
    "text",
    "label",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "id",
]


def is_hub_name(path: Path) -> bool:
    """Whether a path is a data set's name on the hub: ``owner/name``, ``owner/name:split``, ``owner/name:config:split``."""
    return _HUB_NAME.fullmatch(path.as_posix()) is not None and path.suffix.lower() not in ENDINGS


def located(folder: Path, path: Path) -> Path:
    """A path taken from ``folder``; a hub name stays as it is, unless there is such a file."""
    placed = folder / path
    return path if is_hub_name(path) and not placed.exists() else placed


class CleaningSettings(Strict):
    """What is taken out of rows, and which rows are left out. The report counts each."""

    control_characters: bool = Field(
        False, description="take out what is no text: control characters, invisible spaces, reversals"
    )
    markup: bool = Field(False, description="take out HTML: elements, comments, scripts; entities become characters")
    boilerplate_share: float | None = Field(
        None, gt=0, le=1, description="take out lines of 20 characters or more that stand in this share of the rows, and in 5"
    )
    exact_duplicates: bool = Field(False, description="leave out rows that repeat an earlier one")
    near_duplicates: bool = Field(False, description="leave out rows that nearly repeat an earlier one, exact ones included")
    similarity: float = Field(0.6, ge=0.5, le=1, description="from which on two rows are near duplicates (Jaccard)")
    min_characters: PositiveInt | None = Field(None, description="of a row's texts together; shorter rows are left out")
    max_characters: PositiveInt | None = Field(None, description="of a row's texts together; longer rows are left out")
    languages: tuple[Name, ...] = Field((), description="ISO 639-1 codes to keep; rows that are surely in another are left out")

    @model_validator(mode="after")
    def _bounds(self) -> "CleaningSettings":
        if self.min_characters and self.max_characters and self.min_characters > self.max_characters:
            raise ValueError(f"min_characters {self.min_characters} is more than max_characters {self.max_characters}")
        return self


class MaskingSettings(Strict):
    """Personal data that placeholders stand for before anything trains: ``[EMAIL-1]``, the same for the same in a file."""

    kinds: tuple[MaskKind, ...] = Field((), description="what is looked for; the word all stands for every kind")
    names: tuple[Path, ...] = Field((), description="files of names, one a line: these are masked too")
    phone_regions: tuple[Name, ...] = Field(("CN", "US"), description="countries whose numbers count without a country code")

    @field_validator("kinds", mode="before")
    @classmethod
    def _every(cls, kinds: Any) -> Any:
        if kinds == "all":
            return EVERY_KIND
        return tuple(kinds) if isinstance(kinds, list) else kinds  # messages are read strictly, and JSON has no tuples

    @model_validator(mode="after")
    def _regions(self) -> "MaskingSettings":
        if unknown := [region for region in self.phone_regions if not re.fullmatch("[A-Z]{2}", region)]:
            raise ValueError(f"phone_regions hold {', '.join(unknown)}; expected two capital letters (ISO 3166-1), such as CN")
        return self


class AugmentationSettings(Strict):
    """Further training rows made of those that are there: the question, or the text, said in other words."""

    synonyms: Path | None = Field(
        None, description="file of words that may stand for each other: one set a line, with commas between"
    )
    synonyms_share: float = Field(0.2, gt=0, le=1, description="of the words that have synonyms, how many are exchanged")
    paraphrase: bool = Field(False, description="the writer says it in other words")
    back_translation: Name | None = Field(
        None, description="language through which the writer translates and back, such as German"
    )
    writer: WriterSettings | None = Field(
        None, description="who paraphrases and translates: a model on this machine or an endpoint"
    )
    written: Path | None = Field(
        None, description="file that keeps what the writer wrote: nothing is asked twice, and every round has the same rows"
    )

    @property
    def kinds(self) -> int:
        """How many further rows there may be for each."""
        return (self.synonyms is not None) + self.paraphrase + (self.back_translation is not None)

    @model_validator(mode="after")
    def _together(self) -> "AugmentationSettings":
        if wrong := list(self._wrong()):
            raise ValueError("; ".join(wrong))
        return self

    def _wrong(self) -> Iterator[str]:
        writes = self.paraphrase or self.back_translation is not None
        for name in ("writer", "written"):
            if writes and getattr(self, name) is None:
                yield f"{name} is missing; paraphrase and back_translation need it"
            if not writes and getattr(self, name) is not None:
                yield f"{name} is for paraphrase or back_translation; add one of them, or leave it out"


class _Treatment(Strict):
    """What a plan and an institution's policy both may say."""

    group_near_duplicates: bool = Field(
        False, description="near duplicates are trained on together or held out together, and never cross"
    )
    cleaning: CleaningSettings = CleaningSettings()
    masking: MaskingSettings = MaskingSettings()


_COLUMNS = "the files' own name for a field of rows, where it has another: {input_text: question, target_text: answer}"


class DataSettings(_Treatment, MixtureSettings):
    """Where rows come from and how they are read. A coordinator's plan has no paths: each node brings its own."""

    train: Path | None = Field(None, description="JSON, JSONL, CSV or Parquet file, or a data set's name on the hub")
    evaluate: Path | None = Field(None, description="held-out rows; without it a share of the training rows is held out")
    evaluate_fraction: float = Field(0.1, gt=0, lt=1, description="share held out when there is no evaluate file")
    labels: tuple[Name, ...] | None = Field(None, description="classification: every label, in the order of the head's rows")
    columns: dict[RowField, Name] = Field({}, description=_COLUMNS)
    max_length: PositiveInt = Field(512, description="tokens; longer rows are cut, and counted in the report")
    on_bad_rows: Literal["refuse", "skip"] = Field(
        "refuse", description="rows that cannot be used: refuse the file, or skip them"
    )
    preferred: bool = Field(False, description="sft: the rows are preference pairs; learn the answer that was preferred")
    augmentation: AugmentationSettings = AugmentationSettings()

    @model_validator(mode="after")
    def _labels(self) -> "DataSettings":
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ValueError("labels hold the same name twice")
        if self.labels is not None and len(self.labels) < 2:
            raise ValueError(f"labels hold {len(self.labels)} name(s); classification needs at least 2")
        return self

    def files(self) -> dict[str, Path]:
        """Files that the treatment of rows reads or writes, by their key."""
        found = {f"masking.names.{number}": path for number, path in enumerate(self.masking.names)}
        own = {"synonyms": self.augmentation.synonyms, "written": self.augmentation.written}
        return found | {f"augmentation.{name}": path for name, path in own.items() if path}

    def beside(self, folder: Path) -> "DataSettings":
        """The same with relative paths taken from ``folder``."""
        found = {name: located(folder, value) for name in ("train", "evaluate") if (value := getattr(self, name))}
        treated = {"masking": _masking(self.masking, folder), "augmentation": _augmentation(self.augmentation, folder)}
        return self.placed(lambda path: located(folder, path)).model_copy(update={**found, **treated})


class DataPolicy(_Treatment):
    """What an institution does to its rows whatever a plan says; the files that it names are its own."""

    on_bad_rows: Literal["refuse", "skip"] | None = Field(None, description="in place of the plan's")
    columns: dict[RowField, Name] | None = Field(None, description=f"in place of the plan's: {_COLUMNS}")
    augmentation: AugmentationSettings | None = Field(None, description="in place of the plan's")

    def beside(self, folder: Path) -> "DataPolicy":
        """The same with relative paths taken from ``folder``."""
        more = self.augmentation and _augmentation(self.augmentation, folder)
        return self.model_copy(update={"masking": _masking(self.masking, folder), "augmentation": more})

    def added_to(self, data: DataSettings) -> DataSettings:
        """A plan's settings with this policy's: of masking and cleaning all that either wants, and of two bounds the stricter.

        Raises:
            ValueError: Plan and policy want languages of which none is the same, or bounds that no row can meet.
        """
        changes = {
            "group_near_duplicates": data.group_near_duplicates or self.group_near_duplicates,
            "cleaning": _cleaned_more(data.cleaning, self.cleaning),
            "masking": _masked_more(data.masking, self.masking),
            "on_bad_rows": self.on_bad_rows or data.on_bad_rows,
            "columns": data.columns if self.columns is None else self.columns,
            "augmentation": self.augmentation or data.augmentation,
        }
        return data.model_copy(update=changes)


def _masking(settings: MaskingSettings, folder: Path) -> MaskingSettings:
    return settings.model_copy(update={"names": tuple(folder / name for name in settings.names)})


def _augmentation(settings: AugmentationSettings, folder: Path) -> AugmentationSettings:
    found = {name: folder / value for name in ("synonyms", "written") if (value := getattr(settings, name))}
    return beside(settings, folder).model_copy(update=found)


def _masked_more(plan: MaskingSettings, own: MaskingSettings) -> MaskingSettings:
    wanted = {*plan.kinds, *own.kinds}
    return MaskingSettings(
        kinds=tuple(kind for kind in EVERY_KIND if kind in wanted),
        names=tuple(dict.fromkeys((*plan.names, *own.names))),
        phone_regions=tuple(dict.fromkeys((*plan.phone_regions, *own.phone_regions))),
    )


def _cleaned_more(plan: CleaningSettings, own: CleaningSettings) -> CleaningSettings:
    languages = plan.languages or own.languages
    if plan.languages and own.languages:
        languages = tuple(language for language in plan.languages if language in own.languages)
        if not languages:
            raise ValueError("cleaning.languages: the plan's and the policy's have none in common")
    return CleaningSettings(
        control_characters=plan.control_characters or own.control_characters,
        markup=plan.markup or own.markup,
        boilerplate_share=_least(plan.boilerplate_share, own.boilerplate_share),
        exact_duplicates=plan.exact_duplicates or own.exact_duplicates,
        near_duplicates=plan.near_duplicates or own.near_duplicates,
        similarity=min(plan.similarity, own.similarity) if own.near_duplicates else plan.similarity,
        min_characters=max(plan.min_characters or 0, own.min_characters or 0) or None,
        max_characters=_least(plan.max_characters, own.max_characters),
        languages=languages,
    )


def _least(one: N | None, other: N | None) -> N | None:
    return min((value for value in (one, other) if value is not None), default=None)
