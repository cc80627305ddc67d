PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.stamp
MJLAB_PY := .venv-mjlab/bin/python
MJLAB_STAMP := .venv-mjlab/.stamp
ARGS ?=
# Where nothing renders, root installs what does, unless MUJOCO_GL names the user's own; without it there is no video.
INSTALL_GL := test -z "$$MUJOCO_GL" && test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	{ export DEBIAN_FRONTEND=noninteractive; apt-get update -qq; \
	apt-get install -y --no-install-recommends libegl1 libgl1 libgl1-mesa-dri >/dev/null; }

.PHONY: go2 peginsert aloha real2sim gr00t gl test test-mjlab lint clean

go2: $(STAMP) gl  ## train, evaluate and film the Go2; flags of your own: make go2 ARGS="--seed 2"
	$(PY) ppo_go2_mujoco.py $(ARGS)

peginsert: $(STAMP) gl  ## train, evaluate and film the Panda that inserts a peg
	$(PY) ppo_multimodal_peginsert.py $(ARGS)

aloha: $(STAMP) gl  ## clone a scripted expert, train, evaluate and film the two ALOHA arms
	$(PY) ppo_aloha_cnn.py --bc-init $(ARGS)

real2sim: $(STAMP) gl  ## train, evaluate and film the Panda that picks up scanned objects, by SAC
	$(PY) sac_real2sim_mjx.py $(ARGS)

gr00t: $(STAMP) gl  ## clone a scripted expert, then PPO on the flow of a tiny GR00T; evaluate and film it
	$(PY) ppo_gr00t.py $(ARGS)

gl: $(STAMP)
	@$(PY) -m common.video || { $(INSTALL_GL) && $(PY) -m common.video; } || true

test: $(STAMP) lint
	$(PY) -m pytest -q

test-mjlab: $(MJLAB_STAMP)  ## train and step tasks of mjlab, which has an environment of its own
	$(MJLAB_PY) -m pytest -q -m mjlab tests/test_integration_mjlab.py

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf .venv .venv-mjlab .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): requirements.txt requirements-no-deps.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12"; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements.txt
	$(PY) -m pip install --quiet --no-deps -r requirements-no-deps.txt
	@touch $(STAMP)

$(MJLAB_STAMP): requirements-mjlab.txt
	test -x $(MJLAB_PY) || $(PYTHON) -m venv .venv-mjlab
	$(MJLAB_PY) -m pip install --quiet -r requirements-mjlab.txt
	@touch $(MJLAB_STAMP)
