# Everything a newcomer needs: `make demo` and `make test` do all the set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench examples format clean

# torch comes first and pinned: a plain "torch" may bring gigabytes of GPU libraries
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/loratool demo

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks

examples: $(VENV)/.ready
	@for script in examples/*.py; do \
	  echo "== $$script"; start=$$(date +%s); \
	  OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python $$script || exit 1; \
	  echo "== $$script: $$(($$(date +%s) - start)) s"; \
	done

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
