# All targets work in .venv of this checkout, which they create.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := build/demo
DEMO_COHORT := --subjects 2000 --sites 8 --resolution 4 --environment uniform-iid --residual-scale 0.25
SEED ?= 0
export PYTHONNOUSERSITE := 1

# $(call demo_runs,FOLDER,SEED)
define demo_runs
$(BIN)/sparsekit cohort make $(1)/cohort $(DEMO_COHORT) --seed $(2)
$(BIN)/sparsekit fed run --cohort $(1)/cohort --out $(1)/fedavg --config examples/demo.toml --strategy fedavg --seed $(2) > $(1)/fedavg.txt
$(BIN)/sparsekit fed run --cohort $(1)/cohort --out $(1)/fedsparsify --config examples/demo.toml --strategy fedsparsify-global --sparsity 0.95 --seed $(2) > $(1)/fedsparsify.txt
endef

NEWEST_TRITON := 3.9.0
BENCH := build/bench-cpu
BENCH_FILES ?= ceilings topk block process conv step

BANDWIDTH := build/bandwidth
PRIVACY := build/privacy
PRIVACY_COHORT := --subjects 320 --sites 4 --resolution 4 --environment uniform-iid
COHORT_STUDY := build/cohort-study

.PHONY: help install demo demo-seeds paper paper-small privacy-study values trace fit-selector bench-cpu bench-codec soak fuzz bandwidth cohort-study cohort-validation cohort-gallery check-kernels check-kernels-full test test-engines check format clean

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## make .venv and install sparsekit with its tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "sparsekit needs Python >= 3.11; $(PYTHON) is older or missing. Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## cohort of NIfTI files, dense FedAvg and FedSparsify at 95 %, one table, one report
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	$(call demo_runs,$(DEMO),$(SEED))
	$(BIN)/sparsekit fed compare $(DEMO)/fedavg $(DEMO)/fedsparsify --out $(DEMO)/report.html

demo-seeds: $(STAMP) ## the demo on three seeds (about 15 minutes); writes docs/results/demo.*
	rm -rf build/demo-seeds
	mkdir -p build/demo-seeds/0 build/demo-seeds/1 build/demo-seeds/2
	$(call demo_runs,build/demo-seeds/0,0)
	$(call demo_runs,build/demo-seeds/1,1)
	$(call demo_runs,build/demo-seeds/2,2)
	$(BIN)/python tools/demo_table.py collect build/demo-seeds/0 build/demo-seeds/1 build/demo-seeds/2
	$(BIN)/python tools/demo_table.py write

COHORT_STUDY := build/cohort-study

# Both go on where they were interrupted; `make clean` removes what they have.
paper: $(STAMP) ## sparsity x strategy x environment on three seeds (hours); writes docs/results/paper.*
	$(BIN)/python tools/paper_study.py build/paper
	$(BIN)/python tools/paper_table.py collect build/paper
	$(BIN)/python tools/paper_table.py write

paper-small: $(STAMP) ## dense and 95 % on three seeds (about 20 minutes); writes docs/results/paper.*
	$(BIN)/python tools/paper_study.py build/paper-small --small
	$(BIN)/python tools/paper_table.py collect build/paper-small
	$(BIN)/python tools/paper_table.py write

values: $(STAMP) ## a run for each --values on the demo's cohort (about 6 minutes); writes docs/results/values.*
	rm -rf build/values
	mkdir -p build/values
	$(BIN)/sparsekit cohort make build/values/cohort $(DEMO_COHORT)
	for values in lossless bf16 fp16 int8 int4; do \
	  $(BIN)/sparsekit fed run --cohort build/values/cohort --out build/values/$$values --config examples/demo.toml --strategy fedsparsify-global --sparsity 0.95 --values $$values > build/values/$$values.txt || exit 1; \
	done
	$(BIN)/python tools/values_table.py collect build/values
	$(BIN)/python tools/values_table.py write

# $(call privacy_runs,FOLDER,SEED)
define privacy_runs
$(BIN)/sparsekit cohort make $(1)/cohort $(PRIVACY_COHORT) --seed $(2) --workers 2
for sparsity in 0 0.9 0.95; do \
  $(BIN)/sparsekit fed run --cohort $(1)/cohort --out $(1)/sparsity-$$sparsity --config examples/privacy.toml --strategy fedsparsify-global --sparsity $$sparsity --seed $(2) > $(1)/sparsity-$$sparsity.txt || exit 1; \
  $(BIN)/sparsekit privacy audit $(1)/sparsity-$$sparsity --shuffles 9 > $(1)/sparsity-$$sparsity-audit.txt || exit 1; \
done
endef

privacy-study: $(STAMP) ## membership attacks by sparsity on two seeds; writes docs/results/privacy.*
	rm -rf $(PRIVACY)
	mkdir -p $(PRIVACY)/0 $(PRIVACY)/1
	$(call privacy_runs,$(PRIVACY)/0,0)
	$(call privacy_runs,$(PRIVACY)/1,1)
	$(BIN)/python tools/privacy_table.py collect $(PRIVACY)
	$(BIN)/python tools/privacy_table.py write

trace: $(STAMP) ## weights of a FedSparsify run after each of 40 rounds, for codec work: build/trace
	rm -rf build/trace
	mkdir -p build/trace
	$(BIN)/sparsekit cohort make build/trace/cohort $(DEMO_COHORT)
	$(BIN)/sparsekit fed run --cohort build/trace/cohort --out build/trace/run --config examples/demo.toml --rounds 40 --epochs 1 --keep-checkpoints 0
	@echo "Payloads: build/trace/run/checkpoints/round-*/model.spu"

