"""What edgetool runs inside the environments of other quantisers (backends/child.py). Nothing here may import edgetool.

Every script has `run(job, report)`. A quantiser's job holds: `model` and `output` (directories), `tokens` (a JSON file:
a list of lists of token ids, all of one length), `method` (gptq, awq or rtn), `bits`, `group_size`, `sym`, `desc_act`,
`damp` (None: the tool's own), `lm_head`, `device` (cpu or cuda:N), `threads` (None: the tool's own), `seed`, `layers`,
and as torch names `compute_dtype`, `stored_dtype` (of what is not quantised) and `scale_dtype`.
"""
