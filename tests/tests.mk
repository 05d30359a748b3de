# tests.mk: every stage in every combination, formatting, and damaged files for the exporter and the loader.
#
## make test             every test (SANITIZE=1: under AddressSanitizer and UndefinedBehaviorSanitizer)
## make gtest            those of them that are C++, at ARCH alone; one: make build/test/native/NAME_test
## make lint             formatting and style
## make fuzz             export.py and the loader on mutated files, each for FUZZ_SECONDS=60
## make lines            how long each stage is, from the model file to the model and from ids to logits

FUZZ_SECONDS ?= 60
PACKAGES += $(if $(filter test gtest %_test kit-programs,$(MAKECMDGOALS)),libgtest-dev)
PACKAGES += $(if $(filter fuzz,$(MAKECMDGOALS)),clang libclang-rt-dev)

TEST := build/test/$(LEVEL)
TESTS := $(filter-out emulation_test launches_test mma_test,$(patsubst tests/%.cpp,%,$(wildcard tests/*_test.cpp)))
# The last two take minutes under the sanitizers; attention_small_test and transformer_test call the same kernels.
ON_A_DEVICE := batch_test mma_test attention_small_test kvcache_test layers_test matmul_test experts_test \
  logits_test transformer_test $(if $(filter 0,$(SANITIZE)),attention_test cross_product_test)
EMULATED_TESTS := $(ON_A_DEVICE) launches_test
# What tests every device's KV types, once more for q4, which the CPU alone keeps.
Q4_TESTS := kvcache_test attention_test attention_small_test transformer_test cross_product_test
# DEVICE=cuda: the same tests on the GPU itself.
CUDA_TESTS := $(if $(filter cuda,$(DEVICE)),$(ON_A_DEVICE))
RACE_TESTS := $(if $(filter 0,$(SANITIZE)),emulation_test attention_small_test kvcache_test layers_test experts_test \
  logits_test)
TOOLS := tokenize render dequantize

test: .venv/tests
	@$(MAKE) gtest
	@for level in $(LEVELS); do $(MAKE) gtest ARCH=$$level $(OF_KERNELS) || exit 1; done
	@$(PYTHON) -m pytest tests

# One after the other: each uses all cores.
GTESTS = $(TESTS:%=$(TEST)/%) $(Q4_TESTS:%=$(TEST)/q4/%) $(EMULATED_TESTS:%=$(TEST)/emulated/%) $(RACE_TESTS:%=$(TEST)/race/%) \
  $(CUDA_TESTS:%=$(TEST)/$(CUDA)/%)
gtest: $(GTESTS) $(TOOLS:%=$(TEST)/%)
	@for t in $(GTESTS:build/test/%=%); do echo "$$t"; build/test/$$t --gtest_brief=1 || failed="$$failed $$t"; done; \
	  [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

# The kernels again, at each lower level of vector instructions that this machine has.
cpu_has = $(shell grep -qw $1 /proc/cpuinfo && echo $2)
LEVELS := $(if $(filter 0,$(SANITIZE)),x86-64 \
  $(call cpu_has,avx2,x86-64-v3) $(call cpu_has,avx512vl,x86-64-v4) $(call cpu_has,avx512_vnni,cascadelake))
OF_KERNELS := TESTS="simd_test matmul_test layers_test kvcache_test kv_q4_test attention_test" TOOLS= \
  Q4_TESTS="kvcache_test attention_test" \
  EMULATED_TESTS= RACE_TESTS= CUDA_TESTS= HOST="host/error host/machine" CLI=

TEST_STAGES := $(CHOSEN:%=$(TEST)/%.o) $(patsubst %,$(COMMON)/%.o,$(KERNELS) $(HOST) $(CLI))
$(TEST)/%.o: %.cpp $(COMMON)/flags ; $(call compile,-DBUILD_EVERY_COMBINATION)
$(TEST)/%_test: $(TEST)/tests/%_test.o $(TEST_STAGES)
	@$(COMPILE) -o $@ $^ -lgtest -lgtest_main $(LDLIBS)
$(TEST)/q4/%.o: tests/%.cpp $(COMMON)/flags ; $(call compile,-DBUILD_EVERY_COMBINATION -DBUILD_Q4)
$(TEST)/q4/%_test: $(TEST)/q4/%_test.o $(TEST_STAGES)
	@$(COMPILE) -o $@ $^ -lgtest -lgtest_main $(LDLIBS)
$(TOOLS:%=$(TEST)/%): $(TEST)/%: $(TEST)/tests/%.o $(TEST_STAGES)
	@$(COMPILE) -o $@ $^ $(LDLIBS)

# ---- The .cu files without a GPU: the host's compiler and tests/emulation/, under the same tests. race: compiled with
# -fsanitize=thread, but linked with our own answer to its calls (tests/emulation/race.cpp).
EMULATION := $(patsubst %,$(TEST)/tests/emulation/%.o,machine emulation)
SHARED := $(patsubst %,$(COMMON)/%.o,$(filter-out $(CU) unit/cpu,$(KERNELS)) $(HOST))
emulate = $(call compile,-x c++ -Wno-unknown-pragmas -DBUILD_EVERY_COMBINATION $1)
RACE_FLAGS := -O1 -g1 -fsanitize=thread
$(TEST)/emulated/%.o: %.cu $(COMMON)/flags ; $(call emulate)
$(TEST)/race/%.o: %.cu $(COMMON)/flags ; $(call emulate,$(RACE_FLAGS))
$(TEST)/tests/emulation_test.o: private CXXFLAGS += $(RACE_FLAGS)
$(TEST)/emulated/%_test: $(TEST)/tests/%_test.o $(CU:%=$(TEST)/emulated/%.o) $(EMULATION) $(SHARED)
	@$(COMPILE) -o $@ $^ -lgtest -lgtest_main $(LDLIBS)
$(TEST)/race/%_test: $(TEST)/tests/%_test.o $(CU:%=$(TEST)/race/%.o) $(EMULATION) $(TEST)/tests/emulation/race.o $(SHARED)
	@$(COMPILE) -o $@ $^ -lgtest -lgtest_main $(LDLIBS)

$(addprefix $(TEST)/,$(addsuffix /mma_test,emulated $(CUDA))): %/mma_test: %/tests/mma_rows.o
$(TEST)/$(CUDA)/%.o: %.cu | packages $(NVCC_READY) ; $(call nvcc,$(CUDA_ARCH),-DBUILD_EVERY_COMBINATION)
$(TEST)/$(CUDA)/%_test: $(TEST)/tests/%_test.o $(CU:%=$(TEST)/$(CUDA)/%.o) $(SHARED)
	@$(COMPILE) -o $@ $^ -lgtest -lgtest_main $(CARRIED) $(LDLIBS) $(CUDA_LIBS)

lint: .venv/tests
	@.venv/bin/clang-format --dry-run -Werror $(wildcard *.h *.c[pu]* */*.h */*.c[pu]* tests/emulation/*)
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check

FUZZED := tests/fuzz_loader $(addprefix host/,loader config safetensors json error machine) \
  $(addprefix kernels/,matmul layers team device)
build/fuzz/loader: $(FUZZED:%=%.cpp) $(wildcard *.h */*.h) | packages
	@mkdir -p $(@D)
	@clang++ $(CXXFLAGS) -O1 -march=$(ARCH) -iquote . -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
	  -o $@ $(filter %.cpp,$^) -ljansson
fuzz: build/fuzz/loader .venv/tests
	@$(PYTHON) tests/fuzz_export.py $(FUZZ_SECONDS)
	@mkdir -p build/fuzz/corpus
	@$< -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=build/fuzz/ build/fuzz/corpus

# On the CPU; a stage's header and source are one line. host/ is what makes a model of its file.
lines:
	@wc -l $(wildcard host/safetensors.* host/config.* host/loader.* model.h transformer.* variants.h attention.h attention.cpp \
	  kvcache.h kvcache.cpp kernels/*.cpp) \
	  $(filter-out %gpu.h %mma.h %tiles.h,$(wildcard kernels/*.h)) | awk '$$2 != "total" { \
	  part = $$2 ~ "^host" ? "from the file to the model" : "from ids to logits"; sum[part] += $$1; sub(".*/", "", $$2); \
	  sub("[.].*", "", $$2); if (!($$2 in n)) stage[++k] = $$2; n[$$2] += $$1 } \
	  END { while (i++ < k) printf "%6d %s\n", n[stage[i]], stage[i]; for (part in sum) printf "%6d %s\n", sum[part], part }'

.PHONY: test gtest lint fuzz lines
