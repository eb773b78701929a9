# Needs make and Python 3.11 or newer; everything else goes into .venv.
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
TORCH ?= torch==2.13.0

BIN := .venv/bin
INSTALLED := .venv/installed
PUBLISHED := recipes/moe-llava/phi2-clip336-as-published.yaml
DEMO := build/demo
DEMO_LIMIT := 26MiB

# A command of .venv, shown and run.
define shown
	@echo '$$ $(1)'
	@$(BIN)/$(1)
	@echo
endef

.PHONY: demo test check bench clean

# The published settings run out of memory, so the first plan must exit with 1: success there would be a failure.
# Models this small are slower on many threads, and on a GPU the memory limit would be less than what CUDA's libraries take.
demo: export OMP_NUM_THREADS := 1
demo: export CUDA_VISIBLE_DEVICES :=
demo: $(INSTALLED)
	@echo '$$ oomph plan $(PUBLISHED) --stage finetune --no-ladder'
	@$(BIN)/oomph plan $(PUBLISHED) --stage finetune --no-ladder; code=$$?; test $$code -eq 1 || \
		{ echo "error: exit code $$code where 1 (does not fit) was expected" >&2; exit 1; }
	@echo
	$(call shown,oomph plan $(PUBLISHED) --stage finetune micro_batch=4 --no-ladder)
	$(call shown,python recipes/demo/make_data.py $(DEMO))
	@rm -rf $(DEMO)/run
	@echo 'The recipe pins all samples of a step in one micro-batch, and $(DEMO_LIMIT) is too'
	@echo 'little for it: steps run out of memory and are redone in smaller pieces.'
	@echo
	$(call shown,oomph train recipes/demo/digits.yaml --output $(DEMO)/run --memory-limit $(DEMO_LIMIT))
	$(call shown,oomph eval $(DEMO)/run/final $(DEMO)/test.json --images $(DEMO)/pictures)
	$(call shown,oomph chat $(DEMO)/run/final --image $(DEMO)/pictures/test-0003.png --prompt "Which digit is this?")
	$(call shown,oomph chat $(DEMO)/run/final --image $(DEMO)/pictures/test-0002.png --prompt "Which digit is this?")

test: check
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: whichever build of it the machine's pip prefers, the project then takes as it is.
$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { printf 'error: no Python 3.11 or newer was found\n\n%s\n' \
		'hint: name one, make PYTHON=/path/to/python3.11' >&2; exit 2; }
	@echo 'installing into .venv (the first time, torch is a large download) ...' >&2
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet "$(TORCH)"
	@$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@
