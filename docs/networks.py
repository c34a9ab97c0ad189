"""Write networks.md: what papers print of the networks, and what is counted here.

python docs/networks.py
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from segtrain import create_network, measure_cost  # noqa: E402
from segtrain.config import read_file  # noqa: E402

PAGE = Path(__file__).with_suffix(".md")
INTRODUCTION = """\
# Networks and their published numbers

Parameters (millions) and multiply-accumulates of one image (GMACs) of every published network, as
its authors or others say ("theirs") and as `segtrain.measure_cost` counts them in the way that is
named ("here", [how it counts](curve.md#cost)). Ours are rounded to the digits that are printed.

**mIoU is theirs alone**: of one scale, on the validation images, as printed. None of these networks
has been trained here at full size, so there is no accuracy of ours to put beside it. What has been
checked is that the same weights give the scores of the authors' code, on stored tensors of theirs,
in the test that each section names.

The list is `docs/networks.yaml`; `python docs/networks.py` writes this page.
"""
HEAD = """\
| network | data, image | setting | parameters: theirs | here | GMACs: theirs | here | mIoU |
|---|---|---|---|---|---|---|---|
"""
NOTHING = "–"


def read_list() -> dict[str, Any]:
    """What ``networks.yaml`` holds."""
    return read_file(PAGE.with_suffix(".yaml"), dotted=True)


def page(content: Mapping[str, Any]) -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *(section(family, content) for family in content["families"])])


def section(family: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """A family's title, what it says, and its table."""
    rows = "".join(
        line + "\n" for row in family["rows"] for line in lines(row, family, content["data"])
    )
    about = f'{family["about"]} Counted by `convention="{family["convention"]}"`.'
    tests = f"Scores: `{family['scores']}`. More: [{family['page']}]({family['page']})."
    return f"## {family['title']}\n\n{about}\n{tests}\n\n{HEAD}{rows}"


def lines(row: Mapping[str, Any], family: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """The lines of a network on a data set, one for each setting."""
    facts = data[row["data"]] | row
    height, width = facts["size"]
    arguments = {**family.get("arguments", {}), **row.get("arguments", {})}
    if "plain_vit" in family["page"]:
        arguments["image_size"] = (height, width)
    with torch.device("meta"):  # costs need no weights
        network = create_network(row["network"], facts["classes"], **arguments)
    parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    found = []
    for setting, (gmacs, miou) in row["points"].items():
        with network.using(setting):
            here = "by the image"
            if not network.data_dependent:
                cost = measure_cost(
                    network, (height, width), convention=family["convention"], latency=False
                )
                resize = 4 * facts["classes"] * height * width if "resize_scores" in family else 0
                here = rounded((cost.macs + resize) / 1e9, gmacs)
        cells = [
            f"`{row['network']}`",
            f"{row['data']}, {height}x{width}",
            f"`{setting}`",
            shown(row.get("parameters")),
            rounded(parameters, row.get("parameters")),
            shown(gmacs),
            here,
            shown(miou),
        ]
        found.append(f"| {' | '.join(cells)} |")
    return found


def shown(printed: object) -> str:
    """A printed number, with the digits that it is printed with."""
    return NOTHING if printed is None else str(printed)


def rounded(value: float, printed: object) -> str:
    """A number with as many decimals as another is printed with; with one where there is none."""
    decimals = 1 if printed is None else len(str(printed).partition(".")[2])
    return f"{value:.{decimals}f}"


if __name__ == "__main__":
    PAGE.write_text(page(read_list()), encoding="utf-8")
