# Two commands for everybody; both make the environment in .venv/ first, once. Without make: python3 bootstrap.py wafer|test
PYTHON ?= python3
.PHONY: wafer test docs env readme

wafer:  ## fine-tune, squeeze, verify and pack a wafer-inspection model on real images; prints where the notebook and the bundle are
	@$(PYTHON) bootstrap.py wafer $(ARGS)

test:   ## all tests, the recipe's smoke run among them
	@$(PYTHON) bootstrap.py test $(ARGS)

docs:   ## the book, in _docs/, from executed notebooks; quick, with numbers that mean nothing: make docs ARGS=--smoke
	@$(PYTHON) bootstrap.py docs $(ARGS)

env:    ## only the environment, for developers
	@$(PYTHON) bootstrap.py env

readme: env  ## README.md from nbs/index.ipynb
	@.venv/bin/python docs/make_readme.py
