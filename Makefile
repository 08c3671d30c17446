# make demo   the whole of it on the embedded model, without a hub: tables and figures in demo/report
# make test   every test, on both supported versions of transformers
# make lint   style, types and the direction of imports
# make figs   docs/results.md's tables and figs/ again, from results/; docs/formats.md and figs/formats/, from the code
# make bench  every benchmark, some ten minutes on two cores; its tables and figures: docs/bench.md, figs/bench_*.png
# Each sets up what it needs on a machine with Python 3.11; a second time is quick.

PYTHON := .venv/bin/python
# The older transformers that the patch supports, in an environment of its own.
OLD_TRANSFORMERS := 4.57.6
OLD := .venv-$(OLD_TRANSFORMERS)
PATCH_TESTS := tests/hf/test_patched_llama.py tests/hf/test_patch.py tests/model/test_apply.py \
	tests/model/test_architectures.py tests/model/test_structure.py tests/model/nn/test_attention.py \
	tests/model/nn/test_weights.py tests/model/nn/test_packed.py tests/model/nn/test_packed_cache.py \
	tests/hf/test_saved.py tests/hf/test_packed.py

# Two processes, each with half of the threads; tests of one module share its fixtures.
TWO := -n 2 --dist loadscope

.PHONY: demo test lint figs bench setup setup-dev clean

demo: setup
	.venv/bin/mxlab demo --out demo

test: setup-dev $(OLD)/.complete
	$(PYTHON) -m pytest $(TWO)
	$(OLD)/bin/python -m pytest $(TWO) $(PATCH_TESTS)

lint: setup-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	.venv/bin/lint-imports
	.venv/bin/clang-format --dry-run --Werror mxlab/numerics/kernels/csrc/* tests/support/*.h

figs: setup
	rm -rf results/smollm2-135m/report
	.venv/bin/mxlab report results/smollm2-135m --out results/smollm2-135m/report
	cp results/smollm2-135m/report/figs/*.png figs/
	$(PYTHON) tools/docs/tiers_table.py results/wikitext2/tiers results/wikitext2/tiers.csv
	for page in results inspect recipes ptq; do $(PYTHON) tools/docs/fill_tables.py docs/$$page.md || exit 1; done
	$(PYTHON) tools/docs/formats_page.py
	$(PYTHON) tools/docs/published_tools_page.py
	$(PYTHON) tools/docs/ptq_page.py
	$(PYTHON) tools/docs/packed_page.py

# DATA is a folder with lambada_openai.jsonl; without one, the embedded passages are read.
DATA ?= $(wildcard ../shared/data)

bench: setup
	.venv/bin/mxlab bench all --out bench/results $(if $(DATA),--data-dir $(DATA))
	.venv/bin/mxlab bench plot --results bench/results --out figs
	.venv/bin/mxlab bench tables --results bench/results --out docs/bench.md

setup:
	env -u VIRTUAL_ENV ./install.sh

setup-dev:
	env -u VIRTUAL_ENV ./install.sh --dev

$(OLD)/.complete: pyproject.toml CMakeLists.txt $(wildcard mxlab/numerics/kernels/csrc/*) | setup-dev
	test -d $(OLD) || $(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(OLD)/bin/python -m pip install --quiet --disable-pip-version-check transformers==$(OLD_TRANSFORMERS) accelerate hypothesis pytest pytest-xdist tomli-w
	MXLAB_REQUIRE_NATIVE=$${MXLAB_REQUIRE_NATIVE-1} $(OLD)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf .venv .venv-* demo build *.egg-info
