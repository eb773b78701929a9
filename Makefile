# Needs make and Python 3.11 or newer; everything else goes into .venv.
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
TORCH ?= torch==2.13.0

BIN := .venv/bin
INSTALLED := .venv/installed
PUBLISHED := recipes/moe-llava/phi2-clip336-as-published.yaml

.PHONY: demo test check bench clean

# The published settings run out of memory, so the first plan must exit with 1: success there would be a failure.
demo: $(INSTALLED)
	@echo '$$ oomph plan $(PUBLISHED) --stage finetune'
	@$(BIN)/oomph plan $(PUBLISHED) --stage finetune; code=$$?; test $$code -eq 1 || \
		{ echo "error: exit code $$code where 1 (does not fit) was expected" >&2; exit 1; }
	@echo
	@echo '$$ oomph plan $(PUBLISHED) --stage finetune micro_batch=4 --no-ladder'
	@$(BIN)/oomph plan $(PUBLISHED) --stage finetune micro_batch=4 --no-ladder

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
