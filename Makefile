# make demo         train Faster R-CNN without and with RePr on the built-in dataset, and compare them
# make test         lint, then the everyday tests
# make test-slow    the other tests
# make test-all     lint, then every test
# make test-lowest  the everyday tests with the oldest Python and the oldest dependencies allowed
# make lint         ruff and mypy
# make docs         the documentation, in docs/_build/html; a warning is an error
# make test-gpu     the tests that make sense on a GPU (3 minutes), or on a CPU to rehearse;
#                   failures are listed last and in output/gpu-failures.txt; DEVICE=cpu or cuda
# make bench        everything about speed (an hour, on a quiet machine); SIZE=quick takes minutes
# make clean        delete the demo's output and all caches; environments stay (rm -r .venv)
#
# Each creates the environment .venv once, where it is missing. With your own environment instead,
# nothing is created or installed: make test PYTHON=python3

PYTHON = .venv/bin/python
LOWEST_PYTHON = python3.10
SIZE = full
DEVICE = auto
PROCESSES = 4
GPU_TESTS = tests/method tests/engine tests/classification/test_cycle.py \
	tests/detection/test_two_cycles.py
ENVIRONMENT = .venv/.installed

# What an existing environment must have for the targets to start.
NEEDED = torch detectron2 pytest xdist hypothesis ruff mypy

ifeq ($(origin PYTHON),command line)
ENVIRONMENT = check
endif

# This checkout comes before any other repr_det that the environment may hold.
RUN = PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(PYTHON)
PYTEST = -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test-gpu test test-slow test-all test-lowest bench lint docs clean check

demo: NEEDED = torch detectron2
demo: $(ENVIRONMENT)
	$(RUN) -m repr_det demo

test: lint
	$(RUN) $(PYTEST) -m "not slow"

test-slow: $(ENVIRONMENT)
	$(RUN) $(PYTEST) -m slow

test-all: lint
	$(RUN) $(PYTEST)

test-lowest: .venv-lowest/.installed
	PYTHONPATH="$(CURDIR)" .venv-lowest/bin/python $(PYTEST) -m "not slow"

test-gpu: NEEDED = torch detectron2 pytest xdist hypothesis
test-gpu: $(ENVIRONMENT)
	$(RUN) -m pytest $(GPU_TESTS) -m "gpu and not slow" --numprocesses $(PROCESSES) \
		--device $(DEVICE) --failures output/gpu-failures.txt

bench: $(ENVIRONMENT)
	$(RUN) benchmarks/bench.py $(SIZE)

lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

docs: $(ENVIRONMENT)
	$(RUN) -m sphinx --fail-on-warning --keep-going docs docs/_build/html

clean:
	rm -rf output/demo build docs/_build repr_det.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find repr_det experiments tests tools docs -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last, so an installation that was interrupted continues at the next call.
.venv/.installed: setup.py repr_det/cli/install_detectron2.py
	python3 -m venv .venv
	.venv/bin/python -m pip install torch==2.14.1 torchvision==0.29.1
	.venv/bin/python tools/install_detectron2.py
	.venv/bin/python -m pip install --editable '.[dev,docs]'
	touch $@

# pip takes the newest versions that are allowed, uv can take the oldest.
.venv-lowest/.installed: setup.py repr_det/cli/install_detectron2.py
	$(LOWEST_PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install uv
	.venv-lowest/bin/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct \
		--editable '.[dev]'
	.venv-lowest/bin/python tools/install_detectron2.py
	touch $@

check:
	@$(PYTHON) -c "import sys; from importlib.util import find_spec; \
	missing = [name for name in sys.argv[1:] if not find_spec(name)]; \
	missing and sys.exit('$(PYTHON) cannot import ' + ', '.join(missing) + '. Run the commands \
	under .venv/.installed in the Makefile with it, or leave PYTHON out.')" $(NEEDED)
