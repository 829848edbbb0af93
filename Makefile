# make demo: install into .venv and see it work. make test: lint, types and tests.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test install clean

demo: install
	$(BIN)/t2i-align demo --out demo --overwrite

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

install: .venv/installed

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" setuptools
	touch $@

clean:
	rm -rf .venv demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache
