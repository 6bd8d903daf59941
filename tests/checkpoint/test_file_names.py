"""What the name of a file says."""

from __future__ import annotations

import pytest

from streamshard.checkpoint.file_names import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    CODE,
    CONFIGS,
    INDEX_NAME,
    JOURNAL_NAME,
    MODEL_CONFIG_NAME,
    NOT_CARRIED,
    NOT_ENTERED,
    PICKLED_ADAPTER_NAME,
    REPORT_NAME,
    SINGLE_NAME,
    TOKENIZER,
    WEIGHTS,
    numbered,
)


def test_names_are_those_that_loaders_look_for():
    assert SINGLE_NAME == "model.safetensors"
    assert INDEX_NAME == "model.safetensors.index.json"
    assert numbered(12, 345) == "model-00012-of-00345.safetensors"
    assert MODEL_CONFIG_NAME == "config.json"
    assert (ADAPTER_CONFIG_NAME, ADAPTER_NAME) == (
        "adapter_config.json",
        "adapter_model.safetensors",
    )
    assert PICKLED_ADAPTER_NAME == "adapter_model.bin"
    assert (REPORT_NAME, JOURNAL_NAME) == ("streamshard.json", "streamshard.journal")


@pytest.mark.parametrize("name", [SINGLE_NAME, numbered(1, 2), INDEX_NAME, ADAPTER_NAME, "a.PT"])
def test_weights_are_written_anew_and_never_carried(name):
    assert NOT_CARRIED.fullmatch(name)
    assert WEIGHTS.fullmatch(name.casefold())
    assert not CODE.fullmatch(name)


@pytest.mark.parametrize(
    ("name", "carried"),
    [
        (MODEL_CONFIG_NAME, True),
        ("tokenizer.json", True),
        ("modeling_internvl_chat.py", True),
        ("README.md", True),
        ("streamshardXjson", True),
        (ADAPTER_CONFIG_NAME, False),
        ("trainer_state.json", False),
        (REPORT_NAME, False),
        (JOURNAL_NAME, False),
        ("latest", False),
        ("a\nb.bin", False),
    ],
)
def test_what_is_carried(name, carried):
    assert (NOT_CARRIED.fullmatch(name) is None) is carried


@pytest.mark.parametrize(
    ("name", "entered"),
    [
        ("assets", True),
        ("checkpoints", True),
        (".git", False),
        ("global_step12", False),
        ("checkpoint-500", False),
        ("wandb", False),
    ],
)
def test_folders_that_are_entered(name, entered):
    assert (NOT_ENTERED.fullmatch(name) is None) is entered


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("tokenizer.json", True),
        ("tokenizer_config.json", True),
        ("vocab.json", True),
        ("merges.txt", True),
        ("tokenization_internlm2.py", True),
        (MODEL_CONFIG_NAME, False),
        ("preprocessor_config.json", False),
        ("vocab.bin", False),
    ],
)
def test_the_files_of_a_tokenizer(name, is_one):
    assert (TOKENIZER.fullmatch(name) is not None) is is_one


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("setup.py", {"code"}),
        ("x.so.1.2", {"code"}),
        ("evil\n.py", {"code"}),
        ("model.nemo", {"weights"}),
        ("any.index.json", {"weights"}),
        ("generation_config.json", {"config"}),
        ("chat_template.jinja", {"config"}),
        ("modelfile", {"config"}),
        ("readme.md", set()),
        ("picture.png", set()),
    ],
)
def test_what_loaders_choose_by_name(name, kinds):
    patterns = {"code": CODE, "weights": WEIGHTS, "config": CONFIGS}
    assert {kind for kind, pattern in patterns.items() if pattern.fullmatch(name)} == kinds
