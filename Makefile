# attn.cu: `make run` for text, `make test` for every test, `make help` for the rest.

ATTENTION ?= gqa
CACHE ?= contiguous
KERNEL ?= flash
KV ?= f16
BLOCK ?= 16
ARCH ?= native
SANITIZE ?= 0
include kernels/cuda.mk kernels/ranks.mk  # DEVICE: cuda where there is a GPU and a compiler for it, else cpu; DIST: none

# ---- The program, in the order of reading. CHOSEN are compiled for each combination of the choices, the rest once.
CHOSEN := kernels/flash attention kvcache
# A unit is several files, compiled as one: most of the compiler's time there goes into the standard library's headers.
unit_cpu := $(addprefix kernels/,layers experts batch device)  # a .cu replaces them
unit_loops := $(addprefix kernels/,mlp logits gather team) host/sampler
unit_host := $(addprefix host/,error json safetensors config loader machine roofline link datasheets \
  engine scheduler blocks thread_count)
unit_text := $(addprefix host/,tokenizer added_tokens pretokenize unicode)
unit_chat := $(addprefix host/,chat jinja_parse jinja_eval jinja_filters jinja_methods jinja_value)
unit_talk := $(addprefix cli/,output signals lines session ranks talk chat requests estimate explain heatmap)
unit_time := $(addprefix cli/,report measure)
KERNELS := kernels/matmul unit/cpu unit/loops kernels/ranks_$(DIST)
HOST := unit/chat unit/text unit/host
CLI := cli/options unit/talk unit/time cli/probe cli/editor
LIGHT := unit/host unit/chat unit/talk cli/options cli/editor  # no loop that runs per element

# ---- Choices. A wrong value is refused with the list of right ones.
CHOICES := ATTENTION CACHE KERNEL KV DEVICE DIST BLOCK SANITIZE
values_ATTENTION := mha mqa gqa mla
values_CACHE := contiguous paged
values_KERNEL := naive flash
values_KV := f32 f16 bf16 q8 q4
values_DEVICE := cpu cuda
values_BLOCK := 1 2 4 8 16 32 64 128 256
values_SANITIZE := 0 1
$(foreach c,$(CHOICES),$(if $(and $(filter 1,$(words $($c))),$(filter $(values_$c),$($c))),,\
  $(error $c=$($c) is none of: $(values_$c))))

types := mha=Mha mqa=Mqa gqa=Gqa mla=Mla naive=Naive flash=Flash f32=KvF32 f16=KvF16 bf16=KvBF16 q8=KvQ8 q4=KvQ4
type = $(patsubst $1=%,%,$(filter $1=%,$(types)))
DEFINES := -DBUILD_ATTENTION=$(call type,$(ATTENTION)) -DBUILD_KERNEL=$(call type,$(KERNEL)) \
  -DBUILD_KV=$(call type,$(KV)) -DBUILD_BLOCK=$(if $(filter paged,$(CACHE)),$(BLOCK),0)
LEVEL := $(ARCH)$(if $(filter 1,$(SANITIZE)),-sanitize)
COMMON := build/$(LEVEL)
OUT := build/$(ATTENTION)-$(CACHE)$(if $(filter paged,$(CACHE)),$(BLOCK))-$(KERNEL)-$(KV)-$(or $(CUDA),cpu)$(filter-out -none,-$(DIST))-$(LEVEL)

# ---- One rule to compile. fp-contract: a multiply-add is written where it is meant, so that every path rounds alike.
# ggc: the compiler collects none of its own garbage, which is a tenth of its time.
# Not warned of: GCC 12's own headers (bugs 105593, 105651); psabi: no vector is an argument between files; units' linkage.
OPTIMIZE := -O3
$(LIGHT:%=$(COMMON)/%.o) $(OUT)/run.o: private OPTIMIZE := -Og
SANITIZE_1 := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
CXXFLAGS = -std=c++20 $(OPTIMIZE) -ffp-contract=off -fno-math-errno -pthread -Wall -Wextra -Wpedantic -Wconversion \
  -Wshadow -Werror -Wno-maybe-uninitialized -Wno-restrict -Wno-psabi -Wno-subobject-linkage -Wno-unknown-warning-option \
  $(SANITIZE_$(SANITIZE))
