"""What is offered where, and that nothing is offered that a command would refuse."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import pytest
import typer.main

from edgetool.cli import app
from edgetool.completion.offers import Offer, Word, _parts, offer
from edgetool.completion.replies import _described, reply, split_line
from edgetool.completion.words import find_place
from edgetool.config import SECTIONS, key_of
from edgetool.config_models import BackendName, ConvertTarget
from edgetool.config_values import Suggest

ROOT: Any = typer.main.get_command(app)


def at(line: str) -> Offer:
    *words, current = line.split(" ")
    return offer(find_place(ROOT, words, current))


def words(line: str) -> list[str]:
    return [word.text for word in at(line).words]


def test_commands_are_offered_and_sub_commands_after_their_group() -> None:
    assert set(words("")) == set(ROOT.commands)
    assert words("gpus ") == ["run", "reap"]
    assert words("envs ins") == ["install"]


def test_an_option_is_offered_until_it_is_given_and_one_that_repeats_always() -> None:
    assert words("quantize demo --out") == ["--output"]
    assert words("quantize demo -o out --out") == []
    assert words("run r.toml --set a.b=1 --se") == ["--set", "--serve"]


def test_options_of_other_commands_are_not_offered() -> None:
    assert "--bits" in words("quantize --")
    assert "--bits" not in words("convert --")
    assert words("gpus run --wat") == []


def test_a_flag_takes_no_value_and_an_option_of_two_takes_two() -> None:
    assert at("quantize --overwrite ").words[0].text == "demo"
    assert at("compile-vcu128 --diff ").paths == at("compile-vcu128 --diff a ").paths == "directories"
    assert at("compile-vcu128 --diff a b ").suffixes == ("gguf",)


def test_an_option_given_with_equals_awaits_nothing() -> None:
    assert words("quantize --method=awq d") == ["demo"]


def test_after_two_dashes_nothing_is_an_option() -> None:
    assert words("quantize -- --out") == []


def test_the_command_under_a_lease_belongs_to_another_program() -> None:
    assert reply("fish", ROOT, ["gpus", "run", "--count", "1", "--", "python", "--ver"]) == "command space 6\n"
    assert reply("fish", ROOT, ["gpus", "run", "python", "--ver"]) == "command space 3\n"


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("convert a --to ", ConvertTarget),
        ("quantize a --backend ", BackendName),
        ("quantize a --compare ", BackendName),
        ("quantize a --bits ", Literal[2, 3, 4, 8]),
        ("inspect a --progress ", Literal["auto", "bar", "plain", "json", "quiet"]),
    ],
)
def test_values_are_those_that_the_setting_allows(line: str, allowed: Any) -> None:
    assert words(line) == [str(value) for value in get_args(allowed)]


def test_every_setting_with_fixed_values_offers_them() -> None:
    """Independent of how annotations are walked: pydantic's own schema of each section lists the same values."""
    looked_at = 0
    for command in (name for name in SECTIONS if name.replace("_", "-") in ROOT.commands):
        parser = ROOT.commands[command.replace("_", "-")]
        schema = SECTIONS[command].model_json_schema(by_alias=False, mode="validation")
        for parameter in parser.params:
            options = [name for name in parameter.opts if name.startswith("--")]
            described = schema["properties"].get(parameter.name, {})
            fixed = [
                str(value)
                for part in (described, *described.get("anyOf", ()))
                for value in (*part.get("enum", ()), *([part["const"]] if "const" in part else ()))
            ]
            if options and fixed:
                looked_at += 1
                assert words(f"{parser.name} {options[0]} ") == fixed, options[0]
    assert looked_at > 20


def test_suggested_words_are_accepted() -> None:
    suggested = 0
    for section in SECTIONS.values():
        for item in section.model_fields.items():
            for part in (*_parts(item[1].annotation), *item[1].metadata):
                for word in part.words if isinstance(part, Suggest) else ():
                    suggested += 1
                    section.model_validate({key_of(*item): word})
    assert suggested >= 8


def test_a_list_goes_on_after_its_comma_without_what_it_has() -> None:
    offered = at("eval demo --tasks arc_easy,hellaswag,arc_")
    assert offered.kept == "arc_easy,hellaswag,"
    assert [word.text for word in offered.words] == ["arc_challenge"]
    assert "native" not in words("quantize a --compare native,")


def test_what_takes_a_path_says_which() -> None:
    assert at("quantize a -o ").paths == at("serve-fpga --image ").paths == "directories"
    assert (at("quantize ").paths, at("quantize ").suffixes) == ("files", ("gguf",))
    assert at("run ").suffixes == ("toml", "gguf")
    assert at("quantize --config ").suffixes == ("toml", "yaml", "yml")
    assert at("quantize --bits ").paths == at("bench --requests ").paths == ""


def test_every_path_setting_offers_paths_and_no_other_does() -> None:
    from pathlib import Path

    def takes_path(annotation: Any) -> bool:
        return annotation is Path or any(map(takes_path, get_args(annotation) if get_origin(annotation) else ()))

    for name in SECTIONS:
        parser = ROOT.commands.get(name.replace("_", "-"))
        for key, field in SECTIONS[name].model_fields.items() if parser else ():
            parameter = next((p for p in parser.params if p.name == key), None)
            if parameter is not None and parameter.opts[0].startswith("--") and takes_path(field.annotation):
                assert at(f"{parser.name} {parameter.opts[0]} ").paths, parameter.opts


def test_bash_gets_what_follows_the_part_that_it_keeps() -> None:
    assert reply("bash", ROOT, ["edgetool quantize --format=a", "a"]) == "- space 9\nawq\n"
    assert reply("bash", ROOT, ["edgetool quantize --format=", ""]).splitlines()[1:] == [
        "gptq", "awq", "compressed-tensors",
    ]  # fmt: skip
    # without = among its word breaks, bash replaces all of the word
    assert reply("bash", ROOT, ["edgetool quantize --format=a", "--format=a"]) == "- space 9\n--format=awq\n"


def test_zsh_and_fish_get_meanings_and_colons_that_zsh_does_not_take_for_them() -> None:
    assert "hf\\::a model of the Hugging Face hub, org/name\n" in reply("zsh", ROOT, ["quantize", "h"])
    assert "hf:\ta model of the Hugging Face hub, org/name\n" in reply("fish", ROOT, ["quantize", "h"])


def test_meanings_are_one_line_of_printable_text_and_not_too_long() -> None:
    assert _described(Word("1", "it's\x1b[31m red\nand\ttold " + "x" * 200), "\t").startswith(
        "1\tit's [31m red and told x"
    )
    assert len(_described(Word("1", "x" * 200), "\t")) == len("1\t") + 100
    assert _described(Word("1"), "\t") == "1"


def test_no_space_follows_what_goes_on() -> None:
    assert reply("fish", ROOT, ["quantize", "h"]).startswith("files:gguf nospace ")
    assert reply("fish", ROOT, ["quantize", ""]).startswith("files:gguf space ")


@pytest.mark.parametrize(
    ("line", "split"),
    [
        ("edgetool ", [""]),
        ("edgetool qu", ["qu"]),
        ("edgetool quantize ", ["quantize", ""]),
        ('edgetool quantize "my mod', ["quantize", "my mod"]),
        ("edgetool quantize 'my mod", ["quantize", "my mod"]),
        ("edgetool quantize my\\ mod", ["quantize", "my mod"]),
        ("edgetool quantize my\\ ", ["quantize", "my "]),
        ('edgetool quantize "my models" -', ["quantize", "my models", "-"]),
        ("edgetool quantize \"it's", ["quantize", "it's"]),
        ("edgetool eval # no", ["eval", "#", "no"]),
    ],
)
def test_an_unfinished_line_is_split_as_bash_does(line: str, split: list[str]) -> None:
    assert split_line(line) == split
