# attn.cu: `make run` for text, `make test` for every test, `make help` for the rest.

ATTENTION ?= gqa
CACHE ?= contiguous
KERNEL ?= flash
KV ?= f16
DEVICE ?= cpu
BLOCK ?= 16
ARCH ?= native

CXX ?= g++
WARNINGS := -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror
CXXFLAGS := -std=c++20 -O3 -g1 -ffp-contract=off -fno-math-errno -fopenmp $(WARNINGS)
LDLIBS := -lpcre2-8

STAGES := device model matmul layers kvcache attention transformer tokenizer sampler

type_gqa := Gqa
type_mha := Mha
type_mqa := Mqa
type_mla := Mla
type_naive := Naive
type_flash := Flash
type_f32 := KvF32
type_f16 := KvF16
type_bf16 := KvBF16
type_q8 := KvQ8
block_contiguous := 0
block_paged := $(BLOCK)
CHOICES := -DBUILD_ATTENTION=$(type_$(ATTENTION)) -DBUILD_KERNEL=$(type_$(KERNEL)) -DBUILD_KV=$(type_$(KV)) -DBUILD_BLOCK=$(block_$(CACHE))

OUT := build/$(ATTENTION)-$(CACHE)-$(KERNEL)-$(KV)-$(DEVICE)

all: $(OUT)/run
	@ln -sf $(OUT)/run run

$(OUT)/run: $(STAGES:%=$(OUT)/%.o) $(OUT)/run.o
	$(CXX) $(CXXFLAGS) -march=$(ARCH) -o $@ $^ $(LDLIBS)

$(OUT)/%.o: %.cpp
	@mkdir -p $(OUT)
	$(CXX) $(CXXFLAGS) -march=$(ARCH) $(CHOICES) -MMD -c -o $@ $<

# Tests: every stage with every combination, at a level of instructions: make build/test/native/matmul_test
build/test/$(ARCH)/%.o: %.cpp
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) -march=$(ARCH) -DBUILD_EVERY_COMBINATION -MMD -c -o $@ $<
build/test/$(ARCH)/%_test.o: tests/%_test.cpp
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) -march=$(ARCH) -I. -DBUILD_EVERY_COMBINATION -MMD -c -o $@ $<

-include $(wildcard build/*/*.d build/test/*/*.d)
.PHONY: all
.SECONDARY:
