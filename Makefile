# `make` alone lists the targets. Each makes .venv and installs what it needs.
# The first that runs: a version manager may have names for Pythons that are not there.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
OUT := out/quickstart
JOBS := 2

.PHONY: help quickstart test proof lint bench aot clean

help:
	@echo "make quickstart   draw cartoons, train a tiny model on 8 simulated devices, sample it; films in $(OUT)"
	@echo "make test         all tests, on 8 simulated CPU devices; JOBS=8 on as many cores"
	@echo "make proof        every scheme x kernel x mask x split x length of attention, and more: over an hour on two cores"
	@echo "make lint         ruff, and ShellCheck on the shell scripts"
	@echo "make bench        speed against diffusers, bare decoding and no checkpoints"
	@echo "make aot          what a 14B training step takes of 8 H200 or of TPUs, compiled without any of them; slow"
	@echo "make clean        remove what quickstart made"

.venv/base: pyproject.toml
	@echo "+ $(PYTHON) -m venv .venv, with anisora_jax and what draws and cuts films"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[data]'
	@touch $@

.venv/test: .venv/base
	@echo "+ pip install: what the tests need (torch and diffusers are the witnesses)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

quickstart: .venv/base
	$(BIN)/python launch/quickstart.py --out $(OUT)

test: .venv/test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

proof: .venv/test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m product $(addprefix tests/test_,product.py schemes.py mesh.py aot.py experiment.py bench.py)

lint: .venv/test
	$(BIN)/ruff check .
	bash -n launch/*.sh .ci/run
	$(BIN)/shellcheck launch/*.sh .ci/run

bench: .venv/test
	$(BIN)/python bench/step.py
	$(BIN)/python bench/attention.py
	$(BIN)/python bench/attention.py --ring
	$(BIN)/python data/toons.py --out out/bench/films --films 8
	$(BIN)/python data/pack.py --films out/bench/films --out out/bench/records
	$(BIN)/python bench/loader.py --records out/bench/records
	$(BIN)/python bench/checkpoint.py
	$(BIN)/python bench/vae.py
	$(BIN)/python bench/convert.py
	$(BIN)/python bench/curate.py

.venv/aot/ready: .venv/base
	@echo "+ pip install, beside the environment: XLA's compilers for TPUs and for CUDA, 1.2 GB unpacked"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target .venv/aot \
	  $$($(BIN)/python -m bench.aot --wheels)
	@touch $@

aot: .venv/aot/ready
	$(BIN)/python -m bench.aot

clean:
	rm -rf $(OUT)
