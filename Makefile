PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.stamp
ARGS ?=

.PHONY: go2 test lint clean

go2: $(STAMP)  ## train, evaluate and film the Go2; flags of your own: make go2 ARGS="--seed 2"
	@$(PY) -m common.video
	$(PY) ppo_go2_mujoco.py $(ARGS)

test: $(STAMP) lint
	$(PY) -m pytest -q

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): requirements.txt requirements-no-deps.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12"; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements.txt
	$(PY) -m pip install --quiet --no-deps -r requirements-no-deps.txt
	@touch $(STAMP)