fuzz: $(STAMP) ## five million damaged payloads for the decoder (about 6 minutes); writes docs/results/fuzz.json
	$(BIN)/python tools/fuzz_codec.py --executions 5000000 --write

# A part that fails does not keep the others from being played.
soak: $(STAMP) ## the federation under load, its server killed 50 times (about 15 minutes); writes docs/results/soak.*
	rm -rf build/soak
	mkdir -p build/soak
	-$(BIN)/python tools/soak_engine.py build/soak/engine
	-$(BIN)/python tools/soak_load.py sites build/soak/sites
	-$(BIN)/python tools/soak_load.py rounds build/soak/rounds
	-$(BIN)/python tools/soak_load.py state build/soak/state
	-$(BIN)/python tools/soak_kills.py build/soak/kills --kills 50 --seed 1 --rounds 400
	$(BIN)/python tools/soak_table.py collect build/soak
	$(BIN)/python tools/soak_table.py write

fit-selector: $(STAMP) ## measure convolutions here and fit the model behind backend="auto"; docs/results/selector.json
	$(BIN)/python tools/fit_selector.py

# A file that fails loses nobody else's figures, and can be run again: make bench-cpu BENCH_FILES=step
bench-cpu: $(STAMP) $(BENCH)/trained/result.json ## every CPU figure (about 13 minutes, on an idle machine); writes docs/results/cpu.*
	@failed=; files=; for name in $(BENCH_FILES); do \
	  rm -f $(BENCH)/$$name.json; \
	  BENCH_TRAINED=$(BENCH)/trained $(BIN)/python -m pytest bench/bench_cpu_$$name.py -q \
	    --benchmark-json=$(BENCH)/$$name.json --benchmark-columns=median,iqr,rounds || failed="$$failed $$name"; \
	  if [ -s $(BENCH)/$$name.json ]; then files="$$files $(BENCH)/$$name.json"; fi; \
	done; \
	$(BIN)/python tools/cpu_table.py collect $$files && $(BIN)/python tools/cpu_table.py write || exit 1; \
	if [ -n "$$failed" ]; then echo "These did not pass; their tables lack rows:$$failed"; exit 1; fi

# ZipNN comes as source only: where it cannot be built, its column is missing.
bench-codec: $(STAMP) $(BENCH)/trained/result.json ## the codec beside others (about 6 minutes, on an idle machine); writes docs/results/codec.*
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt zipnn==0.5.4
	BENCH_TRAINED=$(BENCH)/trained $(BIN)/python -m pytest bench/bench_codec.py -q \
	  --benchmark-json=build/bench-codec.json --benchmark-columns=median,iqr,rounds
	$(BIN)/python tools/codec_table.py collect build/bench-codec.json
	$(BIN)/python tools/codec_table.py write

$(BENCH)/trained/result.json: bench/trained.toml | $(STAMP)
	rm -rf $(BENCH)/cohort $(BENCH)/trained
	mkdir -p $(BENCH)
	$(BIN)/sparsekit cohort make $(BENCH)/cohort --subjects 32 --sites 4 --resolution 2
	$(BIN)/sparsekit fed run --cohort $(BENCH)/cohort --out $(BENCH)/trained --config bench/trained.toml

# ttsem declares Python >= 3.12 and another Triton, and runs with these as well.
TTSEM := $(VENV)/.ttsem
$(TTSEM): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python ttsem==0.1.0
	@touch $@

check-kernels: $(TTSEM) ## Triton kernels without a GPU: values, bounds, races, mutants, machine code
	$(BIN)/python tools/check_kernels.py

# The newest Triton shadows the tested one for one command only.
check-kernels-full: $(TTSEM) ## the same for all tile sizes, and the newest Triton (about 20 minutes); writes docs/results/kernels.*
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/triton-newest 'triton==$(NEWEST_TRITON)'
	mkdir -p build/kernels
	PYTHONPATH=build/triton-newest $(BIN)/python tools/check_kernels.py --code build/kernels/newest.json
	$(BIN)/python tools/check_kernels.py --whole
	$(BIN)/python tools/kernels_table.py write

bandwidth: $(STAMP) ## rounds over 20 Mbit/s, dense against sparse (3 minutes, as root); writes docs/results/bandwidth.*
	rm -rf $(BANDWIDTH)
	mkdir -p $(BANDWIDTH)
	$(BIN)/sparsekit cohort make $(BANDWIDTH)/cohort --subjects 16 --sites 2 --resolution 4
	$(BIN)/python tools/measure_bandwidth.py $(BANDWIDTH)/measured.json --cohort $(BANDWIDTH)/cohort
	$(BIN)/python tools/bandwidth_table.py collect $(BANDWIDTH)/measured.json
	$(BIN)/python tools/bandwidth_table.py write

# Parts that were measured are kept: remove build/cohort-validation after a change of the generator.
cohort-validation: $(STAMP) ## synthetic heads against volumes of real people (about 8 minutes); writes docs/results/cohort-validation.*
	$(BIN)/python tools/measure_volumes.py
	$(BIN)/python tools/measure_validation.py build/cohort-validation
	$(BIN)/python tools/validation_table.py collect build/cohort-validation
	$(BIN)/python tools/validation_table.py write

cohort-gallery: $(STAMP) ## slices of synthetic heads for docs/cohort-gallery.md; writes docs/images/cohort-*.png
	$(BIN)/python tools/cohort_gallery.py

test: $(STAMP) ## the whole test suite
	$(BIN)/python -m pytest

test-engines: $(STAMP) ## the slow tests of the flare and flower engines (about 6 minutes; some need root)
	$(BIN)/python -m pytest -m engines tests/engines

check: $(STAMP) ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright

format: $(STAMP) ## format the code and sort its imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info
