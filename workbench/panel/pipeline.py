"""The panel of a pipeline: stages as chips that are added, removed and reordered, and what each keeps and breaks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from html import escape
from typing import Any

import ipywidgets
from torch import nn

from workbench.artifact import ledger
from workbench.invariants import MOST_LEVELS
from workbench.panel import controls, words
from workbench.panel.board import Panel
from workbench.panel.figure import Drawing
from workbench.panel.measure import Point
from workbench.records import Record, pareto, read_records, record_names, technique_of
from workbench.technique import Pipeline, StageReport, Technique

OFFERED = (
    "MagnitudePruning ChannelPruning SemiStructuredPruning LowRank WeightClustering Quantization "
    "QuantizationAwareTraining FineTune"
).split()


def brief(stage: Technique) -> str:
    """Return a stage in few words: its name and the first setting that says how much of it is done."""
    knobs = (knob for knob in stage.settings() if knob.is_number or knob.has_neutral)
    first = next((knob for knob in knobs if knob.applies(stage.values())), None)
    return f"{stage.title()} {controls.word(getattr(stage, first.name))}" if first else stage.title()


def made(record: Record) -> Technique:
    """Return the technique that a record was measured with."""
    return technique_of(record.technique, record.settings)


class PipelinePanel(Panel):
    """Several techniques in turn on one model; the controls are those of the chosen stage.

    `stages`: those that the panel opens with, at least one. `offered`: the techniques that can be added. `presets`:
    named pipelines. The other options are those of `Panel`.
    """

    def __init__(
        self,
        stages: Sequence[Technique],
        model: nn.Module,
        data: Any,
        *,
        offered: Sequence[type[Technique]] = (),
        presets: dict[str, Pipeline] | None = None,
        **options,
    ):
        if not stages:
            raise ValueError("A panel of a pipeline opens with at least one stage, such as MagnitudePruning().")
        self.stages, self.chosen = list(stages), 0
        self._pipelines = presets or {}
        self._reports: dict[Pipeline, list[tuple[StageReport, int]]] = {}
        preset = [stage for pipeline in self._pipelines.values() for stage in pipeline.stages]
        kinds = dict.fromkeys([*map(type, (*stages, *preset)), *(offered or _offered())])
        self._offered = {kind.__name__: kind for kind in kinds}
        super().__init__(Pipeline(stages), model, data, **options)

    # --- what is on the page ---------------------------------------------------------------------------------------

    def _build(self, first_runtime: str) -> None:
        names = [(kind.title(), kind) for kind in self._offered.values()]
        self.adding = controls.choice("next stage", names, names[0][1], "Which technique to add at the end")
        self.add_button = controls.button("+ Add stage", "Add this technique at the end", self.add)
        self.chips = controls.row("wb-chips")
        self.stage_view = controls.View(kind="wb-stages", name="what each stage left")
        super()._build(first_runtime)

    def _make_drawing(self, fp32_bytes: int) -> Drawing:
        return Drawing(self._layers, self._recorded(), fp32_bytes, trains=True)  # a training stage may be added

    def _recorded(self) -> list:
        """Return the Pareto front of the shipped pipelines on this model, or the records that the caller gave."""
        if self._records is not None:
            return self._records
        name = getattr(self.model, "architecture", {}).get("name", "")
        mine = {"model": name, "data": self.data.name, "technique": "Pipeline", "split": "val"}
        every = [record for file in record_names() for record in read_records(file)]
        front = pareto([r for r in every if all(getattr(r, key) == value for key, value in mine.items())])
        return [replace(r, technique=self._title(made(r)), settings={}) for r in front]

    def _layout(self) -> tuple:
        header, *others = super()._layout()
        at = others.index(self.words)
        add = controls.row("wb-acts", self.adding, self.add_button)
        return (header, self.chips, add, *others[: at + 1], self.stage_view, *others[at + 1 :])

    def _take(self, kind: type[Technique]) -> None:
        stage = self.stages[self.chosen]
        self._show_controls(type(stage), stage.values())
        self.preset.options = [("choose …", ""), *((name, name) for name in self._pipelines)]
        self._show_chips()

    def _header_html(self) -> str:
        return super()._header_html().replace(self.kind.title(), "Pipeline", 1)

    def _show_chips(self) -> None:
        self.chips.children = [self._chip(i, stage) for i, stage in enumerate(self.stages)]

    def _chip(self, i: int, stage: Technique) -> ipywidgets.Box:
        last = len(self.stages) - 1
        parts = (
            controls.button("‹", f"Move stage {i + 1} forward", lambda: self.move(i, -1), disabled=i == 0),
            controls.button(f"{i + 1}. {brief(stage)}", "Show the controls of this stage", lambda: self.pick(i)),
            controls.button("›", f"Move stage {i + 1} back", lambda: self.move(i, +1), disabled=i == last),
            controls.button("✕", f"Remove stage {i + 1}", lambda: self.remove(i), disabled=last == 0),
        )
        return controls.row("wb-chip", *parts).add_class("wb-chosen" if i == self.chosen else "wb-other")

    # --- stages ----------------------------------------------------------------------------------------------------

    @property
    def technique(self) -> Pipeline:
        """The pipeline that the chips and the controls show; raises ValueError where settings do not go together."""
        with self._lock:
            stages = list(self.stages)
            stages[self.chosen] = replace(stages[self.chosen], **self.values)
            return Pipeline(stages)

    def pick(self, i: int) -> None:
        """Show the controls of stage `i`."""
        self._arrange(self.stages, i)

    def move(self, i: int, by: int) -> None:
        """Move stage `i` by so many places."""
        stages = list(self.stages)
        to = min(max(i + by, 0), len(stages) - 1)
        stages.insert(to, stages.pop(i))
        self._arrange(stages, to)

    def remove(self, i: int) -> None:
        """Take stage `i` out; the last one stays."""
        stages = list(self.stages)
        if len(stages) > 1:
            del stages[i]
            self._arrange(stages, min(i, len(stages) - 1))

    def add(self) -> None:
        """Put the technique of the drop-down at the end."""
        stages = [*self.stages, self.adding.value()]
        self._arrange(stages, len(stages) - 1)

    def _arrange(self, stages: Sequence[Technique], chosen: int) -> None:
        with self._lock:
            self.stages, self.chosen = list(stages), chosen
            self._take(type(self.stages[chosen]))
        self._notice = ""
        self._submit()

    def _changed(self, _change=None) -> None:
        with self._lock, suppress(ValueError):  # the panel says so; the stage stays as it was last
            self.stages = list(self.technique.stages)
            label = self.chips.children[self.chosen].children[1]
            label.description = f"{self.chosen + 1}. {brief(self.stages[self.chosen])}"
        super()._changed()

    def choose(self, kind: type[Technique]) -> None:
        """A pipeline has no technique to choose; its stages are added and removed."""

    def _restore(self, technique: Pipeline) -> None:
        self._arrange(technique.stages, min(self.chosen, len(technique.stages) - 1))

    def _preset_chosen(self, change) -> None:
        if change["new"]:
            self._arrange(self._pipelines[change["new"]].stages, 0)
            self.preset.value = ""

    # --- the page's address ----------------------------------------------------------------------------------------

    def _said(self, technique: Pipeline) -> dict[str, str]:
        return {"stages": ";".join(map(_written, technique.stages))}

    def _opened_with(self, change) -> None:
        try:
            stages = [_read(text, self._offered) for text in change["new"].get("stages", "").split(";")]
            self._arrange(stages, 0)
        except ValueError as error:
            self._notice = f"The address of this page does not fit: {error}"
            self._submit()

    # --- work ------------------------------------------------------------------------------------------------------

    def _recall(self, technique: Pipeline) -> nn.Module | None:
        reports = technique.recalled(self.model, self.data)
        return None if reports is None else self._weighed(technique, reports)

    def _compress(self, technique: Pipeline, watch=None) -> nn.Module:
        return self._weighed(technique, technique.run(self.model, self.data, watch))

    def _weighed(self, technique: Pipeline, reports: Iterable[StageReport]) -> nn.Module:
        """Remember what each stage left, with the bytes of its file but without its network; return the last model."""
        left = [(report, ledger(report.model).total_bytes) for report in reports]
        self._reports[technique] = [(replace(report, model=None), size) for report, size in left]
        return left[-1][0].model

    def undone(self, point: Point) -> list[str]:
        """Return in sentences what the stages of a point undid of one another."""
        return [told for report, _ in self._reports.get(point.technique, []) for told in report.broken]

    def _without_training(self, technique: Pipeline) -> Pipeline | None:
        left = [replace(s, finetune=0) if s.must_train else s for s in technique.stages if not s.trains]
        return Pipeline(left) if left else None

    def _title(self, technique: Pipeline) -> str:
        return " → ".join(map(brief, technique.stages))

    @property
    def _train_label(self) -> str:
        return "Train it here"

    @property
    def _shows_training(self) -> bool:
        return any(stage.must_train for stage in self.stages)

    def _draw(self, figure: bool = True) -> None:
        super()._draw(figure)
        shown = self.point.technique if self.point else None
        baseline = self.baseline.size_bytes if self.baseline else 0
        self.stage_view.html = stages_table(self._reports.get(shown, []), baseline)


def _offered() -> list[type[Technique]]:
    from workbench import techniques

    return [getattr(techniques, name) for name in OFFERED]


def stages_table(reports: list[tuple[StageReport, int]], baseline_bytes: int) -> str:
    """Return the table of what each stage left: bytes of the file, zeros, values, bits, and what it broke."""
    if not reports:
        return ""
    heads = ("stage", "file, kB", "smaller", "zeros", "values in a layer", "bits", "what it broke")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    rows = "".join(_stage_row(i, report, size, baseline_bytes) for i, (report, size) in enumerate(reports, 1))
    return f'<div class="wb-tables"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _stage_row(i: int, report: StageReport, size: int, baseline_bytes: int) -> str:
    facts = report.invariants
    most = max((layer.distinct for layer in facts.layers.values()), default=0)
    cells = (
        words.kilobytes(size),
        words.times(baseline_bytes / size) if size else words.DASH,
        f"{100 * facts.sparsity:.1f} %",
        str(most) if most <= MOST_LEVELS else words.DASH,
        str(facts.bits or words.DASH),
    )
    told = " ".join(map(escape, report.broken))
    verdict = f'<td class="wb-broke wb-bad">✗ {told}</td>' if told else '<td class="wb-broke wb-good">✓ nothing</td>'
    title = f'<th scope="row">{i}. {escape(brief(report.stage))}</th>'
    return f"<tr>{title}{''.join(f'<td>{cell}</td>' for cell in cells)}{verdict}</tr>"


def _written(stage: Technique) -> str:
    """Return a stage as an address holds it: "MagnitudePruning:sparsity=0.8,scope=layer", defaults left out."""
    told = [(k.name, getattr(stage, k.name)) for k in stage.settings() if getattr(stage, k.name) != k.default]
    values = ",".join(f"{name}={controls.word(value)}" for name, value in told)
    return f"{type(stage).__name__}:{values}" if values else type(stage).__name__


def _read(text: str, offered: dict[str, type[Technique]]) -> Technique:
    """Return the stage that an address names; raises ValueError in words."""
    name, _, values = text.partition(":")
    if name not in offered:
        raise ValueError(f"{name!r} is not one of {', '.join(offered)}.")
    knobs, found = {knob.name: knob for knob in offered[name].settings()}, {}
    for part in filter(None, values.split(",")):
        key, _, value = part.partition("=")
        if key not in knobs:
            raise ValueError(f"{name} has no setting {key!r}; it has {', '.join(knobs)}.")
        found[key] = controls.parse(knobs[key], value)
    return offered[name](**found)
