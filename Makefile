# Two commands a newcomer needs: `make demo` and `make test`. Both set up their own virtual
# environment in .venv from the package index.

PYTHON ?= python3
VENV ?= .venv
# A CPU build where the index has one; name another build to train on a GPU.
TORCH ?= torch==2.13.0
# The other trainers, for the tests of their adapters; TRL twice, the older one in a folder.
PEERS ?= .venv-peers
TRL_OLD := $(PEERS)/trl-1.12
# transformers as verl and OpenRLHF pin it; TRL takes the newest.
VERL_PINS := $(PEERS)/verl-pins
OPENRLHF_PINS := $(PEERS)/openrlhf-pins
# Test processes. Each keeps to one thread and takes up to 2 GB.
WORKERS ?= 2

# Group and options of `make bench`, such as "kernels --preset quick".
BENCH ?= all

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS_READY := $(PEERS)/.ready
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*)

.PHONY: demo test test-all test-simulated-gpu test-integrations check bench env clean setup

setup: $(READY)

$(READY): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "rlhf_fast needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 3; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --quiet --editable ".[dev]"
	@$(BIN)/python -c 'from rlhf_fast_kernels import native; print("compiled ops:", native.describe()["core"])'
	@touch $@

demo: $(READY)
	$(BIN)/rlhf-fast demo

test: $(READY)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal -m "not long"

test-all: $(READY)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

# What runs around the kernels on a GPU, on a CPU that says it is one (tests/simulated_cuda). Kernels and
# benches have sizes that the interpreter of Triton does not manage.
test-simulated-gpu: $(READY)
	SIMULATED_CUDA_DEVICES=2 $(BIN)/python -m pytest -p tests.simulated_cuda.plugin -m gpu \
		--ignore tests/kernels --ignore tests/bench

# What these versions of transformers need besides, and newer ones do not take.
HUB_1 := 'huggingface_hub<2' 'tokenizers<0.23' httpx httpcore

# verl, OpenRLHF and AReaL bring vllm and flash-attn, which their training on a CPU never uses: without
# their dependencies, and with those that they do use. DeepSpeed without its compiled ops. tensordict as
# verl asks for it: with later versions its older trainer fails on two ranks.
$(PEERS_READY): Makefile $(READY)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade pip
	$(PEERS)/bin/python -m pip install --quiet "$(TORCH)"
	$(PEERS)/bin/python -m pip install --quiet trl==1.16.0 peft rich omegaconf requests pandas \
		colorlog einops hjson msgpack ninja psutil py-cpuinfo pydantic ray \
		'tensordict>=0.8.0,!=0.9.0,<=0.10.0' codetiming \
		torchdata hydra-core orjson pillow cachetools uvicorn fastapi aiohttp pyzmq msgspec \
		prometheus_client pytest pytest-timeout hypothesis
	DS_BUILD_OPS=0 $(PEERS)/bin/python -m pip install --quiet --no-deps \
		verl==0.9.1 TransferQueue==0.1.11 openrlhf==0.11.2 areal==1.0.4 deepspeed==0.19.8
	$(PEERS)/bin/python -m pip install --quiet --no-deps --target $(TRL_OLD) trl==1.12.0
	$(PEERS)/bin/python -m pip install --quiet --no-deps --target $(VERL_PINS) transformers==5.9.0 $(HUB_1)
	$(PEERS)/bin/python -m pip install --quiet --no-deps --target $(OPENRLHF_PINS) transformers==5.15.0 $(HUB_1)
	@touch $@

# From the checkout, with the compiled ops that `make setup` put there. Each trainer in a process of its
# own: what stands in for a package that one of them imports must not be seen by another.
PEERS_TEST = PYTHONPATH=$(1).:kernels $(PEERS)/bin/python -m pytest tests/integrations/$(2)

# The same on CUDA tensors, of the device that tests/simulated_cuda pretends to have.
SIMULATED_TEST = PYTHONPATH=$(1).:kernels $(PEERS)/bin/python -m pytest \
	-p tests.simulated_cuda.default_device $(addprefix tests/integrations/,$(2))
# Trainers that choose the device by themselves.
SIMULATED_RUN = PYTHONPATH=$(1).:kernels $(PEERS)/bin/python -m pytest \
	-p tests.simulated_cuda.plugin $(addprefix tests/integrations/,$(2))

test-integrations: $(PEERS_READY)
	$(call PEERS_TEST,,test_areal.py)
	$(call PEERS_TEST,,test_benches.py)
	$(call PEERS_TEST,,test_deepspeed_rollout.py)
	$(call PEERS_TEST,$(OPENRLHF_PINS):,test_openrlhf*.py)
	$(call PEERS_TEST,$(VERL_PINS):,test_verl*.py)
	$(call PEERS_TEST,,test_trl*.py)
	$(call PEERS_TEST,$(TRL_OLD):,test_trl*.py)
	$(call SIMULATED_TEST,,test_areal.py test_deepspeed_chat.py test_deepspeed_rollout.py test_slime.py)
	$(call SIMULATED_TEST,$(OPENRLHF_PINS):,test_openrlhf.py)
	$(call SIMULATED_TEST,$(VERL_PINS):,test_verl.py test_verl_losses.py test_verl_rollout.py test_verl_replica.py)
	SIMULATED_CUDA_DEVICES=2 $(call SIMULATED_RUN,$(VERL_PINS):,test_verl_devices.py)
	$(call SIMULATED_TEST,,test_trl.py)
	$(call SIMULATED_TEST,$(TRL_OLD):,test_trl.py)
	$(call SIMULATED_RUN,,test_trl_runs.py test_trl_ppo.py)
	$(call SIMULATED_RUN,$(TRL_OLD):,test_trl_runs.py test_trl_ppo.py test_trl_ppo_runs.py)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/rlhf-fast bench $(BENCH)

env: $(READY)
	$(BIN)/rlhf-fast env

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info kernels/rlhf_fast_kernels/_core*.so \
		kernels/rlhf_fast_kernels/build_report.json