COMPILE = $(CXX) $(CXXFLAGS) -iquote . -march=$(ARCH) --param ggc-min-heapsize=2000000
LDLIBS := -ljansson -lpcre2-8 -lutf8proc -lnettle -ledit

compile = @mkdir -p $(@D) && echo "  $@" >&2 && $(COMPILE) $1 -MMD -MP -c -o $@ $<
$(COMMON)/%.o: %.cpp $(COMMON)/flags ; $(compile)
$(OUT)/%.o: %.cpp $(COMMON)/flags ; $(call compile,$(DEFINES))
$(COMMON)/%.o: $(COMMON)/%.cpp ; $(compile)
$(patsubst %,$(COMMON)/%.cpp,$(filter unit/%,$(KERNELS) $(HOST) $(CLI))): $(COMMON)/unit/%.cpp: $(COMMON)/flags Makefile
	@mkdir -p $(@D) && printf '#include "%s.cpp"\n' $(unit_$*) >$@

STAGES := $(patsubst %,$(OUT)/%.o,$(filter-out $(REPLACED),$(CHOSEN))) \
  $(patsubst %,$(COMMON)/%.o,$(filter-out $(REPLACED),$(KERNELS) $(HOST) $(CLI))) $(CU_OBJECTS)
$(OUT)/run $(OUT)/docs/hello: %: %.o $(STAGES)
	@$(COMPILE) -o $@ $^ $(CARRIED) $(LDLIBS) $(CUDA_LIBS) $(MPI_LIBS)

# Changes when the compiler's flags do, or the machine behind -march=native: all objects depend on it.
FLAGS = $(COMPILE) $(shell grep -m1 ^flags /proc/cpuinfo | cksum)
$(COMMON)/flags: FORCE | packages
	@mkdir -p $(@D) && { echo '$(FLAGS)' | cmp -s - $@ || echo '$(FLAGS)' >$@; }
-include $(wildcard $(addprefix build/,*/*.d */*/*.d */*/*/*.d */*/*/*/*.d))

.DEFAULT_GOAL := all
MAKEFLAGS += $(if $(filter 0,$(MAKELEVEL)),--no-print-directory -j$(shell nproc))

# ---- Targets

all: $(OUT)/run
	@ln -sfn $(OUT)/run run
	@echo "./run is $(OUT)/run"

# Each prints the path alone.
binary: $(OUT)/run ; @echo $<
hello: $(OUT)/docs/hello ; @echo $<

include models/models.mk

# A model file runs in the binary of its variant; any other source is exported into models/ first.
run help: export TEXT := $(value PROMPT)
run: $(SOURCE_READY) $(COMMON)/variant
	@weights=$$($(WEIGHTS)) && variant=$$($(COMMON)/variant "$$weights") && \
	  $(MAKE) ATTENTION="$$variant" all >&2 && ./run "$$weights" $${TEXT:+-i "$$TEXT"} $(ARGS)
$(COMMON)/variant: $(patsubst %,$(COMMON)/%.o,cli/variant $(HOST) $(KERNELS))
	@$(COMPILE) -o $@ $^ $(LDLIBS) $(MPI_LIBS)

include tests/tests.mk lab/lab.mk docs/docs.mk

clean: ; rm -rf build run

help:
	@echo 'make                  the binary of one combination: build/.../run, and ./run points at it'
	@echo 'make run              text from a model; installs what is missing, exports what is no model file'
	@echo "     MODEL=$$SOURCE"'    a .safetensors of export.py, a .gguf or a Hugging Face folder'
	@echo "     PROMPT=$$TEXT"'  ARGS="$(ARGS)"    flags of ./run: ./run --help'
	@echo 'make hello            docs/hello.cpp, a text in one screen'
	@$(foreach m,models/models tests/tests lab/lab docs/docs kernels/cuda kernels/ranks,sed -n 's/^## //p' $m.mk;)
	@echo 'make clean            removes build/ and ./run; .venv/ and models/ stay'
	@echo
	@echo 'variables, their values and what holds now:'
	@$(foreach c,$(CHOICES),printf '  %-10s %-40s %s\n' $c '$(values_$c)' $($c);)
	@printf '  %-10s %-40s %s\n' ARCH 'anything that g++ -march= takes' $(ARCH)

.PHONY: all binary hello run clean help FORCE
.SECONDARY .DELETE_ON_ERROR:
