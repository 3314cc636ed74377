"""ROUGE-L of a model's answers against references of the user's own, Chinese ones too."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import statistics
import threading
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgetool.artifacts import disk_errors
from edgetool.errors import BadInput
from edgetool.evaluation.answers import Answers
from edgetool.evaluation.data_files import WrongLine, numbered_rows
from edgetool.evaluation.harness import check_template, count_tokens
from edgetool.evaluation.records import Sample, TaskScores
from edgetool.evaluation.remembering import Remembering
from edgetool.evaluation.stock_tasks import quiet
from edgetool.progress import Progress

MAX_NEW_TOKENS = 256
"""Length of an answer, in tokens."""
_LINE = '{"prompt": "...", "reference": "..."}'
_HAN = "CJK UNIFIED IDEOGRAPH"


@dataclass(frozen=True)
class RougeRow:
    """A prompt and what a good answer to it says."""

    id: str
    prompt: str
    reference: str


@dataclass(frozen=True)
class RougeData:
    """The rows of a file, in its order."""

    path: Path
    rows: tuple[RougeRow, ...]

    def chosen(self, limit: int | None = None, only: Sequence[str] | None = None) -> tuple[RougeRow, ...]:
        """The first `limit` rows, or those whose id is in `only`, in the file's order."""
        if only is not None:
            wanted = set(only)
            return tuple(row for row in self.rows if row.id in wanted)
        return self.rows[:limit]

    def sha256(self, limit: int | None = None) -> str:
        """Of the rows that are used."""
        rows = [[row.id, row.prompt, row.reference] for row in self.chosen(limit)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def find(file: Path | None, data_dir: Path | None) -> RougeData:
    """The rows of `file`, or of the one .jsonl file in `data_dir`/rouge.

    A row has `prompt` and `reference`, texts that are not empty, and may have an `id`.
    Raises BadInput where there is no file, several to choose from, or a wrong line, which it names.
    """
    if file is None:
        directory = None if data_dir is None else data_dir / "rouge"
        found = sorted(directory.glob("*.jsonl")) if directory is not None else []
        if len(found) != 1:
            where = f"{directory} has {len(found)} .jsonl files" if directory else "no file is given"
            raise BadInput(
                f"rouge needs one file of prompts and references, and {where}",
                f"--rouge-data FILE, with lines such as {_LINE}",
            )
        file = found[0]
    try:
        data = file.read_bytes()
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror}", "check --rouge-data") from error
    rows: dict[str, RougeRow] = {}
    try:
        for line, row in numbered_rows(file, data):
            for name in ("prompt", "reference"):
                if not isinstance(row.get(name), str) or not row[name].strip():
                    raise WrongLine(line, f"has no text in field {name}")
                try:
                    row[name].encode()
                except UnicodeEncodeError as error:  # JSON can name it, and no tokenizer takes it
                    raise WrongLine(line, "has half of a surrogate pair, which is no text") from error
            name = str(row.get("id", f"rouge:{len(rows)}"))
            if name in rows:
                raise WrongLine(line, f"has the id {name!r} a second time")
            rows[name] = RougeRow(name, row["prompt"], row["reference"])
    except WrongLine as wrong:
        raise BadInput(
            f"{file}: line {wrong.line} {wrong}", 'a line is {"prompt": "...", "reference": "..."}'
        ) from wrong
    if not rows:
        raise BadInput(f"{file} is empty", f"it needs lines such as {_LINE}")
    return RougeData(file, tuple(rows.values()))


def describe(data: RougeData, limit: int | None = None) -> dict[str, Any]:
    """What decides the scores besides the model: for the profile and the record."""
    return {
        "framework": "edgetool",
        "rouge_score": version("rouge-score"),
        "jieba": version("jieba"),
        "stemmer": False,
        "data_sha256": data.sha256(limit),
        "max_new_tokens": MAX_NEW_TOKENS,
    }


