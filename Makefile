# `make app` starts chipviz, `make test` runs every test, `make check` looks at the code.
# Needs Python 3.11 or later, make and a package registry; everything lands in .venv.

PYTHON ?= python3
PORT ?= 8501
BIN := .venv/bin
APT := $(shell command -v apt-get 2>/dev/null)

.PHONY: app test check format chromium clean

app: .venv/app
	$(BIN)/streamlit run app.py --server.address 127.0.0.1 --server.port $(PORT)

test: .venv/test chromium
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

check: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/app: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test: .venv/app requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

# The browser tests skip without Chromium and say how to get it.
chromium:
ifneq ($(APT),)
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } || \
	  echo "chromium could not be installed; the browser tests will skip"
endif
	@command -v chromium >/dev/null || echo "no chromium: browser tests skip (apt-get install chromium)"

clean:
	rm -rf .venv
