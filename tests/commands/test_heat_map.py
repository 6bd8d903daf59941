"""How much has changed where: the table, its picture and its text."""

from __future__ import annotations

import itertools
import json
import math
import re
import struct

import numpy as np
import pytest
import reference
import torch
from adapters import adapter_of
from folders import OTHER, convert, make, without_weights
from presets import PRESETS, tensor_shapes
from terminals import in_terminal

import streamshard
from streamshard import custom_to_hf, diff, merge_lora
from streamshard.commands.heat_map import MAX_ROWS, heat_map, place_of
from streamshard.errors import InputError, UsageError, WriteError

ALL = [
    "tiny",
    "InternVL3-1B",
    "InternVL3-78B",
    "InternVL3_5-241B-A28B",
    "InternVL3_5-GPT-OSS-20B-A4B-Preview",
]


def relative(new: dict, old: dict) -> dict[tuple[str, int | None, str], float]:
    """The relative change of each module, by torch in fp64."""
    sums: dict = {}
    for name, before in old.items():
        place = place_of(name)
        key = place.part, place.layer, place.module
        squares = sums.setdefault(key, [0.0, 0.0])
        squares[0] += (new[name].double() - before.double()).square().sum().item()
        squares[1] += before.double().square().sum().item()
    return {key: math.sqrt(one / other) if one else 0.0 for key, (one, other) in sums.items()}


def cells(heat: dict) -> dict[tuple[str, int | None, str], float]:
    return {
        (panel["part"], layer if panel["layers"] else None, module): cell
        for panel in heat["panels"]
        for module, row in zip(panel["modules"], panel["cells"], strict=True)
        for layer, cell in enumerate(row)
        if cell is not None
    }


def assert_close(heat: dict, expected: dict) -> None:
    found = cells(heat)
    assert found.keys() == expected.keys()
    assert all(math.isclose(found[key], expected[key], rel_tol=1e-9) for key in expected)
    assert any(expected.values())


@pytest.fixture
def base(tmp_path):
    return make(tmp_path / "base", "tiny", "custom")


@pytest.fixture
def lora(tmp_path):
    return adapter_of(tmp_path / "lora", "tiny", "custom")


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ALL)
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_every_tensor_has_its_place(preset, layout):
    """By the published names: the three parts, all layers, and no module twice in a layer."""
    places = {name: place_of(name) for name in tensor_shapes(PRESETS[preset], layout)}
    assert {place.part for place in places.values()} == {"vision", "projector", "language model"}
    for name, place in places.items():
        is_in_layer = re.search(r"\.(?:layers?|blocks)\.(\d+)\.", name)
        assert place.layer == (int(is_in_layer[1]) if is_in_layer else None), name
        assert place.kind != "other", name
        assert not re.search(r"\d{2}|weight|bias$", place.module), place
        start = {"vision": "vision_", "language model": "language_model."}
        assert name.startswith(start.get(place.part, ("mlp1.", "multi_modal_projector.")))


def test_a_merge_is_measured_from_its_base(base, lora, tmp_path):
    report = merge_lora(base=base, adapter=lora, output=tmp_path / "out", heatmap=True)
    heat = report["heat_map"]
    assert_close(heat, relative(reference.read(tmp_path / "out"), reference.read(base)))
    assert heat["title"] == "out against base"
    assert heat["changed"] == report["merged"]
    assert heat["compared"] == report["l2"]["compared"]
    assert math.isclose(heat["global"], report["l2"]["global"])
    total = math.fsum(one["l2"] ** 2 for one in heat["components"])
    assert math.isclose(math.sqrt(total), heat["global"])


@pytest.mark.parametrize("trained", ["custom", "hf"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_it_is_what_a_comparison_finds(layout, trained, tmp_path):
    """Of a merge that converts, too, fused tensors included; by names of the output."""
    base = make(tmp_path / "base", "tiny-internlm2", OTHER[layout])
    ref = make(tmp_path / "ref", "tiny-internlm2", layout)
    adapter = adapter_of(tmp_path / "adapter", "tiny-internlm2", trained)
    convert(layout, base, ref, tmp_path / "converted")
    report = merge_lora(
        base=base, adapter=adapter, output=tmp_path / "out", layout=layout, reference=ref,
        heatmap=True,
    )  # fmt: skip
    compared = diff(tmp_path / "out", tmp_path / "converted")["heat_map"]
    assert_close(report["heat_map"], cells(compared))
    old = reference.read(tmp_path / "converted")
    assert_close(compared, relative(reference.read(tmp_path / "out"), old))


def test_a_rounded_output_is_measured_from_its_base(base, lora, tmp_path):
    report = merge_lora(base=base, adapter=lora, output=tmp_path / "o", heatmap=True, dtype="fp16")
    assert_close(report["heat_map"], relative(reference.read(tmp_path / "o"), reference.read(base)))


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_conversion_is_measured_from_its_reference(layout, tmp_path):
    source = make(tmp_path / "source", "tiny", OTHER[layout], seed=1)
    ref = make(tmp_path / "ref", "tiny", layout)
    report = convert(layout, source, ref, tmp_path / "out", heatmap=True)
    expected = relative(reference.read(tmp_path / "out"), reference.read(ref))
    assert_close(report["heat_map"], expected)


def test_without_weights_to_compare_with_it_is_refused_before_the_run(base, tmp_path):
    ref = without_weights(make(tmp_path / "ref", "tiny", "hf"))
    with pytest.raises(UsageError, match="show the distance from the reference's weights"):
        custom_to_hf(custom_path=base, hf_path=ref, save_path=tmp_path / "out", heatmap=True)
    assert not (tmp_path / "out").exists()


def test_cells_without_a_number():
    squared = {
        "language_model.model.layers.0.mlp.up_proj.weight": 1.0,
        "language_model.model.layers.1.mlp.up_proj.weight": math.nan,
        "language_model.model.layers.3.mlp.up_proj.weight": 0.0,
        "language_model.model.layers.0.mlp.down_proj.weight": 4.0,
        "mlp1.1.weight": math.inf,
    }
    heat = heat_map("x", squared, {"language_model.model.layers.0.mlp.down_proj.weight": 16.0})
    projector, language = heat["panels"]
    assert projector["cells"] == [["not finite"]]
    assert language["modules"] == ["mlp.up_proj", "mlp.down_proj"]
    assert language["cells"] == [["from zero", "not finite", None, 0.0], [0.5, None, None, None]]
    assert heat["global"] is None
    assert heat["components"][0] == {"part": "projector", "kind": "", "l2": None}
    json.dumps(heat, allow_nan=False)


def test_modules_stand_as_data_goes_through_them(base, lora, tmp_path):
    heat = merge_lora(base=base, adapter=lora, output=tmp_path / "o", heatmap=True)["heat_map"]
    vision, *_, language, outside = heat["panels"]
    assert vision["modules"][:4] == ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    ends = [module.rpartition(".")[2] for module in language["modules"]]
    assert ends[:7] == [f"{one}_proj" for one in ("q", "k", "v", "o", "gate", "up", "down")]
    assert ends[7:] == ["input_layernorm", "post_attention_layernorm"]
    assert outside["modules"] == ["embed_tokens", "norm", "lm_head"]


def test_experts_of_a_layer_are_one_cell():
    names = [f"language_model.model.layers.2.mlp.experts.{n}.up_proj.weight" for n in range(128)]
    heat = heat_map("x", dict.fromkeys(names, 1.0), dict.fromkeys(names, 100.0))
    (panel,) = heat["panels"]
    assert panel["modules"] == ["mlp.experts.up_proj"]
    assert panel["cells"] == [[None, None, pytest.approx(0.1)]]
    assert heat["components"][0]["kind"] == "experts"


def test_names_of_anybody_make_no_endless_table():
    squared = {f"a{n}.x.weight": float(n) for n in range(5000)}
    squared |= {"b.layers.99999999.w": 1.0, "b.layers.9999.w": 1.0}
    heat = heat_map("x", squared, squared)
    layered, plain = sorted(heat["panels"], key=lambda panel: panel["layers"] is None)
    assert (layered["layers"], plain["layers"]) == (10_000, None)
    assert len(plain["modules"]) == MAX_ROWS
    assert plain["left_out"] == 5001 - MAX_ROWS
    assert "a4999.x" in plain["modules"]


# --- the picture ----------------------------------------------------------------------------------


def sized(preset: str, layout: str) -> dict:
    """A heat map of a real model's size; changes span two decades."""
    squared, norms = {}, {}
    for number, (name, shape) in enumerate(tensor_shapes(PRESETS[preset], layout).items()):
        norms[name] = math.prod(shape) * 4e-4
        squared[name] = norms[name] * 10 ** (-4 - 4 * (number % 7) / 6) if number % 3 else 0.0
    return heat_map("new against old", squared, norms)


def drawn(heat: dict):
    pytest.importorskip("matplotlib")
    from streamshard.commands.picture import drawn

    return drawn(heat)


@pytest.mark.parametrize("preset", ["InternVL3-1B", "InternVL3_5-241B-A28B"])
def test_the_picture_has_the_cells(preset):
    """24 and 94 layers: each cell is a pixel of its panel, with the colour of its value."""
    heat = sized(preset, "hf")
    figure = drawn(heat)
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    values = [v for v in cells(heat).values() if v]
    norm, viridis = LogNorm(min(values), max(values)), colormaps["viridis"]
    panels = [panel for panel in heat["panels"] if panel["layers"]]
    axes = {ax.get_title(loc="left"): ax for ax in figure.axes}
    for panel in panels:
        (ax,) = (ax for title, ax in axes.items() if title.startswith(panel["part"]))
        (image,) = ax.get_images()
        pixels = np.asarray(image.get_array())
        assert pixels.shape == (len(panel["modules"]), panel["layers"], 3)
        for row, values in enumerate(panel["cells"]):
            for layer, cell in enumerate(values):
                expected = (
                    viridis(norm(cell))[:3]
                    if cell
                    else (0xE3 / 255,) * 3
                    if cell == 0
                    else (1,) * 3
                )
                assert np.allclose(pixels[row, layer], expected)
        assert [text.get_text() for text in ax.get_yticklabels()] == panel["modules"]
    others = [p for p in heat["panels"] if not p["layers"]]
    ax = axes["projector, and what is outside of layers"]
    assert np.asarray(ax.get_images()[0].get_array()).shape[:2] == (
        sum(len(panel["modules"]) for panel in others),
        1,
    )
    bars = axes["absolute L2 by component"].patches
    assert [bar.get_width() for bar in bars] == [one["l2"] for one in heat["components"]]
    texts = [text.get_text() for text in figure.findobj(lambda one: hasattr(one, "get_text"))]
    assert any("new against old" in text for text in texts)
    assert any("logarithmic scale" in text for text in texts)
    assert "unchanged" in texts


@pytest.mark.parametrize("preset", ["InternVL3-1B", "InternVL3_5-241B-A28B"])
def test_labels_do_not_lie_on_each_other(preset):
    """Neighbouring labels of modules and layers, as drawn; and none is cut off."""
    figure = drawn(sized(preset, "hf"))
    from matplotlib.text import Text

    unseen = {
        label
        for ax in figure.axes
        for axis in (ax.xaxis, ax.yaxis)
        for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        if not min(axis.get_view_interval()) <= place <= max(axis.get_view_interval())
    }
    figure.draw_without_rendering()
    width, height = figure.canvas.get_width_height()
    for ax in figure.axes:
        for axis, low, high in ((ax.xaxis, "x0", "x1"), (ax.yaxis, "y0", "y1")):
            first, last = sorted(axis.get_view_interval())
            boxes = [
                label.get_window_extent()
                for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
                if first <= place <= last and label.get_text()
            ]
            boxes.sort(key=lambda box: getattr(box, low))
            for one, other in itertools.pairwise(boxes):
                assert getattr(one, high) <= getattr(other, low) + 0.5
    texts = [label for ax in figure.axes for label in (ax.xaxis.label, ax.yaxis.label)]
    texts += [text for ax in figure.axes for text in ax.findobj(Text)]
    texts += figure.findobj(Text)
    boxes = [text.get_window_extent() for text in texts if text.get_text() and text not in unseen]
    assert len(boxes) > 50
    for box in boxes:
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= width + 1
        assert box.y1 <= height + 1


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_file_is_an_image_of_the_size(kind, base, lora, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"change.{kind}"
    report = merge_lora(base=base, adapter=lora, output=tmp_path / "out", plot=file)
    figure = drawn(report["heat_map"])
    width, height = figure.get_size_inches()
    content = file.read_bytes()
    if kind == "png":
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        pixels = struct.unpack(">II", content[16:24])
        assert pixels == (int(width * 150), int(height * 150))
    elif kind == "svg":
        import xml.etree.ElementTree as ET

        root = ET.fromstring(content)
        assert root.tag.endswith("svg")
        assert float(root.get("width").removesuffix("pt")) == pytest.approx(72 * width)
        assert "out against base" in content.decode()
    else:
        assert content.startswith(b"%PDF-")
        assert content.rstrip().endswith(b"%%EOF")
    assert [path.name for path in tmp_path.iterdir() if "new" in path.name] == []


def test_the_same_change_is_the_same_file(base, lora, tmp_path):
    pytest.importorskip("matplotlib")
    merge_lora(base=base, adapter=lora, output=tmp_path / "out", plot=tmp_path / "one.svg")
    streamshard.plot(tmp_path / "out", tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_a_picture_of_any_report(base, lora, tmp_path):
    pytest.importorskip("matplotlib")
    report = merge_lora(base=base, adapter=lora, output=tmp_path / "out")
    assert "heat_map" not in report
    compared = diff(tmp_path / "out", base)
    for what in (report, compared, tmp_path / "out", json.loads(json.dumps(compared))):
        figure = streamshard.plot(what)
        assert figure.get_suptitle().startswith("out against base")
    with pytest.raises(UsageError, match="compares nothing"):
        streamshard.plot(streamshard.inspect(base))
    with pytest.raises(InputError):
        streamshard.plot(base)


def test_nothing_changed_and_nothing_finite_can_be_drawn():
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    for value in (0.0, math.nan, math.inf):
        figure = drawn(heat_map("a$b_{c against $d$", {name: value}, {name: 1.0}))
        figure.draw_without_rendering()
    figure = drawn(heat_map("a against b", {"mlp1.1.weight": 1.0}, {"mlp1.1.weight": 4.0}))
    figure.draw_without_rendering()
    drawn(heat_map("a against b", {}, {})).draw_without_rendering()


@pytest.mark.parametrize("name", ["x.jpg", "x", "png", ".png/", "x.PNGX"])
def test_other_names_are_refused_before_the_run(name, pair):
    with pytest.raises(UsageError, match=r"ends in \.png, \.svg or \.pdf"):
        merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, plot=pair.root / name)
    assert not pair.output.exists()


def test_places_that_cannot_be_written_are_refused_before_the_run(pair):
    pytest.importorskip("matplotlib")
    (pair.root / "folder.png").mkdir()
    call = {"base": pair.base, "adapter": pair.adapter, "output": pair.output}
    with pytest.raises(WriteError, match="no file"):
        merge_lora(**call, plot=pair.root / "folder.png")
    with pytest.raises(WriteError, match="no file"):
        diff(pair.base, pair.base, plot=pair.root / "folder.png")
    with pytest.raises(WriteError, match=r"is no folder|Not a directory"):
        merge_lora(**call, plot=pair.base / "config.json" / "x.png")
    pair.output.mkdir()
    with pytest.raises(UsageError, match="in the output"):
        merge_lora(**call, plot=pair.output / "x.png")
    assert [*pair.output.iterdir()] == []


def test_the_folder_of_a_picture_is_made_and_the_picture_is_told(pair, cli):
    pytest.importorskip("matplotlib")
    picture = pair.root / "new" / "folder" / "x.png"
    done = cli(*pair.command, "--plot", picture)
    assert done.code == 0, done.err
    assert picture.is_file()
    assert done.out.endswith(f"\n  picture: {picture}\n")
    other = picture.parent / "more" / "y.svg"
    assert f"  picture: {other}\n" in cli("diff", pair.output, pair.base, "--plot", other).out
    assert other.is_file()


def test_an_old_picture_stays_until_the_new_one_is_there(pair, monkeypatch):
    pytest.importorskip("matplotlib")
    from streamshard.commands import drawing

    file = pair.root / "x.png"
    file.write_text("old")
    call = {"base": pair.base, "adapter": pair.adapter, "output": pair.output, "plot": file}

    def fail(*args):
        raise WriteError("x.png: no space left.")

    with monkeypatch.context() as patched:
        patched.setattr("streamshard.disk.pictures.write_new", fail)
        with pytest.raises(WriteError, match="only the picture of the change is missing") as error:
            merge_lora(**call)
    assert f"{pair.output} is complete" in str(error.value)
    assert file.read_text() == "old"
    streamshard.verify(pair.output, strict=True)
    merge_lora(**call, overwrite=True)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert drawing.name_of("a/b") == "b"


def test_a_dry_run_draws_nothing(pair):
    pytest.importorskip("matplotlib")
    call = {"base": pair.base, "adapter": pair.adapter, "output": pair.output}
    report = merge_lora(**call, plot=pair.root / "x.png", heatmap=True, dry_run=True)
    assert report["heat_map"] is None
    assert not (pair.root / "x.png").exists()


def test_only_a_complete_output_is_drawn(base, lora, tmp_path):
    """A part that measures nothing itself must not draw that nothing has changed."""
    pytest.importorskip("matplotlib")
    call = {"base": base, "adapter": lora, "output": tmp_path / "out", "max_shard_size": 100_000}
    files = {which: tmp_path / f"{which}.svg" for which in ("first", "last", "again")}
    first = merge_lora(**call, part="1/2", plot=files["first"])
    assert not first["part"]["complete"]
    assert first["heat_map"] is None
    assert not files["first"].exists()
    last = merge_lora(**call, part="2/2", plot=files["last"])
    again = merge_lora(**call, part="1/2", plot=files["again"])
    assert last["l2"]["global"] > 0
    assert again["part"]["complete"]
    assert files["again"].read_bytes() == files["last"].read_bytes()


# --- the terminal ---------------------------------------------------------------------------------


def text_of(heat: dict) -> list[str]:
    from streamshard.cli.heat_text import heat_text

    return heat_text(heat).split("\n")


@pytest.mark.parametrize("preset", ["InternVL3-1B", "InternVL3_5-241B-A28B"])
def test_lines_of_text_fit_80_columns(preset):
    heat = sized(preset, "hf")
    lines = text_of(heat)
    assert max(map(len, lines)) <= 80
    assert all(line.isascii() or "…" in line for line in lines)
    for panel in heat["panels"]:
        assert any(line.startswith(panel["part"]) for line in lines)


def test_a_letter_is_the_largest_change_of_its_layers():
    name = "language_model.model.layers.{}.mlp.up_proj.weight"
    squared = {name.format(n): 10.0 ** (-(n % 9)) for n in range(94)}
    heat = heat_map("a against b", squared, dict.fromkeys(squared, 1.0))
    (line,) = (line for line in text_of(heat) if "mlp.up_proj" in line)
    marks = line.split()[1]
    assert len(marks) == 47
    assert marks[0] == "@"
    changes = [max(squared[name.format(n)], squared[name.format(n + 1)]) for n in range(0, 94, 2)]
    order = ".:-=+*#%@"
    assert sorted(range(47), key=lambda n: (order.index(marks[n]), n)) == sorted(
        range(47), key=lambda n: (changes[n], n)
    )


def test_the_scale_is_that_of_the_picture():
    """Linear from zero, unless the largest is many times the smallest."""
    from streamshard.cli import heat_text
    from streamshard.commands import picture

    assert heat_text.MANY_TIMES == picture.MANY_TIMES
    name = "language_model.model.layers.{}.mlp.up_proj.weight"
    for factor, scale in ((29, "0 .:-=+*#%@ 29 (linear scale)"), (31, "1 .:-=+*#%@ 31 (logarithm")):
        squared = {name.format(n): float(n**2) for n in (1, factor)}
        lines = text_of(heat_map("a against b", squared, dict.fromkeys(squared, 1.0)))
        assert any(line.startswith(scale) for line in lines), lines


@pytest.mark.parametrize(
    ("layers", "ruler"),
    [
        (3, "0 2"),
        (24, "0         10        20 23"),
        (94, "0    10   20   30   40   50   60   70   80   90"),
    ],
)
def test_layers_have_their_numbers(layers, ruler):
    name = "language_model.model.layers.{}.mlp.up_proj.weight"
    squared = {name.format(n): 1.0 for n in range(layers)}
    lines = text_of(heat_map("a against b", squared, dict.fromkeys(squared, 1.0)))
    (line,) = (line for line in lines if line.strip().startswith("layer "))
    (row,) = (line for line in lines if "mlp.up_proj" in line)
    assert line[line.index("layer") + 6 :] == ruler
    assert line.index("0") == row.index("@")


def test_on_the_command_line(pair, cli):
    outcome = cli(*pair.command, "--heatmap")
    assert outcome.code == 0, outcome.err
    assert "merged against base" in outcome.out
    assert "self_attn.q_proj" in outcome.out
    assert "\x1b" not in outcome.out
    shown = cli("diff", pair.output, pair.base, "--heatmap").out
    assert shown.partition("merged against")[2] == outcome.out.partition("merged against")[2]
    document = json.loads(cli("diff", pair.output, pair.base, "--heatmap", "--json").out)
    assert document["heat_map"]["changed"] == 2


def test_colours_in_a_terminal_only(pair, cli, monkeypatch):
    assert cli(*pair.command).code == 0
    command = ["diff", pair.output, pair.base, "--heatmap"]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[48;5;" in in_terminal(80, *command).text
    monkeypatch.setenv("NO_COLOR", "1")
    seen = in_terminal(80, *command)
    assert "\x1b[48;5;" not in seen.text
    assert any("self_attn.q_proj" in line for line in seen.lines)
    assert max(map(len, seen.lines)) <= 80


def test_the_exit_code_says_whether_they_differ(pair, cli, tmp_path):
    assert cli(*pair.command, "--plot", "x.gif").code == 2
    assert cli(*pair.command).code == 0
    assert cli("diff", pair.base, pair.output).code == 0
    outcome = cli("diff", pair.base, pair.output, "--exit-code")
    assert outcome.code == 8
    assert outcome.out.startswith("They differ")
    assert cli("diff", pair.base, pair.base, "--exit-code").code == 0
    content = reference.read(pair.base)
    content["x"] = torch.zeros(1)
    other = reference.save_checkpoint(tmp_path / "other", content)
    assert cli("diff", other, pair.base, "--exit-code", "--json").code == 8


def test_short_options(pair, cli, tmp_path):
    command = [str(part).replace("--output", "-o") for part in pair.command]
    assert cli(*command).code == 0
    assert cli("-V").out == cli("--version").out
    source, ref = (make(tmp_path / layout, "tiny", layout) for layout in ("custom", "hf"))
    paths = ["--custom-path", source, "--hf-path", ref]
    for option in ("-o", "--output", "--save_path"):
        assert cli("custom2hf", *paths, option, tmp_path / f"out{option}").code == 0
