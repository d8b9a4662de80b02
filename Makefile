# Each target sets up .venv by itself; the second time that takes no time.
#   make demo        train a small text-to-image model on handwritten digits, from nothing to judged samples
#   make test        the test suite, without the tests marked slow (make test-slow runs those)
#   make bench       what steps, cache, encoding, sampling and start-up cost here: tables, and JSON in runs/bench
#   make lint        ruff and mypy; make format lets ruff repair what it can
#   make clean       remove caches; runs/ and .venv stay
# Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
DEMO := runs/demo
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow bench lint format clean

help:
	@sed -n '2,7s/^# *//p' Makefile

# An environment that was cut short while it was made has no pip, and is made anew; so is one of an older Python.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1);" \
	    "name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(VENV)/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null \
	  || $(PYTHON) -m venv --clear $(VENV) || { \
	  echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.installed: requirements.txt $(VENV)/.created
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-crystal.txt requirements-expression.txt $(VENV)/.installed
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# The commands below are the suite's own; each can be typed by hand.
demo: export HF_HUB_OFFLINE := 1
demo: $(VENV)/.installed
	rm -rf $(DEMO)
	@mkdir -p $(DEMO) && date +%s > $(DEMO)/.started
	$(VENV)/bin/python demo/prepare_digits.py --output_dir $(DEMO)/data
	$(VENV)/bin/python train_image_vae.py --config configs/demo/vae.yaml
	$(VENV)/bin/python precompute_latents.py --config configs/demo/latents.yaml
	$(VENV)/bin/python train_text_to_image_ldm.py --config configs/demo/ldm.yaml
	$(VENV)/bin/python sample.py --model $(DEMO)/ldm --prompts_file $(DEMO)/data/prompts.txt \
	  --num_images_per_prompt 20 --guidance_scale 7.5 --num_inference_steps 20 --batch_size 100 \
	  --output_dir $(DEMO)/samples
	$(VENV)/bin/python demo/judge_digits.py --data_dir $(DEMO)/data --samples_dir $(DEMO)/samples --output_dir $(DEMO)
	@echo "the demo took $$(( $$(date +%s) - $$(cat $(DEMO)/.started) )) seconds: look at $(DEMO)/grid.png"
	@rm $(DEMO)/.started

# Two processes, a file of tests each at a time, with one thread each: what they compare, they compare bit for bit.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile

test-slow: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -m slow

# Shorter than the benchmarks' own settings, which are for figures: docs/performance.md.
bench: export HF_HUB_OFFLINE := 1
bench: $(VENV)/.installed
	$(VENV)/bin/python benchmarks/startup.py --rounds 1 --output runs/bench/startup.json
	$(VENV)/bin/python benchmarks/cache_read.py --output runs/bench/cache_read.json
	$(VENV)/bin/python benchmarks/step.py --block 5 --rounds 3 --output runs/bench/step.json
	$(VENV)/bin/python benchmarks/against_diffusers.py --rounds 3 --output runs/bench/against_diffusers.json
	$(VENV)/bin/python benchmarks/precompute.py --resolutions 64 --rounds 2 --output runs/bench/precompute.json
	$(VENV)/bin/python benchmarks/sampling.py --no_speed_ups --rounds 2 --output runs/bench/sampling.json

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf .pytest_cache .ruff_cache .mypy_cache build
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
