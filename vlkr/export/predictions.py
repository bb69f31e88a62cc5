"""What an exported model says of images, as a table, JSON Lines or CSV."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image.

    Attributes:
        image: its path.
        labels: class names, the likeliest first; empty for an image that cannot be read.
        probabilities: of these classes.
        error: why it cannot be read.
    """

    image: str
    labels: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The first choice, and the others if they were asked for."""
        if self.error is not None:
            return {"image": self.image, "error": self.error}
        top = [
            {"label": label, "probability": round(probability, 6)}
            for label, probability in zip(self.labels, self.probabilities, strict=True)
        ]
        return {"image": self.image, **top[0], **({"top": top} if len(top) > 1 else {})}


@dataclass(frozen=True)
class Predictions:
    """What the model says of all images.

    Attributes:
        predictions: in the order of the images.
        context: model, format, dtype and what it was made from.
        format: in which they are shown.
        output: where they are written, None to show them.
    """

    predictions: list[Prediction]
    context: dict[str, Any]
    format: str = "table"
    output: Path | None = None

    @property
    def failed(self) -> int:
        """Number of images that cannot be read."""
        return sum(p.error is not None for p in self.predictions)

    @property
    def exit_code(self) -> int:
        """1 if an image could not be read."""
        return int(self.failed > 0)

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {
            **self.context,
            "images": len(self.predictions),
            "failed": self.failed,
            "predictions": [p.to_json() for p in self.predictions],
        }

    def text(self) -> str:
        """As JSON Lines or CSV."""
        if self.format == "jsonl":
            lines = (json.dumps(p.to_json(), ensure_ascii=False) for p in self.predictions)
            return "".join(f"{line}\n" for line in lines)
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(self._rows())
        return buffer.getvalue()

    def show(self, console: Console) -> None:
        """Prints the predictions, or where they were written."""
        number = len(self.predictions)
        note = f"{number} image{'s' * (number != 1)}"
        note += f", {self.failed} of them could not be read" if self.failed else ""
        if self.output is not None:
            console.print(f"{note}. Written to {self.output}", highlight=False, markup=False)
        elif self.format == "table":
            caption = ", ".join(f"{key} {value}" for key, value in self.context.items())
            table = Table(title=note, title_justify="left")
            header, *rows = self._rows()
            table.add_column(header[0], overflow="fold")
            for name in header[1:-1]:
                table.add_column(name, justify="right" if "prob" in name else "left")
            for *cells, error in rows:
                if error:
                    cells[1] = f"({error})"
                table.add_row(*map(escape, cells))
            console.print(table)
            console.print(caption, style="dim", highlight=False, markup=False)
        else:
            console.file.write(self.text())

    def _rows(self) -> list[list[str]]:
        count = max((len(p.labels) for p in self.predictions), default=1) or 1
        header = ["image"]
        for suffix in ("", *(f"_{i}" for i in range(2, count + 1))):
            header += [f"label{suffix}", f"probability{suffix}"]
        rows = [[*header, "error"]]
        for p in self.predictions:
            cells = [p.image]
            for label, probability in zip(p.labels, p.probabilities, strict=True):
                cells += [label, f"{probability:.4f}"]
            rows.append([*cells, *[""] * (len(header) - len(cells)), p.error or ""])
        return rows
