# make demo      train Faster R-CNN with RePr on the built-in dataset; results in output/demo
# make test      lint, then every test that is not marked slow
# make test-all  lint, then every test
# make bench     everything about speed (an hour, on a quiet machine); SIZE=quick takes minutes
# make lint      ruff alone
# make clean     delete the demo's output and all caches; the environment stays (rm -r .venv)
#
# Each creates the environment .venv once, where it is missing. With your own environment instead,
# nothing is created or installed: make test PYTHON=python3

PYTHON = .venv/bin/python
SIZE = full
ENVIRONMENT = .venv/.installed

# Import names, one for every package that setup.py and its extra `dev` ask for.
NEEDED = torch torchvision detectron2 cv2 fvcore iopath jinja2 matplotlib numpy PIL pycocotools \
         tensorboard yaml tqdm hypothesis pytest xdist ruff scipy setuptools wheel

ifeq ($(origin PYTHON),command line)
ENVIRONMENT = check
endif

# This checkout comes before any other repr_det that the environment may hold.
RUN = PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(PYTHON)

.PHONY: demo test test-all bench lint clean check

demo: $(ENVIRONMENT)
	$(RUN) tools/demo.py --output output/demo

test: lint
	$(RUN) -m pytest --numprocesses 2 --dist loadfile -m "not slow"

test-all: lint
	$(RUN) -m pytest --numprocesses 2 --dist loadfile

bench: $(ENVIRONMENT)
	$(RUN) benchmarks/bench.py $(SIZE)

lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check

clean:
	rm -rf output/demo build repr_det.egg-info .pytest_cache .ruff_cache .hypothesis
	find repr_det tests tools -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last, so an installation that was interrupted goes on at the next call.
.venv/.installed: setup.py tools/install_detectron2.py
	python3 -m venv .venv
	.venv/bin/python -m pip install torch==2.14.1 torchvision==0.29.1
	.venv/bin/python tools/install_detectron2.py
	.venv/bin/python -m pip install --editable '.[dev]'
	touch $@

check:
	@$(PYTHON) -c "import sys; from importlib.util import find_spec; \
	missing = [name for name in sys.argv[1:] if not find_spec(name)]; \
	missing and sys.exit('$(PYTHON) cannot import ' + ', '.join(missing) + ': install what is \
	missing with the commands under .venv/.installed in the Makefile, or leave PYTHON out.')" $(NEEDED)
