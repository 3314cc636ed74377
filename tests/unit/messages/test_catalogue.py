"""A finished sentence finds the template that it was made from, and its values go over unchanged."""

from __future__ import annotations

import time

import pytest

from edgetool.messages.catalogue import Catalogue

ENTRIES = {
    "group_size {1} does not divide in_features {2}": "group_size {1} 不能整除 in_features {2}",
    "{1}: no such directory": "{1}：没有这个目录",
    "cannot write {1}: {2}": "无法写入 {1}：{2}",
    "disk full while writing {1}": "写入 {1} 时磁盘已满",
    "unknown key {1} in [{2}] of {3}": "{3} 的 [{2}] 中有未知的键 {1}",
    "choose another --output": "换一个 --output",
    "read {1} file{s}": "读取 {1} 个文件",
    "tensor {1}": "张量 {1}",
    "tensor {1} is missing": "缺少张量 {1}",
    "stopped on request: {1}": "应要求停止：{1}",
    "{1} of {2} is no key": "{2} 的{1} 不是键",
    "key {1}": "键 {1}",
    "everything is kept": "全部保留",
    "port {1} (used by {2}, {3})": "端口 {1}（由 {2} 使用，{3}）",
    "waited {1} s": "等待了 {1} s",
    "nothing answers at {1}": "{1} 上没有应答",
    "{1} of {2}": "{1}/{2}",
    "done": "完成",
    "perplexity": "困惑度",
    "peak memory": "峰值内存",
}


@pytest.fixture(scope="module")
def chinese() -> Catalogue:
    return Catalogue(ENTRIES)


@pytest.mark.parametrize(
    ("english", "expected"),
    [
        ("group_size 64 does not divide in_features 100", "group_size 64 不能整除 in_features 100"),
        ("models/x: no such directory", "models/x：没有这个目录"),
        ("unknown key 'bitz' in [quantize] of a b.toml", "a b.toml 的 [quantize] 中有未知的键 'bitz'"),
        ("read 1 file", "读取 1 个文件"),
        ("read 2 files", "读取 2 个文件"),
        ("choose another --output", "换一个 --output"),
        ("213.6 kB of 1.0 GB", "213.6 kB/1.0 GB"),
        ("7: group_size 64 does not divide in_features 100", "7: group_size 64 不能整除 in_features 100"),
        ("7: no such directory", "7：没有这个目录"),
        ("7: key 3 of a.toml is no key", "7: a.toml 的键 3 不是键"),
    ],
)
def test_a_sentence_is_translated_and_its_values_keep_their_text(
    chinese: Catalogue, english: str, expected: str
) -> None:
    assert chinese.sentence(english) == expected


def test_the_template_with_most_text_of_its_own_wins(chinese: Catalogue) -> None:
    assert chinese.sentence("tensor a.b is missing") == "缺少张量 a.b"


def test_a_value_that_is_a_sentence_is_translated_in_turn(chinese: Catalogue) -> None:
    assert chinese.sentence("cannot write out: disk full while writing out/x") == "无法写入 out：写入 out/x 时磁盘已满"
    assert chinese.sentence("stopped on request: everything is kept") == "应要求停止：全部保留"


@pytest.mark.parametrize(
    ("english", "expected"),
    [
        ("tensor a is missing; choose another --output", "缺少张量 a；换一个 --output"),
        # the first value must not swallow what is the next sentence
        (
            "group_size 1 does not divide in_features 2; tensor a is missing",
            "group_size 1 不能整除 in_features 2；缺少张量 a",
        ),
        ("x/y: tensor a is missing", "x/y: 缺少张量 a"),
        ("done: tensor a is missing", "done: 缺少张量 a"),
        ("(a) b) c: no such directory", "(a) b) c：没有这个目录"),
        ("cannot write a (b): disk full while writing c (d)", "无法写入 a (b)：写入 c 时磁盘已满 (d)"),
        ("port 1 (used by a, b); port 2 (used by c, d)", "端口 1（由 a 使用，b）；端口 2（由 c 使用，d）"),
        ("tensor a is missing (waited 3 s)", "缺少张量 a（等待了 3 s）"),
        ("nothing answers at http://h:1 (ConnectError)", "http://h:1 上没有应答 (ConnectError)"),
        ("- tensor a is missing\n- choose another --output", "- 缺少张量 a\n- 换一个 --output"),
    ],
)
def test_sentences_put_together_are_translated_each(chinese: Catalogue, english: str, expected: str) -> None:
    assert chinese.sentence(english) == expected


@pytest.mark.parametrize(
    "text",
    [
        "what nobody has translated",
        "done",
        "done: said by a step of this name",
        "",
        "   ",
        "perplexity, arc_easy",
        "arc_easy, perplexity, rouge",
        "tensor of an unknown sentence that only begins alike",
        "the sum of its parts",
        "x" * 5000 + " tensor a is missing",
    ],
)
def test_what_is_not_known_stays_as_it_is(chinese: Catalogue, text: str) -> None:
    assert chinese.sentence(text) == text


def test_single_words_are_translated_as_labels_only(chinese: Catalogue) -> None:
    assert (chinese.label("done"), chinese.label("peak memory")) == ("完成", "峰值内存")
    assert chinese.sentence("cannot write done: tensor a is missing") == "无法写入 done：缺少张量 a"


def test_space_around_a_sentence_is_kept(chinese: Catalogue) -> None:
    assert chinese.sentence("  tensor a is missing\n") == "  缺少张量 a\n"


def test_hostile_text_costs_no_more_than_its_length() -> None:
    many = Catalogue({"{1} aa {2} aa {3} aa {4} aa {5} bb": "{5}{4}{3}{2}{1}"})
    text = "x aa " * 790 + "end"
    begun = time.process_time()
    assert many.sentence(text) == text
    assert time.process_time() - begun < 1  # a backtracking search would take hours


def test_long_lists_cost_no_more_than_short_ones(chinese: Catalogue) -> None:
    begun = time.process_time()
    for mark in (", ", ": ", "; ", " (", "\n", "- "):
        text = f"a{mark}" * 900 + "tensor a is missing"
        assert len(chinese.sentence(text)) > 1000
    assert time.process_time() - begun < 10


def test_values_with_marks_of_templates_in_them_change_nothing(chinese: Catalogue) -> None:
    assert chinese.sentence(r"cannot write {2}\1: {1} %s") == r"无法写入 {2}\1：{1} %s"
