"""What `message_templates` leaves out of the source, and what it cannot see in it."""

from __future__ import annotations

import re

API = "answers of an API, and what stands in the logs of servers"
PAGE = "pages and plots, which are files"
NOT_SHOWN_MODULES = {
    "backends/jobs": "logs of other tools",
    "completion": "what the Tab key offers",
    "data": "text that models read",
    "errors.py": "meanings of exit codes, for the documentation",
    "evaluation/code_decoders.py": "text that models read",
    "evaluation/code_runner.py": "runs in the sandbox",
    "evaluation/plots.py": PAGE,
    "evaluation/report.py": PAGE,
    "fpga/report.py": PAGE,
    "fpga_service/api_answers.py": API,
    "fpga_service/api_errors.py": API,
    "fpga_service/api_requests.py": API,
    "fpga_service/exchange.py": API,
    "fpga_service/frames.py": API,
    "fpga_service/gateway.py": API,
    "fpga_service/generation.py": API,
    "fpga_service/host.py": API,
    "fpga_service/host_session_b.py": API,
    "fpga_service/host_sessions.py": API,
    "fpga_service/limits.py": API,
    "fpga_service/metrics.py": API,
    "fpga_service/protocol_a.py": API,
    "fpga_service/protocol_b.py": API,
    "loadtest/plot.py": PAGE,
    "loadtest/prompts.py": "text that models read",
    "messages": "the catalogue itself",
    "pages.py": PAGE,
    "pipeline/report.py": PAGE,
    "progress_lines.py": "put together from words: FIXED",
    "serving/front.py": API,
    "serving/openai_api.py": API,
    "serving/proxy.py": API,
    "serving/strict_json.py": API,
    "serving/transformers_engine.py": API,
}
NOT_SHOWN_CALLEES = re.compile(
    r"(.*\.)?(_?log|_?logger|logging)(\..*)?|re\..*|.*\.(startswith|endswith|split|rsplit|partition|replace|removeprefix"
    r"|removesuffix|execute|executescript|einsum|unpack|pack|write_text|filterwarnings|get|setattr|encode|strptime"
    r"|strftime|find|index|count|Counter|Gauge|Histogram)|struct\..*|np\..*|torch\..*|Counter|Gauge|Histogram"
    r"|AssertionError|HTTPException|json\.dumps|html\.escape|typer\.Typer|getenv|getattr|hasattr|Literal|TypeVar|cast"
    r"|Refusal|httpx\..*|key_of|self\._log"
)
NOT_SHOWN_KEYWORDS = {
    "metavar",
    "encoding",
    "errors",
    "param_decls",
    "option",
    "off",
    "key",
    "mode",
    "pattern",
    "alias",
}
FIXED = {
    "typer": [
        "Usage: ", "Options", "Arguments", "Commands", "Error: ", "Try '{1}' for help.", "Show this message and exit.",
        "[required]", "Missing command.",
        "No such command {1}.", "No such command {1}. Did you mean {2}?", "No such option: {1}",
        "Possible options: {1}", "Invalid value for {1}: {2}", "Invalid value: {1}", "Missing argument {1}.",
        "Missing option {1}.", "Missing parameter: {1}", "Got unexpected extra argument(s) ({1})", "Aborted!",
        "Option {1} requires an argument.", "Option {1} requires {2} arguments.", "Option {1} does not take a value.",
        "Input should be a valid integer, unable to parse string as an integer",
        "Input should be a valid number, unable to parse string as a number",
        "Install completion for the current shell.",
        "Show completion for the current shell, to copy it or customize the installation.",
    ],
    "progress": [
        "{1} of {2}", "{1} to {2}", "done in {1}", "about {1} left", "still running after {1}", "stopped", "waiting",
        "running", "done", "failed", "unchanged", "left", "stopping", "warning: ", "error: ", "hint: ",
    ],
    "the system": [
        "No such file or directory", "Permission denied", "Not a directory", "Is a directory", "File exists",
        "No space left on device", "Read-only file system", "Input/output error", "Too many open files",
        "Connection refused", "Address already in use", "Cannot allocate memory", "Operation not permitted",
        "Expecting value: line {1} column {2} (char {3})",
    ],
    "values": [
        "choose with --endpoint-model NAME", "the KV cache", "constant {1}",
        "Input should be a valid integer", "no {1}", "error: {1}", "see docs/config.md", "output size",
        "absent", "unfinished", "outdated", "broken", "yours", "leased", "orphan", "foreign", "system", "lost",
        "starting", "NVIDIA GPU from 7.5", "NVIDIA or AMD GPU", "GPTQ and AWQ", "GPTQ (archived)", "AWQ (archived)",
        "AVX2 or AVX512", "Hopper GPU (9.0)", "nothing", "exit",
        "started", "all", "yes", "no", "interrupted (SIGINT)", "terminated (SIGTERM)"],
}  # fmt: skip
"""Words of typer's own, and those that the code puts together: by hand, since no expression holds them whole."""

NOT_SHOWN = {
    # text for models
    "Why is the sky blue? Answer in one sentence.", "What is the capital of France?", "The capital of France is",
    "The capital of France is Paris.", "The capital of France is Paris. The capital of Italy is",
    "In 1969, two people walked on the Moon for the first time. They", "Count from one to ten.",
    # columns of data, and lines in the logs of others
    "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "KV cache size",
    "Resolved architecture", "Initializing a V1 LLM engine", "Starting to load model", "Loading weights took",
    "Application startup complete", "read weights: done", "transformers engine: answering", "host: answering",
    "not enough memory", "can't allocate memory", "gptqmodel torch",
    # answers of an API
    "missing or wrong API key: send it as 'Authorization: Bearer KEY'",
    # meanings of settings, which only the documentation shows
    "image directory that compile-vcu128 has written, to be run by the simulator",
    "et1 = bit for bit as docs/image-format.md defines; fast = nearly so, and much faster",
    "where fast numerics are computed; auto = CUDA where there is a device",
    "board to lease (default: a simulated one of its own)",
    # a setting of typer's
    "allow interspersed args",
    # for those who write edgetool
    "None is the absence of an answer",
}  # fmt: skip

CODE = re.compile(
    r".*(</|/>|\bimport \w+[,;.]|=\"\{\d|\.\*|\\[dp.]|^def |\n  \").*"  # markup, programs, patterns
    r"|\s*(SELECT|CREATE|INSERT|UPDATE|DELETE|PRAGMA|ALTER|WITH|WHERE|Bearer)\b.*"
    r"|(edgetool|pip) [a-z0-9{}-]+( [a-z]+)?( (\{\d+\}|[A-Z.]+|http\S+|--?[\w-]+( [\w{}:/.*-]+)?))*|pip install .*"
    r"|(chmod|kill|unset|import) \S+( \S+)?|\{1\} -m \w+"
    r"|layers\.\{.*|\[Round.*|\{\"prompt.*|abstract_algebra .*",
    re.DOTALL,
)
"""Markup, patterns, queries, and command lines that are nothing but that."""
