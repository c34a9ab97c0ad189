"""README and docs/: links lead somewhere, commands name what there is, examples and tables hold."""

import ast
import importlib.util
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest

from command_line import Arguments, read_arguments
from segtrain.config import compose
from segtrain.config.arguments import parse_arguments
from segtrain.config.composition import flat
from segtrain.config.files import list_choices, read_file
from tuning.sweep_file import check_parameters, read_sweep

ROOT = Path(__file__).parents[1]
DOCS, CONFIGS = ROOT / "docs", ROOT / "configs"
NOTEBOOK = DOCS / "quickstart.ipynb"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), NOTEBOOK]
#: What stands for something that readers put in.
PLACEHOLDERS = ("NAME", "FILE", "FOLDER", "ENTITY", "...")
#: Files of readers: they are not here.
FILES = ("resume", "ckpt", "config")
#: The data set of an example is configured by a copy of another's file.
COPIES = {"data=trees": "data=camvid"}


def text_of(page):
    """A page as Markdown; of a notebook its texts."""
    if page.suffix == ".md":
        return page.read_text("utf-8")
    cells = json.loads(page.read_text("utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def blocks(text, *languages):
    """The code blocks in these languages."""
    fences = re.findall(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for language, content in fences if language in languages]


def prose(text):
    """All but code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """What links may name behind '#', as GitHub makes it of headings."""
    titles = re.findall(r"^#+ (.+)$", prose(text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_there_are(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(text_of(page)))
    for link in links:
        if re.match(r"[a-z]+://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def commands(text):
    """(script, arguments) of each command of ours in the code blocks of a page."""
    for block in blocks(text, "bash", ""):
        line = ""
        for part in block.replace("\\\n", " ").splitlines():
            line += part
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # a quotation goes on
                line += "\n"
                continue
            line = ""
            scripts = [word for word in words if word.endswith((".py", ".sh"))]
            if scripts:
                script = scripts[0]
                arguments = words[words.index(script) + 1 :]
                yield script, list(itertools.takewhile(lambda word: word not in "&|;", arguments))
            elif "-m" in words and "benchmarks" in line + part:
                yield words[words.index("-m") + 1].replace(".", "/") + ".py", []
        assert not line.strip(), f"a quotation is not closed: {line}"


COMMANDS = [
    pytest.param(script, arguments, id=f"{page.name}: {script} {' '.join(arguments)}"[:90])
    for page in PAGES
    for script, arguments in commands(text_of(page))
]


def known(arguments):
    """Arguments that can be checked: without files of readers, and what they put in."""
    for text in arguments:
        key, _, value = text.partition("=")
        if key not in FILES and not (key in ("experiment", "model") and value in PLACEHOLDERS):
            yield COPIES.get(text, text)


@pytest.mark.parametrize(("script", "arguments"), COMMANDS)
def test_commands_are_understood(script, arguments):
    assert (ROOT / script).exists()
    if script in ("train.py", "scripts/slurm.sh"):
        compose(list(known(arguments)), CONFIGS)
    elif script == "sweep.py" and "--help" not in arguments:
        import sweep

        own = {a.key: a.text for a in parse_arguments(arguments)[1] if a.key in sweep.OWN}
        given = [text for text in arguments if text.partition("=")[0] not in sweep.OWN]
        found = read_sweep(own["sweep"], CONFIGS)
        check_parameters(found, [*found.overrides, *given], CONFIGS)
    elif script in ("predict.py", "evaluate.py", "export.py") and "--help" not in arguments:
        module = importlib.import_module(script.removesuffix(".py"))
        given = read_arguments(arguments, "", module.OPTIONS)
        assert isinstance(given, Arguments)
        assert ("ckpt" in given.values) != ("weights" in given.values)
        compose(given.overrides, CONFIGS)
    elif script == "report.py":
        assert all(text.startswith(("runs/", "output=")) for text in arguments)


def recipes(text):
    """Names of recipes in a page, those in braces one by one."""
    data = "|".join([*list_choices(CONFIGS, "data"), "exits", "640"])
    for name in re.findall(rf"`([a-z0-9_{{}},]+_(?:{data}))`", text):
        parts = [part.split(",") for part in re.split(r"[{}]", name)]
        yield from map("".join, itertools.product(*parts))


def test_recipes_that_pages_name_are_there():
    named = {name for page in PAGES for name in recipes(text_of(page))}
    assert len(named) > 100
    assert named <= set(list_choices(CONFIGS, "experiment"))


def test_keys_that_pages_name_are_there():
    there = set()
    for file in CONFIGS.rglob("*.yaml"):
        values = flat(read_file(file, dotted=file.parent.name == "sweep"))
        group = file.parent.name if file.parent != CONFIGS else ""
        there |= {f"{group}.{key}" if group not in ("", "experiment") else key for key in values}
    sections = "callbacks|criterion|data|gate|inference|optimizer|schedule|tracking|trainer"
    for page in PAGES:
        for key in re.findall(rf"`(?:~|\+)?((?:{sections})\.[\w.]+)=", text_of(page)):
            assert key in there, key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_name_what_there_is(page):
    import segtrain

    networks = set(list_choices(CONFIGS, "model"))
    for block in blocks(text_of(page), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "segtrain" or hasattr(segtrain, node.attr), node.attr
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("create_network"):
                assert ast.literal_eval(node.args[0]) in networks


def test_the_data_set_of_the_example_reads_its_files(tmp_path):
    import cv2
    import numpy as np

    names: dict[str, object] = {"__name__": "data.trees"}
    (example,) = blocks(text_of(DOCS / "data.md"), "python")
    exec(example, names)
    for split, kind, suffix in itertools.product(
        ("train", "val"), ("images", "labels"), (".jpg", ".png")
    ):
        if (kind, suffix) in (("images", ".jpg"), ("labels", ".png")):
            folder = tmp_path / kind / split
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.full((40, 60), 255 if kind == "labels" else 90, np.uint8)
            pixels[:20] = 2
            cv2.imwrite(str(folder / f"one{suffix}"), pixels)
    trees = names["Trees"](tmp_path, crop_size=(32, 32), train_scale=(60, 40), workers=0)
    trees.official_images = (1, 1)
    trees.check()
    assert trees.num_classes == 3
    assert trees.class_counts().tolist() == [0, 0, 20 * 60]


# The list of networks and the page that is made of it.


@pytest.fixture(scope="module")
def networks():
    spec = importlib.util.spec_from_file_location("docs_networks", DOCS / "networks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_list_names_networks_and_pages_that_there_are(networks):
    for family in networks.read_list()["families"]:
        assert {row["network"] for row in family["rows"]} <= set(list_choices(CONFIGS, "model"))
        assert (ROOT / family["scores"]).exists()


def test_counts_of_each_family_are_those_of_the_page(networks):
    content = networks.read_list()
    page = set(networks.PAGE.read_text("utf-8").splitlines())
    for family in content["families"]:
        cheapest = min(family["rows"], key=lambda row: content["data"][row["data"]]["size"])
        first = dict(list(cheapest["points"].items())[:1])
        assert set(networks.lines(cheapest | {"points": first}, family, content["data"])) <= page


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_is_what_the_list_and_the_code_give(networks):
    assert networks.page(networks.read_list()) == networks.PAGE.read_text("utf-8")


def test_reports_show_the_same_published_numbers(networks):
    from callbacks.published import published_points

    names = {"COCO-Stuff": ("cocostuff", "164k"), "COCO-Stuff 10k": ("cocostuff", "10k")}
    checked = 0
    for family in networks.read_list()["families"]:
        if family["title"] not in ("EDAFormer", "SegFormer", "SegViT", "DToP"):
            continue  # of others, reports quote another source
        for row in family["rows"]:
            name, variant = names.get(row["data"], (row["data"].lower(), None))
            data = {"name": name} | ({"variant": variant} if variant else {})
            config = {"model": {"name": row["network"]}, "data": data}
            for point in published_points(config):
                if point.setting in row["points"] and "fine-tuned" not in point.remark:
                    assert row["points"][point.setting] == [point.gmacs, point.miou]
                    checked += 1
    assert checked > 30


# The notebook.


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_stored_as_it_ran():
    assert NOTEBOOK.stat().st_size < 300_000
    cells = code_cells(json.loads(NOTEBOOK.read_text("utf-8")))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {"error"}.isdisjoint(output["output_type"] for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="needs the dependency group docs")
    nbclient = pytest.importorskip("nbclient", reason="needs the dependency group docs")
    # A checkout of its own: runs and data sets are written into it.
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", "datasets", ".git"):
            (tmp_path / entry.name).symlink_to(entry)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1700, resources=resources).execute()
    texts = [
        output["text"]
        for cell in code_cells(notebook)
        for output in cell["outputs"]
        if output["output_type"] == "stream"
    ]
    assert any("isr_global" in text and "mIoU" in text for text in texts)
