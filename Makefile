# make train: a first training run; make test: all tests; make mutation: the tests of the tests, half an hour;
# make lint: style and types. All install into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: train test mutation lint

train: $(INSTALLED)
	$(BIN)/python examples/train_llm.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadscope $(ARGS)

mutation: $(INSTALLED)
	$(BIN)/python tests/mutation.py $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
