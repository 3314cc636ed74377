"""EvalPlus's own decoders around a model that is loaded already, and around an endpoint.

Prompts, stop texts, lengths and the way an answer is cut are EvalPlus's (evalplus 0.3.1, codegen and provider), so that
a text equals what its command line writes with `--greedy` for that problem alone (with several in one run its answers
hang together: see `_decoder`).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from edgetool.errors import BadInput
from edgetool.evaluation.endpoint import CHAT, COMPLETIONS, Client
from edgetool.models.devices import MODEL_TOO_LARGE, out_of_memory_named

if TYPE_CHECKING:
    from edgetool.evaluation.loaded import LoadedModel

MAX_NEW_TOKENS = 768
"""EvalPlus's length of an answer, in tokens."""
INSTRUCTION = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
)
RESPONSE = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
)
"""What EvalPlus says before a problem, and lets a chat model begin with: evalplus.codegen.run_codegen."""
SYSTEM = "You are a helpful assistant good at coding."
"""evalplus.gen.util.openai_request.make_request."""
_STOPPER = "_get_stopping_criteria"
_SENT_STOPS = {
    "humaneval": ["\ndef ", "\nclass ", "\nprint(", "\nif __name__"],
    "mbpp": ['\n"""', "\nassert", "\nprint(", "\nif __name__"],
}
"""OpenAI allows four. They only save tokens: the answer is cut here by all of EvalPlus's."""


class Coder(Protocol):
    """Whatever writes code."""

    completes: bool
    """Whether its text goes on from the prompt, rather than being an answer to it."""

    def write(self, prompt: str) -> str:
        """The greedy answer to a problem's prompt."""

    def count(self, text: str) -> int | None:
        """Tokens of a text; None where nobody knows."""

    def ready(self) -> contextlib.AbstractContextManager[None]:
        """Around all calls of `write`."""


class LoadedCoder:
    """A model in memory. chat: within its chat template, which it must have.

    As a context manager; inside, the model attends as EvalPlus's default does ("eager").
    """

    def __init__(self, loaded: LoadedModel, dataset: str, chat: bool, title: str) -> None:
        if chat and not loaded.tokenizer.chat_template:
            raise BadInput(f"{title} has no chat template, and one is asked for", "leave --chat-template out")
        self._loaded = loaded
        self._decoder = _decoder(loaded, dataset, chat, title)
        self.completes = bool(self._decoder.is_direct_completion())

    def write(self, prompt: str) -> str:
        with out_of_memory_named("generating code", MODEL_TOO_LARGE):
            return str(self._decoder.codegen(prompt, do_sample=False, num_samples=1)[0])

    def count(self, text: str) -> int | None:
        return len(self._loaded.tokenizer(text, add_special_tokens=False)["input_ids"])

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """The state of the model that EvalPlus expects; afterwards it is as before."""
        model = self._loaded.model
        attention = model.config._attn_implementation
        try:
            model.set_attn_implementation("eager")
            yield
        finally:
            model.set_attn_implementation(attention)
            model.__dict__.pop(_STOPPER, None)


def _decoder(loaded: LoadedModel, dataset: str, chat: bool, title: str) -> Any:
    from evalplus.provider.base import DecoderBase
    from evalplus.provider.hf import HuggingFaceDecoder
    from evalplus.provider.utility import EOS, extra_eos_for_direct_completion

    class Decoder(HuggingFaceDecoder):  # type: ignore[misc]
        """EvalPlus's decoder, given a model in place of a name."""

        def __init__(self) -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                DecoderBase.__init__(
                    self,
                    name=title,
                    batch_size=1,
                    temperature=0.0,
                    max_new_tokens=MAX_NEW_TOKENS,
                    instruction_prefix=INSTRUCTION,
                    response_prefix=RESPONSE,
                )
            self.skip_special_tokens = True
            self.force_base_prompt = not chat
            self.device, self.tokenizer, self.model = loaded.device, loaded.tokenizer, loaded.model
            # upstream adds to one list for the whole process, which a second dataset would inherit
            self.eos = [*EOS, *(["\n```\n"] if chat else extra_eos_for_direct_completion(dataset))]

        def codegen(self, prompt: str, do_sample: bool = True, num_samples: int = 200) -> list[str]:
            # Upstream leaves on the model what stops the last prompt's answer, counted from that prompt's end, so that
            # a longer prompt with a stop text in its own end is answered with one token: not here.
            self.model.__dict__.pop(_STOPPER, None)
            return list(super().codegen(prompt, do_sample=do_sample, num_samples=num_samples))

    return Decoder()


class EndpointCoder:
    """A server: its chat, as EvalPlus asks OpenAI's, or plain completion."""

    def __init__(self, client: Client, dataset: str, chat: bool) -> None:
        self._client = client
        self._dataset = dataset
        self.completes = not chat

    def write(self, prompt: str) -> str:
        common = {"max_tokens": MAX_NEW_TOKENS, "temperature": 0}
        if not self.completes:
            asked = f"{INSTRUCTION}\n```python\n{prompt.strip()}\n```"
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]
            return self._client.text(CHAT, {"messages": messages, **common})
        text = self._client.text(COMPLETIONS, {"prompt": prompt, "stop": _SENT_STOPS[self._dataset], **common})
        return cut(text, stop_texts(self._dataset)).replace("\t", "    ")

    def count(self, text: str) -> int | None:
        return None

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        yield


def stop_texts(dataset: str) -> list[str]:
    """Where EvalPlus cuts what a model goes on with."""
    from evalplus.provider.utility import EOS, extra_eos_for_direct_completion

    return [*EOS, *extra_eos_for_direct_completion(dataset)]


def cut(text: str, stops: list[str]) -> str:
    """`text` up to the first of `stops` in it."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