def measure(
    data: RougeData,
    lm: Any,
    answers: Answers,
    progress: Progress,
    *,
    title: str,
    cache_dir: Path,
    limit: int | None = None,
    only: Sequence[str] | None = None,
    chat_template: bool = False,
    system_prompt: str | None = None,
    stop: threading.Event | None = None,
    log: Path | None = None,
) -> TaskScores:
    """Let `lm` (an `LM` of lm-evaluation-harness) answer the prompts of `data`, greedily, and compare.

    The score of a sample is the F1 of ROUGE-L, 0 to 1; precision and recall are beside it. `generated_tokens` over
    `seconds` is the throughput, of the answers that were not known before. cache_dir: for jieba's dictionary.
    limit, only, stop and log as in `harness.measure`. Raises BadInput where a chat template is asked for and the model
    has none.
    """
    from lm_eval.api.instance import Instance

    check_template(lm, title, chat_template)
    rows = data.chosen(limit, only)
    options = {"until": [], "max_gen_toks": MAX_NEW_TOKENS, "do_sample": False, "temperature": 0.0}
    requests = [
        Instance("generate_until", {}, (_asked(lm, row.prompt, chat_template, system_prompt), dict(options)), index)
        for index, row in enumerate(rows)
    ]
    asked = Remembering(lm, answers, progress, f"{title}: rouge", stop)
    with quiet():
        said = asked.generate_until(requests)
    scores = Scorer(cache_dir)
    samples = []
    for row, text in zip(rows, said, strict=True):
        precision, recall, f1 = scores.rouge_l(row.reference, text)
        samples.append(Sample(row.id, "rouge", f1, {"precision": precision, "recall": recall}))
    if log is not None:
        _write_log(log, rows, said, samples)
    values = [sample.score for sample in samples]
    n = len(samples)
    return TaskScores(
        task="rouge",
        metric="rougeL",
        n=n,
        value=statistics.fmean(values),
        stderr=statistics.stdev(values) / n**0.5 if n > 1 else None,
        samples=tuple(samples),
        metrics={
            "rougeL": statistics.fmean(values),
            "rougeL_precision": statistics.fmean(sample.more["precision"] for sample in samples),
            "rougeL_recall": statistics.fmean(sample.more["recall"] for sample in samples),
        },
        seconds=asked.seconds,
        generated_tokens=count_tokens(lm, asked.generated),
        version=describe(data, limit),
    )


def _asked(lm: Any, prompt: str, chat: bool, system_prompt: str | None) -> Any:
    if not chat:
        return prompt if system_prompt is None else f"{system_prompt}\n\n{prompt}"
    messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return lm.apply_chat_template([*messages, {"role": "user", "content": prompt}], add_generation_prompt=True)


class Scorer:
    """ROUGE-L by Google's rouge_score (Lin 2004), without stemming.

    Its own tokenizer knows a-z and digits only. Where the reference has Chinese characters, both texts are cut into
    words by jieba; words without a letter or digit, in any script, do not count.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir / "eval"

    def rouge_l(self, reference: str, said: str) -> tuple[float, float, float]:
        """Precision, recall and F1, each 0 to 1."""
        chinese = any(unicodedata.name(letter, "").startswith(_HAN) for letter in reference)
        found = (self._chinese if chinese else self._usual).score(reference, said)["rougeL"]
        return float(found.precision), float(found.recall), float(found.fmeasure)

    @functools.cached_property
    def _usual(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(["rougeL"], use_stemmer=False)

    @functools.cached_property
    def _chinese(self) -> Any:
        import jieba
        from rouge_score.rouge_scorer import RougeScorer

        jieba.setLogLevel(logging.WARNING)
        cutter = jieba.Tokenizer()
        # by default it leaves and trusts a file in the temporary directory, where others can write too
        self._cache_dir.mkdir(parents=True, exist_ok=True)
        cutter.tmp_dir = str(self._cache_dir)

        class Words:
            def tokenize(self, text: str) -> list[str]:
                words = cutter.lcut(unicodedata.normalize("NFKC", text).lower())
                return [word for word in words if any(letter.isalnum() for letter in word)]

        return RougeScorer(["rougeL"], use_stemmer=False, tokenizer=Words())


def _write_log(path: Path, rows: Sequence[RougeRow], said: Sequence[str], samples: Sequence[Sample]) -> None:
    with disk_errors(path), path.open("w") as stream:
        for row, text, sample in zip(rows, said, samples, strict=True):
            line = {"id": row.id, "rougeL": sample.score, **sample.more, "prompt": row.prompt}
            stream.write(json.dumps(line | {"reference": row.reference, "text": text}) + "\n")
